from __future__ import annotations

import os

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from dk2pnet.deploy.emit import EMITTED
from dk2pnet.deploy.runtimes.onnxruntime import run_onnx, session
from dk2pnet.errors import InputError
from dk2pnet.layer import DKConv2d
from dk2pnet.networks.onnx.fold import put_in_order
from dk2pnet.networks.onnx.graph import part_of
from dk2pnet.networks.onnx.network import OnnxNetwork
from dk2pnet.networks.onnx.probe import probe
from dk2pnet.networks.onnx.read import read_onnx
from dk2pnet.networks.onnx.rewrite import rewrite
from dk2pnet.run.run import Run
from graphs import drop_initializer, model, node, save, small, tensor, value, weights


def run(made, x):
    return run_onnx(session(made.SerializeToString(), 1), x)


def exact(network, names=("two",)):
    """Layers with as many kernels as it takes to be equal to the convolutions."""
    sites = {site.name: site for site in network.sites}
    return {name: DKConv2d.from_dense(sites[name].module, 9) for name in names}


def reasons(made, tmp_path, **options):
    return {site.name: site.reason for site in read_onnx(save(made, tmp_path), **options).sites}


def images(*sizes, channels=3):
    return [weights(2, channels, *size, seed=9) for size in sizes]


GEOMETRIES = [
    {},
    {"pads": [0, 1, 2, 3]},
    {"pads": [0, 0, 0, 0], "strides": [2, 1], "dilations": [1, 2]},
    {"pads": [2, 2, 2, 2], "dilations": [2, 2], "group": 2},
    {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
    {"auto_pad": "SAME_LOWER", "strides": [2, 2]},
    {"auto_pad": "SAME_LOWER", "strides": [3, 1]},
    {"auto_pad": "SAME_UPPER"},
    {"auto_pad": "VALID"},
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_a_layer_with_all_kernels_leaves_the_outputs_as_they_were(geometry, tmp_path):
    made = small(**geometry)
    network = read_onnx(save(made, tmp_path))
    assert {site.name: site.reason for site in network.sites} == {"one": "first convolution", "two": ""}
    for form in EMITTED:
        new = rewrite(network, exact(network), {"two": form})
        onnx.checker.check_model(new)
        for x in images((9, 12), (10, 7)):  # SAME pads these differently
            np.testing.assert_allclose(run(new, x)[0], run(made, x)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_the_module_reads_what_the_node_reads(geometry, tmp_path):
    made = small(**geometry)
    site = read_onnx(save(made, tmp_path)).sites[1]
    part = session(part_of(made, ["r1", "c2"]).SerializeToString(), 1)
    for x in images((9, 12), (10, 7)):
        read, given = (torch.from_numpy(array) for array in run_onnx(part, x))
        torch.testing.assert_close(site.module(site.padded(read)), given, rtol=1e-4, atol=1e-5)
        site.place(*read.shape[2:])
        assert site.input_size == tuple(site.padded(read).shape[2:])


def test_all_else_in_the_file_stays_as_it_was(tmp_path):
    made = small()
    made.graph.node.append(helper.make_node("Odd", ["r2"], ["z"], name="odd", domain="com.example", level=3))
    made.graph.output.append(value("z"))
    made.opset_import.append(helper.make_opsetid("com.example", 2))
    made.graph.value_info.extend([value("c2", "n", 12, "h", "w"), value("w2", 12, 8, 3, 3)])
    made.graph.doc_string, made.model_version = "notes", 7
    helper.set_model_props(made, {"classes": "cat dog"})
    network = read_onnx(save(made, tmp_path))
    new = rewrite(network, exact(network), {"two": "branches"})
    assert made == network.proto  # not changed in place
    ours = [each for each in new.graph.node if each.name.startswith("two")]
    assert ours[-1].name == "two"
    assert list(ours[-1].output) == ["c2"]
    assert all(each.domain == "" for each in ours)
    # Undo what was to change; nothing else may differ.
    at = [each.name for each in new.graph.node].index(ours[0].name)
    theirs = [each for each in new.graph.node if each not in ours]
    del new.graph.node[:]
    new.graph.node.extend([*theirs[:at], node(made, "two"), *theirs[at:]])
    names = [each.name for each in new.graph.initializer]
    assert "w2" not in names
    assert "b2" not in names
    kept = [each for each in new.graph.initializer if not each.name.startswith("two/")]
    del new.graph.initializer[:]
    new.graph.initializer.extend([*kept, *(each for each in made.graph.initializer if each.name in ("w2", "b2"))])
    assert [each.name for each in new.graph.value_info] == ["c2"]  # "w2" is gone
    new.graph.value_info.append(made.graph.value_info[1])
    assert new == made


def test_weights_in_constant_nodes_and_behind_aliases(tmp_path):
    made = small()
    first, second = drop_initializer(made, "w2"), drop_initializer(made, "b2")
    made.graph.node.insert(0, helper.make_node("Constant", [], ["w2"], name="held", value=first))
    made.graph.node.insert(0, helper.make_node("Identity", ["b0"], ["b2"], name="alias"))
    second.name = "b0"
    made.graph.initializer.append(second)
    network = read_onnx(save(made, tmp_path))
    new = rewrite(network, exact(network))
    x = images((8, 8))[0]
    np.testing.assert_allclose(run(new, x)[0], run(made, x)[0], rtol=1e-4, atol=1e-5)
    assert network.parameters == read_onnx(save(small(), tmp_path)).parameters  # a shared one counts once
    assert {"held", "alias"}.isdisjoint(each.name for each in new.graph.node)
    assert "b0" not in [each.name for each in new.graph.initializer]


def test_a_constant_that_others_read_stays(tmp_path):
    made = small()
    made.graph.node.append(helper.make_node("Identity", ["b2"], ["z"]))
    made.graph.output.append(value("z", 12))
    network = read_onnx(save(made, tmp_path))
    x = images((8, 8))[0]
    np.testing.assert_array_equal(run(rewrite(network, exact(network)), x)[1], weights(12, seed=4))


@pytest.mark.parametrize("ir", [3, 8])
def test_a_batch_norm_behind_is_folded_in_files_old_and_new(ir, tmp_path):
    made = small(ir=ir, opset=8 if ir == 3 else 17)
    numbers = {name: weights(12, seed=n) for n, name in enumerate(("gamma", "beta", "mean"), 20)}
    numbers["variance"] = np.square(weights(12, seed=30)) + 0.5
    made.graph.initializer.extend(tensor(*item) for item in numbers.items())
    if ir == 3:
        made.graph.input.extend(value(name, 12) for name in numbers)
    made.graph.node.insert(3, helper.make_node("BatchNormalization", ["c2", *numbers], ["n2"], name="norm"))
    node(made, "relu two").input[0] = "n2"
    network = read_onnx(save(made, tmp_path))
    new = rewrite(network, exact(network))
    onnx.checker.check_model(new)
    assert "norm" not in [each.name for each in new.graph.node]
    assert "gamma" not in [each.name for each in (*new.graph.input, *new.graph.initializer)]
    assert [each.name for each in network.inputs] == ["x"]
    x = images((8, 8))[0]
    np.testing.assert_allclose(run(new, x)[0], run(made, x)[0], rtol=1e-4, atol=1e-5)


def test_why_convolutions_stay_dense(tmp_path):
    def two(**changes):
        made = small()
        for what, change in changes.items():
            change(made) if callable(change) else setattr(node(made, "two"), what, change)
        return made

    def as_input(made):
        made.graph.input.append(value("w2", 12, 8, 3, 3))

    def computed(made):
        node(made, "two").input[1] = "w3"
        made.graph.node.insert(2, helper.make_node("Sin", ["w2"], ["w3"]))

    def shared(made):
        made.graph.node.append(helper.make_node("Conv", ["r1", "w2"], ["z"], name="three"))

    def bias_computed(made):
        node(made, "two").input[2] = "b3"
        made.graph.node.insert(2, helper.make_node("Sin", ["b2"], ["b3"]))

    def of_weight(array, **geometry):
        def change(made):
            drop_initializer(made, "w2")
            made.graph.initializer.append(tensor("w2", array))
            for key, each in geometry.items():
                node(made, "two").attribute.append(helper.make_attribute(key, each))

        return change

    remedy = "not float: export the network in float32"
    cases = {
        "its weight is an input of the graph": as_input,
        "its weight is computed (Sin)": computed,
        "its weight is shared with three": shared,
        "its bias is computed, or an input of the graph": bias_computed,
        "1-D convolution": of_weight(weights(12, 8, 3)),
        "3-D convolution": of_weight(weights(12, 8, 3, 3, 3)),
        "1x1 convolution": of_weight(weights(12, 8, 1, 1)),
        "depthwise convolution": of_weight(weights(16, 1, 3, 3), group=8),
        f"its weight is float16, {remedy}": of_weight(weights(12, 8, 3, 3).astype(np.float16)),
        f"its weight is double, {remedy}": of_weight(weights(12, 8, 3, 3).astype(np.float64)),
        "its weight is not finite": of_weight(weights(12, 8, 3, 3) * np.float32("nan")),
        "its kernel_shape is not that of its weight": of_weight(weights(12, 8, 3, 3), kernel_shape=[5, 5]),
        "its strides [0, 1] or dilations [1, 1] are not understood": of_weight(weights(12, 8, 3, 3), strides=[0, 1]),
    }
    for reason, change in cases.items():
        assert reasons(two(change=change), tmp_path)["two"] == reason
    assert reasons(small(), tmp_path, first=True) == {"one": "", "two": ""}
    assert reasons(small(), tmp_path, keep=["t*"])["two"] == "kept by --keep t*"
    with pytest.raises(InputError, match="--keep five matches no convolution"):
        reasons(small(), tmp_path, keep=["five"])


def _behind(kind):
    """A network whose second weight and bias stand behind nodes that compute them from constants; and their nodes."""
    made = small()
    weight = numpy_helper.to_array(next(each for each in made.graph.initializer if each.name == "w2"))
    drop_initializer(made, "w2")
    norm = np.sqrt((weight**2).sum((1, 2, 3), keepdims=True))
    held, nodes = {
        "transpose": ({"v": weight.T}, [("Transpose", ["v"], {"perm": [3, 2, 1, 0]})]),
        "reshape": ({"v": weight.ravel(), "s": np.array(weight.shape)}, [("Reshape", ["v", "s"], {})]),
        "half": ({"v": weight.astype(np.float16)}, [("Cast", ["v"], {"to": TensorProto.FLOAT})]),
        "weight norm": (
            {"v": 3 * weight, "g": norm},
            [("ReduceL2", ["v"], {"axes": [1, 2, 3]}), ("Div", ["v", "t0"], {}), ("Mul", ["g", "t1"], {})],
        ),
    }[kind]
    made.graph.initializer.extend(tensor(name, array) for name, array in held.items())
    for number, (op, inputs, attributes) in enumerate(nodes):
        output = "w2" if number == len(nodes) - 1 else f"t{number}"
        made.graph.node.insert(number, helper.make_node(op, inputs, [output], **attributes))
    made.graph.node.insert(0, helper.make_node("Neg", ["b2"], ["b3"]))
    node(made, "two").input[2] = "b3"
    return made


@pytest.mark.parametrize("kind", ["transpose", "reshape", "half", "weight norm"])
def test_weights_that_are_computed_from_constants_are_folded(tmp_path, kind):
    made = _behind(kind)
    network = read_onnx(save(made, tmp_path))
    assert {site.name: site.reason for site in network.sites}["two"] == ""
    assert [each.op_type for each in network.proto.graph.node] == [each.op_type for each in small().graph.node]
    assert {"v", "g", "s", "b2"}.isdisjoint(each.name for each in network.proto.graph.initializer)
    x = images((8, 8))[0]
    np.testing.assert_allclose(run(network.proto, x)[0], run(made, x)[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(run(rewrite(network, exact(network)), x)[0], run(made, x)[0], rtol=1e-3, atol=1e-4)


def test_what_others_read_of_a_folded_weight_stays_and_what_is_too_large_is_not_computed(tmp_path):
    made = _behind("transpose")
    made.graph.node.append(helper.make_node("ReduceSum", ["w2"], ["total"]))
    made.graph.output.append(value("total", *[1] * 4))
    network = read_onnx(save(made, tmp_path))
    assert "Transpose" in [each.op_type for each in network.proto.graph.node]
    x = images((8, 8))[0]
    for old, new in zip(run(made, x), run(network.proto, x), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-4, atol=1e-5)
    made = small()
    node(made, "two").input[1] = "huge"
    long = np.ones((2**20, 1), np.float32)
    made.graph.initializer.extend([tensor("a", long), tensor("b", long.T)])
    made.graph.node.insert(0, helper.make_node("Mul", ["a", "b"], ["huge"]))
    assert reasons(made, tmp_path)["two"] == "its weight is computed (Mul)"


def test_a_value_is_computed_once_however_many_ways_lead_to_it(tmp_path):
    made, name = small(), "w2"
    for level in range(30):  # two ways from each level to the next
        made.graph.node.insert(3 * level, helper.make_node("Neg", [name], [f"p{level}"]))
        made.graph.node.insert(3 * level + 1, helper.make_node("Abs", [name], [f"q{level}"]))
        made.graph.node.insert(3 * level + 2, helper.make_node("Sub", [f"p{level}", f"q{level}"], [f"d{level}"]))
        name = f"d{level}"
    node(made, "two").input[1] = name
    network = read_onnx(save(made, tmp_path))
    assert {site.name: site.reason for site in network.sites}["two"] in ("", "its weight is not finite")


def test_thousands_of_nodes_are_put_in_order_at_once():
    names = ["x", *(f"t{number}" for number in range(20_000))]
    nodes = [helper.make_node("Relu", [a], [b]) for a, b in zip(names, names[1:], strict=False)]
    graph = helper.make_graph(nodes[::-1], "g", [], [])
    assert put_in_order(graph)
    assert [each.output[0] for each in graph.node] == names[1:]


def test_nodes_out_of_order_are_put_in_order_unless_they_go_in_circles(tmp_path):
    made = small()
    nodes = list(made.graph.node)
    expected = run(made, x := images((8, 8))[0])[0]
    del made.graph.node[:]
    made.graph.node.extend(reversed(nodes))
    network = read_onnx(save(made, tmp_path))
    assert [each.output[0] for each in network.proto.graph.node] == [each.output[0] for each in nodes]
    np.testing.assert_allclose(run(network.proto, x)[0], expected, rtol=1e-5)
    node(made, "one").input[0] = "y"
    refused(save(made, tmp_path), "read each other's outputs in a circle")


def test_a_convolution_in_a_subgraph_stays(tmp_path):
    def branch(name):
        inside = [helper.make_node("Conv", ["r1", "w2", "b2"], [f"c {name}"], name=name, pads=[1] * 4)]
        return helper.make_graph(inside, name, [], [value(f"c {name}")])

    made = small()
    made.graph.node.remove(node(made, "two"))
    made.graph.initializer.append(tensor("yes", np.array(True)))
    choose = helper.make_node("If", ["yes"], ["c2"], name="choice", then_branch=branch("a"), else_branch=branch("b"))
    made.graph.node.insert(2, choose)
    assert reasons(made, tmp_path, first=True) == {
        "one": "",
        "a": "inside a subgraph (If)",
        "b": "inside a subgraph (If)",
    }
    network = read_onnx(save(made, tmp_path), first=True)
    x = images((8, 8))[0]
    np.testing.assert_allclose(
        run(rewrite(network, exact(network, ["one"])), x)[0], run(made, x)[0], rtol=1e-4, atol=1e-5
    )


# -- figures ----------------------------------------------------------------------------------------------------------


def figures_of(made, tmp_path):
    """Multiply-adds of one 8 x 8 image, parameters, caveats."""
    network = OnnxNetwork.read(save(made, tmp_path))
    network.prepare(torch.zeros(1, 3, 8, 8), None, Run())
    return network.macs, network.parameters, network.caveats


ONE, TWO = 3 * 8 * 9, 8 * 12 * 9  # weights of the convolutions of `small`


def test_functions_are_counted_and_decomposed(tmp_path):
    """The second convolution and its ReLU as a function of the file."""
    made = small()
    inside = [
        helper.make_node("Conv", ["a", "w", "b"], ["t"], name="inner", pads=[1] * 4),
        helper.make_node("Relu", ["t"], ["y"]),
    ]
    block = helper.make_function("mine", "Block", ["a", "w", "b"], ["y"], inside, [helper.make_opsetid("", 17)])
    made.functions.append(block)
    made.opset_import.append(helper.make_opsetid("mine", 1))
    for name in ("two", "relu two"):
        made.graph.node.remove(node(made, name))
    made.graph.node.insert(2, helper.make_node("Block", ["r1", "w2", "b2"], ["r2"], name="call", domain="mine"))
    assert figures_of(made, tmp_path) == (64 * (ONE + TWO), ONE + 8 + TWO + 12, [])
    found = list(reasons(made, tmp_path, first=True).values())
    assert found == ["", ""]


def test_what_runs_in_a_subgraph_is_not_counted_and_that_is_said(tmp_path):
    inside = [helper.make_node("Conv", ["r1", "w2", "b2"], ["c"], pads=[1] * 4)]
    branch = helper.make_graph(inside, "branch", [], [value("c")])
    made = small()
    made.graph.node.remove(node(made, "two"))
    made.graph.initializer.append(tensor("yes", np.array(True)))
    choose = helper.make_node("If", ["yes"], ["c2"], name="choice", then_branch=branch, else_branch=branch)
    made.graph.node.insert(2, choose)
    macs, _, caveats = figures_of(made, tmp_path)
    assert macs == 64 * ONE
    assert len(caveats) == 1
    assert caveats[0].startswith("2 node(s) that multiply lie in subgraphs")


@pytest.mark.parametrize(
    ("equation", "macs"), [("bchw,dc->bdhw", 12 * 5 * 64), ("...chw,dc->...dhw", 12 * 5 * 64), ("bchw->bc", 0)]
)
def test_einsum_is_counted(tmp_path, equation, macs):
    made = small()
    made.graph.node.remove(node(made, "pool"))
    made.graph.initializer.append(tensor("m", weights(5, 12)))
    read = ["r2", "m"] if "," in equation else ["r2"]
    made.graph.node.append(helper.make_node("Einsum", read, ["y"], name="sum", equation=equation))
    made.graph.output[0].CopyFrom(value("y", "n", "c", "h", "w") if "," in equation else value("y", "n", "c"))
    assert figures_of(made, tmp_path)[0] == 64 * (ONE + TWO) + macs


def test_quantised_weights_are_parameters_too(tmp_path):
    made = small()
    drop_initializer(made, "w2")
    made.graph.initializer.extend(
        [tensor("w8", np.ones((12, 8, 3, 3), np.int8)), tensor("s", np.float32(0.01)), tensor("z", np.int8(0))]
    )
    made.graph.node.insert(0, helper.make_node("DequantizeLinear", ["w8", "s", "z"], ["w2"], name="back"))
    assert figures_of(made, tmp_path)[:2] == (64 * (ONE + TWO), ONE + 8 + TWO + 12)


def test_a_convolution_of_onnx_runtimes_own_counts_and_is_the_first(tmp_path):
    made = small()
    made.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    one = node(made, "one")
    one.op_type, one.domain = "FusedConv", "com.microsoft"
    one.attribute.append(helper.make_attribute("activation", "Relu"))
    assert reasons(made, tmp_path) == {"one": "FusedConv, which is not ONNX's own", "two": ""}
    assert figures_of(made, tmp_path)[0] == 64 * (ONE + TWO)


def test_a_weight_that_a_subgraph_reads_too_stays(tmp_path):
    made = small()
    inside = [helper.make_node("Conv", ["r1", "w2", "b2"], ["c"], pads=[1] * 4)]
    branch = helper.make_graph(inside, "branch", [], [value("c")])
    made.graph.initializer.append(tensor("yes", np.array(True)))
    made.graph.node.insert(3, helper.make_node("If", ["yes"], ["z"], name="if", then_branch=branch, else_branch=branch))
    made.graph.output.append(value("z"))
    assert reasons(made, tmp_path)["two"] == "its weight is shared with if"


def test_names_that_are_taken_are_not_taken_again(tmp_path):
    made = small()
    for name in ("two/dk_feature_0", "two/dk__part_0"):
        made.graph.node.append(helper.make_node("Relu", ["r2"], [name], name=name))
        made.graph.output.append(value(name, "n", 12, "h", "w"))
    network = read_onnx(save(made, tmp_path))
    new = rewrite(network, exact(network))
    onnx.checker.check_model(new)
    assert len(run(new, images((8, 8))[0])) == 3


def test_parameters_and_multiply_adds(tmp_path):
    made = small(size=(6, 6), batch=1)
    made.graph.node.extend(
        [
            helper.make_node("Flatten", ["y"], ["flat"]),
            helper.make_node("Gemm", ["flat", "w3"], ["z"], name="last"),
        ]
    )
    made.graph.initializer.append(tensor("w3", weights(12, 5)))
    network = read_onnx(save(made, tmp_path))
    assert network.parameters == 8 * 27 + 8 + 12 * 72 + 12 + 60
    shapes = {"c1": (1, 8, 6, 6), "c2": (1, 12, 6, 6), "flat": (1, 12), "z": (1, 5)}
    shapes |= {w.name: tuple(w.dims) for w in made.graph.initializer}
    assert network.macs(shapes) == 36 * (8 * 27 + 12 * 72) + 60


@pytest.mark.parametrize(
    ("kind", "shapes", "attributes", "wanted"),
    [
        ("MatMul", {"a": (2, 3, 4), "b": (4, 5), "z": (2, 3, 5)}, {}, 2 * 3 * 5 * 4),
        ("Gemm", {"a": (7, 2), "b": (7, 3), "z": (2, 3)}, {"transA": 1}, 2 * 3 * 7),
        ("Gemm", {"a": (2, 7), "b": (3, 7), "z": (2, 3)}, {"transB": 1}, 2 * 3 * 7),
        (
            "ConvTranspose",
            {"a": (2, 3, 5, 5), "b": (3, 4, 2, 2), "z": (2, 4, 10, 10)},
            {"strides": [2, 2]},
            2 * 48 * 25,
        ),
        ("LSTM", {"a": (3, 2, 4), "b": (1, 20, 4), "c": (1, 20, 5), "z": (3, 1, 2, 5)}, {}, 3 * 2 * 20 * (4 + 5)),
        ("QLinearConv", {"a": (2, 3, 6, 6), "d": (4, 3, 3, 3), "z": (2, 4, 4, 4)}, {}, 2 * 4 * 4 * 4 * 27),
        ("Relu", {"a": (2, 3), "z": (2, 3)}, {}, 0),
    ],
)
def test_multiply_adds_of_every_kind_of_node(tmp_path, kind, shapes, attributes, wanted):
    network = read_onnx(save(small(), tmp_path))
    del network.proto.graph.node[:]
    network.proto.graph.node.append(helper.make_node(kind, list("abcd"), ["z"], **attributes))
    assert network.macs(shapes) == wanted


# -- files that are damaged, or meant to do harm ---------------------------------------------------------------------


def refused(path, sentence, **options):
    with pytest.raises(InputError, match=sentence):
        read_onnx(path, **options)


def test_damaged_files(tmp_path):
    content = small().SerializeToString()
    path = tmp_path / "model.onnx"
    refused(path, "does not exist")
    path.write_bytes(content[: len(content) // 2])
    refused(path, "is no ONNX file, or it is cut off or damaged")
    path.write_bytes(b"")
    refused(path, "holds no graph, or an empty one")
    refused(save(model([], [value("x", 1)], [value("x", 1)], []), tmp_path), "holds no graph, or an empty one")
    made = small()
    drop_initializer(made, "w2")
    refused(save(made, tmp_path), "node 'two' of .* reads 'w2', which neither")
    made = small()
    made.graph.output[0].name = "nowhere"
    refused(save(made, tmp_path), "nothing gives the output 'nowhere'")
    made = small()
    node(made, "relu two").output[0] = "r1"
    refused(save(made, tmp_path), "the tensor 'r1' of .* is given twice")
    refused(save(small(opset=6), tmp_path), "operator set 6; expected 7 or newer")


@pytest.mark.parametrize("text", ["relu two", "Relu", "w2", "c1", "net", "pads", "n"])
def test_names_that_are_no_text(tmp_path, text):
    """Protobuf gives them as bytes, wherever they are."""
    content = small().SerializeToString()
    at = content.index(text.encode())
    path = tmp_path / "model.onnx"
    path.write_bytes(content[:at] + b"\xff" * len(text) + content[at + len(text) :])
    refused(path, r"holds a text that is no UTF-8 \(\w+\.\w+\); the file is damaged")


def test_remarks_in_another_encoding(tmp_path):
    content = small().SerializeToString().replace(b"somebody", "s\xf6mebody".encode("latin-1"))
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    graph = read_onnx(path)
    assert graph.proto.producer_name == "s\ufffdmebody"
    run(rewrite(graph, exact(graph), {}), images((8, 8))[0])


def test_tensors_that_are_not_what_they_declare(tmp_path):
    made = small()
    found = next(each for each in made.graph.initializer if each.name == "w2")
    found.dims[0] = 2**40
    refused(save(made, tmp_path), "tensor 'w2' of .* declares the shape .* but holds 3,456; the file is damaged")
    found.dims[0] = -12
    refused(save(made, tmp_path), "expected no negative sizes")
    found.dims[0] = 12
    found.ClearField("raw_data")
    refused(save(made, tmp_path), "holds 0; the file is damaged")


def outside(made, location, **facts):
    found = next(each for each in made.graph.initializer if each.name == "w2")
    found.ClearField("raw_data")
    found.data_location = TensorProto.EXTERNAL
    for key, each in {"location": location, **facts}.items():
        found.external_data.add(key=key, value=str(each))
    return made


def test_data_beside_the_file_of_more_than_two_gigabytes_is_refused_unread(tmp_path):
    """As one file cannot hold it, though each tensor is small enough."""
    made = small()
    for number, name in enumerate(("w1", "w2")):
        found = next(each for each in made.graph.initializer if each.name == name)
        found.ClearField("raw_data")
        found.data_location = onnx.TensorProto.EXTERNAL
        size = 1_500_000_000
        for key, what in (("location", "data"), ("offset", number * size), ("length", size)):
            found.external_data.add(key=key, value=str(what))
    with open(tmp_path / "data", "wb") as file:
        file.truncate(3_000_000_000)  # takes no place on the disk
    with pytest.raises(InputError, match=r"data beside it have 3,000,\d{3},\d{3} bytes; networks of more than 2 GB"):
        read_onnx(save(made, tmp_path))


def test_one_tensor_of_more_than_two_gigabytes_is_called_that(tmp_path):
    with open(tmp_path / "data", "wb") as file:
        file.truncate(2_400_000_000)  # takes no place on the disk
    made = outside(small(), "data", offset=0, length=2_400_000_000)
    refused(save(made, tmp_path), r"has 2,400,000,000 bytes; networks of more than 2 GB cannot be rewritten")


def test_external_data_is_read_from_the_files_own_folder_only(tmp_path):
    data = weights(12, 8, 3, 3, seed=3) / 5
    folder = tmp_path / "net"
    (folder / "below").mkdir(parents=True)
    (tmp_path / "secret.bin").write_bytes(data.tobytes())
    (folder / "below" / "w.bin").write_bytes(b"1234" + data.tobytes())
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    os.mkfifo(folder / "pipe.bin")
    for location in ("../secret.bin", str(tmp_path / "secret.bin"), "below/../../secret.bin", "link.bin", "", "a\0b"):
        refused(save(outside(small(), location), folder), "outside the folder of the ONNX file, which is not read")
    refused(save(outside(small(), "none.bin"), folder), "cannot be read")
    refused(save(outside(small(), "pipe.bin"), folder), "which is no file")
    refused(save(outside(small(), "below"), folder), "which is no file")
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"  # as a hub's cache has them
    snapshot.mkdir()
    blobs.mkdir()
    (blobs / "two").write_bytes(data.tobytes())
    save(outside(small(), "data.bin"), blobs).rename(blobs / "one")
    (snapshot / "net.onnx").symlink_to(blobs / "one")
    (snapshot / "data.bin").symlink_to(blobs / "two")
    assert np.array_equal(numpy_helper.to_array(read_onnx(snapshot / "net.onnx").constants["w2"]), data)
    for facts in ({"offset": 8}, {"offset": 4, "length": 10**12}, {"offset": -4}, {"length": 12}):
        refused(save(outside(small(), "below/w.bin", **facts), folder), "fetch it again|holds|bytes")
    refused(save(outside(small(), "below/w.bin", offset="four"), folder), "cannot be read")
    network = read_onnx(save(outside(small(), "below/w.bin", offset=4), folder))
    x = images((8, 8))[0]
    np.testing.assert_allclose(run(network.proto, x)[0], run(small(), x)[0], rtol=1e-6)


def test_the_probe_says_what_is_wrong_and_survives_a_crash(tmp_path, monkeypatch):
    from dk2pnet.data.arrays import Feed

    feed = Feed({"x": images((8, 8))[0]})
    probe(small().SerializeToString(), feed, "net")
    made = small()
    made.graph.node.append(helper.make_node("Odd", ["r2"], ["z"], domain="com.example"))
    made.opset_import.append(helper.make_opsetid("com.example", 2))
    with pytest.raises(InputError, match="net cannot be loaded by ONNX Runtime: .*com.example"):
        probe(made.SerializeToString(), feed, "net")
    made = small()
    node(made, "relu two").op_type = "Nothing"
    with pytest.raises(InputError, match="net is not valid ONNX: "):
        probe(made.SerializeToString(), feed, "net")
    with pytest.raises(InputError, match="net cannot be run on the first inputs: "):
        probe(small(channels=(4, 8, 12), batch=1).SerializeToString(), feed, "net")
    huge = small()
    huge.graph.node.append(helper.make_node("ConstantOfShape", ["shape"], ["z"]))
    huge.graph.output.append(value("z", "a", "b"))
    huge.graph.initializer.append(tensor("shape", np.array([2**22, 2**22])))  # 64 TiB
    with pytest.raises(InputError, match="net cannot be|crashes on net"):
        probe(huge.SerializeToString(), feed, "net")
    crash = tmp_path / "crash.py"
    crash.write_text("import os\nos.abort()\n")
    monkeypatch.setattr("dk2pnet.networks.onnx.probe.__file__", str(crash))
    with pytest.raises(InputError, match=r"crashes on net \(exit code -6\)"):
        probe(small().SerializeToString(), feed, "net")
    crash.write_text("import time\ntime.sleep(60)\n")
    with pytest.raises(InputError, match="net did not finish one run within 0.2 s"):
        probe(small().SerializeToString(), feed, "net", seconds=0.2)


def test_modules_are_conv2d(tmp_path):
    site = read_onnx(save(small(), tmp_path)).sites[1]
    assert isinstance(site.module, nn.Conv2d)
    assert site.shape == "12x8x3x3"
