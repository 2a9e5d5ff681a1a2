"""Results to which several processes add: no row is lost, and one with the same key is replaced."""

import json
import multiprocessing
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import common

ROWS = 20


def key(row):
    return row["method"], row["number"]


def add(folder, method):
    common.RESULTS = folder
    rows = common.Rows("some", key)
    for number in reversed(range(ROWS)):
        rows.add({"method": method, "number": number}, {"model": "net"})


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def test_processes_that_add_at_once_lose_no_row(results):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=add, args=(results, method)) for method in ("a", "b")]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [key(row) for row in common.Rows("some", key).read()] == [(m, n) for m in "ab" for n in range(ROWS)]
    assert json.loads((results / "some.json").read_text())["model"] == "net"


def test_a_row_takes_the_place_of_the_one_with_its_key(results):
    rows = common.Rows("some", key)
    for value in (1, 2):
        rows.add({"method": "a", "number": 0, "value": value}, {})
    assert [row["value"] for row in rows.read()] == [2]


def test_results_that_are_not_there_are_new(results):
    assert common.read_results("none", {"rows": []}) == {"rows": []}
    assert not results.exists()


def test_the_search_of_rate_and_mode_goes_on_while_it_helps():
    made = []

    def row(lr, bn):
        made.append((lr, bn))
        agreement = -abs(lr - 3e-2) - (0.001 if bn == "frozen" else 0)
        return {"lr": lr, "bn": bn, "validation_agreement": agreement}

    assert common.searched(row) == {"lr": 3e-2, "bn": "training", "validation_agreement": 0}
    assert made == [(rate, "training") for rate in (3e-3, 1e-2, 3e-2, 1e-1)] + [(3e-2, "frozen")]
