"""Calibration inputs of an ONNX graph: images for a graph that takes images, arrays for any other."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

from dk2pnet.data import ImageData, Normalization, calibration_split, has_split, load, split_training
from dk2pnet.data.images import generator_for
from dk2pnet.data.sources import load_test
from dk2pnet.errors import InputError

__all__ = ["Feed", "Feeds", "array_feeds", "batch_size_of", "example_feed", "image_feeds"]

_MOST = 8  # samples at once where the graph leaves it open: more gain nothing on a CPU


@dataclass(frozen=True)
class Feed:
    """What is fed to a network of several inputs: an array for each name, together so many `samples`."""

    arrays: dict[str, np.ndarray]
    samples: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the first input."""
        return next(iter(self.arrays.values())).shape if self.arrays else ()


@dataclass
class Feeds:
    """Re-iterable batches: `gather` for statistics, `held_out` to decide with, `test` (with labels) only to report."""

    gather: Iterable[Feed]
    held_out: Iterable[Feed]
    counts: dict[str, int]
    test: Iterable[tuple[Feed, Tensor]] | None = None
    normalization: Normalization | None = None
    images: ImageData | None = None  # what the labels belong to
    one_by_one: Feeds | None = field(default=None, repr=False)  # the same samples in batches of one

    @property
    def example(self) -> Feed:
        """The first batch."""
        return next(iter(self.gather))


def batch_size_of(inputs: Sequence[onnx.ValueInfoProto]) -> int | None:
    """The number of samples that the graph takes at once, None where it leaves it open."""
    sizes = {_dims(value)[0] for value in inputs if _dims(value)}
    fixed = {size for size in sizes if size is not None}
    return fixed.pop() if len(fixed) == 1 else 1 if fixed else None


def example_feed(inputs: Sequence[onnx.ValueInfoProto], size: int | None) -> Feed:
    """One sample of noise, where the graph declares its shapes; `size` stands in for open heights and widths."""
    arrays = {}
    generator = np.random.default_rng(0)
    for value in inputs:
        dims = [1 if dim is None and axis == 0 else dim for axis, dim in enumerate(_dims(value))]
        dims = [size if dim is None and axis >= len(dims) - 2 else dim for axis, dim in enumerate(dims)]
        if None in dims:
            raise InputError(
                f"the size of the input {value.name!r} is left open, {_shape_text(value)}; give --data or --input-size"
            )
        dtype = _dtype(value)
        noise = generator.standard_normal(dims)  # type: ignore[arg-type]
        arrays[value.name] = (noise if dtype.kind == "f" else np.zeros(dims)).astype(dtype)  # type: ignore[arg-type]
    # Of a fixed batch of images; of other inputs nobody says that the first axis is that of samples.
    batches = (_dims(value)[0] for value in inputs if len(_dims(value)) == 4)
    return Feed(arrays, next((size for size in batches if size), 1))


def array_feeds(path: str | Path, inputs: Sequence[onnx.ValueInfoProto], count: int) -> Feeds:
    """Samples from an ``.npz`` file: one array per graph input, samples along the first axis.

    Raises
    ------
    InputError
        When an array is missing or does not fit the graph.
    """
    arrays, stacked = _read(Path(path), inputs)
    lengths = {len(array) for array in arrays.values()}
    if len(lengths) != 1:
        raise InputError(f"the arrays in {path} hold {sorted(lengths)} samples; expected as many in each")
    total = lengths.pop()
    chosen = torch.randperm(total, generator=generator_for(1))[:count]
    held = torch.arange(len(chosen)) % 5 == 0
    parts = chosen[~held].tolist(), chosen[held].tolist()
    size = 1 if stacked else batch_size_of(inputs)
    batch = size or min(_MOST, max(len(parts[1]), 1))
    whole = [part[: len(part) // batch * batch] if size else part for part in parts]
    if min(map(len, whole)) == 0:
        raise InputError(
            f"{path} holds {total} sample(s); expected at least {2 if batch == 1 else 6 * batch}, a fifth of them"
            " only decides"
        )

    def feeds(batch: int) -> Feeds:
        counts = {"calibration": len(whole[0]), "held out": len(whole[1])}
        return Feeds(*(_Slices(arrays, part, batch, stacked) for part in whole), counts)

    found = feeds(batch)
    if size is None and batch > 1:
        found.one_by_one = feeds(1)
    return found


def image_feeds(
    name: str,
    inputs: Sequence[onnx.ValueInfoProto],
    count: int,
    *,
    normalization: Normalization,
    data_dir: str | None = None,
    input_size: int | None = None,
) -> Feeds:
    """Images of a data set or a folder, as the graph's one input ``(B, C, H, W)``.

    Raises
    ------
    InputError
        When the graph takes something else than images, or the images do not fit.
    """
    if len(inputs) != 1:
        names = ", ".join(value.name for value in inputs)
        raise InputError(f"the graph has the inputs {names}; images can feed only one: give --data INPUTS.npz")
    value = inputs[0]
    dims = _dims(value)
    if len(dims) != 4 or dims[1] not in (None, 1, 3) or _dtype(value) != np.float32:
        raise InputError(
            f"the input {value.name!r} is {_shape_text(value)}, not float (batch, 1 or 3 channels, height, width); "
            "give --data INPUTS.npz"
        )
    height, width = dims[2:]
    side = input_size if input_size is not None else height if height is not None else width
    size = (height, width) if height is not None and width is not None and input_size is None else side
    if size is side and {height, width} - {None, side}:
        raise InputError(
            f"the input {value.name!r} is {_shape_text(value)}, which square images of {side} do not fit; "
            "leave --input-size away, or give another"
        )
    training = (
        load(name, "train", data_dir=data_dir, size=size, channels=dims[1])
        if has_split(name, "train", data_dir)
        else load(name, "test", data_dir=data_dir, size=size, channels=dims[1])
    )
    test = None
    if has_split(name, "train", data_dir) and has_split(name, "test", data_dir):
        test = load_test(name, training, data_dir)
        training = split_training(training)[0]
    normalization.check(training.channels)
    gather, held_out = calibration_split(training, count)
    fixed = dims[0]
    batch = fixed or min(_MOST, len(held_out))
    if min(len(gather), len(held_out)) < batch:
        raise InputError(
            f"data set {name!r} gives {len(gather)} images to calibrate with and {len(held_out)} to decide with; the "
            f"graph takes {batch} at once: give more images"
        )

    def feeds(batch: int) -> Feeds:
        def of(data: ImageData) -> _Images:
            return _Images(data, value.name, batch, normalization, fixed is not None)

        counts = {"calibration": len(gather), "held out": len(held_out)}
        labelled = None
        if test is not None and test.labels is not None:
            labelled = _Labelled(of(test))
            counts["test"] = len(test) // batch * batch if fixed else len(test)
        return Feeds(of(gather), of(held_out), counts, labelled, normalization, test if labelled else None)

    found = feeds(batch)
    if fixed is None and batch > 1:
        found.one_by_one = feeds(1)
    return found


# -- inside ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Slices:
    """Batches of the samples `rows`; `stacked`: the graph's inputs have no axis for samples."""

    arrays: Mapping[str, np.ndarray]
    rows: Sequence[int]
    batch: int
    stacked: bool

    def __iter__(self) -> Iterator[Feed]:
        for start in range(0, len(self.rows), self.batch):
            rows = list(self.rows[start : start + self.batch])
            where: Any = rows[0] if self.stacked else rows
            yield Feed({name: np.asarray(array[where]) for name, array in self.arrays.items()}, len(rows))


@dataclass(frozen=True, eq=False)
class _Images:
    data: ImageData
    name: str
    batch: int
    normalization: Normalization
    whole: bool  # whether a last batch that is not full is left out

    def __iter__(self) -> Iterator[Feed]:
        for x, _ in self.data.batches(self.batch, self.normalization):
            if len(x) == self.batch or not self.whole:
                yield Feed({self.name: x.numpy()}, len(x))


@dataclass(frozen=True, eq=False)
class _Labelled:
    images: _Images

    def __iter__(self) -> Iterator[tuple[Feed, Tensor]]:
        labels = self.images.data.labels
        assert labels is not None
        first = 0
        for feed in self.images:
            yield feed, labels[first : first + feed.samples]
            first += feed.samples


def _dims(value: onnx.ValueInfoProto) -> list[int | None]:
    """Declared sizes, None where one is left open."""
    if not value.type.tensor_type.HasField("shape"):
        raise InputError(
            f"the graph declares no shape for the input {value.name!r}, which ONNX asks for; write one into the file "
            "(sizes may be left open)"
        )
    dims = value.type.tensor_type.shape.dim
    return [dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else None for dim in dims]


def _shape_text(value: onnx.ValueInfoProto) -> str:
    kind = value.type.tensor_type.elem_type
    known = kind in TensorProto.DataType.values()
    name = TensorProto.DataType.Name(kind).lower() if known else f"type {kind}"
    return f"{name} ({', '.join('?' if dim is None else str(dim) for dim in _dims(value))})"


def _dtype(value: onnx.ValueInfoProto) -> np.dtype:
    kind = value.type.tensor_type.elem_type
    try:
        return np.dtype(helper.tensor_dtype_to_np_dtype(kind))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"the input {value.name!r} is of type {kind}, no tensor that can be fed") from error


def _read(path: Path, inputs: Sequence[onnx.ValueInfoProto]) -> tuple[dict[str, np.ndarray], bool]:
    """The arrays by input, and whether samples have to be fed one by one, without an axis of their own."""
    try:
        with np.load(path, allow_pickle=False) as file:
            held = {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, AttributeError) as error:
        raise InputError(
            f"{path} cannot be read as .npz ({str(error).splitlines()[0]}); expected one array per input of the graph, "
            "saved by numpy.savez"
        ) from error
    names = [value.name for value in inputs]
    if len(inputs) == len(held) == 1:  # then there is no doubt
        held = {names[0]: next(iter(held.values()))}
    if set(held) != set(names):
        raise InputError(f"{path} holds the arrays {sorted(held)}; expected one for each input of the graph: {names}")
    stacked = False
    for value in inputs:
        array, dims = held[value.name], _dims(value)
        shape = list(array.shape)
        if len(shape) == len(dims) + 1:
            stacked = True
            fits = all(dim in (None, size) for dim, size in zip(dims, shape[1:], strict=True))
        else:
            fits = len(shape) == len(dims) > 0
            fits = fits and all(dim in (None, size) for dim, size in zip(dims[1:], shape[1:], strict=True))
        if not fits or 0 in shape:
            raise InputError(
                f"the array for {value.name!r} in {path} has the shape {tuple(shape)}; the graph takes "
                f"{_shape_text(value)}, samples along the first axis"
            )
        dtype = _dtype(value)
        if not np.can_cast(array.dtype, dtype, "same_kind"):
            raise InputError(f"the array for {value.name!r} in {path} is {array.dtype}; the graph takes {dtype}")
        held[value.name] = array.astype(dtype, copy=False)
    if stacked:  # those with an axis for samples keep one of length 1
        held = {
            value.name: array if array.ndim == len(_dims(value)) + 1 else array[:, None]
            for value in inputs
            for array in [held[value.name]]
        }
    return held, stacked
