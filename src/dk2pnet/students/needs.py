"""What a network asks for itself, beside what ``--memory`` bounds: said before the work begins."""

from __future__ import annotations

from collections.abc import Iterable

from dk2pnet.networks.network import Network, Site
from dk2pnet.networks.patches import geometry_of

__all__ = ["own_bytes"]

_NETWORKS = 4  # at one time: the teacher, a student, its correction, and what is written
_LEARNING = 4  # more while one is tuned: gradients, what the optimiser keeps of them, the best state so far
_AT_ONCE = 3  # of the largest maps: a runtime lays them out anew, and puts those of several branches together


def own_bytes(network: Network, sites: Iterable[Site], batch: int, tuned: int) -> int:
    """Up to how many bytes: of weights; of the maps of one batch of so many samples, in the teacher or in a student
    with as many kernels as are cheaper than the dense layer; of a step of tuning on `tuned` samples (0: none), which
    keeps the maps of all layers.

    An estimate, from the convolutions alone: others' maps are taken for theirs, as a batch norm's and a ReLU's are.
    """
    maps = [4 * (site.activation + _features(site)) for site in sites]
    running = batch * _AT_ONCE * max(maps, default=0)
    learning = tuned * (sum(maps) + max(maps, default=0))  # the teacher's beside them, of one layer at a time
    networks = _NETWORKS + (_LEARNING if tuned else 0)
    return networks * 4 * network.parameters + max(running, learning)


def _features(site: Site) -> int:
    """Numbers that the kernels extract of a sample, where a kernel and its column are as many as are worth it."""
    if site.reason or not site.calls:
        return 0
    _, inputs, outputs = geometry_of(site.conv)
    places = site.conv.kernel_size[0] * site.conv.kernel_size[1]
    kernels = site.conv.groups * inputs * outputs // (places + outputs)
    return kernels * site.positions // site.calls
