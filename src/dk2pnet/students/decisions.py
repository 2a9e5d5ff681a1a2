"""The one judge: of two students the one whose answers on the held-out samples are closer to the teacher's."""

from __future__ import annotations

from typing import Any

from dk2pnet import processes
from dk2pnet.answers import Predictions
from dk2pnet.data.samples import Batches
from dk2pnet.networks.network import Corrections, Network
from dk2pnet.run.run import Run
from dk2pnet.tasks import MEASURES, divergence, task_of

__all__ = ["Judge"]


class Judge:
    """Decides, and keeps what it decided in a list of the caller's, for metrics.json."""

    def __init__(self, teacher: Network, answers: Predictions, held_out: Batches, run: Run) -> None:
        self.teacher, self.answers, self.held_out, self.run = teacher, answers, held_out, run

    def divergence(self, student: Network) -> float:
        """On the held-out samples; all processes take the main one's."""
        found = [divergence(self.answers, student.predict(self.held_out, self.run))]
        processes.broadcast(found)
        return found[0]

    def entry(self, what: str, before: float, after: float | None, kept: bool) -> dict[str, Any]:
        """A decision as metrics.json has it."""
        return {
            "what": what,
            "before": before,
            "after": after,
            "kept": kept,
            "measure": MEASURES[task_of(self.answers)],
        }

    def closer(self, what: str, before: Network, after: Network, decisions: list[dict[str, Any]]) -> Network:
        """The one of two students that is kept."""

        def only() -> Corrections:
            yield what, after

        return self.apply(only(), before, decisions)

    def apply(self, corrections: Corrections, student: Network, decisions: list[dict[str, Any]]) -> Network:
        """The student after all corrections, each of them kept where it brings it closer."""
        before: float | None = None
        kept: bool | None = None
        while True:
            try:
                what, better = next(corrections) if kept is None else corrections.send(kept)
            except StopIteration:
                return student
            before = self.divergence(student) if before is None else before
            after = None if better is None else self.divergence(better)
            kept = after is not None and after < before
            decisions.append(self.entry(what, before, after, kept))
            if better is not None and kept:
                student, before = better, after
