"""Images in memory or decoded lazily, their normalisation, and the batches made of them."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dk2pnet.errors import InputError, first_line
from dk2pnet.options import AUGMENTATIONS

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "AUGMENTATIONS",
    "SMALL",
    "USUAL_CROP",
    "Batches",
    "Crop",
    "ImageData",
    "Normalization",
    "Rows",
    "augmentation_for",
    "augmented",
    "batch_size_for",
    "generator_for",
]

_log = logging.getLogger(__name__)

_LEAST = 0.08  # share of the area that a random crop keeps, as is usual

_DIGITS = {"digits", "mnist", "svhn", "svhn_10k"}  # names of data sets
SMALL = 64  # images up to this side are kept in memory once decoded; larger ones are decoded anew for every batch

_STRIDE = 32  # of most networks: sides that they halve without a rest
_SOME = 16  # images that are looked at for colour
_AT_ONCE = 32  # of them decoded by a worker at once
_CHUNK = 512  # rows read from a data set at once

_PRESETS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "mnist": ((0.1307,), (0.3081,)),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
}


# -- normalisation -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Normalization:
    """Per-channel mean and standard deviation of pixels between 0 and 1.

    Example: ``Normalization.parse("cifar10")``, or ``Normalization((0.5,), (0.25,))`` for grey images.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(float(value) for value in self.mean))
        object.__setattr__(self, "std", tuple(float(value) for value in self.std))
        numbers = (*self.mean, *self.std)
        if (
            not self.mean
            or len(self.mean) != len(self.std)
            or not all(map(math.isfinite, numbers))
            or min(self.std) <= 0
        ):
            raise InputError(
                f"normalisation has mean {self.mean} and standard deviation {self.std}; "
                "expected one number per channel in each, the deviations above 0"
            )

    @classmethod
    def parse(cls, text: str) -> Normalization:
        """Read a preset's name or ``MEAN,.../STD,...``, for example ``0.5,0.5,0.5/0.25,0.25,0.25``."""
        if text in _PRESETS:
            return cls(*_PRESETS[text])
        try:
            mean, std = ([float(number) for number in part.split(",")] for part in text.split("/"))
        except ValueError:
            raise InputError(
                f"normalisation {text!r} is not known; expected one of {', '.join(_PRESETS)}, "
                "or numbers as MEAN,.../STD,... such as 0.5,0.5,0.5/0.25,0.25,0.25"
            ) from None
        return cls(tuple(mean), tuple(std))

    def __str__(self) -> str:
        return "/".join(",".join(map(str, numbers)) for numbers in (self.mean, self.std))

    def to_dict(self) -> dict[str, list[float]]:
        """Plain data for JSON: ``{"mean": [...], "std": [...]}``."""
        return {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Sequence[float]]) -> Normalization:
        """Undo `to_dict`."""
        try:
            return cls(tuple(values["mean"]), tuple(values["std"]))
        except (KeyError, TypeError):
            raise InputError(
                f"normalisation is {values!r}; expected the keys 'mean' and 'std', each with a number per channel"
            ) from None

    def check(self, channels: int) -> None:
        """Raise `InputError` unless there is one mean for each of the images' channels."""
        if len(self.mean) != channels:
            raise InputError(
                f"normalisation has {len(self.mean)} channel(s) and the images have {channels}; "
                "give a normalisation with one mean and one deviation per channel, or convert the images"
            )

    def apply(self, images: Tensor) -> Tensor:
        """``(images / 255 - mean) / std``: uint8 (N, C, H, W) -> float32 of the same shape."""
        self.check(images.shape[1])
        mean, std = (torch.tensor(v, device=images.device).view(-1, 1, 1) for v in (self.mean, self.std))
        return images.float().div_(255).sub_(mean).div_(std)

    @classmethod
    def measure(cls, images: Tensor | ImageData) -> Normalization:
        """Measure mean and standard deviation of every channel over all pixels, rounded to 4 decimals."""
        data = images if isinstance(images, ImageData) else ImageData("images", images)
        plain = cls((0.0,) * data.channels, (1.0,) * data.channels)
        total = torch.zeros(2, data.channels, dtype=torch.float64)
        for x, _ in data.batches(_CHUNK, plain):
            pixels = x.double().transpose(0, 1).flatten(1)
            total += torch.stack((pixels.sum(1), pixels.square().sum(1)))
        mean, square = total / (len(data) * data.size[0] * data.size[1])
        std = (square - mean.square()).clamp_min(0).sqrt()
        return cls(tuple(round(v, 4) for v in mean.tolist()), tuple(round(v, 4) for v in std.tolist()))


# -- images ------------------------------------------------------------------------------------------------------------


def _in_steps(side: float) -> int:
    """A whole number; of a large side the nearest that halves five times, as most networks ask for."""
    return round(side / _STRIDE) * _STRIDE if side > SMALL else max(round(side), 1)


@dataclass(frozen=True)
class Crop:
    """A random part of a large image: of at least the share `least` of its area, resized to the image's size; below 1
    `window` is the share of both sides that is cut out of that, with things as large as they were."""

    least: float = _LEAST
    window: float = 1.0

    def size_of(self, whole: tuple[int, int]) -> tuple[int, int]:
        """Height and width of what is cut out of images of that size; below it in steps of `_STRIDE`."""
        if self.window == 1:
            return whole
        height, width = (min(max(round(side * self.window / _STRIDE), 1) * _STRIDE, side) for side in whole)
        return height, width

    def of(self, whole: tuple[int, int], augment: str) -> Callable[[Image], Image]:
        """Cuts it out of a picture or a tensor of that size, and mirrors half of them; from the global generator."""
        from torchvision.transforms import v2

        size = self.size_of(whole)
        share = math.prod(size) / math.prod(whole)
        cut = v2.RandomResizedCrop(size, scale=(self.least * share, share), antialias=True)
        return v2.Compose([cut, v2.RandomHorizontalFlip()]) if augment == "natural" else cut


USUAL_CROP = Crop()


@dataclass(frozen=True, eq=False)
class Rows:
    """Images of a Hugging Face data set, not decoded yet: ``rows`` (N,) of ``column``, to become C x H x W bytes."""

    name: str
    dataset: Any
    column: str
    rows: Tensor
    channels: int
    size: tuple[int, int]
    resize: bool  # else an image of another size is an error
    convert: bool  # else an image in colour among grey ones is an error

    @classmethod
    def probe(
        cls, name: str, dataset: Any, column: str, size: tuple[int | None, int | None] | None, channels: int | None
    ) -> Rows:
        """Learn what was not asked for: the size from the first image, or a side from the shape that some all over the
        data set have, colour from these too."""
        rows = torch.arange(len(dataset))
        images = cls(name, dataset, column, rows, channels or 3, (0, 0), size is not None, channels is not None)

        def some() -> Iterator[Image]:
            numbers = torch.linspace(0, len(dataset) - 1, min(len(dataset), _SOME)).long().tolist()
            values = dataset[numbers][column]
            return (_decode(value, images.where(value, row)) for row, value in zip(numbers, values, strict=True))

        value = dataset[:1][column][0]
        image = _decode(value, images.where(value, 0))
        height, width = size or (image.height, image.width)
        if height is None or width is None:
            aspect = median(each.width / each.height for each in some())
            height = height or _in_steps((width or image.width) / aspect)
            width = width or _in_steps(height * aspect)
            _log.info("images of %r are scaled to %d x %d, as one side is left open", name, height, width)
        if channels is None and _is_grey(image):  # a photograph in grey may well be the first among coloured ones
            channels = 1 if all(map(_is_grey, some())) else 3
        return replace(images, channels=channels or 3, size=(height, width))

    def where(self, value: Any, row: int) -> str:
        """How to name an image to its owner: by its file, or by its row."""
        if isinstance(value, dict) and value.get("bytes") is None and value.get("path"):
            return f"image {value['path']}"
        return f"the image in row {row} of data set {self.name!r}"

    def pictures(self, positions: Tensor) -> Iterator[Image]:
        """Decode the images at these positions, one after the other, in grey or in colour, in their own size."""
        for chunk in self.rows[positions].split(_CHUNK):
            rows = chunk.tolist()
            for row, value in zip(rows, self.dataset[rows][self.column] if rows else [], strict=True):
                image = _decode(value, self.where(value, row))
                if self.channels == 1 and not self.convert and not _is_grey(image):
                    raise InputError(
                        f"{self.where(value, row)} is in colour and others are grey; expected all alike: make them "
                        "so, or in Python ask for channels=3 or channels=1"
                    )
                if not self.resize and (image.height, image.width) != self.size:
                    raise InputError(
                        f"{self.where(value, row)} is {image.height}x{image.width} and the first one "
                        f"{self.size[0]}x{self.size[1]}; expected one size: give the side to use with --input-size"
                    )
                yield image.convert("L" if self.channels == 1 else "RGB")

    def decode(self, positions: Tensor, augment: str = "none", crop: Crop = USUAL_CROP) -> Tensor:
        """Decode the images at these positions to uint8 (B, C, H, W); ``augment`` draws from the global generator."""
        size = self.size if augment == "none" else crop.size_of(self.size)
        out = torch.empty((len(positions), self.channels, *size), dtype=torch.uint8)
        cut = partial(_fit, size=size) if augment == "none" else crop.of(self.size, augment)
        for number, image in enumerate(self.pictures(positions)):
            pixels = torch.from_numpy(np.array(cut(image)))
            out[number] = pixels if self.channels == 1 else pixels.permute(2, 0, 1)
        return out

    def __getitem__(self, batch: tuple[Tensor, str, Crop, int]) -> Tensor | InputError:
        """For a worker of a `DataLoader`: one augmented batch. An error travels whole only if it is handed over."""
        positions, augment, crop, seed = batch
        try:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)
                return self.decode(positions, augment, crop)
        except InputError as error:
            return error


class ImageData:
    """Images, with labels or without.

    Images of at most 64 pixels a side are decoded once, when first used, and kept in memory as bytes; larger ones are
    decoded for every batch, by worker processes.

    Parameters
    ----------
    name
        What messages call the data set.
    images
        uint8 (N, C, H, W); `load` makes data sets whose images are not decoded yet.
    labels
        N class numbers, or None.
    classes
        Names of the classes, or None.

    Attributes
    ----------
    labels : int64 (N,) or None
    channels : int
    size : (H, W)
    """

    def __init__(
        self,
        name: str,
        images: Tensor | Rows,
        labels: Tensor | Sequence[int] | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        if isinstance(images, Tensor) and (images.dtype != torch.uint8 or images.dim() != 4):
            raise InputError(
                f"images are {images.dtype} of shape {tuple(images.shape)}; expected torch.uint8 of shape (N, C, H, W)"
            )
        self.name = name
        self.classes = None if classes is None else list(classes)
        self.labels = None if labels is None else torch.as_tensor(labels, dtype=torch.int64)
        self._rows = images if isinstance(images, Rows) else None
        self._tensor = images if isinstance(images, Tensor) else None
        self._keep = False
        self._length = len(images.rows) if isinstance(images, Rows) else len(images)
        self.channels = images.channels if isinstance(images, Rows) else images.shape[1]
        self.size = images.size if isinstance(images, Rows) else (images.shape[2], images.shape[3])
        if self.labels is not None and self.labels.shape != (self._length,):
            raise InputError(
                f"data set {name!r} has {self._length} images and {self.labels.numel()} labels; expected as many"
            )

    def __len__(self) -> int:
        return self._length

    @property
    def in_memory(self) -> bool:
        """Whether images are decoded once and kept."""
        return self._rows is None or self._keep or max(self.size) <= SMALL

    def kept(self, memory: float) -> ImageData:
        """The same images, large ones too decoded only once if they fit into `memory` bytes.

        For images that many passes see. A random part of them is cut out of what is kept, no longer of the original.
        """
        if self.in_memory:
            return self
        same = self.subset(torch.arange(len(self)))
        same._keep = len(self) * self.channels * math.prod(self.size) <= memory
        return same

    @property
    def images(self) -> Tensor:
        """All images, uint8 (N, C, H, W). Large ones are decoded anew at every call, unless `kept`: ask a subset."""
        if self._tensor is not None:
            return self._tensor
        assert self._rows is not None
        if max(self.size) <= SMALL:
            images = self._rows.decode(torch.arange(len(self)))
        else:
            tasks = [(part, "none", USUAL_CROP, 0) for part in torch.arange(len(self)).split(_AT_ONCE)]
            images = torch.cat(list(_from_workers(self._rows, tasks, 2, 0)))
        if self.in_memory:
            self._tensor = images
        return images

    @property
    def _held(self) -> Tensor | Rows:
        if self._tensor is not None:
            return self._tensor
        assert self._rows is not None
        return self._rows

    def subset(self, indices: Tensor | Sequence[int]) -> ImageData:
        """The images with these numbers, in this order; decodes nothing."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        images: Tensor | Rows
        if self._tensor is not None:
            images = self._tensor[index]
        else:
            assert self._rows is not None
            images = replace(self._rows, rows=self._rows.rows[index])
        return ImageData(self.name, images, None if self.labels is None else self.labels[index], self.classes)

    def numbered_like(self, other: ImageData) -> ImageData:
        """The same with the class numbers of `other`, where the names of the classes come in another order.

        `InputError` where they are other names.
        """
        if not self.classes or not other.classes or self.labels is None or self.classes == other.classes:
            return self
        if sorted(self.classes) != sorted(other.classes):
            raise InputError(
                f"{self.name!r} has the classes {', '.join(self.classes[:4])}, ..., and {other.name!r} has "
                f"{', '.join(other.classes[:4])}, ...; expected the same"
            )
        numbers = torch.tensor([other.classes.index(each) for each in self.classes])
        return ImageData(self.name, self._held, numbers[self.labels], other.classes)

    def without_labels(self) -> ImageData:
        """The same images, labels and classes forgotten."""
        return ImageData(self.name, self._held)

    def batches(
        self,
        batch_size: int,
        normalization: Normalization,
        *,
        augment: str = "none",
        shuffle: bool = False,
        seed: int = 0,
        epoch: int = 0,
        workers: int = 2,
        crop: Crop = USUAL_CROP,
        whole: bool = False,
    ) -> Batches:
        """Batches of at most ``batch_size`` images; see `Batches`.

        ``augment`` is ``natural`` (shift and mirror), ``digits`` (shift) or ``none``. In memory a shift is by up to an
        eighth of the side, filled with black; of larger images a random part is cut out and resized instead, as
        ``crop`` says. ``workers`` processes decode images that are not kept in memory.
        ``whole`` leaves out a last batch that is not full, unless it is the only one.
        """
        return Batches(self, batch_size, normalization, augment, shuffle, seed, epoch, workers, crop=crop, whole=whole)


@dataclass(frozen=True, eq=False)
class Batches:
    """Yields ``(x, y)``: x float32 (B, C, H, W) normalised, y int64 (B,) or None. Made by `ImageData.batches`.

    Every pass gives the same batches. They depend on ``seed`` and ``epoch`` alone, neither on the global random state
    (which is left as it is) nor on the number of workers. ``first``, ``rank`` and ``world``: see `part`.
    """

    data: ImageData
    batch_size: int
    normalization: Normalization
    augment: str = "none"
    shuffle: bool = False
    seed: int = 0
    epoch: int = 0
    workers: int = 2
    first: int = 0
    rank: int = 0
    world: int = 1
    crop: Crop = USUAL_CROP
    whole: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"batch size is {self.batch_size}; expected 1 or more")
        if self.augment not in AUGMENTATIONS:
            raise InputError(f"augmentation is {self.augment!r}; expected one of {', '.join(AUGMENTATIONS)}")
        self.normalization.check(self.data.channels)

    def __len__(self) -> int:
        full, rest = divmod(len(self.data), self.batch_size)
        kept = rest >= self.world and rest > 0 and not (self.whole and full)
        return max(0, full + kept - self.first)

    def part(self, first: int, rank: int = 0, world: int = 1) -> Batches:
        """The same batches from number `first` on; of each, every `world`-th image from number `rank` on.

        Nothing is decoded or augmented for those left out. A batch of fewer than `world` images is left out whole.
        """
        return replace(self, first=first, rank=rank, world=world)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        count, labels = len(self.data), self.data.labels
        generator = generator_for(self.seed, self.epoch)
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        parts: tuple[Tensor, ...] = order.split(self.batch_size) if count else ()
        if self.whole and len(parts) > 1 and len(parts[-1]) < self.batch_size:
            parts = parts[:-1]
        # A seed for each batch, so that any of them can be made without those before it.
        seeds = torch.randint(2**62, (len(parts),), generator=generator).tolist()
        tasks = [
            (part[self.rank :: self.world], self.augment, self.crop, seed + self.rank)
            for part, seed in list(zip(parts, seeds, strict=True))[self.first :]
            if len(part) >= self.world
        ]
        images = self._from_memory(tasks) if self.data.in_memory else self._from_workers(tasks)
        for (part, *_), x in zip(tasks, images, strict=True):
            yield self.normalization.apply(x), None if labels is None else labels[part]

    def _from_memory(self, tasks: Sequence[tuple[Tensor, str, Crop, int]]) -> Iterator[Tensor]:
        for part, augment, crop, seed in tasks:
            yield augmented(self.data.images[part], augment, crop, torch.Generator().manual_seed(seed))

    def _from_workers(self, tasks: Sequence[tuple[Tensor, str, Crop, int]]) -> Iterator[Tensor]:
        assert self.data._rows is not None
        # A seed of its own, else the loader draws from the global generator.
        return _from_workers(self.data._rows, tasks, self.workers, self.seed, self.epoch)


def _from_workers(
    rows: Any, tasks: Sequence[tuple[Tensor, str, Crop, int]], workers: int, *seed: int
) -> Iterator[Tensor]:
    loader: torch.utils.data.DataLoader[Tensor | InputError] = torch.utils.data.DataLoader(
        rows,  # a data set by what it does: the loader asks it for each of the tasks
        sampler=tasks,
        batch_size=None,
        num_workers=min(workers, len(tasks)),
        generator=generator_for(*seed),
    )
    for x in loader:
        if isinstance(x, InputError):
            raise x
        yield x


def augmented(x: Tensor, augment: str, crop: Crop, generator: torch.Generator, lowest: float | Tensor = 0) -> Tensor:
    """Images ``(B, C, H, W)`` as `ImageData.batches` augments those in memory; a shift is filled with `lowest`."""
    if augment == "none":
        return x
    if max(x.shape[2:]) <= SMALL:
        return _shift(x - lowest, generator, flip=augment == "natural") + lowest
    cut: Any = crop.of((x.shape[2], x.shape[3]), augment)
    with torch.random.fork_rng(devices=[]):  # which it draws from
        torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        return torch.stack([cut(image) for image in x])


def generator_for(*key: int) -> torch.Generator:
    """A generator that the numbers of ``key`` determine together."""
    digest = hashlib.sha256(",".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _shift(x: Tensor, generator: torch.Generator, flip: bool) -> Tensor:
    """Move every image of ``x (B, C, H, W)`` by up to an eighth of its sides, filling with 0; mirror half of them."""
    count, _, height, width = x.shape
    down, right = height // 8, width // 8
    padded = F.pad(x, (right, right, down, down))
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view (B, C, dy, dx, H, W)
    dy = torch.randint(2 * down + 1, (count,), generator=generator)
    dx = torch.randint(2 * right + 1, (count,), generator=generator)
    x = windows[torch.arange(count), :, dy, dx]
    if flip:
        mirrored = torch.rand(count, generator=generator) < 0.5
        x = torch.where(mirrored.view(-1, 1, 1, 1), x.flip(3), x)
    return x


def _fit(image: Image, size: tuple[int, int]) -> Image:
    """Resize to cover `size` and cut out the centre; large images lose a margin, as is usual (256 to 224)."""
    if (image.height, image.width) == size:
        return image
    from torchvision.transforms.v2 import functional

    height, width = (side if max(size) <= SMALL else round(side * 256 / 224) for side in size)
    if image.height * width <= image.width * height:
        width = height * image.width // image.height
    else:
        height = width * image.height // image.width
    return functional.center_crop(functional.resize(image, [height, width], antialias=True), list(size))


def _is_grey(image: Image) -> bool:
    return image.mode in ("1", "L", "LA")


def _decode(value: Any, where: str) -> Image:
    """Decode what a data set holds for an image: ``{"bytes": ..., "path": ...}``."""
    from datasets import Image

    try:
        image = Image().decode_example(value)
    except Exception as error:  # whatever a decoder raises, the file is what has to be put right
        raise InputError(f"{where} cannot be read ({first_line(error)}); replace it or leave it out") from error
    if image.mode == "F" or image.mode.startswith("I"):
        raise InputError(f"{where} has pixels of mode {image.mode}; expected 8 bits a channel: convert it")
    return image


# -- choices -----------------------------------------------------------------------------------------------------------


def batch_size_for(size: Iterable[int]) -> int:
    """Images per forward pass where nobody trains: bounded activations at 224 x 224, few calls at 32 x 32."""
    return 128 if max(size) <= 64 else 16


def augmentation_for(name: str) -> str:
    """Digits, on the hub or in a folder of such a name, are never mirrored."""
    return "digits" if Path(name).name.lower() in _DIGITS else "natural"
