"""Tuning for users with only an ONNX file: the graph becomes a PyTorch module, in which DK layers learn from it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dk2pnet.data import UserBatches
from dk2pnet.data.arrays import Feed, Feeds
from dk2pnet.data.samples import Images
from dk2pnet.decompose.whiten import Whitening
from dk2pnet.layer import DKConv2d, set_form
from dk2pnet.measure import predict
from dk2pnet.networks.onnx.graph import OnnxGraph
from dk2pnet.networks.onnx.learner import AsTorch, NotConvertible
from dk2pnet.plan import Plan
from dk2pnet.run.progress import Progress
from dk2pnet.students.closed_form import Solved
from dk2pnet.students.tuning import OPTIONS, Tuner, Tuning

__all__ = ["Tuned", "rate_for", "tune_onnx"]

# The learning rate as a share of the relative error at the start, and the least one.
_SHARE, _LOWEST = 0.05, 1e-4


@dataclass
class Tuned:
    """What came of it: the layers (None where the old ones stay), the steps, and a sentence where it was not done."""

    layers: dict[str, DKConv2d] | None = None
    steps: int = 0
    said: str = ""


def tune_onnx(
    network: OnnxGraph,
    layers: Mapping[str, DKConv2d],
    plan: Plan,
    whitenings: Mapping[str, Whitening],
    feeds: Feeds,
    outputs: Mapping[str, np.ndarray],
    tuning: Tuning,
    error: float,
    *,
    seed: int,
    decisions: list[dict[str, Any]],
    progress: Progress,
) -> Tuned:
    """Tune the DK layers that replace convolutions of an ONNX graph; all other weights stay those of the graph.

    The hints are the last tensors at each resolution and all of `outputs`, by Euclidean distance. Kept where the
    outputs come closer to the original's on the held-out inputs.

    Parameters
    ----------
    outputs : what ONNX Runtime makes of the first batch of ``feeds.gather``, by the names of the tensors that count
    whitenings : by layer, the form in which it is trained
    error : relative squared error of the outputs at the start, which sets the learning rate
    decisions : what was decided is added here
    """
    sites = [site for site in network.sites if site.name in layers]
    try:
        graph = AsTorch(network, sites, list(outputs), feeds.example, outputs)
        student = graph.student(layers)
    except NotConvertible as reason:
        return Tuned(said=f"no tuning: the graph cannot be had as a PyTorch module, {reason}")
    names = graph.layer_names(layers)
    gather, held_out = _Batches(feeds.gather), _Batches(feeds.held_out)
    tuner = Tuner(
        graph.module,
        predict(graph.module, held_out),
        Images(gather, held_out, feeds.counts, UserBatches(gather)),
        example=next(iter(gather))[0],
        seed=seed,
        # A graph for inference has no batch norm to train; half precision would cost it the last digits.
        precision="fp32",
        options=replace(OPTIONS, hints=tuple(graph.hints), batch_norm="frozen", learning_rate=rate_for(error)),
        progress=progress,
    )
    solved = Solved(student, plan, decisions, whitenings={names[name]: each for name, each in whitenings.items()})
    set_form(student, "folded")
    steps = tuning.steps or tuner.steps_in(tuning.seconds or 0.0, solved)
    tuned = tuner.tune(solved, steps)
    if tuned is None:
        return Tuned(steps=steps)
    found = {}
    for name, path in names.items():
        layer = tuned.get_submodule(path)
        assert isinstance(layer, DKConv2d)
        found[name] = layer.requires_grad_(False).eval()
    return Tuned(found, steps)


def rate_for(error: float) -> float:
    """The learning rate: a step in the whitened form moves a response by about the rate, relative to its size.

    So a start that is close already needs small steps: at the usual rate it only becomes worse.
    """
    return min(max(_SHARE * math.sqrt(error), _LOWEST), OPTIONS.learning_rate)


@dataclass(frozen=True)
class _Batches:
    """The only array of each feed, as a tensor."""

    feeds: Iterable[Feed]

    def __iter__(self) -> Iterator[tuple[Tensor, None]]:
        for feed in self.feeds:
            yield torch.from_numpy(next(iter(feed.arrays.values()))), None
