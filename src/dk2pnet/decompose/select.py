"""One queue spends a budget over the whole network: which channel of which layer gets how many kernels."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Candidate", "cheapest", "select", "uniform"]


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
