"""Weights that a graph computes from constants become constants; nodes out of order are put in order.

Exporters leave weights behind a Transpose, a Reshape, a cast from half precision, or the norm of a weight that was
divided by it. ONNX Runtime folds these when it loads the file; before that nobody can decompose them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from dk2pnet.networks.onnx.graph import OURS, reads

__all__ = ["fold_weights", "put_in_order"]

# What is computed here: no node of these makes more of its inputs than their shapes, broadcast, hold.
_FOLDED = {
    *("Abs", "Add", "Cast", "Clip", "Concat", "Div", "Exp", "Flatten", "Gather", "Identity", "Mul", "Neg", "Pow"),
    *("Reciprocal", "ReduceL2", "ReduceSum", "ReduceSumSquare", "ReduceMean", "Reshape", "Slice", "Sqrt", "Squeeze"),
    *("Sub", "Transpose", "Unsqueeze"),
}
_MOST = 2**28  # numbers in what is computed
_DEEPEST = 32  # nodes one behind the other


def fold_weights(proto: ModelProto, constants: Mapping[str, TensorProto]) -> None:
    """Replace weights and biases of convolutions that nodes compute from `constants`, and drop nodes that nothing needs
    any more. What cannot be computed stays as it is."""
    graph = proto.graph
    makers = {name: node for node in graph.node for name in node.output if name}
    taken = makers.keys() | {tensor.name for tensor in graph.initializer} | {value.name for value in graph.input}
    found: dict[str, str] = {}  # by tensor, the initialiser in its place
    for node in graph.node:
        if node.op_type != "Conv" or node.domain not in OURS:
            continue
        for place, name in enumerate(node.input):
            if place == 0 or not name or name in constants or name not in makers:
                continue
            if name not in found:
                value = _value(name, constants, makers, proto, 0)
                if value is None:
                    continue
                new = next(text for n in range(len(taken) + 1) if (text := f"{name}/folded{n or ''}") not in taken)
                graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), new))
                found[name] = new
            node.input[place] = found[name]
    if found:
        _drop_unread(graph, set(found))


def put_in_order(graph: GraphProto) -> bool:
    """Every node behind those whose tensors it reads, else as they were; False where some read each other's."""
    given = {name for node in graph.node for name in node.output if name}
    waiting, known, ordered = list(graph.node), set[str](), []
    while waiting:
        ready = []
        for node in waiting:
            if not ((reads(node) & given) - known):
                ordered.append(node)
                known.update(node.output)
            else:
                ready.append(node)
        if len(ready) == len(waiting):
            return False
        waiting = ready
    if ordered != list(graph.node):
        copies = [NodeProto.FromString(node.SerializeToString()) for node in ordered]
        del graph.node[:]
        graph.node.extend(copies)
    return True


# -- inside ------------------------------------------------------------------------------------------------------------


def _value(
    name: str, constants: Mapping[str, TensorProto], makers: Mapping[str, NodeProto], proto: ModelProto, depth: int
) -> np.ndarray | None:
    """The tensor's value; None where it is not known, or would be too large."""
    if not name:
        return None
    if name in constants:
        return numpy_helper.to_array(constants[name])
    node = makers.get(name)
    if node is None or node.op_type not in _FOLDED or node.domain not in OURS or depth > _DEEPEST:
        return None
    values = {each: _value(each, constants, makers, proto, depth + 1) for each in node.input if each}
    arrays = [value for value in values.values() if value is not None]
    if len(arrays) < len(values) or not _is_small(node, arrays):
        return None
    part = helper.make_graph(
        [node],
        "part",
        [_declared(each, value) for each, value in values.items() if value is not None],
        [helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None)],
    )
    model = helper.make_model(part, opset_imports=proto.opset_import)
    try:
        results: Any = ReferenceEvaluator(model).run([name], values)
    except Exception:  # whatever numpy says: the probe says what is wrong with the file
        return None
    return results[0] if isinstance(results[0], np.ndarray) else None


def _declared(name: str, value: np.ndarray) -> Any:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)


def _is_small(node: NodeProto, arrays: list[np.ndarray]) -> bool:
    if node.op_type == "Gather":
        return len(arrays) == 2 and arrays[0].size * arrays[1].size <= _MOST
    if node.op_type in ("Add", "Sub", "Mul", "Div", "Pow"):
        try:
            return math.prod(np.broadcast_shapes(*(array.shape for array in arrays))) <= _MOST
        except ValueError:
            return False
    return sum(array.size for array in arrays) <= _MOST


def _drop_unread(graph: GraphProto, names: set[str]) -> None:
    """Nodes that gave `names`, and all that only they read."""
    kept = {value.name for value in graph.output}
    while names:
        needed = kept.union(*(reads(node) for node in graph.node)) if graph.node else kept
        dead = [node for node in graph.node if set(node.output) & names and not set(node.output) & needed]
        names = {name for node in dead for name in reads(node)}
        for node in dead:
            graph.node.remove(node)
    needed = kept.union(*(reads(node) for node in graph.node))
    for tensor in [each for each in graph.initializer if each.name not in needed]:
        if tensor.name not in {value.name for value in graph.input}:
            graph.initializer.remove(tensor)
