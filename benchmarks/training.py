"""Train compressed students of a CIFAR-10 ResNet beside it, by several methods under one schedule.

    python benchmarks/training.py --weights resnet32.th --data-dir DATA --runs FOLDER
        [--model resnet32] [--budgets macs=0.25 ...] [--methods kp-channel kd euclidean] [--epochs 10] [--compile]

Every student is one `dk2pnet compress --criterion loss --epochs 0`, every run one `dk2pnet train` with it, in FOLDER.
What is there already is not made again, and a killed run goes on where it was: repeat the command. Writes the runs of
FOLDER, also those that are not finished, to benchmarks/results/training-MODEL.json.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import dk2pnet
from common import network_parser, write_results
from dk2pnet.commands.train import train
from dk2pnet.training.losses import METHODS
from dk2pnet.training.trainer import TrainingOptions


def log_of(folder: Path) -> list[dict]:
    path = folder / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def collect(runs: Path, model: str) -> dict:
    """A row for every run in the folder, from the files that the commands wrote."""
    rows = []
    for note in sorted(runs.glob("*.run.json")):
        row = json.loads(note.read_text())
        if row["model"] != model:
            continue
        out = note.with_name(note.name.removesuffix(".run.json"))
        log = log_of(out if out.exists() else out.with_name(f"{out.name}.unfinished"))
        closed = json.loads((runs / row.pop("student") / "metrics.json").read_text())
        row |= {
            "teacher_accuracy": closed["teacher"]["accuracy"],
            "macs_kept": closed["student"]["macs"] / closed["teacher"]["macs"],
            "parameters_kept": closed["student"]["parameters"] / closed["teacher"]["parameters"],
            "closed_form": closed["student"]["accuracy"],
            "epochs_done": sum("validation_accuracy" in line for line in log),
        }
        speeds = [line["images_per_second"] for line in log]
        row["images_per_second"] = statistics.median(speeds) if speeds else None
        # By the median, as a process may have been stopped for a while.
        row["minutes"] = log[-1]["step"] * TrainingOptions.batch_size / row["images_per_second"] / 60 if log else None
        if out.exists():
            metrics = json.loads((out / "metrics.json").read_text())
            row |= {key: metrics["network"][key] for key in ("accuracy", "validation_accuracy")}
            row |= {"versions": metrics["run"]["versions"], "hardware": metrics["run"]["hardware"]}
        rows.append(row)
    return {"model": model, "rows": rows}


def record(runs: Path, model: str) -> None:
    """Write the rows of this model."""
    write_results(f"training-{model}", collect(runs, model))


def main() -> None:
    parser = network_parser(__doc__)
    parser.add_argument("--runs", required=True, type=Path)
    parser.add_argument("--budgets", nargs="*", default=["macs=0.25", "macs=0.15"])
    parser.add_argument("--methods", nargs="+", default=["kp-channel", "kd", "euclidean"], choices=list(METHODS))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    where = {"normalize": options.normalize, "data_dir": options.data_dir}
    for budget in options.budgets:
        student = options.runs / f"{options.model}-{budget}"
        if not student.exists():
            dk2pnet.compress(
                options.model,
                options.data,
                budget,
                criterion="loss",
                tune=0,
                weights=options.weights,
                out=student,
                seed=0,
                **where,
            )
        for method in options.methods:
            recipe = {"epochs": options.epochs, "learning_rate": options.lr, "method": method, "seed": options.seed}
            out = options.runs / f"{student.name}-{method}-{options.epochs}-{options.seed}"
            note = {"model": options.model, "budget": budget, "student": student.name, **recipe}
            note |= {"compile": options.compile}
            out.with_name(f"{out.name}.run.json").write_text(json.dumps(note))
            if not out.exists():
                train(
                    str(student),
                    options.data,
                    out=out,
                    teacher=options.model,
                    teacher_weights=options.weights,
                    compile=options.compile,
                    **recipe,
                    **where,
                )
            accuracy = json.loads((out / "metrics.json").read_text())["network"]["accuracy"]
            print(f"{out.name}: {accuracy:.2f} %", flush=True)
            record(options.runs, options.model)


if __name__ == "__main__":
    main()
