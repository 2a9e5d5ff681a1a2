"""Train a network by name, or a student beside its teacher, and write an OUT folder."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dk2pnet.answers import predict
from dk2pnet.data import ImageData, Normalization, split_training
from dk2pnet.data.images import batch_size_for
from dk2pnet.data.sources import load_test
from dk2pnet.data.splits import identity_of
from dk2pnet.errors import InputError
from dk2pnet.layer import set_form
from dk2pnet.measure import is_classifier, macs, parameters
from dk2pnet.networks.open import described, load_data, open_network
from dk2pnet.networks.saved import save_student
from dk2pnet.networks.torch.network import TorchNetwork, write_onnx
from dk2pnet.options import TrainOptions, recipe_of
from dk2pnet.plan import Plan
from dk2pnet.processes import is_main
from dk2pnet.run.device import environment
from dk2pnet.run.out_folder import check_out, new_folder, write_json, write_recipe
from dk2pnet.run.run import Run
from dk2pnet.run.unfinished import keep_logs, unfinished
from dk2pnet.tasks import accuracy
from dk2pnet.training.fit import Source, fit
from dk2pnet.training.trainer import TrainingOptions

__all__ = ["train"]

_log = logging.getLogger(__name__)


def train(
    model: str,
    data: str,
    options: TrainOptions | None = None,
    *,
    out: str | Path,
    run: Run | None = None,
    **flat: Any,
) -> dict[str, Any]:
    """Train on nine tenths of the training split; returns the metrics, with validation and test accuracy.

    Example::

        dk2pnet.train("resnet20", "cifar10", out="teacher", epochs=40)
        dk2pnet.train("dk2pnet-20x32", "cifar10", out="student", teacher="teacher", epochs=40)

    Without `normalize` the images are normalised as a network with weights expects, as the teacher does for one
    without, else by their own mean and standard deviation; that is saved with the network, and a teacher that expects
    something else is given that. Checkpoints and logs lie in ``OUT.unfinished`` until the run is done; the same call
    goes on from there. `options`, `flat`: a `TrainOptions`, or its fields by name; docs/options.md lists them.

    Raises
    ------
    InputError
        One sentence that says what was given, what was expected and what to do.
    """
    chosen = TrainOptions.of(options, flat)
    given = TrainingOptions.of(chosen)
    check_out(out, chosen.overwrite)
    with (run or Run()).at_work(chosen.device, chosen.threads, chosen.seed) as work:
        images = _images(model, data, chosen)
        kept, validation = split_training(images)
        unseen = identity_of(validation)
        if chosen.images is not None:  # out of either part, so that what validates is the same for any number
            tenth = max(chosen.images // 10, 1)
            kept, validation = _some(kept, chosen.images - tenth), _some(validation, tenth)
        torch.manual_seed(chosen.seed)
        network, teacher, norm = _networks(model, images, kept, chosen)
        before = network.plan.unseen if network.plan is not None else None
        new_to_it = before == unseen or (network.plan is None and chosen.weights is None)
        test = load_test(data, images, chosen.data_dir)  # now, as what is wrong with it must not cost the training
        net = network.model.to(work.device)
        example = norm.apply(images.subset([0]).images).to(work.device)
        recipe = recipe_of({"model": model, "data": data}, chosen)
        # How it runs is no part of what is asked: a run may go on with other threads, or without its GPU.
        asked = {key: value for key, value in recipe.items() if key not in ("checkpoint_every", "threads", "device")}
        asked |= {"digest_of_images": identity_of(kept)}
        with unfinished(out, chosen.overwrite, {"command": "train", **asked}) as folder:
            source = Source(kept, data, norm, chosen.augment, validation=validation)
            taught_by = teacher.model if teacher is not None else None
            last = fit(net, source, given, work, example=example, teacher=taught_by, folder=folder)
            if not is_main():
                return {}
            set_form(net, "folded")
            figures: dict[str, Any] = {
                "validation_accuracy": _accuracy(net, validation, norm, work),
                "accuracy": _accuracy(net, test, norm, work),
                "parameters": parameters(net),
                "macs": macs(net, example),
            }
            counts = {"train": len(kept), "validation": len(validation), "test": len(test) if test is not None else 0}
            facts = {"command": work.command or "dk2pnet.train(...)", "seed": chosen.seed, "images": counts}
            facts["last_epoch_loss"] = last
            metrics: dict[str, Any] = {"network": figures, "run": facts | environment(work.device)}
            if teacher is not None:
                metrics["teacher"] = {
                    "accuracy": _accuracy(teacher.model, test, norm, work),
                    "parameters": parameters(teacher.model),
                    "macs": macs(teacher.model, example),
                }
            with new_folder(out, chosen.overwrite) as new:
                plan = network.plan or Plan()
                plan.network, plan.input_shape = network.spec, list(example.shape[1:])
                plan.normalization, plan.unseen = norm.to_dict(), unseen if new_to_it else None
                set_form(net, "branches")
                net.cpu().eval()
                try:
                    seen = [x for x, _ in islice(validation.batches(16, norm), 4)]
                    difference = write_onnx(net, plan, example.cpu(), new / "model.onnx", seen)
                    figures["onnx_difference"] = difference
                except InputError as error:  # hours of training are worth keeping without it
                    _log.warning("no model.onnx was written: %s", error)
                    (new / "model.onnx").unlink(missing_ok=True)
                save_student(net, plan, new)
                write_json(new / "metrics.json", metrics)
                write_recipe(new / "recipe.yaml", "train", recipe)
                keep_logs(folder, new)
    return metrics


def _images(model: str, data: str, chosen: TrainOptions) -> ImageData:
    """The training split."""
    sized_by = described(model, chosen.weights)
    found = load_data(data, "train", sized_by, data_dir=chosen.data_dir, input_size=chosen.input_size)
    if found is None or (found.labels is None and chosen.teacher is None):
        raise InputError(f"data set {data!r} has no labelled training split, which training reads; give one that has")
    if chosen.images is not None and chosen.images < 2:
        raise InputError(
            f"{chosen.images} training images were asked for; expected 2 or more, as a tenth only validates"
        )
    return found


def _some(images: ImageData, count: int) -> ImageData:
    """So many of them, or all: spread evenly, the same in every call."""
    count = min(count, len(images))
    return images.subset(torch.arange(count) * len(images) // count)


def _networks(
    model: str, images: ImageData, kept: ImageData, chosen: TrainOptions
) -> tuple[TorchNetwork, TorchNetwork | None, Normalization]:
    """The network, its teacher, and how the images are normalised for both."""
    named = {"normalize": chosen.normalize, "data": images, "classes": chosen.classes}
    network = open_network(model, weights=chosen.weights, **named)
    teacher = None
    if chosen.teacher is not None:
        if chosen.method == "labels":
            raise InputError("method 'labels' uses no teacher; leave --teacher away, or use --method kd")
        teacher = open_network(chosen.teacher, weights=chosen.teacher_weights, **named)
        if teacher.plan is None and chosen.teacher_weights is None:
            raise InputError(
                f"teacher {chosen.teacher!r} has no weights; give its file (or 'pretrained') as teacher weights"
            )
    elif chosen.method not in (None, "labels"):
        raise InputError(f"method {chosen.method!r} needs a teacher; give one with --teacher")
    elif chosen.teacher_weights is not None:
        raise InputError(f"teacher weights {chosen.teacher_weights} were given without a teacher; name the network too")
    expected = [network.normalization, teacher.normalization if teacher else None]
    if network.plan is None and chosen.weights is None:
        expected.reverse()  # a student without weights expects nothing of its own
    norm = expected[0] or expected[1] or Normalization.measure(kept)
    norm.check(images.channels)
    if teacher is not None and teacher.normalization not in (None, norm):
        teacher.model.register_forward_pre_hook(_from_to(norm, teacher.normalization))
    return network, teacher, norm


def _from_to(given: Normalization, expected: Normalization) -> Callable[[nn.Module, tuple[Tensor, ...]], Tensor]:
    """Before a network's forward pass: images normalised as `given` become normalised as `expected`."""

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        mean, std, to_mean, to_std = (
            torch.tensor(numbers, dtype=args[0].dtype, device=args[0].device).view(-1, 1, 1)
            for numbers in (given.mean, given.std, expected.mean, expected.std)
        )
        return (args[0] * std + (mean - to_mean)) / to_std

    return hook


def _accuracy(net: nn.Module, images: ImageData | None, norm: Normalization, run: Run) -> float | None:
    if images is None or images.labels is None:
        return None
    found = predict(net, images.batches(batch_size_for(images.size), norm), run.device)
    return accuracy(found) if is_classifier(found.outputs) else None
