"""Finding and replacing convolutions, however they stand in the model."""

import copy
from collections import OrderedDict, defaultdict, namedtuple

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from dk2pnet import compress, load_student
from dk2pnet.decompose.solve import solve
from dk2pnet.errors import InputError, Refused
from dk2pnet.layer import DKConv2d
from dk2pnet.measure import macs
from dk2pnet.modules import copy_model, make_weights_plain
from dk2pnet.networks.torch.convert import convert
from dk2pnet.networks.torch.network import TorchNetwork
from dk2pnet.networks.torch.sites import find_convolutions
from dk2pnet.plan import Budget, LayerPlan, Plan
from dk2pnet.run.run import Run


class Odd(nn.Module):
    """One of everything: shared, tied, grouped, depthwise, 1x1, unused, nested, a subclass."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.shared = nn.Conv2d(8, 8, 3, padding=1)
        self.again = nn.Sequential(nn.ReLU(), self.shared)
        self.deep = nn.ModuleDict({"a": nn.ModuleList([nn.Conv2d(8, 8, 3, stride=2, groups=2)])})
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 8, 1)
        self.unused = nn.Conv2d(8, 8, 3)
        self.tied1, self.tied2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.tied2.weight = self.tied1.weight
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1))
        self.flat = nn.Conv1d(8, 8, 3)

    def forward(self, x):
        x = self.again(self.shared(self.stem(x)))
        x = self.point(self.depthwise(self.deep["a"][0](x)))
        x = self.normed(self.tied2(self.tied1(x)))
        return self.flat(x.flatten(2)).mean(2)


@pytest.fixture
def odd():
    torch.manual_seed(0)
    return Odd()


def plan_for(model, example, count=2):
    sites = find_convolutions(model, example)
    return Plan(
        layers=[
            LayerPlan(
                s.name,
                s.shape,
                s.reason,
                None if s.reason else [count] * s.module.in_channels,
            )
            for s in sites
        ]
    )


def factors_for(model, plan):
    modules = dict(model.named_modules())
    return {
        layer.name: solve(modules[layer.name].weight, layer.counts, groups=modules[layer.name].groups)
        for layer in plan.layers
        if layer.counts
    }


def test_reasons_order_positions_and_aliases(odd):
    sites = find_convolutions(odd, torch.zeros(1, 3, 8, 8))
    assert [site.name for site in sites[:4]] == ["stem", "shared", "deep.a.0", "depthwise"]
    by_name = {site.name: site for site in sites}
    assert [name for name, site in by_name.items() if not site.reason] == ["shared", "deep.a.0"]
    assert by_name["shared"].aliases == ["again.1"]
    assert (by_name["shared"].calls, by_name["shared"].positions) == (2, 2 * 64)
    assert by_name["deep.a.0"].macs == 8 * 4 * 9 * 9
    for name, words in {
        "stem": "first",
        "depthwise": "depthwise",
        "point": "1x1",
        "unused": "not used",
        "tied1": "tied to that of tied2",
        "normed": "its weight is computed",
        "flat": "Conv1d",
    }.items():
        assert words in by_name[name].reason


class ByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return self.conv(input=self.stem(x)).mean((2, 3))


def test_a_convolution_that_is_called_by_keyword_stays_dense():
    stem, conv = find_convolutions(ByKeyword(), torch.zeros(1, 3, 8, 8))
    assert (stem.reason, conv.positions, conv.input_size) == ("first convolution", 64, (8, 8))
    assert "by keyword" in conv.reason


class Kept(nn.Module):
    """A convolution that runs twice, the second time by a reference of the network's own."""

    def __init__(self, keep):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.kept, self.take = keep(self.conv)

    def forward(self, x):
        return self.take(self)(self.conv(self.stem(x)))


Pair = namedtuple("Pair", "first second")
KEPT = {
    "an ordered dictionary": lambda conv: (OrderedDict(x=conv), lambda net: net.kept["x"]),
    "a dictionary in a list": lambda conv: ([{"x": conv}], lambda net: net.kept[0]["x"]),
    "a named tuple": lambda conv: (Pair(1, conv), lambda net: net.kept.second),
    "a default dictionary": lambda conv: (defaultdict(list, x=conv), lambda net: net.kept["x"]),
}


@pytest.mark.parametrize("how", KEPT)
def test_references_in_any_container_follow_the_layer(how):
    model = Kept(KEPT[how]).eval()
    student = convert(model, Plan(layers=[LayerPlan("conv", "", counts=[9] * 4)]))
    assert isinstance(student.take(student), DKConv2d)
    assert type(student.kept) is type(model.kept)
    assert isinstance(model.take(model), nn.Conv2d)


def test_a_reference_out_of_reach_is_refused_where_it_would_halve_the_replacement():
    """A function holds the original: of two calls one would go on with the dense convolution."""
    network = TorchNetwork(Kept(lambda conv: (Hidden(conv), lambda net: net.kept.conv)).eval())
    network.prepare(torch.zeros(1, 3, 5, 5), None, Run())
    site = next(site for site in network.sites() if site.name == "conv")
    assert site.calls == 2
    counts = {"conv": torch.ones(4, dtype=torch.int64)}
    with pytest.raises(Refused, match="does not call 'conv' where it stands"):
        network.with_kernels(counts, {"conv": solve(site.conv.weight.detach(), counts["conv"])})


class Hidden:
    def __init__(self, conv):
        self.conv = conv


class Singly(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return torch.stack([self.conv(each) for each in x])


def test_a_convolution_of_single_images_stays_dense():
    assert (
        find_convolutions(Singly(), torch.zeros(1, 3, 5, 5))[0].reason == "the network gives it single images (C, H, W)"
    )


def test_a_weight_that_somebody_else_has_stays_dense():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    model.register_parameter("also", model[0].weight)
    assert find_convolutions(model, torch.zeros(1, 3, 5, 5))[0].reason == "its weight is tied to that of also"


def test_how_a_computed_weight_is_taken_out_is_said():
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
        prune.random_unstructured(nn.Conv2d(4, 4, 3), "weight", 0.3),
    )
    first, second = (site.reason for site in find_convolutions(model, torch.zeros(1, 3, 7, 7)))
    assert "take that out first (torch.nn.utils.parametrize.remove_parametrizations)" in first
    assert "take that out first" in second


_NORMS = {
    "weight norm": nn.utils.parametrizations.weight_norm,
    "spectral norm": nn.utils.parametrizations.spectral_norm,
    "weight norm of before": nn.utils.weight_norm,
    "spectral norm of before": nn.utils.spectral_norm,
    "mask": lambda conv: prune.random_unstructured(conv, "weight", 0.3),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("kind", _NORMS)
def test_weights_that_are_computed_alike_each_time_become_plain(kind, tmp_path):
    def make():
        torch.manual_seed(0)
        convs = [_NORMS[kind](nn.Conv2d(3, 6, 3, padding=1)), nn.ReLU(), _NORMS[kind](nn.Conv2d(6, 8, 3, padding=1))]
        return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))

    model, x = make().eval(), torch.randn(40, 3, 8, 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = make_weights_plain(copy_model(model))
    assert torch.allclose(plain(x), model(x), atol=1e-6)
    assert set(plain.state_dict()) == {f"{layer}.{what}" for layer in (0, 2, 5) for what in ("weight", "bias")}
    found = compress(model, list(x.split(10)), "macs=0.7", criterion="response", tune=0, out=tmp_path / "out")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert any(layer.counts for layer in found.plan.layers)
    loaded, _ = load_student(tmp_path / "out", factory=lambda: make().train())
    assert torch.allclose(loaded(x), found.model(x), atol=1e-5)


def test_modes_are_left_as_they_were():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)).train()
    model[1].eval()
    assert [module.training for module in make_weights_plain(model)] == [True, False]


def test_a_convolution_with_hooks_stays_dense():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    net[1].register_forward_hook(lambda module, args, output: -5 * output)
    reasons = [site.reason for site in find_convolutions(net, torch.zeros(1, 3, 9, 9))]
    assert reasons == ["first convolution", "it has hooks of the network's own, which would be lost", ""]


def test_a_network_that_keeps_an_activation_is_copied():
    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            self.seen = self.conv(x)
            self.all = {"maps": [self.seen * 2], "one": self.seen + 1}
            return self.seen

    net = Keeping()
    net(torch.ones(1, 3, 5, 5))
    same = copy_model(net)
    assert torch.equal(same.seen, net.seen)
    assert torch.equal(same.all["maps"][0], net.all["maps"][0])
    assert net.seen.grad_fn is not None


def test_keep_and_first(odd):
    example = torch.zeros(1, 3, 8, 8)
    assert not find_convolutions(odd, example, first=True)[0].reason
    for pattern in ("deep", "deep.a.0", "*.a.*"):
        by_name = {site.name: site for site in find_convolutions(odd, example, keep=[pattern])}
        assert "--keep" in by_name["deep.a.0"].reason
    assert "--keep" in {s.name: s for s in find_convolutions(odd, example, keep=["again.1"])}["shared"].reason
    with pytest.raises(InputError, match="--keep nothing matches no convolution"):
        find_convolutions(odd, example, keep=["nothing"])


def test_full_rank_conversion_is_exact_and_leaves_the_model_alone(odd):
    example = torch.randn(2, 3, 8, 8)
    odd.train()
    odd.again.eval()
    modes = [module.training for module in odd.modules()]
    before = copy.deepcopy(odd.state_dict())
    plan = plan_for(odd, example[:1], count=9)
    student = convert(odd, plan, factors_for(odd, plan))
    assert torch.allclose(student(example), odd(example), atol=1e-5)
    assert student.shared is student.again[1]
    assert isinstance(student.shared, DKConv2d)
    assert [type(m) for m in odd.modules()].count(DKConv2d) == 0
    assert [module.training for module in odd.modules()] == modes
    assert all(torch.equal(before[key], value) for key, value in odd.state_dict().items())
    assert student.training
    assert not student.again.training


def test_a_model_that_is_one_convolution():
    conv = nn.Conv2d(4, 4, 3)
    plan = Plan(layers=[LayerPlan("", "", counts=[9] * 4)])
    student = convert(conv, plan, {"": solve(conv.weight, [9] * 4)})
    x = torch.randn(1, 4, 5, 5)
    assert isinstance(student, DKConv2d)
    assert torch.allclose(student(x), conv(x), atol=1e-5)


def test_macs_of_a_plan_are_those_that_are_counted(odd):
    example = torch.zeros(1, 3, 8, 8)
    plan = plan_for(odd, example)
    student = convert(odd, plan, factors_for(odd, plan))
    shared = 8 * 2 * (9 + 8) * 2 * 64 - 8 * 8 * 9 * 2 * 64
    grouped = 8 * 2 * (9 + 4) * 9 - 8 * 4 * 9 * 9
    assert macs(student, example) == macs(odd, example) + shared + grouped


@pytest.mark.parametrize(
    "text", ["macs=0", "macs=1.1", "macs=-1", "macs", "kernels=0", "kernels=1.5", "x=1", "macs=nan"]
)
def test_bad_budgets(text):
    with pytest.raises(InputError, match="expected macs=F, params=F or latency=F"):
        Budget.parse(text)


def test_budget_round_trip():
    for text in ("macs=0.44", "params=0.3", "kernels=2", "macs=1"):
        assert str(Budget.parse(text)) == text


def test_plan_round_trip_and_summary():
    plan = Plan(layers=[LayerPlan("a", "8x8x3x3", counts=[2, 0, 1]), LayerPlan("b", "8x8x1x1", "1x1 convolution")])
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert (again.layers[0].kernels, again.layers[0].branches) == (3, [2, 1])
    assert "3 kernels in branches 2+1" in plan.summary()
    assert "dense: 1x1 convolution" in plan.summary()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', '{"format": 1, "layers": [{"x": 1}]}'])
def test_broken_plans(text):
    with pytest.raises(InputError, match=r"plan\.json cannot be read"):
        Plan.from_json(text)


def test_plan_of_another_format():
    with pytest.raises(InputError, match="has format 99"):
        Plan.from_json('{"format": 99, "layers": []}')


def test_multiply_adds_of_a_transposed_convolution_are_those_of_its_input_positions():
    net = nn.ConvTranspose2d(16, 8, 2, 2)
    x = torch.zeros(1, 16, 8, 8)
    assert find_convolutions(net, x)[0].macs == macs(net, x) == 16 * 8 * 4 * 64


@pytest.mark.parametrize("compiled", ["part", "parts in parts", "in place", "whole"])
def test_a_compiled_network_is_copied_as_it_was_before(compiled):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 3))))
    names, x = list(net.state_dict()), torch.randn(1, 3, 9, 9)
    expected = net(x)
    if compiled == "parts in parts":
        net[1][1] = torch.compile(net[1][1], backend="eager")
    if compiled in ("part", "parts in parts"):
        net[1] = torch.compile(net[1], backend="eager")
    if compiled == "in place":
        net[1].compile(backend="eager")
    same = copy_model(torch.compile(net, backend="eager") if compiled == "whole" else net)
    assert list(same.state_dict()) == names
    assert torch.equal(same(x), expected)
    assert [site.positions for site in find_convolutions(same, x)] == [49, 25, 9]
    assert all(module._compiled_call_impl is None for module in same.modules())
