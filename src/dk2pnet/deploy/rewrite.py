"""ONNX in, ONNX out: finds the convolutions of a graph and puts DK layers in their place; all else stays as it was.

The file is somebody else's. It is checked before anything is done with it: what it refers to must be there, what it
declares must be what it holds, and data outside its folder is not read.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from dk2pnet.convert import Convolution
from dk2pnet.deploy.emit import emit_nodes
from dk2pnet.errors import InputError
from dk2pnet.layer import DKConv2d

__all__ = ["OnnxConvolution", "OnnxNetwork", "dense_node", "part_of", "read_onnx", "reads", "rewrite"]

_OURS = ("", "ai.onnx")  # two names of the standard's own domain
_OPSET = 7  # the oldest that ONNX Runtime promises to run
_LARGEST = 2**31 - 1  # a protobuf cannot be larger
_SAME = ("SAME_UPPER", "SAME_LOWER")
# Operators that hold quantised convolutions, which are not decomposed but whose multiply-adds count.
_CONVOLUTIONS = ("Conv", "ConvInteger", "QLinearConv")


@dataclass
class OnnxConvolution(Convolution):
    """A Conv node. Where it can be decomposed, `module` is an `nn.Conv2d` of the same weights and geometry.

    `x`, `y`: names of the tensors it reads and gives. `pads` (top, left, bottom, right), or None where the padding
    depends on the input's size (`auto_pad` says how). `outside`: whether the padding is not part of `module`, which
    PyTorch cannot express; `padded` applies it. `norm`: the batch norm behind it, folded into the weights.
    """

    node: NodeProto | None = None
    x: str = ""
    y: str = ""
    pads: tuple[int, int, int, int] | None = (0, 0, 0, 0)
    auto_pad: str = "NOTSET"
    outside: bool = False
    norm: NodeProto | None = None

    @property
    def shape(self) -> str:
        """As for a PyTorch model; "?" where the weight is not known before the graph runs."""
        return "?" if isinstance(self.module, _Unknown) else super().shape

    def pads_at(self, height: int, width: int) -> tuple[int, int, int, int]:
        """top, left, bottom, right for an input of this size."""
        if self.pads is not None:
            return self.pads
        conv = self.module
        assert isinstance(conv, nn.Conv2d)
        before, after = [], []
        for size, kernel, stride, dilation in zip(
            (height, width), conv.kernel_size, conv.stride, conv.dilation, strict=True
        ):
            total = max((math.ceil(size / stride) - 1) * stride + dilation * (kernel - 1) + 1 - size, 0)
            less, more = total // 2, total - total // 2
            before.append(less if self.auto_pad == "SAME_UPPER" else more)
            after.append(more if self.auto_pad == "SAME_UPPER" else less)
        return before[0], before[1], after[0], after[1]

    def padded(self, x: Tensor) -> Tensor:
        """``x (B, C, H, W)`` as `module` reads it."""
        if not self.outside:
            return x
        top, left, bottom, right = self.pads_at(x.shape[2], x.shape[3])
        return nn.functional.pad(x, (left, right, top, bottom))

    def place(self, height: int, width: int) -> None:
        """Note the size of the input, as `module` reads it."""
        top, left, bottom, right = self.pads_at(height, width) if self.outside else (0, 0, 0, 0)
        self.input_size = (height + top + bottom, width + left + right)


class _Unknown(nn.Module):
    """Stands for a convolution whose weight is not known before the graph runs."""

    stride: tuple[int, ...] = (1,)
    groups = 1

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.empty(0)


@dataclass
class OnnxNetwork:
    """A checked ONNX file with all its data inside, and its convolutions in the order of the graph."""

    proto: ModelProto
    sites: list[OnnxConvolution]
    constants: dict[str, TensorProto]

    @property
    def inputs(self) -> list[onnx.ValueInfoProto]:
        """What has to be fed: the graph's inputs without those that have a value of their own."""
        given = {tensor.name for tensor in self.proto.graph.initializer}
        return [value for value in self.proto.graph.input if value.name not in given]

    @property
    def outputs(self) -> list[str]:
        """Names of the graph's outputs."""
        return [value.name for value in self.proto.graph.output]

    @property
    def parameters(self) -> int:
        """Numbers in its floating-point constants, those that have several names counted once."""
        kinds = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)
        tensors = {id(tensor): tensor for tensor in self.constants.values()}.values()
        sizes = (math.prod(tensor.dims) for tensor in tensors if tensor.data_type in kinds)
        return sum(size for size in sizes if size > 1)

    def counted(self) -> list[NodeProto]:
        """The nodes whose multiply-adds count: convolutions, matrix products, recurrent layers (not in subgraphs)."""
        kinds = (*_CONVOLUTIONS, "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "RNN")
        return [node for node in self.proto.graph.node if node.op_type in kinds and node.domain in _OURS]

    def macs(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """Multiply-adds of one run; `shapes` of the tensors that `counted` nodes read and give."""
        total = 0
        for node in self.counted():
            weight_at = 3 if node.op_type == "QLinearConv" else 1
            read, weight = shapes.get(node.input[0], ()), shapes.get(node.input[weight_at], ())
            given = shapes.get(node.output[0], ())
            if node.op_type in _CONVOLUTIONS:
                total += math.prod(weight) * math.prod(given[2:]) * (given[0] if given else 0)
            elif node.op_type == "ConvTranspose":
                total += math.prod(weight) * math.prod(read[2:]) * (read[0] if read else 0)
            elif node.op_type == "MatMul":
                total += math.prod(given) * (read[-1] if read else 0)
            elif node.op_type == "Gemm":
                transposed = _attributes(node).get("transA", 0)
                total += math.prod(given) * (read[0 if transposed else -1] if read else 0)
            elif len(read) >= 2:
                total += read[0] * read[1] * (math.prod(weight) + math.prod(shapes.get(node.input[2], ())))
        return total


# -- reading -----------------------------------------------------------------------------------------------------------


def read_onnx(path: str | Path, keep: Iterable[str] = (), first: bool = False) -> OnnxNetwork:
    """Read and check an ONNX file, and say of every convolution why it stays dense ("" if it can be decomposed).

    `keep`, `first` as in `find_convolutions`. The result holds external data, so that it does not depend on other
    files.

    Raises
    ------
    InputError
        When the file is damaged, contradicts itself, or refers to data outside its folder.
    """
    path = Path(path)
    proto = _parse(path)
    places = [(tensor, *_external(tensor, path)) for tensor in _tensors(proto) if _is_external(tensor)]
    total = path.stat().st_size + sum(length for *_, length in places)
    if total > _LARGEST:
        raise InputError(
            f"{path} and the data beside it have {total:,} bytes; networks of more than 2 GB cannot be rewritten"
        )
    for tensor, found, offset, length in places:
        with open(found, "rb") as file:
            file.seek(offset)
            tensor.raw_data = file.read(length)
        tensor.ClearField("external_data")
        tensor.data_location = TensorProto.DEFAULT
    for tensor in _tensors(proto):
        _check_tensor(tensor, path)
    _check_graph(proto, path)
    constants = _constants(proto)
    sites = _sites(proto, constants)
    _apply_keep(sites, keep, first, path)
    return OnnxNetwork(proto, sites, constants)


def _parse(path: Path) -> ModelProto:
    try:
        if not path.is_file():
            raise InputError(f"{path} does not exist; expected an ONNX file")
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); expected an ONNX file") from error
    if len(content) > _LARGEST:
        raise InputError(f"{path} has {len(content):,} bytes; an ONNX file cannot have more than 2 GB")
    proto = ModelProto()
    try:
        proto.ParseFromString(content)
    except Exception as error:
        raise InputError(f"{path} is no ONNX file, or it is cut off or damaged; expected a whole ONNX file") from error
    if not proto.HasField("graph") or not proto.graph.node:
        raise InputError(f"{path} holds no graph, or an empty one; expected an ONNX file with a network")
    opset = next((entry.version for entry in proto.opset_import if entry.domain in _OURS), 0)
    if opset < _OPSET:
        raise InputError(f"{path} has operator set {opset}; expected {_OPSET} or newer: convert it with onnx")
    return proto


def _graphs_in(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _nodes(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """The nodes and all those in their subgraphs."""
    for node in nodes:
        yield node
        for graph in _graphs_in(node):
            yield from _nodes(graph.node)


def _all_graphs(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for node in graph.node:
        for inner in _graphs_in(node):
            yield from _all_graphs(inner)


def _tensors(proto: ModelProto) -> Iterator[TensorProto]:
    """Every tensor that the file holds, wherever."""
    graphs = [proto.graph]
    for training in proto.training_info:
        graphs += [training.initialization, training.algorithm]
    nodes = [node for function in proto.functions for node in function.node]
    for top in graphs:
        for graph in _all_graphs(top):
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield sparse.values
                yield sparse.indices
            nodes += graph.node
    for node in _nodes(nodes):
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for sparse in (*([attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []),):
                yield sparse.values
                yield sparse.indices


def _is_external(tensor: TensorProto) -> bool:
    return tensor.data_location == TensorProto.EXTERNAL


def _external(tensor: TensorProto, path: Path) -> tuple[str, int, int]:
    """File, offset and length of data outside the ONNX file. Only files in the folder of the ONNX file are read.

    Where that is a link, as in a hub's cache, its data may lie in the folder that it leads to, too.
    """
    facts = {entry.key: entry.value for entry in tensor.external_data}
    location = facts.get("location", "")
    what = f"tensor {tensor.name!r} of {path} has its data in {location!r}"
    folder = os.path.realpath(path.parent)
    # realpath, so that no link leads out either; no path holds a null byte.
    found = os.path.realpath(os.path.join(folder, location.replace("\0", "")))
    inside = location and "\0" not in location and not os.path.isabs(location)
    places = (folder, os.path.dirname(os.path.realpath(path)))
    if not inside or not any(Path(found).is_relative_to(place) for place in places):
        raise InputError(
            f"{what}, outside the folder of the ONNX file, which is not read; put the data beside the file"
        )
    if os.path.exists(found) and not os.path.isfile(found):
        raise InputError(f"{what}, which is no file; put the data beside the file")
    try:
        size = os.path.getsize(found)
        offset = int(facts.get("offset", 0))
        length = int(facts.get("length", size - offset))
    except (OSError, ValueError) as error:
        raise InputError(f"{what}, which cannot be read ({error}); put the data beside the file") from error
    if offset < 0 or length < 0 or offset + length > size or length > _LARGEST:
        raise InputError(f"{what} from byte {offset} on, {length} bytes, but that file has {size}; fetch it again")
    return found, offset, length


# Where the numbers of a type stand when they are not raw, and how many of them make one element.
_FIELDS = {
    TensorProto.FLOAT: ("float_data", 1),
    TensorProto.DOUBLE: ("double_data", 1),
    TensorProto.COMPLEX64: ("float_data", 2),
    TensorProto.COMPLEX128: ("double_data", 2),
    TensorProto.INT64: ("int64_data", 1),
    TensorProto.UINT64: ("uint64_data", 1),
    TensorProto.UINT32: ("uint64_data", 1),
    **dict.fromkeys(
        (
            TensorProto.INT8,
            TensorProto.UINT8,
            TensorProto.INT16,
            TensorProto.UINT16,
            TensorProto.INT32,
            TensorProto.BOOL,
            TensorProto.FLOAT16,
            TensorProto.BFLOAT16,
        ),
        ("int32_data", 1),
    ),
}


def _check_tensor(tensor: TensorProto, path: Path) -> None:
    """What a tensor declares must be what it holds: nothing is allocated on the word of the file."""
    dims = list(tensor.dims)
    what = f"tensor {tensor.name!r} of {path} declares the shape {tuple(dims)}"
    if any(dim < 0 for dim in dims):
        raise InputError(f"{what}; expected no negative sizes: the file is damaged")
    elements = math.prod(dims)
    if tensor.data_type == TensorProto.STRING:
        held, expected = len(tensor.string_data), elements
    elif tensor.data_type not in _FIELDS:
        return  # packed or newer types, which are only copied
    elif tensor.HasField("raw_data"):
        # bfloat16 has no type in NumPy; both 16-bit floats take two bytes.
        itemsize = 2 if tensor.data_type == TensorProto.BFLOAT16 else _itemsize(tensor.data_type)
        held, expected = len(tensor.raw_data), elements * itemsize
    else:
        field, times = _FIELDS[tensor.data_type]
        held, expected = len(getattr(tensor, field)), elements * times
    if held != expected:
        raise InputError(f"{what}, which takes {expected:,} numbers or bytes, but holds {held:,}; the file is damaged")


def _itemsize(data_type: int) -> int:
    return np.dtype(helper.tensor_dtype_to_np_dtype(data_type)).itemsize


def _check_graph(proto: ModelProto, path: Path) -> None:
    """Every tensor that a node reads must be there before it, and given once."""
    graph = proto.graph
    known = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    known |= {sparse.values.name for sparse in graph.sparse_initializer} | {""}
    for node in graph.node:
        for name in reads(node):
            if name not in known:
                raise InputError(
                    f"node {node.name or node.op_type!r} of {path} reads {name!r}, which neither an input, nor an "
                    "initializer, nor a node before it gives; the file is damaged"
                )
        for name in node.output:
            if name and name in known:
                raise InputError(f"the tensor {name!r} of {path} is given twice; the file is damaged")
            known.add(name)
    for value in graph.output:
        if value.name not in known:
            raise InputError(f"nothing gives the output {value.name!r} of {path}; the file is damaged")


def captured(node: NodeProto) -> set[str]:
    """Names from outside that the node's subgraphs read."""
    found: set[str] = set()
    for graph in _graphs_in(node):
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


def _constants(proto: ModelProto) -> dict[str, TensorProto]:
    """Tensors whose value is fixed, by name: initialisers that no caller can replace, Constant nodes, aliases."""
    graph = proto.graph
    # From IR version 4 on an initialiser that is an input too is only a default value.
    replaceable = {value.name for value in graph.input} if proto.ir_version >= 4 else set()
    constants = {tensor.name: tensor for tensor in graph.initializer if tensor.name not in replaceable}
    for node in graph.node:
        if node.domain not in _OURS or len(node.output) != 1:
            continue
        if node.op_type == "Constant":
            value = next((attribute.t for attribute in node.attribute if attribute.name == "value"), None)
            if value is not None:
                constants[node.output[0]] = value
        elif node.op_type == "Identity" and len(node.input) == 1 and node.input[0] in constants:
            constants[node.output[0]] = constants[node.input[0]]
    return constants


# -- convolutions ------------------------------------------------------------------------------------------------------


class _Stays(Exception):
    """Why a convolution stays dense."""


def _sites(proto: ModelProto, constants: Mapping[str, TensorProto]) -> list[OnnxConvolution]:
    graph = proto.graph
    makers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in reads(node):
            readers.setdefault(name, []).append(node)
    holders: dict[int, list[str]] = {}  # by weight: the nodes that read it, under whatever alias
    for node in graph.node:
        for name in set(node.input) & constants.keys():
            if node.op_type != "Identity":
                holders.setdefault(id(constants[name]), []).append(_name(node))
    outputs = {value.name for value in graph.output}
    inputs = {value.name for value in graph.input}
    sites: list[OnnxConvolution] = []
    for node in graph.node:
        if node.op_type in ("ConvInteger", "QLinearConv") and node.domain in _OURS:
            sites.append(OnnxConvolution(_name(node), _Unknown(), "quantised convolution", node=node))
        if node.op_type != "Conv" or node.domain not in _OURS:
            for inner in _nodes(each for graph_ in _graphs_in(node) for each in graph_.node):
                if inner.op_type == "Conv":
                    sites.append(OnnxConvolution(_name(inner), _Unknown(), f"inside a subgraph ({node.op_type})"))
            continue
        if len(node.input) < 2 or len(node.output) != 1:
            continue  # the checker will refuse it
        site = OnnxConvolution(_name(node), _Unknown(), node=node, x=node.input[0], y=node.output[0])
        try:
            _describe(site, constants, makers, inputs, holders)
        except _Stays as reason:
            site.reason = str(reason)
        except (TypeError, ValueError, AttributeError, RuntimeError) as error:  # attributes of the wrong type
            site.reason = f"it is not understood ({error})"
        if not site.reason:
            _absorb_norm(site, readers, outputs, constants)
        sites.append(site)
    seen = Counter[str]()
    for site in sites:  # nodes need no names, and names need not be unique
        seen[site.name] += 1
        if seen[site.name] > 1:
            site.name = f"{site.name} ({seen[site.name]})"
    return sites


def _name(node: NodeProto) -> str:
    return node.name or next((name for name in node.output if name), node.op_type)


def _attributes(node: NodeProto) -> dict[str, Any]:
    kinds = (AttributeProto.INT, AttributeProto.INTS, AttributeProto.FLOAT, AttributeProto.STRING)
    return {a.name: helper.get_attribute_value(a) for a in node.attribute if a.type in kinds}


def _describe(
    site: OnnxConvolution,
    constants: Mapping[str, TensorProto],
    makers: Mapping[str, NodeProto],
    inputs: set[str],
    holders: Mapping[int, list[str]],
) -> None:
    """Fill in the module and the padding; `_Stays` says what speaks against a decomposition."""
    node = site.node
    assert node is not None
    name = node.input[1] if len(node.input) > 1 else ""
    if name not in constants:
        if name in inputs:
            raise _Stays("its weight is an input of the graph")
        maker = makers.get(name)
        if maker is None:
            raise _Stays("its weight is sparse")
        raise _Stays(f"its weight is computed ({maker.op_type})")
    tensor = constants[name]
    dims = list(tensor.dims)
    attributes = _attributes(node)
    groups = attributes.get("group", 1)
    spatial = len(dims) - 2
    module = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}.get(spatial)
    if module is None or min(dims) < 1 or groups < 1 or dims[0] % groups:
        raise _Stays(f"a weight of shape {tuple(dims)} and {groups} groups are not understood")
    strides, dilations = (list(attributes.get(key, [1] * spatial)) for key in ("strides", "dilations"))
    if len(strides) != spatial or len(dilations) != spatial or min(strides + dilations) < 1:
        raise _Stays(f"its strides {strides} or dilations {dilations} are not understood")
    if list(attributes.get("kernel_shape", dims[2:])) != dims[2:]:
        raise _Stays("its kernel_shape is not that of its weight")
    conv = module(dims[1] * groups, dims[0], dims[2:], strides, 0, dilations, groups, False, device="meta")  # type: ignore[arg-type]
    site.module = conv
    if not isinstance(conv, nn.Conv2d):
        raise _Stays(f"{spatial}-D convolution")
    if dims[2:] == [1, 1]:
        raise _Stays("1x1 convolution")
    if dims[1] == 1 and groups > 1:
        raise _Stays("depthwise convolution")
    if tensor.data_type != TensorProto.FLOAT:
        raise _Stays(f"its weight is {TensorProto.DataType.Name(tensor.data_type).lower()}, not float")
    others = [holder for holder in holders[id(tensor)] if holder != site.name]
    if len(holders[id(tensor)]) > 1:
        raise _Stays(f"its weight is shared with {others[0] if others else 'a node of the same name'}")
    weight = torch.from_numpy(numpy_helper.to_array(tensor).copy())
    if not bool(torch.isfinite(weight).all()):
        raise _Stays("its weight is not finite")
    bias = _bias(node, constants, dims[0])
    _take_padding(site, attributes, strides, dims, dilations)
    pads = site.pads
    symmetric = pads is not None and pads[:2] == pads[2:]
    site.outside = not symmetric
    conv = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        tuple(dims[2:]),  # type: ignore[arg-type]
        tuple(strides),  # type: ignore[arg-type]
        tuple(pads[:2]) if pads is not None and symmetric else 0,  # type: ignore[arg-type]
        tuple(dilations),  # type: ignore[arg-type]
        groups,
        bias is not None,
    )
    conv.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        conv.bias = nn.Parameter(bias, requires_grad=False)
    site.module = conv.eval()


def _bias(node: NodeProto, constants: Mapping[str, TensorProto], outputs: int) -> Tensor | None:
    if len(node.input) < 3 or not node.input[2]:
        return None
    tensor = constants.get(node.input[2])
    if tensor is None:
        raise _Stays("its bias is computed, or an input of the graph")
    if tensor.data_type != TensorProto.FLOAT or list(tensor.dims) != [outputs]:
        raise _Stays(f"its bias has the shape {tuple(tensor.dims)} or is not float")
    return torch.from_numpy(numpy_helper.to_array(tensor).copy())


def _take_padding(
    site: OnnxConvolution, attributes: Mapping[str, Any], strides: list[int], dims: list[int], dilations: list[int]
) -> None:
    automatic = attributes.get("auto_pad", b"NOTSET").decode(errors="replace") or "NOTSET"
    if automatic in _SAME:
        site.auto_pad, site.pads = automatic, None
        if strides == [1, 1]:  # then the padding is the same for inputs of every size
            total = [dilation * (kernel - 1) for kernel, dilation in zip(dims[2:], dilations, strict=True)]
            less, more = [t // 2 for t in total], [t - t // 2 for t in total]
            before, after = (less, more) if automatic == "SAME_UPPER" else (more, less)
            site.pads = before[0], before[1], after[0], after[1]
    elif automatic == "NOTSET":
        pads = list(attributes.get("pads", [0] * 4))
        if len(pads) != 4 or min(pads) < 0:
            raise _Stays(f"its pads {pads} are not understood")
        site.pads = pads[0], pads[1], pads[2], pads[3]
    elif automatic != "VALID":
        raise _Stays(f"its auto_pad {automatic!r} is not understood")


def _absorb_norm(
    site: OnnxConvolution,
    readers: Mapping[str, list[NodeProto]],
    outputs: set[str],
    constants: Mapping[str, TensorProto],
) -> None:
    """Fold the batch norm behind a convolution into it: behind a sum of branches no runtime would."""
    followers = readers.get(site.y, [])
    if len(followers) != 1 or site.y in outputs or followers[0].op_type != "BatchNormalization":
        return
    norm = followers[0]
    attributes = _attributes(norm)
    constant = all(name in constants and constants[name].data_type == TensorProto.FLOAT for name in norm.input[1:])
    if norm.domain not in _OURS or len(norm.input) != 5 or len([name for name in norm.output if name]) != 1:
        return
    # Before operator set 9 `spatial` = 0 meant one mean per position.
    if (
        not constant
        or norm.input[0] != site.y
        or attributes.get("training_mode", 0)
        or not attributes.get("spatial", 1)
    ):
        return
    conv = site.module
    assert isinstance(conv, nn.Conv2d)
    gamma, beta, mean, variance = (numpy_helper.to_array(constants[name]).astype(np.float64) for name in norm.input[1:])
    if any(array.shape != (conv.out_channels,) for array in (gamma, beta, mean, variance)):
        return
    scale = gamma / np.sqrt(variance + attributes.get("epsilon", 1e-5))
    bias = 0.0 if conv.bias is None else conv.bias.double().numpy()
    shift = beta + (bias - mean) * scale
    if not (np.isfinite(scale).all() and np.isfinite(shift).all()):
        return
    weight = conv.weight.double() * torch.from_numpy(scale).view(-1, 1, 1, 1)
    conv.weight = nn.Parameter(weight.float(), requires_grad=False)
    conv.bias = nn.Parameter(torch.from_numpy(shift).float(), requires_grad=False)
    site.norm, site.y = norm, norm.output[0]


def _apply_keep(sites: list[OnnxConvolution], keep: Iterable[str], first: bool, path: Path) -> None:
    if sites and not first and not sites[0].reason:
        sites[0].reason = "first convolution"
    for pattern in [keep] if isinstance(keep, str) else keep:
        chosen = [site for site in sites if fnmatchcase(site.name, pattern) or site.name.startswith(pattern + ".")]
        if not chosen:
            names = ", ".join(site.name for site in sites[:6])
            raise InputError(f"--keep {pattern} matches no convolution of {path}; their names are {names}, ...")
        for site in chosen:
            site.reason = f"kept by --keep {pattern}"


# -- writing -----------------------------------------------------------------------------------------------------------


def rewrite(network: OnnxNetwork, layers: Mapping[str, DKConv2d], forms: Mapping[str, str] | None = None) -> ModelProto:
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


def _emitted(
    site: OnnxConvolution, layer: DKConv2d, form: str, taken: set[str]
) -> tuple[list[NodeProto], list[TensorProto]]:
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
    for graph in _all_graphs(proto.graph):
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


def dense_node(
    site: OnnxConvolution, weight: Tensor, bias: Tensor | None, prefix: str
) -> tuple[NodeProto, list[TensorProto]]:
    """The site's own node with other numbers (and the batch norm behind it inside)."""
    assert site.node is not None
    node = NodeProto()
    node.CopyFrom(site.node)
    values = {f"{prefix}weight": weight} | ({} if bias is None else {f"{prefix}bias": bias})
    del node.input[1:]
    node.input.extend(values)
    node.output[0] = site.y
    return node, [numpy_helper.from_array(value.detach().float().numpy(), name) for name, value in values.items()]
