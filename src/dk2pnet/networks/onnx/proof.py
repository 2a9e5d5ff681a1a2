"""Which tensors of an ONNX graph are compared with another's, and the proof that a rewritten one is right."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto

from dk2pnet.data.arrays import Feed
from dk2pnet.errors import InputError
from dk2pnet.layer import DKConv2d
from dk2pnet.networks.onnx.graph import OnnxGraph
from dk2pnet.networks.onnx.runner import tensors_of

__all__ = ["check_repeats", "comparable", "proven"]

# How much the rewritten file may differ from the same graph with the folded weights: both compute the same.
_EXACT = 1e-3
_AT_ONCE = 2**27  # bytes of tensors that are compared at once


def check_repeats(graph: OnnxGraph, single: Feed, model: str, threads: int | None) -> None:
    """Refuse a graph with nodes of chance: no other can be compared with it."""
    run = tensors_of(graph.proto, graph.outputs, threads)
    once, again = run(single), run(single)
    for name, a in once.items():
        b = again[name]
        if not isinstance(a, np.ndarray) or a.dtype.kind != "f":
            continue
        least = 1e-3 * float(np.abs(a[np.isfinite(a)]).max(initial=0.0))
        if a.shape == b.shape and not np.allclose(a, b, rtol=1e-2, atol=least, equal_nan=True):
            raise InputError(
                f"{model} gives another output {name!r} each time for the same input, so nothing can be compared with "
                "it; take the random nodes out of the file"
            )


def proven(
    result: ModelProto,
    reference: ModelProto,
    graph: OnnxGraph,
    layers: Mapping[str, DKConv2d],
    names: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
    single: Feed,
    threads: int | None,
) -> tuple[bytes, float]:
    """The new file's content, and how far it is from the `reference` with the folded weights (the largest difference,
    relative to the largest number).

    Compared are the tensors `names` and what the new layers give, of these `shapes`, few at a time. What is judged is
    the mean difference: where a graph rounds to few levels, a rounding error may move some by one.
    """
    content = result.SerializeToString()
    onnx.checker.check_model(content)
    made = {name for node in reference.graph.node for name in node.output}
    sites = [site.node.output[0] for site in graph.sites if site.name in layers and site.node is not None]
    names = list(dict.fromkeys([*names, *(each for each in sites if each in made)]))
    worst = mean = 0.0
    for a, b in _both(reference, result, names, shapes, single, threads):
        if not isinstance(a, np.ndarray) or a.dtype.kind != "f":
            continue
        if a.shape != b.shape:  # the number of what was found may hang on a rounding error
            continue
        good = np.isfinite(a) & np.isfinite(b)
        scale = float(np.abs(a[good]).max(initial=0.0))
        worst = max(worst, float(np.abs(a[good] - b[good]).max(initial=0.0)) / max(scale, 1e-30))
        off = np.linalg.norm((a[good] - b[good]).astype(np.float64))
        mean = max(mean, float(off / max(np.linalg.norm(a[good].astype(np.float64)), 1e-30)))
    if not mean <= _EXACT:
        raise InputError(
            f"the rewritten graph differs by {mean:.2e} from the same graph with folded weights and was not written, "
            "which should not happen; find the convolution by --keep, and report it"
        )
    return content, worst


def _both(
    reference: ModelProto,
    result: ModelProto,
    names: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
    feed: Feed,
    threads: int | None,
) -> Iterator[tuple[Any, Any]]:
    """The tensors of both graphs, as many in one run as are little together."""
    group: list[str] = []
    total = 0
    for name in [*names, None]:
        size = 0 if name is None else 4 * math.prod(shapes.get(name, ()))
        if group and (name is None or total + size > _AT_ONCE):
            expected, found = (tensors_of(proto, group, threads)(feed) for proto in (reference, result))
            yield from ((expected[each], found[each]) for each in group)
            group, total = [], 0
        if name is not None:
            group.append(name)
            total += size


def comparable(graph: OnnxGraph, feed: Feed, threads: int | None) -> list[str]:
    """For every output the tensor that is compared.

    An output of whole numbers (the classes of an OCR) says little about how close two networks are: there it is the
    nearest tensor of floating-point numbers before it.
    """
    makers = {name: node for node in graph.proto.graph.node for name in node.output}
    chains = {}
    for output in graph.outputs:
        chain = [output]
        while len(chain) < 8 and (maker := makers.get(chain[-1])) is not None and maker.input and maker.input[0]:
            chain.append(maker.input[0])
        chains[output] = chain
    found = tensors_of(graph.proto, graph.outputs, threads)(feed)
    others: dict[str, Any] = {}  # further ones only where they are asked for: maps may be large

    def is_float(name: str) -> bool:
        if name not in makers:
            return False
        if name not in found and name not in others:
            others[name] = tensors_of(graph.proto, [name], threads)(feed).get(name)
        array = found[name] if name in found else others[name]
        return isinstance(array, np.ndarray) and array.dtype.kind == "f"

    return list(
        dict.fromkeys(
            output if is_float(output) else next((name for name in chain if is_float(name)), output)
            for output, chain in chains.items()
        )
    )
