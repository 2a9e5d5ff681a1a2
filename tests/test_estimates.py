"""Losses and their intervals, worked out by hand, and how often the intervals hold."""

import math

import pytest
import torch

from dk2pnet.answers import Predictions
from dk2pnet.errors import InputError
from dk2pnet.estimates import accuracy_drop, disagreement, estimate, output_error


def answers(right, labels=True):
    """Two classes; every image's label is 0 and `right` says who says so."""
    scores = torch.tensor([[1.0, 0.0] if each else [0.0, 1.0] for each in right])
    return Predictions([scores], torch.zeros(len(right), dtype=torch.int64) if labels else None)


def pair(only_teacher, only_student, both, neither=0):
    teacher = [True] * only_teacher + [False] * only_student + [True] * both + [False] * neither
    student = [False] * only_teacher + [True] * only_student + [True] * both + [False] * neither
    return answers(teacher), answers(student)


def test_a_drop_is_what_only_the_teacher_gets_right_less_what_only_the_student_does():
    found = accuracy_drop(*pair(40, 10, 940, 10))
    error = math.sqrt((0.05 - 0.03**2) / 1000)
    assert found.value == pytest.approx(3)
    assert found.low == pytest.approx(3 - 196 * error)
    assert found.high == pytest.approx(3 + 196 * error)
    assert found.images == 1000
    assert found.discordant == pytest.approx(0.05)
    assert found.half_width == pytest.approx(196 * error)


def test_the_output_error_of_one_number_per_image_is_that_of_a_row_of_one():
    teacher, student = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 2.0])
    flat = output_error(Predictions([teacher], None), Predictions([student], None))
    assert flat == output_error(Predictions([teacher[:, None]], None), Predictions([student[:, None]], None))
    assert flat.value == pytest.approx(1 / 3)  # 2 about the mean, for 3 samples and not 2


def test_the_images_needed_are_those_of_the_formula():
    found = accuracy_drop(*pair(40, 10, 950))
    assert found.images_needed(1.0) == math.ceil(1.96**2 / 0.01**2 * 0.05)


def test_a_few_discordant_images_take_the_exact_interval():
    """Clopper-Pearson of 2 in 100 is (0.2431, 7.0384) %, of 0 in 100 (0, 3.6217) %."""
    found = accuracy_drop(*pair(2, 0, 98))
    assert found.value == pytest.approx(2)
    assert found.low == pytest.approx(0.2431 - 3.6217, abs=1e-3)
    assert found.high == pytest.approx(7.0384, abs=1e-3)


def test_no_discordant_image_is_not_certainty():
    found = accuracy_drop(*pair(0, 0, 100))
    assert found.value == 0
    assert found.high == pytest.approx(100 * (1 - 0.025 ** (1 / 100)))
    assert found.low == -found.high
    needed = found.images_needed(1.0)
    assert accuracy_drop(*pair(0, 0, needed)).half_width <= 1.0 < accuracy_drop(*pair(0, 0, needed - 1)).half_width


def test_the_student_may_be_better():
    assert accuracy_drop(*pair(10, 40, 950)).value == pytest.approx(-3)


def test_disagreement_has_the_wilson_interval():
    teacher, student = pair(4, 6, 490)
    found = disagreement(teacher, student)
    p, n, z = 0.02, 500, 1.959964
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    reach = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert found.value == pytest.approx(2)
    assert (found.low, found.high) == pytest.approx((100 * (centre - reach), 100 * (centre + reach)), rel=1e-4)


def test_the_error_is_that_of_the_output_that_loses_most():
    """The first: 1 of 4; the second: 1 of 16."""
    first, second = torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0], [6.0]])
    teacher = Predictions([first, second], task="regress")
    student = Predictions([first + torch.tensor([[1.0], [0.0]]), second + torch.tensor([[0.0], [1.0]])], task="regress")
    assert output_error(teacher, student).value == pytest.approx(1 / 4)
    assert output_error(teacher, teacher).value == 0


def test_disagreement_of_labels_and_of_positions():
    teacher, student = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0], [1.0, -1.0]])
    found = disagreement(*(Predictions([each], task="multilabel") for each in (teacher, student)))
    assert (found.value, found.images) == (50, 2)
    maps = torch.randn(100, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    other = maps.clone()
    other[:50] = other[:50].flip(1)  # all but the middle class' positions
    found = disagreement(*(Predictions([each], task="dense") for each in (maps, other)))
    share = float((maps[:50].argmax(1) != 1).double().mean()) / 2
    assert found.value == pytest.approx(100 * share)
    assert found.low < found.value < found.high
    assert found.half_width > 3, "images differ from each other by more than positions do"


@pytest.mark.parametrize("n", [30, 100])
def test_intervals_of_few_discordant_images_hold(n):
    generator = torch.Generator().manual_seed(1)
    misses = 0
    for _ in range(300):
        draws = torch.rand(n, generator=generator)
        only_teacher, only_student = draws < 0.06, (draws >= 0.06) & (draws < 0.08)
        found = accuracy_drop(answers((~only_student).tolist()), answers((~only_teacher).tolist()))
        misses += not found.low <= 4.0 <= found.high
    assert misses <= 15


@pytest.mark.parametrize("kind", ["drop", "disagree", "error"])
def test_intervals_hold_about_as_often_as_they_say(kind):
    """300 draws of 400 images each: a 95 % interval misses about 15 of them."""
    generator = torch.Generator().manual_seed(0)
    misses = 0
    for _ in range(300):
        if kind == "error":
            t = torch.randn(400, 3, generator=generator)
            noise = 0.1 * torch.randn(400, 3, generator=generator) * torch.rand(400, 1, generator=generator)
            found = estimate(kind, Predictions([t], None), Predictions([t + noise], None))
            truth = 0.01 / 3  # the means are those of noise, about 0
        else:
            draws = torch.rand(400, generator=generator)
            only_teacher, only_student = draws < 0.08, (draws >= 0.08) & (draws < 0.12)
            found = estimate(kind, answers((~only_student).tolist()), answers((~only_teacher).tolist()))
            truth = 4.0 if kind == "drop" else 12.0
        misses += not found.low <= truth <= found.high
    assert 2 <= misses <= 32


def test_what_cannot_be_estimated_is_said():
    with pytest.raises(InputError, match="labelled"):
        accuracy_drop(answers([True], labels=False), answers([True], labels=False))
    maps = Predictions([torch.zeros(2, 3, 4, 4)], torch.zeros(2, dtype=torch.int64))
    for kind in ("drop", "disagree"):
        with pytest.raises(InputError, match="error=0.02"):
            estimate(kind, maps, maps)
