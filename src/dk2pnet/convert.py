"""Finds the convolutions of a model and puts DK layers in their place."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from dk2pnet.decompose.solve import Factors
from dk2pnet.errors import InputError
from dk2pnet.layer import DKConv2d
from dk2pnet.measure import evaluation
from dk2pnet.plan import LayerPlan, Plan

__all__ = ["Convolution", "convert", "copy_model", "find_convolutions", "replace_modules", "with_kernels"]


@dataclass
class Convolution:
    """A convolution found in a model. `reason` says why it stays dense, "" if it can be decomposed.

    `positions`: output positions of one image, summed over all calls; `calls`: how often one forward pass runs it;
    `aliases`: further names of the same module.
    """

    name: str
    module: nn.Module
    reason: str = ""
    positions: int = 0
    calls: int = 0
    aliases: list[str] = field(default_factory=list)
    activation: int = 0  # numbers in the largest input and output of one image, together
    input_size: tuple[int, int] = (0, 0)  # height and width of the (last) input
    by_keyword: bool = False  # whether its input is given as ``input=``

    @property
    def shape(self) -> str:
        """The weight's shape (output channels x input channels per group x kernel, the first two the other way round
        where it is transposed), then stride and groups where they are not 1."""
        weight = self.module.weight.shape  # type: ignore[union-attr]
        text = "x".join(map(str, weight))
        stride, groups = self.module.stride, self.module.groups
        text += "" if set(stride) == {1} else " /" + "x".join(map(str, sorted(set(stride))))  # type: ignore[arg-type]
        return text + ("" if groups == 1 else f" groups={groups}")

    @property
    def macs(self) -> int:
        """Multiply-adds of one image."""
        return self.module.weight.numel() * self.positions  # type: ignore[union-attr,operator]


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy; `InputError` where the model cannot be copied.

    An activation that a module keeps on itself is copied without its graph, which nothing here goes back through.
    """
    kept = (each for module in model.modules() for each in _tensors_in(list(vars(module).values())))
    memo = {id(each): each.detach().clone() for each in kept if not each.is_leaf}
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise InputError(
            f"the model {type(model).__name__} cannot be copied ({error}); give one that copy.deepcopy accepts"
        ) from error


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """Those in lists, tuples and dictionaries, however deep."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(each)


def find_convolutions(
    model: nn.Module, example: Tensor, keep: Iterable[str] = (), first: bool = False
) -> list[Convolution]:
    """All convolutions in the order in which `example (1, C, H, W)` runs through them, each module once.

    `keep`: names, prefixes of names or patterns with ``*`` of convolutions that stay dense. `first`: whether the
    first convolution may be decomposed.
    """
    found: dict[nn.Module, Convolution] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _ConvNd):
            if module in found:
                found[module].aliases.append(name)
            else:
                found[module] = Convolution(name, module)
    order: list[nn.Module] = []
    hooked = {m for m in found if m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m)}

    def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
        site = found[module]
        site.calls += 1
        site.by_keyword = site.by_keyword or not args
        x = args[0] if args else kwargs["input"]
        each = x if site.module.transposed else output  # where the kernel is put
        site.positions += each[:, 0].numel() // len(example)
        site.activation = max(site.activation, (x.numel() + output.numel()) // len(example))
        if x.dim() == 4:
            site.input_size = (x.shape[2], x.shape[3])
        order.append(module)

    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in found]
    try:
        with evaluation(model):
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    in_order = dict.fromkeys([*order, *found])
    users: dict[nn.Parameter | None, list[str]] = {}  # a computed weight is no parameter: None
    for site in found.values():
        users.setdefault(site.module._parameters.get("weight"), []).append(site.name)
    patterns = [keep] if isinstance(keep, str) else list(keep)
    unused = set(patterns)
    for number, module in enumerate(in_order):
        site = found[module]
        tied = [name for name in users[module._parameters.get("weight")] if name != site.name]
        site.reason = _reason(site, number == 0 and not first, tied)
        if not site.reason and module in hooked:
            site.reason = "it has hooks of the network's own, which would be lost"
        for pattern in patterns:
            names = [site.name, *site.aliases]
            if any(fnmatchcase(name, pattern) or name.startswith(pattern + ".") for name in names):
                site.reason = f"kept by --keep {pattern}"
                unused.discard(pattern)
    if unused:
        names = ", ".join(found[module].name for module in list(in_order)[:6])
        raise InputError(f"--keep {sorted(unused)[0]} matches no convolution; their names are {names}, ...")
    return [found[module] for module in in_order]


# Dictionaries of every module: its parts, parameters, buffers and hooks.
_OWN = frozenset(vars(nn.Module()))


def _reason(site: Convolution, is_first: bool, tied: Sequence[str]) -> str:
    module = site.module
    if not isinstance(module, nn.Conv2d):
        return f"{type(module).__name__} is not decomposed"
    if type(module) is not nn.Conv2d or "weight" not in module._parameters:
        return f"{type(module).__name__} computes its weight or its output in a way of its own"
    if site.calls == 0:
        return "not used by the example input"
    if site.by_keyword:
        return "the network gives it its input by keyword (input=...), which the statistics do not see"
    if tied:
        return f"its weight is tied to that of {tied[0]}"
    if module.kernel_size == (1, 1):
        return "1x1 convolution"
    if module.groups == module.in_channels and module.in_channels > 1:
        return "depthwise convolution"
    return "first convolution" if is_first else ""


def replace_modules(model: nn.Module, layers: Mapping[nn.Module, nn.Module]) -> None:
    """Put new modules in the place of old ones, in every place where an old one stands.

    Also in the lists, tuples and dictionaries that a module keeps beside its parts, as many an older network does.
    """
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in layers:
                setattr(parent, name, layers[child])
        for name, value in list(vars(parent).items()):
            if name not in _OWN and isinstance(value, list | tuple | dict):
                setattr(parent, name, _replaced(value, layers))


def _replaced(value: Any, layers: Mapping[nn.Module, nn.Module]) -> Any:
    """A list, a tuple or a dictionary with the new modules; itself where it holds none of the old ones."""
    if isinstance(value, nn.Module):
        return layers.get(value, value)
    if type(value) is dict:
        found: Any = {key: _replaced(each, layers) for key, each in value.items()}
        return found if any(found[key] is not value[key] for key in value) else value
    if type(value) in (list, tuple):
        found = [_replaced(each, layers) for each in value]
        return type(value)(found) if any(a is not b for a, b in zip(found, value, strict=True)) else value
    return value


def convert(model: nn.Module, plan: Plan, factors: Mapping[str, Factors] | None = None) -> nn.Module:
    """A copy of `model` with a DK layer wherever `plan` gives a convolution kernels.

    Without `factors` the DK layers are empty, to be filled by ``load_state_dict``. `model` itself is not changed;
    the copy's modules are in the same modes.
    """
    student = copy_model(model)
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


def with_kernels(model: nn.Module, counts: Mapping[str, Tensor | None]) -> nn.Module:
    """A copy of `model` with an untrained DK layer wherever `counts` gives a convolution kernels per input channel."""
    layers = [LayerPlan(name, "", counts=count.tolist()) for name, count in counts.items() if count is not None]
    return convert(model, Plan(layers=layers))
