"""Arrays by the names of a network's inputs: from an ``.npz`` file, or noise in the shapes that it declares."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dk2pnet.errors import InputError, first_line

__all__ = ["ArrayBatches", "Arrays", "Feed", "Input", "example_feed", "image_batches", "is_arrays", "read_arrays"]


@dataclass(frozen=True)
class Feed:
    """What is fed to a network of several inputs: an array for each name, together so many `samples`."""

    arrays: dict[str, np.ndarray]
    samples: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the first input."""
        return next(iter(self.arrays.values())).shape if self.arrays else ()

    def __len__(self) -> int:
        return self.samples

    def rows(self) -> list[Tensor]:
        """The arrays of numbers, samples first."""
        numbers = [torch.from_numpy(array) for array in self.arrays.values() if array.dtype.kind in "fiub"]
        return [each[None] for each in numbers] if self.samples == 1 else numbers

    def __getitem__(self, rows: Any) -> Feed:
        """Some of the samples; of a single one nothing is cut, as its arrays may have no axis for samples."""
        if self.samples == 1:
            return self
        arrays = {name: array[rows] for name, array in self.arrays.items()}
        return Feed(arrays, len(next(iter(arrays.values()))))


@dataclass(frozen=True)
class Input:
    """What a network takes: `dims` are its declared sizes, None where one is left open."""

    name: str
    dims: tuple[int | None, ...]
    dtype: np.dtype

    def __str__(self) -> str:
        name = {"float32": "float", "float64": "double"}.get(self.dtype.name, self.dtype.name)
        return f"{name} ({', '.join('?' if dim is None else str(dim) for dim in self.dims)})"


def example_feed(inputs: Sequence[Input], size: int | None) -> Feed:
    """One sample of noise, where the network declares its shapes; `size` stands in for open heights and widths."""
    arrays = {}
    generator = np.random.default_rng(0)
    for value in inputs:
        dims = [1 if dim is None and axis == 0 else dim for axis, dim in enumerate(value.dims)]
        dims = [size if dim is None and axis >= len(dims) - 2 else dim for axis, dim in enumerate(dims)]
        known = [dim for dim in dims if dim is not None]
        if len(known) < len(dims):
            raise InputError(f"the size of the input {value.name!r} is left open, {value}; give --data or --input-size")
        noise = generator.standard_normal(known)
        arrays[value.name] = (noise if value.dtype.kind == "f" else np.zeros(known)).astype(value.dtype)
    # Of a fixed batch of images; of other inputs nobody says that the first axis is that of samples.
    batches = (value.dims[0] for value in inputs if len(value.dims) == 4)
    return Feed(arrays, next((size for size in batches if size), 1))


@dataclass(frozen=True)
class Arrays:
    """An array for each input, samples along the first axis; `stacked`: the inputs themselves have no such axis."""

    name: str
    arrays: Mapping[str, np.ndarray]
    stacked: bool

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))


def is_arrays(data: object) -> bool:
    """Whether that is the name of a file of arrays, and not of a data set."""
    return isinstance(data, str) and data.endswith(".npz")


def _held(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of an ``.npz`` file by their names."""
    try:
        with np.load(path, allow_pickle=False) as file:
            held = {name: file[name] for name in file.files}
    except Exception as error:  # numpy has no list of its own: damaged, encrypted, larger than the memory, ...
        raise InputError(
            f"{path} cannot be read as .npz ({first_line(error)}); expected one array per input of the network, "
            "saved by numpy.savez"
        ) from error
    foreign = [name for name, array in held.items() if not isinstance(array, np.ndarray)]
    if foreign:
        raise InputError(f"{path} holds {foreign[0]!r}, which is no array; expected what numpy.savez writes")
    return held


def read_arrays(path: str | Path, inputs: Sequence[Input]) -> Arrays:
    """Samples from an ``.npz`` file: one array per input, samples along the first axis.

    Raises
    ------
    InputError
        When an array is missing or does not fit the network.
    """
    held = _held(path)
    names = [value.name for value in inputs]
    if len(inputs) == len(held) == 1:  # then there is no doubt
        held = {names[0]: next(iter(held.values()))}
    if set(held) != set(names):
        raise InputError(f"{path} holds the arrays {sorted(held)}; expected one for each input of the graph: {names}")
    stacked = any(held[value.name].ndim == len(value.dims) + 1 for value in inputs)
    for value in inputs:
        array = held[value.name]
        shape, dims = list(array.shape), value.dims
        within, whole = (shape[1:], dims) if len(shape) == len(dims) + 1 else (shape[1:], dims[1:])
        fits = (
            len(within) == len(whole) and len(shape) > 0 and len(shape) >= len(dims) > 0 or len(shape) == 1 > len(dims)
        )
        if not fits or 0 in shape or any(dim not in (None, size) for dim, size in zip(whole, within, strict=True)):
            raise InputError(
                f"the array for {value.name!r} in {path} has the shape {tuple(shape)}; the graph takes {value}, "
                "samples along the first axis"
            )
        if not np.can_cast(array.dtype, value.dtype, "same_kind"):
            raise InputError(f"the array for {value.name!r} in {path} is {array.dtype}; the graph takes {value.dtype}")
        array = array.astype(value.dtype, copy=False)
        # Where samples are fed one by one, inputs with an axis for them keep one of length 1.
        held[value.name] = array[:, None] if stacked and array.ndim == len(dims) else array
    lengths = {len(array) for array in held.values()}
    if len(lengths) != 1:
        raise InputError(f"the arrays in {path} hold {sorted(lengths)} samples; expected as many in each")
    return Arrays(str(path), held, stacked)


def image_batches(path: str, size: Callable[[tuple[int, int]], int]) -> list[Tensor]:
    """The one array of an ``.npz`` file as batches of images, of `size` for their height and width, for a network that
    takes them as they are.

    Raises
    ------
    InputError
        When it holds something else.
    """
    held = _held(path)
    shapes = {name: f"{array.dtype} of shape {array.shape}" for name, array in held.items()}
    array = next(iter(held.values()), None)
    if array is None or len(held) != 1 or array.ndim != 4 or array.dtype.kind != "f" or not array.size:
        raise InputError(
            f"{path} holds {shapes or 'nothing'}; expected one float array (N, C, H, W) of images as the network takes "
            "them, normalised"
        )
    images = torch.from_numpy(array.astype(np.float32, copy=False))
    return list(images.split(size((array.shape[2], array.shape[3]))))


@dataclass(frozen=True, eq=False)
class ArrayBatches:
    """Batches ``(Feed, None)`` of the samples `rows`."""

    arrays: Arrays
    rows: Sequence[int]
    batch: int

    def __iter__(self) -> Iterator[tuple[Feed, None]]:
        for start in range(0, len(self.rows), self.batch):
            rows = list(self.rows[start : start + self.batch])
            where: Any = rows[0] if self.arrays.stacked else rows
            yield Feed({name: np.asarray(array[where]) for name, array in self.arrays.arrays.items()}, len(rows)), None
