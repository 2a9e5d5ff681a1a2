"""Accuracy and size of a network: by name with weights, from an OUT folder, or from an ONNX file."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from dk2pnet.answers import Predictions, predict
from dk2pnet.data import ImageData, has_split, load
from dk2pnet.data.images import batch_size_for
from dk2pnet.errors import InputError
from dk2pnet.measure import macs, parameters
from dk2pnet.networks.open import (
    described,
    is_onnx_file,
    load_data,
    normalization_of,
    open_network,
    open_onnx,
    random_weights,
    warn_of_other_classes,
)
from dk2pnet.options import EvaluateOptions
from dk2pnet.run.run import Run
from dk2pnet.tasks import accuracy

__all__ = ["evaluate"]

_log = logging.getLogger(__name__)


def evaluate(
    model: str, data: str, options: EvaluateOptions | None = None, *, run: Run | None = None, **flat: Any
) -> dict[str, Any]:
    """Returns accuracy (%), number of images, and for PyTorch networks parameters and MACs of one image.

    `options`, `flat`: an `EvaluateOptions`, or its fields by name; docs/options.md lists them.
    """
    chosen = EvaluateOptions.of(options, flat)
    if is_onnx_file(model):
        chosen.check_for_onnx()
    with (run or Run()).at_work(chosen.device, chosen.threads) as work:
        return (_of_onnx if is_onnx_file(model) else _of_torch)(model, data, chosen, work)


def _of_torch(model: str, data: str, chosen: EvaluateOptions, run: Run) -> dict[str, Any]:
    sized_by = described(model, chosen.weights)
    found = load_data(data, chosen.split, sized_by, data_dir=chosen.data_dir, input_size=chosen.input_size)
    images = _labelled(found, data, chosen.split)
    network = open_network(
        model, weights=chosen.weights, normalize=chosen.normalize, data=images, classes=chosen.classes
    )
    if random := random_weights(model, chosen.weights):
        _log.warning("%s", random)
    if network.normalization is None:
        raise InputError(
            "the normalisation that the network was trained with is not known; give it with --normalize "
            "(imagenet, cifar10, ... or MEAN,.../STD,...)"
        )
    net = network.model.to(run.device)
    batches = images.batches(chosen.batch_size or batch_size_for(images.size), network.normalization)
    result = predict(net, batches, run.device, run.says("evaluating", len(images)))
    warn_of_other_classes(images, result.outputs)
    example = network.normalization.apply(images.subset([0]).images).to(run.device)
    figures = {"accuracy": accuracy(result), "images": len(result)}
    return figures | {"parameters": parameters(net), "macs": macs(net, example)}


def _of_onnx(model: str, data: str, chosen: EvaluateOptions, run: Run) -> dict[str, Any]:
    network = open_onnx(model, chosen.normalize)
    normalization = normalization_of(network)
    size, channels = network.image_size(chosen.input_size)
    found = None
    if has_split(data, chosen.split, chosen.data_dir):
        found = load(data, chosen.split, data_dir=chosen.data_dir, size=size, channels=channels)
    images = _labelled(found, data, chosen.split)
    fixed = network.batching.size if network.batching.fixed else None
    batches = images.batches(fixed or chosen.batch_size or batch_size_for(images.size), normalization)
    answers = network.predict(batches, run, "evaluating in ONNX Runtime", len(images))
    result = Predictions(answers.outputs[:1], answers.labels)  # others are auxiliary heads
    warn_of_other_classes(images, result.outputs)
    return {"accuracy": accuracy(result), "images": len(answers), "bytes": Path(model).stat().st_size}


def _labelled(images: ImageData | None, data: str, split: str) -> ImageData:
    if images is None:
        raise InputError(f"data set {data!r} has no split {split!r}; give another --split")
    if images.labels is None:
        raise InputError(f"data set {data!r} has no labels, which accuracy needs; give labelled images")
    return images
