"""Train a network by name, or a student beside its teacher, and write an OUT folder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dk2pnet.data import ImageData, Normalization, split_training
from dk2pnet.data.images import batch_size_for, check_augment
from dk2pnet.data.sources import load_test
from dk2pnet.errors import InputError
from dk2pnet.layer import set_form
from dk2pnet.measure import accuracy, is_classifier, macs, parameters, predict
from dk2pnet.networks.open import load_data, open_network
from dk2pnet.networks.saved import save_student
from dk2pnet.plan import Plan
from dk2pnet.processes import is_main
from dk2pnet.run.device import environment, pick_device
from dk2pnet.run.out_folder import check_out, keep_logs, new_folder, unfinished, write_json, write_onnx, write_recipe
from dk2pnet.run.progress import Progress, silent
from dk2pnet.training.fit import fit
from dk2pnet.training.trainer import TrainingOptions

__all__ = ["train_network"]

_log = logging.getLogger(__name__)


def train_network(
    model: str,
    data: str,
    out: str | Path,
    *,
    teacher: str | None = None,
    teacher_weights: str | None = None,
    weights: str | None = None,
    normalize: str | None = None,
    data_dir: str | None = None,
    input_size: int | None = None,
    classes: int | None = None,
    options: TrainingOptions | None = None,
    images: int | None = None,
    augment: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    overwrite: bool = False,
    command: str = "",
    recipe: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Train on nine tenths of the training split; returns the metrics, with validation and test accuracy.

    `teacher` (a name with `teacher_weights`, or an OUT folder) teaches by the method of the options. Without
    `normalize` the images are normalised as a network with weights expects, as the teacher does for one without, else
    by their own mean and standard deviation; that is saved with the network, and a teacher that expects something else
    is given that. `images`: so many of the training split, spread evenly over it, the same in every call, None for all.
    `augment`: ``natural``, ``digits`` or ``none``; None for what suits the data set's name.
    Checkpoints and logs lie in ``OUT.unfinished`` until the run is done; the same call goes on from there.
    """
    options = options or TrainingOptions()
    check_augment(augment)
    check_out(out, overwrite)
    chosen = pick_device(device, threads)
    training = load_data(data, "train", model, data_dir=data_dir, input_size=input_size)
    if training is None or (training.labels is None and teacher is None):
        raise InputError(f"data set {data!r} has no labelled training split, which training reads; give one that has")
    if images is not None and images < 2:
        raise InputError(f"{images} training images were asked for; expected 2 or more, as a tenth only validates")
    if images is not None:
        fewer = min(images, len(training))
        training = training.subset(torch.arange(fewer) * len(training) // fewer)
    kept, validation = split_training(training)
    torch.manual_seed(options.seed)
    network = open_network(model, weights=weights, normalize=normalize, data=training, classes=classes)
    taught_by = None
    if teacher is not None:
        if options.method == "labels":
            raise InputError("method 'labels' uses no teacher; leave --teacher away, or use --method kd")
        taught_by = open_network(teacher, weights=teacher_weights, normalize=normalize, data=training, classes=classes)
        if taught_by.plan is None and teacher_weights is None:
            raise InputError(f"teacher {teacher!r} has no weights; give its file (or 'pretrained') as teacher weights")
    elif options.method not in (None, "labels"):
        raise InputError(f"method {options.method!r} needs a teacher; give one with --teacher")
    elif teacher_weights is not None:
        raise InputError(f"teacher weights {teacher_weights} were given without a teacher; name the network too")
    expected = [network.normalization, taught_by.normalization if taught_by else None]
    if network.plan is None and weights is None:
        expected.reverse()  # a student without weights expects nothing of its own
    norm = expected[0] or expected[1] or Normalization.measure(kept)
    norm.check(training.channels)
    if taught_by is not None and taught_by.normalization not in (None, norm):
        taught_by.model.register_forward_pre_hook(_from_to(norm, taught_by.normalization))
    test = load_test(data, training, data_dir)  # now, as what is wrong with it must not cost the training
    net = network.model.to(chosen)
    example = norm.apply(training.subset([0]).images).to(chosen)
    # How it runs is no part of what is asked: a run may go on with other threads, or without the GPU that it began on.
    how = ("checkpoint_every", "threads", "device")
    asked = {key: value for key, value in (recipe or {}).items() if key not in how}
    with unfinished(out, overwrite, {"command": "train", **asked}) as folder:
        last = fit(
            net,
            kept,
            options,
            example=example,
            teacher=taught_by.model if taught_by else None,
            name=data,
            normalization=norm,
            augment=augment,
            validation=validation,
            device=chosen,
            folder=folder,
            progress=progress,
        )
        if not is_main():
            return {}
        set_form(net, "folded")
        figures: dict[str, Any] = {
            "validation_accuracy": _accuracy(net, validation, norm, chosen),
            "accuracy": _accuracy(net, test, norm, chosen),
            "parameters": parameters(net),
            "macs": macs(net, example),
        }
        images = {"train": len(kept), "validation": len(validation), "test": len(test) if test is not None else 0}
        run = {"command": command, "seed": options.seed, "images": images, "last_epoch_loss": last}
        metrics: dict[str, Any] = {"network": figures, "run": run | environment(chosen)}
        if taught_by is not None:
            metrics["teacher"] = {
                "accuracy": _accuracy(taught_by.model, test, norm, chosen),
                "parameters": parameters(taught_by.model),
                "macs": macs(taught_by.model, example),
            }
        with new_folder(out, overwrite) as new:
            plan = network.plan or Plan()
            plan.network, plan.input_shape, plan.normalization = network.spec, list(example.shape[1:]), norm.to_dict()
            set_form(net, "branches")
            net.cpu().eval()
            try:
                figures["onnx_difference"] = write_onnx(net, plan, example.cpu(), new / "model.onnx")
            except InputError as error:  # hours of training are worth keeping without it
                _log.warning("no model.onnx was written: %s", error)
                (new / "model.onnx").unlink(missing_ok=True)
            save_student(net, plan, new)
            write_json(new / "metrics.json", metrics)
            write_recipe(new / "recipe.yaml", "train", recipe or {})
            keep_logs(folder, new)
    return metrics


def _from_to(given: Normalization, expected: Normalization) -> Callable[[nn.Module, tuple[Tensor, ...]], Tensor]:
    """Before a network's forward pass: images normalised as `given` become normalised as `expected`."""

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        mean, std, to_mean, to_std = (
            torch.tensor(numbers, dtype=args[0].dtype, device=args[0].device).view(-1, 1, 1)
            for numbers in (given.mean, given.std, expected.mean, expected.std)
        )
        return (args[0] * std + (mean - to_mean)) / to_std

    return hook


def _accuracy(net: nn.Module, images: ImageData | None, norm: Normalization, device: torch.device) -> float | None:
    if images is None or images.labels is None:
        return None
    predictions = predict(net, images.batches(batch_size_for(images.size), norm), device)
    return accuracy(predictions) if is_classifier(predictions.outputs) else None
