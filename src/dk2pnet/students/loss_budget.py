"""Budgets in points: which images decide, the search, and the confirmation on images that no probe used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import Tensor, nn

from dk2pnet.data.samples import Batches
from dk2pnet.estimates import Estimate, estimate
from dk2pnet.measure import predict
from dk2pnet.plan import Budget
from dk2pnet.run.progress import Progress
from dk2pnet.students.probes import Probe, Prober, smallest
from dk2pnet.students.teacher import Figures, Prepared

__all__ = ["confirm", "decide"]

_CONFIRM = 5  # every fifth of the deciding images confirms, where no test split does
_UNITS = {"drop": "points of accuracy", "disagree": "% of answers", "error": "of the outputs, squared and relative"}


def decide(
    wanted: Budget, unit: str, prober: Prober, ready: Prepared, progress: Progress
) -> tuple[dict[str, Any], Probe]:
    """The smallest network within the budget, and how it was decided on, for metrics.json."""
    images = ready.images
    assert images is not None
    assert images.decide is not None
    deciding: Batches = images.decide if _test_confirms(wanted, ready) else _Every(images.decide, False)
    teacher = predict(ready.teacher, deciding, ready.device)
    estimate(wanted.kind, teacher, teacher)  # whether these images and this network can decide, before any work
    found = smallest(wanted, unit, prober, teacher, deciding, progress=progress)
    images.counts["deciding"] = len(teacher)
    said = []
    if wanted.kind == "drop" and images.decided_by.startswith("the validation tenth") and ready.network.plan is None:
        said.append(
            f"decided on {images.decided_by}, which a network trained elsewhere has usually been trained on: the drop "
            "elsewhere can be another; decide on images that it has not seen (--holdout FOLDER, or --holdout-split "
            "'test[:50%]')"
        )
    decision = {
        "budget": str(wanted),
        "unit": _UNITS[wanted.kind],
        "decided_by": images.decided_by,
        **found.estimate.to_dict(),
        "probes": found.probes,
        "said": said,
    }
    return decision, found.probe


def confirm(
    wanted: Budget, decision: dict[str, Any], ready: Prepared, figures: Figures, student: nn.Module
) -> dict[str, Any]:
    """The decision with the loss on images that no probe used: the test split's, or a fifth that was put aside."""
    images = ready.images
    assert images is not None
    assert images.decide is not None
    if _test_confirms(wanted, ready):
        last = next(reversed(figures.test))
        loss, where = estimate(wanted.kind, figures.test["teacher"], figures.test[last]), "the test images"
    else:
        aside = _Every(images.decide, True)
        answers = [predict(model, aside, ready.device) for model in (ready.teacher, student)]
        loss, where = estimate(wanted.kind, *answers), "images put aside"
    said = list(decision["said"])
    if where == "images put aside" and images.decide is images.held_out:
        said.append(
            "the images put aside had decided on corrections of every network of the search: the confirmed loss may be "
            "a little low; give holdout=BATCHES"
        )
    if loss.low > wanted.value:
        said.append(
            f"on {where} ({loss.images}) the loss is {_text(loss)}, more than the {wanted.value:g} {decision['unit']} "
            "that was allowed"
        )
    return decision | {"confirmed": {"on": where, **loss.to_dict()}, "said": said}


def _test_confirms(wanted: Budget, ready: Prepared) -> bool:
    """Whether there are test images, with labels where these are what is lost."""
    images = ready.images
    if images is None or images.test is None:
        return False
    return wanted.kind != "drop" or all(y is not None for _, y in islice(images.test, 1))


def _text(loss: Estimate) -> str:
    return f"{loss.value:.3g} (95 % interval {loss.low:.3g} to {loss.high:.3g})"


@dataclass(frozen=True)
class _Every:
    """Every fifth image of some batches, or the other four of five."""

    batches: Batches
    fifth: bool

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        first = 0
        for x, y in self.batches:
            rows = [row for row in range(len(x)) if ((first + row) % _CONFIRM == 0) == self.fifth]
            first += len(x)
            if rows:
                yield x[rows], None if y is None else y[rows]
