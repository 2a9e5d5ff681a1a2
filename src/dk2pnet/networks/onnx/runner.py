"""Runs an ONNX graph, or a part of it, in ONNX Runtime: tensors by name, and their shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from onnx import ModelProto, TensorProto, helper

from dk2pnet.data.arrays import Feed
from dk2pnet.deploy.runtimes.onnxruntime import run_onnx, session
from dk2pnet.networks.onnx.graph import OnnxGraph, part_of

__all__ = ["shapes_of", "tensors_of"]


def tensors_of(proto: ModelProto, names: Sequence[str], threads: int | None = None) -> Callable[[Feed], dict]:
    """A function that runs the part of the graph that gives the tensors `names`: feed -> ``{name: array}``."""
    inputs = {value.name for value in proto.graph.input}
    inside = [name for name in dict.fromkeys(names) if name not in inputs]
    running = session(part_of(proto, inside).SerializeToString(), threads) if inside else None

    def run(feed: Feed) -> dict[str, np.ndarray]:
        found = dict(zip(inside, run_onnx(running, feed), strict=True)) if running is not None else {}
        return found | {name: feed.arrays[name] for name in names if name in feed.arrays}

    return run


def shapes_of(network: OnnxGraph, feed: Feed, names: Iterable[str], threads: int | None = None) -> dict:
    """Shapes of tensors, constants among them, when the graph runs `feed`; what is no tensor is left out."""
    known = {name: tuple(tensor.dims) for name, tensor in network.constants.items()}
    known |= {name: array.shape for name, array in feed.arrays.items()}
    wanted = [name for name in dict.fromkeys(names) if name and name not in known]
    try:
        return known | _asked(network, feed, wanted, threads)
    except Exception:  # whatever ONNX Runtime says: one of them is no tensor (a sequence)
        found = tensors_of(network.proto, wanted, threads)(feed)
        return known | {name: array.shape for name, array in found.items() if isinstance(array, np.ndarray)}


def _asked(network: OnnxGraph, feed: Feed, names: Sequence[str], threads: int | None) -> dict:
    """By nodes that give shapes: the tensors themselves, which are large together, are not all kept."""
    if not names:
        return {}
    proto = part_of(network.proto, names)
    del proto.graph.output[:]
    for number, name in enumerate(names):
        shape = f"dk2pnet/shape {number}"
        proto.graph.node.append(helper.make_node("Shape", [name], [shape]))
        proto.graph.output.append(helper.make_tensor_value_info(shape, TensorProto.INT64, [None]))
    found = run_onnx(session(proto.SerializeToString(), threads), feed)
    return {name: tuple(shape.tolist()) for name, shape in zip(names, found, strict=True)}
