"""What every student begins with: the network, proven to run, its samples, its answers, its convolutions."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dk2pnet.answers import Predictions
from dk2pnet.data import ImageData, has_split
from dk2pnet.data.arrays import image_batches, is_arrays
from dk2pnet.data.images import batch_size_for
from dk2pnet.data.samples import Samples, all_alike, any_split, array_samples, named_samples, user_samples
from dk2pnet.data.sources import load_test
from dk2pnet.decompose.moments import CRITERIA, Moments
from dk2pnet.deploy.latency import is_onnx
from dk2pnet.digest import digest_of
from dk2pnet.errors import InputError
from dk2pnet.memory import Shares
from dk2pnet.networks.network import Learner, Network, NotLearnable, Site
from dk2pnet.networks.open import (
    described,
    is_onnx_file,
    load_data,
    open_with_data,
    random_weights,
    warn_of_other_classes,
)
from dk2pnet.networks.patches import geometry_of
from dk2pnet.options import CompressOptions, ExploreOptions
from dk2pnet.run.run import Run
from dk2pnet.students.needs import own_bytes
from dk2pnet.students.tuning_steps import Tuning, images_in_step, tuning_of
from dk2pnet.tasks import can_be, check_task, guess, is_uncertain
from dk2pnet.training.trainer import TUNING

__all__ = ["TOO_LARGE", "Teacher", "check_for_onnx"]

TOO_LARGE = "its statistics take"  # why a layer stays dense
_ALWAYS_FITS = 2**26  # bytes of one layer
_COPIES = 2  # of what its sums take, while it is solved: of A, damped, decomposed

_log = logging.getLogger(__name__)


def check_for_onnx(model: object, options: CompressOptions | ExploreOptions) -> None:
    """`InputError` for what does not go with an ONNX file, where `model` is one: before anything is read."""
    if not is_onnx_file(model):
        return
    options.check_for_onnx()
    if options.target is not None and not is_onnx(options.target):
        raise InputError(
            f"target is {options.target!r}; expected one that reads ONNX files for an .onnx model: onnxruntime, ..."
        )


@dataclass
class Teacher:
    """The network, its samples (None: the criterion needs none), its answers to the held-out ones, and how students of
    it are made.

    `named`: the data set that calibrates, None for a user's own batches or arrays; `learner`: None where no student is
    tuned, for the reason in ``tuning.said``; `notes`: what the results have to say of it; `own`: bytes that it asks for
    itself, beside ``--memory``.
    """

    network: Network
    samples: Samples | None
    held: Predictions | None
    sites: list[Any]
    criterion: str
    tuning: Tuning
    learner: Learner | None
    named: str | None
    options: CompressOptions | ExploreOptions
    notes: list[str] = field(default_factory=list)
    own: int | None = None

    @classmethod
    def open(
        cls,
        model: str | Path | nn.Module,
        data: str | Iterable[Any] | None,
        options: CompressOptions | ExploreOptions,
        run: Run,
        first: bool = True,
    ) -> Teacher:
        """Open everything, and refuse what cannot be before any work is done. `first`: whether the first convolution
        may be decomposed; where every channel gets as many kernels, its three channels get too few."""
        epochs = options.epochs if isinstance(options, CompressOptions) else 0
        if is_arrays(data) and not is_onnx_file(model):  # then they are a user's own batches
            data = image_batches(str(data), batch_size_for)
            if is_arrays(options.holdout):
                options = replace(options, holdout=image_batches(options.holdout, batch_size_for))
        network, samples, training = _running(model, data, options, run)
        sites = network.sites(options.keep, first)
        _check_open(model, sites, network.layers)
        named = None if training is None else options.calibration_data or str(data)
        criterion = options.criterion or network.default_criterion
        if samples is None and (CRITERIA[criterion][0] or epochs):
            what = f"criterion {criterion!r}" if CRITERIA[criterion][0] else "training"
            raise InputError(
                f"{what} needs images and none were given; give --data, or use --criterion weight --epochs 0"
            )
        held, unsure = None, ""
        if samples is not None:
            held = network.predict(samples.held_out, run)
            if (where := held.infinite()) is not None:
                raise InputError(
                    f"the network's outputs are not finite on the held-out samples{where}; "
                    "check the weights, and the normalisation of images"
                )
            if all(held.is_empty(number) for number in range(len(held.names))):
                raise InputError(
                    "the network's outputs are empty on all held-out samples, as of a detector that finds nothing, so "
                    "that no student can be told from another; give samples in which it finds something"
                )
            network.task, unsure = _task_of(held, training, options.task)
            held.task = network.task
            if training is not None and held.task == "classify":
                warn_of_other_classes(training, held.outputs)
        task = network.task
        criterion = options.criterion or (network.default_criterion if task in (None, "classify") else "response")
        if criterion == "loss" and held is not None and task != "classify":
            shapes = " and ".join(str((1, *shape)) for shape in held.shapes())
            raise InputError(
                "criterion 'loss' needs a classifier (one row of class scores per image), but the network returns "
                f"{shapes}, taken for task {task!r}; use --criterion response"
                + (", or --task classify" if options.task is None and can_be("classify", held) else "")
            )
        _leave_what_does_not_fit(sites, criterion, options.memory)
        _check_open(model, sites, network.layers)
        tuning = tuning_of(options.tune, epochs=epochs, samples=samples, macs=network.macs)
        learner = None
        if tuning.wanted and samples is not None:
            try:
                learner = network.learner(samples, {site.name: site for site in sites if not site.reason}, run)
            except NotLearnable as reason:
                tuning = Tuning(said=f"no tuning: the graph cannot be had as a PyTorch module, {reason}")
        own = None
        if samples is not None:
            tuned = images_in_step(learner, TUNING.batch_size) if learner is not None else 0
            own = own_bytes(network, sites, len(samples.first), tuned)
            _log.info(
                "memory: up to %g GiB for what is kept (--memory), and about %.1f GiB for the network itself",
                options.memory,
                own / 2**30,
            )
        random = random_weights(model, options.weights)
        if random:
            _log.warning("%s", random)
        alike = ""
        if samples is not None and all_alike(samples):
            alike = "the calibration samples are all alike: what is measured and tuned on them says little about others"
            _log.warning("%s", alike)
        notes = [said for said in (random, *network.caveats, tuning.said, unsure, alike) if said]
        return cls(network, samples, held, sites, criterion, tuning, learner, named, options, notes, own)

    @property
    def task(self) -> str | None:
        """What the network's answers are for; None where there are no samples to tell it by."""
        return self.network.task

    @property
    def target(self) -> str:
        """Where students run and are timed."""
        return self.options.target or "onnxruntime"

    @property
    def open_sites(self) -> dict[str, Any]:
        """The convolutions that can be decomposed, by name."""
        return {site.name: site for site in self.sites if not site.reason}

    def digests(self) -> dict[str, str]:
        """What tells the network and the samples of this run from others: their names may stay while they change."""
        found = self.network.digests()
        if self.samples is not None:
            # The first batch, and a fifth of all, evenly spread; one after the other, as they need not fit into memory.
            digests = (_digest_of_batch(x) for x in chain([self.samples.first], (x for x, _ in self.samples.held_out)))
            found["digest_of_images"] = digest_of({digest: torch.empty(0) for digest in digests})
        return found


def _task_of(held: Predictions, training: ImageData | None, given: str | None) -> tuple[str, str]:
    """What the answers are for, and what is to be said where that rests on little."""
    if given is not None:
        check_task(given, held)
        return given, ""
    if training is not None and held.shapes() == [(_classes(training),)]:
        return "classify", ""
    found = guess(held)
    if found != "classify" or not is_uncertain(held):
        return found, ""
    return found, (
        f"the {held.shapes()[0][0]} numbers that the network gives for an image are taken for scores of classes; if "
        "they are something else, say so (--task regress, embed or multilabel)"
    )


def _digest_of_batch(x: Any) -> str:
    arrays = {"images": x} if isinstance(x, Tensor) else x.arrays
    return digest_of({name: _as_tensor(array) for name, array in arrays.items()})


def _check_open(model: Any, sites: list[Any], layers: Mapping[str, Any]) -> None:
    if all(site.reason for site in sites):
        reasons = "all are dominant kernels already" if not sites and layers else _reasons(sites)
        raise InputError(f"{_name(model)} has no convolution that can be decomposed: {reasons}")


def _leave_what_does_not_fit(sites: list[Any], criterion: str, memory: float) -> None:
    """Layers whose own matrices are more than their share of `memory` GiB stay dense: kernels of hundreds of places, or
    thousands of channels, would take the machine's."""
    needs_samples, needs_gradients = CRITERIA[criterion]
    for site in sites:
        if site.reason or not needs_samples:
            continue
        groups, inputs, outputs = geometry_of(site.conv)
        needed = _COPIES * Moments.bytes_needed(groups, inputs, outputs if needs_gradients else None)
        if needed > max(Shares.of(memory).layer, _ALWAYS_FITS):
            site.reason = (
                f"{TOO_LARGE} {needed / 2**30:.1f} GiB while it is solved, more than half of --memory {memory:g}"
            )
            _log.warning("%s stays dense: %s", site.name, site.reason)


def _classes(data: ImageData) -> int:
    return 0 if data.labels is None else len(data.classes or ()) or int(data.labels.max()) + 1


def _as_tensor(array: Any) -> Any:
    """An array of numbers as a tensor; of others, as texts, itself."""
    return array if isinstance(array, np.ndarray) and array.dtype.kind not in "fiub" else torch.as_tensor(array)


def _running(
    model: str | Path | nn.Module, data: Any, options: CompressOptions | ExploreOptions, run: Run
) -> tuple[Network, Samples | None, ImageData | None]:
    """The network proven to run on the first of its samples, these, and the training split of a data set."""
    if options.holdout is not None and options.holdout_split is not None:
        raise InputError("holdout and holdout split both say which images decide; give one of them")
    if options.calibration_data is not None and data is not None and not isinstance(data, str):
        raise InputError(
            "data are batches, which calibrate too; leave calibration_data away, or name a data set as data"
        )
    name, classes = data if isinstance(data, str) else None, options.classes
    tests_only = _tests_only(name, options)
    if options.calibration_data is not None and (data is None or tests_only) and getattr(options, "epochs", None):
        raise InputError(
            "training needs the training split of the network's own images (--data); --calibration-data only "
            "calibrates and tunes"
        )
    if tests_only and classes is None and options.weights != "pretrained":
        assert name is not None
        test = load_data(
            name, "test", described(model, options.weights), data_dir=options.data_dir, input_size=options.input_size
        )
        classes = len(test.classes) if test is not None and test.classes else None
    network, training = open_with_data(
        model,
        options.calibration_data if data is None or tests_only else name,
        weights=options.weights,
        normalize=options.normalize,
        data_dir=options.data_dir,
        input_size=options.input_size,
        classes=classes,
        own=data is not None and not tests_only,
    )
    samples = _samples(network, training, data, options)
    example = getattr(options, "example_input", None)
    try:
        network.prepare(samples.first if samples is not None and example is None else example, options.input_size, run)
    except InputError:
        if samples is None or not network.one_at_a_time():
            raise
        samples = _samples(network, training, data, options)
        assert samples is not None
        network.prepare(samples.first, options.input_size, run)
    read_here = training is not None or isinstance(data, str)
    if samples is not None and read_here and network.fit(Shares.of(options.memory).batch):
        _log.info(
            "samples are run by %d: the maps of more do not fit into a quarter of --memory", network.batching.size
        )
        samples = _samples(network, training, data, options)
    return network, samples, training


def _tests_only(data: str | None, options: CompressOptions | ExploreOptions) -> bool:
    """Whether a data set has only images to test with, and others calibrate: as ImageNet's validation images do."""
    if data is None or options.calibration_data is None or is_arrays(data):
        return False
    dir_ = options.data_dir
    return not has_split(data, "train", dir_) and has_split(data, "test", dir_)


def _samples(
    network: Network, training: ImageData | None, data: Any, options: CompressOptions | ExploreOptions
) -> Samples | None:
    count, dir_ = options.calibration_images, options.data_dir
    holdout, calibration = options.holdout, options.calibration_data
    if training is not None:
        test, other, elsewhere = None, None, None
        tests_only = _tests_only(data, options)
        if data is not None and (tests_only or has_split(data, "train", dir_)):
            test = load_test(data, training, dir_)
        if holdout is not None:
            if not isinstance(holdout, str):
                raise InputError("data is the name of a data set, so the holdout has to be a folder of images")
            other = any_split(holdout, dir_, training, ("test", "train"))
        if calibration is not None and not tests_only:
            elsewhere = any_split(calibration, dir_, training, ("train", "test"))
        return named_samples(
            training,
            test,
            network.normalization,
            count,
            holdout=other,
            holdout_split=options.holdout_split,
            calibration=elsewhere,
            batching=network.batching,
            memory=Shares.of(options.memory).images,
        )
    if data is None:
        return None
    if isinstance(data, str) and options.holdout_split is not None:
        raise InputError(f"the held-out samples of {data} decide; a holdout split is of images: give --holdout X.npz")
    if isinstance(data, str) and holdout is not None and not is_arrays(holdout):
        raise InputError(f"data is {data}, so the holdout has to be arrays too; give --holdout X.npz")
    if not isinstance(data, str) and (isinstance(holdout, str) or options.holdout_split is not None):
        raise InputError("data are batches, so the holdout has to be batches too; give holdout=BATCHES")
    if isinstance(data, str):  # arrays by the names of the network's inputs
        for name in ("normalize", "input_size", "data_dir", "calibration_data"):
            if getattr(options, name) is not None:
                flag = "--" + name.replace("_", "-")
                raise InputError(f"{flag} is for images; the arrays in {data} are fed as they are: leave it away")
        arrays = network.arrays(data)
        return array_samples(arrays, count, network.batching, None if holdout is None else network.arrays(holdout))
    test_data = getattr(options, "test_data", None)
    return user_samples(data, test_data, count, holdout, network.batching, Shares.of(options.memory).images)


def _name(model: Any) -> str:
    return model if isinstance(model, str) else "the network"


def _reasons(sites: list[Site]) -> str:
    """Why the convolutions stay dense, the most frequent reason first."""
    counted = Counter(site.reason for site in sites)
    told = [f"{reason}: {count}" for reason, count in counted.most_common(4)]
    return ", ".join(told) if told else "it has none at all"
