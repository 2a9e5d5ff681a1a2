"""The global random generators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dk2pnet.training.checkpoint import random_state, set_random_state

__all__ = ["left_as_found"]


@contextmanager
def left_as_found() -> Iterator[None]:
    """The states of the global random generators and PyTorch's number of threads are put back after the block."""
    threads, state = torch.get_num_threads(), random_state()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        set_random_state(state)
