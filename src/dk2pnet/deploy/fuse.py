"""Batch norm folded into the convolutions before it, also where several of them are summed.

Exporters and runtimes fold a batch norm into the one convolution that feeds it, but not into a sum of branches; there
it would stay an operator of its own and keep the activation after it from being fused.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
from onnx import numpy_helper

__all__ = ["fold_batch_norms"]


def fold_batch_norms(model: onnx.ModelProto) -> int:
    """Fold, in place, every BatchNormalization whose input is a convolution or a sum of convolutions; return how many.

    One is left alone where something else reads what would be scaled, or where a weight is no initialiser.
    """
    graph = model.graph
    folded = 0
    for node in [node for node in graph.node if node.op_type == "BatchNormalization"]:
        if _Fold(graph).fold(node):
            folded += 1
    if folded:
        used = Counter(name for node in graph.node for name in node.input)
        outputs = {output.name for output in graph.output}
        kept = [weight for weight in graph.initializer if used[weight.name] or weight.name in outputs]
        if len(kept) < len(graph.initializer) and not _has_subgraphs(graph):
            del graph.initializer[:]
            graph.initializer.extend(kept)
    return folded


class _Fold:
    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.makers = {output: node for node in graph.node for output in node.output}
        self.readers = Counter(name for node in graph.node for name in node.input)
        self.readers.update(output.name for output in graph.output)
        self.weights = {weight.name: weight for weight in graph.initializer}

    def fold(self, norm: onnx.NodeProto) -> bool:
        attributes = {attribute.name: attribute for attribute in norm.attribute}
        training = attributes["training_mode"].i if "training_mode" in attributes else 0
        if len(norm.output) != 1 or training or not all(name in self.weights for name in norm.input[1:]):
            return False
        convolutions = self._convolutions(norm.input[0])
        if not convolutions:
            return False
        gamma, beta, mean, variance = (numpy_helper.to_array(self.weights[name]) for name in norm.input[1:])
        epsilon = attributes["epsilon"].f if "epsilon" in attributes else 1e-5
        scale = gamma.astype(np.float64) / np.sqrt(variance.astype(np.float64) + epsilon)
        shift = beta - mean * scale
        for number, conv in enumerate(convolutions):
            weight = numpy_helper.to_array(self.weights[conv.input[1]])
            conv.input[1] = self._add(f"{conv.input[1]}_folded", (weight * scale.reshape(-1, 1, 1, 1)), weight.dtype)
            bias = np.zeros_like(shift)
            if len(conv.input) == 3:
                bias = numpy_helper.to_array(self.weights[conv.input[2]]) * scale
            if number == 0:
                bias = bias + shift
            if len(conv.input) == 3:
                conv.input[2] = self._add(f"{conv.input[2]}_folded", bias, weight.dtype)
            elif number == 0:
                conv.input.append(self._add(f"{conv.output[0]}_folded_bias", bias, weight.dtype))
        # The maker of the norm's input takes over its output.
        maker = self.makers[norm.input[0]]
        maker.output[list(maker.output).index(norm.input[0])] = norm.output[0]
        self.graph.node.remove(norm)
        return True

    def _convolutions(self, tensor: str) -> list[onnx.NodeProto]:
        """The convolutions whose sum `tensor` is, none where it is something else or read elsewhere."""
        node = self.makers.get(tensor)
        if node is None or self.readers[tensor] != 1:
            return []
        if node.op_type == "Add":
            left, right = (self._convolutions(name) for name in node.input)
            return left + right if left and right else []
        constant = node.op_type == "Conv" and all(name in self.weights for name in node.input[1:])
        return [node] if constant and len(self.weights[node.input[1]].dims) == 4 else []

    def _add(self, name: str, value: np.ndarray, dtype: np.dtype) -> str:
        while name in self.weights:
            name += "_"
        tensor = numpy_helper.from_array(np.ascontiguousarray(value.astype(dtype)), name)
        self.graph.initializer.append(tensor)
        self.weights[name] = tensor
        return name


def _has_subgraphs(graph: onnx.GraphProto) -> bool:
    kinds = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
    return any(attribute.type in kinds for node in graph.node for attribute in node.attribute)
