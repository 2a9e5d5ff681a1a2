"""The samples of a run: what is gathered from, what decides, what only reports; images and arrays alike.

One rule for all: of the calibration samples every fifth decides, of a named data set a tenth of the training split is
kept apart from both, and a sample is in one part only.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dk2pnet import processes
from dk2pnet.data.arrays import ArrayBatches, Arrays, Feed
from dk2pnet.data.images import ImageData, Normalization, batch_size_for, generator_for
from dk2pnet.data.sources import has_split, load
from dk2pnet.data.splits import UserBatches, calibration_split, decides, part_of_split, split_training
from dk2pnet.errors import InputError

__all__ = [
    "AT_ONCE",
    "Batch",
    "Batches",
    "Batching",
    "Every",
    "Part",
    "Samples",
    "all_alike",
    "any_split",
    "array_samples",
    "named_samples",
    "spread",
    "user_samples",
]

Batch = tuple[Any, Tensor | None]  # inputs (a tensor (B, C, H, W) or a `Feed`) and labels
Batches = Iterable[Batch]
AT_ONCE = 8  # samples at once of a network that takes arrays and leaves it open: more gain nothing on a CPU
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batching:
    """How many samples a network takes at once: at most `size` (None: what suits the images), or always if `fixed`."""

    size: int | None = None
    fixed: bool = False

    def of(self, data: ImageData, normalization: Normalization, count: int, rest: bool = False) -> Batches:
        """Batches of a data set, of which the smallest part has `count` images; `rest` as in `Whole`."""
        size = batch_size_for(data.size) if self.size is None else self.size if self.fixed else min(self.size, count)
        batches: Batches = data.batches(size, normalization)
        return Whole(batches, size, rest) if self.fixed else batches

    def whole(self, count: int) -> int:
        """How many of so many samples there are in whole batches."""
        return count // self.size * self.size if self.fixed and self.size else count


@dataclass
class Samples:
    """The samples of a run, as batches of what the network takes. `held_out` decides, `test` only reports.

    ``tune``: those of `gather`, for tuning; ``train`` and ``validation``: the labelled ones of a data set; ``decide``:
    those that a budget in points is decided on, which are in none of the others, and ``decided_by``: which they are.
    """

    gather: Batches
    held_out: Batches
    counts: dict[str, int]
    tune: ImageData | Batches
    decide: Batches
    decided_by: str
    test: Batches | None = None
    train: ImageData | Batches | None = None
    validation: ImageData | None = None

    @property
    def first(self) -> Tensor | Feed:
        """The inputs of the first batch."""
        return next(iter(self.gather))[0]


def named_samples(
    training: ImageData,
    test: ImageData | None,
    normalization: Normalization | None,
    count: int,
    *,
    holdout: ImageData | None = None,
    holdout_split: str | None = None,
    calibration: ImageData | None = None,
    batching: Batching = Batching(),
    memory: float = 2**30,
) -> Samples:
    """From the splits of a data set; `count` calibration images of nine tenths of the training split, decoded once
    where they fit into `memory` bytes.

    The other tenth decides on budgets in points, or else `holdout`, or the part of a split that `holdout_split` names,
    which is then left out of that split. With `calibration` the calibration images are nine tenths of those, whatever
    they show.
    """
    if normalization is None:
        raise InputError(
            "the normalisation that the network was trained with is not known; give it with --normalize "
            "(imagenet, cifar10, ... or MEAN,.../STD,...)"
        )
    norm = normalization
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
    gather, held_out = gather.kept(memory * 4 / 5), held_out.kept(memory / 5)
    size = batching.size
    if batching.fixed and size and min(len(gather), len(held_out)) < size:
        raise InputError(
            f"data set {training.name!r} gives {len(gather)} images to calibrate with and {len(held_out)} to decide "
            f"with; the graph takes {size} at once: give more images"
        )
    counts = {"calibration": batching.whole(len(gather)), "held out": batching.whole(len(held_out))}
    test = test if test is not None and test.labels is not None and batching.whole(len(test)) else None
    if test is not None:
        counts["test"] = batching.whole(len(test))

    def batches(data: ImageData, rest: bool = False) -> Batches:
        return batching.of(data, norm, len(held_out), rest)

    return Samples(
        batches(gather),
        batches(held_out),
        counts,
        gather,
        batches(decide, rest=True),
        decided_by,
        None if test is None else batches(test),
        kept,
        validation,
    )


def user_samples(
    data: Iterable[Any],
    test_data: Iterable[Any] | None,
    count: int,
    holdout: Iterable[Any] | None = None,
    batching: Batching = Batching(),
    memory: float = math.inf,
) -> Samples:
    """From a user's own batches. Without `holdout` the held-out images decide on budgets in points.

    What gives other images in every pass, as a loader that shuffles does, is read once and kept in `memory` bytes: the
    images that decide are kept apart, and answers and labels belong to the images that they were made of.
    """

    def same(data: Iterable[Any], what: str, most: int | None = None) -> UserBatches:
        batches = UserBatches(data)
        if batches.steady():
            return batches
        if not processes.is_alone():
            raise InputError(
                f"{what} gives other images in every pass, and in every process; give batches without shuffling or "
                "random augmentation"
            )
        _log.info("%s gives other images in every pass: it is read once, and kept", what)
        return batches.read_once(most, memory, what)

    batches = same(data, "data", count)

    def of(batches: Batches, rest: bool = False) -> Batches:
        return Whole(batches, batching.size, rest) if batching.fixed and batching.size else batches

    gather, held_out = (of(part) for part in batches.calibration_split(count))
    counts = {"calibration": sum(len(x) for x, _ in gather), "held out": sum(len(x) for x, _ in held_out)}
    return Samples(
        gather,
        held_out,
        counts,
        gather,
        held_out if holdout is None else of(same(holdout, "holdout"), rest=True),
        "the held-out calibration images" if holdout is None else "the holdout batches",
        None if test_data is None else of(same(test_data, "test_data")),
        UserBatches(data),
    )


def array_samples(arrays: Arrays, count: int, batching: Batching, holdout: Arrays | None = None) -> Samples:
    """From arrays by input, `count` samples of them at most. The held-out ones decide on budgets in points.

    These are the last fifth in the order given, or `holdout`: crops of a photograph, frames of a film and parts of a
    recording lie side by side, and what is held out among them says little about another.

    Raises
    ------
    InputError
        When there are fewer than one batch for either part.
    """
    generator = generator_for(1)
    chosen = torch.randperm(len(arrays), generator=generator)[:count].sort().values
    others = len(chosen) - int(decides(torch.arange(len(chosen))).sum()) if holdout is None else len(chosen)
    # What is gathered from has no order, that of tuning's batches.
    parts = [chosen[:others][torch.randperm(others, generator=generator)].tolist(), chosen[others:].tolist()]
    if holdout is not None:
        parts[1] = list(range(len(holdout)))
    fixed = 1 if arrays.stacked else batching.size if batching.fixed else None
    batch = fixed or min(batching.size or AT_ONCE, max(len(parts[1]), 1))
    if fixed:
        parts = [part[: len(part) // batch * batch] for part in parts]
    if min(map(len, parts)) == 0:
        raise InputError(
            f"{arrays.name} holds {len(arrays)} sample(s); expected at least {2 if batch == 1 else 6 * batch}, a fifth "
            "of them only decides"
        )
    gather, held_out = ArrayBatches(arrays, parts[0], batch), ArrayBatches(holdout or arrays, parts[1], batch)
    counts = {"calibration": len(parts[0]), "held out": len(parts[1])}
    decided_by = "the held-out samples" if holdout is None else f"the samples of {holdout.name}"
    return Samples(gather, held_out, counts, gather, held_out, decided_by)


def any_split(name: str, data_dir: str | None, like: ImageData, splits: Sequence[str]) -> ImageData:
    """The images of the first of the splits that there is, in the size and colours of those in `like`."""
    for split in splits:
        if has_split(name, split, data_dir):
            return load(name, split, data_dir=data_dir, size=like.size, channels=like.channels)
    raise InputError(f"data set {name!r} has neither a training nor a test split; give a folder of images")


def all_alike(samples: Samples) -> bool:
    """Whether all that is gathered from is one and the same sample."""
    first: list[Tensor] | None = None
    for x, _ in samples.gather:
        parts = [x] if isinstance(x, Tensor) else x.rows()
        first = [part[:1] for part in parts] if first is None else first
        for part, one in zip(parts, first, strict=True):
            if part.shape[1:] != one.shape[1:] or not torch.equal(part, one.expand_as(part)):
                return False
    return samples.counts["calibration"] > 1


# -- parts of batches ------------------------------------------------------------------------------------------------


def cut(x: Any, y: Tensor | None, rows: Any) -> Batch:
    """Some rows of a batch of tensors."""
    return x[rows], None if y is None else y[rows]


@dataclass(frozen=True)
class Part:
    """Images `start` to `stop` of batches."""

    batches: Batches
    start: int
    stop: int

    def __iter__(self) -> Iterator[Batch]:
        first = 0
        for x, y in self.batches:
            part = slice(max(self.start - first, 0), self.stop - first)
            first += len(x)
            if first > self.start:
                yield cut(x, y, part)
            if first >= self.stop:
                return


@dataclass(frozen=True)
class Every:
    """Every `step`-th image of some batches, from number `offset` on, or (not `chosen`) all the others."""

    batches: Batches
    step: int
    chosen: bool
    offset: int = 0

    def __iter__(self) -> Iterator[Batch]:
        first = 0
        for x, y in self.batches:
            rows = [row for row in range(len(x)) if ((first + row) % self.step == self.offset) == self.chosen]
            first += len(x)
            if rows:
                yield cut(x, y, rows)


def spread(samples: Samples, count: int) -> Batches:
    """About so many of the images that are gathered from, evenly spread: a user's own may lie sorted by class."""
    step = samples.counts["calibration"] // count
    return Every(samples.gather, step, True) if step > 1 else samples.gather


@dataclass(frozen=True)
class Whole:
    """The images of some batches in batches of exactly `size`; what fills none is left out, or comes last (`rest`)."""

    batches: Batches
    size: int
    rest: bool = False

    def __iter__(self) -> Iterator[Batch]:
        xs: list[Tensor] = []
        ys: list[Tensor] = []
        for x, y in self.batches:
            xs += x.split(1)
            ys += [] if y is None else y.split(1)
            while len(xs) >= self.size:
                yield torch.cat(xs[: self.size]), torch.cat(ys[: self.size]) if ys else None
                xs, ys = xs[self.size :], ys[self.size :]
        if self.rest and xs:
            yield torch.cat(xs), torch.cat(ys) if ys else None
