"""DK layers in their whitened form while they are trained: parametrizations that are gone afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dk2pnet.decompose.whiten import Whitening, whiten
from dk2pnet.layer import DKConv2d

__all__ = ["plain_state", "whitened", "whitening_of"]


def whitening_of(layer: DKConv2d, A: Tensor | None) -> Whitening:
    """The whitening of a layer at its present weights; A: moments ``(G, C q, C q)`` of its inputs, None for 1."""
    order = layer._group_order
    kernels, channels = layer.kernels.detach().flatten(1)[order], layer.source[order]
    combination = layer.combination.detach().view(layer.groups, -1, layer.combination.shape[1])
    return whiten(kernels, combination, channels % (layer.in_channels // layer.groups), A)


@contextmanager
def whitened(model: nn.Module, whitenings: Mapping[str, Whitening]) -> Iterator[None]:
    """Inside the block the named DK layers have whitened parameters; then plain ones again, with the weights reached.

    The constants are buffers, so that a state holds all that it means.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    layers = [modules[name] for name in whitenings]
    try:
        for layer, whitening in zip(layers, whitenings.values(), strict=True):
            assert isinstance(layer, DKConv2d)
            order = layer._group_order.cpu().argsort()
            kernels = _Times(whitening.to_kernel[order], whitening.to_kappa[order])
            combination = _Times(whitening.to_combination, whitening.to_q)
            for name, form in (("kernels", kernels), ("combination", combination)):
                parametrize.register_parametrization(layer, name, form.to(getattr(layer, name)))
        yield
    finally:
        for layer in layers:
            for name in ("kernels", "combination"):
                if parametrize.is_parametrized(layer, name):
                    parametrize.remove_parametrizations(layer, name)


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the model's state as it will be outside the block of `whitened`."""
    state = {name: tensor for name, tensor in model.state_dict().items() if ".parametrizations." not in f".{name}"}
    for path, module in model.named_modules():
        for name in ("kernels", "combination") if isinstance(module, DKConv2d) else ():
            state[f"{path}.{name}"] = getattr(module, name)
    return {name: tensor.detach().clone() for name, tensor in state.items()}


class _Times(nn.Module):
    """Multiplies a weight, cut into as many blocks of rows as there are matrices, by the matrices from the right."""

    forth: Tensor
    back: Tensor

    def __init__(self, forth: Tensor, back: Tensor) -> None:
        super().__init__()
        self.register_buffer("forth", forth)
        self.register_buffer("back", back)

    def forward(self, parameter: Tensor) -> Tensor:
        """Parameter -> weight, outside autocast: half precision would round it."""
        return self._times(parameter, self.forth)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Weight -> parameter."""
        return self._times(weight, self.back)

    def _times(self, x: Tensor, matrices: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return (x.reshape(len(matrices), -1, matrices.shape[1]) @ matrices).view(x.shape)
