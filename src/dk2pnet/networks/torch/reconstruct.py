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
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dk2pnet.decompose.moments import BLOCK
from dk2pnet.decompose.solve import Factors, Problem, solve_many
from dk2pnet.layer import DKConv2d
from dk2pnet.measure import inference_of
from dk2pnet.networks.network import Site
from dk2pnet.networks.torch.side_by_side import Passes, Samples, Walks
from dk2pnet.networks.torch.surroundings import Surroundings, calls_once, surroundings_of, traced

__all__ = ["reconstruct"]

# Solutions of a layer behind which a ReLU stands; another one follows while the error falls by this share.
_SOLUTIONS, _TOLERANCE = 6, 0.01
# A batch norm that hardly lets a channel through cannot be asked to make up for another's error.
_LEAST_GAIN = 1e-2
# Inputs whose squared mean is so many times their variance are summed in float64: in float32 their variance is lost.
_FAR = 1e2
# Ridges about the present combination, as shares of the features' energy; and every which image chooses among them.
_RIDGES, _HELD = (0.01, 0.1), 5
_AMPLE = 20  # samples for every unknown, from which on the kernels are solved too
_COPIES = 6  # that are held of a layer's responses, in float64
_FEWEST_POSITIONS = 4
_FIRST = 4  # layers: where none of them gains, none is solved


class _Vain(Exception):
    """Ends the reconstruction: the first layers gain nothing by it."""


def reconstruct(
    teacher: nn.Module,
    student: nn.Module,
    sites: Sequence[Site],
    factors: Mapping[str, Factors],
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
    """Solve the layers of `factors` one after the other; returns the factors of those that gained by it.

    A layer for which there are samples enough is solved anew, kernels and combination. A wide one at a large image has
    as many unknowns as some hundred images have samples: there the kernels stay, and the combination is solved.

    Parameters
    ----------
    teacher, student : the dense network, and a dense copy of it that is changed layer after layer into the (folded)
        student, biases and running means of batch norms included; it must already carry the folded weights of `factors`
        and of layers that are replaced but not solved here
    sites : the convolutions of the teacher in the order of execution
    factors : by name, as solved before
    batches, images : re-iterable calibration batches, and how many images they hold
    memory : bytes, half of them for maps on their way through the networks, which decides how many of the images a
        layer is solved with, half for its samples
    positions : of an image that samples are taken at, of every layer; more, as far as `memory` goes, where that makes
        samples enough
    progress : called with the number of layers done
    """
    order = [site for site in sites if site.name in factors and site.calls == 1]
    if not order:
        return {}
    names = [site.name for site in order]
    modules = dict(student.named_modules())
    results: dict[str, Factors] = {}
    done: list[bool] = []  # whether each of the layers so far was solved anew

    def solve(site: Site, way: Walks | Passes) -> None:
        conv, name = modules[site.name], site.name
        assert isinstance(conv, nn.Conv2d)
        near = around.get(name, Surroundings())
        norm = modules[near.norm] if near.norm is not None else None
        assert norm is None or isinstance(norm, _BatchNorm)
        count = way.reach(name)
        ample, per_image = _room(site, factors[name].combination.shape[1], count, positions, memory)
        samples = Samples(None if ample else factors[name])
        wanted, theirs, mine = way.samples(name, samples, per_image)
        kind = _Layer if ample else _Combination
        layer = kind(conv, factors[name], norm, near.rectified, samples, wanted, theirs, mine)
        found, shift = layer.solve(damping, count)
        done.append(found is not None)
        with torch.no_grad():
            if found is not None:
                results[name] = found
                conv.weight.copy_(DKConv2d.from_factors(conv, found).fold())
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
        way: Walks | Passes
        if graph is None or not calls_once(teacher, graph, names):
            around = {}
            way = Passes(teacher, student, batches, images, seed, device)
        else:
            others = {name: near.other for name, near in around.items()}
            way = Walks(teacher, student, graph, others, batches, images, memory, seed, device)
            way.measure(first, names)
        for site in order:
            solve(site, way)
    return results


def _room(site: Site, features: int, images: int, positions: int, memory: int) -> tuple[bool, int]:
    """Whether so many images have samples enough to solve a layer anew, and at how many positions of each."""
    conv = site.conv
    inputs = conv.weight[0].numel()
    size = 4 * inputs * conv.groups + _COPIES * 8 * conv.out_channels  # bytes of a sample
    most = min(max(int(memory / 2 / size / images), _FEWEST_POSITIONS), site.positions)
    enough, of_combination = (-(-_AMPLE * unknowns // images) for unknowns in (inputs, features))
    if enough <= most:
        return True, min(max(positions, enough), most)
    return False, min(max(positions, of_combination), most)


class _Layer:
    """One layer's least squares: from the student's patches to what the teacher has behind the layer's surroundings.

    With a batch norm's gain ``g = gamma / sigma`` (1 without one) and the other side s of a sum (0 without one), what
    the ReLU is given is ``g (y - mu) + beta + s``. All responses are ``(n, N)``, in float64 and without the bias.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        factors: Factors,
        norm: _BatchNorm | None,
        rectified: bool,
        samples: Samples,
        wanted: Tensor,
        wanted_other: Tensor | None,
        other: Tensor | None,
    ) -> None:
        self.conv, self.factors, self.rectified, self.samples = conv, factors, rectified, samples
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

    def solve(self, damping: float, images: int) -> tuple[Factors | None, Tensor]:
        """The factors, and what is to be added to the responses, ``(N,)``; None where those that the layer has are no
        worse on images put aside."""
        ridge = self._ridge(images)
        A, mean = self._moments()
        if ridge is None:
            now = self._weight(self.factors)
            return None, self._shift(now, mean, self._cross(self.wanted, mean)[1])
        goal, best = self.wanted, None
        for _ in range(_SOLUTIONS if self.free is not None else 1):
            factors, shift = self._solved(damping, ridge, A, mean, goal)
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

    def _ridge(self, images: int) -> float | None:
        """With samples enough nothing of the present factors has to be kept."""
        return 0.0

    def _solved(
        self, damping: float, ridge: float, A: Tensor, mean: Tensor, goal: Tensor, rows: Tensor | None = None
    ) -> tuple[Factors, Tensor]:
        target, centre = self._cross(goal, mean, rows)
        factors = self._factors(damping, ridge, A, target)
        return factors, self._shift(self._weight(factors), mean, centre)

    def _factors(self, damping: float, ridge: float, A: Tensor, target: Tensor) -> Factors:
        counts = torch.bincount(self.factors.source, minlength=self.conv.in_channels)
        weights = torch.diag_embed(self.gain.square().view(self.conv.groups, -1))
        problem = Problem(self.conv.weight, counts, A, weights, self.conv.groups, target=target)
        return solve_many([problem], damping)[0]

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
        groups, inputs = self.samples.parts[0].shape[1:]
        square = torch.zeros(groups, inputs, inputs, dtype=torch.float64)
        total, count = torch.zeros(groups, inputs, dtype=torch.float64), 0
        for patches in self.samples.pieces(rows):
            for start in range(0, inputs, BLOCK):  # products of a part of the rows: the sums may be large
                part = slice(start, start + BLOCK)
                square[:, part] += (patches[:, :, part].transpose(1, 2) @ patches).to(square)
            total += patches.sum(1).to(total)
            count += patches.shape[1]
        mean = total / max(count, 1)
        if not self.shifted:
            mean = torch.zeros_like(mean)
        square /= max(count, 1)
        for group, each in enumerate(mean):
            square[group].addr_(each, each, alpha=-1)
        return square, mean

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

    def _weight(self, factors: Factors) -> Tensor:
        """What multiplies the samples, ``(G, N, C q)``."""
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


class _Combination(_Layer):
    """The same with the kernels as they are, from what they extract.

    Every fifth image chooses how much of the present combination is kept: a ridge about it, in units of the features'
    energy.
    """

    def _ridge(self, images: int) -> float | None:
        """The one that serves the images put aside best, None where none improves on the present combination."""
        samples = len(self.wanted)
        held = torch.arange(samples) // max(1, samples // images) % _HELD == 0
        if not 0 < int(held.sum()) < samples:
            return _RIDGES[-1]
        A, mean = self._moments(~held)
        now = self._weight(self.factors)
        shift = self._shift(now, mean, self._cross(self.wanted, mean, ~held)[1])
        best, least = None, self._error(now, shift, held)
        goal = self._goal(self._responses(now) + shift)
        for ridge in _RIDGES:
            factors, shift = self._solved(0.0, ridge, A, mean, goal, ~held)
            error = self._error(self._weight(factors), shift, held)
            if error < least:
                best, least = ridge, error
        return best

    def _factors(self, damping: float, ridge: float, A: Tensor, target: Tensor) -> Factors:
        energy = A.diagonal(dim1=1, dim2=2)
        energy = torch.where(energy > 0, energy, torch.ones_like(energy))
        wanted = target + ridge * self._weight(self.factors) * energy.unsqueeze(1)
        found = torch.linalg.solve(A + ridge * torch.diag_embed(energy), wanted, left=False)
        return replace(self.factors, combination=found.reshape(self.factors.combination.shape))

    def _weight(self, factors: Factors) -> Tensor:
        """``(G, N, R / G)``."""
        return factors.combination.double().cpu().view(self.conv.groups, -1, factors.combination.shape[1])


def _of(rows: Tensor, chosen: Tensor | None) -> Tensor:
    return rows if chosen is None else rows[chosen]


def _or(value: Tensor | None, otherwise: Tensor) -> Tensor:
    return otherwise if value is None else value.double().cpu()
