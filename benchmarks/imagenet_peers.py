"""Other methods of the field at 224 x 224 under the same images and minutes of tuning.

    pip install -r benchmarks/requirements-peers.txt
    python benchmarks/imagenet_peers.py --model torchvision/resnet18 --weights resnet18.safetensors --data FOLDER \\
        --calibration-data IMAGES --runs FOLDER [--budgets 0.3] [--minutes 15] [--methods ...]

Images as in imagenet.py. Every method starts as in peers.py, at the same multiply-adds of the whole network, and is
tuned as `compress` tunes, in so many minutes of this machine, trials included: the held-out images choose each one's
learning rate and batch norm (under some 230 steps there are no trials). Ours is tuned in the whitened form, which is
the default, and in the plain one, as all others. Starts and checkpoints are kept in FOLDER (ours where imagenet.py
keeps them), rows already in the JSON are not made again. Writes benchmarks/results/imagenet_peers-MODEL.json.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common import Rows
from dk2pnet.measure import macs, parameters
from dk2pnet.plan import Budget
from dk2pnet.run.run import Run
from dk2pnet.students.closed_form import Solved, solved_once
from dk2pnet.students.probes import Prober
from dk2pnet.students.tuning import Tuner
from dk2pnet.tasks import accuracy, agreement, divergence
from imagenet import about_of, opened, parser_of
from peers import Harness

METHODS = (
    "ours, whitened",
    "ours",
    "GDWS, alpha = 1",
    "per-channel SVD",
    "spatial SVD",
    "Tucker-2",
    "Torch-Pruning",
)


def key(row: Any) -> tuple:
    """What tells two rows apart."""
    return row["budget"], row["minutes"], row["method"]


def start_of(method: str, budget: float, harness: Harness, prober: Prober, folder: Path, run: Run) -> Solved:
    """The student before tuning, kept in `folder`."""
    if method.startswith("ours"):
        asked = Budget("macs", budget)
        return solved_once(folder, prober.teacher.network, run, lambda: prober.closed.solve(asked, whiten=True))
    place = folder / f"{method.replace(' ', '_')}.pt"
    if not place.exists():
        torch.manual_seed(0)
        torch.save(harness.with_batch_norm(harness.student(method, budget)), place)
    student: nn.Module = torch.load(place, weights_only=False)
    nothing: Any = None  # the plan plays no part in tuning
    return Solved(replace(prober.teacher.network, model=student), nothing)  # type: ignore[type-var]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.3])
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    options = parser.parse_args()
    rows = Rows(f"imagenet_peers-{options.model.rpartition('/')[2]}", key)
    known = {key(row) for row in rows.read()}
    missing = [
        (b, m) for b in options.budgets for m in options.methods if (f"macs={b:g}", options.minutes, m) not in known
    ]
    if not missing:
        return
    with Run().at_work("cpu", options.threads, 0) as run:
        teacher = opened(options, 0, run)
        network, samples = teacher.network, teacher.samples
        assert samples is not None
        assert samples.test is not None
        answers = network.predict(samples.test, run)
        about = about_of(options, teacher, answers, run)
        harness = Harness(network.model, samples.gather, samples.held_out, samples.test)  # type: ignore[attr-defined]
        with Prober(teacher, None, run) as prober:
            for budget, method in missing:
                inside = f"macs={budget:g}-seed0" if method.startswith("ours") else f"peers-macs={budget:g}"
                folder = options.runs / options.model.replace("/", "-") / inside
                folder.mkdir(parents=True, exist_ok=True)
                solved = start_of(method, budget, harness, prober, folder, run)
                before = solved.student.predict(samples.test, run)
                started = time.perf_counter()
                tuner = Tuner(teacher, run, whitened=method == "ours, whitened")
                here = folder / f"peers-{options.minutes:g}m-{method.replace(' ', '_')}"
                steps = tuner.steps_in(60 * options.minutes, solved, here)
                tuned = tuner.tune(solved, steps, here)
                seconds = time.perf_counter() - started
                found = (tuned or solved.student).predict(samples.test, run)
                module: Any = solved.student
                row = {
                    "budget": f"macs={budget:g}",
                    "minutes": options.minutes,
                    "method": method,
                    "steps": steps,
                    "recipe": solved.decisions[-1].get("recipe"),
                    "kept": tuned is not None,
                    "seconds": seconds,
                    "macs_kept": macs(module.model, harness.example) / harness.total,
                    "parameters": parameters(module.model),
                    "accuracy_before": accuracy(before),
                    "accuracy": accuracy(found),
                    "agreement": agreement(answers, found),
                    "test_kl": divergence(answers, found),
                    "held_kl": tuner.judge.divergence(tuned or solved.student),
                }
                rows.add(row, about)
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
