"""An ONNX graph as a PyTorch module with gradients, by way of onnx2fx; proven against ONNX Runtime before its use.

It is converted only to learn: what DK layers have learnt goes back into the original graph, so that nothing of that
depends on the converter.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from onnx import ModelProto
from torch import Tensor, fx, nn

from dk2pnet.answers import Predictions
from dk2pnet.data import ImageData, Normalization
from dk2pnet.data.arrays import Feed
from dk2pnet.data.images import SMALL
from dk2pnet.data.samples import Batches, Samples
from dk2pnet.data.tensors import TensorImages, images_of
from dk2pnet.decompose.moments import Moments
from dk2pnet.errors import InputError
from dk2pnet.layer import DKConv2d, set_form
from dk2pnet.measure import is_classifier
from dk2pnet.networks.network import NotLearnable
from dk2pnet.networks.onnx.graph import OnnxGraph
from dk2pnet.networks.onnx.sites import OnnxSite
from dk2pnet.networks.torch.gather import gather_moments
from dk2pnet.run.run import Run
from dk2pnet.tasks import squared_error
from dk2pnet.training.recipe import Recipe
from dk2pnet.training.trainer import TUNING, TrainingOptions

__all__ = ["AsTorch", "OnnxLearner", "rate_for"]

# How far the module's outputs may be from ONNX Runtime's, relative to the largest number in each.
_EXACT = 1e-4
# The learning rate as a share of the relative error at the start, and the least one.
_SHARE, _LOWEST = 0.05, 1e-4


class OnnxLearner:
    """A graph and its students as PyTorch modules. Hints are the last tensors at each resolution and all outputs, by
    Euclidean distance.

    `expected`: what ONNX Runtime makes of `feed`, by the names of the tensors that count; `normalization`: of images
    that are decoded here; `at_once`: so many samples, None for any number.
    """

    def __init__(
        self,
        graph: OnnxGraph,
        sites: Sequence[OnnxSite],
        expected: Mapping[str, np.ndarray],
        feed: Feed,
        normalization: Normalization | None = None,
        at_once: int | None = None,
    ) -> None:
        self.normalization, self.at_once = normalization, at_once
        self.graph = AsTorch(graph, sites, list(expected), feed, expected)
        self.sites = {site.name: site for site in sites}
        self.teacher: nn.Module = self.graph.module
        self.example = torch.from_numpy(next(iter(feed.arrays.values())))
        self.names: Mapping[str, str] = AsTorch.layer_names(self.sites)
        # A graph for inference has no batch norm to train; half precision would cost it the last digits.
        self.options: TrainingOptions = replace(
            TUNING, hints=tuple(self.graph.hints), batch_norm="frozen", precision="fp32"
        )

    def data(self, samples: Samples, memory: float) -> ImageData | TensorImages | Batches:
        """Large images, which can be augmented, of a graph that takes any number of them; else batches as they are:
        from small ones shifted and mirrored less was learnt in few steps."""
        if self.at_once is not None or max(self.example.shape[2:]) <= SMALL:
            return Tensors(samples.gather)
        return samples.tune if isinstance(samples.tune, ImageData) else images_of(Tensors(samples.gather), memory)

    def held_out(self, samples: Samples, step: int) -> Batches:
        """In the batches that the graph takes, at least one of them."""
        return Tensors([batch for number, batch in enumerate(samples.held_out) if number % step == 0])

    def student(self, student: Any) -> nn.Module:
        """The converted graph with the student's DK layers, its only parameters."""
        module = self.graph.student(student.layers)
        set_form(module, "folded")
        return module

    def learned(self, student: Any, module: nn.Module) -> Any:
        """The graph with the layers that the module has now."""
        layers = {}
        for name in student.layers:
            layer = module.get_submodule(self.names[name])
            assert isinstance(layer, DKConv2d)
            layers[name] = layer.cpu().requires_grad_(False).eval()
        return student.with_layers(layers)

    def recipes(self, teacher: Predictions, start: Predictions, options: TrainingOptions) -> list[Recipe]:
        """At a rate by the relative error of the outputs."""
        return [Recipe(rate_for(squared_error(teacher, start)), "frozen")]

    def moments(self, samples: Samples, memory: int, run: Run) -> Iterator[dict[str, Moments]]:
        """With gradients, of a classifier."""
        model = _First(self.graph.student({name: site.conv for name, site in self.sites.items()}))
        with torch.no_grad():
            scores = model.module(self.example)
        if not is_classifier(list(scores)):
            raise InputError(
                "criterion 'loss' needs a classifier (one row of class scores per image), but the graph returns "
                f"{' and '.join(str(tuple(each.shape)) for each in scores)}; use --criterion response"
            )
        convolutions: dict[str, Any] = {name: model.module.get_submodule(path) for name, path in self.names.items()}
        total = samples.counts["calibration"]
        yield from gather_moments(
            model,
            convolutions,
            Tensors(samples.gather),
            gradients=True,
            memory=memory,
            seed=run.seed,
            progress=lambda what, done: run.progress(f"moments, {what}", done, total),
        )


def rate_for(error: float) -> float:
    """The learning rate: a step in the whitened form moves a response by about the rate, relative to its size.

    So a start that is close already needs small steps: at the usual rate it only becomes worse.
    """
    return min(max(_SHARE * math.sqrt(error), _LOWEST), TUNING.learning_rate)


@dataclass(frozen=True)
class Tensors:
    """Batches of tensors: the only array of each feed."""

    batches: Iterable[Any]

    def __iter__(self) -> Iterator[tuple[Tensor, None]]:
        for x, _ in self.batches:
            yield torch.from_numpy(next(iter(x.arrays.values()))) if isinstance(x, Feed) else x, None


class _First(nn.Module):
    """The one output of a converted graph."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)[0]


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
    NotLearnable
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
            raise NotLearnable("it takes something else than one float input (B, C, H, W)")
        self.sites = {site.name: site for site in sites}
        proto, numbers = _numbered(network.proto)
        self.module = _converted(proto)
        made = {int(node.meta["onnx_name"]): node for node in self.module.graph.nodes if _is_numbered(node)}
        self.nodes = {tensor: made[number] for tensor, number in numbers.items() if number in made}
        missing = [name for name in (*outputs, *(site.y for site in sites)) if name not in self.nodes]
        if missing:
            raise NotLearnable(f"the tensor {missing[0]!r} is lost on the way")
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

    def student(self, layers: Mapping[str, nn.Module]) -> nn.Module:
        """A copy with DK layers, its only parameters."""
        student: fx.GraphModule = copy.deepcopy(self.module)
        nodes = {node.name: node for node in student.graph.nodes}
        places = self.layer_names(self.sites)  # by site, as a student may have some of them only
        for name, layer in layers.items():
            site, place = self.sites[name], places[name].removesuffix(".layer")
            conv, last = (nodes[self.nodes[tensor].name] for tensor in (_conv_output(site), site.y))
            student.add_submodule(place, _Placed(site, copy.deepcopy(layer)))
            with student.graph.inserting_before(conv):
                new = student.graph.call_module(place, (conv.args[0],))
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
    def layer_names(layers: Mapping[str, Any]) -> dict[str, str]:
        """Where the layers of `student` are among its modules."""
        return {name: f"dk_{number}.layer" for number, name in enumerate(layers)}

    def _values(self, x: Tensor) -> dict[fx.Node, Any]:
        walk = fx.Interpreter(self.module, garbage_collect_values=False)
        walk.extra_traceback = False
        try:
            with torch.no_grad():
                walk.run(x)
        except Exception as error:
            raise NotLearnable(f"the converted module fails ({_kind_and_line(error)})") from error
        return walk.env

    def _add_hints(self, values: Mapping[fx.Node, Any], outputs: Sequence[str]) -> list[str]:
        behind: set[fx.Node] = set()
        first = {self.nodes[site.y] for site in self.sites.values()}
        last: dict[tuple[int, ...], fx.Node] = {}
        for node in self.module.graph.nodes:
            if node in first or any(each in behind for each in node.all_input_nodes):
                behind.add(node)
                value = values.get(node)
                if node.op != "output" and isinstance(value, Tensor) and _is_map(value):  # a single one is its value
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

    def __init__(self, site: OnnxSite, layer: nn.Module) -> None:
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
        raise NotLearnable("the extra is not installed: pip install 'dk2pnet[onnx-tuning]'") from error
    try:
        return convert(proto)
    except Exception as error:  # whatever it does not know
        raise NotLearnable(f"onnx2fx cannot convert it ({_kind_and_line(error)})") from error


def _kind_and_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}" if str(error).strip() else str(error)


def _is_numbered(node: fx.Node) -> bool:
    return str(node.meta.get("onnx_name", "")).isdecimal() and "onnx_output_index" not in node.meta


def _conv_output(site: OnnxSite) -> str:
    assert site.node is not None
    return site.node.output[0]


def _is_map(value: Tensor) -> bool:
    return value.is_floating_point() and value.dim() == 4 and value.shape[2] * value.shape[3] > 1


def _check(name: str, found: object, expected: np.ndarray) -> None:
    if not isinstance(found, Tensor) or found.dim() == 0 or tuple(found.shape) != expected.shape:
        raise NotLearnable(f"the converted module gives another {name!r}")
    if not found.is_floating_point():
        raise NotLearnable(f"its output {name!r} holds whole numbers")
    good = np.isfinite(expected)
    mine = found.numpy()
    scale = float(np.abs(expected[good]).max(initial=0.0))
    worst = float(np.abs(mine[good] - expected[good]).max(initial=0.0)) / max(scale, 1e-30)
    if not worst <= _EXACT:
        raise NotLearnable(f"the converted module's {name!r} differs from ONNX Runtime's by {worst:.1e} (relative)")
