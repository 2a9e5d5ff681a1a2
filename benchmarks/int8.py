"""Dominant kernels and int8, alone and together: accuracy, size and latency; and which layers int8 makes pointless.

    python benchmarks/int8.py --weights resnet32.th --data-dir DATA [--budgets latency=0.6] [--threads 1]

The student is chosen once for fp32 (``--target onnxruntime``) and once for int8 (``--target onnxruntime-int8``, where
the budget is a fraction of the *int8* dense network's time). Then layers of 64 to 512 channels, dense and with one to
three kernels in every channel, in fp32 and int8, each between neighbours as in a network. Rows already in the JSON are
not made again. Writes benchmarks/results/int8-MODEL.json.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

import dk2pnet
from common import network_parser, read_results, write_results
from dk2pnet.deploy.costs import DENSE, LatencyTable, Spot, gathered
from dk2pnet.run.device import environment, pick_device

LAYERS = ((16, 32), (32, 16), (64, 8), (64, 56), (128, 28), (256, 14), (512, 7))
TARGETS = ("onnxruntime", "onnxruntime-int8")


def main() -> None:
    parser = network_parser(__doc__)
    parser.add_argument("--budgets", nargs="+", default=["latency=0.6", "latency=0.8"])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    name = f"int8-{options.model}"
    result = read_results(name, {"model": options.model, "data": options.data, "networks": [], "layers": []})
    result["environment"] = environment(pick_device("cpu"))

    if not result["layers"]:
        result["threads"] = options.threads
        result["layers"] = layers(options.threads)
        write_results(name, result)
    for target in TARGETS:
        for budget in options.budgets:
            if any((row["target"], row["budget"]) == (target, budget) for row in result["networks"]):
                continue
            row = {"target": target, "budget": budget, "threads": options.threads}
            try:
                row |= compressed(options, budget, target)
            except dk2pnet.InputError as error:
                row["refused"] = str(error)
            result["networks"].append(row)
            write_results(name, result)
            print(result["networks"][-1], flush=True)


def compressed(options: argparse.Namespace, budget: str, target: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        metrics = dk2pnet.compress(
            options.model,
            options.data,
            budget,
            criterion="loss",
            tune=0,
            weights=options.weights,
            normalize=options.normalize,
            data_dir=options.data_dir,
            threads=options.threads,
            target=target,
            int8=True,
            out=Path(folder) / "out",
        ).metrics
    return {
        "macs_kept": metrics["student"]["macs"] / metrics["teacher"]["macs"],
        "dk_layers": sum(layer["kind"] == "dk" for layer in metrics["layers"]),
        "rows": metrics["int8"],
    }


def layers(threads: int) -> list[dict[str, Any]]:
    rows: dict[tuple[int, int], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:  # a table of its own: both targets against one reference
        for target in TARGETS:
            table = LatencyTable(target, threads, folder=Path(folder), seconds=0.3)
            for channels, size in LAYERS:
                spot = Spot(nn.Conv2d(channels, channels, 3, padding=1, device="meta"), (size, size))
                sketches = {"dense": DENSE} | {str(k): gathered(channels, k, 0) for k in (1, 2, 3)}
                times = table.ratios_of({spot: list(sketches.values())})[spot.key]
                row = rows.setdefault((channels, size), {"channels": channels, "size": size})
                row[target] = {name: times[sketch] / times[DENSE] for name, sketch in sketches.items()}
    return list(rows.values())


if __name__ == "__main__":
    main()
