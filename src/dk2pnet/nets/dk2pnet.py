"""DK²PNets: thin and deep residual networks whose layers are DK layers.

The structure is ours. Of the paper (Wang, Deng, Wang, ECCV 2016) the abstract and the introduction are known to us:
they speak of students made of dominant kernels that a larger teacher instructs, and hold no layer table. What we chose:
the residual plan of He et al. (2015) for 32x32 images, in which every 3x3 convolution but the first is a DK layer with
one kernel per input channel, ``C (9 + N)`` parameters in place of ``9 C N``. The first convolution reads one or three
channels, where a DK layer would save nothing, and is dense. The stages have ``width``, ``2 width`` and ``4 width``
channels, shortcuts are identities, and a linear classifier reads the mean over positions.
"""

from __future__ import annotations

import re

from dk2pnet.errors import InputError
from dk2pnet.layer import DKConv2d
from dk2pnet.nets.resnet import CifarResNet

__all__ = ["dk2pnet", "dk2pnet_sizes"]


def dk2pnet(depth: int, width: int, in_channels: int = 3, num_classes: int = 10) -> CifarResNet:
    """A DK²PNet of ``depth = 6 n + 2`` layers, n residual blocks in each of three stages; its name is DEPTHxWIDTH.

    (B, in_channels, 32, 32) -> (B, num_classes); any input side from 8 on works. 10 classes:

    dk2pnet-8x16: 11,050 parameters, 1.5 M MACs at 1x28x28
    dk2pnet-14x12: 14,650 parameters, 1.9 M MACs at 1x28x28
    dk2pnet-14x16: 24,554 parameters, 4.3 M MACs at 3x32x32
    dk2pnet-20x32: 134,922 parameters, 21.7 M MACs at 3x32x32
    dk2pnet-32x32: 230,794 parameters, 36.3 M MACs at 3x32x32
    """
    if depth < 8 or (depth - 2) % 6 or width < 1:
        raise InputError(
            f"network 'dk2pnet-{depth}x{width}' was asked for; expected a depth of 8, 14, 20, 26, 32, ... and a width "
            "of 1 or more"
        )
    network = CifarResNet(depth, in_channels, num_classes, width)
    for stage in (network.layer1, network.layer2, network.layer3):
        for block in stage:
            for name in ("conv1", "conv2"):
                setattr(block, name, DKConv2d.like(getattr(block, name), 1))
    return network


def dk2pnet_sizes(name: str) -> tuple[int, int] | None:
    """``dk2pnet-20x32 -> (20, 32)``, depth and width; None for any other name."""
    match = re.fullmatch(r"dk2pnet-(\d{1,4})x(\d{1,4})", name)
    return (int(match[1]), int(match[2])) if match else None
