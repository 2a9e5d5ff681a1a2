"""What a network asks for itself, counted by hand."""

import torch
from torch import nn

from dk2pnet.networks.torch.network import TorchNetwork
from dk2pnet.run.run import Run
from dk2pnet.students.needs import own_bytes


def test_weights_and_maps_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(4, 8, 3, bias=False))
    network = TorchNetwork(model)
    network.prepare(torch.zeros(1, 3, 6, 6), None, Run())
    sites = network.sites(first=True)
    # Kernels that are cheaper than dense: 27 x 4 / (9 + 4) = 8 over 36 positions, 36 x 8 / (9 + 8) = 16 over 16.
    one, two = (3 + 4) * 36 + 8 * 36, 4 * 36 + 8 * 16 + 16 * 16
    weights = 4 * 4 * (3 * 4 * 9 + 4 * 8 * 9)
    assert own_bytes(network, sites, 5, 0) == weights + 4 * 5 * 3 * one
    assert own_bytes(network, sites, 5, 100) == 2 * weights + 4 * 100 * (one + two + max(one, two))
    sites[0].reason = "stays dense"
    assert own_bytes(network, sites, 1, 0) == weights + 4 * 3 * two
    assert own_bytes(network, [], 1, 0) == weights
