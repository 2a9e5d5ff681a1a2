"""Weights that a graph computes from constants become constants; nodes out of order are put in order.

Exporters leave weights behind a Transpose, a Reshape, a cast from half precision, or the norm of a weight that was
divided by it. ONNX Runtime folds these when it loads the file; before that nobody can decompose them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from heapq import heappop, heappush
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from dk2pnet.networks.onnx.graph import OURS, reads

__all__ = ["fold_weights", "put_in_order"]

# What is computed here: no node of these makes more of its inputs than their shapes, broadcast, hold.
_FOLDED = {
    *("Abs", "Add", "Cast", "Clip", "Concat", "Div", "Exp", "Flatten", "Gather", "Identity", "Mul", "Neg", "Pow"),
    *("Reciprocal", "ReduceL2", "ReduceSum", "ReduceSumSquare", "ReduceMean", "Reshape", "Slice", "Sqrt", "Squeeze"),
    *("Sub", "Transpose", "Unsqueeze"),
}
_MOST = 2**28  # numbers in what is computed
_DEEPEST = 100  # nodes one behind the other


def fold_weights(proto: ModelProto, constants: Mapping[str, TensorProto]) -> None:
    """Replace weights and biases of convolutions that nodes compute from `constants`, and drop nodes that nothing needs
    any more. What cannot be computed stays as it is."""
    graph = proto.graph
    makers = {name: node for node in graph.node for name in node.output if name}
    taken = makers.keys() | {tensor.name for tensor in graph.initializer} | {value.name for value in graph.input}
    values = _Values(proto, constants, makers)
    found: dict[str, str] = {}  # by tensor, the initialiser in its place
    for node in graph.node:
        if node.op_type != "Conv" or node.domain not in OURS:
            continue
        for place, name in enumerate(node.input):
            if place == 0 or not name or name in constants or name not in makers:
                continue
            if name not in found:
                value = values.of(name)
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
    maker = {name: number for number, node in enumerate(graph.node) for name in node.output if name}
    if len(maker) < sum(bool(name) for node in graph.node for name in node.output):
        return True  # one is given twice, which is no matter of order
    needs = [{maker[name] for name in reads(node) if name in maker} for node in graph.node]
    if all(number > max(before, default=-1) for number, before in enumerate(needs)):
        return True
    readers: dict[int, list[int]] = {}
    for number, before in enumerate(needs):
        for other in before:
            readers.setdefault(other, []).append(number)
    waiting = [len(before) for before in needs]
    ready = [number for number, count in enumerate(waiting) if not count]
    ordered = []
    while ready:
        number = heappop(ready)
        ordered.append(NodeProto.FromString(graph.node[number].SerializeToString()))
        for reader in readers.get(number, ()):
            waiting[reader] -= 1
            if not waiting[reader]:
                heappush(ready, reader)
    if len(ordered) < len(needs):
        return False
    del graph.node[:]
    graph.node.extend(ordered)
    return True


# -- inside ------------------------------------------------------------------------------------------------------------


class _Values:
    """Tensors that hang on `constants` alone, each computed once."""

    def __init__(
        self, proto: ModelProto, constants: Mapping[str, TensorProto], makers: Mapping[str, NodeProto]
    ) -> None:
        self.proto, self.constants, self.makers = proto, constants, makers
        self.known: dict[str, np.ndarray | None] = {}

    def of(self, name: str, depth: int = 0) -> np.ndarray | None:
        """The tensor's value; None where it is not known, or would be too large."""
        if name not in self.known:
            constant = self.constants.get(name)
            found = numpy_helper.to_array(constant) if constant is not None else self._computed(name, depth)
            self.known[name] = found
        return self.known[name]

    def _computed(self, name: str, depth: int) -> np.ndarray | None:
        node = self.makers.get(name)
        if node is None or node.op_type not in _FOLDED or node.domain not in OURS or depth > _DEEPEST:
            return None
        values = {each: self.of(each, depth + 1) for each in node.input if each}
        arrays = {each: value for each, value in values.items() if value is not None}
        if len(arrays) < len(values) or not _is_small(node, list(arrays.values())):
            return None
        inputs = [_declared(each, value) for each, value in arrays.items()]
        outputs = [helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None)]
        model = helper.make_model(
            helper.make_graph([node], "part", inputs, outputs), opset_imports=self.proto.opset_import
        )
        from onnx.reference import ReferenceEvaluator  # which takes long to import

        try:
            results: Any = ReferenceEvaluator(model).run([name], arrays)
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
