from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from torch import nn

from dk2pnet.data.arrays import Feed
from dk2pnet.decompose.moments import Moments
from dk2pnet.decompose.solve import solve
from dk2pnet.deploy.export import onnx_bytes
from dk2pnet.deploy.runtimes.onnxruntime import run_onnx, session
from dk2pnet.errors import InputError
from dk2pnet.networks.onnx.gather import gather_onnx
from dk2pnet.networks.onnx.read import read_onnx
from dk2pnet.networks.onnx.rewrite import rewrite
from dk2pnet.networks.onnx.runner import shapes_of, tensors_of
from dk2pnet.networks.onnx.walk import _Pair, _Walk, layer_of, reconstruct_onnx
from dk2pnet.networks.torch.gather import gather_moments
from graphs import save, small, tensor, weights


def feeds(*counts, size=(9, 7), channels=3):
    return [Feed({"x": weights(count, channels, *size, seed=50 + n)}, count) for n, count in enumerate(counts)]


def deep(tmp_path, layers=4, width=8):
    """A residual network of `layers` convolutions, smooth enough that errors add up rather than cancel."""
    nodes = [helper.make_node("Conv", ["x", "w0"], ["t0"], name="c0", pads=[1] * 4)]
    initializers = [tensor("w0", weights(width, 3, 3, 3, seed=1) / 3)]
    for n in range(1, layers + 1):
        initializers += [
            tensor(f"w{n}", weights(width, width, 3, 3, seed=10 + n) / 6),
            tensor(f"b{n}", weights(width, seed=n)),
        ]
        nodes += [
            helper.make_node("Conv", [f"t{n - 1}", f"w{n}", f"b{n}"], [f"c{n}"], name=f"c{n}", pads=[1] * 4),
            helper.make_node("Relu", [f"c{n}"], [f"r{n}"]),
            helper.make_node("Add", [f"r{n}", f"t{n - 1}"], [f"t{n}"]),
        ]
    made = small()
    del made.graph.node[:]
    del made.graph.initializer[:]
    made.graph.node.extend(nodes)
    made.graph.initializer.extend(initializers)
    made.graph.output[0].CopyFrom(helper.make_tensor_value_info(f"t{layers}", 1, ["n", width, "h", "w"]))
    onnx.checker.check_model(made)
    return read_onnx(save(made, tmp_path))


def test_moments_are_those_of_the_same_network_in_pytorch(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1, groups=2), nn.ReLU(), nn.Conv2d(8, 4, 3)
    )
    (tmp_path / "net.onnx").write_bytes(onnx_bytes(net, torch.zeros(1, 3, 9, 7), input_name="x"))
    network = read_onnx(tmp_path / "net.onnx")
    sites = {site.name: site for site in network.sites if not site.reason}
    assert len(sites) == 2
    batches = feeds(3, 2, 4)
    modules = dict(zip(sites, (net[2], net[4]), strict=True))
    expected = next(
        gather_moments(net, modules, [(torch.from_numpy(feed.arrays["x"]), None) for feed in batches], positions=0)
    )
    # A limit below the need of any layer: one group each. So few samples that all positions are taken.
    groups = list(gather_onnx(network, sites, batches, samples=9, memory=1, threads=1))
    assert [list(group) for group in groups] == [[name] for name in sites]
    for group in groups:
        for name, found in group.items():
            assert found.positions == expected[name].positions
            torch.testing.assert_close(found.input_sum, expected[name].input_sum, rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(found.mean_sum, expected[name].mean_sum, rtol=1e-5, atol=1e-4)


def test_a_group_has_room_for_its_inputs_too(tmp_path):
    network = deep(tmp_path)
    sites = {site.name: site for site in network.sites if site.name != "c0"}
    moments = Moments.bytes_needed(1, next(iter(sites.values())).conv.weight[0].numel(), None)

    def groups(maps):
        given = dict.fromkeys(sites, maps)
        found = gather_onnx(network, sites, feeds(2), samples=2, maps=given, memory=4 * moments, threads=1)
        return [len(group) for group in found]

    assert sum(groups(0)) == len(sites)
    assert groups(0)[0] > groups(moments)[0] == 2 > groups(4 * moments)[0] == 1


def test_activations_that_are_not_finite(tmp_path):
    network = read_onnx(save(small(), tmp_path))
    batches = [Feed({"x": np.full((1, 3, 4, 4), np.inf, np.float32)})]
    with pytest.raises(InputError, match="activations at 'two' are not finite"):
        list(gather_onnx(network, {"two": network.sites[1]}, batches, samples=1, threads=1))


def test_shapes_and_tensors_by_name(tmp_path):
    network = read_onnx(save(small(strides=[2, 2]), tmp_path))
    feed = feeds(2)[0]
    shapes = shapes_of(network, feed, ["x", "c1", "c2", "w2", ""], 1)
    assert {name: shapes[name] for name in ("x", "c1", "c2", "w2")} == {
        "x": (2, 3, 9, 7),
        "c1": (2, 8, 9, 7),
        "c2": (2, 12, 5, 4),
        "w2": (12, 8, 3, 3),
    }
    assert tensors_of(network.proto, ["x"], 1)(feed)["x"] is feed.arrays["x"]


def test_the_walk_sees_the_inputs_that_the_graphs_have(tmp_path):
    network = deep(tmp_path)
    sites = [site for site in network.sites if not site.reason]
    batches = feeds(2, 3)
    other = {site.name: layer_of(site, solve(site.module.weight, [1] * 8)) for site in sites}
    seen = {}

    def visit(site, teacher, student):
        seen[site.name] = list(teacher), list(student)
        return other[site.name].fold().detach(), other[site.name].bias

    _Walk(network, sites, 1).run(batches, visit)
    replaced = rewrite(network, other, dict.fromkeys(other, "folded"))
    for site in sites:
        for place, proto in enumerate((network.proto, replaced)):
            run = tensors_of(proto, [site.x], 1)
            for feed, found in zip(batches, seen[site.name][place], strict=True):
                np.testing.assert_allclose(found, run(feed)[site.x], rtol=1e-4, atol=1e-5)
    assert not np.allclose(*(side[0] for side in seen["c4"]))  # the student is another network by then


def test_the_sums_of_inputs_far_from_zero_keep_their_variance():
    """In float32 the square of 3,000 has no room for a variance of 1e-4."""
    generator = torch.Generator().manual_seed(0)
    teacher = 3000 + 0.01 * torch.randn(500, 2, 9, generator=generator)
    student = teacher - 1 + 0.01 * torch.randn(500, 2, 9, generator=generator)
    sums = _Pair(nn.Conv2d(2, 4, 3, groups=2))
    for start, stop in ((0, 100), (100, 350), (350, 500)):
        sums.add(teacher[start:stop], student[start:stop])
    mean_teacher, mean_student, square, cross = sums.centred(torch.eye(9, dtype=torch.double).expand(2, -1, -1))
    u, v = (side.double().transpose(0, 1) for side in (teacher, student))
    torch.testing.assert_close(mean_teacher, u.mean(1), rtol=1e-9, atol=0)
    torch.testing.assert_close(mean_student, v.mean(1), rtol=1e-9, atol=0)
    u, v = u - u.mean(1, keepdim=True), v - v.mean(1, keepdim=True)
    torch.testing.assert_close(square, v.transpose(1, 2) @ v / 500, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(cross, u.transpose(1, 2) @ v / 500, rtol=1e-4, atol=1e-9)


def smooth(batches):
    """Inputs whose neighbours are alike, as in images: without that there is little to reconstruct from."""
    return [Feed({"x": feed.arrays["x"].cumsum(2).cumsum(3) / 8}, feed.samples) for feed in batches]


def error(network, layers, batches):
    off = energy = 0.0
    new = session(rewrite(network, layers).SerializeToString(), 1)
    old = session(network.proto.SerializeToString(), 1)
    for feed in batches:
        a, b = run_onnx(old, feed)[0], run_onnx(new, feed)[0]
        off, energy = off + np.square(a - b).sum(), energy + np.square(a).sum()
    return off / energy


def test_reconstruction_and_bias_correction_bring_the_outputs_closer(tmp_path):
    network = deep(tmp_path)
    sites = {site.name: site for site in network.sites if not site.reason}
    batches, unseen = smooth(feeds(16, 16)), smooth(feeds(0, 0, 0, 8)[3:])
    counts = {name: torch.tensor([1] * 8) for name in sites}
    moments = next(gather_onnx(network, sites, batches, samples=32, threads=1))
    plain = {
        name: layer_of(site, solve(site.module.weight, counts[name], moments[name].A())) for name, site in sites.items()
    }
    done = []
    better = reconstruct_onnx(network, plain, counts, batches, threads=1, progress=done.append)
    shifted = reconstruct_onnx(network, plain, None, batches, threads=1)
    assert done == [1, 2, 3, 4]
    assert list(better) == list(sites)
    torch.testing.assert_close(shifted["c2"].kernels, plain["c2"].kernels)
    before, corrected, rebuilt = (error(network, layers, unseen) for layers in (plain, shifted, better))
    print(before, corrected, rebuilt)
    assert corrected < before
    assert rebuilt < 0.9 * corrected


def test_a_little_memory_is_enough_for_a_part_of_the_samples(tmp_path):
    network = deep(tmp_path, layers=2)
    counts = {name: torch.tensor([9] * 8) for name in ("c1", "c2")}
    plain = {
        site.name: layer_of(site, solve(site.module.weight, counts[site.name]))
        for site in network.sites
        if not site.reason
    }
    taken = []

    def batches():
        for feed in feeds(8, 8, 8):
            taken.append(feed)
            yield feed

    class Again:
        def __iter__(self):
            return batches()

    better = reconstruct_onnx(network, plain, counts, Again(), memory=1, threads=1)
    assert len(taken) == 2  # one to learn what it takes, and that one again
    assert error(network, better, feeds(4)) < 1e-6  # all nine kernels: exact


def test_biases_where_there_were_none(tmp_path):
    made = small()
    del made.graph.node[2].input[2:]
    network = read_onnx(save(made, tmp_path))
    site = network.sites[1]
    plain = {"two": layer_of(site, solve(site.module.weight, [1] * 8))}
    batches = feeds(8, 8)
    better = reconstruct_onnx(network, plain, None, batches, threads=1)
    assert better["two"].bias is not None
    # What a free bias can do: the mean response is right.
    run_old, run_new = (tensors_of(proto, ["c2"], 1) for proto in (network.proto, rewrite(network, better)))
    means = [
        np.mean(np.concatenate([run(feed)["c2"] for feed in batches]), axis=(0, 2, 3)) for run in (run_old, run_new)
    ]
    np.testing.assert_allclose(*means, rtol=1e-3, atol=1e-4)
