"""The paper's experiment as a user repeats it: quick, killed and repeated, added to, refused."""

import json

import datasets
import numpy as np
import pytest
from command_line import FILES, LOGS, error_of, figures, here, snapshot, works
from PIL import Image
from test_training_commands import kill_when, start, weights

METHODS = ("labels", "kd", "fitnets", "euclidean+kd", "at", "kp", "kp+kd", "kp-falling+kd")
QUICK = ["reproduce", "digits", "--quick", "--threads", 1]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with quick/, the whole experiment in small."""
    folder = tmp_path_factory.mktemp("reproduce")
    answer = works(here, *QUICK, "--out", "quick", cwd=folder)
    (folder / "said.txt").write_text(answer.out)
    return folder


def test_every_method_is_in_the_table_and_the_figure_is_there(place):
    results = json.loads((place / "quick/results.json").read_text())
    assert [row["method"] for row in results["rows"]] == list(METHODS)
    assert all(row["seeds"] == 1 for row in results["rows"])
    assert results["continue"] == []
    table = (place / "quick/results.md").read_text()
    for row in results["rows"]:
        out = figures(place / f"quick/{row['method']}-0")
        assert row["accuracy"] == out["network"]["accuracy"]
        assert f"{row['accuracy']:.2f}" in table
    assert "Written to quick: results.md, results.json, figure.svg" in (place / "said.txt").read_text()
    assert (place / "quick/figure.svg").stat().st_size > 1000
    kept = FILES - {"report.html"} | LOGS
    assert {path.name for path in (place / "quick/kp+kd-0").iterdir()} == kept


def test_a_student_of_it_is_an_ordinary_network(place):
    answer = works(here, "evaluate", "--model", "quick/kd-0/model.onnx", "--data", "digits", cwd=place)
    assert f"accuracy {figures(place / 'quick/kd-0')['network']['accuracy']:.2f} %" in answer.out
    again = works(here, "evaluate", "--model", "quick/kd-0", "--data", "digits", cwd=place)
    assert "parameters 3,482" in again.out


def test_the_recipe_of_a_run_repeats_it(place):
    works(here, "train", "--recipe", "quick/kp-falling+kd-0/recipe.yaml", "--out", "again", cwd=place)
    assert weights(place / "again") == weights(place / "quick/kp-falling+kd-0")


def test_done_runs_are_not_made_again(place):
    before = snapshot(place / "quick/kd-0")
    answer = works(here, *QUICK, "--out", "quick", cwd=place)
    assert "training" not in answer.err
    assert snapshot(place / "quick/kd-0") == before


def test_killed_and_repeated_it_ends_as_if_nothing_had_happened(place):
    command = [*QUICK, "--method", "kd", "--checkpoint-every", 0, "--out", "shaken"]
    process = start(*command, cwd=place)
    assert kill_when(process, lambda: any((place / "shaken").glob("kd-0.unfinished/checkpoints/step-*.safetensors")))
    assert not (place / "shaken/kd-0").exists()
    answer = works(here, *command, cwd=place)
    assert "going on from" in answer.err
    shaken, calm = (figures(place / name / "kd-0")["network"] for name in ("shaken", "quick"))
    assert shaken == calm
    assert not list((place / "shaken").glob("*.unfinished"))


def test_svhn_in_the_layout_of_the_hub(tmp_path):
    """Its folder per configuration, three splits, and images as files; random ones, so the figures mean nothing."""
    folder = tmp_path / "svhn" / "cropped_digits"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for split, count in (("train", 60), ("test", 30), ("extra", 20)):
        images = [Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(count)]
        table = datasets.Dataset.from_dict({"image": images, "label": [row % 10 for row in range(count)]})
        table = table.cast_column("image", datasets.Image())
        table = table.cast_column("label", datasets.ClassLabel(names=list("0123456789")))
        table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    command = ["reproduce", "svhn", "--quick", "--threads", 1, "--method", "kp+kd", "--data-dir", tmp_path]
    works(here, *command, "--out", "out", cwd=tmp_path)
    assert "FitNets' student" in (tmp_path / "out/results.md").read_text()
    assert figures(tmp_path / "out/kp+kd-0")["run"]["images"] == {"train": 54, "validation": 6, "test": 30}


REFUSED = {
    "a method that there is not": (["--method", "magic"], ["'magic'", "kp+kd"]),
    "another schedule in the same folder": (["--epochs", 7, "--out", "quick"], ["epochs 2", "7", "--out"]),
    "no epochs": (["--epochs", 0], ["epochs is 0", "1 or more"]),
    "a student that there is not": (["--student", "dk2pnet-9x9"], ["dk2pnet-9x9", "8, 14, 20"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_sentence_and_nothing_is_lost(case, place):
    options, words = REFUSED[case]
    before = snapshot(place / "quick")
    answer = here(*QUICK, "--out", "never", *options, cwd=place)
    for word in words:
        assert str(word) in error_of(answer)
    assert snapshot(place / "quick") == before
    assert not (place / "never").exists()
