"""One queue spends a budget over the whole network: which channel of which layer gets how many kernels."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Candidate", "Option", "cheapest", "choose", "select", "uniform"]


@dataclass(frozen=True)
class Candidate:
    """What the selection knows of one convolution. Costs are in the budget's unit (MACs, parameters, time).

    ``energies (G, C, K)``: what each further kernel of a channel takes off the error, descending along K.
    ``kernel_cost``: of one kernel in every group; ``fixed_cost``: of the DK layer without kernels;
    ``dense_cost``: of the layer left dense.
    """

    energies: Tensor
    kernel_cost: float
    dense_cost: float
    fixed_cost: float = 0.0

    @property
    def most(self) -> int:
        """Kernels per group that the layer can have and still be cheaper than dense (0: it can never be)."""
        available = self.energies.shape[1] * self.energies.shape[2]
        room = (self.dense_cost - self.fixed_cost) / self.kernel_cost
        return min(available, int(room) - (room == int(room)))

    def cost(self, kernels: int) -> float:
        """Cost with so many kernels in every group."""
        return self.fixed_cost + kernels * self.kernel_cost


def cheapest(candidates: Mapping[str, Candidate]) -> float:
    """The lowest cost that can be reached: one kernel per group wherever that is cheaper than dense."""
    return sum(c.cost(1) if c.most >= 1 else c.dense_cost for c in candidates.values())


def select(candidates: Mapping[str, Candidate], budget: float) -> dict[str, Tensor | None]:
    """Spend `budget` (what may be spent on these layers together) on the kernels with most energy per cost.

    Returns counts ``(G C,)`` per layer, or None where the layer stays dense. Every group of a layer gets the same
    number of kernels. The cost is at most `budget` as long as `cheapest` is, and what is left over is less than the
    cheapest kernel that could still be added.
    """
    steps = {name: _steps(candidate) for name, candidate in candidates.items()}
    gains = {name: step[0].tolist() for name, step in steps.items()}
    rest = {name: step[0].flip(0).cumsum(0).flip(0).tolist() for name, step in steps.items()}
    taken: dict[str, int] = {}
    dense = {name for name, candidate in candidates.items() if candidate.most < 1}
    left = budget - cheapest(candidates)
    queue: list[tuple[float, str, bool, float]] = []

    def offer(name: str) -> None:
        """Queue the layer's best step that still fits: one more kernel, or all that is missing by leaving it dense."""
        candidate, number = candidates[name], taken[name]
        options = []
        if number < candidate.most and candidate.kernel_cost <= left:
            options.append((-gains[name][number] / candidate.kernel_cost, name, False, candidate.kernel_cost))
        cost = candidate.dense_cost - candidate.cost(number)
        if cost <= left:
            options.append((-rest[name][number] / cost if number < len(rest[name]) else 0.0, name, True, cost))
        if options:
            heapq.heappush(queue, min(options))

    for name in candidates:
        if name not in dense:
            taken[name] = 1
            offer(name)
    while queue:
        _, name, to_dense, cost = heapq.heappop(queue)
        if cost <= left:
            left -= cost
            if to_dense:
                dense.add(name)
                continue
            taken[name] += 1
        offer(name)
    return {
        name: None if name in dense else _counts(candidates[name], steps[name][1], taken[name]) for name in candidates
    }


@dataclass(frozen=True)
class Option:
    """One thing that can be made of a layer: its cost, and the error that it leaves."""

    cost: float
    error: float


def choose(options: Mapping[str, Sequence[Option]], budget: float) -> dict[str, int]:
    """Spend `budget` where the costs of a layer are whatever was measured, not proportional to its kernels.

    Returns, per layer, the index of the option taken. All layers start at their cheapest option; one queue then takes
    the step that removes most error per cost, along each layer's convex hull of (cost, error). What is left at the end
    goes to whatever still fits. The cost is at most `budget` as long as the cheapest options together are.
    """
    hulls = {name: _hull(of_layer) for name, of_layer in options.items()}
    taken = {name: hull[0] for name, hull in hulls.items()}
    left = budget - sum(options[name][index].cost for name, index in taken.items())
    queue: list[tuple[float, str, int]] = []

    def offer(name: str, place: int) -> None:
        if place + 1 < len(hulls[name]):
            here, there = (options[name][index] for index in hulls[name][place : place + 2])
            heapq.heappush(queue, (-(here.error - there.error) / (there.cost - here.cost), name, place + 1))

    for name in options:
        offer(name, 0)
    while queue:
        _, name, place = heapq.heappop(queue)
        index = hulls[name][place]
        step = options[name][index].cost - options[name][taken[name]].cost
        if step <= left:
            left -= step
            taken[name] = index
            offer(name, place)
    while True:  # off the hulls: what still fits and removes most error per cost
        best: tuple[float, str, int] | None = None
        for name, of_layer in options.items():
            here = of_layer[taken[name]]
            for index, option in enumerate(of_layer):
                step, gain = option.cost - here.cost, here.error - option.error
                if gain > 0 and step <= left:
                    rate = gain / max(step, 1e-12)
                    if best is None or rate > best[0]:
                        best = (rate, name, index)
        if best is None:
            return taken
        _, name, index = best
        left -= options[name][index].cost - options[name][taken[name]].cost
        taken[name] = index


def _hull(options: Sequence[Option]) -> list[int]:
    """Indices of the options on the lower convex hull of (cost, error), from the cheapest to the most exact."""
    order = sorted(range(len(options)), key=lambda index: (options[index].cost, options[index].error))
    hull: list[int] = []
    for index in order:
        option = options[index]
        if hull and option.error >= options[hull[-1]].error:
            continue
        while len(hull) > 1:
            first, second = options[hull[-2]], options[hull[-1]]
            # The middle one is of no use where going past it removes as much error per cost.
            before = (first.error - second.error) * (option.cost - second.cost)
            after = (second.error - option.error) * (second.cost - first.cost)
            if before > after:
                break
            hull.pop()
        hull.append(index)
    return hull


def uniform(candidates: Mapping[str, Candidate], kernels: int) -> dict[str, Tensor | None]:
    """The same number of kernels for every channel; None where the layer is not cheaper so."""
    counts: dict[str, Tensor | None] = {}
    for name, candidate in candidates.items():
        groups, channels, available = candidate.energies.shape
        per_channel = min(kernels, available)
        fits = per_channel * channels <= candidate.most
        counts[name] = torch.full((groups * channels,), per_channel, dtype=torch.int64) if fits else None
    return counts


def _steps(candidate: Candidate) -> tuple[Tensor, Tensor]:
    """Gain of the layer's n-th kernel (per group, summed over groups), and each group's channels in that order."""
    groups, channels, available = candidate.energies.shape
    ranked, order = candidate.energies.reshape(groups, -1).sort(dim=1, descending=True, stable=True)
    return ranked.sum(0), order // available


def _counts(candidate: Candidate, channels: Tensor, kernels: int) -> Tensor:
    groups, width, _ = candidate.energies.shape
    counts = [torch.bincount(channels[group, :kernels], minlength=width) for group in range(groups)]
    return torch.cat(counts)
