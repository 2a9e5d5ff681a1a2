"""Weight and moments in, kernels and combination out.

Notation: a convolution has N outputs, C inputs per group, kernels of ``q = kh kw`` numbers and G groups. Its weight is
split by group into ``W (G, N, C q)``; `A (G, C q, C q)` is the second moment of the input patches, `B (G, N, N)` the
Fisher information of the outputs. The error of an approximation, with ``D = W - W^``, is ``sum_g tr(B D A D')``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dk2pnet.errors import InputError

__all__ = ["Factors", "Problem", "damped", "diagonal_blocks", "solve", "solve_many", "spectrum"]

# Layers whose stacked A stays below this many bytes are solved together: tiny problems are bound by call overhead.
_STACK_BYTES = 64 * 2**20
# A sweep over a layer of 512 channels takes most of a second, and the first sweeps bring nearly all: layers whose A is
# larger than this stop after a few.
_LARGE_BYTES, _LARGE_SWEEPS = 32 * 2**20, 8
_AT_ONCE = 2**21  # numbers of A that are multiplied by kernels at once


@dataclass(frozen=True)
class Factors:
    """What replaces a dense weight: R kernels, their source channels, and the combination.

    float64: ``kernels (R, 1, kh, kw)``, ``combination (N_total, R / G, 1, 1)``, ``source (R,)`` sorted by branch;
    ``errors`` is the damped error, relative to that of an all-zero weight, at the start, after each sweep and after the
    final least squares.
    """

    kernels: Tensor
    combination: Tensor
    source: Tensor
    errors: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Problem:
    """One layer to solve: weight ``(N_total, C, kh, kw)``, counts ``(C_total,)``, A and B as above or None (identity).

    ``target (G, N, C q) = E[y u']`` replaces ``W A`` where the wanted responses y are not ``W u`` (the asymmetric
    reconstruction of Zhang et al., "Accelerating Very Deep Convolutional Networks", 2015); damping then pulls the
    solution towards the weight.
    """

    weight: Tensor
    counts: Tensor
    A: Tensor | None = None
    B: Tensor | None = None
    groups: int = 1
    target: Tensor | None = None


def solve(
    weight: Tensor,
    counts: Tensor | Sequence[int],
    A: Tensor | None = None,
    B: Tensor | None = None,
    groups: int = 1,
    damping: float = 1e-3,
    sweeps: int = 60,
    tolerance: float = 1e-3,
) -> Factors:
    """Find the kernels and the combination of one layer.

    Example: ``solve(torch.randn(32, 16, 3, 3), [2] * 16).kernels.shape == (32, 1, 3, 3)``.

    Parameters
    ----------
    weight : (N_total, C, kh, kw)
    counts : (C_total,) kernels per input channel, at most ``min(N, q)`` are used
    A, B : moments as in the module's notation; None stands for the identity
    damping : added to A's diagonal, relative to the layer's mean diagonal
    sweeps, tolerance : stop after this many sweeps (8 for layers from 256 channels on), or when a sweep lowers the
        damped error by less than this fraction
    """
    counts = torch.as_tensor(counts, dtype=torch.int64)
    return solve_many([Problem(weight, counts, A, B, groups)], damping, sweeps, tolerance)[0]


def solve_many(
    problems: Sequence[Problem], damping: float = 1e-3, sweeps: int = 60, tolerance: float = 1e-3
) -> list[Factors]:
    """`solve` for several independent layers; small layers of one shape are solved side by side, which is faster."""
    stacks: dict[tuple, list[int]] = {}
    for index, problem in enumerate(problems):
        key: tuple = (index,)
        if problem.A is not None and problem.A.numel() * 8 * len(problems) <= _STACK_BYTES:
            key = (tuple(problem.weight.shape), problem.groups, problem.B is None, problem.target is None)
        stacks.setdefault(key, []).append(index)
    results: dict[int, Factors] = {}
    with _one_thread():
        for members in stacks.values():
            found = _solve_stack([problems[i] for i in members], damping, sweeps, tolerance)
            results |= dict(zip(members, found, strict=True))
    return [results[index] for index in range(len(problems))]


def spectrum(
    weight: Tensor, A: Tensor | None = None, B: Tensor | None = None, groups: int = 1, damping: float = 1e-3
) -> Tensor:
    """Energies ``(G, C, min(N, q))`` of every channel's candidate kernels, most dominant first (squared singular
    values of ``B^1/2 W_c L_c``): how much the error of that channel alone falls when the kernel is added."""
    W = _grouped(weight, groups)
    _, N, C, q = W.shape
    diagonal = diagonal_blocks(damped(A, C, q, damping), C, q) if A is not None else None
    root = _root(B) @ W.flatten(2) if B is not None else W.flatten(2)
    Y = root.view(groups, N, C, q).transpose(1, 2)
    if diagonal is not None:
        Y = Y @ torch.linalg.cholesky(diagonal)
    energies = torch.linalg.eigvalsh(Y.transpose(2, 3) @ Y).flip(-1).clamp_min(0)
    return energies[..., : min(N, q)]


# -- inside -------------------------------------------------------------------------------------------------------


@contextmanager
def _one_thread() -> Iterator[None]:
    """The blocks are tiny: on two threads a layer of 256 channels took 2.5 times as long as on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _grouped(weight: Tensor, groups: int) -> Tensor:
    """(N_total, C, kh, kw) -> float64 (G, N, C, q) on the CPU (tiny eigenproblems are faster there)."""
    total, C, kh, kw = weight.shape
    return weight.detach().to("cpu", torch.float64).reshape(groups, total // groups, C, kh * kw)


def _ridge(A: Tensor, damping: float) -> Tensor:
    """What damping adds to the diagonal of A: relative to the mean over the whole layer, so that a silent group stays
    silent."""
    mean = A.detach().to("cpu", torch.float64).diagonal(dim1=1, dim2=2).mean()
    # A layer whose input is zero everywhere has A = 0: any positive diagonal keeps the algebra defined.
    return damping * mean if float(mean) > 0 else torch.ones_like(mean)


def damped(A: Tensor, C: int, q: int, damping: float) -> Tensor:
    """A copy of A with its diagonal raised, as ``(G, C, q, C, q)``."""
    ridge = _ridge(A, damping)
    A = A.detach().to("cpu", torch.float64, copy=True)
    A.diagonal(dim1=1, dim2=2).add_(ridge)
    return A.view(-1, C, q, C, q)


def diagonal_blocks(A: Tensor, C: int, q: int) -> Tensor:
    """The moments of each channel alone, ``(G, C, q, q)``."""
    A = A.view(-1, C, q, C, q)
    return A.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)


def _together(parts: list[Tensor]) -> Tensor:
    """Along the first axis; one alone, which may be large, is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _root(B: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(B.detach().to("cpu", torch.float64))
    return (vectors * values.clamp_min(0).sqrt().unsqueeze(1)) @ vectors.transpose(1, 2)


def _solve_stack(problems: Sequence[Problem], damping: float, sweeps: int, tolerance: float) -> list[Factors]:
    """All problems have one shape and the same moments given; they and their groups form one batch dimension."""
    groups = problems[0].groups
    W = torch.cat([_grouped(problem.weight, groups) for problem in problems])
    G, N, C, q = W.shape
    counts = torch.cat([problem.counts.cpu().view(groups, C) for problem in problems]).clamp_max(min(N, q))
    if bool((counts.sum(1).view(-1, groups) != counts.sum(1).view(-1, groups)[:, :1]).any()):
        raise InputError(
            f"counts give the groups {counts.sum(1).tolist()} kernels (a channel has {min(N, q)} at most); "
            "expected the same number in every group"
        )
    A = B = target = None
    if problems[0].A is None and problems[0].B is not None:
        A = torch.eye(C * q, dtype=W.dtype).expand(G, -1, -1).contiguous().view(G, C, q, C, q)
        target = W
    elif problems[0].A is not None:
        A = _together([damped(problem.A, C, q, damping) for problem in problems if problem.A is not None])
        if problems[0].target is None:
            target = (W.flatten(2) @ A.view(G, C * q, C * q)).view_as(W)
        else:
            given = [problem.target.view(groups, N, C, q) for problem in problems if problem.target is not None]
            ridges = [_ridge(problem.A, damping).expand(groups) for problem in problems if problem.A is not None]
            target = torch.cat(given).to(W) + torch.cat(ridges).view(G, 1, 1, 1) * W
            W = torch.linalg.solve(A.view(G, C * q, C * q), target.flatten(2), left=False).view_as(W)
    if problems[0].B is not None:
        B = torch.cat([_root(problem.B) for problem in problems if problem.B is not None])
    descent = _Descent(W, A, target, B, counts)
    history = [descent.error]
    if A is not None and A.numel() * 8 > _LARGE_BYTES:
        sweeps = min(sweeps, _LARGE_SWEEPS)
    for _ in range(sweeps if A is not None else 0):
        descent.sweep()
        history.append(descent.error)
        before, after = (errors.view(-1, groups).sum(1) for errors in history[-2:])
        if bool((before - after <= tolerance * after).all()):  # a loud layer must not end the descent of a quiet one
            break
    if A is not None:
        descent.combine()
        history.append(descent.error)
    per_problem = torch.stack(history).view(len(history), len(problems), groups).sum(2)
    totals = descent.total.view(len(problems), groups).sum(1).clamp_min(torch.finfo(W.dtype).tiny)
    errors = (per_problem / totals).T.tolist()
    return [
        descent.factors(slice(number * groups, (number + 1) * groups), problem.weight.shape, errors[number])
        for number, problem in enumerate(problems)
    ]


class _Descent:
    """Block coordinate descent over channels for a batch of G problems of one shape.

    The kernels live in ``R + 1`` slots a problem, channel after channel; the last slot is a dummy of zeros that stands
    in where a channel has fewer kernels than the table is wide. Inside, everything is multiplied by ``B^1/2`` from
    the left, which turns B into the identity.
    """

    def __init__(self, W: Tensor, A: Tensor | None, target: Tensor | None, root: Tensor | None, counts: Tensor) -> None:
        self.G, self.N, self.C, self.q = W.shape
        self.A, self.root, self.plain_target = A, root, W if target is None else target
        self.target = self._rooted(self.plain_target)  # (G, N, C, q): W A
        W = self._rooted(W)
        first = counts.cumsum(1) - counts
        self.R = int(counts.sum(1).max())
        rank = torch.arange(max(int(counts.max()), 1))
        self.used = rank < counts.unsqueeze(2)  # (G, C, width)
        self.slots = torch.where(self.used, first.unsqueeze(2) + rank, self.R)
        self.source = torch.zeros(self.G, self.R + 1, dtype=torch.int64)
        channels = torch.arange(self.C).view(1, -1, 1).expand_as(self.slots)
        self.source.scatter_(1, self.slots.flatten(1), channels.flatten(1))
        self.P = W.new_zeros(self.G, self.N, self.R + 1)
        self.K = W.new_zeros(self.G, self.R + 1, self.q)
        eye = torch.eye(self.q, dtype=W.dtype).expand(self.G, self.C, -1, -1)
        if A is None:
            self.L = self.inverse = eye
        else:
            self.L = torch.linalg.cholesky(diagonal_blocks(A, self.C, self.q))
            self.inverse = torch.linalg.solve_triangular(self.L, eye, upper=False)
        self.total = (W * self.target).sum((1, 2, 3))
        # the start: every channel on its own
        Y = W.transpose(1, 2) @ self.L
        left = torch.stack([self._place(channel, Y[:, channel]) for channel in range(self.C)])
        self.error = left.sum(0) if A is None else self._error(*self._products())

    def _rooted(self, x: Tensor) -> Tensor:
        return x if self.root is None else (self.root @ x.flatten(2)).view_as(x)

    def _place(self, channel: int, Y: Tensor) -> Tensor:
        """Give `channel` the best kernels for its whitened target ``Y (G, N, q)``; returns the error left, (G,)."""
        values, vectors = torch.linalg.eigh(Y.transpose(1, 2) @ Y)
        width = self.used.shape[2]
        used = self.used[:, channel].to(Y.dtype)
        V = vectors.flip(2)[:, :, :width] * used.unsqueeze(1)
        slots = self.slots[:, channel]
        self.P.scatter_(2, slots.unsqueeze(1).expand(-1, self.N, -1), Y @ V)
        kernels = V.transpose(1, 2) @ self.inverse[:, channel]
        self.K.scatter_(1, slots.unsqueeze(2).expand(-1, -1, self.q), kernels)
        return values.sum(1) - (values.flip(1)[:, :width] * used).sum(1)

    def sweep(self) -> None:
        """Solve every channel's block exactly, one after the other: no step can raise the error.

        All channels at once from the old residual (Jacobi) would diverge on correlated inputs.
        """
        for channel in range(self.C):
            if not bool(self.used[:, channel].any()):
                continue
            slots = self.slots[:, channel]
            residual = self.target[:, :, channel] - self.P @ self._kernel_moments(channel)
            residual = residual @ self.inverse[:, channel].transpose(1, 2)
            P = self.P.gather(2, slots.unsqueeze(1).expand(-1, self.N, -1))
            K = self.K.gather(1, slots.unsqueeze(2).expand(-1, -1, self.q))
            left = self._place(channel, residual + P @ (K @ self.L[:, channel]))
            self.error = self.error + left - residual.square().sum((1, 2))

    def combine(self) -> None:
        """Least squares for the combination given all kernels. It does not depend on B, so B need not be undone."""
        gram, cross = self._products(self.plain_target)
        diagonal = gram.diagonal(dim1=1, dim2=2)
        diagonal += torch.where(diagonal > 0, 1e-10 * diagonal, torch.ones_like(diagonal))
        factor, failed = torch.linalg.cholesky_ex(gram)
        if bool((failed > 0).any()):  # kernels that depend on each other: the minimum-norm solution
            self.P = cross @ torch.linalg.pinv(gram, hermitian=True)
        else:
            self.P = torch.cholesky_solve(cross.transpose(1, 2), factor).transpose(1, 2)
        self.plain_P = self.P
        self.P = self._rooted(self.P)
        self.error = self._error(gram, self._rooted(cross))

    def _kernel_moments(self, channel: int) -> Tensor:
        """Row r: ``k_r A[source_r, channel]``, (G, R + 1, q)."""
        assert self.A is not None
        rows = self.A[:, channel]  # (G, q, C, q)
        if self.G > 1:
            rows = rows.gather(2, self.source.view(self.G, 1, -1, 1).expand(-1, self.q, -1, self.q))
            return (rows * self.K.unsqueeze(1)).sum(3).transpose(1, 2)
        step = max(_AT_ONCE // self.q**2, 1)  # a wide layer's rows of all kernels would be many times its A
        parts = [slice(start, start + step) for start in range(0, self.R + 1, step)]
        found = [(rows[0].index_select(1, self.source[0, part]) * self.K[0, part]).sum(2) for part in parts]
        return (found[0] if len(found) == 1 else torch.cat(found, 1)).T.unsqueeze(0)

    def _products(self, target: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``K A K'`` (G, R + 1, R + 1) and ``target K'`` (G, N, R + 1), channel by channel."""
        target = self.target if target is None else target
        gram, cross = self.P.new_zeros(self.G, self.R + 1, self.R + 1), torch.zeros_like(self.P)
        for channel in range(self.C):
            slots = self.slots[:, channel]
            mine = self.K.gather(1, slots.unsqueeze(2).expand(-1, -1, self.q)).transpose(1, 2)  # the dummy's are zero
            found = self._kernel_moments(channel) @ mine
            gram.scatter_(2, slots.unsqueeze(1).expand(-1, self.R + 1, -1), found)
            cross.scatter_(2, slots.unsqueeze(1).expand(-1, self.N, -1), target[:, :, channel] @ mine)
        return gram, cross

    def _error(self, gram: Tensor, cross: Tensor) -> Tensor:
        return self.total + ((self.P @ gram - 2 * cross) * self.P).sum((1, 2))

    def factors(self, part: slice, shape: torch.Size, errors: list[float]) -> Factors:
        """The kernels of the problems in `part` (one problem's groups), sorted by branch and balanced."""
        combination = self.P if self.A is None else self.plain_P
        entries = []  # (branch, channel of the whole layer, group, slot)
        for group, g in enumerate(range(part.start, part.stop)):
            for channel, rank in self.used[g].nonzero().tolist():
                entries.append((rank, group * self.C + channel, g, int(self.slots[g, channel, rank])))
        entries.sort()
        source = torch.tensor([entry[1] for entry in entries], dtype=torch.int64)
        kernels = torch.stack([self.K[g, slot] for _, _, g, slot in entries])
        blocks = []
        for g in range(part.start, part.stop):
            mine = [number for number, entry in enumerate(entries) if entry[2] == g]
            P = combination[g][:, [entries[number][3] for number in mine]]
            # Equal norms of a kernel and its column: neither under- nor overflows, and both train at one rate.
            scale = (P.norm(dim=0) / kernels[mine].norm(dim=1).clamp_min(1e-300)).sqrt()
            scale = torch.where(scale > 0, scale, torch.ones_like(scale))
            kernels[mine] *= scale.unsqueeze(1)
            blocks.append(P / scale)
        N_total, _, kh, kw = shape
        return Factors(kernels.view(-1, 1, kh, kw), torch.cat(blocks).view(N_total, -1, 1, 1), source, errors)
