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
_TRIALS = 4  # about so many, with the looks at the held-out samples
# A higher rate may end a trial so many times as far from the teacher: of a few steps low rates make more than of many.
_LENIENT = 1.1
# What ends so many times as far as the start is not lowered further: Adam's first steps do as much harm, which the
# steps behind them make good.
_HARM = 1.15
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


def choose(
    first: Sequence[Recipe], trial: Callable[[Recipe], float], start: float
) -> tuple[Recipe, list[dict[str, Any]]]:
    """The best of some recipes at the best rate near by, and all that was tried.

    `trial` says how far from the teacher a recipe leads in a few steps, `start` how far it was before them. Where the
    best of `first` gains, its rate is raised while that gains too, if a little less; while it loses more than a little,
    it is lowered, as long as that helps.
    """
    tried: list[dict[str, Any]] = []

    def of(recipe: Recipe) -> float:
        found = trial(recipe)
        tried.append({**asdict(recipe), "distance": found})
        return found

    distances = {recipe: of(recipe) for recipe in first}
    best = min(distances, key=lambda recipe: distances[recipe])
    reached = distances[best]
    gains = reached < start
    for _ in range(_MOVES):
        if not gains and reached <= _HARM * start:
            break
        further = replace(best, rate=best.rate * (_FACTOR if gains else 1 / _FACTOR))
        found = of(further)
        if found >= (min(_LENIENT * reached, start) if gains else reached):
            break
        best, reached = further, min(found, reached)
    return best, tried
