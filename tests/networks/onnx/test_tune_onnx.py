"""Tuning of ONNX graphs: the outputs come closer, only DK layers change, and what cannot be done is said."""

from __future__ import annotations

import sys

import numpy as np
import onnx
import pytest
import yaml
from onnx import helper, numpy_helper
from PIL import Image

from dk2pnet.commands import compress as pipeline
from dk2pnet.errors import InputError
from dk2pnet.networks.onnx.learner import rate_for
from dk2pnet.options import CompressOptions
from dk2pnet.run.run import Run
from dk2pnet.students.teacher import Teacher
from dk2pnet.students.tuning import Tuner
from graphs import needs_onnx_tuning, node, save, small, tensor, value, weights

pytestmark = pytest.mark.usefixtures("quick_timing")


def not_tuned(result):
    """All notes but the two about the file and its times, which hang on the machine."""
    of_file = ("layers of dominant kernels run as one dense", "the machine was unsteady")
    return [note for note in result.metrics["notes"] if not any(text in note for text in of_file)]


def smooth(count=160, seed=0):
    """Inputs whose neighbours are alike, as in images."""
    x = weights(count, 3, 9, 9, seed=seed)
    for axis in (2, 3):
        x = (x + np.roll(x, 1, axis) + np.roll(x, -1, axis)) / 2
    return x


def deep():
    """small() with a third convolution, so that one layer's error meets another's."""
    made = small(channels=(3, 8, 12))
    position = list(made.graph.node).index(node(made, "pool"))
    made.graph.node.insert(position, helper.make_node("Conv", ["r2", "w3"], ["c3"], name="three", pads=[1] * 4))
    made.graph.node.insert(position + 1, helper.make_node("Relu", ["c3"], ["r3"], name="relu three"))
    node(made, "pool").input[0] = "r3"
    made.graph.initializer.append(tensor("w3", weights(10, 12, 3, 3, seed=8) / 5))
    made.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 10
    onnx.checker.check_model(made)
    return made


def compress(made, tmp_path, tune, x=None, **options):
    path = save(made, tmp_path)
    np.savez(tmp_path / "inputs.npz", x=smooth() if x is None else x)
    return pipeline.compress(path, str(tmp_path / "inputs.npz"), "kernels=1", threads=1, tune=tune, **options)


def content(result):
    return result.model.SerializeToString()


@needs_onnx_tuning
def test_tuning_brings_the_outputs_closer_and_changes_dk_layers_only(tmp_path):
    made = deep()
    result = compress(made, tmp_path, 60, out=tmp_path / "out")
    stages = result.metrics["stages"]
    assert [stage["name"] for stage in stages] == ["teacher", "closed form", "tuned"]
    assert stages[2]["relative_error"] < 0.9 * stages[1]["relative_error"]
    assert result.metrics["student"]["relative_error"] == stages[2]["relative_error"]
    decision = result.metrics["decisions"][-1]
    assert decision["what"] == "tuning"
    assert decision["kept"]
    assert decision["after"] == pytest.approx((stages[2]["relative_error"] / 100) ** 2, rel=0.01)
    assert not_tuned(result) == []
    kept = {each.name: numpy_helper.to_array(each) for each in result.model.graph.initializer}
    for name in ("w1", "b1"):  # of the first convolution, which is dense
        given = next(numpy_helper.to_array(each) for each in made.graph.initializer if each.name == name)
        np.testing.assert_array_equal(kept[name], given)
    assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["tune"] == 60
    assert "relative error of the outputs" in (tmp_path / "out" / "report.html").read_text()


@needs_onnx_tuning
def test_it_is_automatic_where_it_is_cheap_and_the_same_every_time(tmp_path):
    results = [compress(deep(), tmp_path, None) for _ in range(2)]
    assert [result.metrics["tuning_steps"] for result in results] == [150, 150]
    assert content(results[0]) == content(results[1])


@needs_onnx_tuning
@pytest.mark.parametrize("last", ["convolution", "rearranged"])
def test_a_graph_whose_only_output_is_a_map(tmp_path, last):
    """As those of segmentation and of super-resolution are."""
    made = deep()
    for name in ("relu three", "pool"):
        made.graph.node.remove(node(made, name))
    made.graph.output.pop()
    if last == "convolution":
        node(made, "three").output[0] = "y"
        made.graph.output.append(value("y", "n", 10, "h", "w"))
    else:
        made.graph.node.append(helper.make_node("Transpose", ["c3"], ["y"], perm=[0, 1, 3, 2]))
        made.graph.output.append(value("y", "n", 10, "w", "h"))
    decision = compress(made, tmp_path, None).metrics["decisions"][-1]
    assert (decision["what"], decision["kept"]) == ("tuning", True)


@needs_onnx_tuning
def test_a_time_becomes_steps(tmp_path):
    result = compress(deep(), tmp_path, "1s", out=tmp_path / "out")
    steps = result.metrics["tuning_steps"]
    assert steps > 1
    assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["tune"] == steps


@needs_onnx_tuning
def test_what_does_not_come_closer_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("dk2pnet.networks.onnx.learner.rate_for", lambda error: 10.0)
    result = compress(deep(), tmp_path, 5)
    assert not result.metrics["decisions"][-1]["kept"]
    assert [stage["name"] for stage in result.metrics["stages"]] == ["teacher", "closed form"]
    assert content(result) == content(compress(deep(), tmp_path, 0))


def _step(made, data, tmp_path, **options):
    """The first batch that the graph would be tuned on."""
    options = CompressOptions(tune=5, calibration_images=40, **options)
    teacher = Teacher.open(save(made, tmp_path), str(data), options, Run())
    tuner = Tuner(teacher, Run())
    (x, _), *_ = tuner.source.epoch(0, tuner.options)
    return x


@needs_onnx_tuning
def test_images_of_a_graph_are_augmented_as_those_of_a_module(tmp_path):
    folder, noise = tmp_path / "images", np.random.default_rng(0)
    folder.mkdir()
    for number in range(45):
        Image.fromarray(noise.integers(256, size=(100, 120, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    how = {"input_size": 96, "normalize": "imagenet"}
    assert _step(deep(), folder, tmp_path, **how).shape == (32, 3, 64, 64)
    assert _step(deep(), folder, tmp_path, augment="none", **how).shape == (32, 3, 96, 96)
    assert _step(small(batch=4), folder, tmp_path, **how).shape == (4, 3, 96, 96)  # as many as it asks for
    assert _step(small(size=(96, 96)), folder, tmp_path, **how).shape == (32, 3, 64, 64)


@needs_onnx_tuning
def test_so_are_arrays_that_look_like_large_images(tmp_path):
    for augment, side, seen in ((None, 96, (32, 64)), ("none", 96, (32, 96)), (None, 9, (8, 9))):
        np.savez(tmp_path / "x.npz", x=weights(40, 3, side, side))
        first = _step(deep(), tmp_path / "x.npz", tmp_path, augment=augment)
        assert (len(first), first.shape[3]) == seen


@pytest.mark.parametrize("tune", [0, "0"])
def test_none_is_none(tmp_path, tune):
    result = compress(deep(), tmp_path, tune)
    assert result.metrics["tuning_steps"] == 0
    assert not_tuned(result) == []


@pytest.mark.parametrize("tune", [None, 50])
def test_without_the_extra_there_is_the_closed_form_and_a_sentence(tmp_path, monkeypatch, tune):
    monkeypatch.setitem(sys.modules, "onnx2fx", None)
    result = compress(deep(), tmp_path, tune)
    (note,) = not_tuned(result)
    assert note.startswith("no tuning: the graph cannot be had as a PyTorch module, the extra is not installed")
    assert content(result) == content(compress(deep(), tmp_path, 0))


def test_few_inputs(tmp_path):
    result = compress(deep(), tmp_path, None, smooth(40))
    assert not_tuned(result) == ["no tuning: 40 calibration images are fewer than 100; give more, or --tune 150"]
    with pytest.raises(InputError, match=r"tuning was asked for \(--tune 9\) with 2 image"):
        compress(deep(), tmp_path, 9, smooth(2))
    with pytest.raises(InputError, match="no images"):
        pipeline.compress(
            save(deep(), tmp_path), None, "kernels=1", criterion="weight", input_size=9, threads=1, tune=9
        )
    with pytest.raises(InputError, match="tune is 'soon'; expected a number of steps"):
        compress(deep(), tmp_path, "soon")


def test_the_rate_follows_the_error():
    assert rate_for(1.0) == 1e-2
    assert rate_for(4e-4) == pytest.approx(1e-3)
    assert rate_for(0.0) == 1e-4
