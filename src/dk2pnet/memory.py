"""What ``--memory`` is spent on, and freed memory given back to the machine.

glibc keeps the pages of arrays that were freed, and does not use many of them again for PyTorch's, which it has to
align: passes over batches of large maps grew a process by a gigabyte while a few megabytes were in use.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any

__all__ = ["Shares", "Trimmer", "give_back"]

_EVERY = 2**24  # bytes of arrays that come and go before their pages are given back; it takes milliseconds


@cache
def _trim() -> Any:
    """glibc's `malloc_trim`; None where the C library is another one."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # musl has none, and needs none
        return None


def give_back() -> None:
    """Give the pages of what was freed back, where the C library keeps them."""
    if (trim := _trim()) is not None:
        trim(0)


@dataclass(frozen=True)
class Shares:
    """Bytes of a bound: what is in memory at one time is no more than the whole, beside the network itself, its maps of
    one batch, and what tuning takes.

    While statistics are gathered: images and statistics. While a layer is solved: images, statistics that are kept, a
    layer. While layers are reconstructed: images, statistics that are kept, maps and samples (`ways`, half of them
    each), and the matrices of the layers for which there are samples enough, which are small then.
    """

    images: int  # images that are kept: decoded ones, or a user's own
    statistics: int  # of layers that are gathered in one pass
    kept: int  # statistics that stay in memory until all is done; further ones go to disk
    layer: int  # the matrices of one layer while it is solved
    batch: int  # the maps of one batch, where its size is chosen here
    ways: int  # maps on their way through both networks, and samples taken from them

    @classmethod
    def of(cls, gib: float) -> Shares:
        """Of ``--memory``."""
        total = int(gib * 2**30)
        half, quarter = total // 2, total // 4
        return cls(images=quarter, statistics=half, kept=total // 8, layer=half, batch=quarter, ways=half)


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
