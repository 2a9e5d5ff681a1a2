"""Gathers the moments of an ONNX graph's convolutions in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from dk2pnet.data.arrays import Feed
from dk2pnet.decompose.moments import Moments
from dk2pnet.errors import InputError
from dk2pnet.networks.onnx.graph import OnnxGraph
from dk2pnet.networks.onnx.runner import tensors_of
from dk2pnet.networks.onnx.sites import OnnxSite
from dk2pnet.networks.patches import in_groups, patches_of

__all__ = ["as_tensor", "gather_onnx", "positions_for"]


def gather_onnx(
    network: OnnxGraph,
    sites: Mapping[str, OnnxSite],
    batches: Iterable[Feed],
    *,
    samples: int,
    maps: Mapping[str, int] | None = None,
    memory: int = 2 * 2**30,
    seed: int = 0,
    threads: int | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> Iterator[dict[str, Moments]]:
    """`gather_moments` for an ONNX graph: the same sums, in groups of layers, each in one pass over `batches`.

    `samples`: how many samples `batches` hold, which decides how many positions of each are enough; `maps`: bytes of
    the inputs of each layer in a batch, which a group has in memory beside its sums.

    Raises
    ------
    InputError
        When an activation is not finite.
    """
    start = 0
    for names in in_groups({name: site.conv for name, site in sites.items()}, memory, maps=maps):
        group = {name: sites[name] for name in names}
        moments = {name: _zeros(site) for name, site in group.items()}
        run = tensors_of(network.proto, [site.x for site in group.values()], threads)
        what = f"layers {start + 1}-{start + len(names)} of {len(sites)}"
        done = 0
        for feed in batches:
            found = run(feed)
            for name, site in group.items():
                x, conv = _input(site, found), site.conv
                for patches in patches_of(conv, x, feed.samples, done, positions_for(conv, samples), seed):
                    moments[name].add_patches(patches)
            done += feed.samples
            if progress is not None:
                progress(what, done)
        for name, sums in moments.items():
            if not sums.finite():
                raise InputError(
                    f"the activations at {name!r} are not finite on the calibration inputs; check them and the model"
                )
        yield moments
        start += len(names)


# -- inside ------------------------------------------------------------------------------------------------------------


def _zeros(site: OnnxSite) -> Moments:
    conv = site.conv
    return Moments.zeros(conv.groups, conv.weight[0].numel())


def as_tensor(array: np.ndarray) -> Tensor:
    """An array as a tensor that may be written to."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _input(site: OnnxSite, found: Mapping[str, np.ndarray]) -> Tensor:
    return site.padded(as_tensor(found[site.x]))


def positions_for(conv: nn.Conv2d, samples: int) -> int:
    """Positions of each sample: together a dozen patches for every number of a patch, within limits."""
    patches = min(max(12 * conv.weight[0].numel(), 2**14), 2**16)
    return max(math.ceil(patches / max(samples, 1)), 8)
