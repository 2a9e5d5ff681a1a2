"""What is trained on, what is calibrated on, what decides; and a user's own batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dk2pnet.data.images import ImageData, generator_for
from dk2pnet.digest import digest_of
from dk2pnet.errors import InputError

__all__ = ["UserBatches", "calibration_split", "decides", "identity_of", "part_of_split", "split_training"]


# -- splits ------------------------------------------------------------------------------------------------------------


def split_training(data: ImageData, seed: int = 0) -> tuple[ImageData, ImageData]:
    """Split into nine tenths to train with and a tenth to validate with; the length and seed alone determine which."""
    if len(data) < 2:
        raise InputError(f"data set {data.name!r} has {len(data)} image(s); expected at least 2, to hold one out")
    order = torch.randperm(len(data), generator=generator_for(seed))
    held_out = max(1, len(data) // 10)
    return data.subset(order[held_out:].sort().values), data.subset(order[:held_out].sort().values)


def identity_of(data: ImageData) -> str:
    """What tells a set of images from another: how many they are, their labels, and up to 16 images themselves."""
    step = max(len(data) // 16, 1)
    some = data.subset(torch.arange(0, len(data), step)[:16]).images
    labels = {} if data.labels is None else {"labels": data.labels}
    return digest_of({f"{len(data)} of {tuple(some.shape)}": some, **labels})


def decides(numbers: Tensor) -> Tensor:
    """Which of the calibration samples with these numbers are held out, to decide: every fifth."""
    return numbers % 5 == 0


def calibration_split(data: ImageData, count: int) -> tuple[ImageData, ImageData]:
    """Take ``count`` images (or all, if fewer), without labels: four fifths to gather with, a fifth to decide with.

    Which images depends on the length alone.
    """
    chosen = torch.randperm(len(data), generator=generator_for(1))[: max(count, 0)]
    _enough(len(chosen))
    held_out = decides(torch.arange(len(chosen)))
    data = data.without_labels()
    return data.subset(chosen[~held_out]), data.subset(chosen[held_out])


def part_of_split(text: str, data: ImageData) -> tuple[ImageData, ImageData]:
    """The images that a slice such as ``test[:50%]`` or ``train[-1000:]`` names, and the others.

    The notation is that of `datasets`; `data` is the whole split.
    """
    from datasets import ReadInstruction

    split = text.partition("[")[0]
    try:
        parts = ReadInstruction.from_spec(text).to_absolute({split: len(data)})
        ranges = [range(part.from_ or 0, len(data) if part.to is None else part.to) for part in parts]
        rows = torch.tensor([row for each in ranges for row in each], dtype=torch.int64)
    except (ValueError, AssertionError, TypeError) as error:
        raise InputError(
            f"split is {text!r}, which cannot be understood ({str(error).splitlines()[0]}); expected for example "
            "'test[:50%]' or 'train[-1000:]'"
        ) from error
    if not len(rows):
        raise InputError(f"split {text!r} of data set {data.name!r} holds no images; expected some of {len(data)}")
    others = torch.ones(len(data), dtype=torch.bool)
    others[rows] = False
    return data.subset(rows), data.subset(others.nonzero().flatten())


def _enough(count: int) -> None:
    if count < 2:
        raise InputError(f"calibration has {count} image(s); expected at least 2, to hold one out: give more images")


# -- a user's own batches ----------------------------------------------------------------------------------------------


class UserBatches:
    """A user's own batches, for example a `torch.utils.data.DataLoader`: yields ``(x, y)`` like `Batches`.

    Parameters
    ----------
    data
        Gives batches anew for every ``for``: a float tensor (B, C, H, W), normalised, or a pair of that and labels.

    Raises
    ------
    InputError
        When ``data`` can be read only once, or its first batch is something else.
    """

    def __init__(self, data: Iterable[Any]) -> None:
        expected = "expected batches that can be read again and again, such as a DataLoader or a list of tensors"
        if isinstance(data, Tensor) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
            raise InputError(f"data is of type {type(data).__name__}; {expected}")
        batches = iter(data)
        if batches is data:
            raise InputError(f"data is of type {type(data).__name__}, which can be read only once; {expected}")
        self._data = data
        first = next(batches, None)
        if first is None:
            raise InputError(f"data of type {type(data).__name__} holds no batches; {expected}")
        x, _ = _pair(first)
        self.channels: int = x.shape[1]
        self.size: tuple[int, int] = (x.shape[2], x.shape[3])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        return map(_pair, self._data)

    def steady(self) -> bool:
        """Whether the first batch of two passes is the same."""
        first, again = (next(iter(self))[0] for _ in range(2))
        return first.shape == again.shape and torch.equal(first, again)

    def read_once(self, count: int | None, memory: float, what: str) -> UserBatches:
        """The first `count` images (None: all) of one pass, in memory, for data that give others in every pass.

        Raises
        ------
        InputError
            When they take more than `memory` bytes.
        """
        kept: list[Any] = []
        images, taken = 0, 0
        for x, y in self:
            part = x[: None if count is None else count - images].cpu()
            kept.append((part, None if y is None else y[: len(part)].cpu()))
            images, taken = images + len(part), taken + part.numel() * part.element_size()
            if taken > memory:
                raise InputError(
                    f"{what} gives other images in every pass, so it is read once and kept, but {images:,} images take "
                    f"{taken / 2**30:.1f} GiB; give batches without shuffling or random augmentation, fewer images, or "
                    "more --memory"
                )
            if images == count:
                break
        return UserBatches([x if y is None else (x, y) for x, y in kept])

    def calibration_split(self, count: int) -> tuple[Iterable[Any], Iterable[Any]]:
        """Split the stream's first ``count`` images: four of five to gather with, every fifth to decide with.

        Both parts yield ``(x, None)`` and read the stream anew in every pass; they share no image as long as it keeps
        its order (a shuffling `DataLoader` does not).
        """
        seen = 0
        for x, _ in self:
            seen += len(x)
            if seen >= 2:
                break
        _enough(min(seen, count))
        return _Part(self, count, False), _Part(self, count, True)


@dataclass(frozen=True, eq=False)
class _Part:
    """Every fifth of the first ``count`` images of a stream, or the other four of five."""

    batches: UserBatches
    count: int
    held_out: bool

    def __iter__(self) -> Iterator[tuple[Tensor, None]]:
        start = 0
        for x, _ in self.batches:
            x = x[: self.count - start]
            part = x[(decides(torch.arange(start, start + len(x))) == self.held_out).to(x.device)]
            if len(part):
                yield part, None
            start += len(x)
            if start >= self.count:  # before the stream makes another batch
                break


def _pair(batch: Any) -> tuple[Tensor, Tensor | None]:
    """A user's batch as ``(x, y)``."""
    parts = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
    x = parts[0] if parts else None
    if len(parts) > 2 or not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point():
        got = " and ".join(
            f"{part.dtype} of shape {tuple(part.shape)}" if isinstance(part, Tensor) else type(part).__name__
            for part in parts
        )
        raise InputError(
            f"a batch is {got or 'empty'}; expected a float tensor (B, C, H, W), or a pair of that and labels"
        )
    y = parts[1] if len(parts) == 2 else None
    if y is None:
        return x, None
    try:
        return x, torch.as_tensor(y)
    except (RuntimeError, ValueError, TypeError):  # boxes, names, ...: no classes, which not everybody needs
        return x, None
