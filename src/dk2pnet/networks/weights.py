"""Weights from a file, loaded so that nothing in it runs: they fit exactly, or `InputError` and an unchanged model."""

from __future__ import annotations

import logging
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
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from dk2pnet.errors import InputError, first_line

__all__ = ["check_finite", "load_weights", "misfits"]

_NESTED = ("state_dict", "model_state_dict", "model", "net", "weights", "module")
# The average over training of the same weights, which is what training scripts evaluate and publish.
_AVERAGED = ("state_dict_ema", "model_ema", "ema", "ema_state_dict", "model_ema_state_dict")
_COMPILED = "_orig_mod."  # what `torch.compile` puts into names, before a part or the whole
_PICKLED = (".pt", ".pth", ".th", ".bin")
_EXPECTED = "a .safetensors, .pt, .pth, .th or .bin file"

_log = logging.getLogger(__name__)


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a state_dict from ``.safetensors`` or ``.pt/.pth/.th/.bin`` (tensors only, nothing is unpickled) strictly.

    It may be nested (``{"state_dict": ...}``), lie there twice (then the average over training is taken, and said),
    beside objects of a training script (which are not made), under names that all begin alike (``module.``,
    ``backbone.``, ...), and in another precision.

    Raises
    ------
    InputError
        When there is no such file, it cannot be read, holds more than tensors or no state_dict, or its tensors do not
        fit or are not finite. `model` is as it was.
    """
    path = Path(path)
    own = model.state_dict()
    state = _named_as(own, _find_state(_read(path), path), path)
    if any(isinstance(state.get(key), _NotMade) for key in own):
        raise _more_than_tensors(path)
    problems = misfits(own, state)
    if problems:
        raise InputError(
            f"the weights in {path} do not fit the network ({'; '.join(problems)}); "
            + (_of_other_colours(own, state) or "give the network and the number of classes they belong to")
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
        with warnings.catch_warnings(), safe_globals(_stand_ins(path)):
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
            raise _more_than_tensors(path) from error
        raise InputError(
            f"weights {path} cannot be read ({first_line(Exception(reason)) if reason else type(error).__name__}); "
            "the file is damaged, incomplete or no checkpoint: fetch it again"
        ) from error


class _NotMade:
    """Stands in for an object of a training script: nothing is made or filled, so that no code of it runs."""

    def __init__(self, *args: Any, **more: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _stand_ins(path: Path) -> list[Any]:
    """One for every class and function that a checkpoint names beside tensors and plain containers."""
    try:
        return [(_NotMade, name) for name in get_unsafe_globals_in_checkpoint(path)]
    except Exception:  # of the format before zip files, or damaged: reading it says what is the matter
        return []


def _more_than_tensors(path: Path) -> InputError:
    return InputError(
        f"weights {path} hold more than tensors (a whole network, or objects of the training script), and "
        "reading those could run foreign code; save model.state_dict() alone, best with safetensors"
    )


def _find_state(content: Any, path: Path) -> dict[str, Any]:
    found = _state_in(content, path)
    if found is not None:
        return found
    while isinstance(content, Mapping) and (nested := _nested(content)):
        content = nested[0][1]
    if isinstance(content, _NotMade) or (
        isinstance(content, Mapping) and any(isinstance(content.get(key), _NotMade) for key in (*_AVERAGED, *_NESTED))
    ):
        raise _more_than_tensors(path)
    what = f"a {type(content).__name__}"
    if isinstance(content, Mapping) and all(isinstance(key, str) for key in content):
        what += f" with {', '.join(list(content)[:3])}" if content else " with nothing in it"
    raise InputError(
        f"weights {path} hold no state_dict but {what}; expected tensors by name as in model.state_dict(), "
        f"at the top or under {', '.join(_NESTED)}"
    )


def _nested(content: Mapping[Any, Any]) -> list[tuple[str, Mapping[Any, Any]]]:
    return [(key, content[key]) for key in (*_AVERAGED, *_NESTED) if isinstance(content.get(key), Mapping)]


def _state_in(content: Any, path: Path) -> dict[str, Any] | None:
    """Tensors by name at the top or further down, the average before what it is the average of."""
    if not isinstance(content, Mapping):
        return None
    states = {key: found for key, value in _nested(content) if (found := _state_in(value, path)) is not None}
    if states:
        taken, *others = states
        if taken in _AVERAGED and others:
            _log.warning(
                "%s holds weights under %s and their average under %s: the average is taken; for the others "
                "save them alone",
                path,
                ", ".join(others),
                taken,
            )
        return states[taken]
    named = all(isinstance(key, str) for key in content)
    return dict(content) if named and any(isinstance(value, Tensor) for value in content.values()) else None


def _named_as(own: Mapping[str, Any], state: dict[str, Any], path: Path) -> dict[str, Any]:
    """The part of a state whose names, less what stands before all of them, are the network's own; all of it where
    there is none."""
    if not any(_COMPILED in key for key in own):
        state = {key.replace(_COMPILED, ""): value for key, value in state.items()}
    if not misfits(own, state):
        return state
    known = [key for key in own if not key.endswith("num_batches_tracked")]
    last = known[-1] if known else ""
    before = [key.removesuffix(last) for key in state if key.endswith(f".{last}")]
    parts = {each: {k.removeprefix(each): v for k, v in state.items() if k.startswith(each)} for each in before}
    fitting = [each for each, part in parts.items() if not misfits(own, part)]
    if len(fitting) > 1:
        raise InputError(
            f"weights {path} hold the network several times, under {', '.join(fitting)}; save the one that is meant "
            "alone"
        )
    if fitting:
        return parts[fitting[0]]
    return max(parts.values(), key=len, default=state)


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


def _of_other_colours(own: Mapping[str, Any], state: Mapping[str, Any]) -> str:
    """What to do where the first convolution alone, but for classes, takes images of other colours; else ""."""
    colours = (1, 3)
    for key, value in state.items():
        wanted = own.get(key)
        if not (isinstance(value, Tensor) and isinstance(wanted, Tensor) and value.dim() == wanted.dim() == 4):
            continue
        given, taken = value.shape[1], wanted.shape[1]
        if given != taken and given in colours and taken in colours and value.shape[2:] == wanted.shape[2:]:
            kind = "grey" if taken == 1 else "coloured"
            return f"they are for images of {given} channel(s), and these are {kind}: convert the images"
        return ""
    return ""


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
        if parameter.is_meta:
            raise InputError(f"the network has no weights yet ({name} is on the device meta); load some first")
        yield name, parameter
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set and not is_lazy(buffer):
                yield f"{prefix}.{name}" if prefix else name, buffer


def _first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    for name, tensor in tensors:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.detach()).all()):
            if tensor.dim() > 1 and bool(((tensor == 0) | (tensor == -math.inf)).all()):
                continue  # a mask, as attention has
            return name
    return None
