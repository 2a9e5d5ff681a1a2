"""What answers are for, and how far apart two networks' are: from the definitions, on small numbers worked out by
hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dk2pnet.answers import Predictions, predict
from dk2pnet.errors import InputError
from dk2pnet.estimates import output_error
from dk2pnet.options import TASKS
from dk2pnet.tasks import (
    MEASURES,
    accuracy,
    agreement,
    check_task,
    compare,
    divergence,
    figures,
    guess,
    is_uncertain,
    relative_errors,
    squared_error,
)


def of(rows, labels=None, task="classify"):
    return Predictions([torch.tensor(rows)], None if labels is None else torch.tensor(labels), task=task)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- what answers are for ----------------------------------------------------------------------------------------------

N = 40
GUESSED = {
    "logits": (noise(N, 10), "classify"),
    "few logits": (noise(N, 3) + 1, "classify"),
    "probabilities": (noise(N, 5).softmax(1), "classify"),
    "one number": (noise(N, 1), "regress"),
    "a number without an axis": (noise(N), "regress"),
    "places in pixels": (640 * torch.rand(N, 4), "regress"),
    "temperatures": (noise(N, 6) - 40, "regress"),
    "sigmoids": (noise(N, 6).sigmoid(), "multilabel"),
    "directions": (F.normalize(noise(N, 32)), "embed"),
    "features behind a ReLU": (noise(N, 128).relu(), "embed"),
    "small features behind a ReLU": (noise(N, 128).relu() / 100, "embed"),
    "maps": (noise(N, 5, 4, 4), "regress"),
    "maps of probabilities": (noise(N, 5, 4, 4).softmax(1), "dense"),
    "one map": (torch.ones(N, 1, 4, 4), "regress"),
    # of a ResNet-18 whose weights were quantised: -22 to 28, 2.8 standard deviations from zero
    "logits with an offset": (noise(N, 1000) + 2.8, "classify"),
    "logits that are all positive": (noise(N, 1000) + 9, "classify"),
    "few logits with an offset": (noise(N, 5) - 3, "classify"),
    "few samples": (torch.rand(3, 4), "classify"),
}


@pytest.mark.parametrize("name", GUESSED)
def test_values_say_what_answers_are_for(name):
    output, task = GUESSED[name]
    assert guess(Predictions([output])) == task
    check_task(task, Predictions([output]))


def test_several_outputs_and_whole_numbers_are_no_scores():
    assert guess(Predictions([noise(N, 10), noise(N, 10)])) == "regress"
    numbers = Predictions()
    numbers.add([torch.ones(N, 3, dtype=torch.int64).numpy()], N)
    assert guess(numbers) == "regress"


def test_labels_that_are_found_make_a_classifier():
    scores = 5 + torch.rand(N, 4)
    assert guess(Predictions([scores], scores.argmax(1))) == "classify"
    assert guess(Predictions([scores], (scores.argmax(1) + 1) % 4)) == "regress"
    assert guess(Predictions([scores], noise(N))) == "regress"


def test_what_rests_on_the_shape_alone_is_uncertain():
    assert is_uncertain(Predictions([noise(N, 10)]))
    assert not is_uncertain(Predictions([noise(N, 10).softmax(1)]))
    assert not is_uncertain(Predictions([noise(N, 100)]))
    assert not is_uncertain(Predictions([noise(N, 10)], noise(N, 10).argmax(1)))


@pytest.mark.parametrize(
    ("task", "shape"), [("classify", (2, 3, 4, 4)), ("multilabel", (2,)), ("embed", (2, 1)), ("dense", (2, 3))]
)
def test_a_task_that_the_shape_forbids_is_refused(task, shape):
    with pytest.raises(InputError, match=rf"task is '{task}', and the network returns \(1.*expected .*: leave --task"):
        check_task(task, Predictions([torch.zeros(shape)]))


def test_every_task_has_a_measure():
    assert set(MEASURES) == set(TASKS)


# -- classes -----------------------------------------------------------------------------------------------------------


def test_accuracy():
    result = of([[1.0, 2.0, 0.0], [3.0, 1.0, 0.0], [0.0, 0.0, 1.0], [5.0, 6.0, 7.0]], [1, 0, 2, 0])
    assert accuracy(result) == 75.0
    with pytest.raises(InputError, match="no labels"):
        accuracy(of([[1.0, 2.0]]))
    with pytest.raises(InputError, match="labels up to 3.*2 classes"):
        accuracy(of([[1.0, 2.0], [2.0, 1.0]], [0, 3]))
    with pytest.raises(InputError, match="classifier"):
        accuracy(of([[1.0], [2.0]], [0, 0]))


def test_agreement():
    teacher = of([[1.0, 2.0], [3.0, 1.0], [0.0, 1.0]])
    student = of([[0.0, 9.0], [1.0, 3.0], [0.0, 1.0]])
    assert agreement(teacher, student) == pytest.approx(200 / 3)
    assert agreement(teacher, teacher) == 100
    maps = Predictions([torch.zeros(2, 3, 4, 4)], None)
    assert agreement(maps, maps) is None


def test_divergence_of_classifiers():
    teacher, student = of([[0.0, math.log(3)], [0.0, 0.0]]), of([[0.0, 0.0], [0.0, math.log(3)]])
    first = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    second = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert divergence(teacher, student) == pytest.approx((first + second) / 2, rel=1e-5)
    assert divergence(teacher, teacher) == pytest.approx(0, abs=1e-12)
    assert divergence(teacher, of([[math.nan, 0.0], [0.0, 0.0]])) == math.inf
    assert divergence(teacher, of([[math.inf, 0.0], [0.0, 0.0]])) == math.inf


def test_probabilities_are_judged_as_the_scores_they_come_from():
    logits = [noise(N, 4, seed=seed) for seed in (0, 1)]
    plain, soft = (divergence(*(Predictions([f(x)], task="classify") for x in logits)) for f in (torch.clone, soften))
    assert soft == pytest.approx(plain, rel=1e-4)


def soften(logits):
    return logits.softmax(1)


def test_classes_that_are_masked_out_are_not_compared():
    rows, others = [[0.0, math.log(3), -math.inf]], [[0.0, 0.0, -math.inf]]
    wanted = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert divergence(of(rows), of(others)) == pytest.approx(wanted, rel=1e-5)


def test_labels_are_judged_one_by_one_and_agree_all_together():
    """Both of two labels: yes at 3/4 and 1/2 against 1/2 and 1/4; the second sample differs in its second label."""
    teacher = of([[math.log(3), 0.1], [1.0, 2.0]], task="multilabel")
    student = of([[0.0001, 0.1], [1.0, -2.0]], task="multilabel")
    first = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    yes = 1 / (1 + math.exp(-2))
    second = yes * math.log(yes / (1 - yes)) + (1 - yes) * math.log((1 - yes) / yes)
    assert divergence(teacher, student) == pytest.approx((first + second) / 2, rel=1e-3)
    assert agreement(teacher, student) == 50
    soft = [Predictions([each.outputs[0].sigmoid()], task="multilabel") for each in (teacher, student)]
    assert divergence(*soft) == pytest.approx(divergence(teacher, student), rel=1e-5)
    assert agreement(*soft) == 50


def test_dense_scores_are_judged_at_every_position():
    teacher, student = noise(4, 5, 3, 3), noise(4, 5, 3, 3, seed=1)
    rows = [each.movedim(1, -1).reshape(-1, 5) for each in (teacher, student)]
    wanted = [Predictions([each], task="classify") for each in rows]
    found = [Predictions([each], task="dense") for each in (teacher, student)]
    assert divergence(*found) == pytest.approx(divergence(*wanted))
    assert agreement(*found) == pytest.approx(agreement(*wanted))
    assert compare(*found).distance.shape == (4,)


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_errors_are_relative_to_the_energy_about_the_mean():
    """Means 2 and 10; deviations 1, 1, of two samples, so that the energy is 2 * 2 / 1 for what 2 / 2 would be."""
    teacher = Predictions([torch.tensor([[1.0, 10.0], [3.0, 10.0]])], task="regress")
    student = Predictions([torch.tensor([[1.0, 11.0], [3.0, 10.0]])], task="regress")
    assert squared_error(teacher, student) == pytest.approx(1 / 4)
    assert squared_error(teacher, teacher) == 0


def test_who_always_answers_the_mean_loses_about_all():
    t = torch.cat([320 + noise(200, 4), 1000 * torch.ones(200, 1)], 1)
    found = squared_error(Predictions([t], task="regress"), Predictions([t.mean(0).expand_as(t)], task="regress"))
    assert found == pytest.approx(199 / 200, rel=1e-4)


def test_an_output_that_never_changes_is_judged_by_its_energy_and_a_silent_one_by_all():
    constant = Predictions([torch.full((2, 3, 2, 2), 2.0)], task="regress")
    assert squared_error(constant, Predictions([torch.ones(2, 3, 2, 2)], task="regress")) == pytest.approx(1 / 4)
    teacher = Predictions([torch.tensor([[3.0], [5.0]]), torch.zeros(2, 1)], task="regress")
    student = Predictions([torch.tensor([[3.0], [5.0]]), torch.tensor([[1.0], [0.0]])], task="regress")
    assert relative_errors(teacher, student) == {"output 1": 0, "output 2": pytest.approx(1 / 4)}
    assert squared_error(teacher, student) == pytest.approx(1 / 8)


@settings(deadline=None)
@given(st.floats(1e-3, 1e3), st.floats(-1e3, 1e3), st.integers(0, 99))
def test_neither_unit_nor_offset_of_an_output_changes_anything(unit, offset, seed):
    random = torch.Generator().manual_seed(seed)
    boxes, scores, wrong = (torch.randn(40, 3, generator=random, dtype=torch.float64) for _ in range(3))
    found = []
    for scale, shift in ((1.0, 0.0), (unit, unit * offset)):
        ours, theirs = ([(scale * (boxes + add) + shift).numpy(), (scores + 3 * add).numpy()] for add in (0, wrong / 9))
        pair = [Predictions(task="regress") for _ in range(2)]
        for each, outputs in zip(pair, (ours, theirs), strict=True):
            each.add(outputs, 40)
        found.append(relative_errors(*pair))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


class Denoiser(nn.Module):
    def forward(self, x):
        return x + 0.01 * x.roll(1, -1), x.sum((2, 3))


def test_where_an_output_is_nearly_its_input_what_is_added_counts():
    """Whoever gives the input back has lost all that the network does, and not a ten-thousandth."""
    batches = [(x, None) for x in noise(12, 3, 4, 4).split(5)]
    teacher = predict(Denoiser(), batches, task="regress")
    lazy = Predictions(task="regress")
    for x, _ in batches:
        lazy.add([x, x.sum((2, 3))], len(x))
    assert relative_errors(teacher, lazy) == {"output 1": pytest.approx(1, rel=1e-3), "output 2": pytest.approx(0)}


def test_batches_change_nothing():
    t, s = noise(12, 3, 2), noise(12, 3, 2, seed=1)
    whole = [Predictions([each], task="regress") for each in (t, s)]
    parts = [Predictions(task="regress") for _ in range(2)]
    for found, x in zip(parts, (t, s), strict=True):
        for part in x.split([5, 4, 3]):
            found.add([part], len(part))
    assert squared_error(*parts) == pytest.approx(squared_error(*whole))
    torch.testing.assert_close(compare(*parts)[1:], compare(*whole)[1:])


def test_directions_are_judged_at_unit_length():
    t = noise(30, 8)
    teacher = Predictions([t], task="embed")
    assert divergence(teacher, Predictions([torch.rand(30, 1) * t], task="embed")) == pytest.approx(0, abs=1e-9)
    assert divergence(teacher, Predictions([t.roll(1, 0)], task="embed")) > 1


def test_a_mask_is_not_compared_and_another_shape_loses_all():
    teacher = Predictions([torch.tensor([[1.0, -math.inf], [3.0, -math.inf]])], names=["y"], task="regress")
    assert squared_error(teacher, of([[1.0, 7.0], [3.0, -math.inf]])) == 0
    assert squared_error(teacher, of([[1.0], [3.0]])) == 1
    assert squared_error(teacher, of([[math.nan, 0.0], [3.0, 0.0]])) == math.inf


def test_whole_numbers_are_counted():
    pair = [Predictions(names=["y"], task="regress") for _ in range(2)]
    for found, numbers in zip(pair, ([[1, 2], [3, 4]], [[1, 2], [3, 5]]), strict=True):
        found.add([torch.tensor(numbers).numpy()], 2)
    assert squared_error(*pair) == 1 / 4


def test_the_figures_of_the_report():
    """Errors 0 and 4 of two samples, over an energy of 4 for both together."""
    teacher = Predictions([torch.tensor([[1.0], [3.0]])], task="regress")
    found = figures(teacher, Predictions([torch.tensor([[1.0], [5.0]])], task="regress"))
    assert found == {
        "agreement": None,
        "relative_error": pytest.approx(100),
        "relative_errors": {"output": pytest.approx(100)},
        "relative_error_worst": pytest.approx(100 * math.sqrt(2)),
    }


def test_an_output_that_is_empty_has_no_error_and_lowers_nobodys():
    generator = torch.Generator().manual_seed(0)
    maps, boxes = torch.randn(6, 2, 4, 4, generator=generator), torch.zeros(0, 4)
    near = maps + 0.1
    teacher, student = (Predictions([each, boxes], task="regress") for each in (maps, near))
    alone = squared_error(*(Predictions([each], task="regress") for each in (maps, near)))
    assert relative_errors(teacher, student) == {"output 1": pytest.approx(alone)}
    assert squared_error(teacher, student) == pytest.approx(alone)
    assert output_error(teacher, student).value == pytest.approx(alone)
    assert list(figures(teacher, student)["relative_errors"]) == ["output 1"]
    found = Predictions([boxes], task="regress")
    found.add([torch.ones(3, 4)], 6)  # something in one of two batches
    assert not found.is_empty(0)
