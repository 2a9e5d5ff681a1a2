"""What `compress` and `explore` begin with: the teacher, the images, and the way to make students of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dk2pnet.data import ImageData, Normalization, has_split, load
from dk2pnet.data.images import check_augment
from dk2pnet.data.samples import Images, named_images, user_images
from dk2pnet.data.sources import load_test
from dk2pnet.errors import InputError, first_line
from dk2pnet.measure import Predictions, accuracy, agreement, evaluation, is_classifier, macs, outputs_of, predict
from dk2pnet.modules import copy_model
from dk2pnet.networks.open import Network, load_data, open_network, warn_of_other_classes
from dk2pnet.plan import Budget
from dk2pnet.run.clock import Clock
from dk2pnet.run.progress import Progress, silent
from dk2pnet.students.allocate import CRITERIA
from dk2pnet.students.closed_form import ClosedForm
from dk2pnet.students.probes import Prober
from dk2pnet.students.tuning import Tuner, Tuning, tuning_of
from dk2pnet.training.checkpoint import digest_of

__all__ = ["Figures", "Prepared", "check_options", "plain_options", "prepare"]


@dataclass
class Prepared:
    """The teacher on its device, its images (None: the criterion needs none), its answers, and how students are tuned.

    `named`: the data set that calibrates, None for a user's own batches.
    """

    network: Network
    teacher: nn.Module
    images: Images | None
    example: Tensor
    held: Predictions | None
    tuning: Tuning
    named: str | None
    criterion: str
    seed: int

    @property
    def device(self) -> torch.device:
        """Where the teacher is."""
        return self.example.device

    def digests(self) -> dict[str, str]:
        """What tells the network and the images of this run from others: their names may stay while they change."""
        found = {"digest_of_weights": digest_of(self.teacher.state_dict())}
        if self.images is not None:
            found["digest_of_images"] = digest_of({"first batch": next(iter(self.images.gather))[0]})
        return found

    def prober(
        self,
        *,
        keep: Sequence[str],
        first: bool,
        memory: float,
        rebuild: bool,
        augment: str | None,
        precision: str,
        checkpoint_every: float,
        target: str,
        threads: int | None,
        folder: Path | None,
        clock: Clock,
        progress: Progress,
    ) -> Prober:
        """Makes the students of any budget; options as in `compress`."""

        def open_closed() -> ClosedForm:
            return ClosedForm(
                self.teacher,
                self.held,
                self.network,
                self.images,
                self.example,
                self.criterion,
                keep=keep,
                first=first,
                memory=int(memory * 2**30),
                rebuild=rebuild,
                seed=self.seed,
                target=target,
                threads=threads,
                clock=clock,
                progress=progress,
            )

        tuner = None
        if self.tuning.wanted:
            assert self.images is not None
            assert self.held is not None
            tuner = Tuner(
                self.teacher,
                self.held,
                self.images,
                example=self.example,
                name=self.named,
                normalization=self.network.normalization,
                augment=augment,
                precision=precision,
                seed=self.seed,
                checkpoint_every=checkpoint_every,
                progress=progress,
            )
        return Prober(self.teacher, open_closed, tuner, self.tuning, folder, clock)


def check_options(criterion: str, calibration_images: int, memory: float, augment: str | None) -> None:
    """`InputError` for options that cannot be, before anything is read."""
    if criterion not in CRITERIA:
        raise InputError(f"criterion is {criterion!r}; expected one of {', '.join(CRITERIA)}")
    if calibration_images < 2 or memory <= 0:
        raise InputError(
            f"calibration images {calibration_images}, memory {memory:g} GiB; expected at least 2 images and memory "
            "above 0"
        )
    check_augment(augment)


def prepare(
    model: str | nn.Module,
    data: str | Iterable[Any] | None,
    criterion: str,
    *,
    calibration_data: str | None = None,
    weights: str | None,
    normalize: str | Normalization | None,
    data_dir: str | None,
    test_data: Iterable[Any] | None,
    holdout: str | Iterable[Any] | None,
    holdout_split: str | None,
    example_input: Tensor | None,
    input_size: int | None,
    classes: int | None,
    calibration_images: int,
    tune: str | int | None,
    epochs: int,
    seed: int,
    device: torch.device,
) -> Prepared:
    """Open everything; options as in `compress`."""
    if calibration_data is not None and data is not None and not isinstance(data, str):
        raise InputError(
            "data are batches, which calibrate too; leave calibration_data away, or name a data set as data"
        )
    if holdout is not None and holdout_split is not None:
        raise InputError("holdout and holdout split both say which images decide; give one of them")
    if calibration_data is not None and epochs and data is None:
        raise InputError(
            "training needs the network's own images (--data); --calibration-data only calibrates and tunes"
        )
    named = data if isinstance(data, str) else calibration_data if data is None else None
    training = load_data(named, "train", model, data_dir=data_dir, input_size=input_size) if named else None
    if named and training is None:
        raise InputError(
            f"data set {named!r} has no training split, which calibration reads; give a folder train/ of images"
        )
    if training is not None and data is None:  # somebody else's images: their labels mean nothing to this network
        training = training.without_labels()
    network = open_network(model, weights=weights, normalize=normalize, data=training, classes=classes)
    teacher = copy_model(network.model).eval().to(device)
    for parameter in teacher.parameters():  # of a frozen one the students' layers would not be tuned
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    images = None
    if training is not None:
        _say_other_classes(teacher, network, training, device)
    if named is not None and training is not None:
        test, other = load_test(named, training, data_dir), None
        if holdout is not None:
            if not isinstance(holdout, str):
                raise InputError("data is the name of a data set, so the holdout has to be a folder of images")
            other = _any_split(holdout, data_dir, training, ("test", "train"))
        calibration = None
        if calibration_data is not None:
            calibration = _any_split(calibration_data, data_dir, training, ("train", "test"))
            if data is None:
                test = None
        images = named_images(training, test, network, calibration_images, other, holdout_split, calibration)
    elif data is not None:
        if isinstance(holdout, str) or holdout_split is not None:
            raise InputError("data are batches, so the holdout has to be batches too; give holdout=BATCHES")
        images = user_images(data, test_data, calibration_images, holdout)
    if images is None and (CRITERIA[criterion][0] or epochs):
        what = f"criterion {criterion!r}" if CRITERIA[criterion][0] else "training"
        raise InputError(f"{what} needs images and none were given; give --data, or use --criterion weight --epochs 0")
    example = _example(example_input, images, network, input_size).to(device)
    _check_output(teacher, example, criterion)
    tuning = tuning_of(tune, epochs=epochs, images=images, macs=macs(teacher, example))
    held = None
    if images is not None:
        held = predict(teacher, images.held_out, device)
        if not all(bool(torch.isfinite(output).all()) for output in held.outputs):
            raise InputError(
                "the network's outputs are not finite on the calibration images; "
                "check the weights and the normalisation"
            )
    return Prepared(network, teacher, images, example, held, tuning, calibration_data or named, criterion, seed)


def plain_options(asked: Mapping[str, Any], left_out: Sequence[str]) -> dict[str, Any]:
    """Options as YAML can hold them; Python objects cannot be repeated from a recipe and become None."""
    return {key: _plain(value) for key, value in asked.items() if key not in left_out}


class Figures:
    """Accuracy on the test split and agreement on the held-out images; `test` keeps what was answered, by stage."""

    def __init__(self, prepared: Prepared, progress: Progress = silent) -> None:
        self.prepared, self.progress = prepared, progress
        self.test: dict[str, Predictions] = {}

    def of(self, model: nn.Module, name: str) -> dict[str, Any]:
        """A stage: the network's name and figures; None where they cannot be had."""
        figures: dict[str, Any] = {"name": name, "accuracy": None, "agreement": None}
        images, held, device = self.prepared.images, self.prepared.held, self.prepared.device
        if images is None:
            return figures
        if held is not None and model is not self.prepared.teacher:
            answers = predict(model, images.held_out, device)
            if not all(bool(torch.isfinite(output).all()) for output in answers.outputs):
                raise InputError(
                    "the compressed network's outputs are not finite; give more calibration images or a larger budget"
                )
            figures["agreement"] = agreement(held, answers)
        if images.test is not None:
            total = images.counts.get("test", 0)
            answers = predict(
                model, images.test, device, lambda done: self.progress(f"evaluating: {name}", done, total)
            )
            self.test[name] = answers
            images.counts["test"] = len(answers)
            if answers.labels is not None and is_classifier(answers.outputs):
                figures["accuracy"] = accuracy(answers)
        return figures


# -- inside ------------------------------------------------------------------------------------------------------------


def _any_split(name: str, data_dir: str | None, like: ImageData, splits: Sequence[str]) -> ImageData:
    """The images of the first of the splits that there is, in the size and colours of those in `like`."""
    for split in splits:
        if has_split(name, split, data_dir):
            return load(name, split, data_dir=data_dir, size=like.size, channels=like.channels)
    raise InputError(f"data set {name!r} has neither a training nor a test split; give a folder of images")


def _say_other_classes(teacher: nn.Module, network: Network, training: ImageData, device: torch.device) -> None:
    if training.labels is None or network.normalization is None:
        return
    try:
        with evaluation(teacher):
            outputs = outputs_of(teacher(network.normalization.apply(training.subset([0]).images).to(device)))
    except (InputError, RuntimeError):  # what does not fit is said where all images are looked at
        return
    warn_of_other_classes(training, outputs)


def _example(given: Tensor | None, images: Images | None, network: Network, input_size: int | None) -> Tensor:
    if given is not None:
        if given.dim() != 4 or not given.is_floating_point():
            raise InputError(
                f"example_input is {given.dtype} of shape {tuple(given.shape)}; expected a float tensor (1, C, H, W)"
            )
        return given[:1].detach()
    if images is not None:
        return next(iter(images.gather))[0][:1]
    shape = network.plan.input_shape if network.plan is not None else None
    if shape is None and input_size is not None:
        shape = [(network.spec or {}).get("in_channels") or 3, input_size, input_size]
    if shape is None:
        raise InputError("the size of the images is not known; give --data or --input-size (in Python: example_input)")
    return torch.zeros(1, *shape)


def _check_output(teacher: nn.Module, example: Tensor, criterion: str) -> None:
    try:
        outputs, again = (predict(teacher, [(example, None)], example.device).outputs for _ in range(2))
    except Exception as error:  # whatever the network itself raises
        if isinstance(error, InputError):
            raise
        kinds = {parameter.dtype for parameter in teacher.parameters() if parameter.is_floating_point()}
        if len(kinds) == 1 and kinds != {example.dtype}:
            raise InputError(
                f"the network's weights are {kinds.pop()} and the images {example.dtype}; give the network in "
                f"{example.dtype}, as by model.float()"
            ) from error
        raise InputError(
            f"the network cannot run an image of shape {tuple(example.shape)} ({first_line(error)}); "
            "give images of its size (--input-size)"
        ) from error
    if not all(_alike(a, b) for a, b in zip(outputs, again, strict=True)):
        raise InputError(
            "the network gives other outputs each time for the same image, also in evaluation mode, so nothing can be "
            "compared with it; look for dropout without training=self.training"
        )
    if criterion == "loss" and not is_classifier(outputs):
        shapes = " and ".join(str(tuple(output.shape)) for output in outputs)
        raise InputError(
            "criterion 'loss' needs a classifier (one row of class scores per image), but the network returns "
            f"{shapes}; use --criterion response"
        )


def _alike(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding, which on a GPU may change from run to run."""
    if a.shape != b.shape or not (a.isfinite().all() and b.isfinite().all()):
        return a.shape == b.shape  # what is not finite is refused elsewhere
    return torch.allclose(a, b, 1e-2, 1e-3 * float(a.abs().max()) if a.numel() else 0.0)


def _plain(value: Any) -> Any:
    if isinstance(value, Path | Budget | Normalization):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value] if all(isinstance(item, str) for item in value) else None
    return value if isinstance(value, str | int | float | bool) else None
