"""Accuracy, agreement with the teacher, parameters, MACs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dk2pnet.errors import InputError
from dk2pnet.layer import DKConv2d

__all__ = [
    "Predictions",
    "accuracy",
    "agreement",
    "divergence",
    "evaluation",
    "in_layout",
    "inference_of",
    "is_classifier",
    "kept_modes",
    "layout_of",
    "macs",
    "outputs_of",
    "parameters",
    "predict",
    "squared_error",
    "use_form",
]


def parameters(model: nn.Module) -> int:
    """How many numbers training could change, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def macs(model: nn.Module, example: Tensor) -> int:
    """Multiply-adds of convolutions and matrix products for one image, DK layers in their cheap (branch) form.

    `example` is ``(1, C, H, W)``. Counted by PyTorch's own flop counter, which counts a multiply-add as two.
    """
    counter = FlopCounterMode(display=False)
    with use_form(model, "branches"), evaluation(model), _plain_kernels(model), counter:
        model(example[:1])
    return counter.get_total_flops() // 2


@contextmanager
def _plain_kernels(model: nn.Module) -> Iterator[None]:
    """Attention and recurrent layers as the products that they consist of: the counter does not see into fused ones."""
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    libraries: tuple[Any, ...] = (torch.backends.mkldnn, torch.backends.cudnn) if recurrent else ()
    enabled = [library.enabled for library in libraries]
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for library in libraries:
            library.enabled = False
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for library, before in zip(libraries, enabled, strict=True):
            library.enabled = before


@contextmanager
def use_form(model: nn.Module, form: str) -> Iterator[None]:
    """Compute every DK layer in `form` inside the block, then as before."""
    before = {module: module.form for module in model.modules() if isinstance(module, DKConv2d)}
    try:
        for module in before:
            module.form = form
        yield
    finally:
        for module, old in before.items():
            module.form = old


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Every module's mode, training or evaluation, is put back when the block ends."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def in_layout(model: nn.Module, layout: torch.memory_format) -> None:
    """Put weights and buffers (B, C, H, W) into a memory format; `nn.Module.to` would fail on others, as of Conv3d."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=layout)


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients inside the block; every module's mode is put back afterwards."""
    with kept_modes(model), torch.no_grad():
        model.eval()
        yield


@contextmanager
def inference_of(model: nn.Module) -> Iterator[nn.Module]:
    """Evaluation mode without parameter gradients inside the block; every mode and flag is put back afterwards."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    with kept_modes(model):
        try:
            model.eval()
            for parameter in flags:
                parameter.requires_grad_(False)
            yield model
        finally:
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)


def layout_of(x: Tensor, *models: nn.Module) -> torch.memory_format:
    """The memory format of images in which convolutions run faster, if all `models` can: some flatten by ``view``.

    Tried with the images `x`, ``(B, C, H, W)``, and the weights in the format that they are in.
    """
    if x.dim() != 4:
        return torch.contiguous_format
    x = x.to(memory_format=torch.channels_last)
    try:
        for model in models:
            with evaluation(model):
                model(x)
    except Exception:  # whatever it is, it will be met again, and said, in the usual format
        return torch.contiguous_format
    return torch.channels_last


class Predictions:
    """What a network answers to a set of images: `outputs` (one tensor per output), `labels` or None."""

    def __init__(self, outputs: list[Tensor], labels: Tensor | None) -> None:
        self.outputs, self.labels = outputs, labels

    def __len__(self) -> int:
        return len(self.outputs[0])

    @property
    def classifies(self) -> bool:
        """Whether there is one row of at least two class scores per image."""
        return is_classifier(self.outputs)

    def infinite(self) -> str | None:
        """None where all outputs are finite, else where they are not (the text may be empty)."""
        return None if all(bool(torch.isfinite(output).all()) for output in self.outputs) else ""


def outputs_of(output: object) -> list[Tensor]:
    """The tensors in a network's output: a tensor, or tuples, lists and dictionaries of tensors."""
    if isinstance(output, Tensor):
        return [output]
    parts = list(output.values()) if isinstance(output, dict) else output
    if not isinstance(parts, list | tuple):
        raise InputError(
            f"the network returns {type(output).__name__}; expected a tensor, or several in a tuple or dict"
        )
    return [tensor for part in parts if part is not None for tensor in outputs_of(part)]


def is_classifier(outputs: list[Tensor]) -> bool:
    """Whether there is one row of at least two class scores per image."""
    return len(outputs) == 1 and outputs[0].dim() == 2 and outputs[0].shape[1] >= 2


def predict(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor | None]],
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> Predictions:
    """Run `model` in evaluation mode over normalised `batches`."""
    rows: list[list[Tensor]] = []
    labels: list[Tensor] = []
    done, layout = 0, None
    with evaluation(model):
        for x, y in batches:
            x = x.to(device)
            layout = layout or layout_of(x[:2], model)
            rows.append([output.float().cpu() for output in outputs_of(model(x.to(memory_format=layout)))])
            if y is not None:
                labels.append(y.cpu())
            done += len(x)
            if progress is not None:
                progress(done)
    if not rows:
        raise InputError("there are no images to evaluate on")
    numbers = sorted({len(row) for row in rows})
    if len(numbers) > 1:
        raise InputError(
            f"the network gives {numbers[0]} outputs for one batch and {numbers[-1]} for another; expected as many for "
            "each, as in a detector before its boxes are selected"
        )
    parts = list(zip(*rows, strict=True))
    if len({tuple(each.shape[1:]) for each in parts[0]}) > 1:
        raise InputError("the outputs differ in size from batch to batch; give images of one size")
    outputs = [torch.cat(part) for part in parts]
    return Predictions(outputs, torch.cat(labels) if len(labels) == len(rows) else None)


def class_numbers(labels: Tensor) -> Tensor:
    """Labels as int64 ``(N,)``; of ``(N, 1)`` too. `InputError` for what is not one whole number per image."""
    if labels.dim() == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.dim() != 1 or labels.is_floating_point():
        raise InputError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)}; expected one whole number per image, its class"
        )
    return labels.long()


def accuracy(predictions: Predictions) -> float:
    """Top-1 accuracy in percent."""
    if predictions.labels is None:
        raise InputError("the images have no labels, which accuracy needs; give a labelled data set")
    if not predictions.classifies:
        raise InputError("accuracy needs a classifier (one row of class scores per image), which this network is not")
    scores = predictions.outputs[0]
    labels = class_numbers(predictions.labels)
    highest = int(labels.max())
    if highest >= scores.shape[1]:
        raise InputError(
            f"the data has labels up to {highest}, but the network has {scores.shape[1]} classes; "
            "give the data set that the network was trained for"
        )
    return 100 * float((scores.argmax(1) == labels).double().mean())


def agreement(teacher: Predictions, student: Predictions) -> float | None:
    """Percentage of images whose top-1 class is the teacher's; None where the network is no classifier."""
    if not teacher.classifies:
        return None
    return 100 * float((teacher.outputs[0].argmax(1) == student.outputs[0].argmax(1)).double().mean())


def divergence(teacher: Predictions, student: Predictions) -> float:
    """How far the student's outputs are from the teacher's: mean KL(teacher || student) at temperature 1 for a
    classifier, else the squared error relative to the teacher's energy. Infinite when the student's are not finite."""
    if teacher.classifies:
        target, log_student = (
            F.log_softmax(teacher.outputs[0].double(), 1),
            F.log_softmax(student.outputs[0].double(), 1),
        )
        value = float(F.kl_div(log_student, target, reduction="batchmean", log_target=True))
        return value if value == value else float("inf")
    return squared_error(teacher, student)


def squared_error(teacher: Predictions, student: Predictions) -> float:
    """Squared error over the teacher's energy, the mean over the outputs: boxes in pixels must not hide the scores.

    Of an output in which the teacher is silent: over the energy of all. Infinite when the student's are not finite.
    """
    errors = [float((t - s).double().square().sum()) for t, s in zip(teacher.outputs, student.outputs, strict=True)]
    energies = [float(t.double().square().sum()) for t in teacher.outputs]
    value = sum(e / (own or sum(energies) or 1e-30) for e, own in zip(errors, energies, strict=True)) / len(errors)
    return value if value == value else float("inf")
