"""``python -m dk2pnet``, which is how `torchrun -m` and `accelerate launch -m` start it."""

from dk2pnet.cli import main

main()
