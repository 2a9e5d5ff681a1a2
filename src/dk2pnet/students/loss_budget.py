"""Budgets in points: which images decide, the search for the smallest network, and the confirmation on images that no
probe used."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice
from typing import Any

from dk2pnet import processes
from dk2pnet.answers import Predictions
from dk2pnet.data.samples import Batches, Every
from dk2pnet.data.splits import identity_of
from dk2pnet.errors import Refused, TooSmall
from dk2pnet.estimates import Estimate, estimate
from dk2pnet.networks.network import Network
from dk2pnet.plan import Budget
from dk2pnet.students.figures import Figures
from dk2pnet.students.probes import Probe, Prober
from dk2pnet.students.teacher import Teacher

__all__ = ["MOST_PROBES", "Found", "confirm", "decide", "smallest"]

MOST_PROBES = 8
_FIRST = 0.3  # of the multiply-adds, where no probe says anything yet
_CLOSE = 1.05  # budgets this close to each other are one
_CONFIRM = 5  # every fifth of the deciding images confirms, where no test split does
_UNITS = {"drop": "points of accuracy", "disagree": "% of answers", "error": "of the outputs, squared and relative"}


def decide(wanted: Budget, unit: str, prober: Prober) -> tuple[dict[str, Any], Probe]:
    """The smallest network within the budget, and how it was decided on, for metrics.json."""
    ready = prober.teacher
    samples = ready.samples
    assert samples is not None
    deciding: Batches = samples.decide if _test_confirms(wanted, ready) else Every(samples.decide, _CONFIRM, False)
    teacher = ready.network.predict(deciding, prober.run)
    # Whether these images and this network can decide, before any work: no student is told by fewer than its teacher.
    _check_enough(wanted, estimate(wanted.kind, teacher, teacher), "of a student with the very same answers")
    found = smallest(wanted, unit, prober, teacher, deciding)
    samples.counts["deciding"] = len(teacher)
    said = []
    if wanted.kind == "drop" and _may_have_trained(ready):
        said.append(
            f"decided on {samples.decided_by}, which a network trained elsewhere has usually been trained on: the drop "
            "elsewhere can be another; decide on images that it has not seen (--holdout FOLDER, or --holdout-split "
            "'test[:50%]')"
        )
    decision = {
        "budget": str(wanted),
        "unit": _UNITS[wanted.kind],
        "decided_by": samples.decided_by,
        **found.estimate.to_dict(),
        "probes": found.probes,
        "said": said,
    }
    return decision, found.probe


def confirm(wanted: Budget, decision: dict[str, Any], figures: Figures, student: Network) -> dict[str, Any]:
    """The decision with the loss on images that no probe used: the test split's, or a fifth that was put aside."""
    ready, run = figures.teacher, figures.run
    samples = ready.samples
    assert samples is not None
    if _test_confirms(wanted, ready):
        last = next(reversed(figures.test))
        loss, where = estimate(wanted.kind, figures.test["teacher"], figures.test[last]), "the test images"
    else:
        aside = Every(samples.decide, _CONFIRM, True)
        answers = [each.predict(aside, run) for each in (ready.network, student)]
        loss, where = estimate(wanted.kind, *answers), "images put aside"
    said = list(decision["said"])
    if where == "images put aside" and samples.decide is samples.held_out:
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


def _may_have_trained(ready: Teacher) -> bool:
    """Whether the network may have been trained on what decides: known of none but those that dk2pnet trained."""
    samples, plan = ready.samples, ready.network.plan
    assert samples is not None
    if samples.decided_by.startswith("train"):
        return True
    if not samples.decided_by.startswith("the validation tenth"):
        return False
    tenth = samples.validation
    return plan is None or plan.unseen is None or tenth is None or plan.unseen != identity_of(tenth)


def _test_confirms(wanted: Budget, ready: Teacher) -> bool:
    """Whether there are test images, with labels where these are what is lost."""
    samples = ready.samples
    if samples is None or samples.test is None:
        return False
    return wanted.kind != "drop" or all(y is not None for _, y in islice(samples.test, 1))


def _text(loss: Estimate) -> str:
    return f"{loss.value:.3g} (95 % interval {loss.low:.3g} to {loss.high:.3g})"


# -- the search -------------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """The smallest network that loses no more than it may; `probes` says what was tried, for metrics.json."""

    probe: Probe
    estimate: Estimate
    probes: list[dict[str, Any]]


def smallest(
    wanted: Budget,
    unit: str,
    prober: Prober,
    teacher: Predictions,
    deciding: Batches,
) -> Found:
    """The smallest network by `unit` (``macs`` or ``latency``) whose estimated loss is within `wanted`.

    At most `MOST_PROBES` networks are made, between which the loss is taken to be a power of the budget. `teacher`: its
    answers to the `deciding` images.

    Raises
    ------
    Refused
        When no network is within the budget, or when there are too few images to tell.
    """
    tried: list[dict[str, Any]] = []
    good: tuple[Probe, Estimate] | None = None
    failed: tuple[float, float] | None = None  # budget and loss of the largest network that loses too much
    passed: tuple[float, float] = (1.0, 0.0)
    least: float | None = None
    for number in range(MOST_PROBES):
        at = _next(wanted.value, failed, passed, least)
        if at is None:
            break
        prober.run.progress(f"probing {unit}={at:g}", number, MOST_PROBES)
        try:
            probe = prober.make(Budget(unit, at))
        except TooSmall as error:
            least = at if least is None else max(least, at)
            tried.append({"budget": f"{unit}={at:g}", "said": str(error)})
            continue
        estimates = [estimate(wanted.kind, teacher, probe.student.predict(deciding, prober.run))]
        processes.broadcast(estimates)  # all go on to the same budget
        loss = estimates[0]
        within = loss.value <= wanted.value
        kept = probe.solved.plan.macs / probe.solved.plan.macs_dense
        tried.append({"budget": str(probe.budget), "macs_kept": kept, "within": within, **loss.to_dict()})
        if within:
            passed, good = (at, loss.value), (probe, loss)
            _check_enough(wanted, loss, f"at {probe.budget}")
        else:
            failed = (at, loss.value)
    if good is None:
        losses = [entry["value"] for entry in tried if "value" in entry]
        lowest = f"the smallest loss that was found is {min(losses):.3g}" if losses else "none could be made"
        raise Refused(
            f"no network within {wanted} was found in {len(tried)} attempts: {lowest}; allow more, or tune for longer"
        )
    return Found(*good, tried)


def _check_enough(wanted: Budget, loss: Estimate, where: str) -> None:
    """`Refused` where the images are too few to tell a drop as small as what is allowed."""
    if wanted.kind == "drop" and loss.half_width > wanted.value:
        raise Refused(
            f"{loss.images} images cannot tell a drop of {wanted.value:g} points: {where} it is {loss.value:.2f} with "
            f"a 95 % interval from {loss.low:.2f} to {loss.high:.2f}; decide on at least "
            f"{loss.images_needed(wanted.value)} labelled images (--holdout), or allow a larger drop"
        )


def _next(
    wanted: float, failed: tuple[float, float] | None, passed: tuple[float, float], least: float | None
) -> float | None:
    """The budget to try next, in two significant digits; None when the neighbours on both sides are known."""
    low = failed[0] if failed is not None else (least if least is not None else 0.0)
    if passed[0] < 1.0 and low > 0 and passed[0] / low < _CLOSE:
        return None
    if failed is None:
        # Ever smaller, as long as it is within: the loss falls about with the square of the budget.
        if passed[0] == 1.0 and low == 0.0:
            at = _FIRST
        elif low == 0.0:
            at = passed[0] * min(max((max(passed[1], 1e-9) / wanted) ** 0.5, 0.35), 0.9)
        else:
            at = math.sqrt(low * passed[0])
    elif passed[0] == 1.0:
        at = failed[0] * min(max((failed[1] / wanted) ** 0.5, 1.1), 2.5)
        at = min(at, (failed[0] + 1) / 2)
    else:
        steep = math.log(failed[1] / max(passed[1], wanted / 4)) / math.log(passed[0] / failed[0])
        share = math.log(failed[1] / wanted) / max(steep, 1e-9) / math.log(passed[0] / failed[0])
        at = failed[0] * (passed[0] / failed[0]) ** min(max(share, 0.2), 0.8)
    at = _rounded(at)
    if not low < at < passed[0]:  # rounded onto one that is known
        between = _rounded(math.sqrt(max(low, 1e-3) * passed[0]))
        at = between if low < between < passed[0] else 0.0
    return at or None


def _rounded(x: float) -> float:
    return float(f"{x:.2g}")
