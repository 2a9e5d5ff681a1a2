"""From moments to a plan and its factors: the energies of candidate kernels, the budget spent on them, the solution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from dk2pnet.decompose.select import Candidate, cheapest, select, uniform
from dk2pnet.decompose.solve import Factors, Problem, solve_many, spectrum
from dk2pnet.errors import TooSmall
from dk2pnet.networks.network import Site
from dk2pnet.networks.patches import geometry_of
from dk2pnet.plan import Budget, LayerPlan, Plan
from dk2pnet.run.progress import Progress
from dk2pnet.students.moments_store import MomentStore
from dk2pnet.students.teacher import TOO_LARGE, Teacher

__all__ = ["candidates_of", "check_reachable", "energies_of", "make_plan", "solve_layers", "spend"]

# Layers whose A is larger than this are solved one at a time.
_LARGE = 16 * 2**20


def _moments(site: Site, store: MomentStore | None, criterion: str) -> tuple[Tensor | None, Tensor | None]:
    if store is None or criterion == "weight":
        return None, None
    moments = store[site.name]
    return moments.A(), moments.B()


def energies_of(site: Site, store: MomentStore | None, criterion: str) -> Tensor:
    """Energies of the candidate kernels, comparable between layers: divided by the energy of the layer.

    `loss`: the geometric mean of these and of what the loss makes of them. The loss alone sees every error where it
    arises, as if nothing behind it made up for it, which the reconstruction and tuning do (docs/method.md).
    """
    conv = site.conv
    A, B = _moments(site, store, criterion)
    if A is not None and not A.diagonal(dim1=-2, dim2=-1).any():  # silent on all images: nothing is known of it
        return torch.zeros_like(spectrum(conv.weight, None, None, conv.groups))
    W = conv.weight.detach().double().cpu().view(conv.groups, -1, conv.weight[0].numel())
    total = float((W * (W if A is None else W @ A)).sum())
    energies = spectrum(conv.weight, A, None, conv.groups) / max(total, 1e-300)
    if criterion == "loss":
        energies = (energies * spectrum(conv.weight, A, B, conv.groups)).sqrt()
    return energies


def candidates_of(budget: Budget, sites: Mapping[str, Site], energies: Mapping[str, Tensor]) -> dict[str, Candidate]:
    """What `select` knows of the convolutions, in the budget's unit."""
    candidates = {}
    for name, site in sites.items():
        conv = site.conv
        unit = 1 if budget.kind == "params" else site.positions
        q = conv.kernel_size[0] * conv.kernel_size[1]
        kernel = (conv.groups * q + conv.out_channels) * unit
        candidates[name] = Candidate(energies[name], kernel, conv.weight.numel() * unit)
    return candidates


def spend(
    budget: Budget,
    sites: Mapping[str, Site],
    energies: Mapping[str, Tensor],
    total_macs: int,
    total_parameters: int,
) -> dict[str, Tensor | None]:
    """Kernels per channel for every convolution that can be decomposed."""
    candidates = candidates_of(budget, sites, energies)
    if budget.kind == "kernels":
        return uniform(candidates, int(budget.value))
    total = total_parameters if budget.kind == "params" else total_macs
    return select(candidates, budget.value * total - _fixed(candidates, total))


def check_reachable(budget: Budget, teacher: Teacher) -> None:
    """`TooSmall` where one kernel in every layer that can be decomposed costs more; before anything is gathered."""
    if budget.kind not in ("macs", "params"):
        return
    total = teacher.network.parameters if budget.kind == "params" else teacher.network.macs
    shapes = {name: geometry_of(site.conv) for name, site in teacher.open_sites.items()}
    one = {name: torch.zeros(groups, inputs, 1) for name, (groups, inputs, _) in shapes.items()}
    candidates = candidates_of(budget, teacher.open_sites, one)
    least = cheapest(candidates) + _fixed(candidates, total)
    if budget.value * total < least:
        large = [site.name for site in teacher.sites if site.reason.startswith(TOO_LARGE)]
        raise TooSmall(
            f"budget {budget} cannot be reached: one kernel in every layer that can be decomposed gives "
            f"{budget.kind}={_round_up(least / total)}; give at least that"
            + (f", or more --memory than {teacher.options.memory:g}: {', '.join(large)} ask for it" if large else "")
        )


def _fixed(candidates: Mapping[str, Candidate], total: int) -> float:
    """The cost of what stays dense."""
    return total - sum(candidate.dense_cost for candidate in candidates.values())


def _round_up(value: float) -> str:
    return f"{-(-value * 1000 // 1) / 1000:.3f}"


def make_plan(
    teacher: Teacher, counts: Mapping[str, Tensor | None], energies: Mapping[str, Tensor], budget: Budget
) -> Plan:
    """What becomes of every convolution, with the figures before and after."""
    network, macs, parameters = teacher.network, teacher.network.macs, teacher.network.parameters
    plan = Plan(
        network=network.spec,
        input_shape=list(network.example.shape[1:]),
        normalization=network.normalization.to_dict() if network.normalization else None,
        criterion=teacher.criterion,
        budget=str(budget),
        macs_dense=macs,
        macs=macs,
        parameters_dense=parameters,
        parameters=parameters,
        unseen=network.plan.unseen if network.plan is not None else None,
    )
    for site in teacher.sites:
        size = site.size
        layer = LayerPlan(site.name, site.shape, site.reason, None, site.macs, site.macs, size, size)
        layer.aliases = site.aliases
        count = counts.get(site.name)
        if count is not None:
            conv = site.conv
            layer.counts = count.tolist()
            q = conv.kernel_size[0] * conv.kernel_size[1]
            layer.parameters = int(count.sum()) * (q + conv.out_channels // conv.groups)
            layer.macs = layer.parameters * site.positions
            spectrum_ = energies[site.name].flatten(0, 1)
            kept = sum(float(row[: int(n)].sum()) for row, n in zip(spectrum_, count, strict=True))
            layer.energy_kept = kept / max(float(spectrum_.sum()), 1e-300)
        elif not site.reason:
            layer.reason = _why_dense(site.conv, budget)
        plan.macs += layer.macs - layer.macs_dense
        plan.parameters += layer.parameters - layer.parameters_dense
        plan.layers.append(layer)
    names = {layer.name for layer in plan.layers}
    for before in network.plan.layers if network.plan is not None else ():
        if before.counts is not None and before.name not in names:  # a DK layer of a network that was compressed before
            same = replace(before, macs_dense=before.macs, parameters_dense=before.parameters, energy_kept=None)
            plan.layers.append(replace(same, reason="of dominant kernels already"))
    return plan


def _why_dense(conv: nn.Conv2d, budget: Budget) -> str:
    if budget.kind == "latency":
        return "its time is better spent dense"
    one_each = conv.in_channels * (conv.kernel_size[0] * conv.kernel_size[1] + conv.out_channels // conv.groups)
    cheaper = one_each < conv.weight.numel()
    return "the budget leaves it dense" if cheaper else "dominant kernels would not be cheaper"


def solve_layers(
    counts: Mapping[str, Tensor],
    sites: Mapping[str, Site],
    store: MomentStore,
    criterion: str,
    progress: Progress,
) -> dict[str, Factors]:
    """Small layers together (same shapes side by side), large ones one at a time, so that memory stays bounded."""

    def problem(name: str) -> Problem:
        conv = sites[name].conv
        A, B = _moments(sites[name], store, criterion)
        return Problem(conv.weight, counts[name], A, B, conv.groups)

    def size(name: str) -> int:
        conv = sites[name].conv
        return 8 * conv.groups * conv.weight[0].numel() ** 2

    small = [name for name in counts if size(name) <= _LARGE]
    factors = dict(zip(small, solve_many([problem(name) for name in small]), strict=True))
    progress("solving", len(factors), len(counts))
    for name in counts:
        if name not in factors:
            factors[name] = solve_many([problem(name)])[0]
            progress("solving", len(factors), len(counts))
    return factors
