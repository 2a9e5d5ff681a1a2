"""DKConv2d: every form is the convolution with the folded weight, in values and in gradients."""

import copy
from contextlib import contextmanager
from itertools import product
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dk2pnet.deploy.emit import plain_model
from dk2pnet.errors import InputError
from dk2pnet.layer import FORMS, DKConv2d, set_fast_form, set_form

# Rounding of one output relative to the same convolution of absolute values, per dtype.
ROUNDING = {torch.float64: 1e-13, torch.float32: 5e-6, torch.bfloat16: 4e-2}

exact = settings(deadline=None, max_examples=60)
few = settings(deadline=None, max_examples=25)


@st.composite
def counts_of(draw, groups, width, most=5):
    """C counts, zeros likely, the same sum in every group: groups need not agree channel by channel."""
    total = draw(st.integers(1, most))
    counts = []
    for _ in range(groups):
        chosen = draw(st.lists(st.integers(0, width - 1), min_size=total, max_size=total))
        counts += [chosen.count(channel) for channel in range(width)]
    return counts


def pairs(low, high):
    return st.one_of(st.integers(low, high), st.tuples(st.integers(low, high), st.integers(low, high)))


def both(value):
    return value if isinstance(value, tuple) else (value, value)


@st.composite
def cases(draw):
    """Arguments of a layer, its counts, and the size of an input that it can take."""
    groups = draw(st.integers(1, 3))
    width = draw(st.integers(2, 4))
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    dilation = draw(pairs(1, 2))
    padding = draw(st.one_of(pairs(0, 2), st.sampled_from(["same", "valid"])))
    arguments = {
        "in_channels": groups * width,
        "out_channels": groups * draw(st.integers(1, 4)),
        "kernel_size": kernel,
        "stride": 1 if padding == "same" else draw(pairs(1, 3)),
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "bias": draw(st.booleans()),
        "padding_mode": draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    }
    reach = [d * (k - 1) + 1 for d, k in zip(both(dilation), kernel, strict=True)]
    size = tuple(max(side, 3) + draw(st.integers(0, 3)) for side in reach)
    return arguments, draw(counts_of(groups, width)), size


def folded_by_hand(kernels, combination, source, channels, groups):
    """The definition, kernel by kernel: column j in group g belongs to the j-th kernel of group g."""
    outputs, width = combination.shape[0] // groups, channels // groups
    weight = [[torch.zeros(kernels.shape[2:]).to(kernels) for _ in range(width)] for _ in range(groups * outputs)]
    seen = [0] * groups
    for kernel, channel in zip(kernels[:, 0], source.tolist(), strict=True):
        group = channel // width
        for n in range(group * outputs, (group + 1) * outputs):
            weight[n][channel % width] = weight[n][channel % width] + combination[n, seen[group], 0, 0] * kernel
        seen[group] += 1
    return torch.stack([torch.stack(row) for row in weight])


def plain(arguments, weight, bias, x):
    """PyTorch's own convolution with these arguments, in float64."""
    conv = nn.Conv2d(**arguments, dtype=torch.float64)
    return conv._conv_forward(x, weight, bias)


def make(arguments, counts, seed, dtype=torch.float64, **more):
    torch.manual_seed(seed)
    return DKConv2d(**arguments, counts=counts, dtype=dtype, **more)


def references(arguments, layer, x):
    """The exact output, and the same with absolute values: the yardstick of rounding."""
    kernels, combination = layer.kernels.detach().double(), layer.combination.detach().double()
    bias = None if layer.bias is None else layer.bias.detach().double()
    rest = layer.source, layer.in_channels, layer.groups
    exact = plain(arguments, folded_by_hand(kernels, combination, *rest), bias, x.double())
    absolute = folded_by_hand(kernels.abs(), combination.abs(), *rest)
    return exact, plain(arguments, absolute, None if bias is None else bias.abs(), x.double().abs())


def assert_forms(arguments, layer, x):
    """Every form computes the layer's definition, up to rounding."""
    wanted, yardstick = references(arguments, layer, x)
    for form in FORMS:
        layer.form = form
        y = layer(x)
        assert y.dtype == x.dtype
        assert y.shape == wanted.shape
        excess = (y.detach().double() - wanted).abs() - ROUNDING[x.dtype] * yardstick - 1e-30
        assert excess.max() <= 0, f"{form} is off"


# -- values and gradients -----------------------------------------------------------------------------------------


@exact
@given(
    cases(),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    st.sampled_from([torch.contiguous_format, torch.channels_last]),
    st.integers(0, 2),
    st.integers(0, 99),
)
def test_every_form_is_the_convolution_with_the_folded_weight(case, dtype, memory_format, batch, seed):
    arguments, counts, size = case
    layer = make(arguments, counts, seed, dtype).to(memory_format=memory_format)
    if batch:
        x = torch.randn(batch, arguments["in_channels"], *size).to(dtype).to(memory_format=memory_format)
    else:
        x = torch.randn(arguments["in_channels"], *size).to(dtype)
    assert_forms(arguments, layer, x)


@few
@given(cases(), st.integers(0, 99))
def test_fx_follows_every_form(case, seed):
    """As `create_feature_extractor`, quantisation and other tools do."""
    arguments, counts, size = case
    layer = make(arguments, counts, seed)
    x = torch.randn(2, arguments["in_channels"], *size, dtype=torch.float64)
    for form in FORMS:
        layer.form = form
        with torch.no_grad():
            assert torch.equal(torch.fx.symbolic_trace(layer)(x), layer(x))


@exact
@given(cases(), st.integers(0, 99))
def test_fold_is_the_sum_over_kernels(case, seed):
    arguments, counts, _ = case
    layer = make(arguments, counts, seed)
    by_hand = folded_by_hand(layer.kernels, layer.combination, layer.source, layer.in_channels, layer.groups)
    torch.testing.assert_close(layer.fold(), by_hand, rtol=1e-12, atol=1e-14)


@few
@given(cases(), st.integers(0, 99))
def test_gradients_of_all_forms_agree(case, seed):
    arguments, counts, size = case
    layer = make(arguments, counts, seed)
    x = torch.randn(2, arguments["in_channels"], *size, dtype=torch.float64, requires_grad=True)
    leaves = [x, *layer.parameters()]
    weight = folded_by_hand(layer.kernels, layer.combination, layer.source, layer.in_channels, layer.groups)
    y = plain(arguments, weight, layer.bias, x)
    upstream = torch.randn_like(y)
    wanted = torch.autograd.grad(y, leaves, upstream)
    assert len(leaves) == 3 + arguments["bias"]
    for form in FORMS:
        layer.form = form
        got = torch.autograd.grad(layer(x), leaves, upstream)
        for ours, theirs in zip(got, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_an_input_with_another_number_of_channels_is_an_error_in_every_form(form):
    layer = DKConv2d(4, 6, 3, counts=[1, 0, 2, 1], form=form)
    for channels in (2, 6):
        with pytest.raises((RuntimeError, IndexError, ValueError)):
            layer(torch.randn(1, channels, 8, 8))


@few
@given(cases(), st.integers(0, 99))
def test_to_dense_is_a_plain_convolution_of_the_same_function(case, seed):
    arguments, counts, size = case
    layer = make(arguments, counts, seed).eval()
    conv = layer.to_dense()
    assert type(conv) is nn.Conv2d
    assert not conv.training
    theirs = nn.Conv2d(**arguments)
    for name in ("stride", "padding", "dilation", "groups", "padding_mode", "kernel_size"):
        assert getattr(conv, name) == getattr(theirs, name) == getattr(layer, name)
    assert (conv.bias is None) == (theirs.bias is None)
    x = torch.randn(2, arguments["in_channels"], *size, dtype=torch.float64)
    torch.testing.assert_close(conv(x), layer(x), rtol=1e-10, atol=1e-10)
    before = layer(x)
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.zero_()
    assert torch.equal(layer(x), before), "the dense copy shares storage with the layer"


@few
@given(cases(), st.integers(0, 99), st.sampled_from(FORMS))
def test_full_rank_reproduces_the_convolution(case, seed, form):
    arguments, _, size = case
    torch.manual_seed(seed)
    conv = nn.Conv2d(**arguments)
    kh, kw = arguments["kernel_size"]
    layer = DKConv2d.from_dense(conv, kh * kw, form)
    # more kernels than outputs or taps add nothing
    rank = min(kh * kw, arguments["out_channels"] // arguments["groups"])
    assert layer.counts == [rank] * arguments["in_channels"]
    x = torch.randn(2, arguments["in_channels"], *size)
    torch.testing.assert_close(layer(x), conv(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_from_dense_keeps_dtype_mode_flag_and_bias(dtype):
    conv = nn.Conv2d(4, 6, 3, padding="same", dtype=dtype).eval()
    conv.weight.requires_grad_(False)
    layer = DKConv2d.from_dense(conv, [1, 2, 0, 3])
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert not any(p.requires_grad for p in layer.parameters())
    assert not layer.training
    assert torch.equal(layer.bias, conv.bias)
    assert layer.counts == [1, 2, 0, 3]
    assert DKConv2d.from_dense(nn.Conv2d(4, 6, 3, bias=False), 1).bias is None


def test_counts_above_the_rank_in_one_group_only():
    """Rank 3 (three outputs): what a channel gets beyond it would leave the groups uneven."""
    with pytest.raises(InputError, match="a channel has 3 at most"):
        DKConv2d.from_dense(nn.Conv2d(4, 6, 3, groups=2), [4, 2, 3, 3])


# -- structure ----------------------------------------------------------------------------------------------------


@exact
@given(cases())
def test_source_is_sorted_by_branch_and_counts_come_back(case):
    arguments, counts, _ = case
    layer = make(arguments, counts, 0)
    branches = [[c for c, count in enumerate(counts) if count > branch] for branch in range(max(counts))]
    assert layer.source.tolist() == [channel for branch in branches for channel in branch]
    assert layer.source.dtype == torch.int64
    assert layer.counts == counts
    assert layer.branch_sizes == [len(branch) for branch in branches]
    total, (kh, kw) = sum(counts), arguments["kernel_size"]
    assert layer.kernels.shape == (total, 1, kh, kw)
    assert layer.combination.shape == (arguments["out_channels"], total // arguments["groups"], 1, 1)


def test_one_number_stands_for_all_channels():
    layer = DKConv2d(3, 4, (3, 1), counts=2)
    assert layer.counts == [2, 2, 2]
    assert layer.branch_sizes == [3, 3]
    assert DKConv2d(3, 4, 3).counts == [1, 1, 1]
    assert DKConv2d(3, 4, 3, counts=torch.tensor([0, 2, 1])).counts == [0, 2, 1]


@pytest.mark.parametrize(
    ("counts", "groups", "said"),
    [
        ([1, 1, 1], 1, ["3", "4"]),
        ([1] * 5, 1, ["5", "4"]),
        ([1, -1, 1, 1], 1, ["-1"]),
        (-2, 1, ["-2"]),
        ([1, 1, 1, 2], 2, ["[2, 3]", "group"]),
        ([1, 1, 0, 0], 2, ["[0, 2]", "group"]),
        ([0, 0, 0, 0], 1, ["0", "at least one"]),
        (0, 2, ["0", "at least one"]),
    ],
)
def test_bad_counts_are_refused(counts, groups, said):
    for build in (
        lambda: DKConv2d(4, 6, 3, groups=groups, counts=counts),
        lambda: DKConv2d.from_dense(nn.Conv2d(4, 6, 3, groups=groups), counts),
    ):
        with pytest.raises(InputError, match="counts") as caught:
            build()
        assert all(part in str(caught.value) for part in said)


def test_an_unknown_form_is_refused_and_the_old_one_kept():
    layer = DKConv2d(4, 6, 3, form="concat")
    with pytest.raises(InputError, match="dense.*folded, branches, concat"):
        layer.form = "dense"
    assert layer.form == "concat"
    with pytest.raises(InputError, match="form"):
        DKConv2d(4, 6, 3, form="")


def test_set_form_reaches_every_layer():
    model = nn.Sequential(DKConv2d(3, 4, 3), nn.Sequential(nn.ReLU(), DKConv2d(4, 4, 3)), nn.Conv2d(4, 2, 1))
    for form in FORMS:
        set_form(model, form)
        assert [module.form for module in model.modules() if isinstance(module, DKConv2d)] == [form, form]


@pytest.mark.parametrize(
    ("arguments", "counts", "form", "wide"),
    [
        ((64, 64, 3), 2, "branches", "branches"),
        ((64, 64, 3), [3, 1] * 32, "gathered", "folded"),
        ((64, 64, 3), 4, "folded", "folded"),
        ((256, 256, 3), [3, 1] * 128, "gathered", "gathered"),
        ((3, 64, 7, 2), 10, "folded", "folded"),  # few channels: the products are small, the depthwise part is most
        ((32, 64, 5), 3, "branches", "branches"),
        ((32, 64, 5), 6, "folded", "folded"),
    ],
)
def test_the_fast_form_is_the_cheapest_of_a_processor(monkeypatch, arguments, counts, form, wide):
    """The depthwise part of a kernel costs as much as many rows of the dense product, the more the more taps it has,
    and the more where channels are gathered and the dense product is fast: with wide vectors."""
    layer = DKConv2d(*arguments, counts=counts)
    for vectors, expected in {"AVX2": form, "DEFAULT": form, "AVX512": wide}.items():
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda vectors=vectors: vectors)
        set_fast_form(layer, torch.device("cpu"))
        assert layer.form == expected
    set_fast_form(layer, torch.device("cuda"))
    assert layer.form == "folded"


@pytest.mark.parametrize(
    ("stride", "half", "form"), [(1, True, "branches"), (2, True, "folded"), (2, False, "branches")]
)
def test_a_strided_layer_is_folded_in_half_precision(stride, half, form):
    """PyTorch's depthwise convolution takes five times as long as the whole dense one there."""
    layer = DKConv2d(256, 256, 3, stride, counts=2)
    set_fast_form(layer, torch.device("cpu"), half)
    assert layer.form == form


def test_repr_names_what_differs_from_the_default():
    assert repr(DKConv2d(4, 6, 3, counts=[2, 0, 1, 1])) == (
        "DKConv2d(4, 6, kernel_size=(3, 3), stride=(1, 1), kernels=4 in branches 3+1, form=branches)"
    )
    text = repr(DKConv2d(4, 6, (3, 1), 2, "valid", 2, 2, False, "circular", form="folded"))
    assert text == (
        "DKConv2d(4, 6, kernel_size=(3, 1), stride=(2, 2), padding=valid, dilation=(2, 2), groups=2, "
        "padding_mode=circular, bias=False, kernels=4 in branches 4, form=folded)"
    )


@few
@given(cases(), st.integers(0, 99))
def test_deepcopy_is_the_same_function_and_independent(case, seed):
    arguments, counts, size = case
    layer = make(arguments, counts, seed)
    x = torch.randn(1, arguments["in_channels"], *size, dtype=torch.float64)
    for form in FORMS:
        layer.form = form
        twin, before = copy.deepcopy(layer), layer(x)
        assert twin.form == form
        assert torch.equal(twin(x), before)
        with torch.no_grad():
            for tensor in [*twin.parameters(), *twin.buffers()]:
                tensor.zero_()
        assert torch.equal(layer(x), before)


@contextmanager
def spied_convolutions():
    """Collects (in_channels, out_channels, groups) of every F.conv2d."""
    real, calls = torch.nn.functional.conv2d, []

    def spy(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        calls.append((x.shape[-3], weight.shape[0], groups))
        return real(x, weight, bias, stride, padding, dilation, groups)

    with mock.patch.object(torch.nn.functional, "conv2d", spy):
        yield calls


def _multipliers(arguments, counts, size):
    """The calls, per form, that run a depthwise convolution with a multiplier."""
    layer, found = make(arguments, counts, 0), {}
    x = torch.randn(1, arguments["in_channels"], *size, dtype=torch.float64)
    for form in FORMS:
        layer.form = form
        with spied_convolutions() as calls:
            layer(x)
        assert calls
        found[form] = [call for call in calls if call[0] == call[2] > 1 and call[1] > call[0]]
    return found


@exact
@given(cases())
def test_no_form_runs_a_depthwise_convolution_with_a_multiplier(case):
    assert _multipliers(*case) == {form: [] for form in FORMS}


def test_each_form_runs_the_convolutions_that_it_is_named_for():
    arguments = {"in_channels": 4, "out_channels": 6, "kernel_size": 3}
    layer = make(arguments, [2, 0, 1, 3], 0)
    expected = {
        "folded": [(4, 6, 1)],
        "branches": [(3, 3, 3), (3, 6, 1), (2, 2, 2), (2, 6, 1), (1, 1, 1), (1, 6, 1)],
        "concat": [(3, 3, 3), (2, 2, 2), (1, 1, 1), (6, 6, 1)],
    }
    for form, wanted in expected.items():
        layer.form = form
        with spied_convolutions() as calls:
            layer(torch.randn(1, 4, 5, 5, dtype=torch.float64))
        assert calls == wanted


# -- state --------------------------------------------------------------------------------------------------------


def test_state_holds_what_the_design_says_and_nothing_else():
    layer = DKConv2d(4, 6, 3, groups=2, counts=[2, 0, 1, 1])
    assert set(layer.state_dict()) == {"kernels", "combination", "bias", "source"}
    assert set(DKConv2d(4, 6, 3, bias=False).state_dict()) == {"kernels", "combination", "source"}


@few
@given(cases(), st.data(), st.booleans())
def test_state_loads_into_a_layer_made_with_other_counts(case, data, assign):
    arguments, counts, size = case
    groups = arguments["groups"]
    others = data.draw(counts_of(groups, arguments["in_channels"] // groups))
    saved, model = make(arguments, counts, 1), nn.Sequential(nn.ReLU(), make(arguments, others, 2))
    state = {f"1.{name}": value.clone() for name, value in saved.state_dict().items()}
    result = model.load_state_dict(state, assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    loaded = model[1]
    assert loaded.counts == counts
    assert loaded.branch_sizes == saved.branch_sizes
    assert repr(loaded) == repr(saved)
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), saved.state_dict().values(), strict=True)
    )
    assert all(isinstance(parameter, nn.Parameter) for parameter in loaded.parameters())
    x = torch.randn(1, arguments["in_channels"], *size, dtype=torch.float64)
    for form in FORMS:
        saved.form = loaded.form = form
        assert torch.equal(loaded(x), saved(x))
    loaded(x).sum().backward()
    assert all(parameter.grad.shape == parameter.shape for parameter in loaded.parameters())


_HERE = {"in_channels": 4, "out_channels": 6, "kernel_size": (3, 3), "padding": 1}
_FOREIGN = {
    "other outputs, other counts": ({**_HERE, "out_channels": 5}, [1, 2, 1, 1]),
    "other outputs, as many kernels": ({**_HERE, "out_channels": 5}, [0, 1, 2, 1]),
    "other kernel size": ({**_HERE, "kernel_size": (3, 1)}, [2, 1, 0, 1]),
    "other kernel size, other counts": ({**_HERE, "kernel_size": (3, 1)}, [2, 1, 1, 1]),
    "other kernel size, as many kernels": ({**_HERE, "kernel_size": (3, 1)}, [0, 1, 2, 1]),
    "more inputs": ({**_HERE, "in_channels": 8}, [1] * 8),
}


@pytest.mark.parametrize("foreign", _FOREIGN)
@pytest.mark.parametrize("here", [[2, 1, 0, 1], [1, 1, 1, 1], [0, 0, 4, 0]])
def test_state_of_wrong_shapes_is_pytorchs_error_and_leaves_a_usable_layer(foreign, here):
    arguments, counts = _FOREIGN[foreign]
    layer = make(_HERE, here, 0)
    with pytest.raises(RuntimeError, match="size mismatch for"):
        layer.load_state_dict(make(arguments, counts, 1).state_dict())
    assert_forms(_HERE, layer, torch.randn(2, 4, 6, 6, dtype=torch.float64))


@pytest.mark.parametrize("name", ["kernels", "combination", "source"])
def test_a_missing_key_is_pytorchs_error_and_leaves_a_usable_layer(name):
    layer, state = make(_HERE, [2, 1, 0, 1], 0), make(_HERE, [0, 1, 2, 1], 1).state_dict()
    del state[name]
    with pytest.raises(RuntimeError, match=f"Missing key.*{name}"):
        layer.load_state_dict(state)
    assert_forms(_HERE, layer, torch.randn(2, 4, 6, 6, dtype=torch.float64))


@pytest.mark.parametrize("source", [[0, 0, 1, 2, 3], [0, 1, 2, 3, 9], [0, 1, 2, 3, -1]])
def test_state_with_an_impossible_source_is_refused_and_leaves_a_usable_layer(source):
    layer, state = make(_HERE, [2, 1, 0, 1], 0), make(_HERE, [2, 1, 1, 1], 1).state_dict()
    state["source"] = torch.tensor(source)
    with pytest.raises((InputError, RuntimeError)):
        layer.load_state_dict(state)
    assert_forms(_HERE, layer, torch.randn(2, 4, 6, 6, dtype=torch.float64))


@pytest.mark.parametrize(
    ("source", "refused"), [([1, 0, 2, 3], True), ([2, 3, 0, 1], True), ([0, 2, 1, 3], True), ([0, 1, 2, 2], False)]
)
def test_state_with_a_source_out_of_order_is_refused_and_with_another_computed_alike(source, refused):
    """A foreign order of kernels inside a branch, or other counts: never silently two functions."""
    arguments = {**_HERE, "groups": 2}
    layer, state = make(arguments, 1, 0), make(arguments, 1, 1).state_dict()
    state["source"] = torch.tensor(source)
    if refused:
        with pytest.raises((InputError, RuntimeError)):
            layer.load_state_dict(state)
    else:
        layer.load_state_dict(state)
        assert layer.source.tolist() == source
    assert_forms(arguments, layer, torch.randn(2, 4, 6, 6, dtype=torch.float64))


@pytest.mark.parametrize("counts", [1, [2, 0, 1, 1]])
def test_a_layer_can_be_made_on_the_meta_device_as_a_convolution_can(counts):
    layer = DKConv2d(4, 6, 3, counts=counts, device="meta")
    assert layer.kernels.is_meta
    assert layer.combination.is_meta
    saved = make({"in_channels": 4, "out_channels": 6, "kernel_size": 3}, [1, 2, 1, 0], 1, torch.float32)
    layer.load_state_dict(saved.state_dict(), assign=True)
    x = torch.randn(1, 4, 6, 6)
    for form in FORMS:
        saved.form = layer.form = form
        assert torch.equal(layer(x), saved(x))


@pytest.mark.parametrize(("form", "groups"), list(product(FORMS, (1, 2))))
def test_a_step_of_training_lowers_the_loss(form, groups):
    layer = make({"in_channels": 4, "out_channels": 6, "kernel_size": 3, "groups": groups}, [1, 2, 2, 1], 0, form=form)
    x, wanted = torch.randn(4, 4, 6, 6).double(), torch.randn(4, 6, 4, 4).double()
    optimizer, losses = torch.optim.SGD(layer.parameters(), lr=0.05), []
    for _ in range(3):
        loss = (layer(x) - wanted).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]


def test_one_count_may_be_any_whole_number():
    assert DKConv2d(4, 8, 3, counts=np.int64(2)).counts == [2] * 4


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_padding_that_was_set_afterwards_pads_as_the_convolution_does(mode):
    """PyTorch works out once how much it pads when the padding is not zeros."""
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, padding=1, padding_mode=mode)
    conv.dilation = conv.padding = (2, 2)
    layer, x = DKConv2d.from_dense(conv, 9), torch.randn(2, 4, 8, 8)
    for form in FORMS:
        layer.form = form
        torch.testing.assert_close(layer(x), conv(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.to_dense()(x), conv(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain_model(nn.Sequential(layer))(x), conv(x), rtol=1e-4, atol=1e-5)


def test_a_tool_that_folds_batch_norms_by_reading_the_weight_is_right_or_refused():
    """It gives a dense convolution of its own the folded weight, or sets weight and bias of the one that is there."""
    layer, norm = DKConv2d(4, 6, 3, padding=1, bias=False, counts=2), nn.BatchNorm2d(6).eval()
    nn.init.uniform_(norm.running_var, 0.5, 2)
    nn.init.normal_(norm.bias)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    dense = nn.Conv2d(4, 6, 3, padding=1)
    with torch.no_grad():
        dense.weight.copy_(layer.weight * scale.view(-1, 1, 1, 1))
        dense.bias.copy_(norm.bias - norm.running_mean * scale)
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(dense(x), norm(layer(x)))
    with pytest.raises(RuntimeError, match="fold batch norms before compressing"):
        layer.register_parameter("bias", nn.Parameter(dense.bias.detach()))
