"""Copies of modules, and modules put in the place of others."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from dk2pnet.errors import InputError

__all__ = ["copy_model", "make_weights_plain", "replace_modules"]

# Dictionaries of every module: its parts, parameters, buffers and hooks.
_OWN = frozenset(vars(nn.Module()))


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy; `InputError` where the model cannot be copied.

    An activation that a module keeps on itself is copied without its graph, which nothing here goes back through.
    Parts compiled by `torch.compile` are what they were before it: hooks inside of them would compile them anew.
    """
    kept = (each for module in model.modules() for each in _tensors_in(list(vars(module).values())))
    memo = {id(each): each.detach().clone() for each in kept if not each.is_leaf}
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise InputError(
            f"the model {type(model).__name__} cannot be copied ({error}); give one that copy.deepcopy accepts"
        ) from error
    _out_of_inference(copied)
    return _uncompiled(copied)


def make_weights_plain(model: nn.Module) -> nn.Module:
    """Tensors that are computed before each use, but always alike in evaluation mode, become what they are then: by
    `torch.nn.utils.parametrize` (weight and spectral norm), their older forms, masks of `torch.nn.utils.prune`."""
    from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
    from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook
    from torch.nn.utils.weight_norm import WeightNorm

    modes = {module: module.training for module in model.modules()}
    model.eval()
    for module in modes:
        if parametrize.is_parametrized(module):
            # `remove_parametrizations` takes the property from the class, which a copy shares with its original.
            values = {name: getattr(module, name).detach().clone() for name in module.parametrizations}  # type: ignore
            module.__class__ = type(module).__bases__[0]
            del module._modules["parametrizations"]
            for name, value in values.items():
                module.register_parameter(name, nn.Parameter(value))
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, WeightNorm):
                remove_weight_norm(module, hook.name)
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(module, hook.name)
                for key, load in list(module._load_state_dict_pre_hooks.items()):  # which PyTorch leaves behind
                    if isinstance(getattr(load, "hook", load), SpectralNormLoadStateDictPreHook):
                        del module._load_state_dict_pre_hooks[key]
            elif isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)
    for module, mode in modes.items():
        module.training = mode
    return model


def _out_of_inference(model: nn.Module) -> None:
    """Tensors that were made in `torch.inference_mode` cannot learn, nor be changed outside of it: copies can."""
    known: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, value in tensors.items():
                if value is None or not value.is_inference():
                    continue
                if id(value) not in known:
                    new = value.detach().clone()
                    known[id(value)] = nn.Parameter(new) if isinstance(value, nn.Parameter) else new
                tensors[name] = known[id(value)]  # type: ignore[assignment]


def _uncompiled(model: nn.Module) -> nn.Module:
    while compiled := {m: m._orig_mod for m in model.modules() if isinstance(getattr(m, "_orig_mod", None), nn.Module)}:
        model = compiled.get(model, model)  # type: ignore[assignment]
        replace_modules(model, compiled)  # type: ignore[arg-type]
    for module in model.modules():
        module._compiled_call_impl = None  # of `module.compile()`
    return model


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """Those in lists, tuples and dictionaries, however deep."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(each)


def replace_modules(model: nn.Module, layers: Mapping[nn.Module, nn.Module]) -> None:
    """Put new modules in the place of old ones, in every place where an old one stands.

    Also in the lists, tuples and dictionaries that a module keeps beside its parts, as many an older network does.
    """
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in layers:
                setattr(parent, name, layers[child])
        for name, value in list(vars(parent).items()):
            if name not in _OWN and isinstance(value, list | tuple | dict):
                setattr(parent, name, _replaced(value, layers))


def _replaced(value: Any, layers: Mapping[nn.Module, nn.Module]) -> Any:
    """A list, a tuple or a dictionary with the new modules; itself where it holds none of the old ones."""
    if isinstance(value, nn.Module):
        return layers.get(value, value)
    if isinstance(value, dict):
        changed = {key: new for key, old in value.items() if (new := _replaced(old, layers)) is not old}
        if not changed:
            return value
        found: Any = copy.copy(value)  # of whatever kind it is
        found.update(changed)
        return found
    if isinstance(value, list | tuple):
        found = [_replaced(each, layers) for each in value]
        if all(a is b for a, b in zip(found, value, strict=True)):
            return value
        return type(value)(*found) if hasattr(value, "_fields") else type(value)(found)
    return value
