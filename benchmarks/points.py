"""Budgets in points: the smallest network that loses at most 0.5, 1, 2 points, by what decides, and what it loses.

    python benchmarks/points.py --weights resnet32.th --data-dir DATA --runs FOLDER [--drops 0.5 1 2]

Decided on the validation tenth of the training split (on which a network trained by others has been trained) and on
the first half of the test split; reported on the second half, which nothing else sees. The searches are those of
`dk2pnet compress --budget drop=...`; networks at the same budget are made once and shared. The minutes of a search are
those of its own probes, as if none had been shared. Killed, the command goes on: networks lie in FOLDER. Writes
benchmarks/results/points-MODEL.json.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch

from common import network_parser, write_results
from dk2pnet.data.images import batch_size_for
from dk2pnet.errors import InputError
from dk2pnet.estimates import estimate
from dk2pnet.measure import accuracy, predict
from dk2pnet.plan import Budget
from dk2pnet.run.clock import Clock
from dk2pnet.run.device import environment
from dk2pnet.run.progress import silent
from dk2pnet.students.probes import Probe, Prober, smallest
from dk2pnet.students.teacher import prepare


class Shared:
    """A prober that makes every network once, and knows how long each took."""

    def __init__(self, prober: Prober, folder: Path) -> None:
        self.prober, self.device, self.path = prober, prober.device, folder / "seconds.json"
        self.made: dict[str, Probe] = {}
        self.seconds: dict[str, float] = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.asked: list[str] = []

    def make(self, budget: Budget) -> Probe:
        name = str(budget)
        self.asked.append(name)
        if name not in self.made:
            start = time.perf_counter()
            self.made[name] = self.prober.make(budget)
            self.seconds.setdefault(name, time.perf_counter() - start)
            self.path.write_text(json.dumps(self.seconds))
            print(name, f"{self.seconds[name]:.0f} s", flush=True)
        return self.made[name]


def main() -> None:
    parser = network_parser(__doc__)
    parser.add_argument("--runs", required=True, type=Path)
    parser.add_argument("--drops", nargs="+", type=float, default=[0.5, 1.0, 2.0])
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    cpu = torch.device("cpu")
    ready = prepare(
        options.model,
        options.data,
        "loss",
        weights=options.weights,
        normalize=options.normalize,
        data_dir=options.data_dir,
        test_data=None,
        holdout=None,
        holdout_split="test[:50%]",
        example_input=None,
        input_size=None,
        classes=None,
        calibration_images=2000,
        tune=None,
        epochs=0,
        seed=0,
        device=cpu,
    )
    images, norm = ready.images, ready.network.normalization
    assert images is not None
    assert images.validation is not None
    assert norm is not None
    validation = images.validation.batches(batch_size_for(images.validation.size), norm)
    deciders = {"the validation tenth": validation, "test[:50%]": images.decide}
    reported = predict(ready.teacher, images.test)  # type: ignore[arg-type]
    rows = []
    with ready.prober(
        keep=(),
        first=False,
        memory=2.0,
        rebuild=True,
        augment=None,
        precision="auto",
        checkpoint_every=60.0,
        target="onnxruntime",
        threads=None,
        folder=options.runs,
        clock=Clock(),
        progress=silent,
    ) as prober:
        shared = Shared(prober, options.runs)
        for decider, batches in deciders.items():
            teacher = predict(ready.teacher, batches)  # type: ignore[arg-type]
            for drop in options.drops:
                shared.asked = []
                row = {"drop": drop, "decided_by": decider, "teacher_there": accuracy(teacher)}
                try:
                    found = smallest(Budget("drop", drop), "macs", shared, teacher, batches)  # type: ignore[arg-type]
                    answers = predict(found.probe.student, images.test)  # type: ignore[arg-type]
                    row |= {
                        "budget": str(found.probe.budget),
                        "macs_kept": found.probe.solved.plan.macs / found.probe.solved.plan.macs_dense,
                        "estimate": found.estimate.to_dict(),
                        "reported": estimate("drop", reported, answers).to_dict(),
                    }
                except InputError as error:
                    row["said"] = str(error)
                row["probes"] = shared.asked
                row["minutes"] = sum(shared.seconds[name] for name in shared.asked) / 60
                rows.append(row)
                print(json.dumps(row), flush=True)
                result = {
                    "model": options.model,
                    "teacher_accuracy_reported": accuracy(reported),
                    "tuning_steps": prober.steps,
                    "rows": rows,
                    "environment": environment(cpu),
                }
                write_results(f"points-{options.model}", result)


if __name__ == "__main__":
    main()
