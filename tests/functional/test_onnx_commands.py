"""`compress` for users who have no training code: an ONNX file in, an ONNX file out, from the command line."""

import json
import re
from dataclasses import fields

import numpy as np
import onnx
import onnxruntime
import pytest
import yaml
from command_line import accuracy_in, error_of, figures, here, shell, snapshot, teach, works

from dk2pnet.data import Normalization, load
from dk2pnet.deploy.export import read_metadata
from dk2pnet.deploy.runtimes.onnxruntime import run_onnx, session
from dk2pnet.options import CompressOptions
from graphs import drop_initializer, needs_onnx_tuning, save, small, value, weights

WRITTEN = {"plan.json", "model.onnx", "metrics.json", "report.html", "recipe.yaml"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with teacher/model.onnx, a trained network."""
    folder = tmp_path_factory.mktemp("onnx")
    teach(folder)
    return folder


def test_a_network_for_images_from_a_bare_shell(place):
    options = ["--model", "teacher/model.onnx", "--data", "digits", "--budget", "macs=0.5", "--threads", 1]
    answer = works(shell, "compress", *options, "--out", "half", cwd=place)
    assert "Written to half: plan.json, model.onnx, report.html, metrics.json, recipe.yaml" in answer.out
    logs = {"tuning.jsonl", "tensorboard"} if figures(place / "half")["tuning_steps"] else set()
    assert {path.name for path in (place / "half").iterdir()} == WRITTEN | logs
    metrics = figures(place / "half")
    teacher, student = metrics["teacher"], metrics["student"]
    trained = figures(place / "teacher")["network"]
    assert teacher["macs"] == trained["macs"]
    assert teacher["parameters"] == trained["parameters"]
    assert teacher["accuracy"] == pytest.approx(trained["accuracy"])
    assert 0.4 * teacher["macs"] < student["macs"] <= 0.5 * teacher["macs"]
    assert student["accuracy"] > teacher["accuracy"] - 5
    assert student["agreement"] > 90
    assert 0 < student["relative_error"] < 30
    assert student["onnx_difference"] < 1e-4
    assert [decision["what"] for decision in metrics["decisions"]][0] == "layer-by-layer reconstruction"
    content = (place / "half" / "model.onnx").read_bytes()
    onnx.checker.check_model(content)
    before = onnx.load(place / "teacher" / "model.onnx")
    assert list(onnx.load_from_string(content).metadata_props) == list(before.metadata_props)
    answer = works(here, "evaluate", "--model", "half/model.onnx", "--data", "digits", cwd=place)
    assert accuracy_in(answer) == pytest.approx(student["accuracy"], abs=0.01)
    page = (place / "half" / "report.html").read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", page), "one self-contained page"
    assert f"{student['relative_error']:.2f} % (root mean square, relative)" in page


def test_images_into_a_file_of_a_fixed_batch(place):
    """The images that do not fill a batch are left out, and labels stay beside theirs."""
    graph = onnx.load(place / "teacher/model.onnx")
    for each in (graph.graph.input[0], graph.graph.output[0]):
        each.type.tensor_type.shape.dim[0].dim_value = 7
    onnx.save(graph, place / "sevens.onnx")
    options = ["--data", "digits", "--budget", "kernels=2", "--tune", 0, "--calibration-images", 100, "--threads", 1]
    works(here, "compress", "--model", "sevens.onnx", *options, "--out", "sevens", cwd=place)
    test = load("digits", "test")
    count = len(test) // 7 * 7
    assert count < len(test)
    norm = Normalization.from_dict(json.loads(read_metadata(place / "sevens.onnx")["normalization"]))
    scores = run_onnx(session(place / "teacher/model.onnx"), norm.apply(test.images[:count]))[0]
    metrics = figures(place / "sevens")
    assert metrics["run"]["images"]["test"] == count
    right = (scores.argmax(1) == test.labels[:count].numpy()).mean()
    assert metrics["teacher"]["accuracy"] == pytest.approx(100 * right)
    few = ["--data", "digits", "--calibration-images", 20, "--out", "few"]
    assert "the graph takes 7 at once" in error_of(here("compress", "--model", "sevens.onnx", *few, cwd=place))


@needs_onnx_tuning
def test_tuned_from_the_command_line(place):
    options = ["--model", "teacher/model.onnx", "--data", "digits", "--budget", "kernels=1", "--threads", 1]
    answer = works(here, "compress", *options, "--tune", 40, "--out", "tuned", cwd=place)
    assert "tuning: KL(teacher || student)" in answer.out
    works(here, "compress", *options, "--tune", 0, "--out", "untuned", cwd=place)
    tuned, untuned = (figures(place / name) for name in ("tuned", "untuned"))
    assert tuned["tuning_steps"] == 40
    assert [stage["name"] for stage in tuned["stages"]] == ["teacher", "closed form", "tuned"]
    assert tuned["student"]["agreement"] >= untuned["student"]["agreement"]
    assert tuned["student"]["macs"] == untuned["student"]["macs"]


def test_its_recipe_repeats_the_run(place):
    options = ["--model", "teacher/model.onnx", "--data", "digits", "--budget", "kernels=2", "--threads", 1]
    works(here, "compress", *options, "--calibration-images", 100, "--out", "one", cwd=place)
    works(here, "compress", "--recipe", "one/recipe.yaml", "--out", "two", cwd=place)
    recipes = [yaml.safe_load((place / name / "recipe.yaml").read_text()) for name in ("one", "two")]
    assert recipes[0] == recipes[1]
    assert recipes[0]["criterion"] == "response"
    options = {each.name for each in fields(CompressOptions)}
    assert recipes[0].keys() == options - {"overwrite", "test_data", "example_input"} | {"model", "data", "budget"}
    plans = [json.loads((place / name / "plan.json").read_text()) for name in ("one", "two")]
    for plan in plans:
        for layer in plan["layers"]:
            del layer["form"]  # is measured, and may differ
    assert plans[0] == plans[1]


def test_options_that_do_not_go_with_it_are_refused_in_a_recipe_too(place):
    asked = {"model": "teacher/model.onnx", "data": "digits", "budget": "kernels=1", "pt2": True}
    (place / "asked.yaml").write_text(yaml.safe_dump(asked))
    answer = here("compress", "--recipe", "asked.yaml", "--out", "refused", cwd=place)
    assert "--pt2 does not go with an .onnx model, which torch.export cannot take" in error_of(answer)
    assert not (place / "refused").exists()


def test_how_images_were_normalised_is_in_the_file(place):
    made = onnx.load(place / "teacher" / "model.onnx")
    said = next(entry.value for entry in made.metadata_props if entry.key == "normalization")
    del made.metadata_props[:]
    onnx.save(made, place / "bare.onnx")
    mean, std = (",".join(map(str, each)) for each in json.loads(said).values())
    options = ["--model", "bare.onnx", "--data", "digits", "--normalize", f"{mean}/{std}", "--budget", "kernels=2"]
    works(here, "compress", *options, "--tune", 0, "--threads", 1, "--out", "said", cwd=place)
    answer = works(here, "evaluate", "--model", "said/model.onnx", "--data", "digits", cwd=place)
    assert accuracy_in(answer) == pytest.approx(figures(place / "said")["student"]["accuracy"], abs=0.01)


def test_inputs_that_are_no_images_and_a_latency_budget(tmp_path):
    made = small(channels=(2, 16, 24), size=(12, 10))
    made.graph.input.append(value("scale", "n", 24, 1, 1))
    made.graph.node[-1].output[0] = "pooled"
    made.graph.node.append(onnx.helper.make_node("Mul", ["pooled", "scale"], ["y"]))
    save(made, tmp_path)
    arrays = {"x": weights(20, 2, 12, 10, seed=1), "scale": weights(20, 24, 1, 1, seed=2)}
    np.savez(tmp_path / "inputs.npz", **arrays)
    options = ["--model", "model.onnx", "--data", "inputs.npz", "--budget", "latency=1", "--threads", 1]
    answer = works(here, "compress", *options, "--out", "out", cwd=tmp_path)
    assert "relative error of the outputs" in answer.out
    assert figures(tmp_path / "out")["run"]["images"] == {"calibration": 16, "held out": 4}
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    assert [each.name for each in session.get_inputs()] == ["x", "scale"]
    assert session.run(None, arrays)[0].shape == (20, 24, 1, 1)


def test_refusals_leave_nothing_behind(tmp_path):
    save(small(size=(8, 8)), tmp_path)
    damaged = small(size=(8, 8))
    drop_initializer(damaged, "w2")
    save(damaged, tmp_path, "damaged.onnx")
    (tmp_path / "cut.onnx").write_bytes((tmp_path / "model.onnx").read_bytes()[:900])
    np.savez(tmp_path / "inputs.npz", x=weights(10, 3, 8, 8))
    np.savez(tmp_path / "other.npz", x=weights(10, 3, 9, 8))
    np.savez(tmp_path / "names.npz", x=weights(10, 3, 8, 8), z=weights(10))
    (tmp_path / "text.npz").write_text("nothing")
    before = snapshot(tmp_path)
    data = ["--data", "inputs.npz"]
    cases = {
        "is no ONNX file, or it is cut off": ["--model", "cut.onnx", *data],
        "reads 'w2', which neither an input": ["--model", "damaged.onnx", *data],
        "none.onnx does not exist": ["--model", "none.onnx", *data],
        "criterion 'loss' needs a classifier": ["--model", "model.onnx", *data, "--criterion", "loss"],
        "criterion 'response' needs images and none were given": ["--model", "model.onnx"],
        "--epochs does not go with an .onnx model": ["--model", "model.onnx", *data, "--epochs", 2],
        "--weights does not go with an .onnx model": ["--model", "model.onnx", *data, "--weights", "w.pt"],
        "device 'nowhere' cannot be used": ["--model", "model.onnx", *data, "--device", "nowhere"],
        "--normalize is for images; the arrays in inputs.npz are fed as they are": [
            "--model",
            "model.onnx",
            *data,
            "--normalize",
            "imagenet",
        ],
        "--pt2 does not go with an .onnx model": ["--model", "model.onnx", *data, "--pt2"],
        "target is 'pytorch'; expected one that reads ONNX files": [
            "--model",
            "model.onnx",
            *data,
            "--target",
            "pytorch",
        ],
        "has the shape (10, 3, 9, 8); the graph takes float (?, 3, 8, 8)": [
            "--model",
            "model.onnx",
            "--data",
            "other.npz",
        ],
        "holds the arrays ['x', 'z']; expected one for each input": ["--model", "model.onnx", "--data", "names.npz"],
        "cannot be read as .npz": ["--model", "model.onnx", "--data", "text.npz"],
        "does not say how its input is normalised; give it with --normalize": [
            "--model",
            "model.onnx",
            "--data",
            "digits",
        ],
        "--keep five matches no convolution": ["--model", "model.onnx", *data, "--keep", "five"],
    }
    for sentence, options in cases.items():
        assert sentence in error_of(here("compress", *options, "--out", "out", cwd=tmp_path))
        assert snapshot(tmp_path) == before
