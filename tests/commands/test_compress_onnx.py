from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from dk2pnet.commands import compress as pipeline
from dk2pnet.deploy.runtimes.onnxruntime import run_onnx, session
from dk2pnet.errors import InputError
from dk2pnet.networks.onnx.network import OnnxNetwork
from graphs import model, node, save, small, tensor, value, weights

pytestmark = pytest.mark.usefixtures("quick_timing")

INPUTS = [value("x", "n", 3, "h", "w")]


def rank_one(made, name="w2"):
    """Give a weight one kernel per input channel, so that kernels=1 is exact."""
    found = next(each for each in made.graph.initializer if each.name == name)
    n, c, height, width = found.dims
    exact = np.einsum("nc,cij->ncij", weights(n, c, seed=5), weights(c, height, width, seed=6)) / 4
    found.CopyFrom(numpy_helper.from_array(exact, name))
    return made


def compress(made, tmp_path, arrays, budget="kernels=1", **options):
    path = save(made, tmp_path)
    np.savez(tmp_path / "inputs.npz", **arrays)
    return pipeline.compress(path, str(tmp_path / "inputs.npz"), budget, threads=1, **options)


def test_one_kernel_where_there_is_one_changes_nothing(tmp_path):
    made = rank_one(small(channels=(3, 8, 16)))
    result = compress(made, tmp_path, {"x": weights(10, 3, 9, 9)})
    student = result.metrics["student"]
    assert [layer.reason for layer in result.plan.layers] == ["first convolution", ""]
    assert result.plan.layers[1].counts == [1] * 8
    assert student["relative_error"] < 0.1
    x = weights(3, 3, 7, 6, seed=9)
    old, new = (run_onnx(session(each.SerializeToString(), 1), x)[0] for each in (made, result.model))
    np.testing.assert_allclose(new, old, rtol=1e-3, atol=1e-3)
    # By hand: 81 positions; the second layer has 8 kernels of 9 numbers and 8 x 16 combinations in the place of 1152.
    assert result.metrics["teacher"]["macs"] == 81 * (27 * 8 + 1152)
    assert student["macs"] == 81 * (27 * 8 + 8 * (9 + 16))
    assert result.metrics["teacher"]["parameters"] == 216 + 8 + 1152 + 16
    assert student["parameters"] == 216 + 8 + 200 + 16


def test_a_graph_that_rounds_to_few_levels(tmp_path, monkeypatch):
    """Rounding errors move some of very many numbers by a whole level."""
    monkeypatch.setattr(
        "dk2pnet.students.latency_budget.fastest_forms", lambda layers, table: dict.fromkeys(layers, "concat")
    )
    made = small()
    del made.graph.output[:], made.graph.node[-1]
    made.graph.initializer.extend([tensor("scale", np.float32(0.02)), tensor("zero", np.uint8(0))])
    made.graph.node.extend(
        [
            helper.make_node("QuantizeLinear", ["r2", "scale", "zero"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
        ]
    )
    made.graph.output.append(value("y", "n", 12, "h", "w"))
    result = compress(
        made, tmp_path, {"x": weights(6, 3, 192, 192)}, budget="kernels=2", rebuild=False, out=tmp_path / "out"
    )
    assert 1e-3 < result.metrics["student"]["onnx_difference"] < 2e-2


def test_a_graph_of_chance_is_refused_at_once(tmp_path):
    made = small()
    made.graph.node[-1].output[0] = "mean"
    made.graph.node.extend(
        [
            helper.make_node("RandomNormalLike", ["mean"], ["noise"]),
            helper.make_node("Add", ["mean", "noise"], ["y"]),
        ]
    )
    with pytest.raises(InputError, match="another output 'y' each time for the same input"):
        compress(made, tmp_path, {"x": weights(10, 3, 9, 9)})


def test_an_input_of_no_declared_shape_is_refused(tmp_path):
    made = small()
    made.graph.input[0].type.tensor_type.ClearField("shape")
    with pytest.raises(InputError, match="declares no shape for the input 'x'"):
        compress(made, tmp_path, {"x": weights(10, 3, 9, 9)})


def test_a_batch_that_is_fixed(tmp_path):
    made = rank_one(small(channels=(3, 8, 16), size=(6, 6), batch=2))
    result = compress(made, tmp_path, {"x": weights(21, 3, 6, 6)}, out=tmp_path / "out")
    # 21 samples: every fifth of them is held out, and what fills no batch of two is left over.
    assert result.metrics["run"]["images"] == {"calibration": 16, "held out": 4}
    assert result.metrics["teacher"]["macs"] == 36 * (27 * 8 + 1152)
    assert result.metrics["run"]["latency"]["batch"] == 2
    with pytest.raises(InputError, match="holds 5 sample"):
        compress(made, tmp_path, {"x": weights(5, 3, 6, 6)})


def test_a_first_axis_that_is_open_but_takes_one_at_a_time(tmp_path):
    made = rank_one(small(channels=(3, 8, 16), size=(6, 6)))
    made.graph.initializer.append(tensor("shape", np.array([1, 16])))
    made.graph.node[-1].output[0] = "pooled"
    made.graph.node.append(helper.make_node("Reshape", ["pooled", "shape"], ["y"]))
    made.graph.output[0].CopyFrom(value("y", 1, 16))
    result = compress(made, tmp_path, {"x": weights(40, 3, 6, 6)})
    assert result.metrics["run"]["images"] == {"calibration": 32, "held out": 8}
    assert result.metrics["student"]["agreement"] == 100.0


def test_no_more_samples_at_once_than_a_quarter_of_the_memory_holds(tmp_path, monkeypatch):
    path = save(small(channels=(3, 8, 16)), tmp_path)
    np.savez(tmp_path / "in.npz", x=weights(20, 3, 9, 9))
    sizes = []
    predict = OnnxNetwork.predict

    def watched(self, batches, *rest):
        sizes.append([len(x) for x, _ in batches])
        return predict(self, batches, *rest)

    monkeypatch.setattr(OnnxNetwork, "predict", watched)
    read = 4 * (3 * 9 * 9 + 8 * 9 * 9) / 2**30  # GiB that the two convolutions read of a sample
    errors = []
    for memory, at_once in ((1.0, 4), (15.9 * read, 3), (read, 1)):
        sizes.clear()
        options = {"memory": memory, "rebuild": False, "tune": 0, "threads": 1}
        found = pipeline.compress(path, str(tmp_path / "in.npz"), "macs=0.7", **options)
        assert max(map(max, sizes)) == at_once
        errors.append(found.metrics["student"]["relative_error"])
    assert errors == pytest.approx(errors[:1] * 3, rel=0.1)  # biases are corrected on fewer samples


def test_a_holdout_of_arrays_is_what_is_held_out(tmp_path):
    np.savez(tmp_path / "other.npz", x=weights(6, 3, 9, 9, seed=8))
    arrays = {"x": weights(20, 3, 9, 9)}
    found = compress(small(channels=(3, 8, 16)), tmp_path, arrays, holdout=str(tmp_path / "other.npz"))
    assert found.metrics["run"]["images"] == {"calibration": 20, "held out": 6}
    for options, said in (
        ({"holdout": "folder"}, "the holdout has to be arrays too"),
        ({"holdout_split": "test[:50%]", "budget": "error=0.1"}, "a holdout split is of images"),
    ):
        with pytest.raises(InputError, match=said):
            compress(small(channels=(3, 8, 16)), tmp_path, arrays, **{"budget": "error=0.1"} | options)


def test_outputs_that_are_all_empty_are_refused(tmp_path):
    made = small(channels=(3, 8, 16))
    made.graph.initializer.extend(tensor(name, np.array([0])) for name in ("zero", "end", "axis"))
    made.graph.node[-1].output[0] = "all"
    made.graph.node.append(helper.make_node("Slice", ["all", "zero", "end", "axis"], ["y"]))
    with pytest.raises(InputError, match="outputs are empty on all held-out samples"):
        compress(made, tmp_path, {"x": weights(20, 3, 9, 9)})


def test_whole_numbers_are_judged_by_what_they_come_from(tmp_path):
    made = rank_one(small(channels=(3, 8, 16)))
    made.graph.node.append(helper.make_node("ArgMax", ["y"], ["class"], axis=1))
    made.graph.output[0].CopyFrom(value("class", "n", 1, 1, 1, kind=TensorProto.INT64))
    result = compress(made, tmp_path, {"x": weights(10, 3, 9, 9)})
    assert list(result.metrics["student"]["relative_errors"]) == ["y"]


def test_weights_alone_need_no_inputs(tmp_path):
    path = save(rank_one(small(channels=(3, 8, 16), size=(6, 6))), tmp_path)
    result = pipeline.compress(path, None, "kernels=1", criterion="weight", threads=1)
    assert result.plan.layers[1].counts == [1] * 8
    assert "relative_error" not in result.metrics["student"]
    x = weights(3, 3, 6, 6, seed=9)
    old, new = (run_onnx(session(each.SerializeToString(), 1), x)[0] for each in (onnx.load(path), result.model))
    np.testing.assert_allclose(new, old, rtol=1e-3, atol=1e-3)
    path = save(small(), tmp_path)
    with pytest.raises(InputError, match=r"size of the input 'x' is left open, float \(\?, 3, \?, \?\)"):
        pipeline.compress(path, None, "kernels=1", criterion="weight", threads=1)
    pipeline.compress(path, None, "kernels=1", criterion="weight", input_size=8, threads=1)


def test_budgets_that_cannot_be_reached_and_graphs_without_anything_to_do(tmp_path):
    arrays = {"x": weights(10, 3, 9, 9)}
    with pytest.raises(InputError, match=r"budget macs=0.01 cannot be reached: .* gives macs=0\.\d+"):
        compress(small(), tmp_path, arrays, "macs=0.01")
    with pytest.raises(InputError, match="no convolution that can be decomposed: first convolution: 1, kept by"):
        compress(small(), tmp_path, arrays, keep=["two"])
    relu = model([helper.make_node("Relu", ["x"], ["y"])], INPUTS, [value("y", "n", 3, "h", "w")], [])
    with pytest.raises(InputError, match="no convolution that can be decomposed: it has none at all"):
        compress(relu, tmp_path, arrays)


def test_a_reconstruction_that_cannot_be_done_is_said_to_be_so(tmp_path):
    """A sequence of tensors lies across the cut between two convolutions."""
    made = rank_one(small(channels=(3, 8, 16)))
    made.graph.node.insert(1, helper.make_node("SequenceConstruct", ["c1", "c1"], ["both"]))
    made.graph.node.append(helper.make_node("ConcatFromSequence", ["both"], ["z"], axis=1))
    made.graph.output.append(value("z", "n", 16, "h", "w"))
    extra = helper.make_node("Conv", ["r2", "w3"], ["c3"], name="three")
    made.graph.node.insert(list(made.graph.node).index(node(made, "pool")), extra)
    node(made, "pool").input[0] = "c3"
    made.graph.initializer.append(tensor("w3", weights(16, 16, 3, 3) / 9))
    onnx.checker.check_model(made)
    result = compress(made, tmp_path, {"x": weights(10, 3, 9, 9)})
    decision = result.metrics["decisions"][0]
    assert "not possible, 'both' is no tensor" in decision["what"]
    assert not decision["kept"]
    assert len(result.metrics["student"]["relative_errors"]) == 2


@pytest.mark.parametrize("whole_numbers", [False, True])
def test_a_graph_that_was_rewritten_wrongly_is_refused(tmp_path, monkeypatch, whole_numbers):
    """Also where its output is the best class: compared is what that comes from, and what the new layers give."""
    made, arrays = small(channels=(3, 8, 16)), {"x": weights(10, 3, 9, 9)}
    if whole_numbers:
        made.graph.node.append(helper.make_node("ArgMax", [made.graph.output[0].name], ["best"], axis=1))
        del made.graph.output[:]
        made.graph.output.append(value("best", "n", 1, "h", "w", kind=TensorProto.INT64))
    good = compress(made, tmp_path, arrays, out=tmp_path / "good")
    assert good.metrics["student"]["onnx_difference"] < 1e-3
    real = OnnxNetwork.final

    def wrong(self, forms):
        result = real(self, forms)
        kernels = next(each for each in result.graph.initializer if len(each.dims) == 4)
        kernels.CopyFrom(numpy_helper.from_array(1.1 * numpy_helper.to_array(kernels), kernels.name))
        return result

    monkeypatch.setattr(OnnxNetwork, "final", wrong)
    with pytest.raises(InputError, match=r"differs by .* was not written"):
        compress(made, tmp_path, arrays, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_multiply_adds_are_those_of_one_image_where_the_batch_is_fixed(tmp_path):
    plans = []
    for batch in ("n", 4):
        made = small(size=(9, 9), batch=batch)
        plans.append(pipeline.compress(save(made, tmp_path), None, "kernels=1", criterion="weight", threads=1).plan)
    assert plans[0].macs_dense == plans[1].macs_dense
    assert [layer.macs for layer in plans[0].layers] == [layer.macs for layer in plans[1].layers]


@pytest.mark.parametrize(
    ("size", "side", "wanted"), [((8, "w"), None, (8, None)), (("h", 8), None, (None, 8)), (("h", "w"), 8, 8)]
)
def test_a_side_that_the_graph_leaves_open_follows_from_the_images(tmp_path, size, side, wanted):
    network = OnnxNetwork.read(save(small(size=size), tmp_path))
    assert network.image_size(side) == (wanted, 3)


def test_lines_of_text_are_not_squashed(tmp_path):
    folder = tmp_path / "lines"
    folder.mkdir()
    for number in range(12):
        pixels = weights(10, 30, 3, seed=number) * 60 + 128
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
    path = save(small(size=(8, "w")), tmp_path)
    result = pipeline.compress(path, str(folder), "macs=0.7", normalize="0.5,0.5,0.5/0.5,0.5,0.5", tune=0, threads=1)
    assert result.plan.input_shape == [3, 8, 24]
