"""The images of a run that decomposes: what is gathered from, what decides, what only reports."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dk2pnet.data import ImageData, UserBatches, calibration_split, split_training
from dk2pnet.errors import InputError
from dk2pnet.pipelines.inputs import Network, batch_size_for

__all__ = ["Batches", "Images", "Part", "named_images", "user_images"]

Batches = Iterable[tuple[Tensor, Tensor | None]]


@dataclass
class Images:
    """The images of a run, as normalised batches. `held_out` decides, `test` only reports.

    ``tune``: those of `gather`, for tuning; ``train`` and ``validation``: the labelled ones of a data set.
    """

    gather: Batches
    held_out: Batches
    counts: dict[str, int]
    tune: ImageData | UserBatches
    test: Batches | None = None
    train: ImageData | UserBatches | None = None
    validation: ImageData | None = None


def named_images(training: ImageData, test: ImageData | None, network: Network, count: int) -> Images:
    """From the splits of a data set; `count` calibration images of nine tenths of the training split."""
    if network.normalization is None:
        raise InputError(
            "the normalisation that the network was trained with is not known; give it with --normalize "
            "(imagenet, cifar10, ... or MEAN,.../STD,...)"
        )
    norm = network.normalization
    norm.check(training.channels)
    kept, validation = split_training(training)
    gather, held_out = calibration_split(kept, count)
    size = batch_size_for(training.size)
    counts = {"calibration": len(gather), "held out": len(held_out)}
    test_batches = None
    if test is not None and test.labels is not None:
        counts["test"] = len(test)
        test_batches = test.batches(size, norm)
    return Images(
        gather.batches(size, norm), held_out.batches(size, norm), counts, gather, test_batches, kept, validation
    )


def user_images(data: Iterable[Any], test_data: Iterable[Any] | None, count: int) -> Images:
    """From a user's own batches."""
    batches = UserBatches(data)
    gather, held_out = batches.calibration_split(count)
    counts = {"calibration": sum(len(x) for x, _ in gather), "held out": sum(len(x) for x, _ in held_out)}
    test = None if test_data is None else UserBatches(test_data)
    return Images(gather, held_out, counts, UserBatches(gather), test, batches)


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
