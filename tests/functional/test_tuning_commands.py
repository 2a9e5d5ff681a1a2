"""Tuning, budgets in points and `explore`, as a user runs them."""

import json
import re

import pytest
import torch
import yaml
from command_line import FILES, error_of, figures, here, noise, snapshot, teach, works
from PIL import Image
from safetensors.torch import load_file
from test_training_commands import kill_when, start

BASE = ["--model", "teacher", "--data", "digits"]
QUICK = ["--tune", 0, "--no-rebuild", "--calibration-images", 100]  # where any student will do


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a trained network, teacher/."""
    folder = tmp_path_factory.mktemp("tuning")
    teach(folder)
    return folder


def test_compress_tunes_by_itself_and_says_so(place):
    answer = works(here, "compress", *BASE, "--budget", "macs=0.3", "--out", "tuned", cwd=place)
    metrics = figures(place / "tuned")
    assert metrics["tuning_steps"] == 150
    tuning = next(each for each in metrics["decisions"] if each["what"] == "tuning")
    assert re.search(r"tuning: KL\(teacher \|\| student\) .* (kept|not kept)", answer.out)
    assert [stage["name"] for stage in metrics["stages"]][2:] == ["tuned"] * tuning["kept"]
    assert yaml.safe_load((place / "tuned/recipe.yaml").read_text())["tune"] == 150
    assert {path.name for path in (place / "tuned").iterdir()} == FILES | {"tuning.jsonl", "tensorboard"}
    assert not list(place.glob("*.unfinished"))


def test_a_drop_is_decided_on_a_part_of_the_test_split(place):
    options = ["--budget", "drop=8", "--holdout-split", "test[:60%]", "--tune", 20]
    answer = works(here, "compress", *BASE, *options, "--out", "drop", cwd=place)
    metrics = figures(place / "drop")
    decided = metrics["decided"]
    assert decided["value"] <= 8
    assert (decided["images"], decided["confirmed"]["images"]) == (215, 144)
    assert metrics["run"]["images"]["test"] == 144
    assert "by test[:60%]" in answer.out
    assert str(decided["probes"][0]["budget"]) in answer.out
    page = (place / "drop/report.html").read_text()
    assert "The smallest within the budget" in page
    works(here, "compress", "--recipe", "drop/recipe.yaml", "--out", "drop-again", cwd=place)
    again = figures(place / "drop-again")
    assert again["decided"]["probes"] == decided["probes"]
    one, other = (load_file(place / name / "model.safetensors") for name in ("drop", "drop-again"))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_foreign_weights_on_the_validation_tenth_are_told_of(place):
    foreign = ["--model", "lenet", "--weights", "teacher/model.safetensors", "--data", "digits"]
    plan = json.loads((place / "teacher/plan.json").read_text())["normalization"]
    norm = f"{plan['mean'][0]}/{plan['std'][0]}"
    options = ["--normalize", norm, "--budget", "drop=15", *QUICK]
    answer = works(here, "compress", *foreign, *options, "--out", "foreign", cwd=place)
    assert "which a network trained elsewhere has usually been trained on" in answer.out


def test_explore_prints_the_table_and_writes_the_page(place):
    options = ["--budget", "macs=0.6", "--budget", "macs=0.35", "--tune", 10, "--threads", 1]
    answer = works(here, "explore", *BASE, *options, "--out", "curve", cwd=place)
    metrics = figures(place / "curve")
    assert {path.name for path in (place / "curve").iterdir()} == {"metrics.json", "report.html", "recipe.yaml"}
    assert metrics["decided_by"] == "the validation tenth of the training split"
    assert "test" not in metrics["run"]["images"]
    for point in metrics["points"]:
        assert point["budget"] in answer.out
        assert point["latency"]["ratio"] > 0
    page = (place / "curve/report.html").read_text()
    assert page.count("<svg") == 1
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", page)
    for point in metrics["points"]:
        assert point["command"] in page
    made = metrics["points"][0]["command"].split()[1:]
    works(here, *made, cwd=place)
    out = place / made[-1]
    assert figures(out)["student"]["macs"] == metrics["points"][0]["macs"]
    works(here, "explore", "--recipe", "curve/recipe.yaml", "--out", "curve", "--overwrite", cwd=place)
    assert [point["tuned"] for point in figures(place / "curve")["points"]] == [p["tuned"] for p in metrics["points"]]


def test_a_killed_explore_goes_on_after_the_points_that_are_done(place):
    command = ["explore", *BASE, "--budget", "macs=0.6", "--budget", "macs=0.35", "--tune", 10, "--threads", 1]
    command += ["--no-rebuild"]
    process = start(*command, "--out", "stopped", cwd=place)
    done = place / "stopped.unfinished/probes/macs=0.6/point.json"
    assert kill_when(process, done.exists)
    first = json.loads(done.read_text())["row"]
    works(here, *command, "--out", "stopped", cwd=place)
    found = figures(place / "stopped")["points"]
    assert [point["budget"] for point in found] == ["macs=0.6", "macs=0.35"]
    assert first["latency"] == found[0]["latency"]  # which no second measurement would give again
    assert not (place / "stopped.unfinished").exists()


BAD = {
    "not a number of steps": (["compress", *BASE, "--tune", "long"], ["'long'", "2m"]),
    "tuning without images": (["compress", "--model", "teacher", "--criterion", "weight", "--tune", 5], ["no images"]),
    "too little time": (["compress", *BASE, "--tune", "0.0001s"], ["one step takes"]),
    "unknown augmentation": (["compress", *BASE, "--augment", "wild"], ["wild", "natural"]),
    "drop of nothing": (["compress", *BASE, "--budget", "drop=0"], ["drop=0", "drop=0.5"]),
    "drop and epochs": (["compress", *BASE, "--budget", "drop=1", "--epochs", 1], ["--epochs"]),
    "holdout without points": (["compress", *BASE, "--holdout-split", "test"], ["budget in points"]),
    "holdout of no split": (["compress", *BASE, "--budget", "drop=9", "--holdout-split", "dev[:9]"], ["train or test"]),
    "holdout folder": (["compress", *BASE, "--budget", "drop=9", "--holdout", "./none"], ["none", "exist"]),
    "images too few": (["compress", *BASE, *QUICK, "--budget", "drop=0.2"], ["143 images cannot tell"]),
    "points for explore": (["explore", *BASE, "--budget", "drop=1"], ["drop=1 is a loss"]),
    "explore without images": (["explore", "--model", "teacher"], ["--data"]),
    "a point that cannot be": (["explore", *BASE, "--budget", "macs=0.01"], ["cannot be reached"]),
    "epochs of an ONNX file": (
        ["compress", "--model", "teacher/model.onnx", "--data", "digits", "--epochs", 1],
        ["--epochs", ".onnx", "not trained"],
    ),
    "tuning of an ONNX file without images": (
        ["compress", "--model", "teacher/model.onnx", "--criterion", "weight", "--tune", 5, "--input-size", 32],
        ["--tune 5", "no images", "--tune 0"],
    ),
    "a time that is none for an ONNX file": (
        ["compress", "--model", "teacher/model.onnx", "--data", "digits", "--tune", "soon"],
        ["soon", "150", "2m"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing(place, name):
    args, words = BAD[name]
    before = snapshot(place)
    message = error_of(here(*args, "--out", "never", cwd=place))
    for word in words:
        assert word in message, message
    assert snapshot(place) == before


def test_somebody_elses_images_calibrate_with_and_without_our_own(place):
    noise(place / "others", 130, (12, 9, 3))
    options = ["--calibration-data", "./others", "--budget", "macs=0.5", "--tune", 3]
    works(here, "compress", *BASE, *options, "--out", "both", cwd=place)
    images = figures(place / "both")["run"]["images"]
    assert images == {"calibration": 93, "held out": 24, "test": 359}
    works(here, "compress", "--model", "teacher", *options, "--out", "blind", cwd=place)
    found = figures(place / "blind")
    assert found["run"]["images"] == {"calibration": 93, "held out": 24}
    assert found["student"]["accuracy"] is None
    message = error_of(here("compress", "--model", "teacher", *options, "--epochs", 1, "--out", "no", cwd=place))
    assert "--data" in message


def test_folders_of_somebody_elses_images_are_no_classes_of_the_network(place):
    noise(place / "greys", 24, (8, 8))
    named = ["--model", "lenet", "--weights", "teacher/model.safetensors", "--normalize", "0.5/0.5"]
    works(
        here, "compress", *named, "--calibration-data", "./greys", "--budget", "macs=0.5", "--out", "named", cwd=place
    )


def test_images_to_test_with_are_enough_where_others_calibrate(place):
    """As ImageNet's validation images: no training split, and labels that only report."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for number in range(60):
        folder = place / "marked/val" / str(digits.target[number])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[number] * 15.9).astype("uint8")).save(folder / f"{number}.png")
    noise(place / "unmarked", 130, (8, 8))
    options = [
        "--model",
        "teacher",
        "--data",
        "./marked",
        "--calibration-data",
        "./unmarked",
        "--budget",
        "macs=0.5",
        "--tune",
        3,
    ]
    works(here, "compress", *options, "--out", "validated", cwd=place)
    found = figures(place / "validated")
    assert found["run"]["images"] == {"calibration": 93, "held out": 24, "test": 60}
    assert found["teacher"]["accuracy"] > 50
    message = error_of(here("compress", *options, "--epochs", 1, "--out", "no", cwd=place))
    assert "training split" in message
