"""Turns what a user names (a network, weights, data) into objects; shared by all pipelines."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dk2pnet.data import ImageData, Normalization, has_split, load
from dk2pnet.deploy.export import read_metadata
from dk2pnet.errors import InputError
from dk2pnet.measure import is_classifier
from dk2pnet.networks.named import default_input_size, default_normalization, make_network
from dk2pnet.networks.saved import is_saved, load_student
from dk2pnet.networks.weights import check_finite, load_weights
from dk2pnet.plan import Plan

__all__ = ["Network", "load_data", "onnx_normalization", "open_network", "warn_of_other_classes"]

_log = logging.getLogger(__name__)


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
