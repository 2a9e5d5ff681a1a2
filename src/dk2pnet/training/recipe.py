"""How a student is tuned, chosen by its own held-out samples: a few short trials from the same start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

__all__ = ["Recipe", "choose", "steps_beside_trials", "trial_steps"]

_FACTOR = 3.0  # between two rates that are tried
_MOVES = 2  # further rates in one direction, at most
# A trial takes one step of so many of the run, and so many at least: the first steps of Adam only do harm, and in eight
# of them the lowest rate always wins.
_SHARE, _FEWEST = 40, 16
_TRIALS = 5  # about so many, with the looks at the held-out samples
_WORTH = 151  # steps; in shorter runs trials would take as long as they


@dataclass(frozen=True)
class Recipe:
    """The learning rate, and batch norm ``training`` or ``frozen``."""

    rate: float
    batch_norm: str

    def __str__(self) -> str:
        return f"rate {self.rate:.2g}, batch norm {self.batch_norm}"


def trial_steps(steps: int) -> int:
    """How long a trial is for a run of so many steps; 0 where there are none."""
    return max(_FEWEST, steps // _SHARE) if steps >= _WORTH else 0


def steps_beside_trials(steps: int) -> int:
    """Of so many steps, those that are left where some are spent on trials."""
    left = steps - _TRIALS * trial_steps(steps)
    return left if trial_steps(left) else min(steps, _WORTH - 1)


def choose(first: Sequence[Recipe], trial: Callable[[Recipe], float]) -> tuple[Recipe, list[dict[str, Any]]]:
    """The best of some recipes at the best rate near by, and all that was tried.

    `trial` says how far from the teacher a recipe leads in a few steps. From the best of `first` the rate is raised
    while that helps, and lowered if raising did not.
    """
    tried: list[dict[str, Any]] = []

    def of(recipe: Recipe) -> float:
        found = trial(recipe)
        tried.append({**asdict(recipe), "distance": found})
        return found

    distances = {recipe: of(recipe) for recipe in first}
    best = min(distances, key=lambda recipe: distances[recipe])
    reached = distances[best]
    for factor in (_FACTOR, 1 / _FACTOR):
        moved = False
        for _ in range(_MOVES):
            further = replace(best, rate=best.rate * factor)
            if (found := of(further)) >= reached:
                break
            best, reached, moved = further, found, True
        if moved:
            break
    return best, tried
