"""Puts DK layers in the place of a model's convolutions."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from dk2pnet.decompose.solve import Factors
from dk2pnet.errors import InputError
from dk2pnet.layer import DKConv2d
from dk2pnet.modules import copy_model, make_weights_plain, replace_modules
from dk2pnet.plan import LayerPlan, Plan

__all__ = ["convert", "with_kernels"]


def convert(model: nn.Module, plan: Plan, factors: Mapping[str, Factors] | None = None) -> nn.Module:
    """A copy of `model` with a DK layer wherever `plan` gives a convolution kernels, and plain weights.

    Without `factors` the DK layers are empty, to be filled by ``load_state_dict``. `model` itself is not changed;
    the copy's modules are in the same modes.
    """
    student = make_weights_plain(copy_model(model))
    modules = dict(student.named_modules(remove_duplicate=False))
    layers: dict[nn.Module, nn.Module] = {}
    for layer in plan.layers:
        if layer.counts is None:
            continue
        conv = modules.get(layer.name)
        if isinstance(conv, DKConv2d) and conv.counts == layer.counts:
            continue  # of a network that was compressed before
        if not isinstance(conv, nn.Conv2d):
            raise InputError(
                f"the plan replaces {layer.name!r}, which is no Conv2d of this network; give the right network"
            )
        if len(layer.counts) != conv.in_channels:
            raise InputError(
                f"the plan has kernels for {len(layer.counts)} input channels of {layer.name!r}, which has "
                f"{conv.in_channels} in this network; give the right network"
            )
        if factors is not None:
            layers[conv] = DKConv2d.from_factors(conv, factors[layer.name])
        else:
            layers[conv] = DKConv2d.like(conv, layer.counts)
    if student in layers:  # the model is itself one convolution
        return layers[student]
    replace_modules(student, layers)
    return student


def with_kernels(
    model: nn.Module, counts: Mapping[str, Tensor | None], factors: Mapping[str, Factors] | None = None
) -> nn.Module:
    """A copy of `model` with a DK layer (empty without `factors`) wherever `counts` gives kernels per input channel."""
    layers = [LayerPlan(name, "", counts=count.tolist()) for name, count in counts.items() if count is not None]
    return convert(model, Plan(layers=layers), factors)
