"""The networks of the benchmarks: parameters and multiply-adds as their docstrings say, and what they accept."""

import re

import pytest
import torch
from torch import nn

from dk2pnet.errors import InputError
from dk2pnet.layer import DKConv2d
from dk2pnet.measure import macs, parameters
from dk2pnet.nets import NETS, dk2pnet
from dk2pnet.nets.resnet import CifarResNet
from dk2pnet.networks.named import make_network
from dk2pnet.networks.saved import load_student, save_student
from dk2pnet.plan import Plan

# Worked out by hand from the widths, for 3x32x32 and 10 classes: convolutions (+ biases) + batch norm + linear.
COUNTS = {
    "resnet20": (269_722, 40_551_040),
    "resnet20x2": (1_073_962, 161_318_144),
    "resnet20x4": (4_286_026, 643_500_544),
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
    def by_hand(depth, narrow=16):
        blocks = (depth - 2) // 6
        convolutions, positions = [(3, narrow)], [32 * 32]
        for stage, (width, side) in enumerate(((narrow, 32), (2 * narrow, 16), (4 * narrow, 8))):
            first = (narrow if stage == 0 else width // 2, width)
            convolutions += [first] + [(width, width)] * (2 * blocks - 1)
            positions += [side * side] * (2 * blocks)
        weights = [9 * c * n for c, n in convolutions]
        batch_norm = sum(2 * n for _, n in convolutions)
        macs = sum(w * p for w, p in zip(weights, positions, strict=True)) + 40 * narrow
        return sum(weights) + batch_norm + 40 * narrow + 10, macs

    for depth in (20, 32, 44, 56, 110):
        assert by_hand(depth) == COUNTS[f"resnet{depth}"]
    assert by_hand(20, 32) == COUNTS["resnet20x2"]
    assert by_hand(20, 64) == COUNTS["resnet20x4"]


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


# -- DK²PNets ----------------------------------------------------------------------------------------------------------


def dk2pnet_by_hand(depth, width, channels, side):
    """One kernel per channel: 9 C of extraction at the output's resolution, C N of combination."""
    blocks = (depth - 2) // 6
    weights, macs, norms = 9 * channels * width, 9 * channels * width * side**2, 2 * width
    before = width
    for stage in range(3):
        wide, here = width * 2**stage, -(-side // 2**stage)
        for _ in range(2 * blocks):
            weights += before * (9 + wide)
            macs += before * (9 + wide) * here**2
            norms += 2 * wide
            before = wide
    return weights + norms + 10 * before + 10, macs + 10 * before


DK2PNETS = re.findall(r"dk2pnet-(\d+)x(\d+): ([\d,]+) parameters, ([\d.]+) M MACs at (\d)x(\d+)x", dk2pnet.__doc__)


@pytest.mark.parametrize("stated", DK2PNETS)
def test_counts_of_dk2pnets(stated):
    depth, width, channels, side = (int(stated[place]) for place in (0, 1, 4, 5))
    network = make_network(f"dk2pnet-{depth}x{width}", in_channels=channels, num_classes=10)
    by_hand = dk2pnet_by_hand(depth, width, channels, side)
    assert (parameters(network), macs(network, torch.zeros(1, channels, side, side))) == by_hand
    assert (by_hand[0], f"{by_hand[1] / 1e6:.1f}") == (int(stated[2].replace(",", "")), stated[3])


def test_every_size_in_the_docstring_is_tested():
    assert len(DK2PNETS) == 5


def test_dk2pnets_are_dk_layers_throughout():
    network = make_network("dk2pnet-14x6")
    dense = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)]
    layers = [module for module in network.modules() if isinstance(module, DKConv2d)]
    assert dense == ["conv1"]
    assert len(layers) == 12
    assert all(layer.branch_sizes == [layer.in_channels] for layer in layers)
    for side, channels in ((8, 1), (28, 1), (32, 3)):
        small = make_network("dk2pnet-8x4", in_channels=channels, num_classes=7).eval()
        assert small(torch.randn(2, channels, side, side)).shape == (2, 7)


def test_a_dk2pnet_equals_the_resnet_with_its_folded_weights():
    torch.manual_seed(0)
    network, dense = dk2pnet(14, 6).eval(), CifarResNet(14, width=6).eval()
    state = {name: value for name, value in network.state_dict().items() if name in dense.state_dict()}
    for name, module in network.named_modules():
        if isinstance(module, DKConv2d):
            state[f"{name}.weight"] = module.fold().detach()
    dense.load_state_dict(state)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(network(x), dense(x), rtol=1e-4, atol=1e-4)


def test_a_dk2pnet_is_saved_and_loaded_by_its_name(tmp_path):
    network = make_network("dk2pnet-8x4", num_classes=5)
    spec = {"name": "dk2pnet-8x4", "num_classes": 5, "in_channels": 3}
    save_student(network, Plan(network=spec), tmp_path)
    again, _ = load_student(tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("name", ["dk2pnet-9x16", "dk2pnet-2x16", "dk2pnet-20x0"])
def test_sizes_that_there_are_not(name):
    with pytest.raises(InputError, match=f"'{name}' was asked for; expected a depth of 8, 14, 20, 26, 32"):
        make_network(name)


@pytest.mark.parametrize("name", ["dk2pnet", "dk2pnet-20", "dk2pnet-20x", "dk2pnet-20x32x1", "dk2pnet_20x32"])
def test_names_that_are_no_sizes(name):
    with pytest.raises(InputError, match="is not known; expected .*dk2pnet-DEPTHxWIDTH"):
        make_network(name)
