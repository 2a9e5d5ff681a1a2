"""Finds the convolutions of an ONNX graph, and says of each why it stays dense."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper
from torch import Tensor, nn

from dk2pnet.errors import InputError
from dk2pnet.networks.network import Site
from dk2pnet.networks.onnx.graph import OURS, attributes_of, graphs_in, nodes_in, reads

__all__ = ["OnnxSite", "apply_keep", "sites_of"]

_SAME = ("SAME_UPPER", "SAME_LOWER")


@dataclass
class OnnxSite(Site):
    """A Conv node. Where it can be decomposed, `module` is an `nn.Conv2d` of the same weights and geometry.

    `x`, `y`: names of the tensors it reads and gives. `pads` (top, left, bottom, right), or None where the padding
    depends on the input's size (`auto_pad` says how). `outside`: whether the padding is not part of `module`, which
    PyTorch cannot express; `padded` applies it. `norm`: the batch norm behind it, folded into the weights.
    """

    node: NodeProto | None = None
    x: str = ""
    y: str = ""
    pads: tuple[int, int, int, int] | None = (0, 0, 0, 0)
    auto_pad: str = "NOTSET"
    outside: bool = False
    norm: NodeProto | None = None

    @property
    def shape(self) -> str:
        """As for a PyTorch model; "?" where the weight is not known before the graph runs."""
        return "?" if isinstance(self.module, _Unknown) else super().shape

    def pads_at(self, height: int, width: int) -> tuple[int, int, int, int]:
        """top, left, bottom, right for an input of this size."""
        if self.pads is not None:
            return self.pads
        conv = self.module
        assert isinstance(conv, nn.Conv2d)
        before, after = [], []
        for size, kernel, stride, dilation in zip(
            (height, width), conv.kernel_size, conv.stride, conv.dilation, strict=True
        ):
            total = max((math.ceil(size / stride) - 1) * stride + dilation * (kernel - 1) + 1 - size, 0)
            less, more = total // 2, total - total // 2
            before.append(less if self.auto_pad == "SAME_UPPER" else more)
            after.append(more if self.auto_pad == "SAME_UPPER" else less)
        return before[0], before[1], after[0], after[1]

    def padded(self, x: Tensor) -> Tensor:
        """``x (B, C, H, W)`` as `module` reads it."""
        if not self.outside:
            return x
        top, left, bottom, right = self.pads_at(x.shape[2], x.shape[3])
        return nn.functional.pad(x, (left, right, top, bottom))

    def place(self, height: int, width: int) -> None:
        """Note the size of the input, as `module` reads it."""
        top, left, bottom, right = self.pads_at(height, width) if self.outside else (0, 0, 0, 0)
        self.input_size = (height + top + bottom, width + left + right)


class _Unknown(nn.Module):
    """Stands for a convolution whose weight is not known before the graph runs."""

    stride: tuple[int, ...] = (1,)
    groups = 1

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.empty(0)


class _Stays(Exception):
    """Why a convolution stays dense."""


def sites_of(proto: ModelProto, constants: Mapping[str, TensorProto]) -> list[OnnxSite]:
    """Every convolution, those inside subgraphs too, in the order of the graph."""
    graph = proto.graph
    makers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in reads(node):
            readers.setdefault(name, []).append(node)
    holders: dict[int, list[str]] = {}  # by weight: the nodes that read it, under whatever alias
    for node in graph.node:
        for name in reads(node) & constants.keys():
            if node.op_type != "Identity":
                holders.setdefault(id(constants[name]), []).append(_name(node))
    outputs = {value.name for value in graph.output}
    inputs = {value.name for value in graph.input}
    sites: list[OnnxSite] = []
    for node in graph.node:
        if node.op_type in ("ConvInteger", "QLinearConv") and node.domain in OURS:
            sites.append(OnnxSite(_name(node), _Unknown(), "quantised convolution", node=node))
        if "Conv" in node.op_type and node.domain not in OURS:
            sites.append(OnnxSite(_name(node), _Unknown(), f"{node.op_type}, which is not ONNX's own", node=node))
        if node.op_type != "Conv" or node.domain not in OURS:
            for inner in nodes_in(each for graph_ in graphs_in(node) for each in graph_.node):
                if inner.op_type == "Conv":
                    sites.append(OnnxSite(_name(inner), _Unknown(), f"inside a subgraph ({node.op_type})"))
            continue
        if len(node.input) < 2 or len(node.output) != 1:
            continue  # the checker will refuse it
        site = OnnxSite(_name(node), _Unknown(), node=node, x=node.input[0], y=node.output[0])
        try:
            _describe(site, constants, makers, inputs, holders)
        except _Stays as reason:
            site.reason = str(reason)
        except (TypeError, ValueError, AttributeError, RuntimeError) as error:  # attributes of the wrong type
            site.reason = f"it is not understood ({error})"
        if not site.reason:
            _absorb_norm(site, readers, outputs, constants)
        sites.append(site)
    seen = Counter[str]()
    for site in sites:  # nodes need no names, and names need not be unique
        seen[site.name] += 1
        if seen[site.name] > 1:
            site.name = f"{site.name} ({seen[site.name]})"
    return sites


def _name(node: NodeProto) -> str:
    return node.name or next((name for name in node.output if name), node.op_type)


def _describe(
    site: OnnxSite,
    constants: Mapping[str, TensorProto],
    makers: Mapping[str, NodeProto],
    inputs: set[str],
    holders: Mapping[int, list[str]],
) -> None:
    """Fill in the module and the padding; `_Stays` says what speaks against a decomposition."""
    node = site.node
    assert node is not None
    name = node.input[1] if len(node.input) > 1 else ""
    if name not in constants:
        if name in inputs:
            raise _Stays("its weight is an input of the graph")
        maker = makers.get(name)
        if maker is None:
            raise _Stays("its weight is sparse")
        raise _Stays(f"its weight is computed ({maker.op_type})")
    tensor = constants[name]
    dims = list(tensor.dims)
    attributes = attributes_of(node)
    groups = attributes.get("group", 1)
    spatial = len(dims) - 2
    kinds: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}  # whose arguments are alike
    module = kinds.get(spatial)
    if module is None or min(dims) < 1 or groups < 1 or dims[0] % groups:
        raise _Stays(f"a weight of shape {tuple(dims)} and {groups} groups are not understood")
    strides, dilations = (list(attributes.get(key, [1] * spatial)) for key in ("strides", "dilations"))
    if len(strides) != spatial or len(dilations) != spatial or min(strides + dilations) < 1:
        raise _Stays(f"its strides {strides} or dilations {dilations} are not understood")
    if list(attributes.get("kernel_shape", dims[2:])) != dims[2:]:
        raise _Stays("its kernel_shape is not that of its weight")
    conv: nn.Module = module(dims[1] * groups, dims[0], dims[2:], strides, 0, dilations, groups, False, device="meta")
    site.module = conv
    if not isinstance(conv, nn.Conv2d):
        raise _Stays(f"{spatial}-D convolution")
    if dims[2:] == [1, 1]:
        raise _Stays("1x1 convolution")
    if dims[1] == 1 and groups > 1:
        raise _Stays("depthwise convolution")
    if tensor.data_type != TensorProto.FLOAT:
        kind = TensorProto.DataType.Name(tensor.data_type).lower()
        raise _Stays(f"its weight is {kind}, not float: export the network in float32")
    others = [holder for holder in holders[id(tensor)] if holder != site.name]
    if len(holders[id(tensor)]) > 1:
        raise _Stays(f"its weight is shared with {others[0] if others else 'a node of the same name'}")
    weight = torch.from_numpy(numpy_helper.to_array(tensor).copy())
    if not bool(torch.isfinite(weight).all()):
        raise _Stays("its weight is not finite")
    bias = _bias(node, constants, dims[0])
    _take_padding(site, attributes, strides, dims, dilations)
    pads = site.pads
    symmetric = pads is not None and pads[:2] == pads[2:]
    site.outside = not symmetric
    conv = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        tuple(dims[2:]),
        tuple(strides),
        pads[:2] if pads is not None and symmetric else 0,
        tuple(dilations),
        groups,
        bias is not None,
    )
    conv.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        conv.bias = nn.Parameter(bias, requires_grad=False)
    site.module = conv.eval()


def _bias(node: NodeProto, constants: Mapping[str, TensorProto], outputs: int) -> Tensor | None:
    if len(node.input) < 3 or not node.input[2]:
        return None
    tensor = constants.get(node.input[2])
    if tensor is None:
        raise _Stays("its bias is computed, or an input of the graph")
    if tensor.data_type != TensorProto.FLOAT or list(tensor.dims) != [outputs]:
        raise _Stays(f"its bias has the shape {tuple(tensor.dims)} or is not float")
    return torch.from_numpy(numpy_helper.to_array(tensor).copy())


def _take_padding(
    site: OnnxSite, attributes: Mapping[str, Any], strides: list[int], dims: list[int], dilations: list[int]
) -> None:
    automatic = attributes.get("auto_pad", b"NOTSET").decode(errors="replace") or "NOTSET"
    if automatic in _SAME:
        site.auto_pad, site.pads = automatic, None
        if strides == [1, 1]:  # then the padding is the same for inputs of every size
            total = [dilation * (kernel - 1) for kernel, dilation in zip(dims[2:], dilations, strict=True)]
            less, more = [t // 2 for t in total], [t - t // 2 for t in total]
            before, after = (less, more) if automatic == "SAME_UPPER" else (more, less)
            site.pads = before[0], before[1], after[0], after[1]
    elif automatic == "NOTSET":
        pads = list(attributes.get("pads", [0] * 4))
        if len(pads) != 4 or min(pads) < 0:
            raise _Stays(f"its pads {pads} are not understood")
        site.pads = pads[0], pads[1], pads[2], pads[3]
    elif automatic != "VALID":
        raise _Stays(f"its auto_pad {automatic!r} is not understood")


def _absorb_norm(
    site: OnnxSite,
    readers: Mapping[str, list[NodeProto]],
    outputs: set[str],
    constants: Mapping[str, TensorProto],
) -> None:
    """Fold the batch norm behind a convolution into it: behind a sum of branches no runtime would."""
    followers = readers.get(site.y, [])
    if len(followers) != 1 or site.y in outputs or followers[0].op_type != "BatchNormalization":
        return
    norm = followers[0]
    attributes = attributes_of(norm)
    constant = all(name in constants and constants[name].data_type == TensorProto.FLOAT for name in norm.input[1:])
    if norm.domain not in OURS or len(norm.input) != 5 or len([name for name in norm.output if name]) != 1:
        return
    # Before operator set 9 `spatial` = 0 meant one mean per position.
    if (
        not constant
        or norm.input[0] != site.y
        or attributes.get("training_mode", 0)
        or not attributes.get("spatial", 1)
    ):
        return
    conv = site.module
    assert isinstance(conv, nn.Conv2d)
    gamma, beta, mean, variance = (numpy_helper.to_array(constants[name]).astype(np.float64) for name in norm.input[1:])
    if any(array.shape != (conv.out_channels,) for array in (gamma, beta, mean, variance)):
        return
    scale = gamma / np.sqrt(variance + attributes.get("epsilon", 1e-5))
    bias = 0.0 if conv.bias is None else conv.bias.double().numpy()
    shift = beta + (bias - mean) * scale
    if not (np.isfinite(scale).all() and np.isfinite(shift).all()):
        return
    weight = conv.weight.double() * torch.from_numpy(scale).view(-1, 1, 1, 1)
    conv.weight = nn.Parameter(weight.float(), requires_grad=False)
    conv.bias = nn.Parameter(torch.from_numpy(shift).float(), requires_grad=False)
    site.norm, site.y = norm, norm.output[0]


def apply_keep(sites: list[OnnxSite], keep: Iterable[str], first: bool, path: Path) -> None:
    """Keep dense what `keep` names, and the first convolution unless `first`."""
    if sites and not first and not sites[0].reason:
        sites[0].reason = "first convolution"
    for pattern in [keep] if isinstance(keep, str) else keep:
        chosen = [site for site in sites if fnmatchcase(site.name, pattern) or site.name.startswith(pattern + ".")]
        if not chosen:
            names = ", ".join(site.name for site in sites[:6])
            raise InputError(f"--keep {pattern} matches no convolution of {path}; their names are {names}, ...")
        for site in chosen:
            site.reason = f"kept by --keep {pattern}"
