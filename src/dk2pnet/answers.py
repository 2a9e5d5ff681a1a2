"""What a network answers to samples, kept batch by batch: in memory while it is little, else on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor, nn

from dk2pnet.errors import InputError
from dk2pnet.measure import evaluation, layout_of, outputs_of
from dk2pnet.memory import Trimmer

__all__ = ["Predictions", "class_numbers", "in_pairs", "predict"]

# Bytes of answers to one set of samples that stay in memory: a thousand images of a thousand classes are 4 MB, two
# hundred maps of 21 classes at 224 x 224 are 840. Three sets lie there at once: the teacher's, two students'.
KEPT = 2**26
_PART = 2**24  # bytes of answers that are compared at once, in float64 and with several results of each step


class Predictions:
    """A network's answers to samples: ``parts`` gives the arrays of one batch after the other, all `outputs` together.

    Samples lie along the first axis of an array, also where the network puts them second, as in ``(T, B, classes)``.

    Parameters
    ----------
    outputs, labels : of one batch, where there is no other; `add` takes further ones
    names : of the outputs; where they are given, an array may hold numbers that are not finite, as a mask does
    task : what the answers are for, one of `tasks.TASKS`; None for what they look like
    """

    def __init__(
        self,
        outputs: Sequence[Any] = (),
        labels: Tensor | None = None,
        *,
        names: Sequence[str] | None = None,
        task: str | None = None,
    ) -> None:
        self.given_names, self.task = names, task
        self.counts: list[int] = []  # samples of each batch
        self._shapes: list[list[tuple[int, ...] | None]] = []
        self._rows: list[list[Any]] = []  # arrays, or where in the file they begin
        self._labels: list[Tensor] = []
        self._bytes = 0
        self._file: IO[bytes] | None = None
        self.added: list[list[Tensor | None]] = []  # by batch and output: see `_added`
        self.known: dict[str, Tensor] = {}  # what `tasks` finds out of them, and needs more than once
        self._trimmer = Trimmer()
        if outputs:
            self.add(outputs, len(outputs[0]), labels)

    def add(
        self, outputs: Sequence[Any], samples: int, labels: Tensor | None = None, inputs: Sequence[Any] = ()
    ) -> None:
        """The answers to a batch more: tensors, arrays, or what else a graph may give, to these `inputs`."""
        row = [_array(each) for each in outputs]
        self.added.append([_added(each, inputs, samples) for each in row])
        numbers = [isinstance(each, np.ndarray) and each.dtype.kind in "fiub" for each in row]
        self._shapes.append([each.shape if good else None for each, good in zip(row, numbers, strict=True)])
        self.counts.append(samples)
        self._labels += [] if labels is None else [labels.cpu()]
        size = sum(each.nbytes for each, good in zip(row, numbers, strict=True) if good)
        self._bytes += size
        if self._bytes > KEPT:
            row = [self._written(each) if good else each for each, good in zip(row, numbers, strict=True)]
        self._rows.append(row)
        self._trimmer.passed(size)

    def __len__(self) -> int:
        return sum(self.counts)

    @property
    def names(self) -> list[str]:
        """Of the outputs."""
        number = len(self._shapes[0])
        return list(self.given_names or (["output"] if number == 1 else [f"output {n + 1}" for n in range(number)]))

    @property
    def labels(self) -> Tensor | None:
        """Of all samples, where all have some."""
        return torch.cat(self._labels) if self._labels and len(self._labels) == len(self.counts) else None

    def batches(self) -> Iterator[tuple[int, list[Any]]]:
        """How many samples a batch has, and what was answered to it."""
        moved = self.moved
        for count, row in zip(self.counts, self._rows, strict=True):
            found = [self._read(each) if isinstance(each, int) else each for each in row]
            found = [np.moveaxis(each, 1, 0) if second else each for each, second in zip(found, moved, strict=True)]
            self._trimmer.passed(_bytes(found))
            yield count, found

    def parts(self) -> Iterator[tuple[int, list[Any]]]:
        """The same of parts of batches, where they are large."""
        for count, row in self.batches():
            for part in _cuts(count, row):
                yield part.stop - part.start, _rows(row, part, count)

    @property
    def outputs(self) -> list[Tensor]:
        """All batches together; `InputError` where they do not fit together."""
        found = []
        for name, arrays in zip(self.names, zip(*(row for _, row in self.batches()), strict=True), strict=True):
            if not all(isinstance(each, np.ndarray) and each.dtype.kind in "fiub" for each in arrays):
                raise InputError(f"the output {name!r} is no tensor of numbers, of which nothing can be said")
            if len({each.shape[1:] for each in arrays}) > 1 or any(each.ndim == 0 for each in arrays):
                raise InputError(f"the output {name!r} differs in size from batch to batch; give inputs of one size")
            found.append(torch.from_numpy(np.concatenate(arrays)))
        return found

    def shapes(self) -> list[tuple[int, ...]]:
        """Of each output of one sample, by the first batch; () of what is no array of numbers."""
        return [
            () if shape is None else (*shape[:1], *shape[2:]) if moved else shape[1:]
            for shape, moved in zip(self._shapes[0], self.moved, strict=True)
        ]

    def of_one_size(self, output: int) -> bool:
        """Whether that output has a row for each sample, all of one shape."""
        shapes = [row[output] for row in self._shapes]
        axis = 1 if self.moved[output] else 0
        if not all(shape and shape[axis] == count for shape, count in zip(shapes, self.counts, strict=True)):
            return False
        return len({shape[:axis] + shape[axis + 1 :] for shape in shapes if shape is not None}) == 1

    def is_empty(self, output: int) -> bool:
        """Whether that output holds no number for any batch, as the boxes do where nothing is found."""
        return all(0 in (row[output] or ()) for row in self._shapes)

    @property
    def moved(self) -> list[bool]:
        """Of each output, whether samples lie along its second axis: where the first one is never, or not always, as
        long as there are samples, and the second one is."""
        found = []
        for shapes in zip(*self._shapes, strict=True):
            pairs = list(zip(shapes, self.counts, strict=True))
            second = all(shape is not None and len(shape) > 1 and shape[1] == count for shape, count in pairs)
            found.append(second and any(shape[0] != count for shape, count in pairs))
        return found

    def infinite(self) -> str | None:
        """None where outputs are finite (of outputs with names: in part), else where they are not, or ""."""
        for _, row in self.batches():
            for name, each in zip(self.names, row, strict=True):
                if isinstance(each, np.ndarray) and each.size and each.dtype.kind == "f":
                    finite = np.isfinite(each)
                    if not (finite.any() if self.given_names else finite.all()):
                        return f" (output {name!r})" if self.given_names else ""
        return None

    def _written(self, array: np.ndarray) -> int:
        try:
            self._file = self._file or tempfile.TemporaryFile(prefix="dk2pnet-answers-")  # noqa: SIM115, closed with self
            self._file.seek(0, 2)
            at = self._file.tell()
            np.save(self._file, array, allow_pickle=False)
        except OSError as error:
            raise InputError(
                f"the network's answers could not be kept in {tempfile.gettempdir()} ({error}); give fewer images, or "
                "a folder with more room in the environment variable TMPDIR"
            ) from error
        return at

    def _read(self, at: int) -> np.ndarray:
        assert self._file is not None
        self._file.seek(at)
        return np.load(self._file, allow_pickle=False)


def in_pairs(teacher: Predictions, student: Predictions) -> Iterator[tuple[int, list[Any], list[Any]]]:
    """How many samples a part has, and what the two answered to them; parts as of `Predictions.parts`."""
    if teacher.counts != student.counts:
        raise ValueError(f"answers to batches of {teacher.counts} and of {student.counts} samples cannot be compared")
    for (count, ours), (_, theirs) in zip(teacher.batches(), student.batches(), strict=True):
        for part in _cuts(count, ours + theirs):
            yield part.stop - part.start, _rows(ours, part, count), _rows(theirs, part, count)


def _bytes(row: Sequence[Any]) -> int:
    return sum(each.nbytes for each in row if isinstance(each, np.ndarray))


def _cuts(count: int, row: Sequence[Any]) -> Iterator[slice]:
    """Parts of the samples whose answers are little, where every output has one row for each sample."""
    each_has_one = all(isinstance(each, np.ndarray) and each.shape[:1] == (count,) for each in row)
    step = max(count * _PART // max(_bytes(row), _PART), 1) if each_has_one else count
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def _rows(row: list[Any], part: slice, count: int) -> list[Any]:
    return row if part == slice(0, count) else [each[part] for each in row]


def _array(value: Any) -> Any:
    return value.detach().float().cpu().numpy() if isinstance(value, Tensor) else value


def _added(output: Any, inputs: Sequence[Any], samples: int) -> Tensor | None:
    """Energy of the difference from the nearest input of the same shape, by sample; None where none has it."""
    if not isinstance(output, np.ndarray) or output.dtype.kind != "f" or output.shape[:1] != (samples,):
        return None
    like = [_array(each) for each in inputs if tuple(each.shape) == output.shape]
    differences = [torch.from_numpy(output - each).double().reshape(samples, -1).square().sum(1) for each in like]
    return min(differences, key=lambda energy: float(energy.sum()), default=None)


def predict(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor | None]],
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
    task: str | None = None,
) -> Predictions:
    """Run `model` in evaluation mode over normalised `batches`; `task` as in `Predictions`."""
    found = Predictions(task=task)
    number, layout = 0, None
    with evaluation(model):
        for x, y in batches:
            x = x.to(device)
            layout = layout or layout_of(x[:2], model)
            outputs = outputs_of(model(x.to(memory_format=layout)))
            if found.counts and len(outputs) != number:
                few, many = sorted((number, len(outputs)))
                raise InputError(
                    f"the network gives {few} outputs for one batch and {many} for another; expected as many for each, "
                    "as in a detector before its boxes are selected"
                )
            number = len(outputs)
            found.add(outputs, len(x), y, [x])
            if progress is not None:
                progress(len(found))
    if not found.counts:
        raise InputError("there are no images to evaluate on")
    return found


def class_numbers(labels: Tensor) -> Tensor:
    """Labels as int64 ``(N,)``; of ``(N, 1)`` too. `InputError` for what is not one whole number per image."""
    if labels.dim() == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.dim() != 1 or labels.is_floating_point():
        raise InputError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)}; expected one whole number per image, its class"
        )
    return labels.long()
