"""The figures of small runs are those that were recorded (runs.py); a rebuilding of the code changes none."""

import json

import pytest

from goldens.runs import GOLDENS, RUNS, Runs, differences, machine
from graphs import needs_onnx_tuning

TUNES_ONNX = {"onnx", "evaluate-onnx"}
EACH = [pytest.param(name, marks=[needs_onnx_tuning] if name in TUNES_ONNX else []) for name in RUNS]


@pytest.fixture(scope="session")
def goldens():
    return json.loads(GOLDENS.read_text())


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("goldens"))


def test_every_run_is_recorded(goldens):
    assert list(goldens["runs"]) == list(RUNS)


@pytest.mark.parametrize("name", EACH)
def test_no_figure_changes(name, goldens, runs):
    lines = differences(goldens["runs"][name], runs[name], goldens["machine"] == machine())
    told = "" if goldens["machine"] == machine() else f"\nrecorded on {goldens['machine']}, this is {machine()}"
    if lines:
        pytest.fail(f"{len(lines)} figures of {name} differ:\n" + "\n".join(lines) + told, pytrace=False)
