"""How long networks take, measured side by side so that the figures can be compared.

A machine's speed drifts (clock, temperature, other programs). Networks timed one after the other see different
machines; timed in turns (A B C A B C ...) they see the same one, and the median of many turns ignores the rest.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from dk2pnet.deploy.onnx import run_onnx, session
from dk2pnet.errors import InputError

__all__ = ["Latency", "compare_latency", "conditions", "is_onnx"]

# A sample shorter than this says more about the clock and the scheduler than about the network.
SHORTEST_SAMPLE = 1e-3
# So long each network runs untimed when its turn comes, in seconds: after another network's turn the caches hold the
# other's weights. Measured with a call of 0.33 ms after a ResNet-18: 0.93, 0.53, 0.41, 0.36, 0.34, 0.33 ms.
REFILL = 3e-3


@dataclass(frozen=True)
class Latency:
    """Milliseconds that one call takes: the median, and its 95 % confidence interval from `low_ms` to `high_ms`.

    `runs` is the number of samples that it rests on (a sample of a very fast network is the mean of several calls).
    """

    median_ms: float
    low_ms: float
    high_ms: float
    runs: int


def compare_latency(
    networks: Mapping[str, str | Path | bytes],
    example: np.ndarray | Tensor | Mapping[str, np.ndarray | Tensor],
    *,
    target: str = "onnxruntime",
    threads: int | None = None,
    seconds: float = 2.0,
    rounds_min: int = 15,
) -> dict[str, Latency]:
    """Time ONNX files on the CPU with ONNX Runtime, taking turns.

    Example::

        compare_latency({"teacher": "teacher.onnx", "student": "model.onnx"}, torch.randn(1, 3, 32, 32), threads=1)

    Parameters
    ----------
    networks
        A name for each file, or for its content.
    example
        The input of every call, ``(B, C, H, W)``; one for all networks, or one for each name.
    threads
        Threads of each network (None: one per physical core).
    seconds
        How long to measure, per network, in seconds (untimed calls included); more when `rounds_min` turns take longer.
    rounds_min
        At least so many samples of each network.

    Raises
    ------
    InputError
        When there is nothing to time, or a file cannot be loaded or run.
    """
    if not networks or rounds_min < 1:
        raise InputError(
            f"nothing to time: {len(networks)} networks, rounds_min={rounds_min}; expected 1 or more of each"
        )
    examples = example if isinstance(example, Mapping) else dict.fromkeys(networks, example)
    calls = {name: _call(path, examples[name], threads) for name, path in networks.items()}
    durations = {name: _warm_up(call) for name, call in calls.items()}
    untimed = {name: math.ceil(REFILL / duration) for name, duration in durations.items()}
    repeats = {name: math.ceil(SHORTEST_SAMPLE / duration) for name, duration in durations.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds * len(calls)
    while time.perf_counter() < end or min(map(len, samples.values())) < rounds_min:
        for name, call in calls.items():
            for _ in range(untimed[name]):
                call()
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            samples[name].append((time.perf_counter() - start) / repeats[name])
    return {name: _summary(times) for name, times in samples.items()}


def _call(path: str | Path | bytes, example: np.ndarray | Tensor, threads: int | None) -> Callable[[], object]:
    running = session(path, threads)
    array = example.detach().cpu().numpy() if isinstance(example, Tensor) else example
    try:
        run_onnx(running, array)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        what = "the network" if isinstance(path, bytes) else path
        raise InputError(f"{what} does not take an input of shape {tuple(array.shape)}: {reason}") from error
    return lambda: run_onnx(running, array)


def _warm_up(call: Callable[[], object], calls: int = 5) -> float:
    """Call a few times; return how long the fastest took, in seconds."""
    fastest = math.inf
    for _ in range(calls):
        start = time.perf_counter()
        call()
        fastest = min(fastest, time.perf_counter() - start)
    return max(fastest, 1e-6)


def _summary(times: Sequence[float]) -> Latency:
    """Median and its 95 % confidence interval by order statistics, which assumes nothing about the distribution.

    With k samples left out at each end, the median of the population lies outside with probability
    2 P(Binomial(n, 1/2) <= k), so k is the largest number that keeps this below 5 % (fewer than 6 samples: the range).
    """
    ordered, n = sorted(times), len(times)
    left_out, term, tail = 0, 1, 1  # term = C(n, left_out); tail = sum of the terms so far
    while left_out < n // 2:
        term = term * (n - left_out) // (left_out + 1)
        if 40 * (tail + term) > 2**n:
            break
        tail += term
        left_out += 1
    middle = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    return Latency(1e3 * middle, 1e3 * ordered[left_out], 1e3 * ordered[n - 1 - left_out], n)


def conditions(target: str, example: np.ndarray | Tensor, threads: int | None) -> dict:
    """shim"""
    return {"target": target, "threads": threads}


def is_onnx(target: str) -> bool:
    """shim"""
    return target in ("onnxruntime", "openvino")


def check_target(target: str) -> None:
    """shim"""
