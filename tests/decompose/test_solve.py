"""The solver against independent formulas: Eckart-Young, explicit errors, perturbations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dk2pnet.decompose.solve import Problem, solve, solve_many, spectrum

DAMPING = 1e-3
KINDS = ("random", "correlated", "dead", "none")

some = settings(deadline=None, max_examples=30)


@st.composite
def shapes(draw):
    """groups, outputs and inputs per group, kernel height and width."""
    return tuple(draw(st.integers(1, high)) for high in (2, 6, 4, 3, 3))


def draw_counts(generator, groups, C, most):
    """The same number of kernels in every group, at least one, each channel at most `most`."""
    total = int(torch.randint(1, C * most + 1, (1,), generator=generator))
    counts = torch.zeros(groups, C, dtype=torch.int64)
    for row in counts:
        room = torch.arange(C).repeat_interleave(most)
        for channel in room[torch.randperm(len(room), generator=generator)[:total]]:
            row[channel] += 1
    return counts.flatten()


def second_moment(kind, groups, size, q, generator):
    """E[u u'] with a mean diagonal of 1 in every group (the damping is the same per group and per layer)."""
    if kind == "none":
        return None
    rows = {"random": 4 * size, "correlated": 2 * size, "dead": max(size // 2, 1)}[kind]
    u = torch.randn(groups, rows, size, generator=generator, dtype=torch.float64)
    if kind == "correlated":
        common = torch.randn(groups, rows, 1, generator=generator, dtype=torch.float64)
        u = common * (1 + torch.rand(groups, 1, size, generator=generator, dtype=torch.float64)) + 1e-2 * u
    if kind == "dead" and size > q:
        u[:, :, :q] = 0  # the first channel never speaks
    A = u.transpose(1, 2) @ u / rows
    return A / A.diagonal(dim1=1, dim2=2).mean(1).view(-1, 1, 1)


def fisher(kind, groups, N, generator):
    """B: None, positive definite with a wide spectrum, or of rank 1."""
    if kind == "none":
        return None
    g = torch.randn(groups, 1 if kind == "singular" else 3 * N, N, generator=generator, dtype=torch.float64)
    g = g * torch.logspace(0, -2, N, dtype=torch.float64)
    return g.transpose(1, 2) @ g


def damped(A, groups, size, damping=DAMPING):
    """A with its diagonal raised by `damping` times the mean diagonal, as a float64 matrix per group."""
    if A is None:
        return torch.eye(size, dtype=torch.float64).expand(groups, -1, -1)
    mean = A.diagonal(dim1=1, dim2=2).mean()
    ridge = damping * mean if mean > 0 else torch.ones(())
    return A + ridge * torch.eye(size, dtype=torch.float64)


def split(weight, groups):
    return weight.double().reshape(groups, weight.shape[0] // groups, -1)


def energy(D, A, B):
    """sum_g tr(B D A D'), D (G, N, C q)."""
    outer = D @ A @ D.transpose(1, 2)
    return float((outer if B is None else B @ outer).diagonal(dim1=1, dim2=2).sum())


def rebuilt(factors, shape, groups):
    """The dense weight in float64, kernel by kernel."""
    outputs, C, kh, kw = shape
    N, seen = outputs // groups, [0] * groups
    weight = torch.zeros(groups, N, C, kh, kw, dtype=torch.float64)
    kernels, combination = factors.kernels.double(), factors.combination.double().view(groups, N, -1)
    for kernel, channel in zip(kernels[:, 0], factors.source.tolist(), strict=True):
        group = channel // C
        weight[group, :, channel % C] += combination[group, :, seen[group], None, None] * kernel
        seen[group] += 1
    return weight.view(shape)


class Case:
    """One random problem and all that is known of it."""

    def __init__(self, shape, kind, output_kind, seed, full=False):
        self.groups, self.N, self.C, kh, kw = shape
        generator = torch.Generator().manual_seed(seed)
        self.q, self.size, self.rank = kh * kw, self.C * kh * kw, min(self.N, kh * kw)
        self.weight = torch.randn(self.groups * self.N, self.C, kh, kw, generator=generator)
        self.raw = second_moment(kind, self.groups, self.size, self.q, generator)
        self.B = fisher(output_kind, self.groups, self.N, generator)
        self.counts = draw_counts(generator, self.groups, self.C, self.rank)
        if full:
            self.counts = torch.full((self.groups * self.C,), self.q)
        self.A = damped(self.raw, self.groups, self.size)
        self.W = split(self.weight, self.groups)
        self.total = energy(self.W, self.A, self.B)
        # The channels' own energies: rounding is relative to them, also where their responses cancel.
        blocks = torch.block_diag(*[torch.ones(self.q, self.q, dtype=torch.float64)] * self.C)
        self.rounding = 1e-10 * max(energy(self.W, self.A * blocks, self.B) / self.total, 1)
        self.generator = generator

    def solve(self, **options):
        return solve(self.weight, self.counts, self.raw, self.B, self.groups, **options)

    def problem(self):
        return Problem(self.weight, self.counts, self.raw, self.B, self.groups)

    def difference(self, factors):
        return self.W - split(rebuilt(factors, self.weight.shape, self.groups), self.groups)

    def error(self, factors):
        """tr(B D A D') relative to that of an all-zero weight."""
        return energy(self.difference(factors), self.A, self.B) / self.total

    def per_channel_error(self):
        """Every channel's own best block (Eckart-Young in its own metric), then the error of all together."""
        root = torch.eye(self.N, dtype=torch.float64).expand(self.groups, -1, -1)
        if self.B is not None:
            values, vectors = torch.linalg.eigh(self.B)
            root = vectors @ torch.diag_embed(values.clamp_min(0).sqrt()) @ vectors.transpose(1, 2)
        D = torch.zeros_like(self.W)
        for g in range(self.groups):
            for c in range(self.C):
                part, kept = slice(c * self.q, (c + 1) * self.q), int(self.counts[g * self.C + c])
                L = torch.linalg.cholesky(self.A[g, part, part])
                U, S, V = torch.linalg.svd(root[g] @ self.W[g, :, part] @ L, full_matrices=False)
                tail = (U[:, kept:] * S[kept:]) @ V[kept:]
                D[g, :, part] = tail @ torch.linalg.inv(L)  # already multiplied by B^1/2
        return energy(D, self.A, None) / self.total


def case_of(both):
    return st.builds(
        lambda shape, moments, seed: (shape, *moments, seed), shapes(), st.sampled_from(both), st.integers(0, 999)
    )


_OUTPUTS = ("none", "definite", "singular")
# A, or both, or neither; B alone has tests of its own
every_case = case_of([(kind, output) for kind in KINDS for output in _OUTPUTS if kind != "none" or output == "none"])
output_only = case_of([("none", "definite"), ("none", "singular")])


# -- structure ----------------------------------------------------------------------------------------------------


@some
@given(every_case)
def test_factors_have_the_shapes_counts_and_order_promised(drawn):
    case = Case(*drawn)
    factors = case.solve(sweeps=2)
    R = int(case.counts.sum())
    assert factors.kernels.shape == (R, 1, *drawn[0][3:])
    assert factors.combination.shape == (case.groups * case.N, R // case.groups, 1, 1)
    assert torch.bincount(factors.source, minlength=len(case.counts)).tolist() == case.counts.tolist()
    counts = case.counts.tolist()
    expected = [c for branch in range(max(counts)) for c, count in enumerate(counts) if count > branch]
    assert factors.source.tolist() == expected
    assert torch.isfinite(factors.kernels).all()
    assert torch.isfinite(factors.combination).all()


@some
@given(every_case)
def test_the_same_problem_gives_the_same_factors_and_inputs_stay(drawn):
    case = Case(*drawn)
    given_tensors = [t for t in (case.weight, case.counts, case.raw, case.B) if t is not None]
    before = [tensor.clone() for tensor in given_tensors]
    first, second = case.solve(sweeps=3), case.solve(sweeps=3)
    assert torch.equal(first.kernels, second.kernels)
    assert torch.equal(first.combination, second.combination)
    assert first.errors == second.errors
    assert all(torch.equal(a, b) for a, b in zip(given_tensors, before, strict=True))


def test_kernels_of_a_channel_come_most_dominant_first():
    torch.manual_seed(0)
    weight = torch.randn(6, 3, 3, 3)
    factors = solve(weight, [3, 3, 3])
    part = factors.kernels.flatten(1).norm(dim=1) * factors.combination.flatten(1).norm(dim=0)
    assert (part.view(3, 3)[:-1] >= part.view(3, 3)[1:]).all()


# -- exact answers ------------------------------------------------------------------------------------------------


@some
@given(shapes(), st.integers(0, 999))
def test_the_weight_criterion_is_eckart_young_per_channel(shape, seed):
    case = Case(shape, "none", "none", seed)
    factors = case.solve()
    optimum = torch.zeros_like(case.W).view(case.groups, case.N, case.C, case.q)
    left = 0.0
    for index, kept in enumerate(case.counts.tolist()):
        g, c = divmod(index, case.C)
        U, S, V = torch.linalg.svd(case.W.view_as(optimum)[g, :, c], full_matrices=False)
        optimum[g, :, c] = (U[:, :kept] * S[:kept]) @ V[:kept]
        left += float(S[kept:].square().sum())
    got = split(rebuilt(factors, case.weight.shape, case.groups), case.groups)
    assert factors.errors[-1] == pytest.approx(left / case.total, abs=1e-10)
    assert case.error(factors) == pytest.approx(left / case.total, abs=1e-6)
    gaps = [float(s) for s in (got - optimum.flatten(2)).abs().flatten()]
    # the optimum is unique up to ties of singular values, which random weights do not have
    assert max(gaps) < 1e-3


@some
@given(every_case)
def test_full_rank_is_exact(drawn):
    case = Case(*drawn, full=True)
    factors = case.solve()
    assert case.error(factors) < 10 * case.rounding
    assert factors.errors[-1] < 10 * case.rounding
    if drawn[2] != "singular" or case.q <= case.N:  # else B does not see all of the weight
        assert float(case.difference(factors).abs().max()) < 1e-3 * float(case.weight.abs().max())


@some
@given(shapes(), st.sampled_from(KINDS), st.integers(0, 999), st.floats(-3, 3))
def test_the_scale_of_the_moments_does_not_matter(shape, kind, seed, exponent):
    case, scale = Case(shape, kind, "definite", seed), 10**exponent
    raw = None if case.raw is None else case.raw * scale
    scaled = solve(case.weight, case.counts, raw, case.B / scale, case.groups, sweeps=3, tolerance=0.0)
    assert scaled.errors[-1] == pytest.approx(case.solve(sweeps=3, tolerance=0.0).errors[-1], abs=1e-8)


@some
@given(shapes(), st.sampled_from(["random", "correlated", "dead"]), st.integers(0, 999))
def test_unit_moments_are_the_weight_criterion(shape, kind, seed):
    case = Case(shape, kind, "none", seed)
    identity = torch.eye(case.size, dtype=torch.float64).repeat(case.groups, 1, 1)
    units = torch.eye(case.N, dtype=torch.float64).repeat(case.groups, 1, 1)
    plain = solve(case.weight, case.counts, groups=case.groups)
    for A, B in ((identity, None), (None, units), (identity, units)):
        factors = solve(case.weight, case.counts, A, B, case.groups)
        ours, theirs = (rebuilt(f, case.weight.shape, case.groups) for f in (factors, plain))
        assert factors.errors[-1] == pytest.approx(plain.errors[-1], abs=1e-8)
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@some
@given(output_only)
def test_output_moments_alone_stand_beside_a_unit_a(drawn):
    """A None is the identity also where B is given, and B need not be undone by the user."""
    case = Case(*drawn)
    factors = case.solve()
    identity = torch.eye(case.size, dtype=torch.float64).repeat(case.groups, 1, 1)
    explicit = solve(case.weight, case.counts, identity, case.B, case.groups)
    assert factors.errors[-1] == pytest.approx(explicit.errors[-1], abs=1e-8)
    assert case.error(factors) == pytest.approx(factors.errors[-1], abs=1e-6)


@some
@given(case_of([("none", "definite")]))
def test_full_rank_is_exact_with_output_moments_alone(drawn):
    case = Case(*drawn, full=True)
    assert float(case.difference(case.solve()).abs().max()) < 1e-3 * float(case.weight.abs().max())


# -- errors -------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(every_case)
def test_the_error_never_rises_and_is_the_error_of_the_factors(drawn):
    case = Case(*drawn)
    factors = case.solve(sweeps=8, tolerance=0.0)
    history, slack = factors.errors, 10 * case.rounding
    assert all(after <= before + slack for before, after in zip(history, history[1:], strict=False)), history
    # the start may be worse than nothing where channels are correlated, the end may not
    assert min(history) >= -slack, history
    assert history[-1] <= 1 + slack, history
    assert case.error(factors) == pytest.approx(history[-1], abs=1e4 * case.rounding)


@some
@given(every_case)
def test_the_start_is_the_per_channel_svd_and_the_end_is_at_least_as_good(drawn):
    case = Case(*drawn)
    factors, alone = case.solve(), case.per_channel_error()
    assert factors.errors[0] == pytest.approx(alone, abs=1e-8)
    assert case.error(factors) <= alone + 1e-6


def test_correlated_inputs_gain_much_from_the_descent():
    """What a per-channel SVD cannot see: two channels that say the same need the kernels of one."""
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(200, 9, generator=generator, dtype=torch.float64)
    u = torch.cat([u, u + 1e-3 * torch.randn(200, 9, generator=generator, dtype=torch.float64)], 1)
    weight = torch.randn(12, 2, 3, 3, generator=generator)
    factors = solve(weight, [9, 0], (u.T @ u / 200).unsqueeze(0))
    assert factors.errors[0] > 0.2
    assert factors.errors[-1] < 1e-2


@some
@given(every_case)
def test_no_other_combination_of_the_same_kernels_is_better(drawn):
    case = Case(*drawn)
    factors = case.solve(sweeps=3)
    best = case.error(factors)
    for _ in range(5):
        for step in (1e-1, 1e-3):
            noise = torch.randn(factors.combination.shape, generator=case.generator)
            moved = factors.combination + step * factors.combination.abs().max() * noise
            other = type(factors)(factors.kernels, moved, factors.source)
            assert case.error(other) >= best - 1e-7


@some
@given(shapes(), st.sampled_from(["random", "correlated"]), st.sampled_from(["none", "definite"]), st.integers(0, 999))
def test_more_kernels_never_leave_a_larger_error(shape, kind, output_kind, seed):
    """On uncorrelated channels, where a channel's error is its own."""
    case = Case(shape, kind, output_kind, seed)
    blocks = torch.block_diag(*[torch.ones(case.q, case.q, dtype=torch.float64)] * case.C)
    raw = case.raw * blocks
    errors = [
        solve(case.weight, [kernels] * len(case.counts), raw, case.B, case.groups).errors[-1]
        for kernels in range(1, case.rank + 1)
    ]
    assert all(after <= before + 1e-10 for before, after in zip(errors, errors[1:], strict=False))


@pytest.mark.parametrize(("value", "moments"), [(0.0, None), (0.0, 0.0), (1.0, 0.0), (0.0, 1.0)])
def test_weights_and_inputs_of_zeros_are_solved(value, moments):
    weight = torch.full((4, 2, 3, 3), value)
    A = None if moments is None else moments * torch.eye(18, dtype=torch.float64).unsqueeze(0)
    factors = solve(weight, [1, 2], A)
    torch.testing.assert_close(rebuilt(factors, weight.shape, 1).float(), weight, rtol=1e-5, atol=1e-6)
    assert torch.isfinite(torch.tensor(factors.errors)).all()


def test_damping_is_relative_to_the_layer_and_not_to_the_group():
    """A group that never speaks must not count as much as if its inputs had unit energy."""
    case = Case((2, 4, 2, 3, 3), "random", "none", 0)
    raw = case.raw.clone()
    raw[1] *= 1e-9
    energies = spectrum(case.weight, raw, groups=2)
    live, dead = energies[0].sum(), energies[1].sum()
    assert dead < 1e-2 * live
    raw[1] = 0
    energies = spectrum(case.weight, raw, groups=2)
    assert energies[1].sum() == pytest.approx(float(dead), rel=1e-3)


# -- targets ------------------------------------------------------------------------------------------------------


@some
@given(shapes(), st.sampled_from(["random", "dead"]), st.sampled_from(["none", "definite"]), st.integers(0, 999))
def test_a_target_is_the_weight_that_would_answer_so_pulled_to_the_weight_by_the_damping(
    shape, kind, output_kind, seed
):
    case = Case(shape, kind, output_kind, seed)

    def towards(wanted):
        problem = Problem(case.weight, case.counts, case.raw, case.B, case.groups, wanted @ case.raw)
        return solve_many([problem], sweeps=4)[0]

    wanted = torch.randn(case.W.shape, generator=case.generator, dtype=torch.float64)
    moved = (wanted @ case.raw + case.W @ (case.A - case.raw)) @ torch.linalg.inv(case.A)
    theirs = solve(moved.view(case.weight.shape), case.counts, case.raw, case.B, case.groups, sweeps=4)
    assert towards(wanted).errors[-1] == pytest.approx(theirs.errors[-1], abs=1e-5)
    assert towards(case.W).errors[-1] == pytest.approx(case.solve(sweeps=4).errors[-1], abs=1e-8)


# -- several layers -----------------------------------------------------------------------------------------------


def _assert_same(problems, together, alone, groups, tolerance=1e-4):
    for problem, ours, theirs in zip(problems, together, alone, strict=True):
        assert ours.source.tolist() == theirs.source.tolist()
        assert ours.errors[-1] == pytest.approx(theirs.errors[-1], abs=1e-8)
        a, b = (rebuilt(factors, problem.weight.shape, groups) for factors in (ours, theirs))
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(problem.weight.abs().max()))


@some
@given(shapes(), st.lists(st.sampled_from(["random", "dead"]), min_size=2, max_size=4), st.integers(0, 99))
@pytest.mark.parametrize("output_kind", ["none", "definite"])
def test_layers_of_one_shape_are_solved_as_if_alone(output_kind, shape, kinds, seed):
    cases = [Case(shape, kind, output_kind, seed + i) for i, kind in enumerate(kinds)]
    problems = [case.problem() for case in cases]
    together = solve_many(problems, sweeps=3, tolerance=0.0)
    _assert_same(problems, together, [case.solve(sweeps=3, tolerance=0.0) for case in cases], shape[0], 1e-3)


def test_layers_of_different_shapes_come_back_in_order():
    cases = [Case((1 + i % 2, 3 + i % 3, 2, 3, 1 + i % 2), KINDS[i % 4], "definite", i) for i in range(8)]
    problems = [case.problem() for case in cases]
    alone = [case.solve(sweeps=3, tolerance=0.0) for case in cases]
    for problem, case, ours, theirs in zip(
        problems, cases, solve_many(problems, sweeps=3, tolerance=0.0), alone, strict=True
    ):
        _assert_same([problem], [ours], [theirs], case.groups)


@pytest.mark.parametrize("first", ["none", "definite"])
def test_layers_of_one_shape_with_and_without_output_moments_are_solved_as_if_alone(first):
    other = "definite" if first == "none" else "none"
    cases = [Case((1, 5, 3, 3, 3), "random", kind, seed) for seed, kind in enumerate([first, other, other])]
    problems = [case.problem() for case in cases]
    together = solve_many(problems, sweeps=3, tolerance=0.0)
    _assert_same(problems, together, [case.solve(sweeps=3, tolerance=0.0) for case in cases], 1)


def test_layers_of_one_shape_with_and_without_target_are_solved_as_if_alone():
    cases = [Case((1, 5, 3, 3, 3), "random", "none", seed) for seed in range(2)]
    wanted = torch.randn(1, 5, 27, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    problems = [case.problem() for case in cases]
    problems.append(Problem(cases[0].weight, cases[0].counts, cases[0].raw, target=wanted))
    for order in (problems, problems[::-1]):
        together = solve_many(order, sweeps=3, tolerance=0.0)
        alone = [solve_many([problem], sweeps=3, tolerance=0.0)[0] for problem in order]
        _assert_same(order, together, alone, 1)


def test_a_loud_layer_does_not_end_the_descent_of_a_quiet_one():
    """The scales of A differ by orders of magnitude between layers; the stopping rule must not."""
    case, ones = Case((1, 12, 8, 3, 3), "dead", "none", 0), torch.ones(8, dtype=torch.int64)
    quiet = Problem(case.weight, ones, case.raw)
    # independent inputs: the start is the optimum, and its large error stays as it is
    loud = Problem(case.weight.flip(0), ones, 1e6 * torch.eye(72, dtype=torch.float64).unsqueeze(0))
    alone = solve(quiet.weight, quiet.counts, quiet.A)
    assert len(alone.errors) > 5
    for together in (solve_many([quiet, loud])[0], solve_many([loud, quiet])[1]):
        assert together.errors[-1] <= 1.01 * alone.errors[-1]


def test_nothing_to_solve_is_nothing():
    assert solve_many([]) == []


# -- spectrum -----------------------------------------------------------------------------------------------------


@some
@given(every_case)
def test_a_spectrum_descends_and_sums_to_the_energies_of_the_channels(drawn):
    case = Case(*drawn)
    energies = spectrum(case.weight, case.raw, case.B, case.groups)
    assert energies.shape == (case.groups, case.C, case.rank)
    assert (energies >= 0).all()
    assert (energies[..., :-1] >= energies[..., 1:]).all()
    for c in range(case.C):
        part = slice(c * case.q, (c + 1) * case.q)
        for g in range(case.groups):
            B = None if case.B is None else case.B[g : g + 1]
            whole = energy(case.W[g : g + 1, :, part], case.A[g : g + 1, part, part], B)
            assert float(energies[g, c].sum()) == pytest.approx(whole, rel=1e-9, abs=1e-12)


@some
@given(every_case)
def test_a_spectrum_says_what_one_channel_alone_would_lose(drawn):
    """Kernels in one channel only, and all others silent: the energy left is the tail of the spectrum."""
    case = Case((1, *drawn[0][1:]), *drawn[1:])
    energies = spectrum(case.weight, case.raw, case.B)
    part = slice(0, case.q)
    raw = None if case.raw is None else case.A[:, part, part]
    for kept in range(1, case.rank + 1):
        factors = solve(case.weight[:, :1], [kept], raw, case.B, damping=0.0, sweeps=0)
        whole = float(energies[0, 0].sum())
        assert factors.errors[0] * whole == pytest.approx(float(energies[0, 0, kept:].sum()), abs=1e-9 * whole + 1e-12)
