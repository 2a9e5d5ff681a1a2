"""What a network's answers are for, and how far a student's are from the teacher's: one scale for every kind of
network, summed batch by batch.

=============  ==========================================  ====================================================
task           answers                                     distance
=============  ==========================================  ====================================================
``classify``   ``(B, n)``, a row of class scores           KL(teacher || student) at temperature 1
``multilabel`` ``(B, n)``, a score for each of n labels    the same, of each label's yes and no, summed
``dense``      ``(B, n, ...)``, class scores at positions  the same as of a row, the mean over positions
``embed``      ``(B, n)``, a direction                     squared error of the rows at unit length, as below
``regress``    anything                                    squared error over the energy about the teacher's mean
=============  ==========================================  ====================================================

Scores are logits, or probabilities where the teacher's are some.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dk2pnet.answers import Predictions, class_numbers, in_pairs
from dk2pnet.errors import InputError

__all__ = [
    "MEASURES",
    "Comparison",
    "accuracy",
    "agreement",
    "can_be",
    "check_task",
    "compare",
    "divergence",
    "figures",
    "guess",
    "has_accuracy",
    "is_uncertain",
    "log_scores",
    "relative_errors",
    "squared_error",
    "task_of",
]

_KL, _SQUARES = "KL(teacher || student)", "relative squared error"
MEASURES = {"classify": _KL, "multilabel": _KL, "dense": _KL, "embed": _SQUARES, "regress": _SQUARES}

# Samples from which on values say what answers are for; below, only what is exact, as rows that sum to one.
_ENOUGH = 20
_FEATURES = 64  # rows of so many numbers that begin at zero are features behind a ReLU
_FAR_OFF = 10  # fewer numbers that lie so far from zero together, in their own standard deviations, are no scores
_TINY = 1e-12  # energy about the mean, as a share of that about zero, of an output that is the same for all samples


# -- what answers are for ----------------------------------------------------------------------------------------------


def guess(answers: Predictions) -> str:
    """The task that the values of the answers, and labels if there are some, speak for."""
    shapes = answers.shapes()
    if len(shapes) != 1 or not answers.of_one_size(0):
        return "regress"
    rank = len(shapes[0])
    if rank == 0 or shapes[0][0] < 2 or next(answers.parts())[1][0].dtype.kind != "f":
        return "regress"
    seen = _Seen.of(answers)
    if rank > 1:
        return "dense" if seen.sums_to_one else "regress"
    if seen.sums_to_one:
        return "classify"
    if seen.unit_length:
        return "embed"
    if len(answers) < _ENOUGH:
        return "classify"
    if _labels_fit(answers):
        return "classify"
    if seen.low > 0 and seen.high <= 1:  # a zero comes from a ReLU, and from no sigmoid
        return "multilabel"
    if shapes[0][0] >= _FEATURES:  # scores have an offset of their own, so that they may all be positive
        return "embed" if 0 <= seen.low < 0.01 * seen.mean else "classify"
    return "regress" if seen.low >= 0 or seen.offset > _FAR_OFF else "classify"


def is_uncertain(answers: Predictions) -> bool:
    """Whether a guess of ``classify`` rests on the shape alone: few columns of any numbers, and no labels."""
    return not (_Seen.of(answers).sums_to_one or _labels_fit(answers) or answers.shapes()[0][0] >= _FEATURES)


def can_be(task: str, answers: Predictions) -> bool:
    """Whether the answers have the shape of that task's."""
    if task == "regress":
        return True
    return all(shape[:1] >= (2,) and (len(shape) > 1) == (task == "dense") for shape in answers.shapes())


def check_task(task: str, answers: Predictions) -> None:
    """`InputError` where the answers cannot be for that."""
    if not can_be(task, answers):
        given = " and ".join(str((1, *shape)) for shape in answers.shapes())
        expected = "class scores at every position, (B, classes, ...)" if task == "dense" else "rows, (B, 2 or more)"
        raise InputError(f"task is {task!r}, and the network returns {given}; expected {expected}: leave --task away")


class _Seen(NamedTuple):
    """Of one output's values: range, mean, whether the class scores of each place are probabilities, whether rows have
    unit length, and how far the mean of a row is from zero, in its standard deviations (the median)."""

    low: float
    high: float
    mean: float
    sums_to_one: bool
    unit_length: bool
    offset: float

    @classmethod
    def of(cls, answers: Predictions) -> _Seen:
        low, high, sums, unit = math.inf, -math.inf, True, True
        offsets, means = [], []
        for _, (array, *_) in answers.parts():
            x = torch.from_numpy(np.ascontiguousarray(array)).double()
            low, high = min(low, float(x.min())), max(high, float(x.max()))
            sums = sums and _are_probabilities(x)
            rows = x.flatten(1)
            unit = unit and torch.allclose(rows.norm(dim=1), torch.ones(len(rows), dtype=torch.double), atol=1e-3)
            means.append(rows.mean(1))
            offsets.append(rows.mean(1).abs() / rows.std(1).clamp_min(1e-30))
        return cls(low, high, float(torch.cat(means).mean()), sums, unit, float(torch.cat(offsets).median()))


def _labels_fit(answers: Predictions) -> bool:
    """Whether there are classes as labels, and the answers find them twice as often as chance would."""
    labels = answers.labels
    if labels is None or labels.is_floating_point() or labels.dim() > 2 or labels.numel() != len(answers):
        return False
    scores = answers.outputs[0]
    if int(labels.max()) >= scores.shape[1]:
        return False
    right = float((scores.argmax(1) == class_numbers(labels)).double().mean())
    return right > min(2 / scores.shape[1], 0.6)


def _are_probabilities(scores: Tensor) -> bool:
    """Whether they are along axis 1."""
    if not bool((scores >= 0).all()):
        return False
    sums = scores.sum(1)
    return torch.allclose(sums, torch.ones_like(sums), atol=1e-3)


def log_scores(scores: Tensor, probabilities: bool | None = None) -> Tensor:
    """Logarithms of the class probabilities along axis 1, from logits or from probabilities (None: by their values)."""
    probabilities = _are_probabilities(scores.detach()) if probabilities is None else probabilities
    return scores.clamp_min(1e-30).log() if probabilities else F.log_softmax(scores, 1)


# -- how far a student is ----------------------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """A student's answers against the teacher's: the ``names`` of the outputs that are not empty, by output and sample
    the squared ``errors`` and the ``energies`` that they are relative to, ``(outputs, samples)``; of a task with
    classes by sample the ``distance`` and the share of answers that are the ``same``, else None."""

    names: list[str]
    errors: Tensor
    energies: Tensor
    distance: Tensor | None
    same: Tensor | None

    @property
    def relative(self) -> Tensor:
        """The squared error of each output over its energy; infinite where it is no number."""
        totals = self.energies.sum(1)
        totals = torch.where(totals > 0, totals, totals.sum().clamp_min(1e-30))
        found = self.errors.sum(1) / totals
        return torch.where(found.isfinite(), found, math.inf)


def compare(teacher: Predictions, student: Predictions) -> Comparison:
    """By the teacher's task, in one pass over both.

    An error is relative to the energy of the output about its mean over the samples, which a network that always
    answers the same would lose: a constant offset, as of boxes in pixels, must not hide an error. Where an output has
    the shape of an input and is nearer to it, as a denoiser's is, to the energy of what the network adds. Of one that
    is the same for all samples it is that about zero, and where the teacher is silent, that of all outputs. What the
    teacher has not finite (a mask) is not compared; of an output of another shape, all is lost.
    """
    task = task_of(teacher)
    classes = _CLASSES.get(task)
    inside = task == "multilabel" and (seen := _Seen.of(teacher)).low >= 0 and seen.high <= 1
    errors: list[Tensor] = []
    distances: list[Tensor] = []
    same: list[Tensor] = []
    energies = _energies(teacher, task)
    done = 0
    for count, ours, theirs in in_pairs(teacher, student):
        rows = []
        for number, (t, s) in enumerate(zip(ours, theirs, strict=True)):
            t, s = _compared(t, task), _compared(s, task)
            rows.append(_squared(t, s, count, energies[number, done : done + count]))
        errors.append(torch.stack(rows))
        if classes is not None:
            pairs = [(_tensor(t), _tensor(s)) for t, s in zip(ours, theirs, strict=True)]
            if teacher.moved[0] and task == "dense":  # (B, T, classes)
                pairs = [(t.transpose(1, -1), s.transpose(1, -1)) for t, s in pairs]
            found = [classes(t, s, inside) for t, s in pairs]
            distances.append(torch.stack([distance for distance, _ in found]).mean(0))
            same.append(torch.stack([alike for _, alike in found]).amin(0))
        done += count
    given = [number for number in range(len(teacher.names)) if not teacher.is_empty(number)]
    return Comparison(
        [teacher.names[number] for number in given],
        torch.cat(errors, 1)[given],
        energies[given],
        torch.cat(distances) if distances else None,
        torch.cat(same) if same else None,
    )


def divergence(teacher: Predictions, student: Predictions) -> float:
    """How far the student's answers are from the teacher's, by the teacher's task, the mean over the outputs. Infinite
    where they are not finite."""
    if _CLASSES.get(task_of(teacher)) is None:
        return squared_error(teacher, student)
    distance = compare(teacher, student).distance
    assert distance is not None
    value = float(distance.mean())
    return value if math.isfinite(value) else math.inf


def squared_error(teacher: Predictions, student: Predictions) -> float:
    """The relative squared error, whatever the task; the mean over the outputs."""
    return float(compare(teacher, student).relative.mean())


def relative_errors(teacher: Predictions, student: Predictions) -> dict[str, float]:
    """The relative squared error of each output that is not empty, by its name."""
    found = compare(teacher, student)
    return dict(zip(found.names, found.relative.tolist(), strict=True))


def agreement(teacher: Predictions, student: Predictions) -> float | None:
    """Percentage of answers that are the teacher's: of samples by their class, or by all their labels, of positions of
    ``dense``; None for other tasks."""
    same = compare(teacher, student).same
    return None if same is None else 100 * float(same.mean())


def figures(teacher: Predictions, student: Predictions) -> dict[str, Any]:
    """For the report: `agreement`; errors of the outputs in percent, root mean square; and the largest of a sample."""
    found = compare(teacher, student)
    relative = found.relative
    energies = found.energies.mean(1, keepdim=True)
    worst = (found.errors / torch.where(energies > 0, energies, energies.sum().clamp_min(1e-30))).mean(0).max()

    def percent(value: Tensor) -> float:
        return 100 * math.sqrt(float(value))

    return {
        "agreement": None if found.same is None else 100 * float(found.same.mean()),
        "relative_error": percent(relative.mean()),
        "relative_errors": {name: percent(each) for name, each in zip(found.names, relative, strict=True)},
        "relative_error_worst": percent(torch.where(worst.isfinite(), worst, math.inf)),
    }


def has_accuracy(answers: Predictions) -> bool:
    """Whether they are one row of class scores per sample, of samples with labels."""
    return answers.labels is not None and task_of(answers) == "classify" and len(answers.shapes()) == 1


def accuracy(predictions: Predictions) -> float:
    """Top-1 accuracy in percent."""
    if predictions.labels is None:
        raise InputError("the images have no labels, which accuracy needs; give a labelled data set")
    shapes = predictions.shapes()
    if len(shapes) != 1 or len(shapes[0]) != 1 or shapes[0][0] < 2:
        raise InputError("accuracy needs a classifier (one row of class scores per image), which this network is not")
    scores = predictions.outputs[0]
    labels = class_numbers(predictions.labels)
    highest = int(labels.max())
    if highest >= scores.shape[1]:
        raise InputError(
            f"the data has labels up to {highest}, but the network has {scores.shape[1]} classes; "
            "give the data set that the network was trained for"
        )
    return 100 * float((scores.argmax(1) == labels).double().mean())


def task_of(answers: Predictions) -> str:
    """As it was given, else as it is guessed, once."""
    if answers.task is None:
        answers.task = guess(answers)
    return answers.task


# -- inside ------------------------------------------------------------------------------------------------------------


def _of_classes(t: Tensor, s: Tensor, inside: bool) -> tuple[Tensor, Tensor]:
    """By sample, over classes along axis 1."""
    if t.shape != s.shape:
        return torch.full((len(t),), math.inf, dtype=torch.double), torch.zeros(len(t), dtype=torch.double)
    given = _are_probabilities(t)
    p, q = log_scores(t, given), log_scores(s, given)
    terms = torch.where(p > -math.inf, p.exp() * (p - q), 0.0).sum(1)
    alike = (t.argmax(1) == s.argmax(1)).double()
    return terms.reshape(len(t), -1).mean(1), alike.reshape(len(t), -1).mean(1)


def _of_labels(t: Tensor, s: Tensor, inside: bool) -> tuple[Tensor, Tensor]:
    """By sample, over labels along axis 1; `inside`: whether scores are probabilities."""
    if inside:
        t, s = (each.clamp(1e-12, 1 - 1e-12).logit() for each in (t, s))
    p = t.sigmoid()
    terms = p * (F.logsigmoid(t) - F.logsigmoid(s)) + (1 - p) * (F.logsigmoid(-t) - F.logsigmoid(-s))
    return terms.sum(1), ((t > 0) == (s > 0)).all(1).double()


_Classes = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]]
_CLASSES: Mapping[str, _Classes] = {"classify": _of_classes, "dense": _of_classes, "multilabel": _of_labels}


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).double()


def _compared(array: Any, task: str) -> Any:
    """As it enters a squared error: float64, finite or not; whole numbers and other things as they are."""
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        return array
    x = _tensor(array)
    return F.normalize(x, dim=1) if task == "embed" else x


def _by_sample(squares: Tensor, count: int) -> Tensor:
    """Sums by sample; where an output has no row for each, as of boxes of all images, every sample has as much."""
    if squares.dim() and len(squares) == count:
        return squares.reshape(count, -1).sum(1)
    return squares.sum().expand(count) / count


def _squared(t: Any, s: Any, count: int, energy: Tensor) -> Tensor:
    """The squared error by sample, of whole numbers how many differ; `energy` where the shapes do."""
    if isinstance(t, Tensor):
        if not isinstance(s, Tensor) or s.shape != t.shape:
            return energy
        squares = torch.where(t.isfinite(), t - s, 0.0).square()
        return _by_sample(squares, count)
    if not isinstance(t, np.ndarray):
        return torch.zeros(count, dtype=torch.double)
    if t.shape != np.shape(s):
        return energy
    return _by_sample(torch.from_numpy(np.ascontiguousarray(t != s)).double(), count)


def _energies(teacher: Predictions, task: str) -> Tensor:
    """By output and sample; kept with the teacher's answers, against which many students are held."""
    kept = teacher.known.get(task)
    if kept is not None:
        return kept
    means = _means(teacher, task)
    about: list[Tensor] = []
    raw: list[Tensor] = []
    for count, row in teacher.parts():
        values = [_compared(each, task) for each in row]
        about.append(torch.stack([_energy(x, mean, count) for x, (mean, _) in zip(values, means, strict=True)]))
        raw.append(torch.stack([_energy(x, torch.zeros(()), count) for x in values]))
    found, plain = torch.cat(about, 1), torch.cat(raw, 1)
    for number, (_, by_element) in enumerate(means):
        if by_element and len(teacher) > 1:  # the mean is of the same samples
            found[number] *= len(teacher) / (len(teacher) - 1)
    for number in range(len(found)):
        added = [row[number] for row in teacher.added]
        if task == "regress" and all(each is not None for each in added):
            energy = torch.cat([each for each in added if each is not None])
            if 0 < float(energy.sum()) < float(found[number].sum()):
                found[number] = energy
    silent = found.sum(1, keepdim=True) <= _TINY * plain.sum(1, keepdim=True)
    teacher.known[task] = kept = torch.where(silent, plain, found)
    return kept


def _energy(x: Any, mean: Tensor, count: int) -> Tensor:
    if isinstance(x, Tensor):
        return _by_sample(torch.where(x.isfinite(), x - mean, 0.0).square(), count)
    if isinstance(x, np.ndarray):
        return torch.full((count,), x.size / count, dtype=torch.double)
    return torch.zeros(count, dtype=torch.double)


def _means(teacher: Predictions, task: str) -> list[tuple[Tensor, bool]]:
    """Of each output over the samples, element by element where all have one shape, else one number; and which."""
    sums: list[Any] = [0.0] * len(teacher.names)
    numbers: list[Any] = [0.0] * len(teacher.names)
    alike = [teacher.of_one_size(number) for number in range(len(sums))]
    for _, row in teacher.parts():
        for number, each in enumerate(row):
            x = _compared(each, task)
            if isinstance(x, Tensor):
                finite = x.isfinite()
                axes = (0,) if alike[number] else tuple(range(x.dim()))
                sums[number] = sums[number] + torch.where(finite, x, 0.0).sum(axes)
                numbers[number] = numbers[number] + finite.sum(axes)
    return [
        (
            torch.as_tensor(total, dtype=torch.double) / torch.as_tensor(many).clamp_min(1),
            rows and isinstance(total, Tensor),
        )
        for total, many, rows in zip(sums, numbers, alike, strict=True)
    ]
