"""Reads an ONNX file. It is somebody else's, and checked before anything is done with it: what it refers to must be
there, what it declares must be what it holds, and data outside its folder is not read.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper, inliner

from dk2pnet.errors import InputError
from dk2pnet.networks.onnx.fold import fold_weights, put_in_order
from dk2pnet.networks.onnx.graph import OURS, OnnxGraph, all_graphs, constants_of, nodes_in, reads
from dk2pnet.networks.onnx.sites import apply_keep, sites_of

__all__ = ["read_onnx"]

_OPSET = 7  # the oldest that ONNX Runtime promises to run
_LARGEST = 2**31 - 1  # a protobuf cannot be larger


def read_onnx(path: str | Path, keep: Iterable[str] = (), first: bool = False) -> OnnxGraph:
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
    if not put_in_order(proto.graph):
        raise InputError(f"nodes of {path} read each other's outputs in a circle; the file is damaged: export it anew")
    _check_graph(proto, path)
    if proto.functions:
        proto = _inlined(proto)
    fold_weights(proto, constants_of(proto))
    constants = constants_of(proto)
    sites = sites_of(proto, constants)
    apply_keep(sites, keep, first, path)
    return OnnxGraph(proto, sites, constants)


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
    _check_texts(proto, path)
    if not proto.HasField("graph") or not proto.graph.node:
        raise InputError(f"{path} holds no graph, or an empty one; expected an ONNX file with a network")
    opset = next((entry.version for entry in proto.opset_import if entry.domain in OURS), 0)
    if opset < _OPSET:
        raise InputError(f"{path} has operator set {opset}; expected {_OPSET} or newer: convert it with onnx")
    return proto


def _inlined(proto: ModelProto) -> ModelProto:
    """Without functions of its own, whose nodes would be neither counted nor decomposed; itself where that fails."""
    try:
        return inliner.inline_local_functions(proto)
    except Exception:  # the probe will say what is wrong with it
        return proto


# What nothing refers to: some converters write it in an encoding of their country.
_REMARKS = ("doc_string", "producer_name", "producer_version", "metadata_props", "key", "value")


def _check_texts(message: Any, path: Path, within: str = "model") -> None:
    """Refuse names that are no UTF-8, which protobuf gives as bytes; mend remarks that are none."""
    for field, value in message.ListFields():
        many = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        if field.message_type is not None:
            for each in value if many else [value]:
                _check_texts(each, path, field.name)
        elif field.type == field.TYPE_STRING and any(isinstance(each, bytes) for each in (value if many else [value])):
            if field.name not in _REMARKS or many:
                raise InputError(
                    f"{path} holds a text that is no UTF-8 ({within}.{field.name}); the file is damaged: fetch it "
                    "again, or export it anew"
                )
            setattr(message, field.name, value.decode("utf-8", "replace"))


def _tensors(proto: ModelProto) -> Iterator[TensorProto]:
    """Every tensor that the file holds, wherever."""
    graphs = [proto.graph]
    for training in proto.training_info:
        graphs += [training.initialization, training.algorithm]
    nodes = [node for function in proto.functions for node in function.node]
    for top in graphs:
        for graph in all_graphs(top):
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield sparse.values
                yield sparse.indices
            nodes += graph.node
    for node in nodes_in(nodes):
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
    if length > _LARGEST:
        raise InputError(f"{what} and has {length:,} bytes; networks of more than 2 GB cannot be rewritten")
    if offset < 0 or length < 0 or offset + length > size:
        raise InputError(f"{what} from byte {offset} on, {length} bytes, but that file has {size}; fetch it again")
    return found, offset, length


# Where the numbers of a type stand when they are not raw, and how many of them make one element.
_FIELDS: dict[int, tuple[str, int]] = {
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
                    "initializer, nor another node gives; the file is damaged"
                )
        for name in node.output:
            if name and name in known:
                raise InputError(f"the tensor {name!r} of {path} is given twice; the file is damaged")
            known.add(name)
    for value in graph.output:
        if value.name not in known:
            raise InputError(f"nothing gives the output {value.name!r} of {path}; the file is damaged")
