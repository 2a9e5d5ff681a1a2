"""One process against two, started as a user would: the moments they gather, and the accuracy they train to.

    python benchmarks/processes.py [--seeds 5] [--epochs 6]

Moments: VGG-8 (random weights) on scikit-learn's digits, inputs and gradients, 1,200 images; the largest relative
difference (Frobenius) over layers. Training: VGG-8 on digits, several seeds, fp32. One CPU thread for each process.
Writes benchmarks/results/processes.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from common import plain_parser, write_results
from dk2pnet import processes
from dk2pnet.data import Normalization, load
from dk2pnet.decompose.moments import Moments
from dk2pnet.networks.named import make_network
from dk2pnet.networks.torch.gather import gather_moments
from dk2pnet.run.device import environment, pick_device

IMAGES = 1200


def launched(*arguments: str) -> list[str]:
    """The command that starts two processes on a machine's CPU."""
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    return [sys.executable, *launch, *arguments]


def gathered(start: int, stop: int) -> dict[str, Moments]:
    torch.manual_seed(0)
    network = make_network("vgg8", num_classes=10, in_channels=1)
    images = load("digits", "train").subset(range(start, stop))
    convolutions = {name: each for name, each in network.named_modules() if isinstance(each, torch.nn.Conv2d)}
    batches = images.batches(100, Normalization.parse("0.5/0.5"))
    (moments,) = gather_moments(network, convolutions, batches, gradients=True, first_image=start)
    return moments


def difference(found: dict[str, Moments], wanted: dict[str, Moments]) -> float:
    """Largest relative difference of A, B and the means, Frobenius."""
    worst = 0.0
    for name, each in wanted.items():
        for part in ("A", "B", "mean"):
            a, b = getattr(found[name], part)(), getattr(each, part)()
            worst = max(worst, float((a - b).norm() / b.norm()))
    return worst


def child() -> None:
    """What each of the two processes does: gather from its half, and add up."""
    pick_device("cpu", 1)
    rank, count = processes.rank(), processes.count()
    moments = gathered(IMAGES * rank // count, IMAGES * (rank + 1) // count)
    for each in moments.values():
        each.merge(processes.sum_over_all)
    if processes.is_main():
        print(json.dumps({"processes": count, "difference": difference(moments, gathered(0, IMAGES))}))
    processes.wait()


def output(call: list[str]) -> str:
    result = subprocess.run(call, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if result.returncode:
        raise SystemExit(result.stderr)
    return result.stdout


def accuracy(folder: Path, seed: int, epochs: int, together: bool) -> float:
    out = folder / f"{seed}-{together}"
    command = ["-m", "dk2pnet", "train", "--model", "vgg8", "--data", "digits", "--epochs", str(epochs)]
    command += ["--precision", "fp32", "--seed", str(seed), "--out", str(out)]
    output(launched(*command) if together else [sys.executable, *command])
    return json.loads((out / "metrics.json").read_text())["network"]["accuracy"]


def main() -> None:
    parser = plain_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child()
        return
    moments = json.loads(output(launched(__file__, "--child")).splitlines()[-1])
    print(moments, flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for count in (1, 2):
            found = [accuracy(Path(folder), seed, options.epochs, count == 2) for seed in range(options.seeds)]
            rows.append({"processes": count, "accuracies": found, "mean": statistics.mean(found)})
            rows[-1]["spread"] = statistics.stdev(found) if len(found) > 1 else None
            print(rows[-1], flush=True)
    result = {"moments": moments, "training": rows, **environment(pick_device("cpu"))}
    write_results("processes", result)


if __name__ == "__main__":
    main()
