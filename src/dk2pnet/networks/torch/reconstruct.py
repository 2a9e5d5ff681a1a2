"""Asymmetric reconstruction, layer by layer in the order of execution.

Every layer is solved for the *student's* own inputs (the layers before it are already replaced) and the *teacher's*
outputs, so that it also undoes what the layers before it did wrong. Where the surroundings of a convolution are known
(a batch norm, a sum, a ReLU), what counts is what comes out of them: the other side of a sum is the student's and
carries errors of its own, which the convolution makes up for as well, and where the teacher's ReLU is silent, any
response that stays silent is right. Source: Zhang, Zou, He, Sun, "Accelerating Very Deep Convolutional Networks for
Classification and Detection", 2015, sections 3.2 and 3.3 (ReLU, asymmetric), and He, Zhang, Sun, "Channel Pruning for
Accelerating Very Deep Neural Networks", 2017, section 3.3 (sums); here for dominant kernels, with the responses that
the ReLU leaves free chosen anew after every solution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dk2pnet.decompose.solve import Factors, Problem, solve_many
from dk2pnet.layer import DKConv2d
from dk2pnet.measure import inference_of
from dk2pnet.networks.network import Site
from dk2pnet.networks.patches import input_patches, sampled_outputs
from dk2pnet.networks.torch.surroundings import Surroundings, Walk, surroundings_of, traced

__all__ = ["reconstruct"]

# Solutions of a layer behind which a ReLU stands; another one follows while the error falls by this share.
_SOLUTIONS, _TOLERANCE = 6, 0.01
# A batch norm that hardly lets a channel through cannot be asked to make up for another's error.
_LEAST_GAIN = 1e-2
# Inputs whose squared mean is so many times their variance are summed in float64: in float32 their variance is lost.
_FAR = 1e2
_PIECE = 2**24  # numbers of patches that are multiplied at once
# Ridges about the present weight, as shares of the inputs' energy; and every which image chooses among them.
_RIDGES, _HELD = (1e-3, 0.1), 5
_AMPLE = 20  # samples for every unknown, from which on nothing has to be chosen
_FIRST = 4  # layers: where none of them gains, none is solved


class _Vain(Exception):
    """Ends the reconstruction: the first layers gain nothing by it."""


class _Stop(Exception):
    """Ends a forward pass early: nothing behind the layer in hand matters."""


def reconstruct(
    teacher: nn.Module,
    student: nn.Module,
    sites: Sequence[Site],
    counts: Mapping[str, Tensor],
    batches: Iterable[tuple[Tensor, Tensor | None]],
    *,
    images: int,
    memory: int = 2 * 2**30,
    positions: int = 32,
    seed: int = 0,
    damping: float = 1e-3,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> dict[str, Factors]:
    """Solve the layers of `counts` one after the other; returns the factors of those that gained by it.

    Parameters
    ----------
    teacher, student : the dense network, and a dense copy of it that is changed layer after layer into the (folded)
        student, biases and running means of batch norms included; it must already carry the folded weights of layers
        that are replaced but not solved here
    sites : the convolutions of the teacher in the order of execution
    counts : by name, kernels per input channel ``(C,)``
    batches, images : re-iterable calibration batches, and how many images they hold
    memory : bytes for activations and the teacher's outputs. Where all images fit (and are of one size, and are not
        folded into the batch in pieces), one forward pass of them all is enough, in which each layer is replaced just
        before it runs; else there is a pass, cut short, for every layer
    progress : called with the number of layers done
    """
    order = [site for site in sites if site.name in counts and site.calls == 1]
    if not order:
        return {}
    names = [site.name for site in order]
    outputs = sum(site.conv.out_channels for site in order)
    inputs = max(site.conv.weight[0].numel() * site.conv.groups for site in order)
    # The teacher's outputs and the other sides of sums, at most; and the patches of one layer.
    most = int(memory / 4 / max(4 * images * max(2 * outputs, inputs), 1))
    positions = max(min(positions, most), 4)
    activation = max((site.activation for site in sites), default=0)
    at_once = 4 * 3 * activation * images <= memory / 2
    modules = dict(student.named_modules())
    results: dict[str, Factors] = {}
    done: list[bool] = []  # whether each of the layers so far was solved anew

    def solve(name: str, samples: _Samples, wanted: tuple[Tensor, Tensor | None], other: Tensor | None) -> None:
        conv = modules[name]
        assert isinstance(conv, nn.Conv2d)
        near = around.get(name, Surroundings())
        norm = modules[near.norm] if near.norm is not None else None
        assert norm is None or isinstance(norm, _BatchNorm)
        layer = _Layer(conv, norm, near.rectified, samples, *wanted, other)
        factors, shift = layer.solve(counts[name], damping, images)
        done.append(factors is not None)
        with torch.no_grad():
            if factors is not None:
                results[name] = factors
                conv.weight.copy_(DKConv2d.from_factors(conv, factors).fold())
            if norm is not None:
                assert norm.running_mean is not None
                norm.running_mean -= shift.to(norm.running_mean)
            elif conv.bias is not None:
                conv.bias += shift.to(conv.bias)
        if progress is not None:
            progress(len(done))
        if len(done) == _FIRST and not any(done):
            raise _Vain

    with suppress(_Vain), inference_of(teacher), inference_of(student), torch.no_grad():
        first = next(iter(batches))[0][:2].to(device)
        graph = traced(teacher, first)
        around = surroundings_of(teacher, graph, names) if graph is not None else {}
        run = _Runner(student, graph, {name: near.other for name, near in around.items()})
        of_teacher = _Runner(teacher, graph, run.others)
        targets, alike = _teacher_outputs(of_teacher, order, batches, positions, seed, device)
        if at_once and alike:
            handles = []
            for site in order:

                def replace_first(module: nn.Conv2d, args: tuple[Tensor, ...], name: str = site.name) -> None:
                    samples = _Samples()
                    other = run.other(name, 0, positions, seed)
                    samples.add(module, args[0], 0, positions, seed)
                    solve(name, samples, targets.pop(name), other)

                handles.append(modules[site.name].register_forward_pre_hook(replace_first))
            try:
                run(torch.cat([x for x, _ in batches]).to(device))
            finally:
                for handle in handles:
                    handle.remove()
        else:
            for name in names:
                found = _gather_until(run, name, modules[name], batches, positions, seed, device)
                solve(name, found[0], targets.pop(name), found[1])
    return results


class _Runner:
    """Runs a model, as a graph where it has one: then the other side of a sum can be had before its turn."""

    def __init__(
        self, model: nn.Module, graph: torch.fx.Graph | None, others: Mapping[str, torch.fx.Node | None]
    ) -> None:
        self.model, self.graph, self.others = model, graph, others
        self.walk: Walk | None = None

    def __call__(self, x: Tensor) -> None:
        if self.graph is None:
            self.model(x)
            return
        self.walk = Walk(self.model, self.graph)
        try:
            self.walk.run(x)
        finally:
            self.walk = None

    def other(self, name: str, first: int, positions: int, seed: int) -> Tensor | None:
        """What is added to the response of a convolution that is about to run, sampled as its outputs are, (n, N)."""
        node = self.others.get(name)
        if node is None:
            return None
        assert self.walk is not None
        value = self.walk.ahead(node)
        if not isinstance(value, Tensor) or value.dim() != 4:  # a parameter for every channel: as one of another size
            return torch.zeros(0)
        return sampled_outputs(value, first, positions, seed).flatten(0, 1)


class _Samples:
    """The student's input patches of one layer at the sampled positions, ``(n, G, C q)``."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []
        self.precise = False  # whether the pieces are float64

    def add(self, conv: nn.Conv2d, x: Tensor, first: int, positions: int, seed: int) -> None:
        """Add images ``first ...`` with inputs ``x (B, C, H, W)``."""
        self.parts.append(input_patches(conv, x, first, positions, seed))

    def pieces(self, rows: Tensor | None = None) -> Iterable[Tensor]:
        """All patches, or those of the `rows` (n,) chosen, ``(G, n, C q)`` a piece."""
        done = 0
        for part in self.parts:
            size = max(1, _PIECE // part[0].numel())
            for start in range(0, len(part), size):
                piece = part[start : start + size]
                done += len(piece)
                if rows is not None:
                    piece = piece[rows[done - len(piece) : done].to(piece.device)]
                piece = piece.transpose(0, 1)
                yield piece.double() if self.precise else piece.float() if piece.dtype.itemsize < 4 else piece


class _Layer:
    """One layer's least squares: from the student's patches to what the teacher has behind the layer's surroundings.

    With a batch norm's gain ``g = gamma / sigma`` (1 without one) and the other side s of a sum (0 without one), what
    the ReLU is given is ``g (y - mu) + beta + s``. All responses are ``(n, N)``, in float64 and without the bias.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        norm: _BatchNorm | None,
        rectified: bool,
        samples: _Samples,
        wanted: Tensor,
        wanted_other: Tensor | None,
        other: Tensor | None,
    ) -> None:
        self.conv, self.rectified, self.samples = conv, rectified, samples
        y = wanted.double()
        zeros, ones = y.new_zeros(y.shape[1]), y.new_ones(y.shape[1])
        self.gain, centre = ones, zeros
        bias = conv.bias.double().cpu() if conv.bias is not None else zeros
        if norm is not None:
            mean, variance = _or(norm.running_mean, zeros), _or(norm.running_var, ones)
            self.gain = _or(norm.weight, ones) / (variance + norm.eps).sqrt()
            centre, bias = mean - bias, _or(norm.bias, zeros)
        self.heard = self.gain.abs() > _LEAST_GAIN * self.gain.abs().max()
        inverse = torch.where(self.heard, 1 / self.gain, zeros)
        known = other is not None and wanted_other is not None and other.numel() == y.numel()
        if not known and (other is not None or wanted_other is not None):
            self.rectified = False  # a sum of other shapes: the ReLU's input is not known
        mine = theirs = torch.zeros_like(y[:1])
        if known:
            assert other is not None
            assert wanted_other is not None
            mine, theirs = (side.double().cpu() for side in (other, wanted_other))
        # The responses at which the ReLU's input is that of the teacher, and those at which it is zero.
        self.wanted = y + (theirs - mine) * inverse
        self.silent = centre - (bias + mine) * inverse
        self.free = (self.gain * (y - centre) + bias + theirs < 0) & self.heard if self.rectified else None
        self.shifted = norm is not None or conv.bias is not None

    def solve(self, counts: Tensor, damping: float, images: int) -> tuple[Factors | None, Tensor]:
        """The factors, and what is to be added to the responses, ``(N,)``; None where the weight that the layer has is
        no worse on images put aside.

        A wide layer has as many unknowns as a few hundred images have samples. There every fifth image chooses how much
        of the present weight is kept: a ridge about it, in units of the inputs' energy.
        """
        samples, unknowns = len(self.wanted), self.conv.weight[0].numel()
        held = torch.arange(samples) // max(1, samples // images) % _HELD == 0
        ridge: float | None = 0.0
        if samples < _AMPLE * unknowns and 0 < int(held.sum()) < samples:
            ridge = self._ridge(counts, damping, held)
        A, mean = self._moments()
        if ridge is None:
            return None, self._shift(self._now(), mean, self._cross(self.wanted, mean)[1])
        goal, best = self.wanted, None
        for _ in range(_SOLUTIONS if self.free is not None else 1):
            factors, shift = self._solved(counts, damping, ridge, A, mean, goal)
            if self.free is None:
                return factors, shift
            responses = self._responses(self._weight(factors)) + shift
            goal = self._goal(responses)
            error = float(((responses - goal) * self.gain).square().sum())
            if best is not None and error >= best[0] * (1 - _TOLERANCE):
                break
            best = error, factors, shift
        assert best is not None
        return best[1], best[2]

    def _ridge(self, counts: Tensor, damping: float, held: Tensor) -> float | None:
        """The ridge that serves the images put aside best, None where none improves on the present weight."""
        A, mean = self._moments(~held)
        centre = self._cross(self.wanted, mean, ~held)[1]
        best, least = None, self._error(self._now(), self._shift(self._now(), mean, centre), held)
        for ridge in _RIDGES:
            factors, shift = self._solved(counts, damping, ridge, A, mean, self.wanted, ~held)
            error = self._error(self._weight(factors), shift, held)
            if error < least:
                best, least = ridge, error
        return best

    def _solved(
        self,
        counts: Tensor,
        damping: float,
        ridge: float,
        A: Tensor,
        mean: Tensor,
        goal: Tensor,
        rows: Tensor | None = None,
    ) -> tuple[Factors, Tensor]:
        target, centre = self._cross(goal, mean, rows)
        energy = A.diagonal(dim1=1, dim2=2)
        weights = torch.diag_embed(self.gain.square().view(self.conv.groups, -1))
        A, target = A + ridge * torch.diag_embed(energy), target + ridge * self._now() * energy.unsqueeze(1)
        problem = Problem(self.conv.weight, counts, A, weights, self.conv.groups, target=target)
        factors = solve_many([problem], damping)[0]
        return factors, self._shift(self._weight(factors), mean, centre)

    def _goal(self, responses: Tensor, rows: Tensor | None = None) -> Tensor:
        """What the responses ought to be; where the ReLU is silent, what they are on its side of zero."""
        wanted = _of(self.wanted, rows)
        if self.free is None:
            return wanted
        silent = _of(self.silent, rows) if len(self.silent) > 1 else self.silent
        # On the ReLU's side of zero where the gain is positive.
        above = (responses - silent) * self.gain > 0
        return torch.where(_of(self.free, rows), torch.where(above, silent, responses), wanted)

    def _error(self, weight: Tensor, shift: Tensor, rows: Tensor) -> float:
        responses = self._responses(weight, rows) + shift
        return float(((responses - self._goal(responses, rows)) * self.gain).square().sum())

    def _moments(self, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Second moments ``(G, C q, C q)`` of the patches, about their mean where the layer can be shifted, and it."""
        found, mean = self._sums(rows)
        spread = found.diagonal(dim1=1, dim2=2).mean()
        if not self.samples.precise and float(mean.square().max()) > _FAR * float(spread):
            self.samples.precise = True
            return self._sums(rows)
        return found, mean

    def _sums(self, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        groups, inputs = self.conv.groups, self.conv.weight[0].numel()
        square = torch.zeros(groups, inputs, inputs, dtype=torch.float64)
        total, count = torch.zeros(groups, inputs, dtype=torch.float64), 0
        for patches in self.samples.pieces(rows):
            square += (patches.transpose(1, 2) @ patches).to(square)
            total += patches.sum(1).to(total)
            count += patches.shape[1]
        mean = total / max(count, 1)
        if not self.shifted:
            mean = torch.zeros_like(mean)
        return square / max(count, 1) - mean.unsqueeze(2) * mean.unsqueeze(1), mean

    def _cross(self, y: Tensor, mean: Tensor, chosen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``E[y u']`` (G, N, C q), about the means where the layer can be shifted, and the mean of y ``(G, N)``."""
        groups, y = self.conv.groups, _of(y, chosen)
        rows = y.view(len(y), groups, -1).permute(1, 2, 0)  # (G, N, n)
        cross, done = torch.zeros(groups, rows.shape[1], mean.shape[1], dtype=torch.float64), 0
        for patches in self.samples.pieces(chosen):
            part = rows[:, :, done : done + patches.shape[1]].to(patches)
            cross += (part @ patches).to(cross)
            done += patches.shape[1]
        centre = rows.mean(2)
        return cross / max(done, 1) - centre.unsqueeze(2) * mean.unsqueeze(1), centre

    def _now(self) -> Tensor:
        """The weight that the layer has, ``(G, N, C q)``."""
        return self.conv.weight.detach().double().cpu().reshape(self.conv.groups, -1, self.conv.weight[0].numel())

    def _weight(self, factors: Factors) -> Tensor:
        """``(G, N, C q)``."""
        folded = DKConv2d.from_factors(self.conv, factors).fold().detach().double().cpu()
        return folded.reshape(self.conv.groups, -1, self.conv.weight[0].numel())

    def _shift(self, weight: Tensor, mean: Tensor, centre: Tensor) -> Tensor:
        if not self.shifted:
            return torch.zeros(centre.numel(), dtype=torch.float64)
        return (centre - (weight @ mean.unsqueeze(2)).squeeze(2)).flatten()

    def _responses(self, weight: Tensor, rows: Tensor | None = None) -> Tensor:
        """``(n, N)``."""
        parts = [patches @ weight.transpose(1, 2).to(patches) for patches in self.samples.pieces(rows)]
        return torch.cat(parts, 1).transpose(0, 1).flatten(1).double().cpu()


def _of(rows: Tensor, chosen: Tensor | None) -> Tensor:
    return rows if chosen is None else rows[chosen]


def _or(value: Tensor | None, otherwise: Tensor) -> Tensor:
    return otherwise if value is None else value.double().cpu()


def _teacher_outputs(
    run: _Runner,
    order: Sequence[Site],
    batches: Iterable[tuple[Tensor, Tensor | None]],
    positions: int,
    seed: int,
    device: torch.device | str,
) -> tuple[dict[str, tuple[Tensor, Tensor | None]], bool]:
    """The teacher's responses at the sampled positions, without bias, and the other side of a sum, both ``(n, N)``.

    And whether all images are alike in size and one row each of every layer's batch: then all of them in one batch lie
    in the same order as batch by batch.
    """
    parts: dict[str, list[Tensor]] = {site.name: [] for site in order}
    others: dict[str, list[Tensor]] = {site.name: [] for site in order}
    done = images = 0
    alike, shapes = True, set()
    handles = []
    for site in order:

        def before(module: nn.Module, args: tuple, name: str = site.name) -> None:
            other = run.other(name, done, positions, seed)
            if other is not None:
                others[name].append(other.cpu())

        def see(module: nn.Conv2d, args: tuple, output: Tensor, name: str = site.name) -> None:
            nonlocal alike
            alike = alike and len(output) == images
            if module.bias is not None:
                output = output - module.bias.view(-1, 1, 1)
            parts[name].append(sampled_outputs(output, done, positions, seed).flatten(0, 1).cpu())

        handles += [site.module.register_forward_pre_hook(before), site.module.register_forward_hook(see)]
    try:
        for x, _ in batches:
            images = len(x)
            shapes.add(x.shape[1:])
            run(x.to(device))
            done += images
    finally:
        for handle in handles:
            handle.remove()
    found = {name: (torch.cat(part), torch.cat(others[name]) if others[name] else None) for name, part in parts.items()}
    return found, alike and len(shapes) == 1


def _gather_until(
    run: _Runner,
    name: str,
    conv: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor | None]],
    positions: int,
    seed: int,
    device: torch.device | str,
) -> tuple[_Samples, Tensor | None]:
    assert isinstance(conv, nn.Conv2d)
    samples, others = _Samples(), []
    done = 0

    def see(module: nn.Conv2d, args: tuple[Tensor, ...]) -> None:
        other = run.other(name, done, positions, seed)
        if other is not None:
            others.append(other)
        samples.add(module, args[0], done, positions, seed)
        raise _Stop

    handle = conv.register_forward_pre_hook(see)
    try:
        for x, _ in batches:
            try:
                run(x.to(device))
            except _Stop:
                done += len(x)
    finally:
        handle.remove()
    return samples, torch.cat(others) if others else None
