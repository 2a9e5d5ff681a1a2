"""What a user names (a module, a network by name, a folder that dk2pnet wrote, ``FILE.py:FUNCTION``, an ONNX file) as a
Network, with the images that go with it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dk2pnet.data import ImageData, Normalization, has_split, load
from dk2pnet.data.arrays import is_arrays
from dk2pnet.errors import InputError
from dk2pnet.measure import is_classifier
from dk2pnet.networks.named import default_input_size, default_normalization, make_network
from dk2pnet.networks.network import Network
from dk2pnet.networks.onnx.network import OnnxNetwork
from dk2pnet.networks.saved import is_saved, load_student
from dk2pnet.networks.torch.network import TorchNetwork
from dk2pnet.networks.weights import check_finite, load_weights
from dk2pnet.plan import Plan

__all__ = [
    "described",
    "is_onnx_file",
    "load_data",
    "normalization_of",
    "open_network",
    "open_onnx",
    "open_with_data",
    "random_weights",
    "warn_of_other_classes",
]

_log = logging.getLogger(__name__)


def is_onnx_file(model: object) -> bool:
    """Whether a name is that of an ONNX file."""
    return isinstance(model, str | Path) and str(model).lower().endswith(".onnx")


def check_model(model: object) -> None:
    """`InputError` for what is no network of which parts can be replaced."""
    expected = "expected a torch.nn.Module, the name of a network, a folder that dk2pnet wrote, or an .onnx file"
    if isinstance(model, torch.export.ExportedProgram):
        raise InputError(
            "model is an exported program, in which no convolution can be replaced; give the module it was exported "
            "from, or write it as ONNX and give that file"
        )
    if not isinstance(model, str | Path | nn.Module):
        raise InputError(f"model is of type {type(model).__name__}; {expected}")
    if isinstance(model, nn.Module):
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule) and next(module.parameters(), None) is not None:
                part = f"{name!r} of the network" if name else "the network"
                raise InputError(
                    f"{part} is TorchScript, in which no convolution can be replaced; give the module it was made of, "
                    "or write it as ONNX and give that file"
                )


def open_with_data(
    model: str | Path | nn.Module,
    data: str | None,
    *,
    weights: str | None = None,
    normalize: str | Normalization | None = None,
    data_dir: str | None = None,
    input_size: int | None = None,
    classes: int | None = None,
    own: bool = True,
) -> tuple[Network, ImageData | None]:
    """The network, and the training split of the data set `data`, in the size and the colours that the network takes.

    Of an ONNX file no data set is opened where `data` is an ``.npz`` file. Images that are not its `own` lose their
    labels, which mean nothing to the network.
    """
    check_model(model)
    if is_onnx_file(model):
        graph = open_onnx(str(model), normalize)
        network: Network = graph
        if data is None or is_arrays(data):
            return network, None
        size, channels = graph.image_size(input_size)
        normalization_of(graph)
        split = "train" if has_split(data, "train", data_dir) else "test"
        images = load(data, split, data_dir=data_dir, size=size, channels=channels)
        return network, images if own else images.without_labels()
    training = None
    if data is not None:
        sized_by = described(model, weights)
        training = load_data(data, "train", sized_by, data_dir=data_dir, input_size=input_size)
        if training is None:
            raise InputError(
                f"data set {data!r} has no training split, which calibration reads; give a folder train/ of images"
            )
        training = training if own else training.without_labels()
    return open_network(model, weights=weights, normalize=normalize, data=training, classes=classes), training


def open_network(
    model: str | Path | nn.Module,
    *,
    weights: str | None = None,
    normalize: str | Normalization | None = None,
    data: ImageData | None = None,
    classes: int | None = None,
) -> TorchNetwork:
    """A module as it is, a folder that dk2pnet wrote, or a network by name with weights from a file or "pretrained";
    ``FILE.py:FUNCTION`` also with those of the folder that was made of it."""
    given = Normalization.parse(normalize) if isinstance(normalize, str) else normalize
    if isinstance(model, nn.Module):
        bare: nn.Module = model
        while isinstance(bare, nn.DataParallel | nn.parallel.DistributedDataParallel):
            bare = bare.module
        bare = getattr(bare, "_orig_mod", bare)  # of torch.compile
        check_finite(bare)
        return TorchNetwork(bare, None, given)
    name = str(model)
    if is_saved(name):
        if weights is not None:
            raise InputError(f"{name} is a folder with its own weights; leave --weights {weights} away")
        module, plan = load_student(name)
        saved = Normalization.from_dict(plan.normalization) if plan.normalization else None
        check_finite(module)
        return TorchNetwork(module, plan.network, given or saved, plan)
    if classes is None and data is not None and data.labels is not None and weights != "pretrained":
        classes = len(data.classes) if data.classes else int(data.labels.max()) + 1
    is_file = ".py:" in name
    if weights is not None and is_saved(weights):
        if not is_file:
            raise InputError(
                f"weights {weights} are a folder that dk2pnet wrote; give it as the model: --model {weights}"
            )
        module, plan = load_student(weights, factory=lambda: make_network(name))
        saved = Normalization.from_dict(plan.normalization) if plan.normalization else None
        check_finite(module)
        return TorchNetwork(module, {"name": name}, given or saved, plan)
    channels = data.channels if data is not None and not name.startswith("torchvision/") and not is_file else None
    spec: dict[str, Any] = {"name": name}
    if not is_file:
        spec |= {"num_classes": classes, "in_channels": channels}
    module = make_network(**spec, pretrained=weights == "pretrained")
    if weights not in (None, "pretrained"):
        load_weights(module, str(weights))
    check_finite(module)
    return TorchNetwork(module, spec, given or default_normalization(name))


def described(model: str | Path | nn.Module, weights: str | None) -> str | Path | nn.Module:
    """What knows the size of the images: the folder whose weights are given beside a function, else the network."""
    return weights if weights is not None and is_saved(weights) else model


def open_onnx(path: str, normalize: str | Normalization | None = None) -> OnnxNetwork:
    """An ONNX file; its images are normalised as is given, else as the file says."""
    network = OnnxNetwork.read(path)
    given = Normalization.parse(normalize) if isinstance(normalize, str) else normalize
    network.normalization = given or _said_normalization(network, path)
    return network


def normalization_of(network: OnnxNetwork) -> Normalization:
    """How its images are normalised; `InputError` where neither the user nor the file says it."""
    if network.normalization is None:
        raise InputError(
            f"{network.path} does not say how its input is normalised; give it with --normalize (imagenet, ... or "
            "MEAN,.../STD,... of pixels in [0, 1])"
        )
    return network.normalization


def load_data(
    name: str,
    split: str,
    model: str | Path | nn.Module,
    *,
    data_dir: str | None = None,
    input_size: int | None = None,
    channels: int | None = None,
) -> ImageData | None:
    """A split of a data set, sized for the network; None where there is no such split."""
    size: int | tuple[int, int] | None = input_size
    if isinstance(model, str | Path) and is_saved(model):
        shape = Plan.load(Path(model) / "plan.json").input_shape
        if shape:
            channels, size = shape[0], (shape[1], shape[2]) if input_size is None else input_size
    elif isinstance(model, str):
        size = default_input_size(model) if input_size is None else input_size
        channels = 3 if model.startswith("torchvision/") else channels
    if not has_split(name, split, data_dir):
        return None
    return load(name, split, data_dir=data_dir, size=size, channels=channels)


def random_weights(model: str | Path | nn.Module, weights: str | None) -> str:
    """What is to be said of a network that was asked for by its name alone; "" of all others."""
    name = str(model)
    known = isinstance(model, nn.Module) or weights is not None or is_onnx_file(model) or is_saved(name)
    if known or ".py:" in name:  # whose function may have loaded some
        return ""
    return f"{name} has random weights, as no --weights are given: what it answers means nothing"


def warn_of_other_classes(data: ImageData, outputs: list[Tensor]) -> None:
    """Say where the network knows more classes than the data, so that a class may have another number there."""
    if data.labels is not None and data.classes and is_classifier(outputs) and len(data.classes) < outputs[0].shape[1]:
        _log.warning(
            "data set %r has %d classes (%s, ...) and the network answers with %d: unless it was trained on these "
            "class numbers, an accuracy says nothing",
            data.name,
            len(data.classes),
            ", ".join(data.classes[:4]),
            outputs[0].shape[1],
        )


def _said_normalization(network: OnnxNetwork, path: str) -> Normalization | None:
    said = {entry.key: entry.value for entry in network.graph.proto.metadata_props}
    text = said.get("normalization", "null")
    try:
        found = json.loads(text)
    except ValueError as error:
        raise InputError(f"{path} holds a damaged normalisation ({text[:40]!r}); give it with --normalize") from error
    return None if found is None else Normalization.from_dict(found)
