"""A user's own image-like batches, shuffled, cropped and mirrored: what data sets get by themselves, for tuning."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dk2pnet.data.images import USUAL_CROP, Crop, ImageData, augmented, generator_for

__all__ = ["TensorBatches", "TensorImages", "image_like", "images_of"]

_LEAST_SIDE = 8


def image_like(x: object) -> bool:
    """Whether a batch holds images: floats ``(B, 1 or 3, H, W)``."""
    return (
        isinstance(x, Tensor)
        and x.is_floating_point()
        and x.dim() == 4
        and x.shape[1] in (1, 3)
        and min(x.shape[2:]) >= _LEAST_SIDE
    )


class TensorImages:
    """Normalised images ``(B, C, H, W)`` of re-iterable `batches`, without labels.

    Up to `memory` bytes they are kept, so that every epoch has an order of its own; beyond that the batches come in
    their own order and size in every epoch, each augmented.
    """

    def __init__(self, batches: Iterable[tuple[Tensor, Tensor | None]], memory: float) -> None:
        self.stream = batches
        self.kept: list[Tensor] | None = []
        used = 0
        for x, _ in batches:
            used += x.numel() * x.element_size()
            if used > memory:
                self.kept = None
                break
            self.kept.append(x)
        first = next(iter(batches))[0]
        self.lowest = first.amin((0, 2, 3))  # what black has become
        self.length = sum(map(len, self.kept)) if self.kept is not None else 0
        self.steps = sum(1 for _ in batches) if self.kept is None else 0
        shapes = {x.shape[1:] for x in self.kept or ()}
        if len(shapes) > 1:  # of several sizes: batches as they are
            self.steps, self.kept = len(self.kept or ()), None

    def batches(
        self, batch_size: int, *, augment: str, seed: int = 0, epoch: int = 0, crop: Crop = USUAL_CROP
    ) -> TensorBatches:
        """Whole batches, unless there are fewer images; `augment`, `crop` as in `ImageData.batches`."""
        return TensorBatches(self, batch_size, augment, seed, epoch, crop)


def images_of(data: Any, memory: float) -> Any:
    """A user's batches as `TensorImages` where they hold images, a data set or other batches as they are."""
    if isinstance(data, ImageData) or not image_like(next(iter(data))[0]):
        return data
    return TensorImages(data, memory)


@dataclass(frozen=True, eq=False)
class TensorBatches:
    """Yields ``(x, None)``; every pass gives the same. Made by `TensorImages.batches`."""

    images: TensorImages
    batch_size: int
    augment: str
    seed: int
    epoch: int
    crop: Crop

    def __len__(self) -> int:
        return max(1, self.images.length // self.batch_size) if self.images.kept is not None else self.images.steps

    def __iter__(self) -> Iterator[tuple[Tensor, None]]:
        for number, x in enumerate(self._plain()):
            lowest = self.images.lowest.view(-1, 1, 1).to(x)
            yield augmented(x, self.augment, self.crop, generator_for(self.seed, self.epoch, number), lowest), None

    def _plain(self) -> Iterator[Tensor]:
        kept = self.images.kept
        if kept is None:
            yield from (x for x, _ in self.images.stream)
            return
        places = [(number, row) for number, x in enumerate(kept) for row in range(len(x))]
        order = torch.randperm(len(places), generator=generator_for(self.seed, self.epoch)).tolist()
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            chosen = (places[each] for each in order[start : start + self.batch_size])
            yield torch.stack([kept[number][row] for number, row in chosen])
