"""Puts DK layers in the place of an ONNX graph's convolutions; all else stays as it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor

from dk2pnet.deploy.emit import emit_nodes
from dk2pnet.layer import DKConv2d
from dk2pnet.networks.onnx.graph import OnnxGraph, all_graphs, reads
from dk2pnet.networks.onnx.sites import OnnxSite

__all__ = ["dense_node", "rewrite"]


def rewrite(network: OnnxGraph, layers: Mapping[str, DKConv2d], forms: Mapping[str, str] | None = None) -> ModelProto:
    """The graph with DK layers, in emitted `forms` (``branches`` where it says nothing), in the place of convolutions.

    Each stands where its node stood and gives the tensor that it gave. Weights that nothing reads any more are left
    out; nothing else changes.
    """
    proto = ModelProto()
    proto.CopyFrom(network.proto)
    graph = proto.graph
    replaced = [site for site in network.sites if site.name in layers]
    absorbed = {site.norm.output[0] for site in replaced if site.norm is not None}
    by_output = {site.node.output[0]: site for site in replaced if site.node is not None}
    taken = _names(proto)
    nodes: list[NodeProto] = []
    removed: list[NodeProto] = []
    for node in network.proto.graph.node:
        first = node.output[0] if node.output else ""
        site = by_output.get(first) if node.op_type == "Conv" else None
        if site is None:
            (removed if first in absorbed and node.op_type == "BatchNormalization" else nodes).append(node)
            continue
        form = (forms or {}).get(site.name, "branches")
        new, weights = _emitted(site, layers[site.name], form, taken)
        nodes += new
        removed.append(node)
        graph.initializer.extend(weights)
        if proto.ir_version < 4:  # there, every initialiser is an input too
            graph.input.extend(helper.make_tensor_value_info(w.name, w.data_type, list(w.dims)) for w in weights)
    del graph.node[:]
    graph.node.extend(nodes)
    _sweep(proto, removed)
    return proto


def _emitted(site: OnnxSite, layer: DKConv2d, form: str, taken: set[str]) -> tuple[list[NodeProto], list[TensorProto]]:
    prefix = f"{site.name}/dk_"
    while any(name.startswith(prefix) for name in taken):
        prefix += "_"
    nodes, weights = emit_nodes(layer, form, site.x, site.y, prefix, site.pads or (0, 0, 0, 0))
    assert site.node is not None
    if site.pads is None:  # only the runtime knows the input's size
        for node in nodes:
            for number, attribute in enumerate(node.attribute):
                if attribute.name == "pads":
                    node.attribute[number].CopyFrom(helper.make_attribute("auto_pad", site.auto_pad))
    for node in nodes:
        node.name = f"{prefix}{node.name.removeprefix(prefix)}"
    nodes[-1].name = site.node.name
    return nodes, weights


def _names(proto: ModelProto) -> set[str]:
    """Every name of a tensor or a node."""
    found: set[str] = set()
    for graph in all_graphs(proto.graph):
        found.update(value.name for value in (*graph.input, *graph.output, *graph.value_info))
        found.update(tensor.name for tensor in graph.initializer)
        for node in graph.node:
            found.update((node.name, *node.input, *node.output))
    return found


def _sweep(proto: ModelProto, removed: Sequence[NodeProto]) -> None:
    """Leave out the constants that only removed nodes read, and the notes on tensors that are gone."""
    graph = proto.graph
    read = Counter(name for node in graph.node for name in reads(node))
    read.update(value.name for value in graph.output)
    orphans = {name for node in removed for name in node.input} - read.keys()
    makers = {name: node for node in graph.node for name in node.output}
    gone = {name for node in removed for name in node.output}
    while orphans:
        name = orphans.pop()
        maker = makers.get(name)
        if maker is None:
            gone.add(name)
        elif maker.op_type in ("Constant", "Identity") and len(maker.output) == 1:
            gone.add(name)
            graph.node.remove(maker)
            for source in reads(maker):
                read[source] -= 1
                if read[source] <= 0:
                    orphans.add(source)
    still = {name for node in graph.node for name in node.output}
    gone -= still
    initializers = [tensor for tensor in graph.initializer if tensor.name not in gone]
    dropped = {tensor.name for tensor in graph.initializer} - {tensor.name for tensor in initializers}
    if dropped:
        del graph.initializer[:]
        graph.initializer.extend(initializers)
    # Inputs with a default value stay: somebody may feed them. Older files list their weights as inputs.
    for field, names in ((graph.input, dropped if proto.ir_version < 4 else set()), (graph.value_info, gone)):
        kept = [value for value in field if value.name not in names]
        if len(kept) < len(field):
            del field[:]
            field.extend(kept)


def dense_node(site: OnnxSite, weight: Tensor, bias: Tensor | None, prefix: str) -> tuple[NodeProto, list[TensorProto]]:
    """The site's own node with other numbers (and the batch norm behind it inside)."""
    assert site.node is not None
    node = NodeProto()
    node.CopyFrom(site.node)
    values = {f"{prefix}weight": weight} | ({} if bias is None else {f"{prefix}bias": bias})
    del node.input[1:]
    node.input.extend(values)
    node.output[0] = site.y
    return node, [numpy_helper.from_array(value.detach().float().numpy(), name) for name, value in values.items()]
