"""What an ONNX graph answers, how far another's answers are from it, and the proof that a rewritten one is right."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import ModelProto
from torch import Tensor

from dk2pnet.data.arrays import Feed
from dk2pnet.errors import InputError
from dk2pnet.layer import DKConv2d
from dk2pnet.measure import Predictions
from dk2pnet.networks.onnx.graph import OnnxGraph
from dk2pnet.networks.onnx.runner import tensors_of

__all__ = ["OnnxPredictions", "check_repeats", "comparable", "errors_of", "mean_error", "proven"]

# How much the rewritten file may differ from the same graph with the folded weights: both compute the same.
_EXACT = 1e-3


class OnnxPredictions(Predictions):
    """Answers batch by batch, as their shapes may vary and they may be whole numbers: `parts` holds for each batch the
    arrays of all `names`."""

    def __init__(self, names: Sequence[str], parts: list[list[Any]], samples: int, labels: Tensor | None) -> None:
        self.names, self.parts, self.samples, self.labels = list(names), parts, samples, labels

    def __len__(self) -> int:
        return self.samples

    @property
    def classifies(self) -> bool:
        """Whether there is one row of at least two class scores per sample."""
        first = self.parts[0][0]
        return len(self.names) == 1 and isinstance(first, np.ndarray) and first.ndim == 2 and first.shape[1] >= 2

    @property
    def outputs(self) -> list[Tensor]:
        """All batches together; `InputError` where they do not fit together."""
        found = []
        for name, arrays in zip(self.names, zip(*self.parts, strict=True), strict=True):
            if not all(isinstance(each, np.ndarray) and each.dtype.kind in "fiub" for each in arrays):
                raise InputError(f"the output {name!r} is no tensor of numbers, of which nothing can be said")
            if len({each.shape[1:] for each in arrays}) > 1 or any(each.ndim == 0 for each in arrays):
                raise InputError(f"the output {name!r} differs in size from batch to batch; give inputs of one size")
            found.append(torch.from_numpy(np.concatenate(arrays)))
        return found

    @outputs.setter
    def outputs(self, value: list[Tensor]) -> None:
        raise AttributeError("they are read from the parts")

    def infinite(self) -> str | None:
        """The first output without any finite number in a batch."""
        for name, arrays in zip(self.names, zip(*self.parts, strict=True), strict=True):
            floats = (each for each in arrays if isinstance(each, np.ndarray) and each.size and each.dtype.kind == "f")
            if not all(np.isfinite(each).any() for each in floats):
                return f" (output {name!r})"
        return None


def errors_of(teacher: Predictions, student: Predictions) -> dict[str, float]:
    """By output: the squared error relative to the output's energy (to that of all outputs where the teacher is silent
    in it), 1 where the shapes differ."""
    assert isinstance(teacher, OnnxPredictions)
    assert isinstance(student, OnnxPredictions)
    errors, energies = {}, {}
    for number, name in enumerate(teacher.names):
        off = energy = 0.0
        for expected, given in zip(teacher.parts, student.parts, strict=True):
            e, o = _difference(expected[number], given[number])
            off, energy = off + o, energy + e
        errors[name], energies[name] = off if np.isfinite(off) else math.inf, energy
    total = sum(energies.values()) or 1e-300
    return {name: off / (energies[name] or total) for name, off in errors.items()}


def mean_error(teacher: Predictions, student: Predictions) -> float:
    """Of all outputs, the mean of what `errors_of` gives."""
    errors = errors_of(teacher, student)
    return sum(errors.values()) / max(len(errors), 1)


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
    single: Feed,
    threads: int | None,
) -> tuple[bytes, float]:
    """The new file's content, and how far it is from the `reference` with the folded weights (the largest difference,
    relative to the largest number).

    Compared are the tensors `names` and what the new layers give. What is judged is the mean difference: where a graph
    rounds to few levels, a rounding error may move some by one.
    """
    content = result.SerializeToString()
    onnx.checker.check_model(content)
    made = {name for node in reference.graph.node for name in node.output}
    sites = [site.node.output[0] for site in graph.sites if site.name in layers and site.node is not None]
    names = list(dict.fromkeys([*names, *(each for each in sites if each in made)]))
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


def _difference(expected: Any, given: Any) -> tuple[float, float]:
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
    inputs = {value.name for value in graph.proto.graph.input}
    wanted = [name for chain in chains.values() for name in chain if name in makers or name in inputs]
    found = tensors_of(graph.proto, wanted, threads)(feed)

    def is_float(name: str) -> bool:
        array = found.get(name)
        return isinstance(array, np.ndarray) and array.dtype.kind == "f" and name in makers

    return list(
        dict.fromkeys(
            output if is_float(output) else next((name for name in chain if is_float(name)), output)
            for output, chain in chains.items()
        )
    )
