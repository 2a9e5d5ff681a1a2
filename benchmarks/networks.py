"""Latency budgets on torchvision's networks at 224 x 224: is the budget met, and what did it cost in multiply-adds?

    python benchmarks/networks.py [--threads 1 2] [--only resnet18]

Every row is one `dk2pnet.compress` (criterion ``weight``; the weights are random, time does not depend on them) whose
student and teacher are then timed once more, in turns, from the files written. A budget that cannot be reached is
recorded with what was said. Rows already in the JSON are not made again. Writes benchmarks/results/networks.json.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import dk2pnet
from common import plain_parser, read_results, write_results
from dk2pnet.deploy.export import export_onnx
from dk2pnet.deploy.latency import compare_latency
from dk2pnet.networks.named import make_network
from dk2pnet.run.device import environment, pick_device

BUDGETS = {"resnet18": (0.5, 0.25), "vgg16_bn": (0.7, 0.5, 0.25), "resnet50": (0.85, 0.5)}


def main() -> None:
    parser = plain_parser(__doc__)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--only", nargs="+", default=list(BUDGETS))
    options = parser.parse_args()
    result = read_results("networks", {"rows": []})
    result["environment"] = environment(pick_device("cpu"))
    done = {(row["model"], row["budget"], row["threads"]) for row in result["rows"]}
    example = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    for threads in options.threads:
        for name in options.only:
            for fraction in BUDGETS[name]:
                if (name, fraction, threads) in done:
                    continue
                row = {
                    "model": name,
                    "budget": fraction,
                    "threads": threads,
                    **measured(name, fraction, threads, example),
                }
                result["rows"].append(row)
                write_results("networks", result)
                print(row, flush=True)


def measured(name: str, fraction: float, threads: int, example: torch.Tensor) -> dict[str, Any]:
    torch.manual_seed(0)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        teacher = make_network(f"torchvision/{name}").eval()
        try:
            found = dk2pnet.compress(
                teacher,
                budget=f"latency={fraction:g}",
                criterion="weight",
                example_input=example,
                threads=threads,
                out=Path(folder) / "out",
            )
        except dk2pnet.InputError as error:
            return {"refused": str(error), "seconds": time.perf_counter() - start}
        seconds = time.perf_counter() - start
        paths = {"teacher": Path(folder) / "teacher.onnx", "student": Path(folder) / "out" / "model.onnx"}
        export_onnx(teacher, example, paths["teacher"])
        times = compare_latency(paths, example, threads=threads, seconds=5)
    metrics = found.metrics
    return {
        "latency": times["student"].median_ms / times["teacher"].median_ms,
        "teacher_ms": times["teacher"].median_ms,
        "teacher_interval_ms": [times["teacher"].low_ms, times["teacher"].high_ms],
        "student_ms": times["student"].median_ms,
        "student_interval_ms": [times["student"].low_ms, times["student"].high_ms],
        "macs_kept": metrics["student"]["macs"] / metrics["teacher"]["macs"],
        "parameters_kept": metrics["student"]["parameters"] / metrics["teacher"]["parameters"],
        "decomposed": sum(layer["kind"] == "dk" for layer in metrics["layers"]),
        "dense": sum(layer["kind"] == "dense" for layer in metrics["layers"]),
        "difference": metrics["student"]["onnx_difference"],
        "search": metrics["latency_search"],
        "seconds": seconds,
    }


if __name__ == "__main__":
    main()
