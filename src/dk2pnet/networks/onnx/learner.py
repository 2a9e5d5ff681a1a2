"""An ONNX graph as a PyTorch module with gradients, by way of onnx2fx; proven against ONNX Runtime before its use."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from onnx import ModelProto
from torch import Tensor, fx, nn

from dk2pnet.data.arrays import Feed
from dk2pnet.layer import DKConv2d
from dk2pnet.networks.onnx.graph import OnnxGraph
from dk2pnet.networks.onnx.sites import OnnxSite

__all__ = ["AsTorch", "NotConvertible"]

# How far the module's outputs may be from ONNX Runtime's, relative to the largest number in each.
_EXACT = 1e-4


class NotConvertible(Exception):
    """The graph cannot be had as a PyTorch module; the text says why."""


class AsTorch:
    """A graph with one input ``(B, C, H, W)`` as a module that gives `outputs`, its hints, and copies with DK layers.

    The `module` has no parameters: the weights of the graph are buffers. ``hints``: names of modules that give the
    tensors to learn from, the last one at each resolution behind the first of the `sites`, and all of `outputs`.

    Parameters
    ----------
    sites : the convolutions that DK layers will replace
    outputs : names of the tensors that count in the end
    feed, expected : one input, and what ONNX Runtime makes of it, by the name of the tensor

    Raises
    ------
    NotConvertible
        When onnx2fx is not there or cannot convert the graph, when the graph takes something else than images, or when
        the module's outputs differ from ONNX Runtime's.
    """

    def __init__(
        self,
        network: OnnxGraph,
        sites: Sequence[OnnxSite],
        outputs: Sequence[str],
        feed: Feed,
        expected: Mapping[str, np.ndarray],
    ) -> None:
        arrays = list(feed.arrays.values())
        if len(network.inputs) != 1 or arrays[0].ndim != 4 or arrays[0].dtype != np.float32:
            raise NotConvertible("it takes something else than one float input (B, C, H, W)")
        self.sites = {site.name: site for site in sites}
        proto, numbers = _numbered(network.proto)
        self.module = _converted(proto)
        made = {int(node.meta["onnx_name"]): node for node in self.module.graph.nodes if _is_numbered(node)}
        self.nodes = {tensor: made[number] for tensor, number in numbers.items() if number in made}
        missing = [name for name in (*outputs, *(site.y for site in sites)) if name not in self.nodes]
        if missing:
            raise NotConvertible(f"the tensor {missing[0]!r} is lost on the way")
        self.module.eval().requires_grad_(False)
        x = torch.from_numpy(arrays[0])
        values = self._values(x)
        for name in outputs:
            _check(name, values.get(self.nodes[name]), expected[name])
        self.hints = self._add_hints(values, outputs)
        last = next(node for node in reversed(self.module.graph.nodes) if node.op == "output")
        last.args = (tuple(self.nodes[name] for name in outputs),)
        self.module.graph.lint()
        self.module.recompile()

    def student(self, layers: Mapping[str, DKConv2d]) -> nn.Module:
        """A copy with DK layers, its only parameters."""
        student: fx.GraphModule = copy.deepcopy(self.module)
        nodes = {node.name: node for node in student.graph.nodes}
        for number, (name, layer) in enumerate(layers.items()):
            site = self.sites[name]
            conv, last = (nodes[self.nodes[tensor].name] for tensor in (_conv_output(site), site.y))
            student.add_submodule(f"dk_{number}", _Placed(site, copy.deepcopy(layer)))
            with student.graph.inserting_before(conv):
                new = student.graph.call_module(f"dk_{number}", (conv.args[0],))
            last.replace_all_uses_with(new)
            student.graph.erase_node(last)
            if conv is not last:
                student.graph.erase_node(conv)
        student.graph.lint()
        student.recompile()
        for module in student.modules():
            if isinstance(module, DKConv2d):
                module.requires_grad_(True)
        return student

    @staticmethod
    def layer_names(layers: Mapping[str, DKConv2d]) -> dict[str, str]:
        """Where the layers of `student` are among its modules."""
        return {name: f"dk_{number}.layer" for number, name in enumerate(layers)}

    def _values(self, x: Tensor) -> dict[fx.Node, Any]:
        walk = fx.Interpreter(self.module, garbage_collect_values=False)
        walk.extra_traceback = False
        try:
            with torch.no_grad():
                walk.run(x)
        except Exception as error:
            raise NotConvertible(f"the converted module fails ({_first_line(error)})") from error
        return walk.env

    def _add_hints(self, values: Mapping[fx.Node, Any], outputs: Sequence[str]) -> list[str]:
        behind: set[fx.Node] = set()
        first = {self.nodes[site.y] for site in self.sites.values()}
        last: dict[tuple[int, ...], fx.Node] = {}
        for node in self.module.graph.nodes:
            if node in first or any(each in behind for each in node.all_input_nodes):
                behind.add(node)
                value = values.get(node)
                if _is_map(value):
                    last[tuple(value.shape[2:])] = node
        wanted = [*last.values(), *(self.nodes[name] for name in outputs)]
        names = []
        for number, node in enumerate(dict.fromkeys(wanted)):
            names.append(f"hint_{number}")
            self.module.add_submodule(names[-1], _Flat())
            with self.module.graph.inserting_after(node):
                self.module.graph.call_module(names[-1], (node,))
        return names


class _Placed(nn.Module):
    """A DK layer with the padding that PyTorch cannot express."""

    def __init__(self, site: OnnxSite, layer: DKConv2d) -> None:
        super().__init__()
        self.site, self.layer = site, layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.site.padded(x))


class _Flat(nn.Module):
    """Any tensor as a map (B, C, H, W); what is not finite (a mask) teaches nothing."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.where(torch.isfinite(x), x, torch.zeros_like(x))
        return x if x.dim() == 4 else x.reshape(len(x), -1)[:, :, None, None]


def _numbered(proto: ModelProto) -> tuple[ModelProto, dict[str, int]]:
    """A copy whose nodes are named by their number, as names may be missing or doubled; and who makes which tensor."""
    numbered = ModelProto()
    numbered.CopyFrom(proto)
    made = {}
    for number, node in enumerate(numbered.graph.node):
        node.name = str(number)
        if len(node.output) == 1:
            made[node.output[0]] = number
    return numbered, made


def _converted(proto: ModelProto) -> fx.GraphModule:
    try:
        from onnx2fx import convert
    except ImportError as error:
        raise NotConvertible("the extra is not installed: pip install 'dk2pnet[onnx-tuning]'") from error
    try:
        return convert(proto)
    except Exception as error:  # whatever it does not know
        raise NotConvertible(f"onnx2fx cannot convert it ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}" if str(error).strip() else str(error)


def _is_numbered(node: fx.Node) -> bool:
    return str(node.meta.get("onnx_name", "")).isdecimal() and "onnx_output_index" not in node.meta


def _conv_output(site: OnnxSite) -> str:
    assert site.node is not None
    return site.node.output[0]


def _is_map(value: object) -> bool:
    floats = isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 4
    return floats and value.shape[2] * value.shape[3] > 1  # type: ignore[attr-defined]


def _check(name: str, found: object, expected: np.ndarray) -> None:
    if not isinstance(found, Tensor) or found.dim() == 0 or tuple(found.shape) != expected.shape:
        raise NotConvertible(f"the converted module gives another {name!r}")
    if not found.is_floating_point():
        raise NotConvertible(f"its output {name!r} holds whole numbers")
    good = np.isfinite(expected)
    mine = found.numpy()
    scale = float(np.abs(expected[good]).max(initial=0.0))
    worst = float(np.abs(mine[good] - expected[good]).max(initial=0.0)) / max(scale, 1e-30)
    if not worst <= _EXACT:
        raise NotConvertible(f"the converted module's {name!r} differs from ONNX Runtime's by {worst:.1e} (relative)")
