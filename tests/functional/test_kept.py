"""What the version before the rebuilding wrote is still read: OUT folders, plan.json and recipe.yaml of both kinds.

``kept/`` holds them; `net.py` there makes the dense network, and is named by whoever opens the folder.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import here, works

from dk2pnet import Plan, load_student
from dk2pnet.deploy.runtimes.onnxruntime import run_onnx, session
from dk2pnet.networks.named import make_network
from dk2pnet.options import VERBS, read_recipe

MODELS = {"small": ["net.py:make", "--weights", "small"], "onnx": ["onnx/model.onnx"]}
KEPT = Path(__file__).parent.parent / "kept"


@pytest.fixture
def kept(tmp_path, monkeypatch):
    shutil.copytree(KEPT, tmp_path / "kept")
    monkeypatch.chdir(tmp_path / "kept")
    return tmp_path / "kept"


def test_a_student_of_before_answers_as_its_file(kept):
    student, plan = load_student("small", factory=lambda: make_network("net.py:make"))
    assert [layer.counts is not None for layer in plan.layers] == [False, False, True]
    x = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = student(x).numpy()
    np.testing.assert_allclose(found, run_onnx(session("small/model.onnx"), x)[0], rtol=1e-4, atol=1e-5)


def test_both_are_evaluated_and_compressed_again(kept):
    for name, model in MODELS.items():
        answer = works(here, "evaluate", "--model", *model, "--data", "digits", cwd=kept)
        assert float(answer.out.partition("accuracy ")[2].split()[0]) > 50
        options = ["--data", "digits", "--tune", 0, "--calibration-images", 60, "--budget", "macs=0.95", "--first"]
        works(here, "compress", "--model", *model, *options, "--out", f"again-{name}", cwd=kept)


@pytest.mark.parametrize("name", ["small", "onnx"])
def test_recipes_are_read(kept, name):
    found = read_recipe(f"{name}/recipe.yaml", "compress")
    assert found["budget"] == "macs=0.7"
    names = {each.name for each in VERBS["compress"].arguments}
    VERBS["compress"].options(**{key: value for key, value in found.items() if key not in names})
    more = ["--model", *MODELS[name], "--tune", 0, "--calibration-images", 60, "--budget", "macs=0.95", "--first"]
    works(here, "compress", "--recipe", f"{name}/recipe.yaml", *more, "--out", "again", cwd=kept)
    assert Plan.load(kept / "again" / "plan.json").budget == "macs=0.95"
