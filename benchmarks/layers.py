"""Single layers: measured speed-up over the dense layer, divided by what multiply-adds promise.

    python benchmarks/layers.py [--targets onnxruntime openvino] [--threads 1 2] [--batches 1 16] [--seconds 0.3]

Layers of C = N channels, 3 x 3, dense and with one, two and three kernels in every channel, each as a network of its
own; all forms of one layer are timed in turns in one process. ``multiplier`` is the naive form (one depthwise
convolution with a channel multiplier). Rows already in the JSON are not made again. Writes
benchmarks/results/layers.json.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from common import plain_parser, read_results, write_results
from dk2pnet.deploy.emit import plain_layer
from dk2pnet.deploy.export import onnx_bytes
from dk2pnet.deploy.latency import compare_latency
from dk2pnet.layer import DKConv2d
from dk2pnet.run.device import environment, pick_device

CHANNELS, SIZES, KERNELS, FORMS = (64, 128, 256, 512), (56, 28, 14, 7), (1, 2, 3), ("branches", "concat", "gathered")


def main() -> None:
    parser = plain_parser(__doc__)
    parser.add_argument("--targets", nargs="+", default=["onnxruntime", "openvino"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--seconds", type=float, default=0.3)
    options = parser.parse_args()
    result = read_results("layers", {"rows": []})
    result["environment"] = environment(pick_device("cpu"))
    done = {tuple(row[key] for key in ("target", "threads", "batch", "channels", "size")) for row in result["rows"]}
    for target in options.targets:
        for threads in options.threads:
            for batch in options.batches:
                for channels in CHANNELS:
                    for size in SIZES:
                        place = (target, threads, batch, channels, size)
                        if place not in done:
                            row = dict(zip(("target", "threads", "batch", "channels", "size"), place, strict=True))
                            row |= measured(*place, options.seconds)
                            result["rows"].append(row)
                            write_results("layers", result)
                            print(row, flush=True)


def measured(target: str, threads: int, batch: int, channels: int, size: int, seconds: float) -> dict[str, Any]:
    x = torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(0))
    dense = nn.Conv2d(channels, channels, 3, padding=1)
    networks: dict[str, nn.Module] = {"dense": dense}
    for kernels in KERNELS:
        layer = DKConv2d.like(dense, kernels)
        for form in FORMS:
            if kernels > 1 or form == "branches":  # with one kernel in every channel all forms are the same
                networks[f"{kernels} {form}"] = plain_layer(layer, form)
        wide = kernels * channels
        networks[f"{kernels} multiplier"] = nn.Sequential(
            nn.Conv2d(channels, wide, 3, padding=1, groups=channels, bias=False), nn.Conv2d(wide, channels, 1)
        )
    files = {name: onnx_bytes(network.eval(), x[:1]) for name, network in networks.items()}
    found = compare_latency(files, x, target=target, threads=threads, seconds=seconds, rounds_min=7)
    row: dict[str, Any] = {"dense_ms": found["dense"].median_ms, "kernels": {}}
    for kernels in KERNELS:
        promised = 9 * channels / (kernels * (9 + channels))
        speedups = {
            name.partition(" ")[2]: found["dense"].median_ms / each.median_ms
            for name, each in found.items()
            if name.startswith(f"{kernels} ")
        }
        row["kernels"][str(kernels)] = {"promised": promised, **speedups}
    row["noisy"] = any(each.noisy for each in found.values())
    return row


if __name__ == "__main__":
    main()
