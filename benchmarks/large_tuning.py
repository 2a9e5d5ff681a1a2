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
from dk2pnet.run.device import environment

from common import plain_parser, write_results
from dk2pnet.data.samples import user_images
from dk2pnet.measure import predict
from dk2pnet.networks.named import make_network
from dk2pnet.networks.open import Network
from dk2pnet.plan import Budget
from dk2pnet.students.closed_form import ClosedForm
from dk2pnet.students.tuning import OPTIONS, Tuner


def measure(model: str, steps: int, batch: int) -> dict:
    """One batch size, in this process."""
    torch.manual_seed(0)
    teacher = make_network(model).eval()
    # Every fifth image only decides, so that what is left of a batch has the size asked for.
    data = [torch.randn(batch * 5 // 4, 3, 224, 224) for _ in range(2)]
    images = user_images(data, None, 10_000)
    example = data[0][:1]
    held = predict(teacher, images.held_out)
    with ClosedForm(
        teacher, held, Network(teacher, None, None), images, example, "response", memory=2**30, rebuild=False
    ) as closed:
        solved = closed.solve(Budget.parse("macs=0.4"), whiten=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times: list[float] = []
    tuner = Tuner(
        teacher,
        held,
        images,
        example=example,
        options=replace(OPTIONS, batch_size=batch),
        progress=lambda *_: times.append(time.perf_counter()),
    )
    tuner._train(solved.student, solved, steps, None, tuner.options.learning_rate)
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
