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
from dk2pnet.options import CompressOptions
from dk2pnet.plan import Budget
from dk2pnet.run.device import environment
from dk2pnet.run.run import Run
from dk2pnet.students.loss_budget import smallest
from dk2pnet.students.probes import Probe, Prober
from dk2pnet.students.teacher import Teacher
from dk2pnet.tasks import accuracy


class Shared:
    """A prober that makes every network once, and knows how long each took."""

    def __init__(self, prober: Prober, folder: Path) -> None:
        self.prober, self.run, self.path = prober, prober.run, folder / "seconds.json"
        self.made: dict[str, Probe] = {}
        self.seconds: dict[str, float] = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.asked: list[str] = []

    def make(self, budget: Budget) -> Probe:
        name = str(budget)
        if name not in self.made:
            start = time.perf_counter()
            self.made[name] = self.prober.make(budget)
            self.seconds.setdefault(name, time.perf_counter() - start)
            self.path.write_text(json.dumps(self.seconds))
            print(name, f"{self.seconds[name]:.0f} s", flush=True)
        self.asked.append(name)  # only what can be made
        return self.made[name]


def main() -> None:
    parser = network_parser(__doc__)
    parser.add_argument("--runs", required=True, type=Path)
    parser.add_argument("--drops", nargs="+", type=float, default=[0.5, 1.0, 2.0])
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    how = {"weights": options.weights, "normalize": options.normalize, "data_dir": options.data_dir}
    run = Run()
    ready = Teacher.open(options.model, options.data, CompressOptions(holdout_split="test[:50%]", **how), run)
    network, samples = ready.network, ready.samples
    assert samples is not None
    assert samples.validation is not None
    assert samples.test is not None
    assert network.normalization is not None
    validation = samples.validation.batches(batch_size_for(samples.validation.size), network.normalization)
    deciders = {"the validation tenth": validation, "test[:50%]": samples.decide}
    reported = network.predict(samples.test, run)
    rows = []
    with Prober(ready, options.runs, run) as prober:
        shared = Shared(prober, options.runs)
        for decider, batches in deciders.items():
            teacher = network.predict(batches, run)
            for drop in options.drops:
                shared.asked = []
                row = {"drop": drop, "decided_by": decider, "teacher_there": accuracy(teacher)}
                try:
                    found = smallest(Budget("drop", drop), "macs", shared, teacher, batches)  # type: ignore[arg-type]
                    answers = found.probe.student.predict(samples.test, run)
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
                    "environment": environment(torch.device("cpu")),
                }
                write_results(f"points-{options.model}", result)


if __name__ == "__main__":
    main()
