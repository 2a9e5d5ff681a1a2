"""Turns what a user names (a network, weights, data) into objects; shared by all pipelines."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dk2pnet.data import AUGMENTATIONS, ImageData, Normalization, has_split, load
from dk2pnet.deploy.onnx import read_metadata
from dk2pnet.errors import InputError
from dk2pnet.measure import is_classifier
from dk2pnet.models import check_finite, default_input_size, default_normalization, load_weights, make_network
from dk2pnet.plan import Plan
from dk2pnet.processes import join, processor
from dk2pnet.student import is_saved, load_student
from dk2pnet.training.checkpoint import random_state, set_random_state

__all__ = [
    "Network",
    "Progress",
    "augmentation_for",
    "batch_size_for",
    "check_augment",
    "environment",
    "left_as_found",
    "load_data",
    "load_test",
    "onnx_normalization",
    "open_network",
    "pick_device",
    "silent",
    "warn_of_other_classes",
]

_log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]  # what is being done, how much of it is done, of how much (0: unknown)

_DIGITS = {"digits", "mnist", "svhn", "svhn_10k"}


@contextmanager
def left_as_found() -> Iterator[None]:
    """The states of the global random generators and PyTorch's number of threads are put back after the block."""
    threads, state = torch.get_num_threads(), random_state()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        set_random_state(state)


def silent(what: str, done: int, total: int) -> None:
    """No progress shown."""


@dataclass
class Network:
    """A network with its weights: `spec` are the arguments of `make_network` (None for a Python object)."""

    model: nn.Module
    spec: dict[str, Any] | None
    normalization: Normalization | None
    plan: Plan | None = None

    @property
    def forms(self) -> dict[str, str]:
        """The emitted forms of its own DK layers, where it was compressed before."""
        return self.plan.forms if self.plan is not None else {}


def open_network(
    model: str | nn.Module,
    *,
    weights: str | None = None,
    normalize: str | Normalization | None = None,
    data: ImageData | None = None,
    classes: int | None = None,
) -> Network:
    """A module as it is, a folder that dk2pnet wrote, or a network by name with weights from a file or "pretrained"."""
    given = Normalization.parse(normalize) if isinstance(normalize, str) else normalize
    if isinstance(model, nn.Module):
        while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        model = getattr(model, "_orig_mod", model)  # of torch.compile
        check_finite(model)
        return Network(model, None, given)
    if is_saved(model):
        if weights is not None:
            raise InputError(f"{model} is a folder with its own weights; leave --weights {weights} away")
        module, plan = load_student(model)
        saved = Normalization.from_dict(plan.normalization) if plan.normalization else None
        check_finite(module)
        return Network(module, plan.network, given or saved, plan)
    if classes is None and data is not None and data.labels is not None and weights != "pretrained":
        classes = len(data.classes) if data.classes else int(data.labels.max()) + 1
    is_file = ".py:" in model
    channels = data.channels if data is not None and not model.startswith("torchvision/") and not is_file else None
    spec: dict[str, Any] = {"name": model}
    if not is_file:
        spec |= {"num_classes": classes, "in_channels": channels}
    module = make_network(**spec, pretrained=weights == "pretrained")
    if weights not in (None, "pretrained"):
        load_weights(module, str(weights))
    check_finite(module)
    return Network(module, spec, given or default_normalization(model))


def load_data(
    name: str,
    split: str,
    model: str | nn.Module,
    *,
    data_dir: str | None = None,
    input_size: int | None = None,
    channels: int | None = None,
) -> ImageData | None:
    """A split of a data set, sized for the network; None where there is no such split."""
    size: int | tuple[int, int] | None = input_size
    if isinstance(model, str) and is_saved(model):
        shape = Plan.load(Path(model) / "plan.json").input_shape
        if shape:
            channels, size = shape[0], (shape[1], shape[2]) if input_size is None else input_size
    elif isinstance(model, str):
        size = default_input_size(model) if input_size is None else input_size
        channels = 3 if model.startswith("torchvision/") else channels
    if not has_split(name, split, data_dir):
        return None
    return load(name, split, data_dir=data_dir, size=size, channels=channels)


def load_test(name: str, training: ImageData, data_dir: str | None = None) -> ImageData | None:
    """The test split in the size, the colours and the class numbers of the training split; None where there is none."""
    if not has_split(name, "test", data_dir):
        return None
    test = load(name, "test", data_dir=data_dir, size=training.size, channels=training.channels)
    return test.numbered_like(training)


def warn_of_other_classes(data: ImageData, outputs: list[Tensor]) -> None:
    """Say where the network knows more classes than the data, so that a class may have another number there."""
    if data.classes and is_classifier(outputs) and len(data.classes) < outputs[0].shape[1]:
        _log.warning(
            "data set %r has %d classes (%s, ...) and the network answers with %d: unless it was trained on these "
            "class numbers, an accuracy says nothing",
            data.name,
            len(data.classes),
            ", ".join(data.classes[:4]),
            outputs[0].shape[1],
        )


def onnx_normalization(path: str | Path, given: str | None) -> Normalization:
    """How images are normalised for an ONNX file: as `given`, else as the file says."""
    if given is not None:
        return Normalization.parse(given)
    text = read_metadata(path).get("normalization", "null")
    try:
        if (found := json.loads(text)) is not None:
            return Normalization.from_dict(found)
    except ValueError as error:
        raise InputError(f"{path} holds a damaged normalisation ({text[:40]!r}); give it with --normalize") from error
    raise InputError(
        f"{path} does not say how its input is normalised; give it with --normalize (imagenet, ... or MEAN,.../STD,... "
        "of pixels in [0, 1])"
    )


def batch_size_for(size: Iterable[int]) -> int:
    """Images per forward pass where nobody trains: bounded activations at 224 x 224, few calls at 32 x 32."""
    return 128 if max(size) <= 64 else 16


def augmentation_for(name: str) -> str:
    """Digits, on the hub or in a folder of such a name, are never mirrored."""
    return "digits" if Path(name).name.lower() in _DIGITS else "natural"


def check_augment(augment: str | None) -> None:
    """`InputError` for what is no augmentation."""
    if augment is not None and augment not in AUGMENTATIONS:
        raise InputError(f"augmentation is {augment!r}; expected one of {', '.join(AUGMENTATIONS)}")


def pick_device(device: str, threads: int | None = None) -> torch.device:
    """``auto`` takes a GPU where there is one (each of several processes its own); `threads` sets PyTorch's threads."""
    if threads is not None:
        if threads < 1:
            raise InputError(f"threads is {threads}; expected 1 or more")
        torch.set_num_threads(threads)
    if (own := join(device)) is not None:
        return own
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {device!r} cannot be used ({reason}); give --device cpu or leave it away") from error
    return chosen


def environment(device: torch.device) -> dict[str, dict[str, Any]]:
    """Versions and hardware, for the report."""
    versions: dict[str, Any] = {"python": platform.python_version()}
    for package in ("dk2pnet", "torch", "onnx", "onnxruntime", "datasets"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    hardware: dict[str, Any] = {"processor": processor(), "threads": torch.get_num_threads(), "device": str(device)}
    if device.type == "cuda":
        hardware["gpu"] = torch.cuda.get_device_name(device)
    return {"versions": versions, "hardware": hardware}
