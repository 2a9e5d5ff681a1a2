"""The search for a recipe on distances that are known."""

import math

import pytest

from dk2pnet.training.recipe import Recipe, choose, steps_beside_trials, trial_steps


def searched(best, first=None, start=math.inf):
    """What is chosen where the distance is that of the rate's logarithm from `best`, and frozen batch norm costs 1."""
    tried = []

    def trial(recipe):
        tried.append(recipe)
        return abs(math.log(recipe.rate / best)) + (recipe.batch_norm == "frozen")

    found, notes = choose(first or [Recipe(1e-2, "training"), Recipe(1e-2, "frozen")], trial, start)
    assert [note["rate"] for note in notes] == [recipe.rate for recipe in tried]
    return found, tried


@pytest.mark.parametrize(
    ("best", "start", "found", "trials"),
    [
        (1e-2, 9, 1e-2, 3),
        (3e-2, 9, 3e-2, 4),
        (1, 9, 9e-2, 4),
        (1e-3, 9, 1e-2, 3),  # it gains: of so few steps a lower rate would always make more
        (3e-3, 1, 1e-2 / 3, 3),  # it loses; a third of the rate gains
        (1e-6, 1, 1e-2 / 9, 4),
        (3e-3, 1.15, 1e-2, 2),  # by less than a tenth
    ],
)
def test_the_rate_is_raised_where_the_first_gains_and_else_lowered(best, start, found, trials):
    recipe, tried = searched(best, start=start)
    assert recipe.rate == pytest.approx(found)
    assert recipe.batch_norm == "training"
    assert len(tried) == trials


def test_the_best_of_the_first_goes_on():
    recipe, _ = searched(1e-2, [Recipe(1e-2, "frozen"), Recipe(2e-2, "training")])
    assert recipe.batch_norm == "training"


@pytest.mark.parametrize(("farther", "rate"), [(1.05, 0.03), (1.2, 0.01)])
def test_a_higher_rate_may_be_a_little_farther_off(farther, rate):
    distances = (1.0, farther, 3.0)
    found, _ = choose([Recipe(0.01, "frozen")], lambda recipe: distances[round(math.log(recipe.rate / 0.01, 3))], 2.0)
    assert found.rate == pytest.approx(rate)


@pytest.mark.parametrize(("harm", "tried"), [(1.1, 2), (1.2, 3)])
def test_a_rate_is_lowered_until_it_does_little_harm(harm, tried):
    distances = [2.0, harm, 1.0]
    found, notes = choose([Recipe(0.09, "frozen")], lambda recipe: distances[round(math.log(0.09 / recipe.rate, 3))], 1)
    assert len(notes) == tried
    assert found.rate == pytest.approx(notes[-1]["rate"])


def test_a_higher_rate_has_to_gain_on_the_start():
    found, _ = choose([Recipe(0.01, "frozen")], lambda recipe: 1.0 if recipe.rate < 0.02 else 1.05, 1.02)
    assert found.rate == 0.01


def test_what_is_not_finite_is_never_chosen():
    recipes = [Recipe(1.0, "training"), Recipe(1e-3, "frozen")]
    found, _ = choose(recipes, lambda recipe: math.inf if recipe.rate > 2e-3 else 1.0, 2.0)
    assert found == recipes[1]


def test_short_runs_have_no_trials_and_long_ones_share_a_fixed_part():
    assert [trial_steps(steps) for steps in (1, 150, 151, 640, 4000)] == [0, 0, 16, 16, 100]


def test_the_steps_of_a_time_are_shared_with_the_trials():
    assert [steps_beside_trials(steps) for steps in (40, 150, 200, 231, 4000)] == [40, 150, 150, 167, 3600]
