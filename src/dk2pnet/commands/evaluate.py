"""Accuracy and size of a network: by name with weights, from an OUT folder, or from an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dk2pnet.data import ImageData, has_split, load
from dk2pnet.data.images import batch_size_for
from dk2pnet.deploy.runtimes.onnxruntime import run_onnx, session
from dk2pnet.errors import InputError, first_line
from dk2pnet.measure import Predictions, accuracy, macs, parameters, predict
from dk2pnet.networks.open import load_data, onnx_normalization, open_network, warn_of_other_classes
from dk2pnet.run.device import pick_device
from dk2pnet.run.progress import Progress, silent

__all__ = ["evaluate"]


def evaluate(
    model: str,
    data: str,
    *,
    split: str = "test",
    weights: str | None = None,
    normalize: str | None = None,
    data_dir: str | None = None,
    input_size: int | None = None,
    classes: int | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    threads: int | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Returns accuracy (%), number of images, and for PyTorch networks parameters and MACs of one image."""
    chosen = pick_device(device, threads)
    if model.lower().endswith(".onnx"):
        return _evaluate_onnx(model, data, split, normalize, data_dir, input_size, batch_size, threads, progress)
    images = _labelled(load_data(data, split, model, data_dir=data_dir, input_size=input_size), data, split)
    network = open_network(model, weights=weights, normalize=normalize, data=images, classes=classes)
    if network.normalization is None:
        raise InputError(
            "the normalisation that the network was trained with is not known; give it with --normalize "
            "(imagenet, cifar10, ... or MEAN,.../STD,...)"
        )
    net = network.model.to(chosen)
    batches = images.batches(batch_size or batch_size_for(images.size), network.normalization)
    result = predict(net, batches, chosen, lambda done: progress("evaluating", done, len(images)))
    warn_of_other_classes(images, result.outputs)
    example = network.normalization.apply(images.subset([0]).images).to(chosen)
    return {
        "accuracy": accuracy(result),
        "images": len(result),
        "parameters": parameters(net),
        "macs": macs(net, example),
    }


def _evaluate_onnx(
    model: str,
    data: str,
    split: str,
    normalize: str | None,
    data_dir: str | None,
    input_size: int | None,
    batch_size: int | None,
    threads: int | None,
    progress: Progress,
) -> dict[str, Any]:
    runner = session(model, threads)
    norm = onnx_normalization(model, normalize)
    shape = runner.get_inputs()[0].shape
    if len(runner.get_inputs()) != 1 or len(shape) != 4:
        raise InputError(f"{model} does not take images as its one input (B, C, H, W); give a network that does")
    fixed, channels, *sides = (each if isinstance(each, int) else None for each in shape)
    if input_size is not None:
        sides = [input_size, input_size]
    size = (sides[0] or sides[1], sides[1] or sides[0]) if any(sides) else None
    found = None
    if has_split(data, split, data_dir):
        found = load(data, split, data_dir=data_dir, size=size, channels=channels)
    images = _labelled(found, data, split)
    rows, labels, done = [], [], 0
    for x, y in images.batches(fixed or batch_size or batch_size_for(images.size), norm):
        full = x if fixed is None else torch.cat([x, x.new_zeros(fixed - len(x), *x.shape[1:])])
        try:
            answers = run_onnx(runner, full)[0]
        except Exception as error:  # whatever ONNX Runtime says against the inputs
            raise InputError(
                f"{model} cannot run images of shape {tuple(x.shape[1:])} ({first_line(error)}); "
                "give images that fit (--input-size)"
            ) from error
        if not isinstance(answers, np.ndarray) or answers.dtype.kind not in "fiu":
            raise InputError(f"the first output of {model} is no tensor of numbers; give a network with class scores")
        rows.append(torch.from_numpy(answers)[: len(x)])
        labels.append(y)
        done += len(x)
        progress("evaluating in ONNX Runtime", done, len(images))
    known: list[Tensor] = [y for y in labels if y is not None]
    result = Predictions([torch.cat(rows)], torch.cat(known))
    warn_of_other_classes(images, result.outputs)
    return {"accuracy": accuracy(result), "images": done, "bytes": Path(model).stat().st_size}


def _labelled(images: ImageData | None, data: str, split: str) -> ImageData:
    if images is None:
        raise InputError(f"data set {data!r} has no split {split!r}; give another --split")
    if images.labels is None:
        raise InputError(f"data set {data!r} has no labels, which accuracy needs; give labelled images")
    return images
