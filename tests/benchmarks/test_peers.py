"""The other methods of the peers' benchmark are exact at full rank, so that nobody is beaten by a mistake of ours."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import peer_methods
from dk2pnet.networks.torch.sites import find_convolutions


@pytest.fixture(params=[1, 2], ids=["stride 1", "stride 2"])
def site(request):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 5, 3, request.param, 1, bias=request.param == 2)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), conv)
    return next(each for each in find_convolutions(net, torch.randn(1, 3, 8, 8)) if each.module is conv)


X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def worst(peers, site):
    """Difference of the most expensive option, and whether errors fall with the cost."""
    _, make = peers[-1]
    with torch.no_grad():
        difference = float((make()(X) - site.module(X)).abs().max())
    errors = [option.error for option, _ in peers]
    return difference, errors == sorted(errors, reverse=True)


def test_spatial_svd_is_exact_at_full_rank(site):
    peers = peer_methods.spatial_svd(site)
    assert worst(peers, site) == (pytest.approx(0, abs=1e-5), True)
    # one rank: 4 * 3 * 1 into a map of the input's width, 1 * 5 * 3 into the output
    height = width = 8 // site.module.stride[0]
    assert peers[0][0].cost == 4 * 3 * height * 8 + 5 * 3 * height * width


def test_response_pca_is_exact_at_full_rank(site):
    root = torch.randn(36, 60, dtype=torch.float64)
    A, mean = root @ root.T / 60, root.mean(1)
    peers = peer_methods.channel_pca(site, A, mean)
    assert worst(peers, site) == (pytest.approx(0, abs=1e-5), True)
    assert peers[0][0].cost == (4 * 9 + 5) * site.positions


def test_gdws_is_exact_with_all_kernels(site):
    layer = peer_methods.gdws(site, torch.full((4,), 9))
    with torch.no_grad():
        assert float((layer(X) - site.module(X)).abs().max()) < 1e-5


def test_gdws_weights_are_the_noise_gain_by_hand():
    """One weight per channel, logits w0 x0 and w1 x1: d(z0 - z1)/dw = (x0, -x1), margin 3 - 1 = 2."""
    conv = nn.Conv2d(2, 2, 1, groups=1, bias=False)
    with torch.no_grad():
        conv.weight.copy_(torch.eye(2).view(2, 2, 1, 1))
    net = nn.Sequential(conv, nn.Flatten())
    site = find_convolutions(net, torch.ones(1, 2, 1, 1))[0]
    alpha = peer_methods.gdws_weights(net, [site], torch.tensor([3.0, 1.0]).view(1, 2, 1, 1))
    # channel 0 is read by both outputs: derivatives 3 and -3; channel 1: 1 and -1; divided by 2 * 2^2
    assert alpha[site.name].tolist() == pytest.approx([18 / 8, 2 / 8])


def test_tucker_is_exact_at_full_rank(site):
    assert worst(peer_methods.tucker(site), site) == (pytest.approx(0, abs=1e-5), True)


def test_cp_computes_what_its_factors_say(site):
    peers = peer_methods.cp(site)
    difference, _ = worst(peers, site)
    assert difference < 3 * peers[-1][0].error ** 0.5 + 1e-4
