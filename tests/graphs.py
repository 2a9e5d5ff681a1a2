"""Small ONNX graphs for tests, made node by node."""

from __future__ import annotations

import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

# onnx2fx cannot be installed below these; above them it is among the extras `dev`, and a test without it fails.
needs_onnx_tuning = pytest.mark.skipif(
    sys.version_info < (3, 11) or tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9),
    reason="the extra onnx-tuning needs Python 3.11 and PyTorch 2.9",
)


def weights(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def tensor(name, array):
    return numpy_helper.from_array(np.ascontiguousarray(array), name)


def value(name, *dims, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, list(dims) if dims else None)


def model(nodes, inputs, outputs, initializers, opset=17, ir=8, domains=()):
    graph = helper.make_graph(nodes, "net", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    made = helper.make_model(graph, opset_imports=opsets, producer_name="somebody")
    made.ir_version = ir
    return made


def small(channels=(3, 8, 12), size=("h", "w"), batch="n", opset=17, ir=8, **geometry):
    """x -> conv `one` -> relu -> conv `two` (that of interest, with `geometry`) -> relu -> mean over positions: y."""
    if "auto_pad" not in geometry:
        geometry = {"pads": [1, 1, 1, 1]} | geometry
    groups = geometry.get("group", 1)
    a, b, c = channels
    initializers = [
        tensor("w1", weights(b, a, 3, 3, seed=1)),
        tensor("b1", weights(b, seed=2)),
        tensor("w2", weights(c, b // groups, 3, 3, seed=3) / 5),
        tensor("b2", weights(c, seed=4)),
    ]
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], name="one", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"], name="relu one"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], name="two", **geometry),
        helper.make_node("Relu", ["c2"], ["r2"], name="relu two"),
        helper.make_node("GlobalAveragePool", ["r2"], ["y"], name="pool"),
    ]
    made = model(nodes, [value("x", batch, a, *size)], [value("y", batch, c, 1, 1)], initializers, opset, ir)
    if ir < 4:
        made.graph.input.extend(value(w.name, *w.dims) for w in initializers)
    return made


def save(made, folder, name="model.onnx"):
    path = folder / name
    path.write_bytes(made.SerializeToString())
    return path


def node(made, name):
    return next(each for each in made.graph.node if each.name == name)


def drop_initializer(made, name):
    kept = [each for each in made.graph.initializer if each.name != name]
    found = next(each for each in made.graph.initializer if each.name == name)
    copy = onnx.TensorProto()
    copy.CopyFrom(found)
    del made.graph.initializer[:]
    made.graph.initializer.extend(kept)
    return copy
