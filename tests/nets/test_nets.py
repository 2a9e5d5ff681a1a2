"""The networks of the benchmarks: parameters and multiply-adds as their docstrings say, and what they accept."""

import re

import pytest
import torch
from torch import nn

from dk2pnet.measure import macs, parameters
from dk2pnet.nets import NETS

# Worked out by hand from the widths, for 3x32x32 and 10 classes: convolutions (+ biases) + batch norm + linear.
COUNTS = {
    "resnet20": (269_722, 40_551_040),
    "resnet32": (464_154, 68_862_592),
    "resnet44": (658_586, 97_174_144),
    "resnet56": (853_018, 125_485_696),
    "resnet110": (1_727_962, 252_887_680),
    "vgg8": (1_148_874, 152_766_976),
    "lenet": (25_002, 3_588_736),
}


def test_registry_names_every_network():
    assert set(NETS) == set(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name):
    network = NETS[name]()
    assert (parameters(network), macs(network, torch.zeros(1, 3, 32, 32))) == COUNTS[name]


@pytest.mark.parametrize("name", COUNTS)
def test_docstring_states_the_counts(name):
    found = re.search(r"([\d,]+) parameters, ([\d.]+) M MACs", NETS[name].__doc__)
    assert found is not None
    assert int(found[1].replace(",", "")) == COUNTS[name][0]
    assert found[2] == f"{COUNTS[name][1] / 1e6:.1f}"


def test_resnet_counts_follow_from_the_depth():
    def by_hand(depth):
        blocks = (depth - 2) // 6
        convolutions, positions = [(3, 16)], [32 * 32]
        for stage, (width, side) in enumerate(((16, 32), (32, 16), (64, 8))):
            first = (16 if stage == 0 else width // 2, width)
            convolutions += [first] + [(width, width)] * (2 * blocks - 1)
            positions += [side * side] * (2 * blocks)
        weights = [9 * c * n for c, n in convolutions]
        batch_norm = sum(2 * n for _, n in convolutions)
        return sum(weights) + batch_norm + 650, sum(w * p for w, p in zip(weights, positions, strict=True)) + 640

    for depth in (20, 32, 44, 56, 110):
        assert by_hand(depth) == COUNTS[f"resnet{depth}"]


@pytest.mark.parametrize("side", [8, 28, 32])
@pytest.mark.parametrize("name", ["resnet20", "vgg8", "lenet"])
def test_shapes(name, side):
    network = NETS[name](in_channels=1, num_classes=7).eval()
    assert network(torch.randn(2, 1, side, side)).shape == (2, 7)


@pytest.mark.parametrize("name", COUNTS)
def test_convolutions_and_batch_norm(name):
    network = NETS[name]()
    assert any(isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1) for module in network.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in network.modules()) == (name != "lenet")


@pytest.mark.parametrize("name", ["resnet20", "vgg8", "lenet"])
def test_one_step_of_gradient_descent_learns(name):
    torch.manual_seed(0)
    network = NETS[name](1, 2)
    x, y = torch.randn(8, 1, 8, 8), torch.tensor([0, 1] * 4)
    before = nn.functional.cross_entropy(network(x), y)
    before.backward()
    with torch.no_grad():
        for parameter in network.parameters():
            assert parameter.grad is not None
            parameter -= 1e-3 * parameter.grad
    assert nn.functional.cross_entropy(network(x), y) < before
