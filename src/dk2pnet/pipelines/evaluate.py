"""Accuracy and size of a network: by name with weights, from an OUT folder, or from an ONNX file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dk2pnet.data import ImageData, Normalization
from dk2pnet.deploy.onnx import read_metadata, run_onnx, session
from dk2pnet.errors import InputError
from dk2pnet.measure import Predictions, accuracy, macs, parameters, predict
from dk2pnet.pipelines.inputs import Progress, batch_size_for, load_data, open_network, pick_device, silent

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
    if model.endswith(".onnx"):
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
    saved = json.loads(read_metadata(model).get("normalization", "null"))
    shape = runner.get_inputs()[0].shape
    if input_size is None and isinstance(shape[-1], int):
        input_size = shape[-1]
    fixed, channels = (each if isinstance(each, int) else None for each in shape[:2])
    found = load_data(data, split, "", data_dir=data_dir, input_size=input_size, channels=channels)
    images = _labelled(found, data, split)
    if normalize is None and saved is None:
        raise InputError(f"{model} does not say how its input is normalised; give it with --normalize")
    norm = Normalization.parse(normalize) if normalize else Normalization.from_dict(saved)
    rows, labels, done = [], [], 0
    for x, y in images.batches(fixed or batch_size or batch_size_for(images.size), norm):
        full = x if fixed is None else torch.cat([x, x.new_zeros(fixed - len(x), *x.shape[1:])])
        rows.append(torch.from_numpy(run_onnx(runner, full)[0])[: len(x)])
        labels.append(y)
        done += len(x)
        progress("evaluating in ONNX Runtime", done, len(images))
    known: list[Tensor] = [y for y in labels if y is not None]
    result = Predictions([torch.cat(rows)], torch.cat(known))
    return {"accuracy": accuracy(result), "images": done, "bytes": Path(model).stat().st_size}


def _labelled(images: ImageData | None, data: str, split: str) -> ImageData:
    if images is None:
        raise InputError(f"data set {data!r} has no split {split!r}; give another --split")
    if images.labels is None:
        raise InputError(f"data set {data!r} has no labels, which accuracy needs; give labelled images")
    return images
