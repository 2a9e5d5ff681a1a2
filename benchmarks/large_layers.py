"""Time and memory of statistics and solver on networks for 224 x 224 images (random weights, random images).

    python benchmarks/large_layers.py [--models torchvision/resnet50 torchvision/vgg16_bn] [--images 256]

Each network runs in a process of its own, whose peak memory the operating system reports. The forward pass that the
statistics are compared with is taken right before and right after them. Writes benchmarks/results/large_layers.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator

import torch
from torch import Tensor

import dk2pnet
from common import plain_parser, write_results
from dk2pnet.answers import predict
from dk2pnet.networks.named import make_network
from dk2pnet.run.device import environment

BATCH, SIZE = 16, 224


class RandomImages:
    """Batches of normalised noise, the same in every pass."""

    def __init__(self, images: int) -> None:
        self.images = images

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, self.images, BATCH):
            generator = torch.Generator().manual_seed(start)
            yield torch.randn(min(BATCH, self.images - start), 3, SIZE, SIZE, generator=generator)


def main() -> None:
    parser = plain_parser(__doc__)
    parser.add_argument("--models", nargs="+", default=["torchvision/resnet50", "torchvision/vgg16_bn"])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--criterion", default="response")
    parser.add_argument("--budget", default="kernels=2")
    parser.add_argument("--rebuild", action="store_true", help="also the layer-by-layer reconstruction (minutes)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.images, options.criterion, options.budget, options.rebuild)))
        return
    rows = []
    for model in options.models:
        arguments = ["--one", model, "--images", str(options.images)]
        arguments += ["--criterion", options.criterion, "--budget", options.budget]
        arguments += ["--rebuild"] if options.rebuild else []
        output = subprocess.run(
            [sys.executable, __file__, *arguments], check=True, capture_output=True, text=True
        ).stdout
        rows.append(json.loads(output.splitlines()[-1]))
        print(json.dumps(rows[-1]), flush=True)
        result = {"rows": rows, **environment(torch.device("cpu"))}
        write_results("large_layers", result)


def measure(name: str, images: int, criterion: str, budget: str, rebuild: bool) -> dict:
    """One network: seconds of every step, peak memory."""
    torch.manual_seed(0)
    model = make_network(name).eval()
    # calibration keeps four of five images, so that `images` of them are gathered from
    data = RandomImages(images * 5 // 4)
    part = [(x, None) for x in RandomImages(2 * BATCH)]
    predict(model, part[:1])
    before = _forward(model, part)
    options = {"calibration_images": images * 5 // 4, "rebuild": rebuild}
    result = dk2pnet.compress(model, data, budget, criterion=criterion, **options)
    forward = (before + _forward(model, part)) / 2 / (2 * BATCH) * images
    seconds = result.metrics["run"]["seconds"]
    return {
        "model": name,
        "criterion": criterion,
        "budget": budget,
        "images": result.metrics["run"]["images"]["calibration"],
        "layers": sum(layer.counts is not None for layer in result.plan.layers),
        "forward_seconds": round(forward, 1),
        "statistics_over_forward": round(seconds["moments"] / forward, 2),
        "seconds": seconds,
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "macs_kept": result.metrics["student"]["macs"] / result.metrics["teacher"]["macs"],
    }


def _forward(model: torch.nn.Module, batches: list) -> float:
    start = time.perf_counter()
    predict(model, batches)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
