"""A network by name, and weights from a file."""

from __future__ import annotations

import importlib.util
import pickle
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dk2pnet.data import Normalization
from dk2pnet.errors import InputError
from dk2pnet.nets import NETS

__all__ = ["check_finite", "default_input_size", "default_normalization", "load_weights", "make_network"]

_NESTED = ("state_dict", "model_state_dict", "model", "net", "weights")
_PREFIXES = ("module.", "_orig_mod.")


def make_network(
    name: str, *, num_classes: int | None = None, in_channels: int | None = None, pretrained: bool = False
) -> nn.Module:
    """Make a network: one of `nets.NETS`, ``torchvision/NAME``, ``timm/NAME`` or ``FILE.py:FUNCTION``.

    None stands for the library's default (10 classes and 3 channels for ours, 1,000 classes for torchvision).
    `pretrained` asks torchvision or timm for their published weights, which needs a connection.
    """
    wanted = {key: value for key, value in (("num_classes", num_classes), ("in_channels", in_channels)) if value}
    library, _, model = name.partition("/")
    if library == "torchvision" and model:
        return _torchvision(model, num_classes, in_channels, pretrained)
    if library == "timm" and model:
        return _timm(model, num_classes, in_channels, pretrained)
    if pretrained:
        raise InputError(f"there are no published weights for {name!r}; give a file with --weights")
    if ".py:" in name:
        return _from_file(name)
    if name not in NETS:
        close = get_close_matches(name, [*NETS, "torchvision/" + name, "timm/" + name], 1)
        raise InputError(
            f"network {name!r} is not known; expected {', '.join(NETS)}, torchvision/NAME, timm/NAME, FILE.py:FUNCTION or a "
            f"folder that dk2pnet wrote{f' (did you mean {close[0]}?)' if close else ''}"
        )
    return NETS[name](**wanted)


def _torchvision(model: str, num_classes: int | None, in_channels: int | None, pretrained: bool) -> nn.Module:
    import torchvision

    if in_channels not in (None, 3):
        raise InputError(f"torchvision/{model} reads 3 channels, but {in_channels} were asked for; give colour images")
    names = torchvision.models.list_models()
    if model not in names:
        close = ", ".join(get_close_matches(model, names, 3)) or "resnet18"
        raise InputError(f"torchvision has no model {model!r}; the closest names are {close}")
    if pretrained:
        return _downloaded(f"torchvision/{model}", lambda: torchvision.models.get_model(model, weights="DEFAULT"))
    return torchvision.models.get_model(model, weights=None, **({"num_classes": num_classes} if num_classes else {}))


def _timm(model: str, num_classes: int | None, in_channels: int | None, pretrained: bool) -> nn.Module:
    timm = _import_timm()
    if not timm.is_model(model):
        close = ", ".join(get_close_matches(model, timm.list_models(), 3)) or "resnet18"
        raise InputError(f"timm has no model {model!r}; the closest names are {close}")
    options = {key: value for key, value in (("num_classes", num_classes), ("in_chans", in_channels)) if value}
    if pretrained:
        return _downloaded(f"timm/{model}", lambda: timm.create_model(model, pretrained=True, **options))
    return timm.create_model(model, pretrained=False, **options)


def _import_timm() -> Any:
    try:
        import timm
    except ImportError:
        raise InputError("timm is not installed, which timm/NAME needs; install it with: pip install timm") from None
    return timm


def _downloaded(name: str, make: Any) -> nn.Module:
    try:
        return make()
    except Exception as error:  # every library and network layer has exceptions of its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"the published weights of {name} could not be fetched ({reason}); give a file with --weights"
        ) from error


def _from_file(name: str) -> nn.Module:
    file, _, function = name.rpartition(":")
    path = Path(file).resolve()
    if not path.is_file():
        raise InputError(f"{file} does not exist; expected FILE.py:FUNCTION, a function that makes the network")
    spec = importlib.util.spec_from_file_location(f"_dk2pnet_user_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
        made = getattr(module, function)()
    except AttributeError as error:
        if not hasattr(module, function):
            raise InputError(f"{file} has no function {function!r}; expected FILE.py:FUNCTION") from error
        raise InputError(
            f"{name} failed ({error}); expected a function without arguments that makes the network"
        ) from error
    except Exception as error:
        raise InputError(
            f"{name} failed ({error}); expected a function without arguments that makes the network"
        ) from error
    finally:
        sys.path.remove(str(path.parent))
    if not isinstance(made, nn.Module):
        raise InputError(f"{name} returned {type(made).__name__}; expected a torch.nn.Module")
    return made


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a state_dict from ``.safetensors``, or from ``.pt/.pth/.th`` (tensors only, nothing is unpickled).

    It may be nested (``{"state_dict": ...}``) and its keys may begin with ``module.``. On any error `model` is as it
    was.
    """
    path = Path(path)
    state = _read_state(path)
    own = model.state_dict()
    # PyTorch fills this counter in where an old checkpoint lacks it.
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    misfits = [key for key in own if key in state and state[key].shape != own[key].shape]
    problems = []
    for what, keys in (("missing", missing), ("not in the network", unexpected)):
        if keys:
            problems.append(f"{len(keys)} {what}: {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}")
    if misfits:
        shown = [f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}" for key in misfits[:3]]
        problems.append(f"{len(misfits)} of another shape: {', '.join(shown)}{', ...' if len(misfits) > 3 else ''}")
    if problems:
        raise InputError(
            f"the weights in {path} do not fit the network ({'; '.join(problems)}); give the network they belong to"
        )
    for key, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(
                f"the weights in {path} hold NaN or infinity in {key}; give a checkpoint from before that happened"
            )
    model.load_state_dict(state)


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"weights {path} do not exist; give a .safetensors, .pt, .pth or .th file")
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(str(path))
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) or "Weights only" in str(error) or "weights_only" in str(error):
            raise InputError(
                f"weights {path} hold more than tensors, and unpickling them could run foreign code; save the state_dict alone, "
                "best as .safetensors"
            ) from error
        raise _corrupt(path, error) from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise _corrupt(path, error) from error
    for _ in range(3):
        nested = next((key for key in _NESTED if isinstance(state, dict) and isinstance(state.get(key), dict)), None)
        if nested is None:
            break
        state = state[nested]
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"weights {path} hold no state_dict; expected a dictionary of tensors by parameter name")
    stripped = True
    while stripped:
        stripped = False
        for prefix in _PREFIXES:
            if all(key.startswith(prefix) for key in state):
                state = {key.removeprefix(prefix): value for key, value in state.items()}
                stripped = True
    return state


def _corrupt(path: Path, error: Exception) -> InputError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return InputError(f"weights {path} cannot be read ({reason}); the file is damaged or no checkpoint: fetch it again")


def check_finite(model: nn.Module) -> None:
    """Raise `InputError` naming the first parameter or buffer that holds NaN or infinity."""
    for key, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(f"the network holds NaN or infinity in {key}; give weights from before that happened")


def default_normalization(name: str) -> Normalization | None:
    """What the published weights of torchvision and timm networks expect; None for all others."""
    if name.startswith("torchvision/"):
        return Normalization.parse("imagenet")
    if name.startswith("timm/"):
        config = _timm_config(name)
        return Normalization(tuple(config["mean"]), tuple(config["std"]))
    return None


def default_input_size(name: str) -> int | None:
    """Side of the images that torchvision and timm networks are published for; None for all others."""
    if name.startswith("torchvision/"):
        return 224
    return int(_timm_config(name)["input_size"][-1]) if name.startswith("timm/") else None


def _timm_config(name: str) -> dict[str, Any]:
    timm = _import_timm()
    model = name.partition("/")[2]
    if not timm.is_model(model):
        _timm(model, None, None, False)  # says which names there are
    config = timm.models.get_pretrained_cfg(model)
    config = config.to_dict() if config is not None else {}
    return {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "input_size": (3, 224, 224)} | config
