"""What follows a convolution: the batch norm, the sum and the rectifier behind it, found by tracing with torch.fx."""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["Surroundings", "Walk", "calls_once", "surroundings_of", "traced"]

_ADDITIONS = (operator.add, operator.iadd, torch.add)
_RECTIFIERS = (torch.relu, torch.relu_, F.relu, F.relu_, F.relu6)


@dataclass(frozen=True)
class Surroundings:
    """What happens to the response of one convolution before anything else sees it.

    ``norm``: name of the batch norm that it goes through; ``other``: what is then added to it; ``rectified``: whether a
    ReLU takes the result.
    """

    norm: str | None = None
    other: fx.Node | None = None
    rectified: bool = False


class Walk(fx.Interpreter):
    """Runs the operations of a graph with the modules of `model`, and may stand still on the way.

    Of what has been computed only what is still needed is kept.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, graph=graph)
        self.extra_traceback = False
        self.left = iter(self.graph.nodes)
        self.here: fx.Node | None = None

    def start(self, x: Tensor) -> None:
        """Begin with a batch."""
        self.args_iter = iter([x])

    def until(self, name: str) -> Tensor:
        """Go on until the module `name` is about to run; returns its input."""
        wanted = self.module.get_submodule(name)
        while self.here is None or not (
            self.here.op == "call_module" and self.submodules[str(self.here.target)] is wanted
        ):
            if self.here is not None:
                if self.here not in self.env:
                    self.env[self.here] = self.run_node(self.here)
                for done in self.user_to_last_uses.get(self.here, []):
                    self.env.pop(done, None)
            self.here = next(self.left)
        return self.waiting

    @property
    def waiting(self) -> Tensor:
        """The input of the module that is about to run."""
        assert self.here is not None
        return self.fetch_args_kwargs_from_env(self.here)[0][0]

    def ahead(self, node: fx.Node) -> Tensor:
        """The value of a node, though its turn may be later; to be called while the graph runs."""
        if node not in self.env:
            for before in node.all_input_nodes:
                self.ahead(before)
            self.env[node] = self.run_node(node)
        return self.env[node]


def traced(model: nn.Module, example: Tensor) -> fx.Graph | None:
    """The operations of a model in evaluation mode, None where tracing fails or gives other outputs for `example`, and
    where the forward pass makes tensors of its own: the tracer hangs them on this model, no copy of it has them."""
    there = set(vars(model))
    try:
        graph = fx.Tracer().trace(model)
        if set(vars(model)) - there:
            return None
        with torch.no_grad():
            wanted, found = model(example), Walk(model, graph).run(example)
    except Exception:  # a user's code may do anything when it is given a proxy
        return None
    finally:
        for name in set(vars(model)) - there:
            delattr(model, name)
    same = isinstance(found, Tensor) and isinstance(wanted, Tensor) and found.shape == wanted.shape
    return graph if same and torch.allclose(found, wanted, rtol=1e-3, atol=1e-5) else None


def calls_once(model: nn.Module, graph: fx.Graph, names: Collection[str]) -> bool:
    """Whether the graph calls each of these modules, by whichever of its names, and once."""
    modules = dict(model.named_modules(remove_duplicate=False))
    calls = [modules[str(node.target)] for node in graph.nodes if node.op == "call_module"]
    return all(sum(module is modules[name] for module in calls) == 1 for name in names)


def surroundings_of(model: nn.Module, graph: fx.Graph, solved: Collection[str]) -> dict[str, Surroundings]:
    """By name, for every convolution in `solved` that the graph runs once.

    A sum counts only where its other side can be had before the convolution runs: it must hold no convolution that is
    itself still to be solved, and nothing that works in place.
    """
    modules = dict(model.named_modules())
    place = {node: number for number, node in enumerate(graph.nodes)}
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    found = {}
    for name in solved:
        if len(calls.get(name, ())) != 1:
            continue
        start = last = calls[name][0]
        norm = other = None
        after = _only_user(last)
        if after is not None and after.op == "call_module" and len(calls[str(after.target)]) == 1:
            module = modules[str(after.target)]
            if isinstance(module, _BatchNorm) and module.running_mean is not None:
                norm, last = str(after.target), after
                after = _only_user(last)
        if after is not None and _is_addition(after):
            sides = [arg for arg in after.args if arg is not last]
            if len(sides) == 1 and isinstance(sides[0], fx.Node):
                if _can_run(sides[0], start, place, modules, solved):
                    other = sides[0]
                last = after
                after = _only_user(last)
        rectified = after is not None and _is_rectifier(after, modules) and (other is not None or not _is_sum(last))
        found[name] = Surroundings(norm, other, rectified)
    return found


# -- inside ------------------------------------------------------------------------------------------------------------


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_sum(node: fx.Node) -> bool:
    return (node.op == "call_function" and node.target in _ADDITIONS) or (
        node.op == "call_method" and node.target in ("add", "add_")
    )


def _is_addition(node: fx.Node) -> bool:
    return _is_sum(node) and len(node.args) == 2 and not node.kwargs


def _is_rectifier(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], nn.ReLU | nn.ReLU6)
    return (node.op == "call_function" and node.target in _RECTIFIERS) or (
        node.op == "call_method" and node.target in ("relu", "relu_")
    )


def _can_run(
    node: fx.Node, start: fx.Node, place: dict[fx.Node, int], modules: dict[str, nn.Module], solved: Collection[str]
) -> bool:
    """Whether `node` can have its value when `start` is about to run."""
    missing, seen = [node], set()
    while missing:
        each = missing.pop()
        if place[each] < place[start] or each in seen:
            continue
        seen.add(each)
        if each is start or _in_place(each, modules) or (each.op == "call_module" and each.target in solved):
            return False
        missing += each.all_input_nodes
    return True


def _in_place(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    if node.kwargs.get("inplace") or (node.target is F.relu and node.args[1:2] == (True,)):
        return True
    return str(name).endswith("_") or node.target in (operator.iadd, operator.isub, operator.imul)
