"""What a student loses against its teacher, estimated from images that both answer, with a 95 % interval."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from scipy.stats import binomtest

from dk2pnet.answers import Predictions, class_numbers
from dk2pnet.errors import InputError
from dk2pnet.tasks import compare, task_of

__all__ = ["Estimate", "accuracy_drop", "disagreement", "estimate", "output_error"]

_Z = 1.96  # of 95 %, two-sided
_FEW = 25  # discordant images, below which the normal approximation is left


@dataclass(frozen=True)
class Estimate:
    """A loss with its 95 % interval, and how many images it comes from.

    ``discordant``: of `accuracy_drop`, the share of images that only one of the two gets right.
    """

    value: float
    low: float
    high: float
    images: int
    discordant: float | None = None

    @property
    def half_width(self) -> float:
        """Of the interval."""
        return (self.high - self.low) / 2

    def images_needed(self, drop: float) -> int:
        """So many would make the half-width as small as `drop` points: ``(1.96 / drop)^2 (b + c)``.

        Where the interval is an exact one, as many as would make this half-width so small; and where none differ, as
        many as it takes for that to mean that few do.
        """
        if not self.discordant:
            return math.ceil(math.log(0.025) / math.log1p(-drop / 100))
        return math.ceil(max((_Z / (drop / 100)) ** 2 * self.discordant, self.images * (self.half_width / drop) ** 2))

    def to_dict(self) -> dict[str, Any]:
        """For metrics.json."""
        return asdict(self)


def estimate(kind: str, teacher: Predictions, student: Predictions) -> Estimate:
    """The loss of that `plan.Budget` kind: ``drop``, ``disagree`` or ``error``."""
    return {"drop": accuracy_drop, "disagree": disagreement, "error": output_error}[kind](teacher, student)


def accuracy_drop(teacher: Predictions, student: Predictions) -> Estimate:
    """Points of accuracy that the student loses, by the images that both answered.

    With b and c the shares that only the teacher or only the student gets right, ``b - c`` with the standard error
    ``sqrt((b + c - (b - c)^2) / n)``; below 25 discordant images from the exact binomial intervals of b and of c (that
    of b among the discordant ones, which McNemar's test uses, takes their number as known, and is too narrow for two).
    """
    if teacher.labels is None:
        raise InputError(
            "a budget of accuracy (drop) needs labelled images, and these have none; use disagree=2, or give others "
            "(--holdout)"
        )
    _check_classes(teacher)
    labels = class_numbers(teacher.labels)
    right = [answers.outputs[0].argmax(1) == labels for answers in (teacher, student)]
    n = len(teacher)
    only_teacher, only_student = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    b, c = only_teacher / n, only_student / n
    together = only_teacher + only_student
    if together >= _FEW:
        reach = _Z * math.sqrt((b + c - (b - c) ** 2) / n)
        low, high = b - c - reach, b - c + reach
    else:
        worse, better = (binomtest(each, n).proportion_ci(method="exact") for each in (only_teacher, only_student))
        low, high = worse.low - better.high, worse.high - better.low
    return Estimate(100 * (b - c), 100 * low, 100 * high, n, b + c)


def disagreement(teacher: Predictions, student: Predictions) -> Estimate:
    """Percent of answers that are not the teacher's, with the Wilson interval; of positions (``dense``), which differ
    from image to image by more than chance, with that of the images' mean."""
    same = compare(teacher, student).same
    if same is None:
        raise _no_classes(teacher)
    n, other = len(teacher), 1 - same
    if task_of(teacher) == "dense":
        value = float(other.mean())
        reach = _Z * float(other.std()) / math.sqrt(n) if n > 1 else 1.0
        return Estimate(100 * value, 100 * max(value - reach, 0.0), 100 * min(value + reach, 1.0), n)
    share = binomtest(int(other.sum()), n).proportion_ci(method="wilson")
    return Estimate(100 * float(other.mean()), 100 * share.low, 100 * share.high, n)


def output_error(teacher: Predictions, student: Predictions) -> Estimate:
    """The relative squared error (`tasks.compare`) of the output that loses most, so that none loses more; the interval
    by the delta method."""
    found = compare(teacher, student)
    number = int(found.relative.argmax())
    value = float(found.relative[number])
    energies = found.energies[number]
    total = float(energies.sum()) or max(float(found.energies.sum()), 1e-30)
    reach = _Z * float((found.errors[number] - value * energies).square().sum().sqrt()) / total
    return Estimate(value, max(value - reach, 0.0), value + reach, len(teacher))


def _check_classes(teacher: Predictions) -> None:
    if task_of(teacher) != "classify" or len(teacher.shapes()) != 1:
        raise _no_classes(teacher)


def _no_classes(predictions: Predictions) -> InputError:
    return InputError(
        "a budget of answers (drop, disagree) needs a classifier (one row of class scores per image), which this "
        f"network is not (task {task_of(predictions)!r}); use error=0.02"
    )
