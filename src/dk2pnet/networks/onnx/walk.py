"""The asymmetric reconstruction of an ONNX graph: teacher and student run side by side, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice

import numpy as np
import torch
from onnx import NodeProto, TensorProto, helper
from torch import Tensor, nn

from dk2pnet.data.arrays import Feed
from dk2pnet.decompose.moments import BLOCK
from dk2pnet.decompose.solve import Factors, Problem, solve_many
from dk2pnet.deploy.runtimes.onnxruntime import run_onnx, session
from dk2pnet.layer import DKConv2d, arguments_of
from dk2pnet.networks.onnx.gather import as_tensor, positions_for
from dk2pnet.networks.onnx.graph import OnnxGraph, part_of, reads
from dk2pnet.networks.onnx.rewrite import dense_node
from dk2pnet.networks.onnx.sites import OnnxSite
from dk2pnet.networks.patches import patches_of

__all__ = ["Unsuitable", "layer_of", "reconstruct_onnx", "with_bias"]


class Unsuitable(Exception):
    """Why the graph cannot be walked through layer by layer."""


def layer_of(site: OnnxSite, factors: Factors, bias: Tensor | None = None) -> DKConv2d:
    """The DK layer with these factors, and with another bias where one is given."""
    conv = site.conv
    if bias is not None:
        conv = nn.Conv2d(**arguments_of(conv))
        conv.bias = nn.Parameter(bias.float())
    return DKConv2d.from_factors(conv.requires_grad_(False), factors).eval()


def reconstruct_onnx(
    network: OnnxGraph,
    layers: Mapping[str, DKConv2d],
    counts: Mapping[str, Tensor] | None,
    batches: Iterable[Feed],
    *,
    memory: int = 2 * 2**30,
    seed: int = 0,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, DKConv2d]:
    """Go through `layers` in the order of the graph and fit each to the *student's* inputs and the *teacher's* outputs.

    With `counts` the kernels are solved anew (the asymmetric reconstruction, see `reconstruct`, here with centred
    moments, because the bias is free); without, only the biases are corrected. Teacher and student are run side by
    side, from one convolution to the next, so that every node runs once; what later nodes read is kept in memory, for
    as many batches as fit into half of `memory`.

    Raises
    ------
    Unsuitable
        When that cannot be done with this graph.
    """
    walk = _Walk(network, [site for site in network.sites if site.name in layers], threads)
    peak = walk.run(list(islice(batches, 1)), lambda site, teacher, student: None)
    fit = list(islice(batches, max(int(memory / 2 / max(2 * peak, 1)), 1)))
    samples = sum(feed.samples for feed in fit)
    results: dict[str, DKConv2d] = {}

    def visit(
        site: OnnxSite, teacher: Iterable[np.ndarray], student: Iterable[np.ndarray]
    ) -> tuple[Tensor, Tensor | None]:
        conv = site.conv
        sums = _Pair(conv)
        first = 0
        for feed, before, after in zip(fit, teacher, student, strict=True):
            pairs = (
                patches_of(conv, site.padded(as_tensor(x)), feed.samples, first, positions_for(conv, samples), seed)
                for x in (before, after)
            )
            for ours, theirs in zip(*pairs, strict=True):
                sums.add(ours, theirs)
            first += feed.samples
        weight = conv.weight.double().view(conv.groups, -1, conv.weight[0].numel())
        mean_teacher, mean_student, A, target = sums.centred(weight)
        layer = layers[site.name]
        if counts is not None and bool(torch.isfinite(A).all()) and bool(torch.isfinite(target).all()):
            problem = Problem(conv.weight, counts[site.name], A, None, conv.groups, target=target)
            layer = layer_of(site, solve_many([problem])[0])
        folded = layer.fold().detach().double().reshape(weight.shape)
        shift = (weight @ mean_teacher.unsqueeze(2) - folded @ mean_student.unsqueeze(2)).flatten()
        bias = shift if conv.bias is None else conv.bias.double() + shift
        if bool(torch.isfinite(bias).all()):
            layer = with_bias(layer, bias)
        results[site.name] = layer
        if progress is not None:
            progress(len(results))
        return layer.fold().detach(), layer.bias

    walk.run(fit, visit)
    return results


# -- inside ------------------------------------------------------------------------------------------------------------


def with_bias(layer: DKConv2d, bias: Tensor) -> DKConv2d:
    """The layer with another bias, or with its first."""
    new = DKConv2d(**arguments_of(layer), counts=layer.counts)
    assert new.bias is not None
    with torch.no_grad():
        new.kernels.copy_(layer.kernels)
        new.combination.copy_(layer.combination)
        new.bias.copy_(bias)
    return new.requires_grad_(False).eval()


class _Pair:
    """Sums of u, u', u' u'' and u u'' for patches u of the teacher and u' of the student at the same positions.

    Both are taken from the mean of the first patches: beside the square of a large mean a small variance is lost in
    float32 products.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        groups, inputs = conv.groups, conv.weight[0].numel()
        self.square = torch.zeros(groups, inputs, inputs, dtype=torch.float64)
        self.cross = torch.zeros_like(self.square)
        self.teacher = torch.zeros(groups, inputs, dtype=torch.float64)
        self.student = torch.zeros_like(self.teacher)
        self.origins: tuple[Tensor, Tensor] | None = None  # (G, C q) of teacher and student
        self.count = 0

    def add(self, teacher: Tensor, student: Tensor) -> None:
        """Add patches ``(n, G, C q)``."""
        if self.origins is None:
            self.origins = teacher.mean(0), student.mean(0)
        teacher, student = teacher - self.origins[0], student - self.origins[1]
        before, after = teacher.transpose(0, 1), student.transpose(0, 1)
        for start in range(0, after.shape[2], BLOCK):  # products of a part of the rows: the sums may be large
            rows = slice(start, start + BLOCK)
            self.square[:, rows] += after[:, :, rows].transpose(1, 2) @ after
            self.cross[:, rows] += before[:, :, rows].transpose(1, 2) @ after
        self.teacher += teacher.sum(0, dtype=torch.float64)
        self.student += student.sum(0, dtype=torch.float64)
        self.count += len(teacher)

    def centred(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Both means ``(G, C q)``, the student's covariance ``(G, C q, C q)``, and that of the responses of `weight`
        ``(G, N, C q)`` to the teacher's patches with the student's. The sums are used up."""
        count = max(self.count, 1)
        teacher, student = self.teacher / count, self.student / count
        square = self.square.div_(count)
        for group, mean in enumerate(student):
            square[group].addr_(mean, mean, alpha=-1)
        cross = weight @ self.cross / count - (weight @ teacher.unsqueeze(2)) * student.unsqueeze(1)
        if self.origins is not None:
            teacher, student = teacher + self.origins[0], student + self.origins[1]
        self.square = self.cross = torch.zeros(0)
        return teacher, student, square, cross


_Visit = Callable[[OnnxSite, Iterable[np.ndarray], Iterable[np.ndarray]], "tuple[Tensor, Tensor | None] | None"]


class _Walk:
    """Runs teacher and student from one convolution to the next; in between only what is read later is kept."""

    def __init__(self, network: OnnxGraph, sites: Sequence[OnnxSite], threads: int | None) -> None:
        self.network, self.threads = network, threads
        by_output = {site.node.output[0]: site for site in sites if site.node is not None}
        absorbed = {site.norm.output[0] for site in sites if site.norm is not None}
        graph = network.proto.graph
        self.hoisted = {node.output[0]: node for node in graph.node if node.op_type == "Constant"}
        self.nodes: list[NodeProto] = []
        self.cuts: list[tuple[int, OnnxSite]] = []
        self.weights: list[TensorProto] = []
        for node in graph.node:
            first = node.output[0] if node.output else ""
            if first in self.hoisted or (node.op_type == "BatchNormalization" and first in absorbed):
                continue
            site = by_output.get(first) if node.op_type == "Conv" else None
            if site is not None:
                self.cuts.append((len(self.nodes), site))
                node, weights = dense_node(site, site.conv.weight, site.conv.bias, f"{site.y}/teacher_")
                self.weights += weights
            self.nodes.append(node)
        held = {tensor.name for tensor in graph.initializer} | self.hoisted.keys() | {w.name for w in self.weights}
        held |= {sparse.values.name for sparse in graph.sparse_initializer}
        self.last: dict[str, int] = {}  # the last node that reads a tensor
        for number, node in enumerate(self.nodes):
            self.last.update(dict.fromkeys(reads(node) - held, number))

    def run(self, batches: Sequence[Feed], visit: _Visit) -> int:
        """Call `visit` with every site and its input tensors in teacher and student, batch by batch.

        What it returns (the weight and bias of the student from there on) takes the place of the teacher's. Returns
        the bytes that the tensors of one side took, at most.
        """
        teacher = [dict(feed.arrays) for feed in batches]
        student = teacher
        peak = start = 0
        replaced: tuple[NodeProto, list[TensorProto]] | None = None
        for stop, site in self.cuts:
            if replaced is not None or student is not teacher:
                other = self._advance(student, start, stop, replaced)
                teacher = self._advance(teacher, start, stop, None)
                student = other
            else:
                teacher = student = self._advance(teacher, start, stop, None)
            peak = max(peak, sum(array.nbytes for values in teacher for array in values.values()))
            found = visit(site, (values[site.x] for values in teacher), (values[site.x] for values in student))
            replaced = None if found is None else dense_node(site, *found, prefix=f"{site.y}/student_")
            start = stop
        return peak

    def _advance(
        self,
        values: list[dict[str, np.ndarray]],
        start: int,
        stop: int,
        replaced: tuple[NodeProto, list[TensorProto]] | None,
    ) -> list[dict[str, np.ndarray]]:
        """The tensors that node `stop` or later ones read, from those that node `start` or later ones read."""
        nodes = self.nodes[start:stop]
        weights = list(self.weights)
        if replaced is not None:
            nodes[0] = replaced[0]
            weights = [w for w in weights if w.name not in self.nodes[start].input] + replaced[1]
        later = {name for name, last in self.last.items() if last >= stop}
        made = {name for node in nodes for name in node.output}
        outputs = sorted(later & made)
        kept = [{name: array for name, array in each.items() if name in later} for each in values]
        if not outputs:
            return kept
        example = values[0]
        inputs = []
        for name in sorted({name for node in nodes for name in reads(node)} & example.keys()):
            array = example[name]
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
            inputs.append(helper.make_tensor_value_info(name, kind, [None] * array.ndim))
        wanted = {name for node in nodes for name in reads(node)}
        constants = [node for name, node in self.hoisted.items() if name in wanted]
        part = part_of(self.network.proto, outputs, [*constants, *nodes], inputs, weights)
        try:
            running = session(part.SerializeToString(), self.threads)
            names = [value.name for value in running.get_inputs()]
            for each, result in zip(values, kept, strict=True):
                found = run_onnx(running, Feed({name: each[name] for name in names}))
                result.update(zip(outputs, found, strict=True))
        except Exception as error:  # whatever ONNX Runtime says against a part of a graph that it runs as a whole
            raise Unsuitable(str(error).partition("\n")[0]) from error
        for name, array in kept[0].items():
            if not isinstance(array, np.ndarray):
                raise Unsuitable(f"{name!r} is no tensor")
        return kept
