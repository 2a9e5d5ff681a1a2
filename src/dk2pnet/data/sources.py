"""Where data sets come from: the hub or a copy of it, folders of images, scikit-learn's digits."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dk2pnet.data.images import ImageData, Rows, generator_for
from dk2pnet.errors import InputError, first_line

__all__ = ["has_split", "load", "load_test"]

# Short name -> name on the hub and configuration; without a name on the hub, only a local copy can be read.
_HUB: dict[str, tuple[str | None, str | None]] = {
    "mnist": ("ylecun/mnist", None),
    "cifar10": ("uoft-cs/cifar10", None),
    "cifar100": ("uoft-cs/cifar100", None),
    "svhn": ("ufldl-stanford/svhn", "cropped_digits"),
    "svhn_10k": (None, None),
}

_TEST = ("test", "validation", "val", "valid")  # the first of these that a data set has is its test split

# What a folder with a split may be called, in small letters or capitals.
_SPLITS = {name: name for name in ("train", *_TEST)} | {"training": "train", "testing": "test"}

_SHARD = re.compile(r"(?P<split>[\w.]+)-\d{5}-of-(?P<total>\d{5})(-[0-9a-f]+)?\.parquet")

# Folders of a data set of segmentation, in small letters.
_PICTURES = {
    *("frames", "image", "images", "img", "imgs", "input", "inputs", "jpegimages", "jpegs", "jpgs", "leftimg8bit"),
    *("photos", "pictures", "rgb"),
}
_MASKS = {
    *("annotation", "annotations", "groundtruth", "ground_truth", "gt", "gtfine", "label", "labels", "mask", "masks"),
    *("seg", "segmentation", "segmentationclass", "segmentations", "target", "targets", "trimaps"),
}

_IMAGE_FILES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def load_test(name: str, training: ImageData, data_dir: str | None = None) -> ImageData | None:
    """The test split in the size, the colours and the class numbers of the training split; None where there is none."""
    if not has_split(name, "test", data_dir):
        return None
    test = load(name, "test", data_dir=data_dir, size=training.size, channels=training.channels)
    return test.numbered_like(training)


# -- data sets ---------------------------------------------------------------------------------------------------------


def load(
    name: str | os.PathLike[str],
    split: str = "train",
    *,
    data_dir: str | os.PathLike[str] | None = None,
    size: int | tuple[int | None, int | None] | None = None,
    channels: int | None = None,
) -> ImageData:
    """Open a data set; of its images only the first is decoded, and where that is grey some more.

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
        Side, or (height, width), that images are resized to; one of both that is None follows from what shape most
        images have. Without it all must have one size.
    channels
        1 (grey) or 3 (colour); without it, 3 where one of the images looked at has colours.

    Raises
    ------
    InputError
        When there is no such data set or split, or an image cannot be read.
    """
    name = os.fspath(name)
    sides = (size, size) if isinstance(size, int) else size
    least = min((side for side in sides or () if side is not None), default=1)
    if least < 1:
        raise InputError(f"image side is {least}; expected 1 or more")
    if channels not in (None, 1, 3):
        raise InputError(f"channels is {channels}; expected 1 (grey) or 3 (colour)")
    splits = _find(name, data_dir)
    found = _pick(splits, split)
    if found is None:
        raise InputError(f"data set {name!r} has no split {split!r}; it has {', '.join(splits)}: choose one of these")
    return _from_dataset(name, splits[found](), sides, channels)


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
        last = hub.split("/")[-1]
        # DATA/mnist is not somebody else's OWNER/mnist.
        for part in (name, hub, last) if _on_hub(last)[0] in (hub, last) else (name, hub):
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
            f"data set {hub!r} could not be loaded from the Hugging Face hub ({first_line(error)}); "
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
        totals: dict[str, int] = {}
        for path in sorted(place.glob("*.parquet")):
            match = _SHARD.fullmatch(path.name)
            if match:
                shards.setdefault(match["split"], []).append(path)
                totals.setdefault(match["split"], int(match["total"]))
        for split, paths in shards.items():
            if len(paths) != totals[split]:
                raise InputError(
                    f"{place} has {len(paths)} of {totals[split]} shards of split {split!r}; fetch those missing"
                )
        if shards:
            return {split: partial(_open_parquet, place, split, paths) for split, paths in shards.items()}
    return {}


def _open_parquet(folder: Path, split: str, paths: list[Path]) -> Any:
    try:
        return _datasets().load_dataset("parquet", data_files={split: [str(path) for path in paths]}, split=split)
    except Exception as error:
        reason = first_line(error.__cause__ or error)
        raise InputError(
            f"parquet shards of split {split!r} in {folder} cannot be read ({reason}); fetch them again"
        ) from error


def _image_splits(folder: Path) -> dict[str, Callable[[], Any]]:
    """Splits of a folder of images: sub-folders if all have names of splits, else one, ``train``."""
    children = _class_folders(folder)
    splits = [child for child in children if child.name.lower() in _SPLITS]
    if children and len(splits) == len(children):
        places = {_SPLITS[child.name.lower()]: child for child in children}
        if len(places) < len(children):
            raise InputError(f"folder {folder} holds {_names(children)}, twice the same split; leave one of them")
    elif any(_class_folders(child) for child in splits):  # a class, too, may be called train, but holds no classes
        raise InputError(
            f"folder {folder} holds {_names(children)}: a split with classes in it, and others; expected only splits "
            f"({', '.join(_SPLITS)}) or only classes: move the others away"
        )
    elif next(_image_files(folder), None) is not None:
        places = {"train": folder}
    else:
        raise InputError(
            f"folder {folder} holds neither images nor parquet shards SPLIT-SSSSS-of-NNNNN.parquet; give one that does"
        )
    for place in places.values():
        _refuse_masks(place)
    # A class without images in one split must not shift the numbers of the others.
    classes = sorted({child.name for place in places.values() for child in _class_folders(place)})
    return {split: partial(_open_images, place, classes) for split, place in places.items()}


def _refuse_masks(folder: Path) -> None:
    """Of segmentation: masks are no class, and would calibrate."""
    children = _class_folders(folder)
    images, masks = (next((c for c in children if c.name.lower() in names), None) for names in (_PICTURES, _MASKS))
    if images and masks:
        raise InputError(
            f"folder {folder} holds {_names(children)}: images and, by their name, masks of segmentation, which would "
            f"be taken for two classes; give the images alone: {images}"
        )


def _names(folders: list[Path]) -> str:
    names = [f"{folder.name}/" for folder in folders]
    return ", ".join(names if len(names) <= 5 else [*names[:5], "..."])


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
    """Below the folder, links followed, but none to where it lies itself: there are other classes, and it once more."""
    root = Path(os.path.realpath(folder))
    seen = {str(each) for each in (root, *root.parents)}
    for place, folders, files in os.walk(folder, followlinks=True):
        within = {name: os.path.realpath(os.path.join(place, name)) for name in folders if not name.startswith(".")}
        folders[:] = [name for name, real in within.items() if real not in seen]
        seen.update(within.values())
        yield from (
            Path(place, name)
            for name in files
            if Path(name).suffix.lower() in _IMAGE_FILES and not name.startswith(".")
        )


def _digits(split: str) -> Any:
    """scikit-learn's digits, four fifths for training; which images is the same for ever."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=generator_for(0)).tolist()
    test = len(order) // 5
    rows = sorted(order[:test] if split == "test" else order[test:])
    pixels = np.round(digits.images[rows] * (255 / 16)).astype(np.uint8)
    datasets = _datasets()
    names = [str(name) for name in digits.target_names]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict({"image": list(pixels), "label": digits.target[rows].tolist()}, features)


def _from_dataset(
    name: str, dataset: Any, size: tuple[int | None, int | None] | None, channels: int | None
) -> ImageData:
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
    return ImageData(name, Rows.probe(name, raw, column, size, channels), labels, classes)


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
