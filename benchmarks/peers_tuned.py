"""Other methods of the field under the same tuning: is it the decomposition, or what comes after it?

    pip install -r benchmarks/requirements-peers.txt
    python benchmarks/peers_tuned.py --weights resnet32.th --data-dir DATA --runs FOLDER [--budgets 0.3] [--methods ...]

Every method of peers.py starts as there, at the same multiply-adds of the whole network, and is tuned as `compress`
tunes: the same 2,000 images without labels, 150 steps, Euclidean hints, Adam. Each chooses for itself, by the agreement
with the teacher on the validation tenth of the training split: first the learning rate with batch norm in training mode
(3e-3 and 1e-2, then further in the direction of the better one as long as that helps), then frozen batch norm at that
rate. The best row is made again with the other seeds, which set the order of the images, their augmentation and, where
a method draws any, the random numbers of its start. Ours is tuned in the plain form, as all others, and in the whitened
one, so that the preconditioner is not taken for the decomposition. Test accuracy is shown, and chooses nothing. Starts
are kept in FOLDER, rows already in the JSON are not made again. Writes benchmarks/results/peers_tuned-MODEL.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import Rows, network_parser, searched
from dk2pnet.answers import Predictions, predict
from dk2pnet.data import split_training
from dk2pnet.decompose.whiten import Whitening
from dk2pnet.layer import DKConv2d
from dk2pnet.measure import macs, parameters
from dk2pnet.networks.open import load_data
from dk2pnet.networks.torch.gather import gather_moments
from dk2pnet.options import CompressOptions
from dk2pnet.run.device import environment, pick_device
from dk2pnet.run.run import Run
from dk2pnet.students.closed_form import Solved
from dk2pnet.students.teacher import Teacher
from dk2pnet.students.tuning import Tuner
from dk2pnet.tasks import accuracy, agreement, divergence
from dk2pnet.training.trainer import TUNING
from dk2pnet.training.whitened import whitening_of
from peers import METHODS, Named

STEPS = 150
# Name of a row -> the method of peers.py that it starts from, and whether it is tuned in the whitened form.
ROWS = {method: (method, False) for method in METHODS} | {"ours, loss, whitened": ("ours, loss", True)}


class Tuned(Named):
    """The harness of peers.py with the tuning of `compress`."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        training = load_data(options.data, "train", options.model, data_dir=options.data_dir)
        assert training is not None
        _, validation = split_training(training)
        self.validation = validation.without_labels().batches(128, self.norm)
        self.wanted = predict(self.teacher, self.validation)
        self.inputs: dict[str, Tensor] = {}
        how = {"weights": options.weights, "normalize": options.normalize, "data_dir": options.data_dir}
        self.ready = Teacher.open(options.model, options.data, CompressOptions(tune=STEPS, **how), Run())

    def start(self, method: str, budget: float, seed: int = 0) -> nn.Module:
        """The student that a method gives, before any tuning; kept."""
        name = f"{self.options.model}-{budget:g}-{method}-{seed}.pt".replace(" ", "_")
        place = Path(self.options.runs, name)
        if not place.exists():
            student = super().start(method, budget, seed)
            place.parent.mkdir(parents=True, exist_ok=True)
            torch.save(student, place)
        return torch.load(place, weights_only=False)

    def tuned(self, student: nn.Module, rate: float, batch_norm: str, whitened: bool, seed: int) -> nn.Module | None:
        """The last step's student with the batch norm that is closer to the teacher; None if tuning brought it no
        closer on the held-out images, where `compress` too keeps the student as it was."""
        options = replace(TUNING, learning_rate=rate, batch_norm=batch_norm)
        tuner = Tuner(self.ready, Run(seed=seed), options, whitened)
        nothing: Any = None  # the plan plays no part in tuning
        start = replace(self.ready.network, model=student)  # type: ignore[type-var]
        tuned: Any = tuner.tune(Solved(start, nothing, whitenings=self.whitenings(student) if whitened else {}), STEPS)
        return None if tuned is None else tuned.model

    def whitenings(self, student: nn.Module) -> dict[str, Whitening]:
        """Of all DK layers, by the moments of the teacher's inputs."""
        if not self.inputs:
            convolutions = {name: site.module for name, site in self.open.items()}
            for group in gather_moments(self.teacher, convolutions, self.gather):  # type: ignore[arg-type]
                self.inputs |= {name: moments.A() for name, moments in group.items()}
        layers = {name: m for name, m in student.named_modules() if isinstance(m, DKConv2d)}
        return {name: whitening_of(layer, self.inputs[name]) for name, layer in layers.items()}

    def figures(self, student: nn.Module) -> dict[str, float | None]:
        answers: Predictions = predict(student, self.validation)
        return {
            "accuracy": self.accuracy(student),
            "validation_agreement": agreement(self.wanted, answers),
            "validation_kl": divergence(self.wanted, answers),
        }


def _key(row: Mapping[str, Any]) -> tuple:
    return row["budget"], row["method"], row["bn"], row["lr"], row["seed"]


def explore(harness: Tuned, results: Rows, name: str, budget: float, about: Mapping[str, Any]) -> None:
    """All rows of one method at one budget."""
    method, whitened = ROWS[name]

    def row(rate: float, batch_norm: str, seed: int = harness.options.seeds[0]) -> dict[str, Any]:
        key = {"method": name, "budget": budget, "lr": rate, "bn": batch_norm, "seed": seed}
        known = [found for found in results.read() if _key(found) == _key(key)]
        if known:
            return known[0]
        student = harness.start(method, budget, seed)
        size = {"macs_kept": macs(student, harness.example) / harness.total, "parameters": parameters(student)}
        found = key | size
        if rate:
            began = time.perf_counter()
            tuned = harness.tuned(student, rate, batch_norm, whitened, seed)
            found |= {"seconds": time.perf_counter() - began, "kept": tuned is not None}
            student = tuned or student
        found |= harness.figures(student)
        results.add(found, about)
        print(found, flush=True)
        return found

    row(0.0, "")
    best = searched(row)
    for seed in harness.options.seeds[1:]:
        row(0.0, "", seed)
        row(best["lr"], best["bn"], seed)


def main() -> None:
    parser = network_parser(__doc__)
    parser.add_argument("--runs", required=True, help="folder for the students before tuning")
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.44, 0.3, 0.15])
    parser.add_argument("--methods", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="the first of them searches")
    options = parser.parse_args()
    harness, results = Tuned(options), Rows(f"peers_tuned-{options.model}", _key)
    teacher = accuracy(predict(harness.teacher, harness.test))
    about = {"model": options.model, "steps": STEPS, "teacher_accuracy": teacher}
    about["environment"] = environment(pick_device("cpu"))
    for budget in options.budgets:
        for name in options.methods:
            explore(harness, results, name, budget, about)


if __name__ == "__main__":
    main()
