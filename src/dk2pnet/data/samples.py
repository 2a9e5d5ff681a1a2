"""The images of a run that decomposes: what is gathered from, what decides, what only reports."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dk2pnet.data import ImageData, UserBatches, calibration_split, part_of_split, split_training
from dk2pnet.data.images import batch_size_for
from dk2pnet.errors import InputError
from dk2pnet.networks.open import Network

__all__ = ["Batches", "Images", "Part", "named_images", "user_images"]

Batches = Iterable[tuple[Tensor, Tensor | None]]
_log = logging.getLogger(__name__)


@dataclass
class Images:
    """The images of a run, as normalised batches. `held_out` decides, `test` only reports.

    ``tune``: those of `gather`, for tuning; ``train`` and ``validation``: the labelled ones of a data set; ``decide``:
    those that a budget in points is decided on, which are in none of the others, and ``decided_by``: which they are.
    """

    gather: Batches
    held_out: Batches
    counts: dict[str, int]
    tune: ImageData | UserBatches
    test: Batches | None = None
    train: ImageData | UserBatches | None = None
    validation: ImageData | None = None
    decide: Batches | None = None
    decided_by: str = ""


def named_images(
    training: ImageData,
    test: ImageData | None,
    network: Network,
    count: int,
    holdout: ImageData | None = None,
    holdout_split: str | None = None,
    calibration: ImageData | None = None,
) -> Images:
    """From the splits of a data set; `count` calibration images of nine tenths of the training split.

    The other tenth decides on budgets in points, or else `holdout`, or the part of a split that `holdout_split` names,
    which is then left out of that split. With `calibration` the calibration images are nine tenths of those, whatever
    they show.
    """
    if network.normalization is None:
        raise InputError(
            "the normalisation that the network was trained with is not known; give it with --normalize "
            "(imagenet, cifar10, ... or MEAN,.../STD,...)"
        )
    norm = network.normalization
    norm.check(training.channels)
    decided_by = "the validation tenth of the training split"
    if holdout_split is not None:
        decided_by = holdout_split
        if holdout_split.partition("[")[0] == "train":
            holdout, training = part_of_split(holdout_split, training)
        elif test is not None and holdout_split.partition("[")[0] == "test":
            holdout, test = part_of_split(holdout_split, test)
            test = test if len(test) else None
        else:
            raise InputError(
                f"holdout split {holdout_split!r} is of no split that data set {training.name!r} has; "
                "expected a part of train or test, such as 'test[:50%]'"
            )
    elif holdout is not None:
        decided_by = holdout.name
        norm.check(holdout.channels)
        holdout = holdout.numbered_like(training)
    kept, validation = split_training(training)
    decide = validation if holdout is None else holdout
    if calibration is not None:
        norm.check(calibration.channels)
    source = kept if calibration is None else split_training(calibration)[0]
    gather, held_out = calibration_split(source, count)
    size = batch_size_for(training.size)
    counts = {"calibration": len(gather), "held out": len(held_out)}
    test_batches = None
    if test is not None and test.labels is not None:
        counts["test"] = len(test)
        test_batches = test.batches(size, norm)
    return Images(
        gather.batches(size, norm),
        held_out.batches(size, norm),
        counts,
        gather,
        test_batches,
        kept,
        validation,
        decide.batches(size, norm),
        decided_by,
    )


def user_images(
    data: Iterable[Any], test_data: Iterable[Any] | None, count: int, holdout: Iterable[Any] | None = None
) -> Images:
    """From a user's own batches. Without `holdout` the held-out images decide on budgets in points."""
    batches = UserBatches(data)
    if not batches.steady():
        _log.warning(
            "data gives other images in every pass, so the images that decide are not kept apart and the teacher's "
            "answers belong to others; give batches without shuffling or random augmentation"
        )
    gather, held_out = batches.calibration_split(count)
    counts = {"calibration": sum(len(x) for x, _ in gather), "held out": sum(len(x) for x, _ in held_out)}
    test = None if test_data is None else UserBatches(test_data)
    images = Images(gather, held_out, counts, UserBatches(gather), test, batches)
    images.decide = held_out if holdout is None else UserBatches(holdout)
    images.decided_by = "the held-out calibration images" if holdout is None else "the holdout batches"
    return images


@dataclass(frozen=True)
class Part:
    """Images `start` to `stop` of batches."""

    batches: Batches
    start: int
    stop: int

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        first = 0
        for x, y in self.batches:
            part = slice(max(self.start - first, 0), self.stop - first)
            first += len(x)
            if first > self.start:
                yield x[part], None if y is None else y[part]
            if first >= self.stop:
                return
