"""Seconds per step of a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

__all__ = ["Clock"]

T = TypeVar("T")


class Clock:
    """``with clock("solve"): ...`` adds the seconds that the block takes to ``clock.seconds["solve"]``."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        """Time the block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] = round(self.seconds.get(what, 0.0) + time.perf_counter() - start, 3)

    def time(self, what: str, function: Callable[[], T]) -> T:
        """Run `function` and add its time."""
        with self(what):
            return function()
