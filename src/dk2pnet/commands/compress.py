"""A trained CNN in; a smaller, faster one out, with the proof: gather, select, solve, correct, tune, train, deliver."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from dk2pnet import processes
from dk2pnet.answers import class_numbers
from dk2pnet.commands.deliver import deliver
from dk2pnet.data import ImageData
from dk2pnet.data.arrays import is_arrays
from dk2pnet.deploy.latency import check_target
from dk2pnet.errors import InputError
from dk2pnet.networks.open import is_onnx_file
from dk2pnet.networks.torch.network import TorchNetwork
from dk2pnet.options import CompressOptions, recipe_of
from dk2pnet.plan import KINDS, Budget, Plan
from dk2pnet.run.device import environment
from dk2pnet.run.out_folder import check_out
from dk2pnet.run.run import Run
from dk2pnet.run.unfinished import unfinished
from dk2pnet.students.figures import Figures, layer_figures
from dk2pnet.students.loss_budget import confirm, decide
from dk2pnet.students.probes import Prober
from dk2pnet.students.teacher import Teacher, check_for_onnx
from dk2pnet.training.fit import Source, fit
from dk2pnet.training.trainer import TrainingOptions

__all__ = ["Result", "compress"]


@dataclass
class Result:
    """What `compress` returns: the student, the plan that made it, and every figure.

    The student of a module is a module in evaluation mode, on the device of the one that was given (on the CPU where
    that was a name or a folder); that of an ONNX file is an `onnx.ModelProto`.
    """

    model: nn.Module | onnx.ModelProto
    plan: Plan
    metrics: dict[str, Any] = field(default_factory=dict)


def compress(
    model: str | Path | nn.Module,
    data: str | Iterable[Any] | None = None,
    budget: str | Budget = "macs=0.44",
    options: CompressOptions | None = None,
    *,
    out: str | Path | None = None,
    run: Run | None = None,
    **flat: Any,
) -> Result:
    """Make a trained CNN smaller and faster by dominant kernels.

    Example::

        result = dk2pnet.compress(model, loader, "macs=0.44", tune=500)      # loader: batches of normalised images
        result.model, result.plan, result.metrics["student"]["macs"]

    Parameters
    ----------
    model : a module, the name of a network (``resnet32``, ``torchvision/resnet18``, ``timm/...``,
        ``FILE.py:FUNCTION``), a folder that dk2pnet wrote, or an ``.onnx`` file. A module given is not changed.
    data : name of a data set, a folder, or a re-iterable of normalised batches ``x`` or ``(x, y)``, x (B, C, H, W),
        read once and kept where it gives others in every pass; for an ``.onnx`` file also an ``.npz`` file with one
        array per input, samples along the first axis
    budget : ``macs=F``, ``params=F`` or measured ``latency=F`` (fraction of the whole network's) or ``kernels=K`` (per
        input channel); or what may be lost, for the smallest network within it: ``drop=0.5`` points of accuracy,
        ``disagree=2`` percent of other answers than the teacher's, ``error=0.02`` of the outputs (squared, relative)
    options, flat : a `CompressOptions`, or its fields by name; docs/options.md lists them
    out : folder to write; None writes nothing and measures no latency. While the work lasts, checkpoints and logs lie
        in ``OUT.unfinished``; the same call goes on from there
    run : how the work shows its progress

    Returns the student in `Result.model`, its plan, and in `Result.metrics` what metrics.json holds: ``teacher`` and
    ``student`` (accuracy and agreement in %, parameters, macs, onnx_bytes, latency_ms), ``stages``, ``layers``,
    ``decisions``, ``latency_search``, ``tuning_steps``, ``notes``, ``run``; ``decided`` for a budget in points.

    Raises
    ------
    InputError
        One sentence that says what was given, what was expected and what to do.
    """
    chosen = CompressOptions.of(options, flat)
    wanted = Budget.parse(budget)
    check_for_onnx(model, chosen)
    _check(wanted, model, data, chosen)
    check_out(out, chosen.overwrite)
    with (run or Run()).at_work(chosen.device, chosen.threads, chosen.seed) as work, ExitStack() as whole:
        teacher = Teacher.open(model, data, chosen, work, chosen.first or wanted.kind != "kernels")
        chosen = replace(chosen, criterion=teacher.criterion)
        if chosen.epochs:
            _check_labels(teacher)
        if out is not None:
            _check_numbers(teacher)
        if teacher.samples is None and chosen.int8:
            raise InputError("int8 needs images to calibrate on and none were given; give --data, or leave --int8 away")
        recipe = recipe_of({"model": model, "data": data, "budget": wanted}, chosen)
        folder = None
        if out is not None and (chosen.epochs or teacher.tuning.wanted or wanted.in_points):
            # Whoever cannot have an extra file leaves it away, and has not trained in vain.
            free = ("checkpoint_every", "int8", "pt2")
            kept = {key: value for key, value in recipe.items() if key not in free} | teacher.digests()
            folder = whole.enter_context(unfinished(out, chosen.overwrite, {"command": "compress", **kept}))
        prober = whole.enter_context(Prober(teacher, folder, work))
        figures = Figures(teacher, work)
        stages = [figures.of(teacher.network, "teacher")]
        decision, notes = None, list(teacher.notes)
        if wanted.in_points:
            decision, probe = decide(wanted, "macs" if chosen.target is None else "latency", prober)
        else:
            probe = prober.make(wanted, folder)
        prober.close()
        plan, student = probe.solved.plan, probe.student
        stages.append(figures.of(probe.solved.student, "closed form"))
        if prober.steps:
            recipe["tune"] = prober.steps
        if probe.tuned is not None:
            stages.append(figures.of(student, "tuned"))
        if decision is not None:
            decision = confirm(wanted, decision, figures, student)
            notes += decision.pop("said")
        if chosen.epochs:
            _train(student, teacher, data, chosen, folder, work)
            stages.append(figures.of(student, "trained"))
        metrics: dict[str, Any] = {
            "teacher": stages[0] | {"parameters": plan.parameters_dense, "macs": plan.macs_dense},
            "student": stages[-1] | {"parameters": student.parameters, "macs": student.macs},
            "stages": stages,
            "layers": [layer_figures(layer) for layer in plan.layers],
            "decisions": probe.solved.decisions,
            "latency_search": probe.solved.search,
            "tuning_steps": prober.steps,
            "notes": notes,
            "run": {
                "command": work.command or "dk2pnet.compress(...)",
                "seed": chosen.seed,
                "criterion": teacher.criterion,
                "task": teacher.task,
                "budget": str(wanted),
                "images": teacher.samples.counts if teacher.samples else {},
                "memory": {"bound_gib": chosen.memory, "own_gib": teacher.own and round(teacher.own / 2**30, 2)},
                "seconds": work.clock.seconds,
                **environment(work.device),
            },
        }
        metrics |= student.facts
        if decision is not None:
            metrics["decided"] = decision
        for side in ("teacher", "student"):
            metrics[side] = {"onnx_bytes": None, "latency_ms": None} | metrics[side]
            del metrics[side]["name"]
        if out is not None and processes.is_main():
            logs = (folder, probe.folder) if folder is not None else None
            deliver(Path(out), teacher, student, plan, metrics, recipe, logs, work)
        return Result(student.result(plan), plan, metrics)


def _check(wanted: Budget, model: object, data: object, options: CompressOptions) -> None:
    """What cannot be, before anything is read."""
    if options.target is not None:
        check_target(options.target)
    if isinstance(data, Budget) or (isinstance(data, str) and data.partition("=")[0] in KINDS and "=" in data):
        raise InputError(f"data is {data!r}, which is a budget; give compress(model, data, budget), or budget={data!r}")
    if wanted.in_points and options.epochs:
        raise InputError(
            f"budget {wanted} looks for the smallest network among tuned ones, and --epochs {options.epochs} would "
            "train the one found; leave --epochs away, and train OUT afterwards with dk2pnet train"
        )
    held_out = options.holdout is None or (is_arrays(options.holdout) and is_onnx_file(model))
    only_in_points = options.holdout_split is not None or not held_out
    if not wanted.in_points and only_in_points:
        raise InputError(f"holdout images decide on a budget in points (drop=0.5), and the budget is {wanted}")
    if not options.epochs and (options.method is not None or options.hints or options.compile):
        what = "method" if options.method is not None else "hints" if options.hints else "compile"
        raise InputError(f"{what} is of the training with labels, and epochs is 0; give --epochs too, or leave it away")
    if wanted.in_points and data is None and options.calibration_data is None:
        raise InputError(f"budget {wanted} is decided on images and none were given; give --data")


def _check_numbers(teacher: Teacher) -> None:
    """`InputError` for numbers that no runtime of ONNX files takes on every processor."""
    example = teacher.network.example
    if isinstance(example, Tensor) and example.dtype != torch.float32:
        raise InputError(
            f"the network and its images are {example.dtype}, which model.onnx cannot have; give both in torch.float32 "
            "(model.float(), x.float()), or no OUT"
        )


def _check_labels(teacher: Teacher) -> None:
    """`InputError` for labels that are no classes: others cannot be trained with."""
    samples = teacher.samples
    assert samples is not None
    train = samples.train
    labels = train.labels if isinstance(train, ImageData) else next(iter(train or ()), (None, None))[1]
    if isinstance(labels, Tensor):
        try:
            class_numbers(labels)
        except InputError as error:
            raise InputError(f"{error}, for the training (epochs); give epochs=0, or images without labels") from error


def _train(
    student: Any, teacher: Teacher, data: object, options: CompressOptions, folder: Path | None, run: Run
) -> None:
    """Train a student with the labels, beside its teacher."""
    assert isinstance(teacher.network, TorchNetwork)
    assert teacher.samples is not None
    source = Source(
        teacher.samples.train,
        data if isinstance(data, str) else None,
        teacher.network.normalization,
        options.augment,
        validation=teacher.samples.validation,
    )
    with run.clock("train"):
        fit(
            student.model,
            source,
            TrainingOptions.of(options),
            run,
            example=teacher.network.example,
            teacher=teacher.network.model,
            folder=folder,
        )
