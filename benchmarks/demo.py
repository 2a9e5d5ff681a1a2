"""The demo: train a small network on scikit-learn's digits, compress it under every criterion, tune it without labels,
train it with KP.

Everything is exported and timed in ONNX Runtime; prints the table, and with --record writes it to
benchmarks/results/demo.json, from which README.md's table is made.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console

import dk2pnet
from common import write_results
from dk2pnet.commands.evaluate import evaluate
from dk2pnet.commands.train import train
from dk2pnet.deploy.export import export_onnx
from dk2pnet.deploy.latency import compare_latency
from dk2pnet.measure import macs, parameters
from dk2pnet.report.tables import format_count, rich_table
from dk2pnet.run.device import environment

BUDGET = "macs=0.07"
HEADER = ("network", "accuracy", "parameters", "MACs", "ONNX file", "latency")


def main() -> None:
    console = Console()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="dk2pnet-demo-") as folder:
        rows = run(Path(folder), console)
    result = {
        "budget": BUDGET,
        "rows": rows,
        "seconds": round(time.perf_counter() - start, 1),
        **environment(torch.device("cpu")),
    }
    if "--record" in sys.argv:
        write_results("demo", result)
    console.print(rich_table(f"vgg8 on digits, budget {BUDGET}", HEADER, table_rows(rows)))
    console.print(
        f"Accuracy on {rows[0]['images']} test images, in ONNX Runtime; latency of one image, interleaved medians; "
        f"{result['seconds']:.0f} s in all."
    )


def run(folder: Path, console: Console) -> list[dict]:
    """Train, compress, export, evaluate, time."""
    teacher = folder / "teacher"
    console.print("training the teacher ...")
    train("vgg8", "digits", out=teacher, input_size=16, epochs=5, learning_rate=0.05, batch_size=64)
    model, plan = dk2pnet.load_student(teacher)
    assert plan.input_shape is not None
    example = torch.zeros(1, *plan.input_shape)
    export_onnx(
        model,
        example,
        teacher / "model.onnx",
        metadata={"normalization": json.dumps(plan.normalization), "input_shape": json.dumps(plan.input_shape)},
    )
    rows = [{"name": "teacher", "parameters": parameters(model), "macs": macs(model, example), "folder": teacher}]
    for criterion, tune, epochs in (
        ("weight", 0, 0),
        ("response", 0, 0),
        ("loss", 0, 0),
        ("loss", 150, 0),
        ("loss", 0, 4),
    ):
        name = criterion + " + tuning" * bool(tune) + " + KP" * bool(epochs)
        console.print(f"compressing: {name} ...")
        out = folder / name.replace(" ", "")
        options = {"tune": tune, "epochs": epochs, "batch_size": 64, "learning_rate": 0.02, "calibration_images": 500}
        result = dk2pnet.compress(str(teacher), "digits", BUDGET, criterion=criterion, out=out, **options)
        student = result.metrics["student"]
        rows.append({"name": name, "parameters": student["parameters"], "macs": student["macs"], "folder": out})
    files = {row["name"]: row["folder"] / "model.onnx" for row in rows}
    console.print("timing in ONNX Runtime ...")
    times = compare_latency(files, example.numpy(), threads=1)
    for row in rows:
        path = files[row["name"]]
        figures = evaluate(str(path), "digits")
        row |= {"accuracy": figures["accuracy"], "images": figures["images"], "onnx_bytes": figures["bytes"]}
        row |= {"latency_ms": times[row["name"]].median_ms}
        del row["folder"]
    return rows


def table_rows(rows: list[dict]) -> list[tuple[str, ...]]:
    """The table's cells; latency beside the teacher's."""
    dense = rows[0]["latency_ms"]
    return [
        (
            row["name"],
            f"{row['accuracy']:.1f} %",
            format_count(row["parameters"]),
            format_count(row["macs"]),
            f"{row['onnx_bytes'] / 1024:.0f} KiB",
            f"{row['latency_ms']:.3f} ms ({dense / row['latency_ms']:.1f}x)",
        )
        for row in rows
    ]


if __name__ == "__main__":
    main()
