"""Several processes, as `accelerate launch` and `torchrun` start them: which one this is, and sums over all of them;
and the processor that they run on."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the command line asks whether it is the main process before it needs PyTorch
    import torch
    from torch import Tensor

__all__ = ["broadcast", "cores", "count", "is_alone", "is_main", "join", "processor", "rank", "sum_over_all", "wait"]


def join(device: str) -> torch.device | None:
    """Join the other processes; the device of this one, or None where it runs alone."""
    if is_alone():
        return None
    import torch
    from accelerate import PartialState

    return PartialState(cpu=device == "cpu" or not torch.cuda.is_available()).device


def is_alone() -> bool:
    """Whether this process was started without others, joined yet or not."""
    return int(os.environ.get("WORLD_SIZE", "1")) < 2


def count() -> int:
    """How many processes work together."""
    if "torch.distributed" not in sys.modules:  # nobody has joined
        return 1
    dist = _dist()
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process."""
    return _dist().get_rank() if count() > 1 else 0 if is_alone() else int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


def wait() -> None:
    """Until all processes are here."""
    if count() > 1:
        _dist().barrier()


def broadcast(values: list) -> None:
    """Replace the values by the main process's."""
    if count() > 1:
        _dist().broadcast_object_list(values, 0)


def sum_over_all(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over all processes, bit for bit the same in each of them."""
    if count() == 1:
        return
    dist = _dist()
    on_gpu = dist.get_backend() == "nccl"
    for tensor in tensors:
        total = tensor.cuda() if on_gpu else tensor.contiguous()
        dist.reduce(total, 0)
        dist.broadcast(total, 0)
        tensor.copy_(total)


def _dist() -> Any:
    import torch.distributed

    return torch.distributed


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """Its name, as the operating system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
