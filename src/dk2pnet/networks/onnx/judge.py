"""What proves and judges ONNX files: that a graph answers alike each time, that a rewritten one computes what it
should, and how far its outputs are from the original's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import torch
from onnx import ModelProto

from dk2pnet.data.arrays import Feed, Feeds
from dk2pnet.errors import InputError
from dk2pnet.layer import DKConv2d
from dk2pnet.measure import Predictions, accuracy, agreement, is_classifier
from dk2pnet.networks.onnx.graph import OnnxGraph
from dk2pnet.networks.onnx.rewrite import rewrite
from dk2pnet.networks.onnx.runner import tensors_of
from dk2pnet.networks.open import warn_of_other_classes

__all__ = ["Judge", "check_repeats", "folded", "proven"]

# How much the rewritten file may differ from the same graph with the folded weights: both compute the same.
_EXACT = 1e-3


def check_repeats(network: OnnxGraph, single: Feed, model: str, threads: int | None) -> None:
    """Refuse a graph with nodes of chance: no other can be compared with it."""
    run = tensors_of(network.proto, network.outputs, threads)
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


def folded(network: OnnxGraph, layers: Mapping[str, DKConv2d]) -> ModelProto:
    """The graph with the folded weights of `layers` in place of its own."""
    return rewrite(network, layers, dict.fromkeys(layers, "folded"))


def proven(
    result: ModelProto, network: OnnxGraph, layers: Mapping[str, DKConv2d], single: Feed, threads: int | None
) -> tuple[bytes, float]:
    """The new file's content, and how far it is from the same graph with the folded weights (the largest difference,
    relative to the largest number).

    Compared are the outputs, in place of one of whole numbers the tensor it comes from, and what the new layers give.
    What is judged is the mean difference: where a graph rounds to few levels, a rounding error may move some by one.
    """
    content = result.SerializeToString()
    onnx.checker.check_model(content)
    reference = folded(network, layers)
    made = {name for node in reference.graph.node for name in node.output}
    sites = [site.node.output[0] for site in network.sites if site.name in layers and site.node is not None]
    names = list(dict.fromkeys([*_comparable(network, single, threads), *(each for each in sites if each in made)]))
    expected, found = (tensors_of(proto, names, threads)(single) for proto in (reference, result))
    worst = mean = 0.0
    for name in names:
        a, b = expected[name], found[name]
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


class Judge:
    """Compares the outputs of graphs with the original's on the held-out inputs.

    An output of whole numbers (the classes of an OCR) says little about how close two networks are: there the nearest
    tensor of floating-point numbers before it is compared.
    """

    def __init__(self, network: OnnxGraph, feeds: Feeds, threads: int | None) -> None:
        self.network, self.feeds, self.threads = network, feeds, threads
        self.names = _comparable(network, feeds.example, threads)
        self.expected = self._run(network.proto)
        first = self.expected[0][0] if self.expected else None
        if feeds.images is not None and isinstance(first, np.ndarray) and len(self.names) == 1:
            warn_of_other_classes(feeds.images, [torch.from_numpy(first)])
        for name, arrays in zip(self.names, zip(*self.expected, strict=True), strict=True):
            if not all(np.isfinite(array).any() for array in arrays if array.size and array.dtype.kind == "f"):
                raise InputError(f"the output {name!r} is not finite on the held-out inputs; check them and the model")

    def _run(self, proto: ModelProto) -> list[list[np.ndarray]]:
        run = tensors_of(proto, self.names, self.threads)
        return [[found[name] for name in self.names] for found in map(run, self.feeds.held_out)]

    def of_example(self) -> dict[str, np.ndarray]:
        """What the original makes of the first batch of the inputs that are gathered from."""
        found = tensors_of(self.network.proto, self.names, self.threads)(self.feeds.example)
        return {name: found[name] for name in self.names}

    def errors(self, proto: ModelProto) -> dict[str, float]:
        """By output: the squared error relative to the output's energy, 1 where the shapes differ."""
        found = self._run(proto)
        errors = {}
        for number, name in enumerate(self.names):
            off = energy = 0.0
            for expected, given in zip(self.expected, found, strict=True):
                e, o = _difference(expected[number], given[number])
                off, energy = off + o, energy + e
            errors[name] = off / max(energy, 1e-300) if np.isfinite(off) else math.inf
        return errors

    def error(self, proto: ModelProto) -> float:
        """Mean over the outputs."""
        errors = self.errors(proto)
        return sum(errors.values()) / max(len(errors), 1)

    def stage(self, proto: ModelProto, name: str, teacher: ModelProto) -> dict[str, Any]:
        """A stage of the report: errors, accuracy where there are labels, agreement where there are class scores."""
        figures: dict[str, Any] = {"name": name, "accuracy": None, "agreement": None}
        if proto is not teacher:
            errors = self.errors(proto)
            figures["relative_error"] = 100 * math.sqrt(sum(errors.values()) / max(len(errors), 1))
            figures["relative_errors"] = {name: 100 * math.sqrt(error) for name, error in errors.items()}
        first = self.expected[0][0]
        scores = len(self.names) == 1 and self.names == self.network.outputs and first.ndim == 2 and first.shape[1] > 1
        if not scores or not isinstance(first, np.ndarray):
            return figures
        if proto is not teacher:
            old, new = (
                Predictions([torch.cat([torch.from_numpy(each[0]) for each in of])], None)
                for of in (self.expected, self._run(proto))
            )
            figures["agreement"] = agreement(old, new)
        if self.feeds.test is not None:
            run = tensors_of(proto, self.names, self.threads)
            rows, labels = [], []
            for feed, known in self.feeds.test:
                rows.append(torch.from_numpy(run(feed)[self.names[0]]))
                labels.append(known)
            if rows and is_classifier([torch.cat(rows)]):
                figures["accuracy"] = accuracy(Predictions([torch.cat(rows)], torch.cat(labels)))
        return figures


def _difference(expected: np.ndarray, given: np.ndarray) -> tuple[float, float]:
    """Energy of what was expected, and of the difference; of whole numbers, how many there are and how many differ."""
    if not isinstance(expected, np.ndarray):
        return 0.0, 0.0
    if expected.dtype.kind != "f":
        same = expected.shape == given.shape
        return float(expected.size), float((expected != given).sum()) if same else float(expected.size)
    good = np.isfinite(expected)  # an output may hold -inf by intention, as a mask
    a = np.where(good, expected, 0).astype(np.float64)
    energy = float(np.square(a).sum())
    if expected.shape != given.shape:
        return energy, energy
    b = np.where(good, given, 0).astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        off = float(np.square(a - b).sum())
    return energy, off if off == off else math.inf


def _comparable(network: OnnxGraph, feed: Feed, threads: int | None) -> list[str]:
    """For every output the tensor that is compared."""
    makers = {name: node for node in network.proto.graph.node for name in node.output}
    chains = {}
    for output in network.outputs:
        chain = [output]
        while len(chain) < 8 and (maker := makers.get(chain[-1])) is not None and maker.input and maker.input[0]:
            chain.append(maker.input[0])
        chains[output] = chain
    inputs = {value.name for value in network.proto.graph.input}
    wanted = [name for chain in chains.values() for name in chain if name in makers or name in inputs]
    found = tensors_of(network.proto, wanted, threads)(feed)

    def is_float(name: str) -> bool:
        array = found.get(name)
        return isinstance(array, np.ndarray) and array.dtype.kind == "f" and name in makers

    return list(
        dict.fromkeys(
            output if is_float(output) else next((name for name in chain if is_float(name)), output)
            for output, chain in chains.items()
        )
    )
