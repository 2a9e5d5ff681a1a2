from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from dk2pnet.deploy import costs
from dk2pnet.deploy.costs import DENSE, LatencyTable, Sketch, Spot, fastest_forms, gathered, sketch_of
from dk2pnet.deploy.latency import Latency
from dk2pnet.layer import DKConv2d
from dk2pnet.processes import cores


@pytest.fixture
def asked(monkeypatch):
    """Instead of a clock: a network takes as many milliseconds as its file has KiB. Gives the names asked for."""
    names: list[list[str]] = []

    def fake(networks, example, **options):
        names.append([name for name in networks if name])
        sizes = {name: len(content) / 1024 for name, content in networks.items()}
        return {name: Latency(size, size, size, 1) for name, size in sizes.items()}

    monkeypatch.setattr(costs, "compare_latency", fake)
    return names


SPOT = Spot(nn.Conv2d(16, 8, 3, padding=1), (9, 9))


def test_sketches_of_a_layer():
    """16 channels with two kernels each, 4 of them with three: 36 kernels."""
    layer = DKConv2d(16, 8, 3, counts=[3] * 4 + [2] * 12)
    assert sketch_of(layer, "branches") == gathered(16, 2, 4) == Sketch(((False, 16), (False, 16), (True, 16)))
    assert sketch_of(layer, "concat") == Sketch(((False, 16), (False, 16), (True, 16)), concat=True)
    assert sketch_of(layer, "filled") == gathered(16, 3, 0)
    assert sketch_of(layer, "gathered") == gathered(16, 0, 36) == Sketch(((True, 48),))
    assert sketch_of(layer, "folded") == DENSE
    assert [str(s) for s in (DENSE, gathered(16, 1, 5), sketch_of(layer, "concat"))] == [
        "dense",
        "16+g16",
        "concat 16+16+g16",
    ]


def test_a_grouped_layer_with_one_kernel_per_group_combines_nothing_and_others_do():
    """Both have as many kernels as outputs in the gathered form; what is timed differs by the pointwise convolution."""
    one = DKConv2d(8, 8, 3, groups=4, counts=[1, 0] * 4)
    two = DKConv2d(8, 8, 3, groups=4, counts=[2, 0] * 4)
    kinds = [sketch_of(layer, "gathered") for layer in (one, two)]
    assert kinds == [Sketch(((True, 8),), alone=(0,)), Sketch(((True, 8),))]
    assert [str(each) for each in kinds] == ["g8 alone", "g8"]
    networks = [costs._network(Spot(two, (9, 9)), each, "pytorch") for each in kinds]
    weights = [sorted(p.numel() for p in network[2].parameters()) for network in networks]
    assert weights[0] == [8, 8 * 9]
    assert weights[1] == [8, 8 * 2, 8 * 9]


@pytest.mark.parametrize(("target", "int8"), [("onnxruntime", False), ("onnxruntime-int8", True), ("openvino", False)])
def test_layers_are_timed_in_the_numbers_of_the_target(target, int8):
    assert (b"QuantizeLinear" in costs._network(SPOT, DENSE, target)) is int8


def test_only_what_is_missing_is_measured_and_it_is_kept(tmp_path, asked):
    table = LatencyTable(folder=tmp_path)
    first = table.ratios_of({SPOT: [DENSE, gathered(16, 1, 0)]})
    assert asked == [["dense", "16"]]
    same = Spot(nn.Conv2d(16, 8, 3, padding=1), (9, 9))  # another module of the same geometry
    again = LatencyTable(folder=tmp_path).ratios_of({same: [DENSE, gathered(16, 2, 0)]})
    assert asked[1:] == [["16+16"]]
    assert again[SPOT.key][DENSE] == first[SPOT.key][DENSE]
    LatencyTable(folder=tmp_path).ratios_of({Spot(nn.Conv2d(16, 8, 3, padding=1), (9, 10)): [DENSE]})
    assert asked[2:] == [["dense"]]


def test_times_are_relative_to_the_reference(tmp_path, asked):
    table = LatencyTable(folder=tmp_path)
    spot = Spot(nn.Conv2d(64, 64, 3, padding=1), (28, 28))  # the reference itself
    assert table.ratios_of({spot: [DENSE]})[spot.key][DENSE] == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize("damage", ["{", "[]", '{"ratios": 3}', '{"ratios": {"a": {"b": "c"}}}'])
def test_a_damaged_cache_is_measured_again(tmp_path, asked, damage):
    table = LatencyTable(folder=tmp_path)
    table.path.parent.mkdir(parents=True)
    table.path.write_text(damage)
    again = LatencyTable(folder=tmp_path)
    again.ratios_of({SPOT: [DENSE]})
    assert asked == [["dense"]]
    assert SPOT.key in json.loads(again.path.read_text())["ratios"]


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, asked):
    (tmp_path / "file").write_text("")
    table = LatencyTable(folder=tmp_path / "file")
    assert table.ratios_of({SPOT: [DENSE]})[SPOT.key][DENSE] > 0


def test_targets_and_threads_have_files_of_their_own(tmp_path):
    paths = {LatencyTable(folder=tmp_path, threads=threads).path for threads in (1, 2)}
    paths.add(LatencyTable("pytorch", 1, folder=tmp_path).path)
    assert len(paths) == 3


def test_the_fastest_form_of_each_layer(tmp_path, monkeypatch):
    """By a price list: gathering costs 5, a branch 1, dense 3.5."""

    def price(self, spot, sketches):
        return {str(s): sum(5 if taken else 1 for taken, _ in s.branches) if s.branches else 3.5 for s in sketches}

    monkeypatch.setattr(LatencyTable, "_measure", price)
    layers = {
        "filled": DKConv2d(16, 8, 3, counts=[2] * 8 + [1] * 8),
        "branches": DKConv2d(16, 8, 3, counts=2),
        "folded": DKConv2d(16, 8, 3, counts=4),
    }
    found = fastest_forms({name: (layer, (9, 9)) for name, layer in layers.items()}, LatencyTable(folder=tmp_path))
    assert found == {name: name for name in layers}


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("target", ["onnxruntime", "pytorch"])
def test_real_layers_of_every_sketch_can_be_timed(tmp_path, groups, target):
    table = LatencyTable(target, 1, folder=tmp_path, seconds=0.01)
    conv = nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=groups)
    layer = DKConv2d.like(conv, [2] * 16)
    sketches = {sketch_of(layer, form) for form in ("branches", "gathered", "filled", "concat", "folded")}
    times = table.ratios_of({Spot(conv, (10, 10)): sorted(sketches)})
    assert all(0 < value < 1000 for value in next(iter(times.values())).values())


def test_the_timed_network_is_the_layer_between_neighbours():
    network = costs._network(SPOT, gathered(16, 1, 4), "pytorch")
    assert network(torch.randn(2, 1, 9, 9)).shape == (2, 8, 1, 1)


def test_two_runs_that_measure_at_once_keep_each_others_times(tmp_path, asked):
    tables = [LatencyTable(folder=tmp_path) for _ in range(2)]
    other = Spot(nn.Conv2d(8, 8, 3, padding=1), (9, 9))
    for table, spot in zip(tables, (SPOT, other), strict=True):
        table.ratios_of({spot: [DENSE]})
    again = LatencyTable(folder=tmp_path)
    before = len(asked)
    again.ratios_of({SPOT: [DENSE], other: [DENSE]})
    assert len(asked) == before


def test_without_a_number_of_threads_it_is_that_of_the_cores(tmp_path):
    assert LatencyTable(folder=tmp_path).path == LatencyTable(threads=cores(), folder=tmp_path).path
