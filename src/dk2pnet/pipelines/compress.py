"""The whole way: calibrate, select, solve, replace, correct, train, export, measure, report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dk2pnet import processes
from dk2pnet.convert import copy_model, find_convolutions
from dk2pnet.data import AUGMENTATIONS, Normalization
from dk2pnet.deploy.costs import LatencyTable
from dk2pnet.deploy.latency import check_target, compare_latency, conditions, latency_figures
from dk2pnet.deploy.onnx import export_onnx
from dk2pnet.errors import InputError
from dk2pnet.layer import set_form
from dk2pnet.measure import (
    Predictions,
    accuracy,
    agreement,
    is_classifier,
    macs,
    outputs_of,
    parameters,
    predict,
)
from dk2pnet.pipelines.clock import Clock
from dk2pnet.pipelines.closed_form import ClosedForm, Solved, solved_once
from dk2pnet.pipelines.decomposition import CRITERIA
from dk2pnet.pipelines.extras import PT2, write_int8, write_pt2
from dk2pnet.pipelines.fit import fit
from dk2pnet.pipelines.folders import (
    check_out,
    keep_logs,
    new_folder,
    unfinished,
    write_json,
    write_onnx,
    write_recipe,
)
from dk2pnet.pipelines.images import Images, named_images, user_images
from dk2pnet.pipelines.inputs import (
    Network,
    Progress,
    environment,
    load_data,
    open_network,
    pick_device,
    silent,
)
from dk2pnet.pipelines.speed import choose_forms, deployable
from dk2pnet.pipelines.tune import Tuner, tuning_of
from dk2pnet.plan import Budget, LayerPlan, Plan
from dk2pnet.report.page import write_page
from dk2pnet.student import save_student
from dk2pnet.training.trainer import TrainingOptions

__all__ = ["CRITERIA", "Result", "compress", "layer_figures"]


@dataclass
class Result:
    """What `compress` returns: the student in evaluation mode, the plan that made it, and every figure."""

    model: nn.Module
    plan: Plan
    metrics: dict[str, Any] = field(default_factory=dict)


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
    target: str = "onnxruntime",
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
        input channel)
    target : where the student will run and where time is measured, see `deploy.latency.TARGETS`
    int8, pt2 : also write model.int8.onnx (with a comparison in the report), or model.pt2 (a `torch.export` program)
    criterion : ``weight`` (needs no images), ``response`` (images) or ``loss`` (images and a classifier)
    data : name of a data set, a folder, or a re-iterable of normalised batches ``x`` or ``(x, y)``, x (B, C, H, W)
    weights : file with the weights of a named network, or "pretrained"
    normalize : of the images of a named data set: a preset or ``MEAN,.../STD,...``
    test_data : labelled batches for the report, where `data` are batches
    example_input : one normalised image ``(1, C, H, W)``; enough for ``weight`` without training
    keep, first : convolutions that stay dense (names or patterns); whether the first one may be decomposed
    calibration_images : images of the training split, labels unused; a fifth of them only decides
    memory : GiB for the moments (and again for the activations of the reconstruction)
    rebuild : whether to try the layer-by-layer reconstruction, which takes minutes for large images
    tune : distil the teacher into the student on the calibration images, without labels: a number of steps, a time
        ("2m"), 0 for not at all; None is 150 steps where `epochs` is 0, there are at least 100 calibration images, and
        the network is no more costly than CIFAR's ResNet-56
    augment : of the images of a named data set while tuning: ``natural``, ``digits``, ``none``; None for what suits it
    epochs, batch_size, learning_rate, method, hints, precision, compile, checkpoint_every : of the training after the
        decomposition, 0 epochs for none; as in `TrainingOptions`
    out : folder to write; None writes nothing and measures no latency. While the training runs, checkpoints and logs
        lie in ``OUT.unfinished``; the same call goes on from there
    command : the command line, for the report

    Raises
    ------
    InputError
        One sentence that says what was given, what was expected and what to do.
    """
    asked = dict(locals())
    wanted = Budget.parse(budget)
    if criterion not in CRITERIA:
        raise InputError(f"criterion is {criterion!r}; expected one of {', '.join(CRITERIA)}")
    if calibration_images < 2 or memory <= 0 or epochs < 0:
        raise InputError(
            f"calibration images {calibration_images}, memory {memory:g} GiB, epochs {epochs}; "
            "expected at least 2 images, memory above 0 and no negative epochs"
        )
    check_target(target)
    if augment is not None and augment not in AUGMENTATIONS:
        raise InputError(f"augmentation is {augment!r}; expected one of {', '.join(AUGMENTATIONS)}")
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

    named = data if isinstance(data, str) else None
    training_split = load_data(named, "train", model, data_dir=data_dir, input_size=input_size) if named else None
    if named and training_split is None:
        raise InputError(
            f"data set {named!r} has no training split, which calibration reads; give a folder train/ of images"
        )
    network = open_network(model, weights=weights, normalize=normalize, data=training_split, classes=classes)
    teacher = copy_model(network.model).eval().to(chosen)
    images = None
    if training_split is not None:
        test = load_data(named, "test", model, data_dir=data_dir, input_size=input_size)  # type: ignore[arg-type]
        images = named_images(training_split, test, network, calibration_images)
    elif data is not None:
        images = user_images(data, test_data, calibration_images)
    if images is None and (CRITERIA[criterion][0] or epochs):
        what = f"criterion {criterion!r}" if CRITERIA[criterion][0] else "training"
        raise InputError(f"{what} needs images and none were given; give --data, or use --criterion weight --epochs 0")
    if images is None and int8:
        raise InputError("int8 needs images to calibrate on and none were given; give --data, or leave --int8 away")
    example = _example(example_input, images, network, input_size).to(chosen)
    _check_output(teacher, example, criterion)
    tuning = tuning_of(tune, epochs=epochs, images=images, macs=macs(teacher, example))
    teacher_held = None
    if images is not None:
        teacher_held = predict(teacher, images.held_out, chosen)
        if not all(bool(torch.isfinite(output).all()) for output in teacher_held.outputs):
            raise InputError(
                "the network's outputs are not finite on the calibration images; "
                "check the weights and the normalisation"
            )

    left_out = ("command", "progress", "overwrite", "out", "test_data", "example_input")
    recipe = {key: _plain(value) for key, value in asked.items() if key not in left_out}
    with ExitStack() as whole:
        folder, steps = None, 0
        if out is not None and (options is not None or tuning.wanted):
            kept = {key: value for key, value in recipe.items() if key != "checkpoint_every"}
            folder = whole.enter_context(unfinished(out, overwrite, {"command": "compress", **kept}))

        def solve() -> Solved:
            with ClosedForm(
                teacher,
                teacher_held,
                network,
                images,
                example,
                criterion,
                keep=keep,
                first=first,
                memory=int(memory * 2**30),
                rebuild=rebuild,
                seed=seed,
                target=target,
                threads=threads,
                clock=clock,
                progress=progress,
            ) as closed:
                return closed.solve(wanted, whiten=tuning.wanted)

        solved = solve() if folder is None else solved_once(folder, teacher, clock, solve)
        student, plan = solved.student.to(chosen), solved.plan
        set_form(student, "folded")  # the fastest form in eager PyTorch; `branches` again at the end
        figures = _Figures(teacher, teacher_held, images, chosen, progress)
        stages = [figures.of(teacher, "teacher"), figures.of(student, "closed form")]
        if tuning.wanted and any(layer.counts is not None for layer in plan.layers):
            assert images is not None
            assert teacher_held is not None
            tuner = Tuner(
                teacher,
                teacher_held,
                images,
                example=example,
                name=named,
                normalization=network.normalization,
                augment=augment,
                precision=precision,
                seed=seed,
                checkpoint_every=checkpoint_every,
                progress=progress,
            )
            place = folder / "tuning" if folder is not None else None
            with clock("tune"):
                steps = tuning.steps or tuner.steps_in(tuning.seconds or 0.0, solved, place)
                recipe["tune"] = steps
                student = tuner.tune(solved, steps, place)
            stages.append(figures.of(student, "tuned"))
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
                    name=named,
                    normalization=network.normalization,
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
            "tuning": {"steps": steps, "said": tuning.said},
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
        for side in ("teacher", "student"):
            metrics[side] = {"onnx_bytes": None, "latency_ms": None} | metrics[side]
            del metrics[side]["name"]
        if out is not None and processes.is_main():
            _write(
                Path(out),
                overwrite,
                teacher,
                student,
                plan,
                metrics,
                example,
                recipe,
                folder,
                threads,
                target,
                images if int8 else None,
                pt2,
                clock,
                progress,
            )
    return Result(student, plan, metrics)


# -- the steps, in order --------------------------------------------------------------------------------------------


def _example(given: Tensor | None, images: Images | None, network: Network, input_size: int | None) -> Tensor:
    if given is not None:
        if given.dim() != 4 or not given.is_floating_point():
            raise InputError(
                f"example_input is {given.dtype} of shape {tuple(given.shape)}; expected a float tensor (1, C, H, W)"
            )
        return given[:1].detach()
    if images is not None:
        return next(iter(images.gather))[0][:1]
    shape = network.plan.input_shape if network.plan is not None else None
    if shape is None and input_size is not None:
        shape = [(network.spec or {}).get("in_channels") or 3, input_size, input_size]
    if shape is None:
        raise InputError("the size of the images is not known; give --data or --input-size (in Python: example_input)")
    return torch.zeros(1, *shape)


def _check_output(teacher: nn.Module, example: Tensor, criterion: str) -> None:
    try:
        outputs = outputs_of(predict(teacher, [(example, None)], example.device).outputs)
    except (RuntimeError, ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"the network cannot run an image of shape {tuple(example.shape)} ({str(error).splitlines()[0]}); "
            "give images of its size (--input-size)"
        ) from error
    if criterion == "loss" and not is_classifier(outputs):
        shapes = " and ".join(str(tuple(output.shape)) for output in outputs)
        raise InputError(
            "criterion 'loss' needs a classifier (one row of class scores per image), but the network returns "
            f"{shapes}; use --criterion response"
        )


class _Figures:
    """Accuracy on the test split and agreement on the held-out images."""

    def __init__(
        self,
        teacher: nn.Module,
        teacher_held: Predictions | None,
        images: Images | None,
        device: torch.device,
        progress: Progress,
    ) -> None:
        self.teacher, self.teacher_held, self.images = teacher, teacher_held, images
        self.device, self.progress = device, progress

    def of(self, model: nn.Module, name: str) -> dict[str, Any]:
        """A stage: the network's name and figures; None where they cannot be had."""
        figures: dict[str, Any] = {"name": name, "accuracy": None, "agreement": None}
        if self.images is None:
            return figures
        if self.teacher_held is not None and model is not self.teacher:
            held = predict(model, self.images.held_out, self.device)
            if not all(bool(torch.isfinite(output).all()) for output in held.outputs):
                raise InputError(
                    "the compressed network's outputs are not finite; give more calibration images or a larger budget"
                )
            figures["agreement"] = agreement(self.teacher_held, held)
        if self.images.test is not None:
            total = self.images.counts.get("test", 0)
            predictions = predict(
                model, self.images.test, self.device, lambda done: self.progress(f"evaluating: {name}", done, total)
            )
            self.images.counts["test"] = len(predictions)
            if predictions.labels is not None and is_classifier(predictions.outputs):
                figures["accuracy"] = accuracy(predictions)
        return figures


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


def _write(
    out: Path,
    overwrite: bool,
    teacher: nn.Module,
    student: nn.Module,
    plan: Plan,
    metrics: dict[str, Any],
    example: Tensor,
    recipe: Mapping[str, Any],
    logs: Path | None,
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
        if not plan.forms:
            with clock("choosing forms"):
                sizes = {site.name: site.input_size for site in find_convolutions(copy_model(teacher).cpu(), example)}
                table = LatencyTable(target, threads, progress=lambda done, of: progress("timing layers", done, of))
                forms = choose_forms(student, sizes, table)
            for layer in plan.layers:
                layer.form = forms.get(layer.name)
        with clock("export"):
            metrics["student"]["onnx_difference"] = write_onnx(student, plan, example, folder / "model.onnx")
            dense = folder / "teacher.onnx"
            export_onnx(teacher, example, dense)
        progress("measuring latency", 0, 0)
        paths = {"teacher": dense, "student": folder / "model.onnx"}
        networks: Mapping[str, Any] = paths
        if target != "onnxruntime" and target != "openvino":
            networks = {
                "teacher": deployable(teacher, example, target),
                "student": deployable(student, example, target, plan.forms),
            }
        with clock("latency"):
            timed = latency_figures(compare_latency(networks, example, target=target, threads=threads))
        for side, path in paths.items():
            metrics[side]["onnx_bytes"] = path.stat().st_size
            metrics[side] |= timed[side]
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
            keep_logs(logs, folder)


def _plain(value: Any) -> Any:
    """An option as YAML can hold it; Python objects cannot be repeated from a recipe and become None."""
    if isinstance(value, Path | Budget | Normalization):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value] if all(isinstance(item, str) for item in value) else None
    return value if isinstance(value, str | int | float | bool) else None
