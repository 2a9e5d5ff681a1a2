"""A checked ONNX graph: its nodes, constants, multiply-adds, and parts of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper

from dk2pnet.data.arrays import Input
from dk2pnet.errors import InputError

if TYPE_CHECKING:
    from dk2pnet.networks.onnx.sites import OnnxSite

__all__ = [
    "OURS",
    "OnnxGraph",
    "all_graphs",
    "attributes_of",
    "captured",
    "constants_of",
    "graphs_in",
    "input_of",
    "nodes_in",
    "part_of",
    "reads",
]

OURS = ("", "ai.onnx")  # two names of the standard's own domain
# Operators that hold quantised convolutions, which are not decomposed but whose multiply-adds count.
_CONVOLUTIONS = ("Conv", "ConvInteger", "QLinearConv", "FusedConv")
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)
_WEIGHTS = (*_FLOATS, TensorProto.INT8, TensorProto.UINT8)


@dataclass
class OnnxGraph:
    """A checked ONNX file with all its data inside, and its convolutions in the order of the graph."""

    proto: ModelProto
    sites: list[OnnxSite]
    constants: dict[str, TensorProto]

    @property
    def inputs(self) -> list[onnx.ValueInfoProto]:
        """What has to be fed: the graph's inputs without those that have a value of their own."""
        given = {tensor.name for tensor in self.proto.graph.initializer}
        return [value for value in self.proto.graph.input if value.name not in given]

    @property
    def takes(self) -> list[Input]:
        """The same as names, sizes and types; `InputError` where a shape or a type is not declared."""
        return [input_of(value) for value in self.inputs]

    @property
    def outputs(self) -> list[str]:
        """Names of the graph's outputs."""
        return [value.name for value in self.proto.graph.output]

    @property
    def parameters(self) -> int:
        """Numbers in its constants, those that have several names counted once: of floating-point ones, and of
        quantised weights."""
        inner = [tensor for graph in all_graphs(self.proto.graph) for tensor in graph.initializer]
        tensors = {id(tensor): tensor for tensor in (*self.constants.values(), *inner)}.values()
        sizes = (math.prod(t.dims) for t in tensors if t.data_type in (_FLOATS if len(t.dims) < 2 else _WEIGHTS))
        return sum(size for size in sizes if size > 1)

    def counted(self) -> list[NodeProto]:
        """The nodes whose multiply-adds count: convolutions, matrix products, recurrent layers (not in subgraphs)."""
        return [node for node in self.proto.graph.node if _multiplies(node)]

    @property
    def uncounted(self) -> int:
        """How many nodes that multiply lie in subgraphs, which run as often as the data ask for."""
        inside = (each for graph in list(all_graphs(self.proto.graph))[1:] for each in graph.node)
        return sum(_multiplies(node) for node in inside)

    def macs(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """Multiply-adds of one run; `shapes` of the tensors that `counted` nodes read and give."""
        total = 0
        for node in self.counted():
            weight_at = 3 if node.op_type == "QLinearConv" else 1
            read = shapes.get(node.input[0], ())
            weight = shapes.get(node.input[weight_at], ()) if len(node.input) > weight_at else ()
            given = shapes.get(node.output[0], ())
            if node.op_type == "Einsum":
                total += _einsum(node, [shapes.get(name, ()) for name in node.input])
            elif node.op_type in _CONVOLUTIONS:
                total += math.prod(weight) * math.prod(given[2:]) * (given[0] if given else 0)
            elif node.op_type == "ConvTranspose":
                total += math.prod(weight) * math.prod(read[2:]) * (read[0] if read else 0)
            elif node.op_type == "MatMul":
                total += math.prod(given) * (read[-1] if read else 0)
            elif node.op_type == "Gemm":
                transposed = attributes_of(node).get("transA", 0)
                total += math.prod(given) * (read[0 if transposed else -1] if read else 0)
            elif len(read) >= 2:
                total += read[0] * read[1] * (math.prod(weight) + math.prod(shapes.get(node.input[2], ())))
        return total


def _multiplies(node: NodeProto) -> bool:
    products = ("ConvTranspose", "Gemm", "MatMul", "Einsum", "LSTM", "GRU", "RNN")
    if node.domain in OURS:
        return node.op_type in (*_CONVOLUTIONS, *products)
    return node.domain == "com.microsoft" and node.op_type == "FusedConv"


def _einsum(node: NodeProto, shapes: Sequence[Sequence[int]]) -> int:
    """The product of all sizes that its equation names; an ellipsis stands for those of one operand."""
    terms = attributes_of(node).get("equation", b"").decode(errors="replace").replace(" ", "").partition("->")[0]
    sizes: dict[str, int] = {}
    for term, shape in zip(terms.split(","), shapes, strict=False):
        before, dots, after = term.partition("...")
        names = list(before) if dots else list(term)
        open_axes = len(shape) - len(before) - len(after) if dots else 0
        names += [f"...{axis}" for axis in range(open_axes, 0, -1)] + list(after if dots else "")
        for name, size in zip(names, shape, strict=False):
            sizes[name] = max(sizes.get(name, 1), size)
    return math.prod(sizes.values()) if sizes and len(shapes) > 1 else 0


def graphs_in(node: NodeProto) -> Iterator[GraphProto]:
    """The node's own subgraphs."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def nodes_in(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """The nodes and all those in their subgraphs."""
    for node in nodes:
        yield node
        for graph in graphs_in(node):
            yield from nodes_in(graph.node)


def all_graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """The graph and all those inside it."""
    yield graph
    for node in graph.node:
        for inner in graphs_in(node):
            yield from all_graphs(inner)


def captured(node: NodeProto) -> set[str]:
    """Names from outside that the node's subgraphs read."""
    found: set[str] = set()
    for graph in graphs_in(node):
        inside = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
        inside |= {sparse.values.name for sparse in graph.sparse_initializer}
        for inner in graph.node:
            found |= reads(inner) - inside
            inside.update(inner.output)
        found |= {value.name for value in graph.output} - inside
    return found - {""}


def reads(node: NodeProto) -> set[str]:
    """Names of the tensors that the node needs."""
    return ({*node.input} | captured(node)) - {""}


def constants_of(proto: ModelProto) -> dict[str, TensorProto]:
    """Tensors whose value is fixed, by name: initialisers that no caller can replace, Constant nodes, aliases."""
    graph = proto.graph
    # From IR version 4 on an initialiser that is an input too is only a default value.
    replaceable = {value.name for value in graph.input} if proto.ir_version >= 4 else set()
    constants = {tensor.name: tensor for tensor in graph.initializer if tensor.name not in replaceable}
    for node in graph.node:
        if node.domain not in OURS or len(node.output) != 1:
            continue
        if node.op_type == "Constant":
            value = next((attribute.t for attribute in node.attribute if attribute.name == "value"), None)
            if value is not None:
                constants[node.output[0]] = value
        elif node.op_type == "Identity" and len(node.input) == 1 and node.input[0] in constants:
            constants[node.output[0]] = constants[node.input[0]]
    return constants


def attributes_of(node: NodeProto) -> dict[str, Any]:
    """The node's attributes as Python values, tensors and graphs left out."""
    kinds = (AttributeProto.INT, AttributeProto.INTS, AttributeProto.FLOAT, AttributeProto.STRING)
    return {a.name: helper.get_attribute_value(a) for a in node.attribute if a.type in kinds}


def part_of(
    proto: ModelProto,
    outputs: Iterable[str],
    nodes: Iterable[NodeProto] | None = None,
    inputs: Iterable[onnx.ValueInfoProto] | None = None,
    extra: Iterable[TensorProto] = (),
) -> ModelProto:
    """The part of a graph that the tensors `outputs` need, with them as outputs.

    `nodes`, `inputs`, `extra`: in place of the graph's own nodes and inputs, and beside its initialisers.
    """
    wanted = list(dict.fromkeys(outputs))
    graph = proto.graph
    needed = set(wanted)
    chosen = []
    for node in reversed(list(graph.node if nodes is None else nodes)):
        if needed.intersection(node.output):
            chosen.append(node)
            needed |= reads(node)
    part = ModelProto()
    part.ir_version = proto.ir_version
    part.opset_import.extend(proto.opset_import)
    part.functions.extend(proto.functions)
    part.graph.name = graph.name or "graph"
    part.graph.node.extend(reversed(chosen))
    given = {value.name for value in inputs} if inputs is not None else set()
    part.graph.initializer.extend(t for t in (*graph.initializer, *extra) if t.name in needed - given)
    part.graph.sparse_initializer.extend(s for s in graph.sparse_initializer if s.values.name in needed)
    held = {tensor.name for tensor in graph.initializer}
    # An input that is an initialiser here (or a default value) and not needed would have to be fed.
    own = [value for value in graph.input if value.name not in held or value.name in needed]
    part.graph.input.extend(own if inputs is None else inputs)
    if inputs is not None and proto.ir_version < 4:
        weights = part.graph.initializer
        part.graph.input.extend(helper.make_tensor_value_info(w.name, w.data_type, list(w.dims)) for w in weights)
    known = {value.name: value for value in graph.output}
    # ONNX Runtime infers the types of outputs that have none.
    part.graph.output.extend(known.get(name) or onnx.ValueInfoProto(name=name) for name in wanted)
    return part


def input_of(value: onnx.ValueInfoProto) -> Input:
    """What a graph's input takes."""
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        raise InputError(
            f"the graph declares no shape for the input {value.name!r}, which ONNX asks for; write one into the file "
            "(sizes may be left open)"
        )
    sizes = [dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else None for dim in tensor.shape.dim]
    try:
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"the input {value.name!r} is of type {tensor.elem_type}, no tensor that can be fed"
        ) from error
    return Input(value.name, tuple(sizes), dtype)
