"""One DK layer, several exact forms made of plain convolutions, as PyTorch modules and as ONNX nodes.

Which form is fastest depends on the runtime, so it is chosen by measuring (`deploy/costs.py`):

========== ===========================================================================================================
branches   every branch that covers (nearly) all channels is a depthwise + a pointwise convolution, with kernels of
           zeros for the channels that it lacks; the kernels that are left over are gathered into one more
gathered   all kernels in one: gather their input channels, one depthwise, one pointwise convolution
filled     branches made to cover all channels by kernels of zeros, so that nothing need be gathered
concat     as `branches`, but their features are concatenated and combined by one pointwise convolution
folded     the dense convolution with the folded weight, where nothing cheaper is faster
========== ===========================================================================================================

Never a depthwise convolution with a channel multiplier, which every runtime sends down a slow path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import helper, numpy_helper
from torch import Tensor, nn

from dk2pnet.errors import InputError
from dk2pnet.layer import DKConv2d, padding_of
from dk2pnet.modules import copy_model, replace_modules

__all__ = [
    "EMITTED",
    "Branch",
    "PlainLayer",
    "branches_of",
    "concatenated",
    "emit_nodes",
    "plain_layer",
    "plain_model",
    "with_plain_layers",
]

EMITTED = ("branches", "gathered", "filled", "concat", "folded")

# ONNX Runtime keeps activations in blocks of 16 channels (8 without AVX-512); a convolution whose channels are not a
# multiple leaves the blocked layout and takes several times as long. So gathered kernels are padded to whole blocks.
BLOCK = 16
# A branch that covers this share of the channels is completed by zeros rather than gathered.
NEARLY_ALL = 0.75


@dataclass(frozen=True)
class Branch:
    """A depthwise convolution over gathered input channels, and what combines its features.

    ``channels (r,)`` int64, None for all in order; ``kernels (r, 1, kh, kw)``; ``combination (N, r / groups, 1, 1)``,
    or None where the features are already the outputs.
    """

    channels: Tensor | None
    kernels: Tensor
    combination: Tensor | None


def branches_of(layer: DKConv2d, form: str) -> list[Branch]:
    """The branches of `layer` in an emitted form other than ``folded``; together they compute it without its bias."""
    kernels, combination = layer.kernels.detach().cpu(), layer.combination.detach().cpu()
    source = layer.source.cpu()
    channels, groups = layer.in_channels, layer.groups
    counts = torch.bincount(source, minlength=channels)
    by_channel: list[list[int]] = [(source == channel).nonzero().flatten().tolist() for channel in range(channels)]
    # The column of a kernel in its group's rows of the combination: its rank among the kernels of that group.
    group = source // (channels // groups)
    column = torch.zeros_like(source)
    for g in range(groups):
        members = (group == g).nonzero().flatten()
        column[members] = torch.arange(len(members))

    def branch(chosen: Sequence[int | None], of: Sequence[int]) -> Branch:
        """Kernels `chosen` (None: zeros) reading channels `of`, which ascend; evenly many in every group."""
        width, height = kernels.shape[2:]
        picked = torch.zeros(len(chosen), 1, width, height, dtype=kernels.dtype)
        part = torch.zeros(layer.out_channels, len(chosen) // groups, 1, 1, dtype=combination.dtype)
        rows, wide = layer.out_channels // groups, len(chosen) // groups
        for place, number in enumerate(chosen):
            if number is not None:
                picked[place] = kernels[number]
                g = place // wide
                part[g * rows : (g + 1) * rows, place % wide] = combination[
                    g * rows : (g + 1) * rows, int(column[number])
                ]
        whole = list(of) == list(range(channels))
        if groups > 1 and wide == 1 and rows > 1:
            # The pointwise convolution would be depthwise with a multiplier. Its one factor goes into the kernel.
            index = torch.arange(len(chosen)).repeat_interleave(rows)
            of_output = torch.tensor(list(of))[index]
            return Branch(of_output, picked[index] * part, None)
        return Branch(None if whole else torch.tensor(list(of)), picked, part)

    def gathered(skip: int) -> list[Branch]:
        """One branch of all kernels but the first `skip` of every channel."""
        in_groups = []
        for g in range(groups):
            wide = channels // groups
            mine = range(g * wide, (g + 1) * wide)
            in_groups.append([(number, channel) for channel in mine for number in by_channel[channel][skip:]])
        most = max(map(len, in_groups))
        if most == 0:
            return []
        if groups == 1 and [channel for _, channel in in_groups[0]] != list(range(channels)):
            most += -most % BLOCK
        chosen: list[int | None] = []
        of: list[int] = []
        for g, pairs in enumerate(in_groups):  # kernels of zeros where a group has fewer left over
            last = pairs[-1][1] if pairs else g * (channels // groups)
            chosen += [number for number, _ in pairs] + [None] * (most - len(pairs))
            of += [channel for _, channel in pairs] + [last] * (most - len(pairs))
        return [branch(chosen, of)]

    def full(rank: int) -> Branch:
        found = [numbers[rank] if rank < len(numbers) else None for numbers in by_channel]
        return branch(found, range(channels))

    if form in ("branches", "concat"):
        ranks = range(int(counts.max()))
        whole = sum(float((counts > rank).double().mean()) >= NEARLY_ALL for rank in ranks)
        return [full(rank) for rank in range(whole)] + gathered(whole)
    if form == "gathered":
        return gathered(0)
    if form == "filled":
        return [full(rank) for rank in range(int(counts.max()))]
    raise InputError(f"form is {form!r}; expected one of {', '.join(EMITTED)}")


# -- PyTorch ---------------------------------------------------------------------------------------------------------


def with_plain_layers(model: nn.Module, forms: Mapping[str, str] | None = None) -> nn.Module:
    """Replace, in place, every DK layer of `model` by plain modules; a layer that is used twice stays one.

    `forms` gives the emitted form by module name; ``branches`` where it says nothing.
    """
    forms = forms or {}
    if isinstance(model, DKConv2d):
        return plain_layer(model, forms.get("", "branches"))
    layers: dict[nn.Module, nn.Module] = {
        module: plain_layer(module, forms.get(name, "branches"))
        for name, module in model.named_modules()
        if isinstance(module, DKConv2d)
    }
    replace_modules(model, layers)
    return model


def plain_model(model: nn.Module, forms: Mapping[str, str] | None = None) -> nn.Module:
    """A copy of `model` on the CPU, in evaluation mode, that computes the same with plain PyTorch layers only.

    Example: ``plain_model(result.model, result.plan.forms)`` is what ``--target pytorch`` timed, of a run that wrote a
    folder (without one there are forms for a latency budget only).
    """
    return with_plain_layers(copy_model(model).cpu().eval(), forms)


def plain_layer(layer: DKConv2d, form: str) -> nn.Module:
    """`layer` as a module of plain convolutions ``(B, C, H, W) -> (B, N, H', W')`` in the emitted `form`."""
    if form == "folded":
        return layer.to_dense()
    branches = branches_of(layer, form)
    plain = PlainLayer(layer, branches, layer.bias, concatenated(layer, form, branches))
    return plain.train(layer.training)


def concatenated(layer: DKConv2d, form: str, branches: Sequence[Branch]) -> bool:
    """Whether one pointwise convolution combines all branches; those of a grouped layer are combined one by one."""
    return form == "concat" and layer.groups == 1 and len(branches) > 1


class PlainLayer(nn.Module):
    """`branches` as modules, with stride, padding, dilation and groups of `geometry`; `torch.jit.script` takes it.

    `DKConv2d` slices its kernels and combination by branch. An exporter may write these slices as operators (the dynamo
    exporter does for large layers), which hides the weights from whatever reads the file; here each is a weight.
    """

    def __init__(
        self,
        geometry: DKConv2d | nn.Conv2d,
        branches: Sequence[Branch],
        bias: Tensor | None,
        concat: bool,
    ) -> None:
        super().__init__()
        self.padding_mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode
        left, right, top, bottom = padding_of(geometry)
        # Symmetric zeros are the convolution's own; the rest is padded once, not once per branch.
        inside = self.padding_mode == "constant" and left == right and top == bottom
        self.pad_outside = None if inside else [left, right, top, bottom]
        self.branches = nn.ModuleList()
        for branch in branches:
            steps: list[nn.Module] = [] if branch.channels is None else [_Gather(branch.channels)]
            padding: Any = (top, left) if inside else 0
            own = bias if branch.combination is None else None
            width = len(branch.kernels)
            steps.append(_conv(branch.kernels, own, width, geometry.stride, padding, geometry.dilation))
            if branch.combination is None:
                bias = None
            elif not concat:
                steps.append(_conv(branch.combination, bias, geometry.groups))
                bias = None
            self.branches.append(nn.Sequential(*steps))
        self.combine: nn.Module | None = None
        if concat:
            whole = torch.cat([branch.combination for branch in branches if branch.combination is not None], 1)
            self.combine = _conv(whole, bias, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``x (B, C, H, W)``."""
        if self.pad_outside is not None:
            x = F.pad(x, self.pad_outside, mode=self.padding_mode)
        parts = []
        for branch in self.branches:
            parts.append(branch(x))
        if self.combine is not None:
            return self.combine(torch.cat(parts, 1))
        result = parts[0]
        for part in parts[1:]:
            result = result + part
        return result


class _Gather(nn.Module):
    """Some channels of ``(B, C, H, W)``."""

    if TYPE_CHECKING:  # TorchScript cannot read it
        channels: Tensor

    def __init__(self, channels: Tensor) -> None:
        super().__init__()
        self.register_buffer("channels", channels)

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(1, self.channels)


def _conv(
    weight: Tensor, bias: Tensor | None, groups: int, stride: Any = 1, padding: Any = 0, dilation: Any = 1
) -> nn.Conv2d:
    outputs, inputs, height, width = weight.shape
    size = (height, width)
    conv = nn.Conv2d(inputs * groups, outputs, size, stride, padding, dilation, groups, bias is not None)
    conv.weight = nn.Parameter(weight.clone())
    conv.bias = None if bias is None else nn.Parameter(bias.detach().cpu().clone())
    return conv


# -- ONNX ------------------------------------------------------------------------------------------------------------


def emit_nodes(
    layer: DKConv2d, form: str, x: str, y: str, prefix: str, pads: Sequence[int] | None = None
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Nodes and initialisers that compute the tensor `y` from the tensor `x` as `layer` does (zeros as padding).

    Every new name begins with `prefix`. `pads` (top, left, bottom, right) stand in for the layer's own padding.
    """
    if layer.padding_mode != "zeros":
        raise InputError(f"padding mode {layer.padding_mode!r} cannot be written as ONNX nodes; export from PyTorch")
    left, right, top, bottom = padding_of(layer)
    around = list(pads) if pads is not None else [top, left, bottom, right]
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []

    def constant(value: Tensor | np.ndarray, name: str) -> str:
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
        weights.append(numpy_helper.from_array(np.ascontiguousarray(array), prefix + name))
        return prefix + name

    def node(kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, list(inputs), [output], name=f"{output}_{kind}", **attributes))
        return output

    def conv(x: str, weight: Tensor, bias: Tensor | None, groups: int, output: str, spatial: bool) -> str:
        inputs = [x, constant(weight, f"{output.removeprefix(prefix)}_weight")]
        if bias is not None:
            inputs.append(constant(bias, f"{output.removeprefix(prefix)}_bias"))
        geometry: dict[str, Any] = {"kernel_shape": list(weight.shape[2:]), "group": groups}
        if spatial:
            geometry |= {"pads": around, "strides": list(layer.stride), "dilations": list(layer.dilation)}
        return node("Conv", inputs, output, **geometry)

    if form == "folded":
        conv(x, layer.fold(), layer.bias, layer.groups, y, True)
        return nodes, weights
    branches = branches_of(layer, form)
    concat = concatenated(layer, form, branches)
    bias = layer.bias
    features, parts = [], []
    for number, branch in enumerate(branches):
        source = x
        if branch.channels is not None:
            index = constant(branch.channels, f"channels_{number}")
            source = node("Gather", [x, index], f"{prefix}gathered_{number}", axis=1)
        alone = len(branches) == 1
        width = len(branch.kernels)
        if branch.combination is None:
            parts.append(conv(source, branch.kernels, bias, width, y if alone else f"{prefix}part_{number}", True))
            bias = None
            continue
        features.append(conv(source, branch.kernels, None, width, f"{prefix}feature_{number}", True))
        if not concat:
            output = y if alone else f"{prefix}part_{number}"
            parts.append(conv(features[-1], branch.combination, bias, layer.groups, output, False))
            bias = None
    if concat:
        whole = torch.cat([branch.combination for branch in branches if branch.combination is not None], 1)
        node("Concat", features, f"{prefix}features", axis=1)
        conv(f"{prefix}features", whole, bias, 1, y, False)
    total = parts[0] if parts else ""
    for number, part in enumerate(parts[1:], 1):
        total = node("Add", [total, part], y if number == len(parts) - 1 else f"{prefix}sum_{number}")
    return nodes, weights
