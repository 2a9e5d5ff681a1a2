"""The global random generators."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

__all__ = ["left_as_found", "random_state", "set_random_state"]


@contextmanager
def left_as_found() -> Iterator[None]:
    """The states of the global random generators and PyTorch's number of threads are put back after the block."""
    threads, state = torch.get_num_threads(), random_state()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        set_random_state(state)


def random_state() -> dict[str, Any]:
    """The states of all global generators: PyTorch's (CPU, and GPUs where they are in use), NumPy's and Python's."""
    state = np.random.get_state(legacy=True)
    assert isinstance(state, tuple)  # and not the dictionary of the newer interface
    name, keys, *rest = state
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "python": random.getstate(),
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put back what `random_state` gave."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(list(state["cuda"]))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
