"""Networks at 224 x 224 without labels: what is lost at budgets of multiply-adds, in closed form and tuned for minutes.

    python benchmarks/imagenet.py --model torchvision/resnet18 --weights resnet18.safetensors --data FOLDER \\
        --calibration-data IMAGES --runs FOLDER [--budgets 0.44 0.3 0.2] [--minutes 0 5 20 60] [--seeds 0 1] \\
        [--without recipe]

--data: a folder with ``val/WNID/*.JPEG`` (or ``test/``), by which accuracy and agreement are measured; ImageNet's own
validation images, or any labelled ones of the same 1,000 classes. --calibration-data: images without labels, never
those. Minutes are of tuning alone, on this machine; 0 is the closed form with all that `dk2pnet compress --tune 0`
does. The closed form of a budget is made once. --without takes one thing away: ``recipe`` tunes at the rate and the
batch norm of CIFAR, unasked; ``augmentation`` on the images as they are; ``windows`` on whole crops in place of smaller
ones; ``corrections`` from kernels as they were solved, with the teacher's batch norms; ``first`` leaves the first
convolution dense, and the others pay; ``start`` tunes from the reconstructed student in place of the plain one.
Killed, the command goes on: students lie in --runs. Writes benchmarks/results/imagenet-MODEL.json.
"""

from __future__ import annotations

import json
import resource
import time
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import Rows, network_parser
from dk2pnet.answers import Predictions
from dk2pnet.options import CompressOptions
from dk2pnet.plan import Budget
from dk2pnet.run.device import environment
from dk2pnet.run.run import Run
from dk2pnet.students.closed_form import Solved, solved_once
from dk2pnet.students.probes import Prober
from dk2pnet.students.teacher import Teacher
from dk2pnet.students.tuning import Tuner
from dk2pnet.tasks import accuracy, agreement, divergence
from dk2pnet.training.trainer import TUNING

_KEYS = ("budget", "minutes", "seed", "without")
_PARTS = ("recipe", "augmentation", "windows", "corrections", "first", "start")


def key(row: Any) -> tuple:
    """What tells two rows apart."""
    return tuple(row.get(name, "") for name in _KEYS)


def parser_of(doc: str | None) -> ArgumentParser:
    """The options of a network, images to test it with and others to calibrate and tune on."""
    parser = network_parser(doc)
    parser.set_defaults(model="torchvision/resnet18")
    parser.add_argument("--calibration-data", required=True)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--runs", required=True, type=Path)
    parser.add_argument("--threads", type=int, default=2)
    return parser


def opened(options: Namespace, seed: int, run: Run, without: str = "") -> Teacher:
    """The teacher that they name, ready to be tuned from."""
    how = CompressOptions(
        weights=options.weights,
        normalize=options.normalize,
        data_dir=options.data_dir,
        calibration_data=options.calibration_data,
        calibration_images=options.images,
        threads=options.threads,
        seed=seed,
        tune="1m",  # rows say how long
        augment="none" if without == "augmentation" else None,
    )
    return Teacher.open(options.model, options.data, how, run, first=without != "first")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.44, 0.3, 0.2])
    parser.add_argument("--minutes", nargs="+", type=float, default=[0, 5, 20, 60])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--without", default="", choices=_PARTS)
    options = parser.parse_args()
    rows = Rows(f"imagenet-{options.model.rpartition('/')[2]}", key)
    for seed in options.seeds:
        missing = [
            (budget, minutes)
            for budget in options.budgets
            for minutes in options.minutes
            if (f"macs={budget:g}", minutes, seed, options.without) not in {key(row) for row in rows.read()}
        ]
        if missing:
            with Run().at_work("cpu", options.threads, seed) as run:
                measure(options, seed, missing, rows, run)


def about_of(options: Namespace, teacher: Teacher, answers: Predictions, run: Run) -> dict[str, Any]:
    """What a file of rows says of all of them; `answers`: the teacher's to the test images."""
    assert teacher.samples is not None
    return {
        "model": options.model,
        "teacher_accuracy": accuracy(answers),
        "images": teacher.samples.counts | {"test": len(answers)},
        **environment(run.device),
    }


def measure(options: Namespace, seed: int, missing: list[tuple[float, float]], rows: Rows, run: Run) -> None:
    """Add the rows that are missing of one seed."""
    without = options.without
    teacher = opened(options, seed, run, without)
    network, samples = teacher.network, teacher.samples
    assert samples is not None
    assert samples.test is not None
    answers = network.predict(samples.test, run)
    about = about_of(options, teacher, answers, run)
    with Prober(teacher, None, run) as prober:
        tuner = Tuner(teacher, run, TUNING) if without == "recipe" else Tuner(teacher, run)
        if without == "windows":
            tuner.source = replace(tuner.source, crop=replace(tuner.source.crop, window=1.0))
        if without == "corrections":
            network.corrections = lambda *_: iter(())  # type: ignore[method-assign]
        if without == "start":
            network.reconstructs_first = True
        for value, minutes in missing:
            budget = Budget("macs", value)
            folder = options.runs / options.model.replace("/", "-") / f"{budget}-seed{seed}"
            if without in ("corrections", "first", "start"):  # which make another closed form
                folder = folder / f"without-{without}"
            folder.mkdir(parents=True, exist_ok=True)

            def solve(budget: Budget = budget) -> Solved:
                run.clock.seconds.clear()
                return prober.closed.solve(budget, whiten=True)

            solved = solved_once(folder, network, run, solve)
            row: dict[str, Any] = {"budget": str(budget), "minutes": minutes, "seed": seed, "without": without}
            row["seconds_of_parts"] = dict(run.clock.seconds)
            started = time.perf_counter()
            if minutes:
                here = folder / f"{minutes:g}m{f'-without-{without}' if without else ''}"
                row["steps"] = tuner.steps_in(60 * minutes, solved, here)
                tuned = tuner.tune(solved, row["steps"], here)
                student = solved.student if tuned is None else tuned
                if (here / "recipe.json").exists():
                    row["recipe"] = json.loads((here / "recipe.json").read_text(encoding="utf-8"))
            else:
                solved = prober.closed.without_tuning(solved)
                student = solved.student
            row["seconds"] = time.perf_counter() - started
            if not minutes:  # of everything; that of a tuned row is the tuning's alone
                row["seconds"] += sum(row["seconds_of_parts"].values())
            found = student.predict(samples.test, run)
            row |= {
                "accuracy": accuracy(found),
                "agreement": agreement(answers, found),
                "test_kl": divergence(answers, found),
                "held_kl": tuner.judge.divergence(student),
                "decisions": solved.decisions,
                "macs_kept": solved.plan.macs / solved.plan.macs_dense,
                "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            }
            rows.add(row, about)
            print(json.dumps({name: row[name] for name in (*_KEYS, "accuracy", "agreement", "seconds")}), flush=True)


if __name__ == "__main__":
    main()
