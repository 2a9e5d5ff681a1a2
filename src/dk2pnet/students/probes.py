"""Probes of one network at several budgets, and the search for the smallest that loses no more than it may."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dk2pnet import processes
from dk2pnet.data.samples import Batches
from dk2pnet.errors import Refused, TooSmall
from dk2pnet.estimates import Estimate, estimate
from dk2pnet.layer import set_form
from dk2pnet.measure import Predictions, predict
from dk2pnet.plan import Budget
from dk2pnet.run.clock import Clock
from dk2pnet.run.progress import Progress, silent
from dk2pnet.students.closed_form import ClosedForm, Solved, solved_once
from dk2pnet.students.tuning import Tuner, Tuning

__all__ = ["MOST_PROBES", "Found", "Probe", "Prober", "smallest"]

MOST_PROBES = 8
_FIRST = 0.3  # of the multiply-adds, where no probe says anything yet
_CLOSE = 1.05  # budgets this close to each other are one


@dataclass
class Probe:
    """A budget, the student that it gives in closed form, and the same after tuning (None: there was none)."""

    budget: Budget
    solved: Solved
    tuned: nn.Module | None
    folder: Path | None = None  # where what was made is kept, the log of the tuning in ``tuning/``

    @property
    def student(self) -> nn.Module:
        """The one to use."""
        return self.solved.student if self.tuned is None else self.tuned


class Prober:
    """Makes students of any budget, all in the same way; moments are gathered when the first one needs them.

    Parameters
    ----------
    open_closed : makes the `ClosedForm`, which is entered once and left with the prober
    tuner, tuning : how every student is tuned, and for how long
    folder : keeps what was made, so that a run that was killed does not make it again; None keeps nothing
    """

    def __init__(
        self,
        teacher: nn.Module,
        open_closed: Callable[[], ClosedForm],
        tuner: Tuner | None,
        tuning: Tuning,
        folder: Path | None,
        clock: Clock,
    ) -> None:
        self.teacher, self.tuner, self.tuning, self.folder, self.clock = teacher, tuner, tuning, folder, clock
        self.device = next(teacher.parameters()).device
        self.steps = 0
        self._open, self._closed = open_closed, None
        self._stack = ExitStack()

    def __enter__(self) -> Prober:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Forget the moments."""
        self._stack.close()
        self._closed = None

    @property
    def closed(self) -> ClosedForm:
        """The teacher with its moments."""
        if self._closed is None:
            self._closed = self._stack.enter_context(self._open())
        return self._closed

    def make(self, budget: Budget, folder: Path | None = None) -> Probe:
        """The student of a budget; `folder` keeps it in place of one named after the budget."""
        if folder is None and self.folder is not None:
            folder = self.folder / "probes" / str(budget)

        def solve() -> Solved:
            return self.closed.solve(budget, whiten=self.tuner is not None)

        if folder is None:
            solved = solve()
        else:
            folder.mkdir(parents=True, exist_ok=True)
            solved = solved_once(folder, self.teacher, self.clock, solve)
            set_form(solved.student.to(self.device), "folded")
        probe = Probe(budget, solved, None, folder)
        if self.tuner is None or not any(layer.counts is not None for layer in solved.plan.layers):
            return probe
        with self.clock("tune"):
            if not self.steps:
                self.steps = self.tuning.steps or self.tuner.steps_in(self.tuning.seconds or 0.0, solved, self.folder)
            probe.tuned = self.tuner.tune(solved, self.steps, folder / "tuning" if folder is not None else None)
        if probe.tuned is None:  # then the best that can be had without
            probe.solved = self.closed.without_tuning(solved)
        probe.solved.factors = {}
        return probe


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
    *,
    progress: Progress = silent,
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
        progress(f"probing {unit}={at:g}", number, MOST_PROBES)
        try:
            probe = prober.make(Budget(unit, at))
        except TooSmall as error:
            least = at if least is None else max(least, at)
            tried.append({"budget": f"{unit}={at:g}", "said": str(error)})
            continue
        estimates = [estimate(wanted.kind, teacher, predict(probe.student, deciding, prober.device))]
        processes.broadcast(estimates)  # all go on to the same budget
        loss = estimates[0]
        within = loss.value <= wanted.value
        kept = probe.solved.plan.macs / probe.solved.plan.macs_dense
        tried.append({"budget": str(probe.budget), "macs_kept": kept, "within": within, **loss.to_dict()})
        if within:
            passed, good = (at, loss.value), (probe, loss)
            if wanted.kind == "drop" and loss.half_width > wanted.value:
                raise Refused(
                    f"{loss.images} images cannot tell a drop of {wanted.value:g} points: at {probe.budget} it is "
                    f"{loss.value:.2f} with a 95 % interval from {loss.low:.2f} to {loss.high:.2f}; decide on at least "
                    f"{loss.images_needed(wanted.value)} labelled images (--holdout), or allow a larger drop"
                )
        else:
            failed = (at, loss.value)
    if good is None:
        losses = [entry["value"] for entry in tried if "value" in entry]
        lowest = f"the smallest loss that was found is {min(losses):.3g}" if losses else "none could be made"
        raise Refused(
            f"no network within {wanted} was found in {len(tried)} attempts: {lowest}; allow more, or tune for longer"
        )
    return Found(*good, tried)


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
