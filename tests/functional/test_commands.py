"""The commands as a user runs them: what they write, what they say, and what they leave behind when they refuse.

Commands that must work from a bare shell run in a process of their own; the rest runs `main` in this one, which spares
the seconds that importing PyTorch takes.
"""

import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import yaml
from command_line import FILES, LOGS, accuracy_in, error_of, figures, here, shell, snapshot, teach, works
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import nn

from dk2pnet import cli, load_student
from dk2pnet.answers import predict
from dk2pnet.data import Normalization, load, split_training
from dk2pnet.errors import InputError
from dk2pnet.options import TrainOptions
from dk2pnet.tasks import accuracy
from dk2pnet.training.trainer import TrainingOptions

HALF = ["compress", "--model", "teacher", "--data", "digits", "--tune", "0", "--budget", "macs=0.5"]
BY_NAME = ["--model", "lenet", "--data", "digits", "--normalize", "0.5/0.5"]


def write_digits(folder, count, labelled=True, start=0):
    digits = load_digits()
    for number in range(start, start + count):
        place = folder / f"digit{digits.target[number]}" if labelled else folder
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.clip(digits.images[number] * 15.9375, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(place / f"{number}.png")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a trained network, teacher/."""
    folder = tmp_path_factory.mktemp("commands")
    assert "test accuracy" in teach(folder, shell).out
    return folder


@pytest.fixture(scope="module")
def half(place):
    """The teacher at half its MACs, by the commands of the README."""
    answer = works(shell, *HALF, "--criterion", "loss", "--out", "half", cwd=place)
    return place / "half", answer


# -- what an option reaches --------------------------------------------------------------------------------------------


def reached(room, command, *options, cwd, monkeypatch):
    """The options that `command` hands on."""
    seen = {}

    def spy(*_, options, **given):
        seen.update(asdict(options))
        raise InputError("seen")

    monkeypatch.setattr(f"dk2pnet.commands.{room}", spy)
    assert error_of(here(command, "--model", "lenet", "--out", "out", *options, cwd=cwd)) == "Error: seen"
    return seen


def test_options_of_train_reach_the_training(tmp_path, monkeypatch):
    wanted = {"weight_decay": 0.25, "alpha": 0.1, "tau": 2.0, "kp_tau": 3.0, "beta": 5.0, "beta_end": 0.5, "seed": 7}
    wanted |= {"epochs": 9, "batch_size": 11, "method": "at", "precision": "bf16", "checkpoint_every": 5.0}
    given = [part for name, value in wanted.items() for part in (f"--{name.replace('_', '-')}", value)]
    flags = ["--pre-regressor", "--compile", "--lr", 0.3, "--hint", "a=b", "--hint", "c"]
    more = ["--teacher", "resnet20", "--teacher-weights", "w", "--classes", 4, "--images", 50, "--augment", "none"]
    seen = reached(
        "train.train", "train", "--data", "digits", *given, *flags, *more, cwd=tmp_path, monkeypatch=monkeypatch
    )
    wanted |= {"pre_regressor": True, "compile": True, "learning_rate": 0.3, "hints": ("a=b", "c")}
    wanted |= {"teacher": "resnet20", "teacher_weights": "w", "classes": 4, "images": 50, "augment": "none"}
    assert {name: seen[name] for name in wanted} == wanted
    handed = TrainingOptions.of(TrainOptions(**{name: seen[name] for name in asdict(TrainOptions())}))
    for name in ("epochs", "learning_rate", "weight_decay", "hints", "alpha", "kp_tau", "beta_end", "compile"):
        assert getattr(handed, name) == wanted[name]


SHARED = {"memory": 1.5, "rebuild": False, "seed": 7, "classes": 4, "precision": "bf16", "calibration_images": 70}


@pytest.mark.parametrize("command", ["compress", "explore"])
def test_options_of_compress_and_explore_reach_them(command, tmp_path, monkeypatch):
    given = ["--memory", 1.5, "--no-rebuild", "--seed", 7, "--classes", 4, "--precision", "bf16"]
    given += ["--calibration-images", 70, "--checkpoint-every", 5, "--first", "--keep", "a", "--calibration-data", "b"]
    own = {"points": 3}
    if command == "compress":
        own = {"method": "kd", "learning_rate": 0.3, "batch_size": 11, "compile": True, "hints": ("a=b",), "epochs": 2}
        given += ["--method", "kd", "--lr", 0.3, "--batch-size", 11, "--compile", "--hint", "a=b", "--epochs", 2]
    else:
        given += ["--points", 3]
    seen = reached(f"{command}.{command}", command, *given, cwd=tmp_path, monkeypatch=monkeypatch)
    wanted = SHARED | own | {"checkpoint_every": 5.0, "first": True, "keep": ("a",), "calibration_data": "b"}
    assert {name: seen[name] for name in wanted} == wanted


# -- what a run writes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "said"), [("compres", "Did you mean 'compress'"), ("compress --budgett macs=0.4", "--budget")]
)
def test_a_spelling_mistake_is_answered_before_pytorch_is_loaded(line, said):
    code = (
        "import sys, dk2pnet.cli\n"
        "try: dk2pnet.cli.main()\n"
        "finally: print([name for name in ('torch', 'numpy', 'onnx', 'PIL') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *line.split()], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (2, "[]")
    assert said in done.stderr


def test_in_a_file_progress_is_lines_with_the_time_left(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(cli.time, "monotonic", lambda: now[0])
    lines = cli._Lines()
    for what, at, done in (("solving", 0, 0), ("solving", 10, 1), ("solving", 20, 2), ("solving", 30, 8)):
        now[0] = at
        lines.show(what, done, 8)
    now[0] = 31
    lines.show("tuning, loss 1", 0, 4)
    now[0] = 47
    lines.show("tuning, loss 0.5", 2, 4)
    assert capsys.readouterr().err.splitlines() == [
        "solving 2/8, 20 s, about 60 s left",
        "solving 8/8, 30 s",
        "tuning, loss 0.5 2/4, 16 s, about 16 s left",
    ]


def test_train_writes_a_network_that_has_learned(place):
    assert {path.name for path in (place / "teacher").iterdir()} == FILES - {"report.html"} | LOGS
    network = figures(place / "teacher")["network"]
    assert network["accuracy"] > 60
    student, plan = load_student(place / "teacher")
    _, validation = split_training(load("digits", "train"))
    batches = validation.batches(128, Normalization.from_dict(plan.normalization))
    assert network["validation_accuracy"] == pytest.approx(accuracy(predict(student, batches)), abs=0.3)
    assert network["parameters"] == sum(t.numel() for t in load_file(place / "teacher/model.safetensors").values())


def test_compress_writes_every_file(half):
    folder, answer = half
    assert {path.name for path in folder.iterdir()} == FILES
    assert "Written to half" in answer.out
    assert "Traceback" not in answer.err
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]
    page = (folder / "report.html").read_text()
    assert "<svg" in page or "data:image" in page
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", page), "one self-contained page"


def test_metrics_of_compress_are_consistent(place, half):
    folder, _ = half
    metrics, plan = figures(folder), json.loads((folder / "plan.json").read_text())
    teacher, student = metrics["teacher"], metrics["student"]
    trained = figures(place / "teacher")["network"]
    assert teacher["macs"] == trained["macs"] == plan["macs_dense"]
    assert teacher["parameters"] == trained["parameters"] == plan["parameters_dense"]
    assert teacher["accuracy"] == pytest.approx(trained["accuracy"])
    assert 0.3 * teacher["macs"] < student["macs"] <= 0.5 * teacher["macs"]
    assert student["macs"] == plan["macs"]
    assert student["parameters"] == plan["parameters"] < teacher["parameters"]
    saved = load_file(folder / "model.safetensors").items()
    assert student["parameters"] == sum(t.numel() for name, t in saved if not name.endswith("source"))
    assert [stage["name"] for stage in metrics["stages"]] == ["teacher", "closed form"]
    assert metrics["stages"][0]["accuracy"] == teacher["accuracy"]
    assert metrics["stages"][-1]["accuracy"] == student["accuracy"]
    assert student["accuracy"] > teacher["accuracy"] - 5
    assert student["agreement"] > 90
    assert student["onnx_bytes"] == (folder / "model.onnx").stat().st_size
    # Layers as small as these may be faster dense, which is for the clock to say; then the file is as large.
    assert student["onnx_bytes"] < (1.1 if "folded" in str(plan["layers"]) else 1.0) * teacher["onnx_bytes"]
    for side in (teacher, student):
        low, high = side["latency_interval_ms"]
        assert 0 < low <= side["latency_ms"] <= high
    run = metrics["run"]
    assert run["command"].startswith("dk2pnet compress --model teacher")
    assert run["criterion"] == "loss"
    assert run["budget"] == "macs=0.5"
    assert run["seed"] == 0
    assert {"python", "torch", "onnx", "onnxruntime", "dk2pnet"} <= run["versions"].keys()
    assert run["images"]["test"] == 359


def test_evaluate_agrees_for_folder_onnx_file_and_name(place, half):
    folder, _ = half
    metrics = figures(folder)
    student = accuracy_in(works(shell, "evaluate", "--model", "half", "--data", "digits", cwd=place))
    in_onnx = accuracy_in(works(here, "evaluate", "--model", "half/model.onnx", "--data", "digits", cwd=place))
    teacher = accuracy_in(works(here, "evaluate", "--model", "teacher", "--data", "digits", cwd=place))
    saved = json.loads((folder / "plan.json").read_text())["normalization"]
    normalize = "/".join(",".join(map(str, saved[key])) for key in ("mean", "std"))
    by_name = ["--model", "lenet", "--weights", "teacher/model.safetensors", "--normalize", normalize]
    named = accuracy_in(works(here, "evaluate", *by_name, "--data", "digits", cwd=place))
    assert student == pytest.approx(metrics["student"]["accuracy"], abs=0.01)
    assert in_onnx == pytest.approx(student, abs=0.3)  # one image of 359: the last bits of float32 are ONNX Runtime's
    assert named == teacher == pytest.approx(metrics["teacher"]["accuracy"], abs=0.01)


def test_a_recipe_repeats_the_run_bit_by_bit(place, half):
    folder, _ = half
    works(shell, "compress", "--recipe", "half/recipe.yaml", "--out", "again", cwd=place)
    again = place / "again"
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert (again / "plan.json").read_bytes() == (folder / "plan.json").read_bytes()
    assert (again / "recipe.yaml").read_bytes() == (folder / "recipe.yaml").read_bytes()


def test_options_win_over_the_recipe(place, half):
    works(here, "compress", "--recipe", "half/recipe.yaml", "--budget", "macs=0.7", "--out", "wider", cwd=place)
    recipe = yaml.safe_load((place / "wider/recipe.yaml").read_text())
    assert recipe["budget"] == "macs=0.7"
    assert recipe["data"] == "digits"
    metrics = figures(place / "wider")
    assert 0.5 < metrics["student"]["macs"] / metrics["teacher"]["macs"] <= 0.7


@pytest.mark.parametrize("criterion", ["response", "weight"])
def test_other_criteria(place, criterion):
    works(here, *HALF, "--criterion", criterion, "--out", criterion, cwd=place)
    metrics = figures(place / criterion)
    assert metrics["run"]["criterion"] == criterion
    assert metrics["student"]["macs"] <= 0.5 * metrics["teacher"]["macs"]
    assert metrics["student"]["agreement"] > 50


def test_kernels_per_channel_and_first_and_keep(place):
    works(here, *HALF[:-1], "kernels=2", "--first", "--keep", "features.6", "--out", "two", cwd=place)
    layers = {layer["name"]: layer for layer in figures(place / "two")["layers"]}
    assert layers["features.0"]["counts"] == [2]
    assert layers["features.3"]["counts"] == [2] * 16
    assert layers["features.6"]["counts"] is None
    assert "--keep features.6" in layers["features.6"]["reason"]


def test_weight_without_images(place):
    works(here, "compress", "--model", "teacher", "--criterion", "weight", "--out", "blind", cwd=place)
    metrics = figures(place / "blind")
    assert metrics["student"]["accuracy"] is None
    assert metrics["student"]["macs"] <= 0.44 * metrics["teacher"]["macs"]
    assert {path.name for path in (place / "blind").iterdir()} == FILES


def test_training_adds_a_stage(place):
    works(here, *HALF, "--criterion", "weight", "--epochs", 1, "--out", "tuned", cwd=place)
    metrics = figures(place / "tuned")
    assert [stage["name"] for stage in metrics["stages"]] == ["teacher", "closed form", "trained"]
    assert metrics["student"]["accuracy"] == metrics["stages"][2]["accuracy"]
    assert metrics["stages"][2]["agreement"] > metrics["stages"][1]["agreement"]
    evaluated = accuracy_in(works(here, "evaluate", "--model", "tuned", "--data", "digits", cwd=place))
    assert evaluated == pytest.approx(metrics["student"]["accuracy"], abs=0.01)


def test_a_folder_of_images_is_data(place):
    write_digits(place / "pictures/train", 200)
    write_digits(place / "pictures/test", 100, start=200)
    works(here, *HALF[:3], "--data", "./pictures", "--out", "from-pictures", cwd=place)
    metrics = figures(place / "from-pictures")
    assert metrics["run"]["images"]["test"] == 100
    assert metrics["student"]["accuracy"] > 60
    answer = works(here, "evaluate", "--model", "from-pictures", "--data", "./pictures", cwd=place)
    assert accuracy_in(answer) == pytest.approx(metrics["student"]["accuracy"])
    assert "100 images" in answer.out


def test_images_without_labels_are_enough_to_compress(place):
    write_digits(place / "plain", 60, labelled=False)
    works(here, *HALF[:3], "--data", "./plain", "--out", "from-plain", cwd=place)
    metrics = figures(place / "from-plain")
    assert metrics["student"]["accuracy"] is None
    assert metrics["student"]["agreement"] > 50


def test_an_onnx_file_of_a_fixed_batch_is_evaluated_on_all_images(place, half):
    """359 images in batches of 5: the last one is not full. And colour images become grey where it reads grey."""
    graph = onnx.load(place / "half/model.onnx")
    for value in (*graph.graph.input, *graph.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 5
    onnx.save(graph, place / "fixed.onnx")
    found = works(here, "evaluate", "--model", "fixed.onnx", "--data", "digits", cwd=place)
    wanted = works(here, "evaluate", "--model", "half/model.onnx", "--data", "digits", cwd=place)
    assert accuracy_in(found) == accuracy_in(wanted)
    data = load("digits", "test")
    for number in range(40):
        folder = place / f"colours/test/{int(data.labels[number])}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = data.images[number, 0].numpy()
        Image.fromarray(np.stack([pixels] * 3, 2)).save(folder / f"{number}.png")
        grey = place / f"greys/test/{int(data.labels[number])}"
        grey.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(grey / f"{number}.png")
    colours, greys = (
        works(here, "evaluate", "--model", "half/model.onnx", "--data", name, cwd=place)
        for name in ("colours", "greys")
    )
    assert "of 40 images" in colours.out
    assert accuracy_in(colours) == accuracy_in(greys)


NET = """
from torch import nn

def make():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10),
    )
"""


def test_a_network_in_a_file_goes_all_the_way(place):
    (place / "net.py").write_text(NET)
    given = ["--model", "net.py:make", "--data", "digits"]
    works(here, "train", *given, "--epochs", 2, "--out", "from-file", cwd=place)
    network = ["--weights", "from-file/model.safetensors", "--normalize", "0.3/0.3"]
    works(here, "compress", *given, *network, "--tune", 0, "--out", "file-small", cwd=place)
    assert json.loads((place / "file-small/plan.json").read_text())["network"] == {"name": "net.py:make"}
    wanted = figures(place / "file-small")["student"]["accuracy"]
    # The code that a folder names is not run; whoever evaluates it names the code.
    said = error_of(here("evaluate", "--model", "file-small", "--data", "digits", cwd=place))
    assert "--model net.py:make --weights file-small" in said
    for model in (["net.py:make", "--weights", "file-small"], ["file-small/model.onnx"]):
        found = works(here, "evaluate", "--model", *model, "--data", "digits", cwd=place)
        assert accuracy_in(found) == pytest.approx(wanted, abs=0.01)


def test_a_folder_decides_on_a_drop(place):
    write_digits(place / "digits", 300, start=100)
    (place / "holdout").mkdir()
    for folder in (place / "digits").iterdir():  # named as the classes of the data set are
        folder.rename(place / "holdout" / folder.name.removeprefix("digit"))
    (place / "digits").rmdir()
    options = ["--budget", "drop=30", "--holdout", "./holdout", "--criterion", "response"]
    works(here, *HALF[:5], "--tune", 0, *options, "--out", "drop", cwd=place)
    decided = figures(place / "drop")["decided"]
    assert (decided["decided_by"], decided["images"]) == ("./holdout", 300)
    assert decided["value"] <= 30
    assert decided["confirmed"]["on"] == "the test images"


def test_images_that_are_not_square_stay_so(place):
    """In an OUT folder's own size, in the .onnx file's, and of others' images beside them."""
    for split, count in (("train", 120), ("test", 40)):
        data = load("digits", split)
        for number in range(count):
            folder = place / f"wide/{split}/{int(data.labels[number])}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.pad(data.images[number, 0].numpy(), ((0, 0), (0, 4)))
            Image.fromarray(pixels).save(folder / f"{number}.png")
    options = ["--data", "./wide", "--calibration-data", "./pictures-of-others"]
    write_digits(place / "pictures-of-others", 40)
    network = ["--model", "lenet", "--weights", "teacher/model.safetensors", "--normalize", "0.3/0.3", "--tune", 0]
    works(here, "compress", *network, *options, "--out", "oblong", cwd=place)
    plan = json.loads((place / "oblong/plan.json").read_text())
    assert plan["input_shape"] == [1, 8, 12]
    wanted = figures(place / "oblong")["student"]["accuracy"]
    for model in ("oblong", "oblong/model.onnx"):
        found = works(here, "evaluate", "--model", model, "--data", "./wide", cwd=place)
        assert accuracy_in(found) == pytest.approx(wanted, abs=0.01)
        assert "40 images" in found.out


def test_what_a_foreign_onnx_file_says_of_its_normalisation(place, half):
    """Nothing readable, or nothing at all; and images that do not fit are no traceback."""
    graph = onnx.load(place / "half/model.onnx")
    for text, words in (("imagenet", "damaged normalisation"), ("null", "does not say how")):
        for entry in graph.metadata_props:
            entry.value = text if entry.key == "normalization" else entry.value
        onnx.save(graph, place / "foreign.onnx")
        evaluate = ["evaluate", "--model", "foreign.onnx", "--data", "digits"]
        assert words in error_of(here(*evaluate, cwd=place))
        works(here, *evaluate, "--normalize", "0.3/0.3", cwd=place)
        compress = ["compress", "--model", "foreign.onnx", "--data", "digits", "--first", "--out", "never"]
        assert words in error_of(here(*compress, cwd=place))
    answer = here(*evaluate, "--normalize", "0.3/0.3", "--input-size", 2, cwd=place)
    assert "which square images of 2 do not fit" in error_of(answer)


def test_brackets_in_a_name_are_no_markup(place):
    answer = works(here, *HALF, "--criterion", "weight", "--out", "exp[lr=0.1]", cwd=place)
    assert "Written to exp[lr=0.1]:" in answer.out


def test_an_output_that_is_no_tensor_is_judged_by_what_it_is_made_of(place, half):
    made = onnx.load(half[0] / "model.onnx")
    name = made.graph.output[0].name
    made.graph.node.append(onnx.helper.make_node("SequenceConstruct", [name], ["sequence"]))
    kind = onnx.helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, None)
    del made.graph.output[:]
    made.graph.output.append(onnx.helper.make_value_info("sequence", onnx.helper.make_sequence_type_proto(kind)))
    onnx.save(made, place / "sequence.onnx")
    answer = works(here, "evaluate", "--model", "sequence.onnx", "--data", "digits", cwd=place)
    plain = works(here, "evaluate", "--model", "half/model.onnx", "--data", "digits", cwd=place)
    assert accuracy_in(answer) == accuracy_in(plain)


def test_overwrite_replaces_an_earlier_run(place):
    works(here, *HALF, "--criterion", "weight", "--out", "replaced", cwd=place)
    works(here, *HALF[:-1], "kernels=1", "--criterion", "weight", "--out", "replaced", "--overwrite", cwd=place)
    assert figures(place / "replaced")["run"]["budget"] == "kernels=1"
    assert {path.name for path in (place / "replaced").iterdir()} == FILES
    assert not [path for path in place.iterdir() if path.name.startswith(".")]


def test_a_latency_budget_int8_and_pt2(place):
    """At 8 x 8 pixels nothing is gained; what is asked here is that the files and figures are those of the run."""
    options = ["--budget", "latency=1", "--criterion", "response", "--threads", 1, "--int8", "--pt2"]
    answer = works(here, *HALF[:-2], *options, "--out", "quick", cwd=place)
    assert {path.name for path in (place / "quick").iterdir()} == FILES | {"model.int8.onnx", "model.pt2"}
    metrics = figures(place / "quick")
    assert metrics["run"]["budget"] == "latency=1"
    assert metrics["latency_search"]
    assert metrics["run"]["latency"]["threads"] == 1
    assert metrics["student"]["pt2_difference"] < 1e-4
    rows = {(row["network"], row["numbers"]): row for row in metrics["int8"]}
    assert len(rows) == 4
    for network in ("teacher", "student"):
        fp32, int8 = rows[network, "fp32"], rows[network, "int8"]
        assert fp32["accuracy"] == pytest.approx(metrics[network]["accuracy"], abs=0.3)
        assert abs(int8["accuracy"] - fp32["accuracy"]) < 5
    assert rows["teacher", "fp32"]["agreement"] == 100  # with itself
    assert rows["student", "fp32"]["agreement"] == pytest.approx(metrics["student"]["agreement"], abs=0.5)
    assert (place / "quick/model.int8.onnx").stat().st_size == rows["student", "int8"]["bytes"]
    found = works(here, "evaluate", "--model", "quick/model.int8.onnx", "--data", "digits", cwd=place)
    assert accuracy_in(found) == pytest.approx(rows["student", "int8"]["accuracy"], abs=0.01)
    assert "int8" in answer.out
    assert "With int8" in (place / "quick/report.html").read_text(encoding="utf-8")
    program = torch.export.load(place / "quick/model.pt2").module()
    assert program(torch.zeros(5, 1, 8, 8)).shape == (5, 10)


def test_another_target_is_timed_there(place):
    works(here, *HALF, "--criterion", "weight", "--target", "pytorch", "--threads", 1, "--out", "eager", cwd=place)
    metrics = figures(place / "eager")
    assert metrics["run"]["latency"]["target"] == "pytorch"
    assert metrics["student"]["latency_ms"] > 0


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spoilt(place):
    """The same folder with all sorts of bad input in bad/."""
    bad = place / "bad"
    bad.mkdir()
    weights = load_file(place / "teacher/model.safetensors")
    (bad / "garbage.pth").write_bytes(b"\x93no checkpoint at all" * 20)
    (bad / "cut.safetensors").write_bytes((place / "teacher/model.safetensors").read_bytes()[:5000])
    torch.save(nn.Linear(2, 2), bad / "whole.pth")
    save_file({"layer.weight": torch.zeros(3, 3)}, bad / "other.safetensors")
    holes = {name: tensor.clone() for name, tensor in weights.items()}
    holes["features.3.weight"][0, 0, 0, 0] = float("nan")
    save_file(holes, bad / "nan.safetensors")
    write_digits(bad / "broken", 40)
    (bad / "broken/digit3/spoilt.png").write_bytes(b"\x89PNG but not for long")
    write_digits(bad / "unlabelled", 20, labelled=False)
    (bad / "mine").mkdir()
    (bad / "mine/thesis.txt").write_text("years of work")
    (bad / "recipe.yaml").write_text("model: teacher\nspeed: 11\n")
    return place


COMPRESS = ["compress", *BY_NAME]
TEACHER = ["compress", "--model", "teacher", "--data", "digits"]
BAD = {
    "weights that do not exist": ([*COMPRESS, "--weights", "nowhere.pth"], ["nowhere.pth", "exist"]),
    "corrupt .pth": ([*COMPRESS, "--weights", "bad/garbage.pth"], ["garbage.pth", "damaged"]),
    "truncated safetensors": ([*COMPRESS, "--weights", "bad/cut.safetensors"], ["cut.safetensors", "damaged"]),
    "pickle of objects": ([*COMPRESS, "--weights", "bad/whole.pth"], ["whole.pth", "more than tensors", "state_dict"]),
    "weights of another network": ([*COMPRESS, "--weights", "bad/other.safetensors"], ["other.safetensors", "fit"]),
    "NaN in the weights": ([*COMPRESS, "--weights", "bad/nan.safetensors"], ["nan.safetensors", "NaN", "features.3"]),
    "an image that cannot be read": ([*TEACHER[:3], "--data", "./bad/broken"], ["spoilt.png"]),
    "an image that cannot be read, training": (
        ["train", "--model", "lenet", "--data", "./bad/broken", "--epochs", "1"],
        ["spoilt.png"],
    ),
    "training without labels": (
        ["train", "--model", "lenet", "--data", "./bad/unlabelled"],
        ["no labelled training split"],
    ),
    "budget 0": ([*TEACHER, "--budget", "macs=0"], ["macs=0", "0 < F <= 1"]),
    "budget above 1": ([*TEACHER, "--budget", "macs=1.5"], ["macs=1.5", "0 < F <= 1"]),
    "budget of no kind": ([*TEACHER, "--budget", "half"], ["'half'", "macs=F"]),
    "half a kernel": ([*TEACHER, "--budget", "kernels=1.5"], ["kernels=1.5"]),
    "unreachable budget": ([*TEACHER, "--budget", "macs=0.02"], ["macs=0.02", "cannot be reached", "at least"]),
    "no normalisation": (
        ["compress", "--model", "lenet", "--weights", "teacher/model.safetensors", "--data", "digits"],
        ["--normalize"],
    ),
    "bad normalisation": ([*TEACHER, "--normalize", "colourful"], ["colourful"]),
    "unknown network": (["compress", "--model", "resnet21", "--data", "digits"], ["resnet21", "resnet20"]),
    "unknown data": ([*TEACHER[:3], "--data", "digitz"], ["digitz", "digits"]),
    "data folder that does not exist": ([*TEACHER[:3], "--data", "./no/such"], ["no/such", "exist"]),
    "latency above 1": ([*TEACHER, "--budget", "latency=2"], ["latency=2", "0 < F <= 1"]),
    "unreachable latency": (
        [*TEACHER, "--budget", "latency=0.001"],
        ["cannot be reached", "of the dense one's time; "],
    ),
    "unknown target": ([*TEACHER, "--target", "npu"], ["'npu'", "onnxruntime", "openvino"]),
    "int8 without images": (
        ["compress", "--model", "teacher", "--criterion", "weight", "--int8"],
        ["int8", "--data"],
    ),
    "unknown criterion": ([*TEACHER, "--criterion", "magic"], ["magic", "loss", "response", "weight"]),
    "criterion without images": (["compress", "--model", "teacher"], ["'loss'", "--data"]),
    "unknown pattern": ([*TEACHER, "--keep", "backbone.*"], ["backbone.*", "features.3"]),
    "weights for a folder that has its own": ([*TEACHER, "--weights", "bad/nan.safetensors"], ["own weights"]),
    "one calibration image": ([*TEACHER, "--calibration-images", "1"], ["calibration images is 1"]),
    "device that is not there": ([*TEACHER, "--device", "tpu9"], ["tpu9"]),
    "no threads": ([*TEACHER, "--threads", "0"], ["threads is 0"]),
    "no epochs of training": (["train", "--model", "lenet", "--data", "digits", "--epochs", "0"], ["epochs is 0"]),
    "recipe with an unknown option": (["compress", "--recipe", "bad/recipe.yaml"], ["speed", "recipe.yaml"]),
    "recipe that does not exist": (["compress", "--recipe", "bad/none.yaml"], ["none.yaml"]),
    "wrong image size": (
        [*COMPRESS, "--weights", "teacher/model.safetensors", "--input-size", "0"],
        ["input size is 0"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing(spoilt, name):
    args, words = BAD[name]
    before = snapshot(spoilt)
    message = error_of(here(*args, "--out", "never " + name, cwd=spoilt))
    for word in words:
        assert word in message, message
    assert snapshot(spoilt) == before


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--model", "teacher", "--data", "./bad/unlabelled", "--split", "train"], ["has no labels"]),
        (["--model", "teacher", "--data", "digits", "--split", "holiday"], ["holiday"]),
        (["--model", "bad/none.onnx", "--data", "digits"], ["none.onnx"]),
        (["--model", "bad/garbage.onnx", "--data", "digits"], ["garbage.onnx"]),
    ],
)
def test_evaluate_refuses(spoilt, args, words):
    (spoilt / "bad/garbage.onnx").write_bytes(b"no graph")
    message = error_of(here("evaluate", *args, cwd=spoilt))
    for word in words:
        assert word in message, message


def test_a_refusal_in_a_shell(spoilt):
    """The same in a process of its own, where libraries may print more."""
    before = snapshot(spoilt)
    answer = shell(*COMPRESS, "--weights", "bad/whole.pth", "--out", "refused", cwd=spoilt)
    assert "whole.pth" in error_of(answer)
    assert len(answer.err.strip().splitlines()) == 1
    assert answer.out == ""
    assert snapshot(spoilt) == before


def test_the_unreachable_budget_says_what_is_reachable(spoilt):
    message = error_of(here(*TEACHER, "--budget", "macs=0.02", "--out", "too-small", cwd=spoilt))
    reachable = message.partition("gives ")[2].partition(";")[0]
    assert reachable.startswith("macs=0.")
    works(here, *TEACHER, "--criterion", "weight", "--budget", reachable, "--out", "least", cwd=spoilt)
    metrics = figures(spoilt / "least")
    assert metrics["student"]["macs"] <= float(reachable[5:]) * metrics["teacher"]["macs"]
    counts = [sum(layer["counts"]) for layer in metrics["layers"] if layer["counts"]]
    assert counts == [1, 1, 1]


def test_an_existing_folder_is_kept_without_overwrite(spoilt):
    before = snapshot(spoilt)
    for command in (TEACHER, ["train", "--model", "lenet", "--data", "digits", "--epochs", "1"]):
        message = error_of(here(*command, "--out", "teacher", cwd=spoilt))
        assert "teacher exists" in message
        assert "--overwrite" in message
    assert snapshot(spoilt) == before


def test_a_folder_of_somebody_else_is_never_replaced(spoilt):
    before = snapshot(spoilt)
    assert "bad/mine" in error_of(here(*TEACHER, "--out", "bad/mine", "--overwrite", cwd=spoilt))
    assert "thesis.txt" in error_of(here(*TEACHER, "--out", "bad/mine/thesis.txt", "--overwrite", cwd=spoilt))
    assert snapshot(spoilt) == before
    for name, text in (("metrics.json", '{"loss": 1}'), ("plan.json", "[]")):  # names that others use too
        (spoilt / "bad/mine" / name).write_text(text)
    before = snapshot(spoilt)
    assert "bad/mine" in error_of(here(*TEACHER, "--out", "bad/mine", "--overwrite", cwd=spoilt))
    assert snapshot(spoilt) == before


def test_a_refused_run_leaves_the_earlier_one(spoilt):
    """Also where the refusal comes late, after the moments were gathered."""
    before = snapshot(spoilt)
    error_of(here(*TEACHER, "--budget", "macs=0.02", "--out", "teacher", "--overwrite", cwd=spoilt))
    assert snapshot(spoilt) == before


def test_out_below_a_file_is_refused(spoilt):
    before = snapshot(spoilt)
    command = [*TEACHER, "--criterion", "weight", "--out", Path("bad/mine/thesis.txt/out")]
    assert "thesis.txt" in error_of(here(*command, cwd=spoilt))
    assert snapshot(spoilt) == before
