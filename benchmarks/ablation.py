"""Which knowledge pre-regression teaches best: axis, temperature, weight and its decay, hints, one stage or two.

    python benchmarks/ablation.py --teacher FOLDER --data svhn_10k --data-dir DATA --runs FOLDER [--seeds 0 1]

`--teacher` is an OUT folder, such as the teacher/ of `dk2pnet reproduce`. Every row is one `dk2pnet train` of the same
student beside it, in FOLDER/DATA; what is there already is not made again, and a killed run goes on. Rows are compared
by the last epoch's accuracy on the validation tenth of the training split; what the runs say of the test split is
not read. Writes benchmarks/results/ablation-DATA.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from common import plain_parser, write_results
from dk2pnet.commands.train import train
from dk2pnet.run.device import environment, pick_device
from dk2pnet.training.losses import METHODS, Method, kp_channel

# KP as FitNets trains its hints: the middle one alone for a quarter of the epochs, then the softened logits.
METHODS["kp-channel, two stages"] = Method(hint=kp_channel, beta=10.0, regress="always", two_stage=True)


def _scaled(name: str) -> dict[str, dict[str, Any]]:
    """A method at a tenth of its weight, its own, and ten times that."""
    beta = METHODS[name].beta
    return {f"{name}, beta {beta * scale:g}": {"method": name, "beta": beta * scale} for scale in (0.1, 1.0, 10.0)}


ROWS: dict[str, dict[str, Any]] = {
    "labels": {"method": "labels"},
    "kd": {"method": "kd"},
    **_scaled("kp-channel"),
    **_scaled("kp-position"),
    **_scaled("kp-unit"),
    **_scaled("kp-class"),
    **_scaled("euclidean"),
    "kp-channel, tau 0.5": {"method": "kp-channel", "kp_tau": 0.5},
    "kp-channel, tau 2": {"method": "kp-channel", "kp_tau": 2.0},
    "kp-channel, beta falls to 0": {"method": "kp-channel", "beta_end": 0.0},
    "kp-channel, beta 1 falls to 0": {"method": "kp-channel", "beta": 1.0, "beta_end": 0.0},
    "kp-channel, tau 2, beta falls to 0": {"method": "kp-channel", "kp_tau": 2.0, "beta_end": 0.0},
    "kp-unit, beta falls to 0": {"method": "kp-unit", "beta_end": 0.0},
    "kp-channel, without KD": {"method": "kp-channel", "alpha": 0.0},
    "kp-channel, last hint only": {"method": "kp-channel", "hints": ("layer3=layer3",)},
    "kp-channel, pre-regressors": {"method": "kp-channel", "pre_regressor": True},
    "kp-channel, two stages": {"method": "kp-channel, two stages"},
}


def stem(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "-")


def main() -> None:
    parser = plain_parser(__doc__)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--student", default="dk2pnet-14x16")
    parser.add_argument("--data", default="svhn_10k")
    parser.add_argument("--data-dir", default=None)
    parser.add_argument("--runs", required=True, type=Path)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS))
    options = parser.parse_args()
    folder = options.runs / options.data
    for seed in options.seeds:
        for name in options.only:
            out = folder / f"{stem(name)}-{options.epochs}-{seed}"
            if not out.exists():
                how = {"epochs": options.epochs, "learning_rate": options.lr, "seed": seed, **ROWS[name]}
                teacher = None if name == "labels" else options.teacher
                train(options.student, options.data, out=out, teacher=teacher, data_dir=options.data_dir, **how)
            collect(folder, options)
            print(out.name, flush=True)


def collect(folder: Path, options: argparse.Namespace) -> None:
    """All runs of this length that are there."""
    rows = []
    for name in ROWS:
        found = sorted(folder.glob(f"{stem(name)}-{options.epochs}-[0-9]*/metrics.json"))
        values = [json.loads(path.read_text())["network"]["validation_accuracy"] for path in found]
        if values:
            spread = statistics.stdev(values) if len(values) > 1 else None
            rows.append({"name": name, "validation": values, "mean": statistics.mean(values), "spread": spread})
    result = {"data": options.data, "student": options.student, "epochs": options.epochs, "rows": rows}
    result |= environment(pick_device("cpu"))
    write_results(f"ablation-{options.data}", result)


if __name__ == "__main__":
    main()
