"""Tuning at 224 x 224: images per second, of whole crops and of windows of them (random weights: a timing case).

    python benchmarks/large_tuning.py [--model torchvision/resnet18] [--rounds 3] [--threads 2]

Both in one process, in turns, with the images and the form of the layers that `compress` takes. Writes
benchmarks/results/large_tuning.json.
"""

from __future__ import annotations

import statistics
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

SIZE = 224
IMAGES = 50  # a fifth of which only decides
STEPS = 4  # in a round, the first of which is not counted


def measure(model: str, rounds: int) -> list[dict]:
    """A row for each kind of image."""
    torch.manual_seed(0)
    network = make_network(model).eval()
    data = [torch.randn(IMAGES, 3, SIZE, SIZE) for _ in range(2)]
    how = {"criterion": "response", "rebuild": False, "calibration_images": 10_000, "tune": 1, "task": "classify"}
    ready = Teacher.open(network, data, CompressOptions(**how), Run())
    with ClosedForm(ready, Run()) as closed:
        solved = closed.solve(Budget.parse("macs=0.4"), whiten=True)
    at: list[float] = []
    tuner = Tuner(ready, Run(lambda *_: at.append(time.perf_counter())))
    windows = tuner.source
    arms = {"whole": replace(windows, crop=replace(windows.crop, window=1.0)), "windows": windows}
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(rounds):
        for arm, source in arms.items():
            at.clear()
            tuner.source = source
            tuner._train(tuner.learner.student(solved.student), solved, STEPS, None, tuner._recipes(solved)[0])
            seconds[arm] += [b - a for a, b in zip(at, at[1:], strict=False)]
    batch = tuner.options.batch_size
    found = {arm: batch / statistics.median(times) for arm, times in seconds.items()}
    return [
        {"model": model, "images": arm, "batch": batch, "images_per_second": rate, "ratio": rate / found["whole"]}
        for arm, rate in found.items()
    ]


def main() -> None:
    parser = plain_parser(__doc__)
    parser.add_argument("--model", default="torchvision/resnet18")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = measure(options.model, options.rounds)
    for row in rows:
        print(row, flush=True)
    write_results("large_tuning", {"rows": rows, "environment": environment(torch.device("cpu"))})


if __name__ == "__main__":
    main()
