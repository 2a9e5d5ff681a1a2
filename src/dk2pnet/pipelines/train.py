"""Train a network by name from scratch, or go on from weights, and write an OUT folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dk2pnet.data import Normalization, split_training
from dk2pnet.errors import InputError
from dk2pnet.measure import accuracy, macs, parameters, predict
from dk2pnet.pipelines.folders import check_out, new_folder, write_json, write_recipe
from dk2pnet.pipelines.inputs import (
    Progress,
    augmentation_for,
    batch_size_for,
    environment,
    load_data,
    open_network,
    pick_device,
    silent,
)
from dk2pnet.plan import Plan
from dk2pnet.student import save_student
from dk2pnet.training.trainer import TrainingOptions, train

__all__ = ["train_network"]


def train_network(
    model: str,
    data: str,
    out: str | Path,
    *,
    weights: str | None = None,
    normalize: str | None = None,
    data_dir: str | None = None,
    input_size: int | None = None,
    classes: int | None = None,
    options: TrainingOptions | None = None,
    device: str = "auto",
    threads: int | None = None,
    overwrite: bool = False,
    command: str = "",
    recipe: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Train on nine tenths of the training split; returns the metrics, with validation and test accuracy.

    Without `normalize` the images' own mean and standard deviation are measured and saved with the network.
    """
    options = options or TrainingOptions()
    check_out(out, overwrite)
    chosen = pick_device(device, threads)
    training = load_data(data, "train", model, data_dir=data_dir, input_size=input_size)
    if training is None or training.labels is None:
        raise InputError(f"data set {data!r} has no labelled training split, which training reads; give one that has")
    kept, validation = split_training(training)
    torch.manual_seed(options.seed)
    network = open_network(model, weights=weights, normalize=normalize, data=training, classes=classes)
    norm = network.normalization or Normalization.measure(kept)
    norm.check(training.channels)
    net = network.model.to(chosen)
    example = norm.apply(training.subset([0]).images).to(chosen)
    augment = augmentation_for(data)

    def epoch_of(epoch: int) -> Iterable[tuple[Tensor, Tensor | None]]:
        return kept.batches(options.batch_size, norm, augment=augment, shuffle=True, seed=options.seed, epoch=epoch)

    last = train(
        net,
        epoch_of,
        options,
        example=example,
        steps_per_epoch=-(-len(kept) // options.batch_size),
        device=chosen,
        progress=lambda step, total, terms: progress(f"training, loss {terms['loss']:.3f}", step, total),
    )
    size = batch_size_for(training.size)
    test = load_data(data, "test", model, data_dir=data_dir, input_size=input_size)
    figures: dict[str, Any] = {
        "validation_accuracy": accuracy(predict(net, validation.batches(size, norm), chosen)),
        "accuracy": _test_accuracy(net, test, size, norm, chosen),
        "parameters": parameters(net),
        "macs": macs(net, example),
    }
    images = {"train": len(kept), "validation": len(validation), "test": len(test) if test is not None else 0}
    run = {"command": command, "seed": options.seed, "images": images, "last_epoch_loss": last, **environment(chosen)}
    metrics = {"network": figures, "run": run}
    with new_folder(out, overwrite) as folder:
        plan = network.plan or Plan()
        plan.network, plan.input_shape, plan.normalization = network.spec, list(example.shape[1:]), norm.to_dict()
        save_student(net.cpu(), plan, folder)
        write_json(folder / "metrics.json", metrics)
        write_recipe(folder / "recipe.yaml", "train", recipe or {})
    return metrics


def _test_accuracy(net: nn.Module, test: Any, size: int, norm: Normalization, device: torch.device) -> float | None:
    if test is None or test.labels is None:
        return None
    return accuracy(predict(net, test.batches(size, norm), device))
