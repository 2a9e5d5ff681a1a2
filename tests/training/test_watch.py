"""Which weights a watch keeps, and when it ends a run."""

import pytest
import torch
from torch import nn

from dk2pnet.training.watch import Watch


def watched(distances, folder=None, steps=100, start=1.0):
    """A model whose weight is the number of steps done, and what the watch answered after each."""
    model, given = nn.Linear(1, 1, bias=False), iter([start, *distances])
    watch = Watch(lambda _: next(given), model, steps, folder)
    answers = []
    for step in range(1, steps + 1):
        with torch.no_grad():
            model.weight.fill_(step)
        answers.append(watch(model, step, steps))
        if not answers[-1]:
            break
    watch.put_best(model)
    return float(model.weight.detach()), answers


@pytest.mark.parametrize(
    ("distances", "kept"),
    [([0.9, 0.5, 0.6, 0.7], 75), ([0.9, 0.8, 0.7, 0.6], 100), ([0.5, 0.5, 0.5, 0.5], 100), ([0.1, 0.5, 0.4, 0.3], 50)],
)
def test_the_best_of_four_looks_is_kept_and_of_equal_ones_the_last(distances, kept):
    assert watched(distances) == (kept, [True] * 100)


def test_what_is_twice_as_far_as_the_start_is_ended():
    weight, answers = watched([1.9, 2.1])
    assert weight == 50
    assert answers == [True] * 74 + [False]


def test_short_runs_are_looked_at_when_they_end():
    assert watched([3.0], steps=49) == (49, [True] * 49)


def test_a_run_that_goes_on_knows_the_best_of_before(tmp_path):
    watched([0.9, 0.2, 0.5, 0.6], tmp_path)
    model = nn.Linear(1, 1, bias=False)
    again = Watch(lambda _: 0.4, model, 100, tmp_path)
    again(model, 90, 100)
    again.put_best(model)
    assert float(model.weight.detach()) == 75
