"""What a training step costs: every method beside KD, and every recipe (precision, layout, torch.compile).

    python benchmarks/steps.py [--threads 2] [--rounds 8] [--only methods recipes forms memory augmentation]

Arms take turns in one process, a few steps at a time; ratios of medians over all steps but the first two of a turn.
ResNet-32 with DK layers beside the dense one (random weights, two kernels per channel, batches of 128 random 32 x 32
images). `forms`: DK²PNets (one kernel per channel) and ResNet-18 at 160 x 160 (two), trained folded, as branches, and
as the trainer chooses for each layer, in each precision that the processor has units for. Peak memory (Linux) is that
of a process of its own. Writes benchmarks/results/steps.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

from common import plain_parser, read_results, write_results
from dk2pnet.data import ImageData, Normalization
from dk2pnet.layer import DKConv2d, set_form
from dk2pnet.modules import replace_modules
from dk2pnet.networks.named import make_network
from dk2pnet.run.device import environment, pick_device
from dk2pnet.training import trainer
from dk2pnet.training.trainer import TrainingOptions, train

STEPS = 8
METHODS = ("kd", "kp-channel", "kp-position", "kp-unit", "kp-class", "euclidean", "at")
RECIPES = {  # precision, layout, torch.compile
    "fp32": ("fp32", torch.contiguous_format, False),
    "fp32, channels last": ("fp32", torch.channels_last, False),
    "bf16": ("bf16", torch.contiguous_format, False),
    "bf16, channels last": ("bf16", torch.channels_last, False),
    "bf16, channels last, compiled": ("bf16", torch.channels_last, True),
}
STUDENTS = {  # images in a step, their size
    **{f"dk2pnet-{name}": (128, 32) for name in ("8x16", "14x16", "20x32", "32x32")},
    "torchvision/resnet18": (32, 160),
}
NETWORKS = {"resnet20": (128, 32), "resnet32 with DK layers, KP + KD": (128, 32), "torchvision/resnet18": (32, 96)}


def student_and_teacher() -> tuple[nn.Module, nn.Module]:
    """ResNet-32 with two kernels per channel in all convolutions but the first, and the dense one."""
    torch.manual_seed(0)
    student = make_network("resnet32", num_classes=10, in_channels=3)
    replace_modules(student, {conv: DKConv2d.like(conv, 2) for conv in spatial(student)})
    return student, make_network("resnet32", num_classes=10, in_channels=3)


def spatial(model: nn.Module) -> list[nn.Conv2d]:
    """The convolutions larger than 1x1, without the first."""
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and name != "conv1" and max(module.kernel_size) > 1
    ]


def turn(
    student: nn.Module,
    teacher: nn.Module | None,
    options: TrainingOptions,
    layout: torch.memory_format,
    data: list[tuple[Tensor, Tensor]],
) -> list[float]:
    """Seconds of each step of a short training, the first two left out."""
    moments: list[float] = []
    with mock.patch.object(trainer, "layout_of", return_value=layout):
        train(
            student,
            lambda epoch: data,
            options,
            example=data[0][0][:1],
            steps_per_epoch=len(data),
            teacher=teacher,
            progress=lambda step, total, terms: moments.append(time.perf_counter()),
        )
    return [after - before for before, after in zip(moments[1:], moments[2:], strict=False)]


def interleaved(arms: dict[str, Callable[[], list[float]]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in arms}
    for name, arm in arms.items():
        arm()  # compiles, allocates
        print(f"  warm: {name}", flush=True)
    for _ in range(rounds):
        for name, arm in arms.items():
            times[name] += arm()
    return times


def compared(times: dict[str, list[float]], base: str, images: int) -> list[dict]:
    median = {name: statistics.median(values) for name, values in times.items()}
    return [
        {"name": name, "ratio": median[name] / median[base], "images_per_second": images / median[name]}
        for name in times
    ]


def batches(count: int, size: int, classes: int = 10) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(count, 3, size, size, generator=generator), torch.randint(classes, (count,), generator=generator))
        for _ in range(STEPS)
    ]


def methods(rounds: int) -> list[dict]:
    data = batches(128, 32)

    def arm(method: str) -> Callable[[], list[float]]:
        student, teacher = student_and_teacher()
        options = TrainingOptions(epochs=1, learning_rate=1e-3, method=method)
        return lambda: turn(student, teacher, options, torch.channels_last, data)

    return compared(interleaved({method: arm(method) for method in METHODS}, rounds), "kd", 128)


def recipes(rounds: int) -> list[dict]:
    rows = []
    for name, (count, size) in NETWORKS.items():
        data = batches(count, size)

        def arm(recipe: str, name: str = name, data: list = data) -> Callable[[], list[float]]:
            precision, layout, compiled = RECIPES[recipe]
            if "DK" in name:
                student, teacher = student_and_teacher()
            else:
                student, teacher = make_network(name, num_classes=10), None
            options = TrainingOptions(epochs=1, learning_rate=1e-3, precision=precision, compile=compiled)
            return lambda: turn(student, teacher, options, layout, data)

        torch._dynamo.reset()
        # A compiled arm is compiled anew in every turn, from PyTorch's cache: turns of their own, at the end.
        times = interleaved({recipe: arm(recipe) for recipe in RECIPES}, rounds)
        rows += [{"network": name, **row} for row in compared(times, "fp32", count)]
    return rows


def forms(rounds: int) -> list[dict]:
    rows = []
    for name, (count, size) in STUDENTS.items():
        data = batches(count, size)
        student = make_network(name, num_classes=10)
        if not name.startswith("dk2pnet"):
            replace_modules(student, {conv: DKConv2d.like(conv, 2) for conv in spatial(student)})
        for precision in sorted({"fp32", trainer.choose_precision(torch.device("cpu"))}, reverse=True):
            options = TrainingOptions(epochs=1, learning_rate=1e-3, precision=precision)

            def arm(
                form: str, student: nn.Module = student, options: TrainingOptions = options, data: list = data
            ) -> Callable[[], list[float]]:
                def turns() -> list[float]:
                    given = contextlib.nullcontext()
                    if form != "as chosen":
                        given = mock.patch.object(
                            trainer, "set_fast_form", lambda model, *_, **__: set_form(model, form)
                        )
                    with given:
                        return turn(student, None, options, torch.channels_last, data)

                return turns

            times = interleaved({form: arm(form) for form in ("folded", "as chosen", "branches")}, rounds)
            rows += [{"network": name, "precision": precision, **row} for row in compared(times, "folded", count)]
    return rows


def memory() -> list[dict]:
    """Peak memory of a process that trains by a method, for `METHODS`."""
    rows = []
    for method in METHODS:
        call = [sys.executable, __file__, "--peak", method, "--threads", str(torch.get_num_threads())]
        rows.append({"name": method, "bytes": int(subprocess.run(call, capture_output=True, text=True).stdout)})
    return rows


def peak(method: str) -> int:
    student, teacher = student_and_teacher()
    options = TrainingOptions(epochs=1, learning_rate=1e-3, method=method)
    turn(student, teacher, options, torch.channels_last, batches(128, 32))
    # Not getrusage: its peak is inherited from the process that started this one.
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024


def augmentation() -> dict:
    """Images per second of the augmented batches alone."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (12_800, 3, 32, 32), dtype=torch.uint8, generator=generator)
    data = ImageData("random", images, torch.zeros(len(images), dtype=torch.int64))
    norm = Normalization.parse("cifar10")
    times = []
    for epoch in range(5):
        start = time.perf_counter()
        for _ in data.batches(128, norm, augment="natural", shuffle=True, epoch=epoch):
            pass
        times.append(time.perf_counter() - start)
    return {"images_per_second": len(images) / statistics.median(times)}


def main() -> None:
    parser = plain_parser(__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    parts = {"methods": methods, "recipes": recipes, "forms": forms, "memory": memory, "augmentation": augmentation}
    parser.add_argument("--only", nargs="+", choices=list(parts), default=list(parts))
    parser.add_argument("--peak", choices=METHODS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = pick_device("cpu", options.threads)
    if options.peak:
        print(peak(options.peak))
        return
    result = read_results("steps", {})
    for part in options.only:
        print(part, flush=True)
        rows = parts[part](options.rounds) if part in ("methods", "recipes", "forms") else parts[part]()
        result[part] = {"rows": rows, **environment(device)}
        print(json.dumps(rows, indent=1), flush=True)
        write_results("steps", result)


if __name__ == "__main__":
    main()
