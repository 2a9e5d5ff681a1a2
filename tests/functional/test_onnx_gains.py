"""What an ONNX file is given by going the way of modules: explore, budgets in points, images that decide, int8, runs
that go on, the criterion of the loss."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
import yaml
from command_line import error_of, figures, here, noise, snapshot, teach, works
from onnx import helper, numpy_helper
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

import dk2pnet
from dk2pnet import InputError, Run, compress, explore
from dk2pnet.data import Normalization, load
from dk2pnet.deploy.export import read_metadata
from dk2pnet.deploy.runtimes.onnxruntime import run_onnx, session
from dk2pnet.students import tuning
from graphs import needs_onnx_tuning, node, save, small, tensor, value, weights

pytestmark = pytest.mark.usefixtures("no_timing")

FEW = ["--calibration-images", 100, "--no-rebuild", "--threads", 1]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a trained network, teacher/, of which teacher/model.onnx is used."""
    folder = tmp_path_factory.mktemp("gains")
    teach(folder)
    return folder


BASE = ["--model", "teacher/model.onnx", "--data", "digits"]


def inputs(folder, **arrays):
    np.savez(folder / "inputs.npz", **arrays)
    return str(folder / "inputs.npz")


def smooth(count=120, channels=3, size=9, seed=0):
    """Inputs whose neighbours are alike, as in images."""
    x = weights(count, channels, size, size, seed=seed)
    for axis in (2, 3):
        x = (x + np.roll(x, 1, axis) + np.roll(x, -1, axis)) / 2
    return x


def two_inputs():
    """small(), its output multiplied by a second input."""
    made = small(channels=(2, 16, 24), size=(12, 10))
    made.graph.input.append(value("scale", "n", 24, 1, 1))
    made.graph.node[-1].output[0] = "pooled"
    made.graph.node.append(helper.make_node("Mul", ["pooled", "scale"], ["y"]))
    return made


def classifier(batch="n", softmax=False):
    """small() with its means as class scores."""
    made = small(channels=(3, 8, 12), batch=batch, size=(9, 9))
    made.graph.node[-1].output[0] = "pooled"
    made.graph.node.append(helper.make_node("Flatten", ["pooled"], ["scores" if softmax else "y"], name="flat"))
    if softmax:
        made.graph.node.append(helper.make_node("Softmax", ["scores"], ["y"], axis=1, name="softmax"))
    made.graph.output[0].CopyFrom(value("y", batch, 12))
    onnx.checker.check_model(made)
    return made


def fixed(path, batch):
    """The file at `path`, taking so many images at once."""
    graph = onnx.load(path)
    for each in (graph.graph.input[0], graph.graph.output[0]):
        each.type.tensor_type.shape.dim[0].dim_value = batch
    return graph


def normalization(place):
    return Normalization.from_dict(json.loads(read_metadata(place / "teacher/model.onnx")["normalization"]))


def classes(path, data, norm):
    return torch.from_numpy(run_onnx(session(path), norm.apply(data.images))[0]).argmax(1)


def content(result):
    return result.model.SerializeToString()


# -- explore -----------------------------------------------------------------------------------------------------------


def test_the_curve_of_a_file_and_arrays(tmp_path):
    save(small(), tmp_path)
    inputs(tmp_path, x=smooth(60))
    options = ["--model", "model.onnx", "--data", "inputs.npz", "--tune", 0, "--threads", 1]
    answer = works(here, "explore", *options, "--points", 3, "--out", "curve", cwd=tmp_path)
    assert {path.name for path in (tmp_path / "curve").iterdir()} == {"metrics.json", "report.html", "recipe.yaml"}
    metrics = figures(tmp_path / "curve")
    assert metrics["measure"] == "error of the outputs"
    assert metrics["decided_by"] == "the held-out samples"
    assert metrics["teacher"]["value"] == 0
    assert metrics["run"]["criterion"] == "response"
    values = [point["closed form"]["value"] for point in metrics["points"]]
    assert len(values) >= 2
    assert values == sorted(values)
    page = (tmp_path / "curve/report.html").read_text()
    for point in metrics["points"]:
        assert point["tuned"] is None
        assert point["latency"]["ratio"] > 0
        assert point["budget"] in answer.out
        assert point["command"].startswith("dk2pnet compress --model model.onnx --data inputs.npz ")
        assert point["command"] in page
    made = metrics["points"][-1]["command"].split()[1:]
    works(here, *made, cwd=tmp_path)
    found, point = figures(tmp_path / made[-1]), metrics["points"][-1]
    assert found["student"]["macs"] == point["macs"]
    assert [layer["counts"] for layer in found["layers"]] == [layer["counts"] for layer in point["layers"]]


@needs_onnx_tuning
def test_the_curve_of_a_file_and_images(place):
    options = [*BASE, *FEW, "--budget", "macs=0.6", "--budget", "macs=0.3", "--tune", 30]
    works(here, "explore", *options, "--out", "curve", cwd=place)
    metrics = figures(place / "curve")
    assert metrics["measure"] == "accuracy"
    assert metrics["decided_by"] == "the validation tenth of the training split"
    assert metrics["tuning_steps"] == 30
    assert metrics["run"]["images"] == {"calibration": 80, "held out": 20, "deciding": 143}
    page = (place / "curve/report.html").read_text()
    assert page.count("<svg") == 1
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", page)
    assert any(point["tuned"] for point in metrics["points"])
    for point in metrics["points"]:
        assert point["command"].startswith("dk2pnet compress --model teacher/model.onnx --data digits ")
        assert point["command"] in page
    works(here, "explore", "--recipe", "curve/recipe.yaml", "--out", "again", cwd=place)
    assert [point["tuned"] for point in figures(place / "again")["points"]] == [p["tuned"] for p in metrics["points"]]


# -- budgets in points, and which images decide ------------------------------------------------------------------------


def test_a_drop_is_decided_on_a_part_of_the_test_split(place):
    options = ["--budget", "drop=8", "--holdout-split", "test[:60%]", "--tune", 0, *FEW]
    answer = works(here, "compress", *BASE, *options, "--out", "drop", cwd=place)
    metrics = figures(place / "drop")
    decided = metrics["decided"]
    assert decided["value"] <= 8
    assert decided["decided_by"] == "test[:60%]"
    assert (decided["images"], decided["confirmed"]["images"]) == (215, 144)
    assert metrics["run"]["images"] == {"calibration": 80, "held out": 20, "test": 144, "deciding": 215}
    assert "by test[:60%]" in answer.out
    # The deciding figure, by hand, in the file that was written.
    test, norm = load("digits", "test"), normalization(place)
    count = round(0.6 * len(test))
    old, new = (
        (classes(place / name / "model.onnx", test, norm)[:count] == test.labels[:count]).double().mean()
        for name in ("teacher", "drop")
    )
    assert decided["value"] == pytest.approx(100 * float(old - new), abs=0.5)


def test_answers_are_decided_on_without_labels(place):
    options = ["--budget", "disagree=6", "--tune", 0, *FEW]
    works(here, "compress", *BASE, *options, "--out", "disagree", cwd=place)
    decided = figures(place / "disagree")["decided"]
    assert decided["value"] <= 6
    assert decided["decided_by"] == "the validation tenth of the training split"
    assert decided["images"] == 143  # the test split confirms
    assert decided["confirmed"]["on"] == "the test images"


@pytest.mark.parametrize("made", [small, two_inputs])
def test_an_error_of_the_outputs_is_decided_on_arrays(tmp_path, made):
    path = save(made(), tmp_path)
    arrays = {"x": smooth(100)}
    if made is two_inputs:
        arrays = {"x": weights(100, 2, 12, 10, seed=1), "scale": weights(100, 24, 1, 1, seed=2)}
    result = compress(path, inputs(tmp_path, **arrays), "error=0.05", threads=1, tune=0)
    decided = result.metrics["decided"]
    assert 0 < decided["value"] <= 0.05
    assert decided["decided_by"] == "the held-out samples"
    assert (decided["images"], decided["confirmed"]["images"]) == (16, 4)
    assert any("the images put aside had decided on corrections" in note for note in result.metrics["notes"])
    kept = [probe["macs_kept"] for probe in decided["probes"] if probe.get("within")]
    assert result.plan.macs / result.plan.macs_dense == pytest.approx(min(kept))


def test_what_arrays_cannot_decide(tmp_path):
    path, data = save(small(), tmp_path), inputs(tmp_path, x=smooth(60))
    with pytest.raises(InputError, match="needs a classifier .* use error=0.02"):
        compress(path, data, "disagree=2", threads=1, tune=0)
    path, data = save(classifier(), tmp_path), inputs(tmp_path, x=smooth(60))
    with pytest.raises(InputError, match="needs labelled images, and these have none"):
        compress(path, data, "drop=2", threads=1, tune=0)
    arrays = "inputs.npz, so the holdout has to be arrays too; give --holdout X.npz"
    for more, said in (
        ({"holdout": str(tmp_path)}, arrays),
        ({"holdout": [torch.zeros(4, 3, 9, 9)]}, arrays),
        ({"holdout_split": "test"}, "inputs.npz decide; a holdout split is of images: give --holdout X.npz"),
    ):
        with pytest.raises(InputError, match=said):
            compress(path, data, "error=0.02", threads=1, tune=0, **more)


def folder_of(place, name, data, rows, classed=True):
    """Images of a data set as files, in folders named by their classes."""
    for row in rows:
        label = data.classes[int(data.labels[row])] if data.classes else str(int(data.labels[row]))
        below = place / name / (label if classed else "kind")
        below.mkdir(parents=True, exist_ok=True)
        pixels = data.images[row, 0]
        pixels = pixels if pixels.dtype == torch.uint8 else (pixels * 255).round().to(torch.uint8)
        Image.fromarray(pixels.numpy()).save(below / f"{row}.png")


def test_a_folder_decides(place):
    test = load("digits", "test")
    folder_of(place, "holdout", test, range(150))
    options = ["--budget", "drop=20", "--holdout", "./holdout", "--tune", 0, *FEW]
    works(here, "compress", *BASE, *options, "--out", "by-folder", cwd=place)
    metrics = figures(place / "by-folder")
    assert metrics["decided"]["images"] == 150
    assert "holdout" in metrics["decided"]["decided_by"]
    assert metrics["decided"]["value"] <= 20
    assert metrics["run"]["images"]["test"] == len(test)
    assert yaml.safe_load((place / "by-folder/recipe.yaml").read_text())["holdout"] == "./holdout"


def test_somebody_elses_images_calibrate_with_and_without_our_own(place):
    noise(place / "others", 130, (12, 9, 3))
    options = ["--calibration-data", "./others", "--budget", "macs=0.5", "--tune", 0, *FEW[2:]]
    works(here, "compress", *BASE, *options, "--out", "both", cwd=place)
    metrics = figures(place / "both")
    assert metrics["run"]["images"] == {"calibration": 93, "held out": 24, "test": 359}
    assert metrics["student"]["accuracy"] > 50
    works(here, "compress", *BASE[:2], *options, "--out", "blind", cwd=place)
    found = figures(place / "blind")
    assert found["run"]["images"] == {"calibration": 93, "held out": 24}
    assert found["student"]["accuracy"] is None
    assert [layer["counts"] for layer in found["layers"]] == [layer["counts"] for layer in metrics["layers"]]


# -- files of a fixed batch --------------------------------------------------------------------------------------------


def test_a_fixed_batch_decides_on_parts_of_batches(place, tmp_path):
    onnx.save(fixed(place / "teacher/model.onnx", 7), place / "sevens.onnx")
    options = ["--data", "digits", "--budget", "disagree=6", "--tune", 0, *FEW]
    works(here, "compress", "--model", "sevens.onnx", *options, "--out", "sevens", cwd=place)
    decided = figures(place / "sevens")["decided"]
    assert decided["value"] <= 6
    assert decided["images"] == 143
    session_of = session(place / "sevens/model.onnx")
    assert session_of.get_inputs()[0].shape[0] == 7
    # Arrays: of 21 batches of 4 images held out, every fifth image is put aside.
    path = save(small(size=(9, 9), batch=4), tmp_path)
    result = compress(path, inputs(tmp_path, x=smooth(100)), "error=0.05", threads=1, tune=0)
    decided = result.metrics["decided"]
    assert (decided["images"], decided["confirmed"]["images"]) == (16, 4)
    assert decided["value"] <= 0.05
    path = save(classifier(batch=4), tmp_path)
    options = {"threads": 1, "tune": 0, "task": "classify"}  # means of what a ReLU gives look like numbers
    decided = compress(path, inputs(tmp_path, x=smooth(100)), "disagree=30", **options).metrics["decided"]
    assert (decided["images"], decided["confirmed"]["images"]) == (16, 4)


def test_fewer_deciding_images_than_a_batch(place):
    """143 images decide, and the file takes 150 at once."""
    onnx.save(fixed(place / "teacher/model.onnx", 150), place / "many.onnx")
    options = ["--model", "many.onnx", "--data", "digits", "--tune", 0, "--no-rebuild", "--threads", 1]
    works(here, "compress", *options, "--budget", "disagree=6", "--out", "many", cwd=place)
    metrics = figures(place / "many")
    assert metrics["run"]["images"] == {"calibration": 900, "held out": 150, "test": 300, "deciding": 143}
    assert metrics["decided"]["images"] == 143


def test_a_file_of_a_fixed_batch_answers_as_the_open_one(tmp_path):
    x = smooth(100)
    found = []
    for batch in ("n", 4):
        path = save(classifier(batch=batch), tmp_path)
        found.append(compress(path, inputs(tmp_path, x=x), "kernels=2", threads=1, tune=0))
    one, other = found
    assert one.metrics["run"]["images"] == other.metrics["run"]["images"] == {"calibration": 80, "held out": 20}
    assert other.metrics["student"]["relative_error"] == pytest.approx(one.metrics["student"]["relative_error"], 1e-3)
    assert other.metrics["student"]["macs"] == one.metrics["student"]["macs"]


def test_an_input_without_an_axis_for_samples(tmp_path):
    """Its first axis, of a fixed size, is not that of a batch."""
    made = small(size=(9, 9))
    made.graph.input[0].CopyFrom(value("image", 3, 9, 9))
    made.graph.initializer.append(tensor("axes", np.array([0])))
    made.graph.node.insert(0, helper.make_node("Unsqueeze", ["image", "axes"], ["x"]))
    path = save(made, tmp_path)
    result = compress(path, inputs(tmp_path, image=smooth(40)), "kernels=2", threads=1, out=tmp_path / "out")
    assert result.metrics["run"]["images"] == {"calibration": 32, "held out": 8}
    plain = compress(save(small(size=(9, 9)), tmp_path), inputs(tmp_path, x=smooth(40)), "kernels=2", threads=1)
    assert result.metrics["teacher"]["macs"] == plain.metrics["teacher"]["macs"]
    assert result.metrics["student"]["relative_error"] == pytest.approx(
        plain.metrics["student"]["relative_error"], rel=0.02
    )


# -- int8 --------------------------------------------------------------------------------------------------------------


def test_int8_of_a_classifier(place):
    answer = works(
        here, "compress", *BASE, *FEW, "--budget", "macs=0.5", "--tune", 0, "--int8", "--out", "i", cwd=place
    )
    assert "model.onnx, model.int8.onnx, report.html" in answer.out
    metrics = figures(place / "i")
    rows = {(row["network"], row["numbers"]): row for row in metrics["int8"]}
    assert set(rows) == {(name, numbers) for name in ("teacher", "student") for numbers in ("fp32", "int8")}
    path = place / "i/model.int8.onnx"
    assert rows["student", "int8"]["bytes"] == path.stat().st_size < rows["student", "fp32"]["bytes"]
    assert rows["teacher", "fp32"]["agreement"] == 100
    assert rows["student", "fp32"]["accuracy"] == pytest.approx(metrics["student"]["accuracy"], abs=0.3)
    test = load("digits", "test")
    right = (classes(path, test, normalization(place)) == test.labels).double().mean()
    assert rows["student", "int8"]["accuracy"] == pytest.approx(100 * float(right), abs=0.3)
    assert "int8" in (place / "i/report.html").read_text()


def test_int8_of_two_inputs(tmp_path):
    path = save(two_inputs(), tmp_path)
    arrays = {"x": weights(60, 2, 12, 10, seed=1), "scale": weights(60, 24, 1, 1, seed=2)}
    out = tmp_path / "out"
    result = compress(path, inputs(tmp_path, **arrays), "kernels=3", threads=1, tune=0, int8=True, out=out)
    rows = {(row["network"], row["numbers"]): row for row in result.metrics["int8"]}
    assert (out / "model.int8.onnx").stat().st_size == rows["student", "int8"]["bytes"]
    assert all(row["accuracy"] is None and row["agreement"] is None for row in rows.values())
    assert rows["teacher", "fp32"]["relative_error"] == 0
    assert 0 < rows["teacher", "int8"]["relative_error"] < 20
    student = result.metrics["student"]["relative_error"]
    assert rows["student", "fp32"]["relative_error"] == pytest.approx(student, rel=0.01)
    assert rows["student", "int8"]["relative_error"] < 20 + student
    assert session(out / "model.int8.onnx").run(None, arrays)[0].shape == (60, 24, 1, 1)


@pytest.mark.parametrize("batch", [7, 40])
def test_int8_of_a_fixed_batch(place, batch):
    """Calibrated on whole batches: 7 does not divide the quantiser's number of images; 40 is more than its batches."""
    onnx.save(fixed(place / "teacher/model.onnx", batch), place / f"of{batch}.onnx")
    options = ["--data", "digits", "--budget", "macs=0.5", "--tune", 0, *FEW[2:], "--int8"]
    works(here, "compress", "--model", f"of{batch}.onnx", *options, "--out", f"i{batch}", cwd=place)
    rows = figures(place / f"i{batch}")["int8"]
    assert len(rows) == 4
    assert all(row["agreement"] > 80 for row in rows)


# -- a run that was killed ---------------------------------------------------------------------------------------------


def killed_at(step, monkeypatch):
    """Let the tuning stop after so many steps."""
    real = tuning.fit

    def killed(model, source, options, run, **more):
        def stop(what, done, total):
            run.progress(what, done, total)
            if done == step:
                raise KeyboardInterrupt

        return real(model, source, options, replace(run, progress=stop), **more)

    monkeypatch.setattr(tuning, "fit", killed)
    return real


@needs_onnx_tuning
@pytest.mark.parametrize("given", ["arrays", "batches"])
def test_a_killed_tuning_goes_on_with_the_same_bits(tmp_path, monkeypatch, given):
    path = save(small(size=(9, 9)), tmp_path)
    x = smooth(60)
    data = inputs(tmp_path, x=x) if given == "arrays" else list(torch.from_numpy(x).split(20))
    options = {"tune": 20, "checkpoint_every": 1e-6, "threads": 1}
    whole = compress(path, data, "kernels=1", **options, out=tmp_path / "whole")
    assert whole.metrics["decisions"][-1]["kept"]
    real = killed_at(11, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        compress(path, data, "kernels=1", **options, out=tmp_path / "cut")
    assert any((tmp_path / "cut.unfinished").rglob("step-*.safetensors"))
    assert not (tmp_path / "cut").exists()
    monkeypatch.setattr(tuning, "fit", real)
    begun, solved = [], []

    def watch(what, done, _):
        begun.extend([done] * what.startswith("tuning"))
        solved.extend([what] * what.startswith(("solving", "moments")))

    again = compress(path, data, "kernels=1", **options, out=tmp_path / "cut", run=Run(watch))
    assert begun[0] > 1
    assert begun[-1] == 20
    assert not solved
    assert again.metrics["decisions"] == whole.metrics["decisions"]
    assert [stage["relative_error"] for stage in again.metrics["stages"][1:]] == [
        stage["relative_error"] for stage in whole.metrics["stages"][1:]
    ]
    assert content(again) == content(whole)
    one, other = (onnx.load(tmp_path / name / "model.onnx").graph.initializer for name in ("whole", "cut"))
    assert {each.name: each.raw_data for each in one} == {each.name: each.raw_data for each in other}
    assert not (tmp_path / "cut.unfinished").exists()
    assert (tmp_path / "cut/tuning.jsonl").exists()


def test_what_another_file_left_is_not_gone_on_with(tmp_path):
    def killed(what, done, _):
        if what.startswith("probing") and done:
            raise KeyboardInterrupt

    path, data = save(small(), tmp_path), inputs(tmp_path, x=smooth(60))
    with pytest.raises(KeyboardInterrupt):
        compress(path, data, "error=0.1", threads=1, tune=0, out=tmp_path / "out", run=Run(killed))
    other = small()
    kernels = next(each for each in other.graph.initializer if each.name == "w2")
    kernels.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(kernels), "w2"))
    save(other, tmp_path)
    with pytest.raises(InputError, match=r"holds an unfinished run with digest-of-weights .*--overwrite to drop it"):
        compress(path, data, "error=0.1", threads=1, tune=0, out=tmp_path / "out")


# -- the criterion of the loss -----------------------------------------------------------------------------------------


@needs_onnx_tuning
@pytest.mark.parametrize("end", ["logits", "softmax"])
def test_the_loss_gives_the_counts_that_it_gives_in_pytorch(place, end):
    graph = onnx.load(place / "teacher/model.onnx")
    if end == "softmax":
        output = graph.graph.output[0].name
        maker = next(each for each in graph.graph.node if output in each.output)
        maker.output[list(maker.output).index(output)] = "scores"
        graph.graph.node.append(helper.make_node("Softmax", ["scores"], [output], axis=1, name="softmax"))
        onnx.checker.check_model(graph)
    onnx.save(graph, place / f"{end}.onnx")
    counts, decided = [], []
    for model in ("teacher", f"{end}.onnx"):
        options = {"criterion": "loss", "tune": 0, "rebuild": False, "calibration_images": 400, "threads": 1}
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(place)
            result = compress(model, "digits", "macs=0.4", device="cpu", **options)
        counts.append([np.array(layer.counts) for layer in result.plan.layers if layer.counts is not None])
        decided.append(result.plan.macs)
    assert len(counts[0]) == len(counts[1]) > 0
    for ours, theirs in zip(*counts, strict=True):
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs).sum() <= 0.03 * ours.sum()
    assert decided[0] == pytest.approx(decided[1], rel=0.01)
    by_response = compress(
        str(place / f"{end}.onnx"), "digits", "macs=0.4", tune=0, rebuild=False, calibration_images=400, threads=1
    )
    assert any(
        (np.array(layer.counts) != ours).any()
        for layer, ours in zip((each for each in by_response.plan.layers if each.counts), counts[1], strict=True)
    ), "the two criteria differ, so that the test says something"


def test_the_loss_needs_a_classifier_and_a_graph_that_can_be_had(tmp_path, monkeypatch):
    path, data = save(small(), tmp_path), inputs(tmp_path, x=smooth(60))
    with pytest.raises(
        InputError,
        match=r"needs a classifier .* returns \(1, 12, 1, 1\), taken for task 'regress'; use --criterion response",
    ):
        compress(path, data, "kernels=1", criterion="loss", threads=1, tune=0)
    monkeypatch.setitem(sys.modules, "onnx2fx", None)
    path = save(classifier(), tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(
        InputError,
        match=r"criterion 'loss' needs gradients, .* the extra is not installed: pip install 'dk2pnet\[onnx-tuning\]'; "
        "use --criterion response",
    ):
        compress(path, data, "kernels=1", criterion="loss", threads=1, out=tmp_path / "out", tune=20)
    assert snapshot(tmp_path) == before


@needs_onnx_tuning
def test_the_loss_of_a_graph_of_a_fixed_batch(tmp_path):
    data = inputs(tmp_path, x=smooth(100))
    found = []
    for batch in ("n", 4):
        path = save(classifier(batch, softmax=True), tmp_path)
        found.append(compress(path, data, "macs=0.6", criterion="loss", threads=1, tune=0).plan.layers[1].counts)
    assert found[0] == found[1]


# -- Python ------------------------------------------------------------------------------------------------------------


def test_batches_of_a_loader(place, tmp_path):
    data, norm = load("digits", "train").subset(torch.arange(200)), normalization(place)
    loader = DataLoader(TensorDataset(norm.apply(data.images), data.labels), batch_size=25)
    path = str(place / "teacher/model.onnx")
    options = {"tune": 0, "rebuild": False, "threads": 1}
    result = dk2pnet.compress(path, loader, "macs=0.6", test_data=loader, **options)
    assert isinstance(result.model, onnx.ModelProto)
    onnx.checker.check_model(result.model)
    assert result.metrics["run"]["images"] == {"calibration": 160, "held out": 40, "test": 200}
    assert 0.4 < result.plan.macs / result.plan.macs_dense <= 0.6
    answers = torch.from_numpy(run_onnx(session(result.model.SerializeToString()), norm.apply(data.images))[0]).argmax(
        1
    )
    right = 100 * float((answers == data.labels).double().mean())
    assert result.metrics["student"]["accuracy"] == pytest.approx(right, abs=0.6)
    assert "latency_ms" in result.metrics["student"]
    assert result.metrics["student"]["latency_ms"] is None
    found = dk2pnet.compress(path, loader, "disagree=10", holdout=loader, **options).metrics["decided"]
    assert found["decided_by"] == "the holdout batches"
    assert found["value"] <= 10
    curve = explore(path, loader, budgets=["macs=0.6", "macs=0.4"], **options)
    assert curve["measure"] == "agreement with the teacher"
    assert len(curve["points"]) == 2


def test_batches_of_any_channels_and_numbers(tmp_path):
    path = save(small(channels=(5, 8, 12), size=(9, 9)), tmp_path)
    x = torch.from_numpy(smooth(40, channels=5))
    results = [compress(path, data, "kernels=2", tune=0, threads=1) for data in (x.split(10), x.double().split(10))]
    assert content(results[0]) == content(results[1])


@needs_onnx_tuning
def test_a_loader_of_another_batch_than_the_files(tmp_path):
    path = save(classifier(batch=4), tmp_path)
    x = torch.from_numpy(smooth(100))
    result = compress(path, x.split(33), "kernels=1", tune=5, threads=1)
    assert result.metrics["run"]["images"] == {"calibration": 80, "held out": 20}
    options = {"holdout": x.split(30), "tune": 0, "threads": 1, "task": "classify"}
    decided = compress(path, x.split(33), "disagree=40", **options).metrics["decided"]
    assert decided["images"] + decided["confirmed"]["images"] == 100


# -- options -----------------------------------------------------------------------------------------------------------


def test_the_first_convolution_too(tmp_path):
    path, data = save(small(channels=(3, 8, 16)), tmp_path), inputs(tmp_path, x=smooth(40))
    reasons = [layer.reason for layer in compress(path, data, "kernels=1", threads=1).plan.layers]
    assert reasons == ["first convolution", ""]
    layers = compress(path, data, "kernels=1", threads=1, first=True).plan.layers
    assert [(layer.reason, layer.counts) for layer in layers] == [("", [1] * 3), ("", [1] * 8)]


REFUSED = {
    "--epochs": (["--epochs", 2], "which can be decomposed and tuned, not trained"),
    "--pt2": (["--pt2"], "which torch.export cannot take"),
    "--weights": (["--weights", "w.pt"], "which holds its weights"),
    "--method": (["--method", "kd"], "which can be decomposed and tuned, not trained"),
    "--hint": (["--hint", "a=b"], "which can be decomposed and tuned, not trained"),
    "--classes": (["--classes", 3], "whose outputs are what they are"),
    "--precision": (["--precision", "bf16"], "which is tuned in fp32"),
}


@pytest.mark.parametrize("flag", REFUSED)
def test_what_does_not_go_with_a_file_is_refused_by_name(place, flag):
    options, reason = REFUSED[flag]
    before = snapshot(place)
    for command in ("compress", "explore"):
        if command == "explore" and flag in ("--epochs", "--pt2", "--method", "--hint"):
            continue
        message = error_of(here(command, *BASE, *options, "--out", "never", cwd=place))
        assert f"{flag} does not go with an .onnx model, {reason}; leave it away" in message
    assert snapshot(place) == before


def test_a_target_that_reads_no_files_is_refused_before_any_work(tmp_path):
    path, data = save(small(), tmp_path), inputs(tmp_path, x=smooth(60))
    seen = []
    for verb, more in ((compress, {"budget": "kernels=2"}), (explore, {})):
        with pytest.raises(InputError, match="target is 'pytorch'; expected one that reads ONNX files"):
            verb(
                path,
                data,
                **more,
                target="pytorch",
                threads=1,
                tune=0,
                out=tmp_path / "out",
                run=Run(lambda what, *_: seen.append(what)),
            )
    assert not [what for what in seen if what.startswith(("moments", "solving"))]


@needs_onnx_tuning
def test_a_graph_can_learn_where_its_tensors_are_elsewhere(place):
    """Nothing of the converted graph stays behind when it moves to a GPU; `meta` tensors refuse those of the CPU."""
    from dk2pnet.networks.open import open_onnx

    network = open_onnx(str(place / "teacher/model.onnx"))
    network.prepare(None, 32, Run())
    assert node(network.graph.proto, network.graph.sites[0].name)
    sites = {site.name: site for site in network.sites() if not site.reason}

    class Samples:
        first = network.example

    learner = network.learner(Samples, sites, Run())
    answers = learner.teacher.to("meta")(learner.example.to("meta"))
    assert answers[0].device.type == "meta"
