"""The whole way: calibrate, select, solve, replace, correct, train, export, measure, report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dk2pnet import processes
from dk2pnet.commands.extras import PT2, write_int8, write_pt2
from dk2pnet.data import Normalization
from dk2pnet.data.samples import Images
from dk2pnet.deploy.costs import LatencyTable
from dk2pnet.deploy.export import export_onnx
from dk2pnet.deploy.latency import check_target, compare_latency, conditions, latency_figures
from dk2pnet.errors import InputError
from dk2pnet.layer import set_form
from dk2pnet.measure import (
    macs,
    parameters,
)
from dk2pnet.modules import copy_model
from dk2pnet.networks.saved import save_student
from dk2pnet.networks.torch.sites import find_convolutions
from dk2pnet.plan import Budget, LayerPlan, Plan
from dk2pnet.report.page import write_page
from dk2pnet.run.clock import Clock
from dk2pnet.run.device import environment, pick_device
from dk2pnet.run.out_folder import check_out, keep_logs, new_folder, unfinished, write_json, write_onnx, write_recipe
from dk2pnet.run.progress import Progress, silent
from dk2pnet.run.seed import left_as_found
from dk2pnet.students.allocate import CRITERIA
from dk2pnet.students.latency_budget import choose_forms, deployable
from dk2pnet.students.loss_budget import confirm, decide
from dk2pnet.students.teacher import Figures, check_options, plain_options, prepare
from dk2pnet.training.fit import fit
from dk2pnet.training.trainer import TrainingOptions

__all__ = ["CRITERIA", "Result", "compress", "layer_figures", "notes_of_file"]


@dataclass
class Result:
    """What `compress` returns: the student in evaluation mode, the plan that made it, and every figure.

    The student is on the device of the model that was given, and on the CPU where that was a name or a folder.
    """

    model: nn.Module
    plan: Plan
    metrics: dict[str, Any] = field(default_factory=dict)


@left_as_found()
def compress(
    model: str | nn.Module,
    budget: str | Budget = "macs=0.44",
    criterion: str = "loss",
    data: str | Iterable[Any] | None = None,
    *,
    weights: str | None = None,
    normalize: str | Normalization | None = None,
    data_dir: str | None = None,
    test_data: Iterable[Any] | None = None,
    example_input: Tensor | None = None,
    input_size: int | None = None,
    classes: int | None = None,
    keep: Sequence[str] = (),
    first: bool = False,
    calibration_images: int = 2000,
    calibration_data: str | None = None,
    memory: float = 2.0,
    rebuild: bool = True,
    tune: str | int | None = None,
    augment: str | None = None,
    epochs: int = 0,
    batch_size: int = 128,
    learning_rate: float = 0.02,
    method: str | None = None,
    hints: Sequence[str] = (),
    precision: str = "auto",
    compile: bool = False,
    checkpoint_every: float = 60.0,
    seed: int = 0,
    device: str = "auto",
    threads: int | None = None,
    target: str | None = None,
    holdout: str | Iterable[Any] | None = None,
    holdout_split: str | None = None,
    int8: bool = False,
    pt2: bool = False,
    out: str | Path | None = None,
    overwrite: bool = False,
    command: str | None = None,
    progress: Progress = silent,
) -> Result:
    """Make a trained CNN smaller and faster by dominant kernels.

    Example::

        result = dk2pnet.compress(model, budget="macs=0.44", data=loader)      # loader: batches of normalised images
        result.model, result.plan, result.metrics["student"]["macs"]

    Parameters
    ----------
    model : a module, the name of a network (``resnet32``, ``torchvision/resnet18``, ``timm/...``, ``FILE.py:FUNCTION``)
        or a folder that dk2pnet wrote. A module given is not changed.
    budget : ``macs=F``, ``params=F`` or measured ``latency=F`` (fraction of the whole network's) or ``kernels=K`` (per
        input channel); or what may be lost, for the smallest network within it: ``drop=0.5`` points of accuracy,
        ``disagree=2`` percent of other answers than the teacher's, ``error=0.02`` of the outputs (squared, relative)
    target : where the student will run and where time is measured, see `deploy.latency.TARGETS`; None is
        ``onnxruntime``. With a budget in points, given, the smallest network is that of the least measured latency
    holdout, holdout_split : what decides on a budget in points: a folder of images (or batches), or a part of a split
        such as ``test[:50%]``; None is the tenth of the training split that nothing else uses, or the held-out fifth
        of a user's own batches
    int8, pt2 : also write model.int8.onnx (with a comparison in the report), or model.pt2 (a `torch.export` program)
    criterion : ``weight`` (needs no images), ``response`` (images) or ``loss`` (images and a classifier)
    data : name of a data set, a folder, or a re-iterable of normalised batches ``x`` or ``(x, y)``, x (B, C, H, W),
        which has to give the same batches in every pass
    data_dir : folder with local copies of data sets
    input_size, classes : side of the images in pixels, number of classes, where the data does not say them
    weights : file with the weights of a named network, or "pretrained"
    normalize : of the images of a named data set: a preset or ``MEAN,.../STD,...``
    test_data : labelled batches for the report, where `data` are batches
    example_input : one normalised image ``(1, C, H, W)``; enough for ``weight`` without training
    keep, first : convolutions that stay dense (names or patterns); whether the first one may be decomposed
    calibration_images : images of the training split (of batches: the first so many), labels unused; a fifth of them
        only decides
    calibration_data : a data set or folder of other images to calibrate and tune on, sized as `data` is, or where there
        is no `data`
    memory : GiB for the moments (and again for the activations of the reconstruction)
    rebuild : whether to try the layer-by-layer reconstruction, which takes minutes for large images
    tune : distil the teacher into the student on the calibration images, without labels: a number of steps, a time
        ("2m"), 0 for not at all; None is 150 steps where `epochs` is 0, there are at least 100 calibration images, and
        the network is no more costly than CIFAR's ResNet-56
    augment : of the images of a named data set while tuning and training: ``natural``, ``digits``, ``none``; None for
        what suits it
    epochs, batch_size, learning_rate, method, hints, precision, compile, checkpoint_every : of the training after the
        decomposition, 0 epochs for none; as in `TrainingOptions`
    out : folder to write; None writes nothing and measures no latency. While the training runs, checkpoints and logs
        lie in ``OUT.unfinished``; the same call goes on from there
    seed, device, threads : of everything random; ``auto``, ``cpu``, ``cuda:0``; of PyTorch and ONNX Runtime
    overwrite : replace an `out` that an earlier run wrote
    command : the command line, for the report
    progress : called with what is done, how much of it, and how much there is

    Returns the student in `Result.model`, its plan, and in `Result.metrics` what metrics.json holds: ``teacher`` and
    ``student`` (accuracy and agreement in %, parameters, macs, onnx_bytes, latency_ms), ``stages``, ``layers``,
    ``decisions``, ``latency_search``, ``tuning_steps``, ``notes``, ``run``; ``decided`` for a budget in points.

    Raises
    ------
    InputError
        One sentence that says what was given, what was expected and what to do.
    """
    asked = dict(locals())
    wanted = Budget.parse(budget)
    check_options(criterion, calibration_images, memory, augment)
    if epochs < 0:
        raise InputError(f"epochs is {epochs}; expected 0 or more")
    unit, target = ("macs" if target is None else "latency"), target or "onnxruntime"
    check_target(target)
    if wanted.in_points and epochs:
        raise InputError(
            f"budget {wanted} looks for the smallest network among tuned ones, and --epochs {epochs} would train the "
            "one found; leave --epochs away, and train OUT afterwards with dk2pnet train"
        )
    if not wanted.in_points and (holdout is not None or holdout_split is not None):
        raise InputError(f"holdout images decide on a budget in points (drop=0.5), and the budget is {wanted}")
    int8 = int8 or target == "onnxruntime-int8"
    check_out(out, overwrite)
    chosen = pick_device(device, threads)
    clock = Clock()
    options = None
    if epochs:
        options = TrainingOptions(
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            method=method,
            hints=tuple(hints),
            precision=precision,
            compile=compile,
            seed=seed,
            checkpoint_every=checkpoint_every,
        )
    elif method is not None or hints or compile:
        what = "method" if method is not None else "hints" if hints else "compile"
        raise InputError(f"{what} is of the training with labels, and epochs is 0; give --epochs too, or leave it away")
    if wanted.in_points and data is None and calibration_data is None:
        raise InputError(f"budget {wanted} is decided on images and none were given; give --data")
    ready = prepare(
        model,
        data,
        criterion,
        calibration_data=calibration_data,
        weights=weights,
        normalize=normalize,
        data_dir=data_dir,
        test_data=test_data,
        holdout=holdout,
        holdout_split=holdout_split,
        example_input=example_input,
        input_size=input_size,
        classes=classes,
        calibration_images=calibration_images,
        tune=tune,
        epochs=epochs,
        seed=seed,
        device=chosen,
    )
    teacher, network, images, example = ready.teacher, ready.network, ready.images, ready.example
    if images is None and int8:
        raise InputError("int8 needs images to calibrate on and none were given; give --data, or leave --int8 away")

    recipe = plain_options(asked, ("command", "progress", "overwrite", "out", "test_data", "example_input"))
    with ExitStack() as whole:
        folder = None
        if out is not None and (options is not None or ready.tuning.wanted or wanted.in_points):
            # Whoever cannot have an extra file leaves it away, and has not trained in vain.
            free = ("checkpoint_every", "int8", "pt2")
            kept = {key: value for key, value in recipe.items() if key not in free} | ready.digests()
            folder = whole.enter_context(unfinished(out, overwrite, {"command": "compress", **kept}))
        prober = whole.enter_context(
            ready.prober(
                keep=keep,
                first=first,
                memory=memory,
                rebuild=rebuild,
                augment=augment,
                precision=precision,
                checkpoint_every=checkpoint_every,
                target=target,
                threads=threads,
                folder=folder,
                clock=clock,
                progress=progress,
            )
        )
        figures = Figures(ready, progress)
        stages = [figures.of(teacher, "teacher")]
        decision, notes = None, [ready.tuning.said] * bool(ready.tuning.said)
        if wanted.in_points:
            decision, probe = decide(wanted, unit, prober, ready, progress)
        else:
            probe = prober.make(wanted, folder)
        prober.close()
        solved, plan = probe.solved, probe.solved.plan
        stages.append(figures.of(solved.student, "closed form"))
        student = probe.student
        if prober.steps:
            recipe["tune"] = prober.steps
        if probe.tuned is not None:
            stages.append(figures.of(student, "tuned"))
        if decision is not None:
            decision = confirm(wanted, decision, ready, figures, student)
            notes += decision.pop("said")
        if options is not None:
            assert images is not None
            assert images.train is not None
            with clock("train"):
                fit(
                    student,
                    images.train,
                    options,
                    example=example,
                    teacher=teacher,
                    name=data if isinstance(data, str) else None,
                    normalization=network.normalization,
                    augment=augment,
                    validation=images.validation,
                    device=chosen,
                    folder=folder,
                    progress=progress,
                )
            stages.append(figures.of(student, "trained"))

        student.eval()
        set_form(student, "branches")
        metrics: dict[str, Any] = {
            "teacher": stages[0] | {"parameters": plan.parameters_dense, "macs": plan.macs_dense},
            "student": stages[-1] | {"parameters": parameters(student), "macs": macs(student, example)},
            "stages": stages,
            "layers": [layer_figures(layer) for layer in plan.layers],
            "decisions": solved.decisions,
            "latency_search": solved.search,
            "tuning_steps": prober.steps,
            "notes": notes,
            "run": {
                "command": command or "dk2pnet.compress(...)",
                "seed": seed,
                "criterion": criterion,
                "budget": str(wanted),
                "images": images.counts if images else {},
                "seconds": clock.seconds,
                **environment(chosen),
            },
        }
        if decision is not None:
            metrics["decided"] = decision
        for side in ("teacher", "student"):
            metrics[side] = {"onnx_bytes": None, "latency_ms": None} | metrics[side]
            del metrics[side]["name"]
        if out is not None and processes.is_main():
            _write(
                Path(out),
                overwrite,
                teacher,
                network.forms,
                student,
                plan,
                metrics,
                example,
                recipe,
                folder,
                probe.folder,
                threads,
                target,
                images if int8 else None,
                pt2,
                clock,
                progress,
            )
    # Whoever gave a model on the CPU goes on there, with a GPU in the machine or without.
    return Result(student.to(next(network.model.parameters()).device), plan, metrics)


def layer_figures(layer: LayerPlan) -> dict[str, Any]:
    """A convolution's entry in metrics.json."""
    return {
        "name": layer.name,
        "kind": "dense" if layer.counts is None else "dk",
        "reason": layer.reason,
        "shape": layer.shape,
        "kernels": layer.kernels,
        "counts": layer.counts,
        "branches": layer.branches,
        "macs_dense": layer.macs_dense,
        "macs": layer.macs,
        "energy_kept": layer.energy_kept,
    }


def notes_of_file(plan: Plan, timed: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What a reader of the multiply-adds and the times has to know of the file that was written."""
    notes = []
    chosen = [layer.form for layer in plan.layers if layer.counts is not None and layer.form is not None]
    if "folded" in chosen:
        notes.append(
            f"{chosen.count('folded')} of {len(chosen)} layers of dominant kernels run as one dense convolution in "
            "model.onnx, which is faster there; the multiply-adds are those of their kernels"
        )
    if any(timed[side]["latency_noisy"] for side in ("teacher", "student")):
        notes.append("the machine was unsteady while times were taken: do not trust small differences of latency")
    return notes


def _write(
    out: Path,
    overwrite: bool,
    teacher: nn.Module,
    teacher_forms: Mapping[str, str],
    student: nn.Module,
    plan: Plan,
    metrics: dict[str, Any],
    example: Tensor,
    recipe: Mapping[str, Any],
    logs: Path | None,
    made: Path | None,
    threads: int | None,
    target: str,
    int8: Images | None,
    pt2: bool,
    clock: Clock,
    progress: Progress,
) -> None:
    """Export, check, measure, and write the OUT folder."""
    example = example.cpu()
    with new_folder(out, overwrite) as folder:
        progress("exporting", 0, 0)
        sites = find_convolutions(copy_model(teacher).cpu(), example)
        sizes = {site.name: site.input_size for site in sites if site.name not in plan.forms}
        with clock("choosing forms"):
            table = LatencyTable(target, threads, progress=lambda done, of: progress("timing layers", done, of))
            forms = choose_forms(student, sizes, table)
        for layer in plan.layers:
            layer.form = forms.get(layer.name, layer.form)
        with clock("export"):
            metrics["student"]["onnx_difference"] = write_onnx(student, plan, example, folder / "model.onnx")
            dense = folder / "teacher.onnx"
            export_onnx(teacher, example, dense, forms=teacher_forms)
        progress("measuring latency", 0, 0)
        paths = {"teacher": dense, "student": folder / "model.onnx"}
        networks: Mapping[str, Any] = paths
        if target != "onnxruntime" and target != "openvino":
            networks = {
                "teacher": deployable(teacher, example, target, teacher_forms),
                "student": deployable(student, example, target, plan.forms),
            }
        with clock("latency"):
            timed = latency_figures(compare_latency(networks, example, target=target, threads=threads))
        for side, path in paths.items():
            metrics[side]["onnx_bytes"] = path.stat().st_size
            metrics[side] |= timed[side]
        metrics["notes"] = [*metrics["notes"], *notes_of_file(plan, timed)]
        metrics["run"]["latency"] = conditions(target, example, threads)
        for layer, figures in zip(plan.layers, metrics["layers"], strict=True):
            figures["form"] = layer.form
        if int8 is not None:
            with clock("int8"):
                metrics["int8"] = write_int8(
                    paths, folder, int8.gather, int8.held_out, int8.test, example, threads, progress
                )
        if pt2:
            with clock("pt2"):
                metrics["student"]["pt2_difference"] = write_pt2(student, plan.forms, example, folder / PT2)
        dense.unlink()
        save_student(student, plan, folder)
        write_json(folder / "metrics.json", metrics)
        write_recipe(folder / "recipe.yaml", "compress", recipe)
        write_page(metrics, folder / "report.html")
        if logs is not None:
            keep_logs(logs, folder, made)
