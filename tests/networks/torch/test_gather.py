"""Gathered moments against unfold and explicit autograd; nothing is left behind in the network."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dk2pnet.decompose.moments import Moments
from dk2pnet.errors import InputError
from dk2pnet.measure import inference_of
from dk2pnet.networks import patches as module
from dk2pnet.networks.patches import input_patches
from dk2pnet.networks.torch import gather
from dk2pnet.networks.torch.gather import gather_moments

IMAGES, CLASSES = 7, 5
some = settings(deadline=None, max_examples=20)


class Net(nn.Module):
    """Every geometry at once: strides, dilation, groups, all padding modes, a convolution used twice."""

    def __init__(self, inplace=False):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, (3, 2), stride=(1, 2), padding=(1, 0), padding_mode="reflect")
        self.norm = nn.BatchNorm2d(4)
        self.shared = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False)
        self.wide = nn.Conv2d(4, 6, 3, padding=2, dilation=2, padding_mode="circular", groups=2)
        self.even = nn.Conv2d(6, 6, (2, 3), padding="same", padding_mode="replicate", groups=3)
        self.last = nn.Conv2d(6, 4, 2, stride=2, padding="valid")
        self.relu = nn.ReLU(inplace)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        x = self.relu(self.norm(self.stem(x)))
        x = self.relu(self.shared(self.relu(self.shared(x))))
        x = self.relu(self.wide(x))
        x = self.last(self.relu(self.even(x)))
        return 3 * self.head(F.relu(x).mean((2, 3)))


def network(inplace=False):
    torch.manual_seed(0)
    net = Net(inplace)
    nn.init.uniform_(net.norm.running_mean, -0.5, 0.5)
    nn.init.uniform_(net.norm.running_var, 0.5, 2)
    return net


def images(count=IMAGES, seed=1):
    return torch.randn(count, 3, 9, 10, generator=torch.Generator().manual_seed(seed))


def convolutions(net):
    return {name: conv for name, conv in net.named_modules() if isinstance(conv, nn.Conv2d)}


def batched(x, sizes):
    return [(part, None) for part in x.split(sizes)]


def gathered(net, batches, **options):
    moments = {}
    for group in gather_moments(net, convolutions(net), batches, **options):
        assert not moments.keys() & group.keys()
        moments |= group
    assert list(moments) == list(convolutions(net))
    return moments


def unfolded(conv, x):
    """All patches (B, G, C q, L) by F.unfold, in float64."""
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    if conv.padding == "same":
        around = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        (top, left), (bottom, right) = [a // 2 for a in around], [a - a // 2 for a in around]
    else:
        top, left = (0, 0) if conv.padding == "valid" else conv.padding
        bottom, right = top, left
    x = F.pad(x.double(), (left, right, top, bottom), mode=mode)
    columns = F.unfold(x, conv.kernel_size, conv.dilation, 0, conv.stride)
    return columns.view(len(x), conv.groups, -1, columns.shape[2])


def run_recording(net, x):
    """Logits, and every convolution's inputs and outputs in order, of the network in evaluation mode."""
    net = copy.deepcopy(net).eval()
    seen = {name: [] for name in convolutions(net)}
    for name, conv in convolutions(net).items():
        conv.register_forward_hook(lambda _, args, y, name=name: seen[name].append((args[0].detach().clone(), y)))
    return net(x), seen


def assert_close(ours, theirs, tolerance=1e-5):
    for a, b in zip(
        (ours.input_sum, ours.mean_sum, ours.output_sum),
        (theirs.input_sum, theirs.mean_sum, theirs.output_sum),
        strict=True,
    ):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.abs().max()))
    assert (ours.positions, ours.images) == (theirs.positions, theirs.images)


def all_closes(ours, theirs, tolerance=1e-5):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert_close(ours[name], theirs[name], tolerance)


# -- the numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("piece_bytes", [1, 10_000, 2**26])
def test_moments_at_all_positions_are_those_of_unfold(monkeypatch, piece_bytes, channels_last):
    monkeypatch.setattr(module, "_PIECE_BYTES", piece_bytes)
    net, x = network(), images()
    _, seen = run_recording(net, x)
    if channels_last:
        net, x = net.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    moments = gathered(net, batched(x, 3), positions=0)
    for name, conv in convolutions(net).items():
        columns = torch.cat([unfolded(conv, given_x) for given_x, _ in seen[name]])
        rows = columns.permute(1, 0, 3, 2).flatten(1, 2)  # (G, n, C q)
        assert len(seen[name]) == (2 if name == "shared" else 1)
        assert moments[name].positions == rows.shape[1]
        torch.testing.assert_close(moments[name].A(), rows.transpose(1, 2) @ rows / rows.shape[1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(moments[name].mean(), rows.mean(1), rtol=1e-5, atol=1e-5)
        assert moments[name].B() is None


def test_patches_are_what_the_convolution_multiplies_by_its_weight():
    net, x = network().double(), images().double()
    _, seen = run_recording(net, x)
    for name, conv in convolutions(net).items():
        for given_x, y in seen[name]:
            rows = input_patches(conv, given_x)
            weight = conv.weight.view(conv.groups, conv.out_channels // conv.groups, -1)
            out = torch.einsum("ngi,goi->ngo", rows, weight).flatten(1)
            out = out if conv.bias is None else out + conv.bias
            torch.testing.assert_close(out, y.permute(0, 2, 3, 1).reshape(-1, conv.out_channels))


@some
@given(st.integers(1, 120), st.integers(0, 50), st.integers(0, 9), st.integers(0, 99))
def test_sampled_positions_are_different_ones_of_the_own_image(positions, first, seed, drawn):
    x = torch.randn(3, 2, 9, 9, generator=torch.Generator().manual_seed(drawn), dtype=torch.float64)
    conv = nn.Conv2d(2, 2, 3, padding=1)
    picked = input_patches(conv, x, first, positions, seed).view(3, min(positions, 81), -1)
    every = input_patches(conv, x).view(3, 81, -1)
    for mine, all_mine in zip(picked, every, strict=True):
        found = (mine.unsqueeze(1) == all_mine.unsqueeze(0)).all(2)
        assert (found.sum(1) == 1).all()
        assert (found.sum(0) <= 1).all()
    for row in range(3):
        alone = input_patches(conv, x[row : row + 1], first + row, positions, seed)
        assert torch.equal(alone.flatten(), picked[row].flatten())


def test_sampled_positions_cover_the_image_evenly_over_many_images_and_depend_on_the_seed():
    x = torch.arange(49.0).view(1, 1, 7, 7).expand(2000, 1, 7, 7)
    conv = nn.Conv2d(1, 1, 1)
    chosen = input_patches(conv, x, 0, 5).flatten().long()
    share = torch.bincount(chosen, minlength=49) / len(chosen)
    assert float((share * 49 - 1).abs().max()) < 0.35  # 204 +- 14 a position
    assert not torch.equal(chosen, input_patches(conv, x, 0, 5, seed=1).flatten().long())
    assert not torch.equal(chosen, input_patches(conv, x, 1, 5).flatten().long())


def test_sampled_moments_count_positions_and_estimate_the_full_ones():
    net, x = network(), images(200)
    full, sampled = (gathered(net, batched(x, 50), positions=positions) for positions in (0, 12))
    for name in full:
        per_image = full[name].positions // 200
        uses = 2 if name == "shared" else 1
        assert sampled[name].positions == 200 * min(12 * uses, per_image)
        assert float((sampled[name].A() - full[name].A()).norm() / full[name].A().norm()) < 0.2


@pytest.mark.parametrize("inplace", [False, True])
def test_B_is_the_explicit_fisher_of_every_image_alone(inplace):
    x, seed = images(), 3
    moments = gathered(network(inplace), batched(x, 3), gradients=True, positions=4, seed=seed)
    wanted = {
        name: torch.zeros(conv.groups, *[conv.out_channels // conv.groups] * 2)
        for name, conv in convolutions(network()).items()
    }
    for index in range(IMAGES):
        logits, seen = run_recording(network(), x[index : index + 1])
        label = int(gather._sampled_labels(logits, index, seed))
        for name, uses in seen.items():
            likelihood = logits.log_softmax(1)[0, label]
            for g in torch.autograd.grad(likelihood, [y for _, y in uses], retain_graph=True):
                columns = g[0].flatten(1).view(*wanted[name].shape[:2], -1)
                wanted[name] += columns @ columns.transpose(1, 2) / IMAGES
    for name, B in wanted.items():
        assert moments[name].images == IMAGES
        assert float(B.abs().max()) > 0
        torch.testing.assert_close(moments[name].B(), B.double(), rtol=1e-4, atol=1e-5 * float(B.abs().max()))


def test_gathering_B_leaves_A_as_it_is():
    with_B, without = (gathered(network(), batched(images(), 3), gradients=flag) for flag in (True, False))
    for name in with_B:
        assert torch.equal(with_B[name].input_sum, without[name].input_sum)


def test_sampled_labels_follow_the_models_distribution():
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0]).expand(20000, 4)
    labels = gather._sampled_labels(logits, 0, 0)
    share = torch.bincount(labels, minlength=4) / len(labels)
    torch.testing.assert_close(share, logits[0].softmax(0), rtol=0, atol=0.015)
    assert torch.equal(labels[500:700], gather._sampled_labels(logits[:200], 500, 0))
    assert not torch.equal(labels, gather._sampled_labels(logits, 0, 1))
    certain = torch.full((50, 4), -1e4)
    certain[:, 2] = 0
    assert gather._sampled_labels(certain, 0, 0).unique().tolist() == [2]


def test_labels_and_positions_are_drawn_independently():
    positions = module.uniform_of(np.arange(5000), 0)
    labels = module.uniform_of(np.arange(5000), 1)
    assert abs(float(np.corrcoef(positions, labels)[0, 1])) < 0.06
    assert 0 <= positions.min() < positions.max() < 1
    assert abs(positions.mean() - 0.5) < 0.02
    assert abs(float(np.corrcoef(positions[1:], positions[:-1])[0, 1])) < 0.06


# -- batches, memory ----------------------------------------------------------------------------------------------


@some
@given(st.lists(st.integers(1, 3), min_size=3, max_size=IMAGES), st.integers(0, 5), st.booleans())
def test_any_batching_gives_the_same_moments(sizes, seed, gradients):
    x = images()
    while sum(sizes) > IMAGES:
        sizes.pop()
    sizes += [IMAGES - sum(sizes)] if sum(sizes) < IMAGES else []
    options = {"positions": 6, "seed": seed, "gradients": gradients}
    all_closes(gathered(network(), batched(x, sizes), **options), gathered(network(), batched(x, IMAGES), **options))


class Folding(nn.Module):
    """Folds the four quarters of every image into the batch, as networks over windows do."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        quarters = x.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
        y = self.conv(quarters).relu().mean((2, 3))
        return self.head(y.view(len(x), 4, -1).mean(1))


@pytest.mark.parametrize("piece_bytes", [1, 2**26])
def test_any_batching_gives_the_same_moments_where_images_are_folded_into_the_batch(monkeypatch, piece_bytes):
    torch.manual_seed(0)
    net, x = Folding(), torch.randn(6, 3, 16, 16)
    options = {"positions": 5, "gradients": True}
    whole = gathered(net, batched(x, 6), **options)
    monkeypatch.setattr(module, "_PIECE_BYTES", piece_bytes)
    for sizes in (1, 2, 4):
        all_closes(gathered(net, batched(x, sizes), **options), whole)


def test_moments_of_two_halves_of_the_images_add_up_where_no_position_is_sampled():
    x = images(8)
    halves = [gathered(network(), batched(part, 2), positions=0) for part in x.split(4)]
    whole = gathered(network(), batched(x, 8), positions=0)
    all_closes({name: halves[0][name] + halves[1][name] for name in whole}, whole)


def test_so_they_do_where_positions_are_sampled_if_each_half_knows_its_first_image():
    x = images(8)
    options = {"positions": 6, "gradients": True}
    whole = gathered(network(), batched(x, 8), **options)
    halves = [gathered(network(), batched(x[first : first + 4], 2), first_image=first, **options) for first in (0, 4)]
    all_closes({name: halves[0][name] + halves[1][name] for name in whole}, whole)


def test_labels_are_not_looked_at():
    x = images(4)
    plain = gathered(network(), [(x, None)], gradients=True)
    labelled = gathered(network(), [(x, torch.full((4,), 10**6))], gradients=True)
    assert all(torch.equal(plain[name].output_sum, labelled[name].output_sum) for name in plain)


@pytest.mark.parametrize("gradients", [False, True])
def test_bounded_memory_splits_the_layers_and_gives_the_same_numbers(gradients):
    net, batches = network(), batched(images(), 3)
    needs = {
        name: Moments.bytes_needed(
            conv.groups, conv.weight[0].numel(), conv.out_channels // conv.groups if gradients else None
        )
        for name, conv in convolutions(net).items()
    }
    whole = gathered(net, batches, gradients=gradients)
    for memory in (
        1,
        max(needs.values()),
        needs["stem"] + needs["shared"],
        sum(needs.values()) - 1,
        sum(needs.values()),
    ):
        calls = []
        groups = list(
            gather_moments(
                net,
                convolutions(net),
                batches,
                gradients=gradients,
                memory=memory,
                progress=lambda what, done, calls=calls: calls.append((what, done)),
            )
        )
        assert [name for group in groups for name in group] == list(needs)
        for number, group in enumerate(groups):
            total = sum(needs[name] for name in group)
            assert total <= memory or len(group) == 1
            if number + 1 < len(groups):  # no group could have taken the next layer too
                assert total + needs[next(iter(groups[number + 1]))] > memory
            for name, moments in group.items():
                assert torch.equal(moments.input_sum, whole[name].input_sum)
                assert not gradients or torch.equal(moments.output_sum, whole[name].output_sum)
        assert [done for _, done in calls] == [3, 6, 7] * len(groups)
        assert len({what for what, _ in calls}) == len(groups)


def test_no_layers_no_pass():
    def forbidden():
        raise AssertionError("looked at the images")
        yield

    assert list(gather_moments(network(), {}, forbidden())) == []


# -- what is left behind ------------------------------------------------------------------------------------------


def disguise(net):
    """Mixed modes and flags, and gradients of somebody else."""
    net.train()
    net.norm.eval()
    net.even.eval()
    net.stem.weight.requires_grad_(False)
    net.head.bias.requires_grad_(False)
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 7)
    return net


def snapshot(net):
    return {
        "modes": [m.training for m in net.modules()],
        "flags": [p.requires_grad for p in net.parameters()],
        "state": {name: value.clone() for name, value in net.state_dict().items()},
        "grads": [p.grad.clone() for p in net.parameters()],
        "hooks": [
            len(getattr(m, kind))
            for m in net.modules()
            for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        ],
    }


def assert_untouched(net, before):
    after = snapshot(net)
    for what in ("modes", "flags", "hooks"):
        assert after[what] == before[what], what
    assert sum(after["hooks"]) == 0
    assert all(torch.equal(after["state"][name], value) for name, value in before["state"].items())
    assert all(torch.equal(a, b) for a, b in zip(after["grads"], before["grads"], strict=True))


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("memory", [1, 2**30])
def test_the_network_is_left_as_it_was(gradients, memory):
    net = disguise(network())
    before = snapshot(net)
    gathered(net, batched(images(), 3), gradients=gradients, memory=memory)
    assert_untouched(net, before)


def test_the_network_is_as_it_was_between_groups_and_when_the_caller_stops():
    net = disguise(network())
    before = snapshot(net)
    groups = gather_moments(net, convolutions(net), batched(images(), 3), gradients=True, memory=1)
    next(groups)
    assert_untouched(net, before)
    groups.close()
    assert_untouched(net, before)


@pytest.mark.parametrize("gradients", [False, True])
def test_the_images_are_left_as_they_were(gradients):
    net, x = network(), images()
    batches = batched(x.clone(), 3)
    for _ in range(2):
        gathered(net, batches, gradients=gradients, memory=1)
    assert not any(part.requires_grad for part, _ in batches)
    assert all(part.grad is None for part, _ in batches)
    assert torch.equal(torch.cat([part for part, _ in batches]), x)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("where", ["images", "last", "head", "progress"])
def test_the_network_is_left_as_it_was_also_after_an_exception(where, gradients):
    net = disguise(network())
    x, calls = images(), []

    def breaks(*_):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("broken on purpose")

    def batches():
        yield x[:3], None
        if where == "images":
            raise RuntimeError("broken on purpose")
        yield x[3:], None

    if where in ("last", "head"):
        original = getattr(net, where).forward
        getattr(net, where).forward = lambda y: (breaks(), original(y))[1]
    before = snapshot(net)
    progress = breaks if where == "progress" else None
    with pytest.raises(RuntimeError, match="broken on purpose"):
        list(gather_moments(net, convolutions(net), batches(), gradients=gradients, progress=progress))
    assert_untouched(net, before)


def test_inference_of_restores_after_an_exception_and_sets_inside():
    net = disguise(network())
    before = snapshot(net)

    def broken_inside():
        with inference_of(net) as same:
            assert same is net
            assert not any(m.training for m in net.modules())
            assert not any(p.requires_grad for p in net.parameters())
            raise KeyError

    with pytest.raises(KeyError):
        broken_inside()
    assert_untouched(net, before)


def test_gradients_are_gathered_also_under_no_grad_and_from_frozen_networks():
    net, batches = network(), batched(images(), 3)
    wanted = gathered(net, batches, gradients=True)
    with torch.no_grad():
        all_closes(gathered(network(), batches, gradients=True), wanted)
    frozen = network().requires_grad_(False)
    all_closes(gathered(frozen, batches, gradients=True), wanted)


# -- what cannot be used ------------------------------------------------------------------------------------------


class Returns(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.conv, self.what = nn.Conv2d(3, 4, 3), what

    def forward(self, x):
        return self.what(self.conv(x))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (lambda y: y, "(2, 4, 7, 8)"),
        (lambda y: y.mean((2, 3))[:, :1], "(2, 1)"),
        (lambda y: y.mean((1, 2, 3)), "(2,)"),
        (lambda y: {"maps": y}, "(2, 4, 7, 8)"),
        (lambda y: (y.mean((2, 3)), y), "(2, 4) and (2, 4, 7, 8)"),
    ],
)
def test_the_loss_criterion_needs_a_classifier(what, said):
    net = Returns(what)
    with pytest.raises(InputError, match="response") as caught:
        gathered(net, [(images(2), None)], gradients=True)
    assert said in str(caught.value)
    assert not net.conv._forward_hooks
    assert not net.conv._forward_pre_hooks
    # and the criterion that the message names works
    assert gathered(net, [(images(2), None)])["conv"].positions > 0


def test_class_scores_may_stand_in_a_dictionary():
    def seeded(what):
        torch.manual_seed(0)
        return Returns(what)

    bare, inside = (
        gathered(seeded(what), [(images(2), None)], gradients=True)["conv"]
        for what in (lambda y: y.mean((2, 3)), lambda y: {"logits": y.mean((2, 3))})
    )
    torch.testing.assert_close(inside.B(), bare.B())


def test_half_precision_does_not_leave_its_range():
    """Sums of squares beyond 65,504."""
    patches = torch.full((4000, 1, 9), 8.0)
    sums = [Moments.zeros(1, 9) for _ in range(2)]
    for each, dtype in zip(sums, (torch.float32, torch.float16), strict=True):
        each.add_patches(patches.to(dtype))
    torch.testing.assert_close(sums[1].A(), sums[0].A())


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused_by_the_name_of_the_layer(gradients, value):
    net = network()
    with torch.no_grad():
        net.wide.bias[0] = value
    with pytest.raises(InputError, match="'even'" if not gradients else "not finite"):
        gathered(net, batched(images(), 3), gradients=gradients, positions=0)
    assert net.training
    x = images()
    x[4, 0, 2, 2] = value
    with pytest.raises(InputError, match="'stem'"):
        gathered(network(), batched(x, 3), gradients=gradients, positions=0)


@pytest.mark.parametrize("gradients", [False, True])
def test_no_images_is_an_input_error(gradients):
    net = disguise(network())
    before = snapshot(net)
    with pytest.raises(InputError, match="no calibration images"):
        gathered(net, [], gradients=gradients)
    assert_untouched(net, before)


@pytest.mark.parametrize("padding", [(1, 2), "same", "valid"])
def test_a_convolution_that_was_dilated_after_it_was_made_gets_its_present_patches(padding):
    """As backbones for segmentation are: the layer remembers the padding that it was made with."""
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 3, padding=padding, bias=False)
    conv.dilation = (2, 2)
    if padding == (1, 2):
        conv.padding = (2, 2)
    x = images()[:, :2]
    y = conv(x)
    found = input_patches(conv, x)[:, 0] @ conv.weight.flatten(1).T
    torch.testing.assert_close(found.view(len(x), *y.shape[2:], 3).permute(0, 3, 1, 2), y)


class Frozen(nn.Module):
    """The usual fine-tuning of a head on a backbone that stays."""

    def __init__(self):
        super().__init__()
        self.backbone, self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, CLASSES)

    def forward(self, x):
        with torch.no_grad():
            x = self.backbone(x)
        return self.head(self.conv(x).mean((2, 3)))


def test_a_layer_that_no_gradient_reaches_is_named():
    net, x = Frozen(), images(4)
    with pytest.raises(InputError, match=r"'backbone' without them .* --criterion response, or --keep backbone"):
        gathered(net, [(x, None)], gradients=True)
    without = list(gathered(net, [(x, None)]))
    assert without == ["backbone", "conv"]


class Subtracting(Net):
    def forward(self, x):
        x -= 1
        return super().forward(x)


def test_a_network_that_changes_its_input_gives_the_moments_of_one_that_does_not():
    torch.manual_seed(0)
    net, x = Subtracting(), images(4)
    plain = Net()
    plain.load_state_dict(net.state_dict())
    found = gathered(net, [(x.clone(), None)], gradients=True)
    all_closes(found, gathered(plain, [(x - 1, None)], gradients=True))
