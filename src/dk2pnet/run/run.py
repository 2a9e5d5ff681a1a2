"""The shell around any work: what it says, how long it takes, its seed, its device and its threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from dk2pnet.run.clock import Clock
from dk2pnet.run.device import pick_device
from dk2pnet.run.progress import Progress, silent
from dk2pnet.run.seed import left_as_found

__all__ = ["Run"]


@dataclass(frozen=True)
class Run:
    """``progress`` is called with what is being done, how much of it is done, and how much there is; ``command`` is the
    command line, for the report. The rest is set when the work begins."""

    progress: Progress = silent
    command: str | None = None
    seed: int = 0
    device: torch.device = torch.device("cpu")
    threads: int | None = None
    clock: Clock = field(default_factory=Clock)

    @contextmanager
    def at_work(self, device: str, threads: int | None, seed: int = 0) -> Iterator[Run]:
        """The same run on its device; the global random generators and PyTorch's threads are put back afterwards."""
        with left_as_found():
            yield replace(self, seed=seed, device=pick_device(device, threads), threads=threads, clock=Clock())

    def says(self, what: str, total: int = 0) -> Callable[[int], None]:
        """`progress` for one thing, told only how much of it is done."""
        return lambda done: self.progress(what, done, total)
