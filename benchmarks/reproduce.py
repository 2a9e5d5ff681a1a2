"""The paper's benchmarks at the schedules that docs/results.md shows: `dk2pnet reproduce`, and its results kept.

    python benchmarks/reproduce.py mnist --data-dir DATA --runs FOLDER [--method kd ...] [--seed 0 ...]
    python benchmarks/reproduce.py cifar10 --weights resnet32.th ...       (a teacher trained by others)

A schedule has the name of its data set, or begins with it. They are short, what two CPU cores can do in some hours; but
`mnist_full` is that of the command without options. Runs lie in FOLDER/SCHEDULE, are resumed after a kill and skipped
once done. Writes benchmarks/results/reproduce-SCHEDULE.json.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common import plain_parser, write_results
from dk2pnet.commands.reproduce import METHODS, reproduce

SCHEDULES: dict[str, dict[str, Any]] = {
    "mnist": {"student": "dk2pnet-8x16", "epochs": 3, "teacher_epochs": 3},
    "mnist_full": {"data": "mnist"},
    "svhn_10k": {"epochs": 15, "teacher_epochs": 20},
    "cifar10": {"student": "dk2pnet-20x24", "epochs": 3, "teacher": "resnet32", "normalize": "imagenet"},
    "cifar100": {"epochs": 26, "teacher": "resnet20x2", "teacher_epochs": 16},
    "cifar100_long": {"data": "cifar100", "epochs": 40, "teacher": "resnet20x2", "teacher_epochs": 16},
    "cifar10_long": {"data": "cifar10", "epochs": 26, "teacher": "resnet44", "normalize": "imagenet"},
}


def main() -> None:
    parser = plain_parser(__doc__)
    parser.add_argument("schedule", choices=list(SCHEDULES))
    parser.add_argument("--weights", help="of the teacher, where the schedule has one of others")
    parser.add_argument("--data-dir", default=None)
    parser.add_argument("--runs", required=True, type=Path)
    parser.add_argument("--method", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seed", nargs="+", type=int, default=[0])
    options = parser.parse_args()
    schedule = {"data": options.schedule, **SCHEDULES[options.schedule]}
    by_others = "teacher" in schedule and "teacher_epochs" not in schedule
    if by_others != (options.weights is not None):
        parser.error(f"{options.schedule} {'needs the' if by_others else 'trains its teacher and takes no'} --weights")
    schedule["teacher_weights"] = options.weights
    results = reproduce(
        out=options.runs / options.schedule,
        methods=options.method,
        seeds=options.seed,
        data_dir=options.data_dir,
        **schedule,
    )
    if results["settings"]["teacher_weights"]:  # without its folder, which is another one on every machine
        results["settings"]["teacher_weights"] = Path(results["settings"]["teacher_weights"]).name
    write_results(f"reproduce-{options.schedule}", results)


if __name__ == "__main__":
    main()
