"""What a run says while it works."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Progress", "silent"]

Progress = Callable[[str, int, int], None]  # what is being done, how much of it is done, of how much (0: unknown)


def silent(what: str, done: int, total: int) -> None:
    """No progress shown."""
