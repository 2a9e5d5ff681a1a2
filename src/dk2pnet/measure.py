"""Parameters and multiply-adds of a network, its modes, layouts and outputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dk2pnet.errors import InputError
from dk2pnet.layer import DKConv2d

__all__ = [
    "evaluation",
    "in_layout",
    "inference_of",
    "is_classifier",
    "kept_modes",
    "layout_of",
    "macs",
    "outputs_of",
    "parameters",
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
