"""How long networks take, measured side by side so that the figures can be compared.

A machine's speed drifts (clock, temperature, other programs). Networks timed one after the other see different
machines; timed in turns (A B C A B C ...) they see the same one, and the median of many turns ignores the rest.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from torch import Tensor, nn

from dk2pnet.data.arrays import Feed
from dk2pnet.deploy import runtimes
from dk2pnet.errors import InputError

__all__ = [
    "TARGETS",
    "Latency",
    "check_target",
    "compare_latency",
    "conditions",
    "is_onnx",
    "latency_figures",
    "ratio_of",
]

_log = logging.getLogger(__name__)

TARGETS = tuple(runtimes.TARGETS)  # that come with dk2pnet; others may be registered later

# A sample shorter than this says more about the clock and the scheduler than about the network.
SHORTEST_SAMPLE = 1e-3
# So long each network runs untimed when its turn comes, in seconds: after another network's turn the caches hold the
# other's weights. Measured with a call of 0.33 ms after a ResNet-18: 0.93, 0.53, 0.41, 0.36, 0.34, 0.33 ms.
REFILL = 3e-3
_UNSTEADY = 0.05  # half width of an interval, relative to the median
_TELLING = 0.2  # seconds, below which the processor's own clocks say nothing of who had it


@dataclass(frozen=True)
class Latency:
    """Milliseconds that one call takes: the median, and its 95 % confidence interval from `low_ms` to `high_ms`.

    `runs` is the number of samples that it rests on (a sample of a very fast network is the mean of several calls),
    `samples` are these, in their order; `busy`: whether other programs had the processor meanwhile.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    runs: int
    samples: tuple[float, ...] = ()
    busy: bool = False

    @property
    def half_width(self) -> float:
        """Of the interval, relative to the median."""
        return (self.high_ms - self.low_ms) / 2 / self.median_ms

    @property
    def noisy(self) -> bool:
        """Whether the machine was too unsteady for the median to be trusted to five percent."""
        return self.busy or self.half_width > _UNSTEADY


def compare_latency(
    networks: Mapping[str, str | Path | bytes | nn.Module],
    example: np.ndarray | Tensor | Feed | Mapping[str, np.ndarray | Tensor | Feed],
    *,
    target: str = "onnxruntime",
    threads: int | None = None,
    seconds: float = 2.0,
    rounds_min: int = 15,
    tight: float = 0.005,
) -> dict[str, Latency]:
    """Time networks on one target, taking turns.

    Example::

        compare_latency({"teacher": "teacher.onnx", "student": "model.onnx"}, torch.randn(1, 3, 32, 32), threads=1)

    Parameters
    ----------
    networks
        A name for each: an ONNX file or its content for the targets that read ONNX (`is_onnx`; already quantised for
        ``onnxruntime-int8``), else a module.
    example
        The input of every call, ``(B, C, H, W)``, or a `Feed` where there are several; one for all networks, or one
        for each name.
    target
        One of `TARGETS`.
    threads
        Threads of each network (None: the runtime's own choice, one per core).
    seconds
        How long to measure at most, per network (untimed calls included); more when `rounds_min` turns take longer.
    rounds_min
        At least so many samples of each network.
    tight
        The measurement ends early when every interval's half width is within this fraction of its median.

    Raises
    ------
    InputError
        When there is nothing to time, the target is not known or not installed, or a network cannot be loaded or run.
    """
    if not networks or rounds_min < 1:
        raise InputError(
            f"nothing to time: {len(networks)} networks, rounds_min={rounds_min}; expected 1 or more of each"
        )
    check_target(target)
    if threads is not None and threads < 1:
        raise InputError(f"threads is {threads}; expected 1 or more")
    examples = example if isinstance(example, Mapping) else dict.fromkeys(networks, example)
    runtime = runtimes.target_named(target)
    with runtime.prepared(threads):
        calls = {name: _call(name, each, examples[name], runtime, threads) for name, each in networks.items()}
        return _take_turns(calls, seconds, rounds_min, tight, watched=target != "cuda")


def ratio_of(student: Latency, teacher: Latency) -> Latency:
    """The student's time as a share of the teacher's, and its interval, turn by turn where both took turns: what slows
    both down for a while does not move it. Fields named ms are shares here."""
    if len(student.samples) != len(teacher.samples) or not student.samples:
        share = student.median_ms / teacher.median_ms
        return Latency(share, student.low_ms / teacher.high_ms, student.high_ms / teacher.low_ms, student.runs)
    shares = [mine / other for mine, other in zip(student.samples, teacher.samples, strict=True)]
    found = _summary([share / 1e3 for share in shares])
    return replace(found, samples=(), busy=student.busy or teacher.busy)


def conditions(target: str, example: np.ndarray | Tensor | Feed, threads: int | None) -> dict[str, Any]:
    """What a time depends on beside the network, for the record."""
    runtime = runtimes.target_named(target)
    shape = list(example.shape)
    batch = example.samples if isinstance(example, Feed) else shape[0]
    return {
        "target": target,
        runtime.package: runtime.version(),
        "threads": threads,
        "batch": batch,
        "input": shape[1:],
        "processor": runtime.processor(),
    }


def latency_figures(found: Mapping[str, Latency]) -> dict[str, dict[str, Any]]:
    """By name, what metrics.json holds of a measurement; of a student beside its teacher also the ``latency_ratio``,
    and whether it can be told (``latency_told``). Says so where the machine was too unsteady."""
    noisy = [name for name, latency in found.items() if latency.noisy]
    if noisy:
        widest = max(found[name].half_width for name in noisy)
        _log.warning(
            "The machine is too %s to tell times apart: the interval of the %s is +-%.0f %% of its median. "
            "Close other programs, or give fewer --threads.",
            "busy" if any(found[name].busy for name in noisy) else "unsteady",
            " and the ".join(noisy),
            100 * widest,
        )
    figures = {
        name: {
            "latency_ms": latency.median_ms,
            "latency_interval_ms": [latency.low_ms, latency.high_ms],
            "latency_runs": latency.runs,
            "latency_noisy": latency.noisy,
        }
        for name, latency in found.items()
    }
    if {"teacher", "student"} <= found.keys():
        ratio = ratio_of(found["student"], found["teacher"])
        figures["student"] |= {
            "latency_ratio": ratio.median_ms,
            "latency_ratio_interval": [ratio.low_ms, ratio.high_ms],
            "latency_told": not ratio.noisy,
        }
    return figures


def check_target(target: str) -> None:
    """`InputError` where a target is not known, or cannot be had on this machine."""
    runtimes.target_named(target).check()


def is_onnx(target: str) -> bool:
    """Whether the target reads ONNX files (else it runs PyTorch modules)."""
    return runtimes.target_named(target).reads_onnx


def _take_turns(
    calls: Mapping[str, Callable[[], object]], seconds: float, rounds_min: int, tight: float, watched: bool = True
) -> dict[str, Latency]:
    """`watched`: whether they run on processors, which other programs may take."""
    durations = {name: _warm_up(call) for name, call in calls.items()}
    untimed = {name: math.ceil(REFILL / duration) for name, duration in durations.items()}
    repeats = {name: math.ceil(SHORTEST_SAMPLE / duration) for name, duration in durations.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    begun, computed, busy = time.perf_counter(), time.process_time(), _Others()
    end = begun + seconds * len(calls)
    rounds = 0
    while rounds < rounds_min or time.perf_counter() < end:
        for name, call in calls.items():
            for _ in range(untimed[name]):
                call()
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            samples[name].append((time.perf_counter() - start) / repeats[name])
        rounds += 1
        if rounds >= rounds_min and rounds % 5 == 0:
            found = [_summary(times) for times in samples.values()]
            if all(each.half_width <= tight for each in found):
                break
    crowded = watched and busy.crowd(time.process_time() - computed, time.perf_counter() - begun)
    return {name: replace(_summary(times), busy=crowded) for name, times in samples.items()}


class _Others:
    """Tells whether other programs had the processor since it was made."""

    def __init__(self) -> None:
        self.before = psutil.cpu_times()

    def crowd(self, computed: float, seconds: float) -> bool:
        """`computed`: processor seconds of this program in so many `seconds`.

        Where it did not get one processor all the time; or where nothing was idle, and others took more than a tenth
        of a processor. Intervals alone do not say so: two programs that share a processor do it evenly.
        """
        if seconds < _TELLING:
            return False
        if computed < 0.9 * seconds:
            return True
        spent = {name: getattr(psutil.cpu_times(), name) - value for name, value in self.before._asdict().items()}
        idle = spent.get("idle", 0.0) + spent.get("iowait", 0.0)
        others = sum(spent.get(name, 0.0) for name in ("user", "nice", "system")) - computed
        return idle < 0.1 * seconds and others > 0.1 * seconds


def _call(
    name: str, network: runtimes.Network, example: runtimes.Example, target: runtimes.Target, threads: int | None
) -> Callable[[], object]:
    if isinstance(network, nn.Module) == target.reads_onnx:
        expected = "an ONNX file or its content" if target.reads_onnx else "a module"
        raise InputError(f"{name} is {type(network).__name__}; target {target.name} expects {expected}")
    what = str(network) if isinstance(network, str | Path) else "the network"
    call = target.load(network, example, threads)
    try:
        call()
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{what} does not take an input of shape {tuple(example.shape)}: {reason}") from error
    return call


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
    return Latency(1e3 * middle, 1e3 * ordered[left_out], 1e3 * ordered[n - 1 - left_out], n, tuple(times))
