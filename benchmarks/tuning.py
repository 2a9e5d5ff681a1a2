"""Tuning without labels: how much it brings back, and what does it (CIFAR-10 ResNets trained by others).

    python benchmarks/tuning.py budgets --weights resnet32.th --data-dir DATA --runs FOLDER [--model resnet32]
    python benchmarks/tuning.py losses  ... what teaches: each at its best learning rate and batch-norm mode
    python benchmarks/tuning.py images  ... how many images, and whose

`losses` searches rate and mode at the first seed (`common.searched`), and makes the best row for the other seeds.
`budgets`: the default at 0.44, 0.30 and 0.15 of the network's multiply-adds, 150 and 500 steps. Every row starts from
the closed form of 2,000 calibration images without labels (a fifth of them only decides). Accuracy is the test split's,
only shown; what chooses is the KL(teacher || student) on the validation tenth of the training split. The seed sets the
sampled positions and labels of the moments, the order of the images and their augmentation. Rows already in the JSON
are not made again; closed forms and checkpoints lie in FOLDER, so that a killed run goes on. Writes
benchmarks/results/tuning-PART-MODEL.json. With --device cuda closed forms are still made on the CPU, and tuned there.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from common import Rows, network_parser, searched
from dk2pnet.data import split_training
from dk2pnet.modules import copy_model
from dk2pnet.networks.open import load_data
from dk2pnet.options import CompressOptions
from dk2pnet.plan import Budget
from dk2pnet.run.device import environment, pick_device
from dk2pnet.run.run import Run
from dk2pnet.students.closed_form import ClosedForm, Solved, solved_once
from dk2pnet.students.decisions import Judge
from dk2pnet.students.teacher import Teacher
from dk2pnet.students.tuning import Tuner
from dk2pnet.tasks import accuracy, agreement, divergence
from dk2pnet.training.trainer import TUNING
from recovery import add_mir, fskd, penultimate

KEYS = (
    "budget",
    "seed",
    "images",
    "whose",
    "method",
    "beta",
    "distill",
    "tau",
    "kp_tau",
    "whitened",
    "lr",
    "bn",
    "steps",
)
DEFAULT = {
    "images": 2000,
    "whose": "cifar10",
    "method": TUNING.method,
    "beta": TUNING.beta,
    "distill": TUNING.distill,
    "tau": TUNING.tau,
    "kp_tau": TUNING.kp_tau,
    "whitened": True,
    "lr": None,  # as `compress` chooses it
    "bn": TUNING.batch_norm,
    "steps": 150,
}
# Name of a row in the table -> what differs from the default. Adam does not see the scale of a loss, so that 0.1 KD
# beside hints is ten times the hints' weight beside KD.
LOSSES: dict[str, dict[str, Any]] = {
    "Euclidean hints": {"method": "euclidean"},
    "Euclidean hints, plain form": {"method": "euclidean", "whitened": False},
    "KP per unit": {"method": "kp-unit"},
    "KP per unit, plain form": {"method": "kp-unit", "whitened": False},
    "KD": {"method": "kd", "distill": 1.0},
    "KD, plain form": {"method": "kd", "distill": 1.0, "whitened": False},
    "KP over channels": {"method": "kp-channel"},
    "KP over positions": {"method": "kp-position"},
    "MiR": {"method": "mir"},
    "FSKD": {"method": "fskd", "steps": 0},
    "KP per unit + KD": {"method": "kp-unit", "distill": 1.0},
    "KP per unit + 0.1 KD": {"method": "kp-unit", "distill": 0.1},
    "KP over channels + KD": {"method": "kp-channel", "distill": 1.0},
    "KP over channels + 0.1 KD": {"method": "kp-channel", "distill": 0.1},
    "Euclidean hints + KD": {"method": "euclidean", "distill": 1.0},
    "Euclidean hints + 0.1 KD": {"method": "euclidean", "distill": 0.1},
}
# How many images, and whose.
SOURCES = [{"images": images} for images in (100, 500, 2000, 10000)] + [{"whose": "cifar100"}]


class Bench:
    """The network, its data, and the rows that are there."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, pick_device(options.device)
        self.rows = Rows(f"tuning-{options.part}-{options.model}", _key, lambda row: str(_key(row)))
        training = load_data(options.data, "train", options.model, data_dir=options.data_dir)
        test = load_data(options.data, "test", options.model, data_dir=options.data_dir)
        assert training is not None
        assert test is not None
        # Measured on its device; closed forms are made on the CPU.
        self.run_there = Run(device=self.device)
        network = self.opened(DEFAULT | {"whose": options.data}, self.run_there).network
        assert network.normalization is not None
        _, validation = split_training(training)
        self.validation = validation.without_labels().batches(128, network.normalization)
        self.test = test.batches(128, network.normalization)
        self.answers = network.predict(self.validation, self.run_there)
        self.teacher_accuracy = accuracy(network.predict(self.test, self.run_there))
        self.solved: dict[tuple, tuple[Teacher, Solved, float]] = {}  # the last one only

    def opened(self, row: Mapping[str, Any], run: Run) -> Teacher:
        """The teacher with the images of a row, on the device of `run`."""
        options = self.options
        how = CompressOptions(
            weights=options.weights,
            normalize=options.normalize,
            data_dir=options.data_dir,
            criterion="loss",
            calibration_images=row["images"],
            calibration_data=row["whose"] if row["whose"] != options.data else None,
            tune=1,  # so many steps as the row says
        )
        return Teacher.open(options.model, options.data, how, run)

    def closed_form(self, row: dict) -> tuple[Teacher, Solved, float]:
        """The student without tuning, or to be tuned; moments are gathered anew, to have the seconds of one run."""
        # Only what is neither tuned nor fitted afterwards is reconstructed, as in `compress`.
        recovered = bool(row["steps"]) or row["method"] == "fskd"
        key = tuple(row[name] for name in ("budget", "seed", "images", "whose")) + (recovered,)
        if key not in self.solved:
            run = Run(seed=row["seed"])
            teacher = here = self.opened(row, run)
            if self.device.type != "cpu":
                teacher = self.opened(row, self.run_there)

            def solve() -> Solved:
                with ClosedForm(here, run) as closed:
                    return closed.solve(Budget.parse(row["budget"]), whiten=recovered)

            place = Path(self.options.runs, self.options.model, "-".join(map(str, key)))
            place.mkdir(parents=True, exist_ok=True)
            solved = solved_once(place, teacher.network, run, solve)
            self.solved = {key: (teacher, solved, sum(run.clock.seconds.values()))}  # one at a time in memory
        return self.solved[key]

    def run(self, row: dict) -> dict:
        teacher, solved, seconds = self.closed_form(row)
        samples, held = teacher.samples, teacher.held
        dense: Any = teacher.network
        assert samples is not None
        assert held is not None
        found: dict[str, Any] = {"closed_form_seconds": seconds}
        student: Any = solved.student
        if row["method"] == "fskd":
            began = time.perf_counter()
            student = replace(student, model=copy_model(student.model))
            fskd(student.model, dense.model, samples.gather, self.device)
            judge = Judge(dense, held, samples.held_out, self.run_there)
            student = judge.apply(dense.after_tuning(student, samples.gather, self.run_there), student, [])
            found["seconds"] = time.perf_counter() - began
        elif row["steps"]:
            options = None
            if row["lr"] is not None:
                mir = row["method"] == "mir"
                options = replace(
                    TUNING,
                    **{key: row[key] for key in ("method", "beta", "distill", "tau", "kp_tau")},
                    learning_rate=row["lr"],
                    batch_norm=row["bn"],
                    hints=penultimate(student.model, dense.model, dense.example) if mir else (),
                )
            times: list[float] = []
            run = Run(lambda *_: times.append(time.perf_counter()), seed=row["seed"], device=self.device)
            tuner = Tuner(teacher, run, options, row["whitened"])
            decided: list[dict[str, Any]] = []
            tuned = tuner.tune(replace(solved, decisions=decided), row["steps"])
            found["rate"] = decided[-1].get("recipe", {}).get("rate")
            found["kept"] = tuned is not None  # else the student stays as it was, as in `compress`
            student = tuned or student
            # By the median, as the process may have been stopped for a while.
            found["seconds"] = row["steps"] * statistics.median(b - a for a, b in zip(times, times[1:], strict=False))
        answers = student.predict(self.validation, self.run_there)
        found |= {
            "accuracy": accuracy(student.predict(self.test, self.run_there)),
            "validation_kl": divergence(self.answers, answers),
            "validation_agreement": agreement(self.answers, answers),
            "macs_kept": student.macs / solved.plan.macs_dense,
            "threads": torch.get_num_threads(),
        }
        return found

    def record(self, row: dict) -> None:
        about = {"model": self.options.model, "teacher_accuracy": self.teacher_accuracy}
        self.rows.add(row, {**about, "environment": environment(self.device)})


def _key(row: Mapping[str, Any]) -> tuple:
    return tuple(row[name] for name in KEYS)


def made(bench: Bench, row: dict) -> dict:
    """The row, which is made unless the JSON has it."""
    known = [other for other in bench.rows.read() if _key(other) == _key(row)]
    if known:
        return known[0]
    row = row | bench.run(row)
    bench.record(row)
    print({key: row.get(key) for key in (*KEYS, "accuracy", "validation_agreement", "seconds")}, flush=True)
    return row


def losses(bench: Bench, budget: str) -> None:
    """What teaches: the search at the first seed, the other seeds at what was best there."""
    options = bench.options
    for name in options.only or LOSSES:
        base = DEFAULT | LOSSES[name] | {"budget": budget, "name": name}
        if base["steps"]:
            first = base | {"seed": options.seeds[0]}
            best = searched(lambda lr, bn, first=first: made(bench, first | {"lr": lr, "bn": bn}))
        else:
            best = {"lr": 0.0, "bn": ""}
        for seed in options.seeds:
            made(bench, base | {"seed": seed, "lr": best["lr"], "bn": best["bn"]})


def main() -> None:
    parser = network_parser(__doc__)
    parser.add_argument("part", choices=("budgets", "losses", "images"))
    parser.add_argument("--runs", required=True, help="folder for closed forms")
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.44, 0.3, 0.15])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", nargs="+", type=int, default=[150, 500])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="+", choices=list(LOSSES))
    options = parser.parse_args()
    add_mir()
    bench = Bench(options)
    for number in options.budgets:
        budget = f"macs={number:g}"
        if options.part == "losses":
            losses(bench, budget)
            continue
        for seed in options.seeds:
            base = DEFAULT | {"budget": budget, "seed": seed}
            if options.part == "budgets":
                for steps in (0, *options.steps):
                    made(bench, base | {"steps": steps})
                continue
            for source in SOURCES:
                for steps in options.steps:
                    made(bench, base | source | {"steps": steps})


if __name__ == "__main__":
    main()
