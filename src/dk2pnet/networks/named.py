"""A network by name, and weights from a file.

    model = make_network("resnet20", num_classes=100)          # or "torchvision/resnet18", "timm/...", "net.py:make"
    load_weights(model, "resnet20.safetensors")                # fits exactly, or InputError and an unchanged model
    default_normalization("torchvision/resnet18")              # what published weights expect of their input

Nothing heavy is imported before it is needed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import nn

from dk2pnet.data import Normalization
from dk2pnet.errors import InputError, first_line
from dk2pnet.nets import NETS, net_named
from dk2pnet.networks.weights import misfits


def make_network(
    name: str, *, num_classes: int | None = None, in_channels: int | None = None, pretrained: bool = False
) -> nn.Module:
    """Make a network: one of `nets.NETS`, ``dk2pnet-DEPTHxWIDTH``, ``torchvision/NAME``, ``timm/NAME`` or
    ``FILE.py:FUNCTION``.

    None stands for the library's default (10 classes and 3 channels for ours, 1,000 classes for torchvision).
    `pretrained` asks torchvision or timm for their published weights, which needs a connection.
    """
    for what, number in (("num_classes", num_classes), ("in_channels", in_channels)):
        if number is not None and number < 1:
            raise InputError(f"{what} is {number}; expected 1 or more")
    if ".py:" in name:  # before the libraries: a folder may well be called timm
        return _from_file(name, num_classes, in_channels, pretrained)
    library, _, model = name.partition("/")
    if library == "torchvision" and model:
        return _torchvision(model, num_classes, in_channels, pretrained)
    if library == "timm" and model:
        return _timm(model, num_classes, in_channels, pretrained)
    make = net_named(name)
    if make is None:
        raise InputError(
            f"network {name!r} is not known; expected {', '.join(NETS)}, dk2pnet-DEPTHxWIDTH, torchvision/NAME, "
            f"timm/NAME, FILE.py:FUNCTION or a folder that dk2pnet wrote{_hint(name)}"
        )
    if pretrained:
        raise InputError(f"there are no published weights for {name!r}; give a file with --weights")
    return make(**_given(num_classes=num_classes, in_channels=in_channels))


def _hint(name: str) -> str:
    import torchvision

    if name in torchvision.models.list_models():
        return f" (did you mean torchvision/{name}?)"
    close = get_close_matches(name.lower(), NETS, 3)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def _given(**options: int | None) -> dict[str, int]:
    return {key: value for key, value in options.items() if value is not None}


def _torchvision(model: str, num_classes: int | None, in_channels: int | None, pretrained: bool) -> nn.Module:
    import torchvision

    name = f"torchvision/{model}"
    if in_channels not in (None, 3):
        raise InputError(f"{name} reads 3 channels, but {in_channels} were asked for; give colour images")
    names = torchvision.models.list_models()
    if model not in names:
        close = ", ".join(get_close_matches(model, names, 3)) or "resnet18"
        raise InputError(f"torchvision has no model {model!r}; the closest names are {close}")
    options: dict[str, Any] = {"weights": None, **_given(num_classes=num_classes)}
    if "weights_backbone" in inspect.signature(torchvision.models.get_model_builder(model)).parameters:
        options["weights_backbone"] = None  # its default would download a backbone
    network = _made(name, lambda: torchvision.models.get_model(model, **options))
    if not pretrained:
        return network
    published = _downloaded(name, lambda: torchvision.models.get_model(model, weights="DEFAULT"))
    # A saved student is rebuilt from the plain network, so that one must be the same but for its weights. Where it is
    # not (GoogLeNet and Inception v3 transform their input), the student would silently compute something else.
    same_input = getattr(network, "transform_input", None) == getattr(published, "transform_input", None)
    if not same_input or misfits(network.state_dict(), published.state_dict()):
        raise InputError(
            f"the published weights of {name} do not belong to the network that the name and "
            f"{num_classes or 'the default number of'} classes stand for; leave the number of classes away, take the "
            "network from timm, or give a file with --weights"
        )
    network.load_state_dict(published.state_dict())
    return network


def _timm(model: str, num_classes: int | None, in_channels: int | None, pretrained: bool) -> nn.Module:
    timm, config = _import_timm(), _timm_config(model)
    options = _given(num_classes=num_classes, in_chans=in_channels)
    if not pretrained:
        return _made(f"timm/{model}", lambda: timm.create_model(model, pretrained=False, **options))
    if config is None or not config.has_weights:
        raise InputError(f"there are no published weights for timm/{model}; give a file with --weights")
    return _downloaded(f"timm/{model}", lambda: timm.create_model(model, pretrained=True, **options))


def _import_timm() -> Any:
    try:
        import timm
    except ImportError:
        raise InputError('timm is not installed, which timm/NAME needs; install it: pip install "timm>=1.0"') from None
    return timm


def _timm_config(model: str) -> Any:
    """What timm knows about the published weights of `model`; None where it knows nothing."""
    timm = _import_timm()
    if not timm.is_model(model):
        close = ", ".join(get_close_matches(model, timm.list_models(), 3)) or "resnet18"
        raise InputError(f"timm has no model {model!r}; the closest names are {close}")
    try:
        return timm.models.get_pretrained_cfg(model)
    except RuntimeError as error:
        architecture = model.partition(".")[0]
        known = ", ".join(timm.list_pretrained(f"{architecture}.*")) or architecture
        raise InputError(f"timm has no weights {model!r}; it knows {known}") from error


def _made(name: str, make: Callable[[], nn.Module]) -> nn.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # on how GoogLeNet is initialised
            return make()
    except Exception as error:  # every architecture has limits and exceptions of its own
        raise InputError(
            f"{name} cannot be made ({first_line(error)}); choose another network or other options"
        ) from error


def _downloaded(name: str, make: Callable[[], nn.Module]) -> nn.Module:
    try:
        return make()
    except Exception as error:  # every library and network layer has exceptions of its own
        raise InputError(
            f"the published weights of {name} could not be downloaded ({first_line(error)}); "
            "give a file with --weights FILE"
        ) from error


def _from_file(name: str, num_classes: int | None, in_channels: int | None, pretrained: bool) -> nn.Module:
    file, _, function = name.rpartition(":")
    path = Path(file).resolve()
    if pretrained:
        raise InputError(f"there are no published weights for {name}; give a file with --weights")
    if num_classes is not None or in_channels is not None:
        raise InputError(f"{name} decides on classes and channels itself; leave num_classes and in_channels away")
    if not path.is_file():
        raise InputError(f"{file} does not exist; expected FILE.py:FUNCTION, a function that makes the network")
    # Registered under a private name and left there: dataclasses, type hints and export look a class's module up.
    private = f"_dk2pnet_user_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(private, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[private] = importlib.util.module_from_spec(spec)
    folder = str(path.parent)
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
        if not callable(getattr(module, function, None)):
            raise InputError(f"{file} has no function {function!r}; expected FILE.py:FUNCTION{_functions(module)}")
        made = getattr(module, function)()
    except InputError:
        raise
    except Exception as error:
        sys.modules.pop(private, None)
        raise InputError(
            f"{name} failed ({type(error).__name__}: {first_line(error)}); "
            "expected a function without arguments that makes the network"
        ) from error
    finally:
        if folder in sys.path:
            sys.path.remove(folder)
    if not isinstance(made, nn.Module):
        raise InputError(f"{name} returned {type(made).__name__}; expected a torch.nn.Module")
    return made


def _functions(module: Any) -> str:
    own = [key for key, value in vars(module).items() if callable(value) and value.__module__ == module.__name__]
    return f", it has {', '.join(own[:5])}" if own else ""


# -- what published weights expect -------------------------------------------------------------------------------------


def default_normalization(name: str) -> Normalization | None:
    """What the published weights of torchvision and timm networks expect; None for all others."""
    library, _, model = name.partition("/")
    if ".py:" in name:
        return None
    if library == "torchvision":
        preset = _torchvision_preset(model)
        return Normalization(tuple(preset.mean), tuple(preset.std)) if preset else Normalization.parse("imagenet")
    config = _timm_config(model) if library == "timm" else None
    return Normalization(tuple(config.mean), tuple(config.std)) if config is not None else None


def _torchvision_preset(model: str) -> Any:
    """How the newest published weights were evaluated: `mean`, `std`, `crop_size`; None where there are none."""
    import torchvision

    try:
        preset = torchvision.models.get_model_weights(model).DEFAULT.transforms()
    except (AttributeError, ValueError):  # no such network, or none published
        return None
    return preset if hasattr(preset, "crop_size") else None


def default_input_size(name: str) -> int | None:
    """Side of the images that torchvision and timm networks are published for; None for all others."""
    library, _, model = name.partition("/")
    if ".py:" in name:
        return None
    if library == "torchvision":
        preset = _torchvision_preset(model)
        return int(preset.crop_size[0]) if preset else 224
    config = _timm_config(model) if library == "timm" else None
    return int(config.input_size[-1]) if config is not None else None
