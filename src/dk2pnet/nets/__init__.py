"""The networks of the benchmarks, by name."""

from collections.abc import Callable
from functools import partial

from torch import nn

from dk2pnet.nets.dk2pnet import dk2pnet, dk2pnet_sizes
from dk2pnet.nets.lenet import lenet
from dk2pnet.nets.resnet import resnet20, resnet20x2, resnet20x4, resnet32, resnet44, resnet56, resnet110
from dk2pnet.nets.vgg import vgg8

__all__ = ["NETS", "dk2pnet", "net_named"]

NETS: dict[str, Callable[..., nn.Module]] = {
    function.__name__: function
    for function in (resnet20, resnet20x2, resnet20x4, resnet32, resnet44, resnet56, resnet110, vgg8, lenet)
}


def net_named(name: str) -> Callable[..., nn.Module] | None:
    """One of `NETS`, or ``dk2pnet-DEPTHxWIDTH``; None for any other name. It takes ``in_channels``, ``num_classes``."""
    sizes = dk2pnet_sizes(name)
    return partial(dk2pnet, *sizes) if sizes else NETS.get(name)
