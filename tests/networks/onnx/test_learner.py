"""An ONNX graph as a PyTorch module: the same outputs, with DK layers in it, and graphs that cannot be had."""

import copy
import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from dk2pnet.data.arrays import Feed
from dk2pnet.decompose.solve import solve
from dk2pnet.deploy.runtimes.onnxruntime import run_onnx, session
from dk2pnet.networks.network import NotLearnable
from dk2pnet.networks.onnx.learner import AsTorch
from dk2pnet.networks.onnx.read import read_onnx
from dk2pnet.networks.onnx.rewrite import rewrite
from dk2pnet.networks.onnx.runner import tensors_of
from dk2pnet.networks.onnx.walk import layer_of
from graphs import needs_onnx_tuning, node, save, small, tensor, value, weights

pytestmark = needs_onnx_tuning


def converted(made, tmp_path, outputs=("y",), x=None):
    network = read_onnx(save(made, tmp_path))
    feed = Feed({"x": weights(2, 3, 9, 9, seed=3) if x is None else x})
    expected = tensors_of(network.proto, list(outputs), 1)(feed)
    sites = [site for site in network.sites if not site.reason]
    return AsTorch(network, sites, list(outputs), feed, expected), network, sites


def layers_of(sites, kernels=1):
    found = {}
    for site in sites:
        weight = site.module.weight.detach()
        found[site.name] = layer_of(site, solve(weight, [kernels] * weight.shape[1]))
    return found


def without_names(made):
    for each in made.graph.node:
        each.name = ""
    return made


def with_padding(made, **attributes):
    conv = node(made, "two")
    del conv.attribute[:]
    conv.attribute.extend(helper.make_attribute(key, given) for key, given in attributes.items())
    return made


CASES = {
    "plain": lambda: small(channels=(3, 8, 16)),
    "nodes without names": lambda: without_names(small(channels=(3, 8, 16))),
    "padding on one side": lambda: with_padding(small(channels=(3, 8, 16)), pads=[0, 1, 2, 1], strides=[2, 1]),
    "padding by size": lambda: with_padding(small(channels=(3, 8, 16)), auto_pad="SAME_LOWER", strides=[2, 2]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_student_gives_what_the_rewritten_file_gives(case, tmp_path):
    graph, network, sites = converted(CASES[case](), tmp_path)
    layers = layers_of(sites)
    x = weights(3, 3, 9, 9, seed=8)
    student = graph.student(layers)
    result = rewrite(network, layers, dict.fromkeys(layers, "folded")).SerializeToString()
    with torch.no_grad():
        found, dense = student(torch.from_numpy(x))[0], graph.module(torch.from_numpy(x))[0]
    wanted = run_onnx(session(result, 1), x)[0]
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4, atol=1e-5)
    original = run_onnx(session(network.proto.SerializeToString(), 1), x)[0]
    np.testing.assert_allclose(dense.numpy(), original, rtol=1e-4, atol=1e-5)
    assert not np.allclose(wanted, original, rtol=1e-2)


def test_only_dk_layers_learn_and_their_gradient_is_right(tmp_path):
    graph, _, sites = converted(small(channels=(3, 8, 16)), tmp_path)
    layers = layers_of(sites)
    student = graph.student(layers)
    (path,) = graph.layer_names(layers).values()
    parameters = {name for name, each in student.named_parameters() if each.requires_grad}
    assert parameters == {f"{path}.{part}" for part in ("kernels", "combination", "bias")}
    assert not list(graph.module.parameters())
    kernels = student.get_submodule(path).kernels
    x = torch.from_numpy(weights(2, 3, 9, 9, seed=4))
    student(x)[0].square().sum().backward()
    with torch.no_grad():
        before = float(student(x)[0].double().square().sum())
        kernels[0, 0, 1, 1] += 1e-3
        after = float(student(x)[0].double().square().sum())
    assert (after - before) / 1e-3 == pytest.approx(float(kernels.grad[0, 0, 1, 1]), rel=0.05)
    layer = next(iter(layers.values()))
    assert not torch.equal(layer.kernels, kernels)  # the layers that were given are copied


def test_the_hints_are_the_last_maps_and_the_outputs(tmp_path):
    made = small(channels=(3, 8, 16))
    made.graph.output.append(value("r2", "n", 16, "h", "w"))
    graph, _, sites = converted(made, tmp_path, ("y", "r2"))
    shapes = {}
    for name in graph.hints:
        module = graph.module.get_submodule(name)
        module.register_forward_hook(lambda m, a, out, name=name: shapes.update({name: tuple(out.shape[1:])}))
    graph.module(torch.from_numpy(weights(2, 3, 9, 9)))
    # r2 is both the last map of 9 x 9 behind the convolution and an output, and counts once.
    assert sorted(shapes.values()) == [(16, 1, 1), (16, 9, 9)]


def test_a_number_for_each_image_can_be_a_hint():
    from dk2pnet.networks.onnx.learner import _Flat

    x = torch.tensor([1.0, -torch.inf, 2.0])
    assert torch.equal(_Flat()(x), torch.tensor([1.0, 0.0, 2.0]).view(3, 1, 1, 1))


def integers(made):
    made.graph.node.append(helper.make_node("ArgMax", ["y"], ["class"], axis=1))
    made.graph.output[0].CopyFrom(value("class", "n", 1, 1, 1, kind=TensorProto.INT64))
    return made, ("class",)


def test_what_cannot_be_had_says_why(tmp_path, monkeypatch):
    made, outputs = integers(small(channels=(3, 8, 16)))
    with pytest.raises(NotLearnable, match="'class' holds whole numbers"):
        converted(made, tmp_path, outputs)
    made = small(channels=(3, 8, 16))
    made.graph.node[-1].output[0] = "pooled"
    # An operator of ONNX Runtime that nobody else has.
    made.graph.node.append(helper.make_node("Inverse", ["i"], ["inverse"], domain="com.microsoft"))
    made.graph.node.append(helper.make_node("Identity", ["pooled"], ["y"]))
    made.graph.initializer.append(tensor("i", np.eye(2, dtype=np.float32)))
    made.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    with pytest.raises(NotLearnable, match="onnx2fx cannot convert it"):
        converted(made, tmp_path)
    network = read_onnx(save(small(channels=(3, 8, 16)), tmp_path))
    feed = Feed({"x": weights(2, 3, 9, 9)})
    sites = [site for site in network.sites if not site.reason]
    wrong = {"y": tensors_of(network.proto, ["y"], 1)(feed)["y"] * 1.001}
    with pytest.raises(NotLearnable, match=r"'y' differs from ONNX Runtime's by \d\.\de-0\d"):
        AsTorch(network, sites, ["y"], feed, wrong)
    with pytest.raises(NotLearnable, match="something else than one float input"):
        AsTorch(network, sites, ["y"], Feed({"x": weights(2, 3, 9)}), wrong)
    monkeypatch.setitem(sys.modules, "onnx2fx", None)
    with pytest.raises(NotLearnable, match=r"pip install 'dk2pnet\[onnx-tuning\]'"):
        AsTorch(network, sites, ["y"], feed, wrong)


def test_the_graph_itself_is_left_as_it_was(tmp_path):
    made = small(channels=(3, 8, 16))
    before = copy.deepcopy(made)
    graph, network, sites = converted(made, tmp_path)
    graph.student(layers_of(sites))
    assert network.proto == before
    onnx.checker.check_model(network.proto)
