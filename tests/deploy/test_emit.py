from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch import nn

import dk2pnet
from dk2pnet.deploy.emit import BLOCK, EMITTED, branches_of, emit_nodes, plain_layer, with_plain_layers
from dk2pnet.deploy.export import multiplier_convolutions
from dk2pnet.errors import InputError
from dk2pnet.layer import DKConv2d


@st.composite
def layers(draw):
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    width, rows = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    kernel = draw(st.sampled_from([3, (1, 3), (4, 2)]))
    most = draw(st.integers(1, 4))
    total = draw(st.integers(1, most * width))
    counts = []
    for _ in range(groups):  # the same number of kernels in every group
        left, group = total, []
        for place in range(width):
            after = most * (width - place - 1)
            group.append(draw(st.integers(max(0, left - after), min(most, left))))
            left -= group[-1]
        counts += group
    torch.manual_seed(draw(st.integers(0, 99)))
    layer = DKConv2d(
        width * groups,
        rows * groups,
        kernel,
        stride=draw(st.sampled_from([1, 2, (1, 2)])),
        padding=draw(st.sampled_from([0, 1, (0, 2)])),
        dilation=draw(st.sampled_from([1, 2])),
        groups=groups,
        bias=draw(st.booleans()),
        counts=counts,
        form="folded",
    ).eval()
    if draw(st.booleans()):  # as libraries of segmentation change their encoders
        layer.padding, layer.dilation = draw(st.sampled_from([(2, 2), (2, 1), "same"])), (2, 2)
        layer.stride = (1, 1) if layer.padding == "same" else layer.stride
    return layer


@given(layers(), st.sampled_from(EMITTED))
@settings(max_examples=150, deadline=None)
def test_every_form_computes_the_layer(layer, form):
    x = torch.randn(2, layer.in_channels, 11, 12)
    with torch.no_grad():
        torch.testing.assert_close(plain_layer(layer, form)(x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("form", EMITTED)
@pytest.mark.parametrize("counts", [[2, 0, 1, 1], [1] * 4])
def test_plain_layers_are_taken_by_torchscript(form, counts):
    torch.manual_seed(0)
    layer = DKConv2d(4, 8, 3, padding=1, counts=counts).eval()
    x = torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        found = torch.jit.script(plain_layer(layer, form))(x)
        torch.testing.assert_close(found, layer(x), rtol=1e-4, atol=1e-5)


@given(layers(), st.sampled_from(EMITTED))
@settings(max_examples=60, deadline=None)
def test_nodes_compute_the_layer_and_have_no_multiplier(tmp_path_factory, layer, form):
    nodes, weights = emit_nodes(layer, form, "x", "y", "dk.")
    own = {output for node in nodes for output in node.output} - {"y"} | {weight.name for weight in weights}
    assert all(name.startswith("dk.") for name in own)
    assert all(name in own | {"x"} for node in nodes for name in node.input)
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", layer.in_channels, 11, 12])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", layer.out_channels, "h", "w"])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path = tmp_path_factory.mktemp("emit") / "layer.onnx"
    onnx.save(model, path)
    onnx.checker.check_model(str(path))
    running = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x = torch.randn(2, layer.in_channels, 11, 12)
    with torch.no_grad():
        expected = layer(x).numpy()
    np.testing.assert_allclose(running.run(None, {"x": x.numpy()})[0], expected, rtol=1e-3, atol=1e-4)
    if form != "folded" and layer.out_channels > layer.groups:
        assert multiplier_convolutions(path) == []


def test_other_padding_of_an_onnx_node_stands_in():
    layer = DKConv2d(2, 3, 3, counts=2, form="folded")
    nodes, _ = emit_nodes(layer, "branches", "x", "y", "p", pads=[0, 1, 2, 3])
    assert [list(a.ints) for node in nodes for a in node.attribute if a.name == "pads"] == [[0, 1, 2, 3]] * 2


def sizes(layer, form):
    return [(branch.channels is not None, len(branch.kernels)) for branch in branches_of(layer, form)]


def test_which_branches_a_form_has():
    """64 channels with two kernels each, 16 of them with four: 2 * 64 + 2 * 16 = 160 kernels."""
    layer = DKConv2d(64, 8, 3, counts=[4] * 16 + [2] * 48)
    assert sizes(layer, "branches") == [(False, 64), (False, 64), (True, 32)]
    assert sizes(layer, "concat") == sizes(layer, "branches")
    assert sizes(layer, "filled") == [(False, 64)] * 4
    assert sizes(layer, "gathered") == [(True, 160)]


def test_gathered_kernels_are_padded_to_whole_blocks():
    layer = DKConv2d(64, 8, 3, counts=[1] * 40 + [0] * 24)  # 40 of 64 channels: too few to complete with zeros
    (branch,) = branches_of(layer, "branches")
    assert len(branch.kernels) == 48
    assert len(branch.kernels) % BLOCK == 0
    assert not branch.kernels[40:].any()
    assert branches_of(DKConv2d(64, 8, 3, counts=[1] * 60 + [0] * 4), "branches")[0].channels is None


def test_a_shared_layer_stays_shared_and_names_choose_forms():
    layer = DKConv2d(4, 4, 3, padding=1, counts=1)
    net = with_plain_layers(nn.Sequential(layer, layer, DKConv2d(4, 4, 3, counts=2)), {"2": "folded"})
    assert net[0] is net[1]
    assert isinstance(net[2], nn.Conv2d)
    assert isinstance(with_plain_layers(DKConv2d(4, 4, 3), {"": "folded"}), nn.Conv2d)


def test_a_plain_model_is_a_copy_without_dk_layers():
    net = nn.Sequential(DKConv2d(4, 4, 3, counts=2), nn.ReLU(), DKConv2d(4, 4, 3, counts=[2, 2, 0, 1]))
    plain = dk2pnet.plain_model(net, {"0": "folded", "2": "filled"})
    assert not any(isinstance(module, DKConv2d) for module in plain.modules())
    assert isinstance(net[0], DKConv2d)
    x = torch.randn(2, 4, 9, 9)
    torch.testing.assert_close(plain(x), net(x), rtol=1e-4, atol=1e-5)


def test_an_unknown_form_is_refused():
    with pytest.raises(InputError, match="form is 'fast'; expected one of branches"):
        plain_layer(DKConv2d(4, 4, 3), "fast")
