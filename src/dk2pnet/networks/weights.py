"""Weights from a file, loaded so that nothing in it runs: they fit exactly, or `InputError` and an unchanged model."""

from __future__ import annotations

import math
import pickle
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dk2pnet.errors import InputError, first_line

__all__ = ["check_finite", "load_weights", "misfits"]

_NESTED = ("state_dict", "model_state_dict", "model", "net", "weights")
_PREFIXES = ("module.", "_orig_mod.")
_PICKLED = (".pt", ".pth", ".th", ".bin")
_EXPECTED = "a .safetensors, .pt, .pth, .th or .bin file"


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a state_dict from ``.safetensors`` or ``.pt/.pth/.th/.bin`` (tensors only, nothing is unpickled) strictly.

    It may be nested (``{"state_dict": ...}``), its keys may all begin with ``module.`` or ``_orig_mod.``, and its
    precision may be another one.

    Raises
    ------
    InputError
        When there is no such file, it cannot be read, holds more than tensors or no state_dict, or its tensors do not
        fit or are not finite. `model` is as it was.
    """
    path = Path(path)
    own = model.state_dict()
    state = _strip(_find_state(_read(path), path), own)
    problems = misfits(own, state)
    if problems:
        raise InputError(
            f"the weights in {path} do not fit the network ({'; '.join(problems)}); give the network and the number "
            "of classes they belong to"
        )
    # In the network's own precision: a number may be finite in float32 and infinite in float16.
    broken = _first_not_finite((key, value.to(own[key].dtype)) for key, value in state.items() if key in own)
    if broken is not None:
        raise InputError(f"the weights in {path} hold NaN or infinity in {broken}; give a checkpoint from before that")
    model.load_state_dict(state)


def _read(path: Path) -> Any:
    if path.is_dir():
        raise InputError(f"weights {path} are a folder; expected {_EXPECTED}")
    if not path.is_file():
        raise InputError(f"weights {path} do not exist; expected {_EXPECTED}")
    suffix = path.suffix.lower()
    if suffix != ".safetensors" and suffix not in _PICKLED:
        raise InputError(f"weights {path} are of an unknown kind; expected {_EXPECTED}")
    try:
        if suffix == ".safetensors":
            return load_file(str(path))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # on files that are refused below anyway
            return torch.load(path, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        SafetensorError,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        MemoryError,
    ) as error:
        # What PyTorch says about every file it cannot unpickle comes first, then what is the matter with this one.
        reason = str(error).rpartition("WeightsUnpickler error:")[2].strip()
        if re.search(r"GLOBAL|TorchScript|[Cc]lass|reduce|new object", reason):
            raise InputError(
                f"weights {path} hold more than tensors (a whole network, or objects of the training script), and "
                "reading those could run foreign code; save model.state_dict() alone, best with safetensors"
            ) from error
        raise InputError(
            f"weights {path} cannot be read ({first_line(Exception(reason)) if reason else type(error).__name__}); "
            "the file is damaged, incomplete or no checkpoint: fetch it again"
        ) from error


def _find_state(content: Any, path: Path) -> dict[str, Any]:
    while isinstance(content, Mapping):
        nested = next((key for key in _NESTED if isinstance(content.get(key), Mapping)), None)
        if nested is None:
            break
        content = content[nested]
    named = isinstance(content, Mapping) and all(isinstance(key, str) for key in content)
    if not named or not any(isinstance(value, Tensor) for value in content.values()):
        what = f"a {type(content).__name__}"
        if named:
            what += f" with {', '.join(list(content)[:3])}" if content else " with nothing in it"
        raise InputError(
            f"weights {path} hold no state_dict but {what}; expected tensors by name as in model.state_dict(), "
            f"at the top or under {', '.join(_NESTED)}"
        )
    return dict(content)


def _strip(state: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Take away what `DataParallel` and `torch.compile` put before every name, unless the network's have it too."""
    while True:
        for prefix in _PREFIXES:
            if all(key.startswith(prefix) for key in state) and not all(key.startswith(prefix) for key in own):
                state = {key.removeprefix(prefix): value for key, value in state.items()}
                break
        else:
            return state


def misfits(own: Mapping[str, Any], state: Mapping[str, Any]) -> list[str]:
    """What keeps `state` from being the state of a network whose state is `own`; empty where it fits."""
    # PyTorch fills this counter in where an old checkpoint lacks it.
    missing = [
        f"{key}{_shape(own[key])}" for key in own if key not in state and not key.endswith("num_batches_tracked")
    ]
    unexpected = [f"{key}{_shape(state[key])}" for key in state if key not in own]
    shapes, kinds = [], []
    for key, value in state.items():
        wanted = own.get(key)
        if not isinstance(wanted, Tensor):
            continue
        if not isinstance(value, Tensor):
            kinds.append(f"{key} {type(value).__name__} instead of a tensor")
        elif value.shape != wanted.shape:
            shapes.append(f"{key}{_shape(value)} instead of{_shape(wanted)}")
        elif value.is_quantized or (wanted.is_floating_point() and not value.is_floating_point()):
            kinds.append(f"{key} {value.dtype} instead of {wanted.dtype}")
    found = (
        ("missing", missing),
        ("not in the network", unexpected),
        ("of another shape", shapes),
        ("of another kind", kinds),
    )
    return [
        f"{len(keys)} {what}: {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}" for what, keys in found if keys
    ]


def _shape(value: Any) -> str:
    return f" {tuple(value.shape)}" if isinstance(value, Tensor) else ""


def check_finite(model: nn.Module) -> None:
    """Raise `InputError` naming the first parameter or buffer that holds NaN or infinity."""
    broken = _first_not_finite(_numbers(model))
    if broken is not None:
        raise InputError(f"the network holds NaN or infinity in {broken}; give weights from before that happened")


def _numbers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name, except buffers that are never saved: masks among them may hold -inf."""
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise InputError(f"{name} of the network has no shape yet; run the network on one image first")
        yield name, parameter
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set and not is_lazy(buffer):
                yield f"{prefix}.{name}" if prefix else name, buffer


def _first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    for name, tensor in tensors:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            if tensor.dim() > 1 and bool(((tensor == 0) | (tensor == -math.inf)).all()):
                continue  # a mask, as attention has
            return name
    return None


def firstfirst_line(error: Exception) -> str:
    """The first line of what an exception says, or its type where it says nothing."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
