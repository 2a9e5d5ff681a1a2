"""Data sets by name or by path, and the batches that calibration, training and measuring read.

    data = load("cifar10", "train", data_dir="~/data")         # nothing is decoded yet except the first image
    train, validation = split_training(data)                   # 45,000 and 5,000 images
    gather, held_out = calibration_split(train, 1000)          # 800 and 200 images, without labels
    for x, y in train.batches(128, Normalization.parse("cifar10"), augment="natural", shuffle=True):
        ...                                                    # x float32 (128, 3, 32, 32), y int64 (128,)

Images come through Hugging Face `datasets`, from the hub or from a folder in the hub's layout, or from a plain folder
of images. Nothing heavy is imported before it is needed.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dk2pnet.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "AUGMENTATIONS",
    "Batches",
    "ImageData",
    "Normalization",
    "UserBatches",
    "calibration_split",
    "has_split",
    "load",
    "split_training",
]

AUGMENTATIONS = ("none", "digits", "natural")

_SMALL = 64  # images up to this side are kept in memory once decoded; larger ones are decoded anew for every batch
_CHUNK = 512  # rows read from a data set at once

# Short name -> name on the hub and configuration; without a name on the hub, only a local copy can be read.
_HUB: dict[str, tuple[str | None, str | None]] = {
    "mnist": ("ylecun/mnist", None),
    "cifar10": ("uoft-cs/cifar10", None),
    "cifar100": ("uoft-cs/cifar100", None),
    "svhn": ("ufldl-stanford/svhn", "cropped_digits"),
    "svhn_10k": (None, None),
}
_PRESETS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "mnist": ((0.1307,), (0.3081,)),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
}
_TEST = ("test", "validation", "val", "valid")  # the first of these that a data set has is its test split
_SHARD = re.compile(r"(?P<split>[\w.]+)-\d{5}-of-(?P<total>\d{5})(-[0-9a-f]+)?\.parquet")
_IMAGE_FILES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


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


@dataclass(frozen=True, eq=False)
class _Rows:
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
    def probe(cls, name: str, dataset: Any, column: str, size: int | None, channels: int | None) -> _Rows:
        """Learn from the first image alone what was not asked for."""
        rows = torch.arange(len(dataset))
        images = cls(
            name, dataset, column, rows, channels or 3, (size or 0,) * 2, size is not None, channels is not None
        )
        value = dataset[:1][column][0]
        image = _decode(value, images.where(value, 0))
        height, width = (size, size) if size else (image.height, image.width)
        return replace(images, channels=channels or (1 if _is_grey(image) else 3), size=(height, width))

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
                        f"{self.where(value, row)} is in colour and the first one is grey; "
                        "expected all alike: ask for channels=3 or channels=1"
                    )
                if not self.resize and (image.height, image.width) != self.size:
                    raise InputError(
                        f"{self.where(value, row)} is {image.height}x{image.width} and the first one "
                        f"{self.size[0]}x{self.size[1]}; expected one size: give the side to use with --input-size"
                    )
                yield image.convert("L" if self.channels == 1 else "RGB")

    def decode(self, positions: Tensor, augment: str = "none") -> Tensor:
        """Decode the images at these positions to uint8 (B, C, H, W); ``augment`` draws from the global generator."""
        out = torch.empty((len(positions), self.channels, *self.size), dtype=torch.uint8)
        crop = _random_crop(self.size, augment) if augment != "none" else partial(_fit, size=self.size)
        for number, image in enumerate(self.pictures(positions)):
            pixels = torch.from_numpy(np.array(crop(image)))
            out[number] = pixels if self.channels == 1 else pixels.permute(2, 0, 1)
        return out

    def __getitem__(self, batch: tuple[Tensor, str, int]) -> Tensor | InputError:
        """For a worker of a `DataLoader`: one augmented batch. An error travels whole only if it is handed over."""
        positions, augment, seed = batch
        try:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)
                return self.decode(positions, augment)
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
        images: Tensor | _Rows,
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
        self._rows = images if isinstance(images, _Rows) else None
        self._tensor = images if isinstance(images, Tensor) else None
        self._length = len(images.rows) if isinstance(images, _Rows) else len(images)
        self.channels = images.channels if isinstance(images, _Rows) else images.shape[1]
        self.size: tuple[int, int] = images.size if isinstance(images, _Rows) else tuple(images.shape[2:])  # type: ignore
        if self.labels is not None and self.labels.shape != (self._length,):
            raise InputError(
                f"data set {name!r} has {self._length} images and {self.labels.numel()} labels; expected as many"
            )

    def __len__(self) -> int:
        return self._length

    @property
    def in_memory(self) -> bool:
        """Whether images are decoded once and kept."""
        return self._rows is None or max(self.size) <= _SMALL

    @property
    def images(self) -> Tensor:
        """All images, uint8 (N, C, H, W). Large ones are decoded anew at every call: ask a subset."""
        if self._tensor is not None:
            return self._tensor
        assert self._rows is not None
        images = self._rows.decode(torch.arange(len(self)))
        if self.in_memory:
            self._tensor = images
        return images

    def subset(self, indices: Tensor | Sequence[int]) -> ImageData:
        """The images with these numbers, in this order; decodes nothing."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        images: Tensor | _Rows
        if self._tensor is not None:
            images = self._tensor[index]
        else:
            assert self._rows is not None
            images = replace(self._rows, rows=self._rows.rows[index])
        return ImageData(self.name, images, None if self.labels is None else self.labels[index], self.classes)

    def without_labels(self) -> ImageData:
        """The same images, labels and classes forgotten."""
        return ImageData(self.name, self._rows if self._tensor is None else self._tensor)  # type: ignore[arg-type]

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
    ) -> Batches:
        """Batches of at most ``batch_size`` images; see `Batches`.

        ``augment`` is ``natural`` (shift and mirror), ``digits`` (shift) or ``none``. In memory a shift is by up to an
        eighth of the side, filled with black; of larger images a random part is cut out and resized instead.
        ``workers`` processes decode images that are not kept in memory.
        """
        return Batches(self, batch_size, normalization, augment, shuffle, seed, epoch, workers)


@dataclass(frozen=True, eq=False)
class Batches:
    """Yields ``(x, y)``: x float32 (B, C, H, W) normalised, y int64 (B,) or None. Made by `ImageData.batches`.

    Every pass gives the same batches. They depend on ``seed`` and ``epoch`` alone, neither on the global random state
    (which is left as it is) nor on the number of workers.
    """

    data: ImageData
    batch_size: int
    normalization: Normalization
    augment: str = "none"
    shuffle: bool = False
    seed: int = 0
    epoch: int = 0
    workers: int = 2

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"batch size is {self.batch_size}; expected 1 or more")
        if self.augment not in AUGMENTATIONS:
            raise InputError(f"augmentation is {self.augment!r}; expected one of {', '.join(AUGMENTATIONS)}")
        self.normalization.check(self.data.channels)

    def __len__(self) -> int:
        return -(-len(self.data) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        count, labels = len(self.data), self.data.labels
        generator = _generator(self.seed, self.epoch)
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        parts = order.split(self.batch_size) if count else ()
        images = self._from_memory(parts, generator) if self.data.in_memory else self._from_workers(parts, generator)
        for part, x in zip(parts, images, strict=True):
            yield self.normalization.apply(x), None if labels is None else labels[part]

    def _from_memory(self, parts: Sequence[Tensor], generator: torch.Generator) -> Iterator[Tensor]:
        images = self.data.images
        for part in parts:
            x = images[part]
            yield x if self.augment == "none" else _shift(x, generator, flip=self.augment == "natural")

    def _from_workers(self, parts: Sequence[Tensor], generator: torch.Generator) -> Iterator[Tensor]:
        seeds = torch.randint(2**62, (len(parts),), generator=generator).tolist()
        tasks = [(part, self.augment, seed) for part, seed in zip(parts, seeds, strict=True)]
        loader = torch.utils.data.DataLoader(
            self.data._rows,  # type: ignore[arg-type]
            sampler=tasks,  # type: ignore[arg-type]
            batch_size=None,
            num_workers=min(self.workers, len(parts)),
            generator=generator,  # else the loader draws from the global one
        )
        for x in loader:
            if isinstance(x, InputError):
                raise x
            yield x


def _generator(*key: int) -> torch.Generator:
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


def _random_crop(size: tuple[int, int], augment: str) -> Callable[[Image], Image]:
    from torchvision.transforms import v2

    crop = v2.RandomResizedCrop(size, antialias=True)
    return v2.Compose([crop, v2.RandomHorizontalFlip()]) if augment == "natural" else crop


def _fit(image: Image, size: tuple[int, int]) -> Image:
    """Resize the shorter side and cut out the centre; large images lose a margin, as is usual (256 to 224)."""
    if (image.height, image.width) == size:
        return image
    from torchvision.transforms.v2 import functional

    side = size[0] if size[0] <= _SMALL else round(size[0] * 256 / 224)
    return functional.center_crop(functional.resize(image, [side], antialias=True), list(size))


def _is_grey(image: Image) -> bool:
    return image.mode in ("1", "L", "LA")


def _decode(value: Any, where: str) -> Image:
    """Decode what a data set holds for an image: ``{"bytes": ..., "path": ...}``."""
    from datasets import Image

    try:
        image = Image().decode_example(value)
    except Exception as error:  # whatever a decoder raises, the file is what has to be put right
        raise InputError(f"{where} cannot be read ({_first_line(error)}); replace it or leave it out") from error
    if image.mode == "F" or image.mode.startswith("I"):
        raise InputError(f"{where} has pixels of mode {image.mode}; expected 8 bits a channel: convert it")
    return image


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


# -- data sets ---------------------------------------------------------------------------------------------------------


def load(
    name: str | os.PathLike[str],
    split: str = "train",
    *,
    data_dir: str | os.PathLike[str] | None = None,
    size: int | None = None,
    channels: int | None = None,
) -> ImageData:
    """Open a data set; of its images only the first is decoded.

    Example: ``load("digits")`` has 1,438 images of 1 x 8 x 8; ``load("digits", "test")`` the other 359.

    Parameters
    ----------
    name
        ``digits`` (scikit-learn's), ``mnist``, ``cifar10``, ``cifar100``, ``svhn``, ``svhn_10k`` (a local copy only),
        any ``owner/name`` of the Hugging Face hub, or a folder: parquet shards ``SPLIT-SSSSS-of-NNNNN.parquet``, in it
        or in its ``data/``, or images as ``SPLIT/CLASS/x.png``, ``CLASS/x.png`` or ``x.png``.
    split
        ``train``, ``test``, or what else there is. A data set without ``test`` is asked for its validation split.
    data_dir
        Folder with one sub-folder per data set, searched before the hub; else the environment variable DK2PNET_DATA.
    size
        Side that images are resized to; without it all must have one size.
    channels
        1 (grey) or 3 (colour); without it, what the first image has.

    Raises
    ------
    InputError
        When there is no such data set or split, or an image cannot be read.
    """
    name = os.fspath(name)
    if size is not None and size < 1:
        raise InputError(f"image side is {size}; expected 1 or more")
    if channels not in (None, 1, 3):
        raise InputError(f"channels is {channels}; expected 1 (grey) or 3 (colour)")
    splits = _find(name, data_dir)
    found = _pick(splits, split)
    if found is None:
        raise InputError(f"data set {name!r} has no split {split!r}; it has {', '.join(splits)}: choose one of these")
    return _from_dataset(name, splits[found](), size, channels)


def has_split(name: str | os.PathLike[str], split: str, data_dir: str | os.PathLike[str] | None = None) -> bool:
    """Whether `load` finds this split, by the same rules (a validation split passes for ``test``)."""
    return _pick(_find(os.fspath(name), data_dir), split) is not None


def _pick(splits: Iterable[str], split: str) -> str | None:
    return next((each for each in (_TEST if split == "test" else (split,)) if each in splits), None)


def _find(name: str, data_dir: str | os.PathLike[str] | None) -> Mapping[str, Callable[[], Any]]:
    """The splits of a data set, each with the function that opens it as a `datasets.Dataset`."""
    if name == "digits":
        return {split: partial(_digits, split) for split in ("train", "test")}
    folder = _folder(name, data_dir)
    if folder is not None:
        return _parquet_splits(folder, _on_hub(name)[1]) or _image_splits(folder)
    hub, config = _on_hub(name)
    if hub is None:
        raise InputError(f"data set {name!r} is not on the hub: give the folder that holds {name}/ with --data-dir")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", hub):
        raise InputError(
            f"data set {name!r} is not known; expected digits, {', '.join(_HUB)}, a hub name OWNER/NAME or a folder "
            "(other names are looked up in the folder given with --data-dir)"
        )
    return _hub_splits(hub, config)


def _on_hub(name: str) -> tuple[str | None, str | None]:
    """Name on the hub (None if it is not there) and configuration of a data set given by its short or its full name."""
    return next((known for short, known in _HUB.items() if name in (short, known[0])), (name, None))


def _folder(name: str, data_dir: str | os.PathLike[str] | None) -> Path | None:
    """Where a data set lies on this machine; None if it has to come from the hub."""
    path = Path(name).expanduser()
    is_path = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or "\\" in name
    root = data_dir or os.environ.get("DK2PNET_DATA")
    if root and name and not is_path:
        if not Path(root).expanduser().is_dir():
            raise InputError(f"data folder {root} does not exist; give an existing one with --data-dir or DK2PNET_DATA")
        hub = _on_hub(name)[0] or name
        for part in (name, hub, hub.split("/")[-1]):
            folder = Path(root).expanduser() / part
            if folder.is_dir():
                return folder
    if name and name not in _HUB and path.is_dir():
        return path
    if is_path:
        raise InputError(f"folder {name} does not exist; expected a folder of images or of parquet shards")
    return None


def _datasets() -> Any:
    import datasets

    datasets.disable_progress_bars()
    return datasets


def _hub_splits(hub: str, config: str | None) -> dict[str, Callable[[], Any]]:
    try:
        loaded = _datasets().load_dataset(hub, config)
    except Exception as error:  # the network, the hub and the builder each have exceptions of their own
        raise InputError(
            f"data set {hub!r} could not be loaded from the Hugging Face hub ({_first_line(error)}); "
            "check its name and the connection, or give a folder with a local copy with --data-dir"
        ) from error
    return {split: partial(loaded.__getitem__, split) for split in loaded}


def _parquet_splits(folder: Path, config: str | None) -> dict[str, Callable[[], Any]]:
    """Splits of parquet shards in the folder, in its data/, or in a folder per configuration, as on the hub."""
    below = [child for child in sorted(folder.iterdir()) if child.is_dir() and any(child.glob("*-of-*.parquet"))]
    if len(below) > 1:
        below = [child for child in below if child.name in ("data", config)]
    for place in (folder, *below):
        shards: dict[str, list[Path]] = {}
        for path in sorted(place.glob("*.parquet")):
            match = _SHARD.fullmatch(path.name)
            if match:
                shards.setdefault(match["split"], []).append(path)
        for split, paths in shards.items():
            total = int(_SHARD.fullmatch(paths[0].name)["total"])  # type: ignore[index]
            if len(paths) != total:
                raise InputError(f"{place} has {len(paths)} of {total} shards of split {split!r}; fetch those missing")
        if shards:
            return {split: partial(_open_parquet, place, split, paths) for split, paths in shards.items()}
    return {}


def _open_parquet(folder: Path, split: str, paths: list[Path]) -> Any:
    try:
        return _datasets().load_dataset("parquet", data_files={split: [str(path) for path in paths]}, split=split)
    except Exception as error:
        reason = _first_line(error.__cause__ or error)
        raise InputError(
            f"parquet shards of split {split!r} in {folder} cannot be read ({reason}); fetch them again"
        ) from error


def _image_splits(folder: Path) -> dict[str, Callable[[], Any]]:
    """Splits of a folder of images: sub-folders if all have names of splits, else one, ``train``."""
    children = _class_folders(folder)
    if children and all(child.name in ("train", *_TEST) for child in children):
        places = {child.name: child for child in children}
    elif next(_image_files(folder), None) is not None:
        places = {"train": folder}
    else:
        raise InputError(
            f"folder {folder} holds neither images nor parquet shards SPLIT-SSSSS-of-NNNNN.parquet; give one that does"
        )
    # A class without images in one split must not shift the numbers of the others.
    classes = sorted({child.name for place in places.values() for child in _class_folders(place)})
    return {split: partial(_open_images, place, classes) for split, place in places.items()}


def _open_images(folder: Path, classes: list[str]) -> Any:
    datasets = _datasets()
    children = _class_folders(folder)
    directly = sorted(str(path) for path in _image_files(folder) if path.parent == folder)
    if not children:
        return datasets.Dataset.from_dict({"image": directly}, datasets.Features({"image": datasets.Image()}))
    if directly:
        raise InputError(
            f"folder {folder} holds images both directly and in sub-folders; expected one sub-folder per class, "
            "or only images without labels"
        )
    columns: dict[str, list[Any]] = {"image": [], "label": []}
    for child in children:
        files = sorted(map(str, _image_files(child)))
        columns["image"] += files
        columns["label"] += [classes.index(child.name)] * len(files)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)})
    return datasets.Dataset.from_dict(columns, features)


def _class_folders(folder: Path) -> list[Path]:
    """Sub-folders that hold images, at any depth."""
    children = sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    return [child for child in children if next(_image_files(child), None) is not None]


def _image_files(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (
            Path(place, name)
            for name in files
            if Path(name).suffix.lower() in _IMAGE_FILES and not name.startswith(".")
        )


def _digits(split: str) -> Any:
    """scikit-learn's digits, four fifths for training; which images is the same for ever."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=_generator(0)).tolist()
    test = len(order) // 5
    rows = sorted(order[:test] if split == "test" else order[test:])
    pixels = np.round(digits.images[rows] * (255 / 16)).astype(np.uint8)
    datasets = _datasets()
    names = [str(name) for name in digits.target_names]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict({"image": list(pixels), "label": digits.target[rows].tolist()}, features)


def _from_dataset(name: str, dataset: Any, size: int | None, channels: int | None) -> ImageData:
    """Find the images and the labels among the columns."""
    datasets = _datasets()
    if not len(dataset):
        raise InputError(f"data set {name!r} holds no images in this split; expected at least one")
    features = dataset.features
    images = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    if not images:
        raise InputError(f"data set {name!r} has the columns {', '.join(features)}; expected one of images")
    column = next((each for each in ("image", "img") if each in images), images[0])
    named = [each for each in ("label", "fine_label") if "int" in getattr(features.get(each), "dtype", "")]
    label = next(iter(named + [each for each in features if isinstance(features[each], datasets.ClassLabel)]), None)
    labels = _labels(name, dataset, label) if label else None
    classes = getattr(features[label], "names", None) if label and labels is not None else None
    raw = dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    return ImageData(name, _Rows.probe(name, raw, column, size, channels), labels, classes)


def _labels(name: str, dataset: Any, column: str) -> Tensor | None:
    """Labels, int64 (N,). The hub's unlabelled splits have -1 or nothing throughout."""
    values = dataset.select_columns([column]).with_format(None)[:][column]
    labels = torch.tensor([-1 if value is None else value for value in values], dtype=torch.int64)
    missing = (labels < 0).nonzero().flatten()
    if 0 < len(missing) < len(labels):
        raise InputError(
            f"row {int(missing[0])} of data set {name!r} has no label; expected a label for every image, or for none"
        )
    return None if len(missing) else labels


# -- splits ------------------------------------------------------------------------------------------------------------


def split_training(data: ImageData, seed: int = 0) -> tuple[ImageData, ImageData]:
    """Split into nine tenths to train with and a tenth to validate with; the length and seed alone determine which."""
    if len(data) < 2:
        raise InputError(f"data set {data.name!r} has {len(data)} image(s); expected at least 2, to hold one out")
    order = torch.randperm(len(data), generator=_generator(seed))
    held_out = max(1, len(data) // 10)
    return data.subset(order[held_out:].sort().values), data.subset(order[:held_out].sort().values)


def calibration_split(data: ImageData, count: int) -> tuple[ImageData, ImageData]:
    """Take ``count`` images (or all, if fewer), without labels: four fifths to gather with, a fifth to decide with.

    Which images depends on the length alone.
    """
    chosen = torch.randperm(len(data), generator=_generator(1))[: max(count, 0)]
    _enough(len(chosen))
    held_out = torch.arange(len(chosen)) % 5 == 0
    data = data.without_labels()
    return data.subset(chosen[~held_out]), data.subset(chosen[held_out])


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
            part = x[((torch.arange(start, start + len(x)) % 5 == 0) == self.held_out).to(x.device)]
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
    return x, None if y is None else torch.as_tensor(y)
