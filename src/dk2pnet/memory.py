"""Gives freed memory back to the machine.

glibc keeps the pages of arrays that were freed, and does not use many of them again for PyTorch's, which it has to
align: passes over batches of large maps grew a process by a gigabyte while a few megabytes were in use.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import sys
from functools import cache
from typing import Any

__all__ = ["Trimmer", "give_back"]

_EVERY = 2**24  # bytes of arrays that come and go before their pages are given back; it takes milliseconds


@cache
def _trim() -> Any:
    """glibc's `malloc_trim`; None where the C library is another one."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        return ctypes.CDLL(ctypes.util.find_library("c") or "libc.so.6").malloc_trim
    except (OSError, AttributeError):  # musl has none, and needs none
        return None


def give_back() -> None:
    """Give the pages of what was freed back, where the C library keeps them."""
    if (trim := _trim()) is not None:
        trim(0)


class Trimmer:
    """Counts the bytes of arrays that come and go, and gives freed pages back every so many."""

    def __init__(self) -> None:
        self.bytes = 0

    def passed(self, size: int) -> None:
        """So many bytes more."""
        self.bytes += size
        if self.bytes > _EVERY:
            self.bytes = 0
            give_back()
