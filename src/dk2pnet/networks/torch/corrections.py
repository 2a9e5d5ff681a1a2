"""Small corrections after convolutions were replaced: batch-norm re-estimation, bias correction."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dk2pnet.layer import DKConv2d
from dk2pnet.measure import evaluation, layout_of

__all__ = ["correct_biases", "has_batch_norm", "reestimate_batch_norm"]

_Batches = Iterable[tuple[Tensor, Tensor | None]]


def has_batch_norm(model: nn.Module) -> bool:
    """Whether any batch normalisation keeps running statistics."""
    return any(isinstance(m, _BatchNorm) and m.running_mean is not None for m in model.modules())


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
