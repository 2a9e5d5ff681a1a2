"""A budget in measured time: options for every layer from the latency table, one queue, and the proof.

The times of layers add up to the time of a network only roughly (a runtime fuses across layers, threads are woken
once), so the plan is not trusted: the network that it describes is built, with weights that are not solved yet, and
timed beside the dense one; then the plan is corrected until the *measured* time meets the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dk2pnet import processes
from dk2pnet.decompose.select import Option, choose
from dk2pnet.deploy.costs import DENSE, LatencyTable, Sketch, Spot, fastest_forms, gathered
from dk2pnet.deploy.emit import BLOCK, NEARLY_ALL
from dk2pnet.deploy.latency import compare_latency, ratio_of
from dk2pnet.errors import InputError, TooSmall
from dk2pnet.networks.network import Network, Site
from dk2pnet.run.progress import Progress, silent
from dk2pnet.run.run import Run
from dk2pnet.students.teacher import Teacher

__all__ = ["TOLERANCE", "Spent", "choose_forms", "spend_latency", "spend_time"]

# How far the measured time may be from the budget, relative to it; the search goes on until it is within half of that.
TOLERANCE = 0.05
_ATTEMPTS = 8


@dataclass
class Spent:
    """Kernels per channel for every convolution (None: it stays dense), the emitted forms of the others, and the
    attempts: for each the time asked of the table, and the time measured, with its interval, relative to the dense
    network's."""

    counts: dict[str, Tensor | None]
    forms: dict[str, str]
    measured: float
    attempts: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class _Choice:
    """An option of one layer: `full` kernels for every channel and `rest` more for the most dominant."""

    full: int
    rest: int
    sketch: Sketch

    def counts(self, energies: Tensor) -> Tensor:
        """Kernels per channel, (G C,), for ``energies (G, C, K)``."""
        groups, channels, most = energies.shape
        counts = torch.full((groups, channels), self.full, dtype=torch.int64)
        if self.rest:
            order = energies[:, :, self.full :].flatten(1).argsort(dim=1, descending=True, stable=True)
            taken = order[:, : self.rest // groups] // (most - self.full)
            counts += torch.stack([torch.bincount(row, minlength=channels) for row in taken])
        return counts.flatten()


def spend_latency(
    fraction: float,
    sites: Mapping[str, Site],
    energies: Mapping[str, Tensor],
    table: LatencyTable,
    dense: Any,
    build: Callable[[Mapping[str, Tensor | None]], tuple[Any, dict[str, str]]],
    example: Any,
    *,
    seconds: float = 1.0,
    progress: Progress = silent,
) -> Spent:
    """Choose the kernels whose network takes `fraction` of the dense network's time on the table's target.

    Parameters
    ----------
    sites, energies
        The convolutions that can be decomposed, and the energies ``(G, C, K)`` of their candidate kernels.
    dense
        The dense network as `compare_latency` takes it.
    build
        Counts per layer -> the network with such layers, as `compare_latency` takes it, and the forms of its layers.
    example
        The input that is timed.

    Raises
    ------
    TooSmall
        When the budget cannot be reached; it says what can.
    """
    choices = {name: _choices(site, energies[name]) for name, site in sites.items()}
    spots = {name: _spot(site) for name, site in sites.items()}
    table.progress = lambda done, total: progress("timing layers", done, total)
    points = {name: _measured(site, spots[name], energies[name], table) for name, site in sites.items()}
    options: dict[str, list[Option]] = {}
    for name, site in sites.items():
        time = points[name]
        options[name] = [Option(time(choice) * site.calls, _error(choice, energies[name])) for choice in choices[name]]
        options[name].append(Option(time(None) * site.calls, 0.0))  # dense
    unit = _dense_in_units(dense, example, table, seconds)
    replaceable = sum(of_layer[-1].cost for of_layer in options.values())
    # The rest of the network, which no kernel makes faster. Layers timed one by one can add up to more than the whole.
    fixed = max(unit - replaceable, 0.0)
    scale = unit / (fixed + replaceable)
    attempts: list[dict[str, Any]] = []
    intervals: dict[tuple[int, ...], list[float]] = {}
    tried: dict[tuple[int, ...], tuple[float, dict[str, Tensor | None], dict[str, str]]] = {}

    def attempt(asked: float) -> tuple[float, dict[str, Tensor | None], dict[str, str]]:
        taken = choose(options, asked * unit / scale - fixed)
        key = tuple(taken.values())
        if key not in tried:
            counts = {
                name: None if index == len(choices[name]) else choices[name][index].counts(energies[name])
                for name, index in taken.items()
            }
            network, forms = build(counts)
            progress("timing the network", len(attempts), 0)
            found = compare_latency(
                {"dense": dense, "student": network},
                example,
                target=table.target,
                threads=table.threads,
                seconds=seconds,
            )
            ratio = ratio_of(found["student"], found["dense"])
            tried[key] = (ratio.median_ms, counts, forms)
            intervals[key] = [ratio.low_ms, ratio.high_ms]
        attempts.append({"asked": asked, "measured": tried[key][0], "interval": intervals[key]})
        return tried[key]

    least = sum(min(option.cost for option in of_layer) for of_layer in options.values())
    lowest = (fixed + least) * scale / unit
    asked = min(max(fraction, lowest * 1.0001), 1.0)
    best: tuple[float, dict[str, Tensor | None], dict[str, str]] | None = None
    low: tuple[float, float] | None = None  # (asked, measured) that came out below the budget, the nearest
    high: tuple[float, float] | None = None
    for _ in range(_ATTEMPTS):
        found = attempt(asked)
        # A network in time before one that is late, however little.
        if best is None or _rank(found[0], fraction) < _rank(best[0], fraction):
            best = found
        if abs(found[0] - fraction) <= TOLERANCE / 2 * fraction:
            break
        if found[0] > fraction:
            high = (asked, found[0]) if high is None or asked < high[0] else high
        else:
            low = (asked, found[0]) if low is None or asked > low[0] else low
        if low is not None and high is not None and low[0] < high[0]:
            share = (fraction - low[1]) / max(high[1] - low[1], 1e-9)
            asked = low[0] + min(max(share, 0.1), 0.9) * (high[0] - low[0])
        else:
            asked = asked + (fraction - found[0])
        asked = min(max(asked, lowest * 1.0001), 1.0)
        if asked == attempts[-1]["asked"]:
            break
    assert best is not None
    if fraction >= 1 and best[0] > fraction:  # the dense network itself, whatever the noise says
        return Spent(dict.fromkeys(sites), {}, 1.0, attempts)
    if best[0] > fraction * (1 + TOLERANCE):
        reached = min(entry["measured"] for entry in attempts)
        least = np.ceil(reached * 100) / 100
        raise TooSmall(
            f"budget latency={fraction:g} cannot be reached on {table.target}: the fastest network that was found "
            f"takes {reached:.3f} of the dense one's time; "
            + (f"give at least latency={least:.2f}" if least <= 1 else "dominant kernels make nothing faster there")
        )
    return Spent(best[1], best[2], best[0], attempts)


def spend_time(fraction: float, teacher: Teacher, energies: Mapping[str, Tensor], run: Run) -> Spent:
    """Spend a latency budget on the teacher's target; with several processes the main one measures for all."""
    found: list[Spent | InputError] = []
    if processes.is_main():
        network, sites, target = teacher.network, teacher.open_sites, teacher.target
        table = LatencyTable(target, run.threads)

        def build(counts: Mapping[str, Tensor | None]) -> tuple[Any, dict[str, str]]:
            student = network.with_kernels({name: count for name, count in counts.items() if count is not None})
            forms = choose_forms(student, sites, table)
            return student.deployable(target, forms), forms

        dense = network.deployable(target, {})
        try:
            found = [
                spend_latency(fraction, sites, energies, table, dense, build, network.example, progress=run.progress)
            ]
        except InputError as error:
            found = [error]
    else:
        found = [InputError("")]
    processes.broadcast(found)
    if isinstance(found[0], InputError):
        raise found[0]
    return found[0]


def choose_forms(student: Network, sites: Mapping[str, Site], table: LatencyTable) -> dict[str, str]:
    """The fastest emitted form of every DK layer of a student that stands at one of the sites."""
    layers = student.layers
    found = {name: (layers[name], site.input_size) for name, site in sites.items() if name in layers}
    return fastest_forms(found, table) if found else {}


def _distance(measured: float, fraction: float) -> float:
    """From the budget; being late counts three times."""
    return (measured - fraction) * 3 if measured > fraction else fraction - measured


def _rank(measured: float, fraction: float) -> tuple[bool, float]:
    return measured > fraction * (1 + TOLERANCE), _distance(measured, fraction)


def _spot(site: Site) -> Spot:
    return Spot(site.conv, site.input_size)


def _choices(site: Site, energies: Tensor) -> list[_Choice]:
    conv = site.conv
    groups, channels, most = energies.shape
    width = conv.in_channels
    found = [_Choice(full, 0, gathered(width, full, 0)) for full in range(1, most + 1)]
    step = BLOCK * groups  # whole blocks, and as many kernels in every group
    for rest in range(step, width * most, step):
        found.append(_Choice(0, rest, gathered(width, 0, rest)))
    for full in range(1, most):
        for rest in range(step, int(NEARLY_ALL * width), step):
            if rest <= (most - full) * width:
                found.append(_Choice(full, rest, gathered(width, full, rest)))
    return found


def _error(choice: _Choice, energies: Tensor) -> float:
    """What the candidate kernels that are not taken would have removed."""
    groups = energies.shape[0]
    left = energies[:, :, choice.full :].flatten(1)
    if choice.rest:
        left = left.sort(dim=1, descending=True).values[:, choice.rest // groups :]
    return float(left.sum())


def _measured(site: Site, spot: Spot, energies: Tensor, table: LatencyTable) -> Callable[[_Choice | None], float]:
    """Time of a choice (None: dense) in the table's unit: measured at a few sizes, in between interpolated."""
    width, most = spot.conv.in_channels, energies.shape[2]
    q, N = spot.conv.kernel_size[0] * spot.conv.kernel_size[1], spot.conv.out_channels // spot.conv.groups
    # More kernels than multiply-adds allow are never faster.
    useful = min(most, max(int(q * N / (q + N)) + 1, 1))
    block = BLOCK * spot.conv.groups
    rests = sorted({max(r // block * block, block) for r in (block, width // 2, width, 2 * width, useful * width)})
    rests = [rest for rest in rests if rest <= width * most] or [width]
    halves = sorted({max(r // block * block, block) for r in (block, int(NEARLY_ALL * width) - 1)})
    halves = [rest for rest in halves if rest < NEARLY_ALL * width] if most > 1 else []
    full = {k: gathered(width, k, 0) for k in range(1, useful + 1)}
    lone = {rest: gathered(width, 0, rest) for rest in rests}
    beside = {rest: gathered(width, 1, rest) for rest in halves}
    times = table.ratios_of({spot: [DENSE, *full.values(), *lone.values(), *beside.values()]})[spot.key]

    def branches(count: int) -> float:
        if count in full:
            return times[full[count]]
        step = (times[full[useful]] - times[full[1]]) / max(useful - 1, 1)
        return times[full[useful]] + (count - useful) * step

    def time(choice: _Choice | None) -> float:
        if choice is None:
            return times[DENSE]
        if choice.rest == 0:
            return branches(choice.full)
        if choice.full == 0:
            return _line(choice.rest, rests, [times[lone[rest]] for rest in rests])
        if not halves:
            return float("inf")
        extra = _line(choice.rest, halves, [times[beside[rest]] - times[full[1]] for rest in halves])
        return branches(choice.full) + extra

    return time


def _line(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """Linear between the points; beyond the last as between the last two."""
    if len(xs) > 1 and x > xs[-1]:
        return ys[-1] + (x - xs[-1]) * (ys[-1] - ys[-2]) / (xs[-1] - xs[-2])
    return float(np.interp(x, xs, ys))


def _dense_in_units(dense: Any, example: Any, table: LatencyTable, seconds: float) -> float:
    """Time of the dense network in units of the table's reference layer."""
    reference = torch.randn(1, 1, *table.reference_size)
    found = compare_latency(
        {"dense": dense, "reference": table.reference},
        {"dense": example, "reference": reference},
        target=table.target,
        threads=table.threads,
        seconds=seconds,
    )
    return found["dense"].median_ms / found["reference"].median_ms
