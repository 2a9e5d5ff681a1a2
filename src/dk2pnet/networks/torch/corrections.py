"""Small corrections after convolutions were replaced: batch norms matched to the teacher's, bias correction."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dk2pnet.layer import DKConv2d
from dk2pnet.measure import evaluation, layout_of

__all__ = ["correct_biases", "match_batch_norm", "has_batch_norm", "reestimate_batch_norm", "statistics_are_folded"]

_Batches = Iterable[tuple[Tensor, Tensor | None]]


def has_batch_norm(model: nn.Module) -> bool:
    """Whether any batch normalisation keeps running statistics."""
    return any(isinstance(m, _BatchNorm) and m.running_mean is not None for m in model.modules())


def statistics_are_folded(model: nn.Module) -> bool:
    """Whether all running means are 0 and all variances 1: they lie in weights and biases, and are nobody's."""
    buffers = [(norm.running_mean, norm.running_var) for norm in _running(model).values()]
    return all(m is not None and v is not None and not m.any() and bool((v == 1).all()) for m, v in buffers)


def reestimate_batch_norm(model: nn.Module, batches: _Batches, device: torch.device | str = "cpu") -> None:
    """Replace all running means and variances of `model` by those over `batches` (their plain average).

    A batch of one image has no variance where maps are 1x1 and is left out; without any other nothing is changed.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    momenta = [norm.momentum for norm in norms]
    before = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms]
    with evaluation(model):
        try:
            layout = None
            for x, _ in batches:
                if len(x) < 2:
                    continue
                x = x.to(device)
                if layout is None:
                    layout = layout_of(x[:2], model)
                    for norm in norms:
                        norm.reset_running_stats()
                        norm.momentum = None  # cumulative average
                        norm.train()
                model(x.to(memory_format=layout))
        finally:
            for norm, momentum, buffers in zip(norms, momenta, before, strict=True):
                norm.momentum = momentum
                if not norm.num_batches_tracked:  # the network did not come by: nothing is known that is better
                    norm.load_state_dict(buffers, strict=False)


@torch.no_grad()
def match_batch_norm(
    student: nn.Module, teacher: nn.Module, batches: _Batches, device: torch.device | str = "cpu"
) -> None:
    """Give the student's batch norms the means and variances with which each channel has, behind the norm, the mean and
    the variance that the teacher has there on the same images.

    With the teacher's m, v and running (mu, var), and the student's m', v' in front of a norm: var' = var v' / v and
    mu' = m' - (m - mu) sqrt(v' / v). On images like those that the network was trained with m = mu and v = var, and it
    is the usual re-estimation. On others the running statistics are not theirs, and need not be; those of a network
    whose statistics were folded into its weights (0 and 1) stay what they are but for what the student changed.

    Every norm sees its inputs with the norms before it already corrected, by the statistics of the batch; a norm whose
    two networks differ in shape or in calls is left alone.
    """
    mine, theirs = (_running(model) for model in (student, teacher))
    names = [name for name in mine if name in theirs and mine[name].num_features == theirs[name].num_features]
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}
    sums = {name: torch.zeros(5, mine[name].num_features, dtype=torch.float64) for name in names}

    def look(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name].append(_spread(args[0]))

        return hook

    def correct(name: str) -> Callable:
        def hook(module: _BatchNorm, args: tuple[Tensor, ...]) -> tuple[Tensor] | None:
            if not seen[name]:
                return None
            x, (mean, variance) = args[0], seen[name].pop(0)
            own, spread = _spread(x)
            weight = x.numel() / x.shape[1]
            parts = [torch.ones_like(own), own, spread + own.square(), mean, variance + mean.square()]
            sums[name] += weight * torch.stack(parts).cpu()
            gain = ((variance + module.eps) / (spread + module.eps)).sqrt()
            shape = (-1, *[1] * (x.dim() - 2))
            return ((x - own.view(shape).to(x)) * gain.view(shape).to(x) + mean.view(shape).to(x),)

        return hook

    with ExitStack() as stack:
        for model in (student, teacher):
            stack.enter_context(evaluation(model))
        for name in names:
            for key in ("running_mean", "running_var"):
                getattr(mine[name], key).copy_(getattr(theirs[name], key))
            stack.callback(theirs[name].register_forward_pre_hook(look(name)).remove)
            stack.callback(mine[name].register_forward_pre_hook(correct(name)).remove)
        layout = None
        for x, _ in batches:
            x = x.to(device)
            if layout is None:
                layout = layout_of(x[:2], student, teacher)
                for found in seen.values():
                    found.clear()
                for total in sums.values():
                    total.zero_()
            x = x.to(memory_format=layout)
            teacher(x)
            student(x)
            for found in seen.values():
                found.clear()
    for name in names:
        norm, (weight, own, square, mean, other) = mine[name], sums[name]
        if not float(weight[0]):
            continue
        own, square, mean, other = (each / weight for each in (own, square, mean, other))
        gain = ((other - mean.square() + norm.eps) / (square - own.square() + norm.eps)).sqrt()
        assert norm.running_mean is not None
        assert norm.running_var is not None
        of_teacher = norm.running_mean.double().cpu(), norm.running_var.double().cpu()
        norm.running_mean.copy_(own - (mean - of_teacher[0]) / gain)
        norm.running_var.copy_((of_teacher[1] + norm.eps) / gain.square() - norm.eps)


def _running(model: nn.Module) -> dict[str, _BatchNorm]:
    """Batch norms that keep statistics, by name."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    return {name: norm for name, norm in found.items() if norm.running_mean is not None}


def _spread(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel of ``x (B, C, ...)``, in float64 ``(C,)``."""
    over = [0, *range(2, x.dim())]
    variance, mean = torch.var_mean(x.float() if x.dtype.itemsize < 4 else x, over, correction=0)
    return mean.double(), variance.double()


def correct_biases(
    student: nn.Module, teacher: nn.Module, names: Iterable[str], batches: _Batches, device: torch.device | str = "cpu"
) -> None:
    """Shift every DK layer's bias by the mean difference between the teacher's response and its own.

    For networks without batch normalisation, which would absorb the difference. Layers without a bias are left as they
    are: a new bias would not be in the budget. One after the other in the order of
    `names` (the order of execution), because each correction moves the inputs of the next.
    """
    student_modules, teacher_modules = dict(student.named_modules()), dict(teacher.named_modules())
    layers = {name: student_modules.get(name) for name in names}
    wanted = [name for name, layer in layers.items() if isinstance(layer, DKConv2d) and layer.bias is not None]
    target = _mean_responses(teacher, {name: teacher_modules[name] for name in wanted}, batches, device)
    for name in wanted:
        layer = student_modules[name]
        assert isinstance(layer, DKConv2d)
        shift = target[name] - _mean_responses(student, {name: layer}, batches, device)[name]
        with torch.no_grad():
            assert layer.bias is not None
            layer.bias.add_(shift.to(layer.bias))


def _mean_responses(
    model: nn.Module, modules: dict[str, nn.Module], batches: _Batches, device: torch.device | str
) -> dict[str, Tensor]:
    """Mean output of each channel over images and positions, (N,)."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    handles = []
    for name, module in modules.items():

        def hook(module: nn.Module, args: tuple, output: Tensor, name: str = name) -> None:
            per_channel = output.detach().double().transpose(0, 1).flatten(1)
            sums[name] = sums.get(name, 0) + per_channel.sum(1)
            counts[name] = counts.get(name, 0) + per_channel.shape[1]

        handles.append(module.register_forward_hook(hook))
    try:
        with evaluation(model):
            for x, _ in batches:
                model(x.to(device))
    finally:
        for handle in handles:
            handle.remove()
    return {name: sums[name] / counts[name] for name in sums}
