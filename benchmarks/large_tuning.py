"""Tuning at 224 x 224: images per second and peak memory (random weights: a timing case, not an accuracy).

    python benchmarks/large_tuning.py [--model torchvision/resnet18] [--steps 12] [--batch-sizes 16 32 64]

Each batch size runs in a process of its own, so that the peak is its own. Writes benchmarks/results/large_tuning.json.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import replace

import torch

from common import plain_parser, write_results
from dk2pnet.networks.named import make_network
from dk2pnet.options import CompressOptions
from dk2pnet.plan import Budget
from dk2pnet.run.device import environment
from dk2pnet.run.run import Run
from dk2pnet.students.closed_form import ClosedForm
from dk2pnet.students.teacher import Teacher
from dk2pnet.students.tuning import Tuner
from dk2pnet.training.trainer import TUNING

SIZE = 224


def measure(model: str, steps: int, batch: int) -> dict:
    """One batch size, in this process."""
    torch.manual_seed(0)
    network = make_network(model).eval()
    # Every fifth image only decides, so that what is left of a batch has the size asked for.
    data = [torch.randn(batch * 5 // 4, 3, SIZE, SIZE) for _ in range(2)]
    how = {"criterion": "response", "memory": 1.0, "rebuild": False, "calibration_images": 10_000, "tune": steps}
    ready = Teacher.open(network, data, CompressOptions(**how), Run())
    with ClosedForm(ready, Run()) as closed:
        solved = closed.solve(Budget.parse("macs=0.4"), whiten=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times: list[float] = []
    run = Run(lambda *_: times.append(time.perf_counter()))
    tuner = Tuner(ready, run, replace(TUNING, batch_size=batch))
    tuner._train(solved.student.model, solved, steps, None, tuner._recipes(solved)[0])  # type: ignore[attr-defined]
    seconds = statistics.median(b - a for a, b in zip(times[2:], times[3:], strict=False))
    return {
        "batch": batch,
        "images_per_second": batch / seconds,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "peak_before_tuning_gib": before / 2**20,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = plain_parser(__doc__)
    parser.add_argument("--model", default="torchvision/resnet18")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[16, 32, 64])
    parser.add_argument("--one", type=int, help="measure this batch size here and print it")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.model, options.steps, options.one)))
        return
    rows = []
    for batch in options.batch_sizes:
        command = [
            sys.executable,
            __file__,
            "--model",
            options.model,
            "--steps",
            str(options.steps),
            "--one",
            str(batch),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append({"model": options.model, **json.loads(done.stdout.splitlines()[-1])})
        print(rows[-1], flush=True)
    result = {"rows": rows, "environment": environment(torch.device("cpu"))}
    write_results("large_tuning", result)


if __name__ == "__main__":
    main()
