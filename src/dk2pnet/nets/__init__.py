"""The networks of the benchmarks, by name."""

from collections.abc import Callable

from torch import nn

from dk2pnet.nets.lenet import lenet
from dk2pnet.nets.resnet import resnet20, resnet32, resnet44, resnet56, resnet110
from dk2pnet.nets.vgg import vgg8

__all__ = ["NETS"]

NETS: dict[str, Callable[..., nn.Module]] = {
    function.__name__: function for function in (resnet20, resnet32, resnet44, resnet56, resnet110, vgg8, lenet)
}
