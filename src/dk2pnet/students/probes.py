"""Students of one teacher at several budgets, all made in the same way, and kept where a run may be killed."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dk2pnet.errors import first_line
from dk2pnet.networks.network import Network
from dk2pnet.plan import Budget
from dk2pnet.run.run import Run
from dk2pnet.students.allocate import check_reachable
from dk2pnet.students.closed_form import ClosedForm, Solved, solved_once
from dk2pnet.students.teacher import Teacher
from dk2pnet.students.tuning import Tuner

__all__ = ["Probe", "Prober"]

_log = logging.getLogger(__name__)


@dataclass
class Probe:
    """A budget, the student that it gives in closed form, and the same after tuning (None: there was none)."""

    budget: Budget
    solved: Solved
    tuned: Network | None
    folder: Path | None = None  # where what was made is kept, the log of the tuning in ``tuning/``

    @property
    def student(self) -> Network:
        """The one to use."""
        return self.solved.student if self.tuned is None else self.tuned


class Prober:
    """Makes students of any budget, all in the same way; moments are gathered when the first one needs them.

    `folder` keeps what was made, so that a run that was killed does not make it again; None keeps nothing.
    """

    def __init__(self, teacher: Teacher, folder: Path | None, run: Run) -> None:
        self.teacher, self.folder, self.run = teacher, folder, run
        self.tuner = Tuner(teacher, run) if teacher.learner is not None else None
        self.steps = 0
        self._closed: ClosedForm | None = None
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
            self._closed = self._stack.enter_context(ClosedForm(self.teacher, self.run))
        return self._closed

    def make(self, budget: Budget, folder: Path | None = None) -> Probe:
        """The student of a budget; `folder` keeps it in place of one named after the budget."""
        check_reachable(budget, self.teacher)
        if folder is None and self.folder is not None:
            folder = self.folder / "probes" / str(budget)

        def solve() -> Solved:
            return self.closed.solve(budget, whiten=self.tuner is not None)

        if folder is None:
            solved = solve()
        else:
            folder.mkdir(parents=True, exist_ok=True)
            solved = solved_once(folder, self.teacher.network, self.run, solve)
        probe = Probe(budget, solved, None, folder)
        if self.tuner is None or not any(layer.counts is not None for layer in solved.plan.layers):
            return probe
        try:
            with self.run.clock("tune"):
                probe.tuned = self._tuned(self.tuner, solved, folder)
        except Exception as error:
            if not self.teacher.tuning.by_itself:
                raise
            _log.warning(
                "tuning, which runs by itself, failed, and the closed form is kept (%s); --tune 0 leaves it away",
                first_line(error),
            )
            before = self.tuner.judge.divergence(solved.student)
            solved.decisions.append(self.tuner.judge.entry("tuning (failed)", before, None, False))
        if probe.tuned is None:  # then the best that can be had without
            probe.solved = self.closed.without_tuning(solved)
        probe.solved.factors = {}
        return probe

    def _tuned(self, tuner: Tuner, solved: Solved, folder: Path | None) -> Network | None:
        if not self.steps:
            tuning = self.teacher.tuning
            self.steps = tuning.steps or tuner.steps_in(tuning.seconds or 0.0, solved, self.folder)
            self.steps = min(self.steps, tuning.most or self.steps)
        return tuner.tune(solved, self.steps, folder / "tuning" if folder is not None else None)
