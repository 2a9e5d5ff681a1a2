"""The search for a recipe on distances that are known."""

import math

import pytest

from dk2pnet.training.recipe import Recipe, choose, steps_beside_trials, trial_steps


def searched(best, first=None):
    """What is chosen where the distance is that of the rate's logarithm from `best`, and frozen batch norm costs 1."""
    tried = []

    def trial(recipe):
        tried.append(recipe)
        return abs(math.log(recipe.rate / best)) + (recipe.batch_norm == "frozen")

    found, notes = choose(first or [Recipe(1e-2, "training"), Recipe(1e-2, "frozen")], trial)
    assert [note["rate"] for note in notes] == [recipe.rate for recipe in tried]
    return found, tried


@pytest.mark.parametrize(
    ("best", "found", "trials"), [(1e-2, 1e-2, 4), (3e-2, 3e-2, 4), (1, 9e-2, 4), (3e-3, 1e-2 / 3, 5)]
)
def test_the_rate_is_raised_while_that_helps_and_lowered_if_it_did_not(best, found, trials):
    recipe, tried = searched(best)
    assert recipe.rate == pytest.approx(found)
    assert recipe.batch_norm == "training"
    assert len(tried) == trials


def test_the_best_of_the_first_goes_on():
    recipe, _ = searched(1e-2, [Recipe(1e-2, "frozen"), Recipe(2e-2, "training")])
    assert recipe.batch_norm == "training"


def test_what_is_not_finite_is_never_chosen():
    recipes = [Recipe(1.0, "training"), Recipe(1e-3, "frozen")]
    found, _ = choose(recipes, lambda recipe: math.inf if recipe.rate > 2e-3 else 1.0)
    assert found == recipes[1]


def test_short_runs_have_no_trials_and_long_ones_share_a_fixed_part():
    assert [trial_steps(steps) for steps in (1, 150, 151, 640, 4000)] == [0, 0, 16, 16, 100]


def test_the_steps_of_a_time_are_shared_with_the_trials():
    assert [steps_beside_trials(steps) for steps in (40, 150, 200, 231, 4000)] == [40, 150, 150, 151, 3500]
