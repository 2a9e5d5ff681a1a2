"""A latency budget, with a clock that is computed: a layer takes what its sketch says, so that every time is known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dk2pnet
from dk2pnet import InputError
from dk2pnet.commands import deliver
from dk2pnet.deploy import costs
from dk2pnet.deploy.costs import DENSE, LatencyTable
from dk2pnet.deploy.latency import Latency
from dk2pnet.layer import DKConv2d
from dk2pnet.networks.torch.convert import with_kernels
from dk2pnet.networks.torch.network import TorchNetwork
from dk2pnet.networks.torch.sites import find_convolutions
from dk2pnet.students import latency_budget as speed


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 32, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 4),
    ).eval()


EXAMPLE = torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(1))
FIXED = 20.0  # of the network: what is no convolution that can be decomposed


def price(inputs, outputs, sketch):
    """Thousands of multiply-adds per position, half of the price again for gathering, and 1 for each operator."""
    if not sketch.branches:
        return inputs * outputs * 9 / 1000
    total = sum(size * (9 + outputs) / 1000 * (1.5 if taken else 1) + 1 for taken, size in sketch.branches)
    return total + (2 if sketch.concat else 0)


@pytest.fixture
def clock(monkeypatch):
    """Replaces every measurement by `price`; in a whole network, kernels cost `clock.factor` times what they should."""

    class Clock:
        factor = 1.0

    def table(self, spot, sketches):
        return {str(s): price(spot.conv.in_channels, spot.conv.out_channels, s) for s in sketches}

    def of_network(module):
        if isinstance(module, bytes):  # the reference
            return 1.0
        model, forms = module
        total = FIXED
        for name, layer in model.named_modules():
            if isinstance(layer, DKConv2d):
                sketch = costs.sketch_of(layer, forms[name])
                total += price(layer.in_channels, layer.out_channels, sketch) * Clock.factor
            elif isinstance(layer, nn.Conv2d) and name != "0":
                total += price(layer.in_channels, layer.out_channels, DENSE)
        return total

    def timed(networks, example, **options):
        return {
            name: Latency(time, time, time, 1) for name, time in map(lambda n: (n, of_network(networks[n])), networks)
        }

    monkeypatch.setattr(LatencyTable, "_measure", table)
    monkeypatch.setattr(speed, "compare_latency", timed)
    return Clock


def spent(fraction, tmp_path, seed=0):
    """What `spend_latency` gives for `net`, and how the sites look."""
    model = net(seed)
    sites = {site.name: site for site in find_convolutions(model, EXAMPLE) if not site.reason}
    torch.manual_seed(seed)
    energies = {
        name: torch.rand(1, site.module.in_channels, 9, dtype=torch.float64).sort(-1, descending=True).values
        for name, site in sites.items()
    }
    table = LatencyTable(folder=tmp_path)

    def build(counts):
        student = with_kernels(model, counts)
        forms = speed.choose_forms(TorchNetwork(student), sites, table)
        return (student, forms), forms

    return speed.spend_latency(fraction, sites, energies, table, (model, {}), build, EXAMPLE)


@pytest.mark.parametrize("factor", [0.7, 1.0, 1.4])
@pytest.mark.parametrize("fraction", [0.5, 0.7, 0.9])
def test_the_measured_time_meets_the_budget_whatever_the_table_promised(tmp_path, clock, fraction, factor):
    clock.factor = factor
    found = spent(fraction, tmp_path)
    assert found.measured == pytest.approx(fraction, rel=0.05)
    assert found.measured in [entry["measured"] for entry in found.attempts]
    assert set(found.forms) == {name for name, counts in found.counts.items() if counts is not None}


def test_kernels_come_in_whole_blocks_or_evenly(tmp_path, clock):
    for name, counts in spent(0.5, tmp_path).counts.items():
        if counts is not None:
            full = int(counts.min())
            assert (int(counts.sum()) - full * len(counts)) % 16 == 0, name


def test_a_layer_stays_dense_where_dominant_kernels_lose(tmp_path, clock, monkeypatch):
    monkeypatch.setitem(globals(), "price", lambda inputs, outputs, sketch: 1.0 if sketch.branches else 0.5)
    assert spent(1.0, tmp_path).counts == {"2": None, "4": None, "6": None}


def test_a_budget_that_cannot_be_reached_says_what_can(tmp_path, clock):
    with pytest.raises(
        InputError, match=r"latency=0.05 cannot be reached on onnxruntime: .* give at least latency=0\.\d+"
    ):
        spent(0.05, tmp_path)


def test_no_budget_is_advised_that_would_be_refused(tmp_path, clock):
    clock.factor = 100.0
    with pytest.raises(
        InputError, match=r"latency=0.9 cannot be reached .* dominant kernels make nothing faster there$"
    ):
        spent(0.9, tmp_path)


def test_the_whole_time_is_always_within_reach(tmp_path, clock):
    clock.factor = 100.0  # whatever is decomposed is far too slow
    found = spent(1.0, tmp_path)
    assert found.measured <= 1.05


def test_a_larger_budget_keeps_more_kernels(tmp_path, clock):
    sums = []
    for fraction in (0.45, 0.6, 0.8):
        counts = spent(fraction, tmp_path).counts
        sums.append(sum(9 * 64 if c is None else int(c.sum()) for c in counts.values()))
    assert sums == sorted(sums)


def test_the_whole_way_with_a_latency_budget(tmp_path, monkeypatch):
    """Real clock, for a moment: files, forms and figures are those of a latency budget."""

    def quick(networks, example, **options):
        return dk2pnet.deploy.latency.compare_latency(networks, example, **options | {"seconds": 0.05, "rounds_min": 3})

    for room in (deliver, speed, costs):
        monkeypatch.setattr(room, "compare_latency", quick)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4),
    ).eval()  # fmt: skip
    found = dk2pnet.compress(
        model,
        budget="latency=0.6",
        criterion="weight",
        example_input=torch.randn(1, 3, 32, 32),
        threads=1,
        out=tmp_path / "out",
    )
    layers = {layer["name"]: layer for layer in found.metrics["layers"]}
    assert any(layer["kind"] == "dk" for layer in layers.values())
    assert found.metrics["latency_search"]
    assert found.metrics["run"]["latency"]["target"] == "onnxruntime"
    forms = dk2pnet.Plan.load(tmp_path / "out" / "plan.json").forms
    assert forms == {name: layer["form"] for name, layer in layers.items() if layer["kind"] == "dk"}
    again, _ = dk2pnet.load_student(tmp_path / "out", factory=lambda: model)
    torch.testing.assert_close(again(EXAMPLE), found.model(EXAMPLE), rtol=1e-4, atol=1e-5)
