"""The search for the smallest network within a loss, on curves that are known."""

import math
from types import SimpleNamespace

import pytest
import torch

from dk2pnet.answers import Predictions
from dk2pnet.errors import InputError, TooSmall
from dk2pnet.plan import Budget
from dk2pnet.run.run import Run
from dk2pnet.students.loss_budget import MOST_PROBES, Found, smallest
from dk2pnet.students.probes import Probe

N = 20000


class Known:
    """Students that disagree with the teacher on ``curve(budget)`` percent of the images."""

    def __init__(self, curve, least=0.0):
        self.curve, self.least, self.asked, self.run = curve, least, [], Run()

    def make(self, budget):
        self.asked.append(budget.value)
        if budget.value < self.least:
            raise TooSmall("cannot be reached")
        plan = SimpleNamespace(macs=budget.value, macs_dense=1.0)
        student = SimpleNamespace(at=budget.value, predict=lambda batches, run: self.answers(budget.value))
        return Probe(budget, SimpleNamespace(student=student, plan=plan), None)


@pytest.fixture
def find():
    def run(wanted, known, labels=True, n=N, unit="macs"):
        right = torch.tensor([[1.0, 0.0]]).expand(n, 2)
        y = torch.zeros(n, dtype=torch.int64) if labels else None

        def answers(budget):
            wrong = torch.arange(n) < round(n * known.curve(budget) / 100)
            return Predictions([torch.where(wrong.unsqueeze(1), right.flip(1), right)], y)

        known.answers = answers
        return smallest(Budget.parse(wanted), unit, known, Predictions([right], y), ())

    return run


CURVES = {
    "square": lambda x: 0.2 / x**2 - 0.2,
    "steep": lambda x: 0.05 / x**3 - 0.05,
    "flat, then a cliff": lambda x: 0.1 if x > 0.37 else 40.0,
    "nothing is lost above a half": lambda x: 0.0 if x > 0.5 else 100 * (0.5 - x),
}


@pytest.mark.parametrize("wanted", [0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize(("kind", "unit"), [("drop", "macs"), ("disagree", "latency")])
def test_the_smallest_within_is_found_in_eight_probes(find, curve, wanted, kind, unit):
    known = Known(CURVES[curve])
    found = find(f"{kind}={wanted}", known, labels=kind == "drop", unit=unit)
    assert found.probe.budget.kind == unit
    grid = [number / 1000 for number in range(1, 1001)]
    best = min(x for x in grid if CURVES[curve](x) <= wanted)
    assert isinstance(found, Found)
    assert len(known.asked) == len(set(known.asked)) <= MOST_PROBES
    assert found.estimate.value <= wanted
    assert found.probe.student.at <= best * 1.12
    assert [entry["within"] for entry in found.probes].count(True) >= 1


def test_what_is_returned_was_measured_itself(find):
    known = Known(CURVES["square"])
    found = find("drop=1", known)
    assert found.probe.budget.value in known.asked
    entry = next(entry for entry in found.probes if entry["budget"] == str(found.probe.budget))
    assert entry["value"] == found.estimate.value


def test_budgets_that_no_network_has_bound_the_search(find):
    known = Known(lambda x: 0.01, least=0.61)
    found = find("disagree=1", known, labels=False)
    assert 0.61 <= found.probe.student.at <= 0.65
    assert any("said" in entry for entry in found.probes)


def test_where_all_lose_too_much_it_says_how_much(find):
    with pytest.raises(InputError, match="no network within drop=0.5.*smallest loss that was found is 7"):
        find("drop=0.5", Known(lambda x: 7.0))


def test_too_few_images_are_refused_with_the_number_needed(find):
    with pytest.raises(InputError) as caught:
        find("drop=0.5", Known(lambda x: 0.4), n=500)
    assert "500 images cannot tell a drop of 0.5 points" in str(caught.value)
    needed = int(str(caught.value).split("at least ")[1].split()[0])
    assert needed > max((1.96 / 0.005) ** 2 * 0.004, math.log(0.025) / math.log(0.995), 500)


def test_disagreement_is_not_refused_for_few_images(find):
    assert find("disagree=5", Known(CURVES["square"]), labels=False, n=500).estimate.images == 500
