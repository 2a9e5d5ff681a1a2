"""Finds the convolutions of a model, and says of each why it stays dense."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from dk2pnet.errors import InputError
from dk2pnet.measure import evaluation
from dk2pnet.networks.network import Site

__all__ = ["find_convolutions"]


def find_convolutions(model: nn.Module, example: Tensor, keep: Iterable[str] = (), first: bool = False) -> list[Site]:
    """All convolutions in the order in which `example (1, C, H, W)` runs through them, each module once.

    `keep`: names, prefixes of names or patterns with ``*`` of convolutions that stay dense. `first`: whether the
    first convolution may be decomposed.
    """
    found: dict[nn.Module, Site] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _ConvNd):
            if module in found:
                found[module].aliases.append(name)
            else:
                found[module] = Site(name, module)
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
        elif x.dim() == 3 and isinstance(module, nn.Conv2d):
            site.reason = "the network gives it single images (C, H, W)"
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
    for name, module in model.named_modules():  # whoever else has it goes on with it
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter in users and (module not in found or key != "weight"):
                users[parameter].append(f"{name}.{key}" if name else key)
    patterns = [keep] if isinstance(keep, str) else list(keep)
    unused = set(patterns)
    for number, module in enumerate(in_order):
        site = found[module]
        tied = [name for name in users[module._parameters.get("weight")] if name != site.name]
        site.reason = site.reason or _reason(site, number == 0 and not first, tied)
        if not site.reason and module in hooked:
            site.reason = "it has hooks of the network's own, which would be lost"
        for pattern in patterns:
            names = [site.name, *site.aliases]
            if any(fnmatchcase(name, pattern) or name.startswith(pattern + ".") for name in names):
                site.reason = f"kept by --keep {pattern}"
                unused.discard(pattern)
    if unused:
        known = ", ".join(found[module].name for module in list(in_order)[:6])
        raise InputError(f"--keep {sorted(unused)[0]} matches no convolution; their names are {known}, ...")
    return [found[module] for module in in_order]


def _reason(site: Site, is_first: bool, tied: Sequence[str]) -> str:
    module = site.module
    if not isinstance(module, nn.Conv2d):
        return f"{type(module).__name__} is not decomposed"
    if type(module) is not nn.Conv2d or "weight" not in module._parameters:
        if "weight" in getattr(module, "parametrizations", ()):
            return "its weight is computed; take that out first (torch.nn.utils.parametrize.remove_parametrizations)"
        if module._forward_pre_hooks and "weight" not in module._parameters:
            return "its weight is computed in a hook; take that out first"
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
