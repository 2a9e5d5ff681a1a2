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
from dk2pnet.run.device import environment, pick_device

from common import Rows, network_parser, searched
from dk2pnet.data import calibration_split, split_training
from dk2pnet.data.samples import Images, named_images
from dk2pnet.measure import accuracy, agreement, divergence, macs, predict
from dk2pnet.modules import copy_model
from dk2pnet.networks.open import load_data, open_network
from dk2pnet.plan import Budget
from dk2pnet.run.clock import Clock
from dk2pnet.students.closed_form import ClosedForm, Solved, renormalized, solved_once
from dk2pnet.students.tuning import OPTIONS, Tuner
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
    "method": OPTIONS.method,
    "beta": OPTIONS.beta,
    "distill": OPTIONS.distill,
    "tau": OPTIONS.tau,
    "kp_tau": OPTIONS.kp_tau,
    "whitened": True,
    "lr": None,  # as `compress` chooses it
    "bn": OPTIONS.batch_norm,
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
        self.options = options
        self.rows = Rows(f"tuning-{options.part}-{options.model}", _key, lambda row: str(_key(row)))
        self.training = load_data(options.data, "train", options.model, data_dir=options.data_dir)
        self.test = load_data(options.data, "test", options.model, data_dir=options.data_dir)
        assert self.training is not None
        assert self.test is not None
        self.network = open_network(
            options.model, weights=options.weights, normalize=options.normalize, data=self.training
        )
        self.norm = self.network.normalization
        assert self.norm is not None
        self.teacher = self.network.model.eval()
        _, validation = split_training(self.training)
        self.validation = validation.without_labels().batches(128, self.norm)
        self.test_batches = self.test.batches(128, self.norm)
        self.example = next(iter(self.validation))[0][:1]
        self.solved: dict[tuple, tuple[Images, Any, Solved, float]] = {}  # the last one only
        self.use(pick_device(options.device))

    def use(self, device: torch.device) -> None:
        """Tune and measure there."""
        self.device, self.tuning_teacher = device, copy_model(self.teacher).to(device)
        self.answers = predict(self.tuning_teacher, self.validation, device)
        self.teacher_accuracy = accuracy(predict(self.tuning_teacher, self.test_batches, device))

    def images(self, row: dict) -> Images:
        images = named_images(self.training, None, self.network, row["images"])
        if row["whose"] != self.options.data:
            other = load_data(row["whose"], "train", self.options.model, data_dir=self.options.data_dir)
            assert other is not None
            gather, held = calibration_split(split_training(other)[0], row["images"])
            images.gather, images.held_out = gather.batches(128, self.norm), held.batches(128, self.norm)
            images.tune = gather
        return images

    def closed_form(self, row: dict) -> tuple[Images, Any, Solved, float]:
        """The student without tuning, or to be tuned; moments are gathered anew, to have the seconds of one run."""
        # Only what is neither tuned nor fitted afterwards is reconstructed, as in `compress`.
        recovered = bool(row["steps"]) or row["method"] == "fskd"
        key = tuple(row[name] for name in ("budget", "seed", "images", "whose")) + (recovered,)
        if key not in self.solved:
            images = self.images(row)
            held = predict(self.teacher, images.held_out)
            clock = Clock()

            def solve() -> Solved:
                with ClosedForm(
                    self.teacher, held, self.network, images, self.example, "loss", seed=row["seed"], clock=clock
                ) as closed:
                    return closed.solve(Budget.parse(row["budget"]), whiten=recovered)

            place = Path(self.options.runs, self.options.model, "-".join(map(str, key)))
            place.mkdir(parents=True, exist_ok=True)
            solved = solved_once(place, self.teacher, clock, solve)
            self.solved = {key: (images, held, solved, sum(clock.seconds.values()))}  # one at a time in memory
        return self.solved[key]

    def run(self, row: dict) -> dict:
        images, held, solved, seconds = self.closed_form(row)
        student, example = copy_model(solved.student).to(self.device), self.example.to(self.device)
        start = Solved(student, solved.plan, [], [], solved.whitenings)
        found: dict[str, Any] = {"closed_form_seconds": seconds}
        if row["method"] == "fskd":
            began = time.perf_counter()
            fskd(student, self.tuning_teacher, images.gather, self.device)
            student = renormalized(student, held, images.gather, images.held_out, self.device, [])
            found["seconds"] = time.perf_counter() - began
        elif row["steps"]:
            options = None
            if row["lr"] is not None:
                options = replace(
                    OPTIONS,
                    **{key: row[key] for key in ("method", "beta", "distill", "tau", "kp_tau")},
                    learning_rate=row["lr"],
                    batch_norm=row["bn"],
                    hints=penultimate(student, self.tuning_teacher, example) if row["method"] == "mir" else (),
                )
            times: list[float] = []
            tuner = Tuner(
                self.tuning_teacher,
                held,
                images,
                example=example,
                name=self.options.data,
                normalization=self.norm,
                seed=row["seed"],
                options=options,
                whitened=row["whitened"],
                progress=lambda *_: times.append(time.perf_counter()),
            )
            found["rate"] = tuner.rate_for(predict(student, images.held_out, self.device))
            tuned = tuner.tune(start, row["steps"])
            found["kept"] = tuned is not None  # else the student stays as it was, as in `compress`
            student = tuned or student
            # By the median, as the process may have been stopped for a while.
            found["seconds"] = row["steps"] * statistics.median(b - a for a, b in zip(times, times[1:], strict=False))
        answers = predict(student, self.validation, self.device)
        found |= {
            "accuracy": accuracy(predict(student, self.test_batches, self.device)),
            "validation_kl": divergence(self.answers, answers),
            "validation_agreement": agreement(self.answers, answers),
            "macs_kept": macs(student, example) / solved.plan.macs_dense,
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
