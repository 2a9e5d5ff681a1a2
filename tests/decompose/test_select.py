"""The queue that spends a budget: worked by hand once, then by its properties."""

import itertools

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from dk2pnet.decompose.select import Candidate, Option, cheapest, choose, select, uniform

many = settings(deadline=None, max_examples=300)


@st.composite
def candidates(draw):
    """A layer with whole-numbered costs and energies, so that every sum is exact."""
    groups, channels, available = (draw(st.integers(1, high)) for high in (2, 3, 3))
    numbers = draw(st.lists(st.integers(0, 40), min_size=groups * channels * available, max_size=99))
    energies = torch.tensor(numbers[: groups * channels * available], dtype=torch.float64)
    energies = energies.view(groups, channels, available).sort(-1, descending=True).values
    return Candidate(energies, draw(st.integers(1, 6)), draw(st.integers(1, 40)), draw(st.integers(0, 5)))


networks = st.lists(candidates(), min_size=1, max_size=4).map(lambda c: {f"layer{i}": x for i, x in enumerate(c)})
budgets = st.integers(0, 160)


def kernels_of(candidate, counts):
    """Kernels per group; asserts that all groups have as many."""
    groups, channels, available = candidate.energies.shape
    assert counts.shape == (groups * channels,)
    assert counts.dtype == torch.int64
    assert int(counts.min()) >= 0
    assert int(counts.max()) <= available
    sums = counts.view(groups, channels).sum(1)
    assert sums.unique().numel() == 1
    return int(sums[0])


def cost_of(candidate, counts):
    if counts is None:
        return candidate.dense_cost
    return candidate.fixed_cost + kernels_of(candidate, counts) * candidate.kernel_cost


def energy_of(candidate, counts):
    """What the kernels take off the error; dense takes all."""
    if counts is None:
        return float(candidate.energies.sum())
    rows = candidate.energies.flatten(0, 1)
    return sum(float(row[:count].sum()) for row, count in zip(rows, counts.tolist(), strict=True))


def total(measure, network, chosen):
    return sum(measure(candidate, chosen[name]) for name, candidate in network.items())


def worth_a_conversion(candidate):
    """Whether one kernel per group is cheaper than dense."""
    return candidate.fixed_cost + candidate.kernel_cost < candidate.dense_cost


def next_step(candidate, counts):
    """The price of the smallest step up from here, or None where there is none: one more kernel, or dense."""
    if counts is None:
        return None
    kernels, (_, channels, available) = kernels_of(candidate, counts), candidate.energies.shape
    steps = [candidate.dense_cost - cost_of(candidate, counts)]
    if kernels < channels * available:
        steps.append(candidate.kernel_cost)
    return min(steps)


def test_by_hand():
    """Costs 1 a kernel in `a`, 2 in `b`; dense 5 and 7; `c` (dense 2) cannot be cheaper than 1 + 1."""
    network = {
        "a": Candidate(torch.tensor([[[9.0, 1.0], [6.0, 2.0]]]), 1, 5),
        "b": Candidate(torch.tensor([[[8.0, 7.0], [4.0, 0.5]]]), 2, 7),
        "c": Candidate(torch.tensor([[[99.0]]]), 1, 2, fixed_cost=1),
    }
    assert cheapest(network) == 1 + 2 + 2

    def chosen(budget):
        counts = select(network, budget)
        assert counts["c"] is None
        return [None if counts[name] is None else counts[name].tolist() for name in "ab"]

    assert chosen(5) == [[1, 0], [1, 0]]
    assert chosen(6) == [[1, 1], [1, 0]]  # 6 per unit beats 3.5
    assert chosen(7) == [[1, 2], [1, 0]]  # 3.5 does not fit any more; 2 does
    assert chosen(8) == [[1, 1], [2, 0]]  # 3.5 per unit
    assert chosen(9) == [[1, 2], [2, 0]]  # then 2 per unit, and so does `b`: a tie of which only one fits
    assert chosen(14) == [None, None]


@many
@given(networks, budgets)
def test_the_budget_is_met_from_below_with_less_left_over_than_the_next_step(network, budget):
    chosen = select(network, budget)
    assert list(chosen) == list(network)
    spent = total(cost_of, network, chosen)
    assert cheapest(network) <= spent
    if budget < cheapest(network):
        assert spent == cheapest(network)
        return
    assert spent <= budget
    prices = [next_step(network[name], counts) for name, counts in chosen.items()]
    assert all(price is None or budget - spent < price for price in prices)


@many
@given(networks, budgets)
def test_every_group_has_as_many_kernels_and_each_its_own_best(network, budget):
    for name, counts in select(network, budget).items():
        candidate = network[name]
        if counts is None:
            continue
        kernels, rows = kernels_of(candidate, counts), counts.view(candidate.energies.shape[:2])
        assert kernels >= 1
        for energies, row in zip(candidate.energies, rows, strict=True):
            best = float(energies.flatten().sort(descending=True).values[:kernels].sum())
            taken = sum(float(channel[:count].sum()) for channel, count in zip(energies, row.tolist(), strict=True))
            assert taken == best


@many
@given(networks, budgets)
def test_a_converted_layer_is_cheaper_than_dense_and_one_that_cannot_be_stays_dense(network, budget):
    for name, counts in select(network, budget).items():
        candidate = network[name]
        if not worth_a_conversion(candidate):
            assert counts is None
            assert candidate.most < 1
        elif counts is not None:
            assert cost_of(candidate, counts) < candidate.dense_cost
            assert kernels_of(candidate, counts) <= candidate.most


# The last step of `a`, to dense, is worth more than the kernel before it: 16 must not be spent worse than 15.
_STEEP_END = {
    "a": Candidate(torch.tensor([[[6.0, 5.0], [10.0, 6.0]]], dtype=torch.float64), 4, 9),
    "b": Candidate(torch.tensor([[[12.0, 8.0, 3.0]]], dtype=torch.float64), 6, 12),
}


@many
@given(networks, budgets, budgets)
@example(_STEEP_END, 15, 16)
def test_more_budget_never_gives_less_energy(network, first, second):
    less, more = sorted((first, second))
    assert total(energy_of, network, select(network, less)) <= total(energy_of, network, select(network, more))


@many
@given(networks)
def test_without_a_limit_everything_is_dense_and_without_a_budget_one_kernel_is_left(network):
    assert all(counts is None for counts in select(network, 10**6).values())
    for name, counts in select(network, cheapest(network)).items():
        if counts is not None:
            assert kernels_of(network[name], counts) == 1
    assert total(cost_of, network, select(network, cheapest(network))) == cheapest(network)


@many
@given(networks, budgets, st.sampled_from([0.25, 8.0]))
def test_units_do_not_matter(network, budget, scale):
    """Powers of two are exact: the same plan for costs in other units and energies in others."""
    scaled = {
        name: Candidate(c.energies / scale, c.kernel_cost * scale, c.dense_cost * scale, c.fixed_cost * scale)
        for name, c in network.items()
    }
    for ours, theirs in zip(select(network, budget).values(), select(scaled, budget * scale).values(), strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)


@many
@given(candidates())
def test_most_is_the_largest_number_that_is_cheaper_than_dense(candidate):
    available = candidate.energies.shape[1] * candidate.energies.shape[2]
    fitting = [n for n in range(1, available + 1) if candidate.cost(n) < candidate.dense_cost]
    assert max(candidate.most, 0) == max(fitting, default=0)
    assert candidate.cost(3) == candidate.fixed_cost + 3 * candidate.kernel_cost


@many
@given(networks, st.integers(1, 4))
def test_uniform_gives_every_channel_as_many_where_that_is_cheaper(network, kernels):
    for name, counts in uniform(network, kernels).items():
        candidate = network[name]
        groups, channels, available = candidate.energies.shape
        each = min(kernels, available)
        if candidate.fixed_cost + each * channels * candidate.kernel_cost < candidate.dense_cost:
            assert counts.tolist() == [each] * (groups * channels)
        else:
            assert counts is None


@pytest.mark.parametrize("energies", [torch.zeros(1, 2, 2), torch.full((2, 2, 2), 1.0)])
def test_ties_and_silent_layers_are_spent_on_too(energies):
    network = {name: Candidate(energies, 1, 9) for name in "ab"}
    chosen = select(network, 6)
    assert [kernels_of(network[name], counts) for name, counts in chosen.items()] in ([3, 3], [4, 2], [2, 4])


def test_no_layers_no_plan():
    assert select({}, 10) == {}
    assert uniform({}, 2) == {}
    assert cheapest({}) == 0


def test_options_worked_by_hand():
    """Layer a: 8 -> 3 for 1 more, 3 -> 0 for 6 more; layer b: 4 -> 1 for 3 more. Per cost: 5, 1/2 and 1."""
    options = {"a": [Option(1, 8), Option(2, 3), Option(8, 0)], "b": [Option(2, 4), Option(5, 1)]}
    assert choose(options, 3) == {"a": 0, "b": 0}
    assert choose(options, 4) == {"a": 1, "b": 0}
    assert choose(options, 6.9) == {"a": 1, "b": 0}
    assert choose(options, 7) == {"a": 1, "b": 1}
    assert choose(options, 13) == {"a": 2, "b": 1}


def test_an_option_off_the_hull_takes_what_is_left():
    """On the hull there are costs 0 and 10 only; 4 is left, and the option of 3 is better than none."""
    options = {"a": [Option(0, 10), Option(3, 8), Option(10, 0)]}
    assert choose(options, 4) == {"a": 1}
    assert choose(options, 10) == {"a": 2}


some_options = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=5).map(
    lambda pairs: [Option(*pair) for pair in pairs]
)


@many
@given(st.lists(some_options, min_size=1, max_size=4), st.integers(0, 120))
def test_options_keep_the_budget_and_leave_nothing_that_fits(layers, extra):
    options = {str(number): layer for number, layer in enumerate(layers)}
    budget = sum(min(option.cost for option in layer) for layer in layers) + extra
    taken = {name: options[name][index] for name, index in choose(options, budget).items()}
    left = budget - sum(option.cost for option in taken.values())
    assert left >= 0
    for name, layer in options.items():
        here = taken[name]
        assert not any(option.error < here.error and option.cost - here.cost <= left for option in layer)


some_steps = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 30)), min_size=1, max_size=4)


@many
@given(st.lists(some_steps, min_size=1, max_size=3), st.integers(0, 12))
def test_on_the_hull_nothing_better_exists(layers, taken):
    """Layers whose steps (cost, gain) get worse, and a budget that the best steps of all spend exactly."""
    steps = sorted((gain / cost, cost, gain) for layer in layers for cost, gain in layer)[::-1]
    assume(len({ratio for ratio, _, _ in steps}) == len(steps))
    options = {}
    for number, layer in enumerate(layers):
        cost, error = 0, sum(gain for _, gain in layer)
        options[str(number)] = [Option(cost, error)]
        for more, gain in sorted(layer, key=lambda step: -step[1] / step[0]):
            cost, error = cost + more, error - gain
            options[str(number)].append(Option(cost, error))
    budget = sum(cost for _, cost, _ in steps[:taken])
    found = sum(options[name][index].error for name, index in choose(options, budget).items())
    best = min(
        sum(option.error for option in combination)
        for combination in itertools.product(*options.values())
        if sum(option.cost for option in combination) <= budget
    )
    assert found == best == sum(gain for _, _, gain in steps[taken:])
