"""The whole way in Python: what `compress` keeps, promises, refuses and writes, on networks of a few convolutions."""

import copy
import errno
import threading
import time
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from filelock import FileLock
from torch import nn

import dk2pnet
from dk2pnet import InputError, compress, load_student, save_student
from dk2pnet.answers import predict
from dk2pnet.commands import deliver
from dk2pnet.deploy.latency import Latency
from dk2pnet.deploy.runtimes.onnxruntime import run_onnx, session
from dk2pnet.digest import digest_of
from dk2pnet.layer import DKConv2d
from dk2pnet.measure import macs, outputs_of, parameters
from dk2pnet.nets import lenet
from dk2pnet.networks.torch import network as of_torch
from dk2pnet.networks.torch import side_by_side
from dk2pnet.networks.torch.sites import find_convolutions
from dk2pnet.plan import LayerPlan, Plan
from dk2pnet.run import out_folder as folders
from dk2pnet.run import unfinished as run_unfinished
from dk2pnet.run.unfinished import unfinished
from dk2pnet.students import allocate as decomposition
from dk2pnet.tasks import divergence
from timing import time_by


def net(seed=0, norm=True, bias=False, classes=4):
    """Three convolutions (the second one strided) over 3 x 8 x 8."""
    torch.manual_seed(seed)

    def layer(inputs, outputs, stride=1):
        conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=bias or not norm)
        return [conv, nn.BatchNorm2d(outputs), nn.ReLU()] if norm else [conv, nn.ReLU()]

    model = nn.Sequential(
        *layer(3, 6), *layer(6, 8, 2), *layer(8, 10), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, classes)
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.eval()


def images(count=40, batch=10, labels=False, seed=1, size=8):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, size, size, generator=generator)
    y = torch.randint(0, 4, (count,), generator=generator)
    return [(a, b) if labels else a for a, b in zip(x.split(batch), y.split(batch), strict=True)]


X = images()
ONE = X[0][:1]


def dk_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, DKConv2d)}


# -- what it leaves alone ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["loss", "response", "weight"])
@pytest.mark.parametrize("epochs", [0, 1])
def test_the_model_given_is_not_changed(criterion, epochs):
    model = net()
    model[1].train()  # a module in a mode of its own
    model[3].weight.requires_grad_(False)
    calls = []
    handle = model[0].register_forward_hook(lambda *_: calls.append(1))
    before = copy.deepcopy(model.state_dict())
    modes = {name: module.training for name, module in model.named_modules()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    hooks = {name: list(module._forward_hooks) for name, module in model.named_modules()}
    kinds = {name: type(module) for name, module in model.named_modules()}
    result = compress(model, X, "macs=0.6", criterion=criterion, epochs=epochs)
    assert dk_layers(result.model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert {name: list(module._forward_hooks) for name, module in model.named_modules()} == hooks
    assert not any(module._forward_pre_hooks or module._backward_hooks for module in model.modules())
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert all(parameter.grad is None for parameter in model.parameters())
    handle.remove()


def test_the_student_is_in_evaluation_mode_and_has_no_hooks_of_ours():
    student = compress(net(), X, "macs=0.6", criterion="loss", epochs=1).model
    assert not any(module.training for module in student.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in student.modules())


# -- data --------------------------------------------------------------------------------------------------------------


class Reread:
    """Batches that can be read again and again, and say how often they were."""

    def __init__(self, batches):
        self.batches, self.reads = batches, 0

    def __iter__(self):
        self.reads += 1
        return iter(self.batches)


def test_batches_of_every_kind_give_the_same_student():
    pairs = images(labels=True)
    dataset = torch.utils.data.TensorDataset(torch.cat(X), torch.cat([y for _, y in pairs]))
    again = Reread(X)
    students = [
        compress(net(), data, "macs=0.6", criterion="loss").model.state_dict()
        for data in (X, pairs, again, torch.utils.data.DataLoader(dataset, 10))
    ]
    assert again.reads > 2
    for student in students[1:]:
        assert student.keys() == students[0].keys()
        assert all(torch.equal(student[name], value) for name, value in students[0].items())


@pytest.mark.parametrize("data", [iter(X), (x for x in X), map(torch.relu, X)])
def test_what_can_be_read_only_once_is_refused(data):
    with pytest.raises(InputError, match=f"data is of type {type(data).__name__}.*only once"):
        compress(net(), data, "macs=0.6", criterion="loss")


@pytest.mark.parametrize("data", [[], X[0], 3, [torch.zeros(2, 3)], ["picture.png"]])
def test_other_data_is_refused(data):
    with pytest.raises(InputError, match="expected"):
        compress(net(), data, "macs=0.6", criterion="loss")


def test_labelled_batches_for_the_report():
    test = images(30, labels=True, seed=5)
    model = net()
    result = compress(model, X, "macs=0.6", criterion="loss", test_data=test)
    x, y = (torch.cat(parts) for parts in zip(*test, strict=True))
    with torch.no_grad():
        wanted = [100 * float((network(x).argmax(1) == y).double().mean()) for network in (model, result.model)]
    got = [result.metrics[side]["accuracy"] for side in ("teacher", "student")]
    assert got == pytest.approx(wanted)
    assert result.metrics["run"]["images"] == {"calibration": 32, "held out": 8, "test": 30}


def test_weight_needs_an_example_only():
    result = compress(net(), budget="macs=0.6", criterion="weight", example_input=ONE)
    assert dk_layers(result.model)
    assert result.model(X[0]).isfinite().all()
    assert result.metrics["student"]["agreement"] is None
    assert result.metrics["decisions"] == []


@pytest.mark.parametrize("example", [None, torch.zeros(3, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)])
def test_weight_without_a_good_example_is_refused(example):
    with pytest.raises(InputError, match="example_input"):
        compress(net(), budget="macs=0.6", criterion="weight", example_input=example)


@pytest.mark.parametrize("options", [{"criterion": "loss"}, {"criterion": "response"}, {"epochs": 1}])
def test_without_images_the_other_criteria_are_refused(options):
    with pytest.raises(InputError, match="needs images"):
        compress(net(), budget="macs=0.6", **{"criterion": "weight", "example_input": ONE, **options})


def test_images_of_the_wrong_size_or_colour_are_refused():
    grey = [x[:, :1] for x in X]
    with pytest.raises(InputError, match=r"\(1, 1, 8, 8\)"):
        compress(net(), grey, "macs=0.6", criterion="loss")


def test_nan_images_are_refused():
    spoilt = [x.clone() for x in X]
    spoilt[1][3, 0, 2, 2] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        compress(net(), spoilt, "macs=0.6", criterion="loss")


def test_nan_activations_are_refused():
    class Log(nn.Module):
        def forward(self, x):
            return x.log()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), Log(), nn.Conv2d(6, 6, 3), nn.Flatten(), nn.LazyLinear(4))
    model(ONE)
    for criterion in ("loss", "response"):
        with pytest.raises(InputError, match="not finite"):
            compress(model, X, "macs=0.6", criterion=criterion)


def test_nan_weights_are_refused():
    model = net()
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match="NaN or infinity in 3.weight"):
        compress(model, budget="macs=0.6", criterion="weight", example_input=ONE)


# -- networks that are no classifiers ----------------------------------------------------------------------------------


class Head(nn.Module):
    """Feature maps in a container."""

    def __init__(self, form):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3), nn.Conv2d(6, 5, 3)
        self.form = form

    def forward(self, x):
        x = self.a(x).relu()
        maps = self.b(x), self.c(x)
        return {"map": maps[0], "dict": {"out": maps[0], "aux": maps[1]}, "tuple": maps}[self.form]


@pytest.mark.parametrize("form", ["map", "dict", "tuple"])
def test_networks_of_other_outputs(form):
    model = Head(form).eval()
    with pytest.raises(InputError, match=r"'loss' needs a classifier.*response"):
        compress(model, X, "macs=0.7", criterion="loss")
    result = compress(model, X, "macs=0.7", criterion="response")
    assert "b" in dk_layers(result.model)
    assert result.metrics["student"]["macs"] <= 0.7 * result.metrics["teacher"]["macs"]
    with torch.no_grad():
        wanted, got = outputs_of(model(X[0])), outputs_of(result.model(X[0]))
    assert type(model(ONE)) is type(result.model(ONE))
    error = sum((a - b).square().sum() for a, b in zip(wanted, got, strict=True))
    assert error < 0.5 * sum(a.square().sum() for a in wanted)
    assert result.metrics["decisions"][0]["measure"] == "relative squared error"


# -- the budget --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("budget", ["macs=0.45", "macs=0.6", "macs=0.83", "params=0.4", "params=0.55", "params=0.9"])
def test_the_budget_is_kept_and_spent(budget, norm):
    model = net(norm=norm)
    result = compress(model, X, budget, criterion="response")
    kind, value = budget.split("=")
    in_macs = kind == "macs"
    spent = macs(result.model, ONE) if in_macs else parameters(result.model)
    whole = macs(model, ONE) if in_macs else parameters(model)
    assert spent <= float(value) * whole
    figure = "macs" if in_macs else "parameters"
    assert result.metrics["student"][figure] == spent == getattr(result.plan, figure)
    assert result.metrics["teacher"][figure] == whole
    leftover = float(value) * whole - spent
    modules = dict(model.named_modules())
    further = []
    for layer in result.plan.layers:
        if layer.counts is None:
            continue
        weight = modules[layer.name].weight
        kernel = (9 + weight.shape[0]) * (layer.macs_dense // weight.numel() if in_macs else 1)
        cost = layer.macs if in_macs else layer.parameters
        dense = layer.macs_dense if in_macs else layer.parameters_dense
        assert cost == layer.kernels * kernel < dense
        further.append(kernel if cost + kernel < dense else dense - cost)
    assert further
    assert leftover < min(further)


@pytest.mark.parametrize("count", [1, 2])
def test_the_same_number_of_kernels_everywhere(count):
    result = compress(net(), X, f"kernels={count}", criterion="loss")
    counts = {layer.name: layer.counts for layer in result.plan.layers}
    assert counts == {"0": None, "3": [count] * 6, "6": [count] * 8}
    layers = dk_layers(result.model)
    assert layers["3"].kernels.shape == (6 * count, 1, 3, 3)
    assert layers["6"].combination.shape == (10, 8 * count, 1, 1)


@pytest.mark.parametrize("budget", ["kernels=1", "macs=0.84", "macs=0.88", "macs=0.92"])
def test_grouped_convolutions_are_counted_as_planned(budget):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1, groups=4), nn.ReLU(), nn.Conv2d(16, 8, 3)
    ).eval()
    result = compress(model, X, budget, criterion="response", keep=["0", "4"])
    assert set(dk_layers(result.model)) == {"2"}
    assert macs(result.model, ONE) == result.plan.macs < macs(model, ONE)
    assert parameters(result.model) == result.plan.parameters


def test_more_energy_is_kept_with_a_larger_budget():
    kept = [
        {
            layer.name: layer.energy_kept
            for layer in compress(net(), budget=budget, criterion="weight", example_input=ONE).plan.layers
        }
        for budget in ("kernels=1", "kernels=2")
    ]
    for name in ("3", "6"):
        assert 0 < kept[0][name] < kept[1][name] < 1


@pytest.mark.parametrize("criterion", ["loss", "response", "weight"])
def test_the_whole_budget_leaves_every_layer_dense(criterion):
    model = net()
    result = compress(model, X, "macs=1", criterion=criterion)
    assert not dk_layers(result.model)
    assert all(layer.counts is None and layer.reason for layer in result.plan.layers)
    with torch.no_grad():
        assert all(torch.equal(model(x), result.model(x)) for x in X)
    assert result.metrics["student"]["macs"] == result.metrics["teacher"]["macs"]
    assert result.metrics["student"]["agreement"] == 100
    assert result.metrics["decisions"] == []


def test_an_unreachable_budget_says_what_is_reachable():
    with pytest.raises(InputError, match=r"macs=0\.05 cannot be reached.*gives macs=0\.\d+") as caught:
        compress(net(), budget="macs=0.05", criterion="weight", example_input=ONE)
    reachable = str(caught.value).partition("gives ")[2].partition(";")[0]
    result = compress(net(), budget=reachable, criterion="weight", example_input=ONE)
    assert [layer.kernels for layer in result.plan.layers] == [1, 1, 1]
    below = float(reachable.partition("=")[2]) - 0.001
    with pytest.raises(InputError, match="cannot be reached"):
        compress(net(), budget=f"macs={below}", criterion="weight", example_input=ONE)


def test_keep_and_first():
    kept = compress(net(), X, "macs=0.8", criterion="loss", keep=["6"])
    assert set(dk_layers(kept.model)) == {"0", "3"}
    assert torch.equal(kept.model[6].weight, net()[6].weight)
    assert next(layer.reason for layer in kept.plan.layers if layer.name == "6") == "kept by --keep 6"
    for first, layers in ((False, {"3", "6"}), (True, {"0", "3", "6"})):  # the first of few channels stays dense
        assert set(dk_layers(compress(net(), X, "kernels=1", criterion="loss", first=first).model)) == layers
    with pytest.raises(InputError, match="neck"):
        compress(net(), X, "macs=0.8", criterion="loss", keep=["neck"])
    with pytest.raises(InputError, match="no convolution that can be decomposed.*kept by --keep"):
        compress(net(), X, "macs=0.8", criterion="loss", keep=["*"])


def test_a_larger_budget_brings_the_student_closer():
    """Biased layers without batch norm, so that bias correction runs: also beside layers that stay dense."""
    model, fresh = net(norm=False), [(x, None) for x in images(seed=9)]
    wanted = predict(model, fresh)

    students = [
        compress(model, X, budget, criterion="loss").model for budget in ("macs=0.5", "macs=0.7", "macs=0.85", "macs=1")
    ]
    distances = [divergence(wanted, predict(student, fresh)) for student in students]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] == pytest.approx(0, abs=1e-12)
    assert distances[2] < 0.5 * distances[0]


@pytest.mark.parametrize("criterion", ["loss", "response"])
def test_little_memory_changes_nothing(criterion):
    """Moments of one layer at a time, those of the others on disk."""
    found = [compress(net(), X, "macs=0.6", criterion=criterion, memory=m, rebuild=False, tune=0) for m in (2.0, 1e-7)]
    assert [layer.counts for layer in found[0].plan.layers] == [layer.counts for layer in found[1].plan.layers]
    for a, b in zip(found[0].model.parameters(), found[1].model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_decisions_are_recorded():
    follow = "batch-norm re-estimation"
    order = [follow, "layer-by-layer reconstruction", f"{follow} after reconstruction"]
    for norm, wanted in ((True, order), (False, ["layer-by-layer reconstruction", "bias correction"])):
        result = compress(net(norm=norm), X, "macs=0.6", criterion="loss")
        decisions = result.metrics["decisions"]
        assert [decision["what"] for decision in decisions] == wanted
        for decision in decisions:
            assert decision["kept"] == (decision["after"] < decision["before"])
            assert decision["measure"] == "KL(teacher || student)"
        reached = decisions[0]["after"] if decisions[0]["kept"] else decisions[0]["before"]
        assert decisions[1]["before"] == pytest.approx(reached, rel=1e-9)


def test_seed_and_images_decide_alone():
    def student(seed):
        torch.rand(1)  # the state of the generator that all share is another each time
        return compress(net(), X, "macs=0.6", criterion="loss", epochs=1, seed=seed).model.state_dict()

    a, b, other = student(3), student(3), student(4)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], other[name]) for name in a)


def test_large_layers_are_solved_one_at_a_time_and_alike(monkeypatch):
    together = compress(net(), X, "macs=0.6", criterion="loss", tune=0, rebuild=False).model
    monkeypatch.setattr(decomposition, "_LARGE", 0)
    one_by_one = compress(net(), X, "macs=0.6", criterion="loss", tune=0, rebuild=False).model
    assert dk_layers(one_by_one).keys() == dk_layers(together).keys()
    torch.testing.assert_close(one_by_one(X[0]), together(X[0]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("memory", "wanted"), [(2.0, 32), (1e-6, 16)])
def test_the_reconstruction_of_large_maps_takes_fewer_images(monkeypatch, memory, wanted):
    """All images, or as few of them as there may be."""
    seen, real = [], side_by_side.Walks.reach

    def watched(self, name):
        seen.append(real(self, name))
        return seen[-1]

    monkeypatch.setattr(side_by_side.Walks, "reach", watched)
    compress(net(), X, "macs=0.6", criterion="response", tune=0, memory=memory)
    assert seen
    assert set(seen) == {wanted}


# -- modules and weights used more than once ---------------------------------------------------------------------------


class Shared(nn.Module):
    """One convolution run twice under two names, and a classifier whose weight is tied to another layer's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.conv = nn.Conv2d(6, 6, 3, padding=1)
        self.again = self.conv
        self.lift = nn.Linear(6, 6)
        self.head = nn.Linear(6, 6)
        self.head.weight = self.lift.weight

    def forward(self, x):
        x = self.conv(self.stem(x).relu()).relu()
        x = self.again(x).relu().mean((2, 3))
        return self.head(self.lift(x).relu())


@pytest.mark.parametrize("criterion", ["loss", "response", "weight"])
def test_a_shared_module_is_converted_once(criterion):
    model = Shared().eval()
    result = compress(model, X, "macs=0.7", criterion=criterion)
    student = result.model
    assert isinstance(student.conv, DKConv2d)
    assert student.conv is student.again
    assert student.head.weight is student.lift.weight
    layer = next(layer for layer in result.plan.layers if layer.name == "conv")
    assert layer.aliases == ["again"]
    assert layer.macs_dense == 2 * 64 * 6 * 6 * 9
    assert macs(student, ONE) == result.plan.macs <= 0.7 * macs(model, ONE)


def test_tied_weights_survive_saving(tmp_path):
    result = compress(Shared().eval(), X, "macs=0.7", criterion="loss")
    save_student(result.model, result.plan, tmp_path)
    student, _ = load_student(tmp_path, factory=Shared)
    assert student.conv is student.again
    assert student.head.weight is student.lift.weight
    assert not student.training
    with torch.no_grad():
        assert all(torch.equal(student(x), result.model(x)) for x in X)


# -- saving ------------------------------------------------------------------------------------------------------------


def test_a_network_given_as_an_object_is_loaded_with_its_factory(tmp_path, no_timing):
    result = compress(net(), X, "macs=0.6", criterion="loss", out=tmp_path / "out")
    student, plan = load_student(tmp_path / "out", factory=lambda: net(seed=7))
    assert plan == result.plan
    with torch.no_grad():
        assert all(torch.equal(student(x), result.model(x)) for x in X)
    with pytest.raises(InputError, match="factory"):
        load_student(tmp_path / "out")


def test_a_named_network_is_loaded_by_name(tmp_path, no_timing):
    torch.manual_seed(0)
    torch.save(lenet().state_dict(), tmp_path / "lenet.pth")
    weights = str(tmp_path / "lenet.pth")
    result = compress("lenet", X, "macs=0.7", criterion="response", weights=weights, out=tmp_path / "out")
    student, plan = load_student(tmp_path / "out")
    with torch.no_grad():
        assert all(torch.equal(student(x), result.model(x)) for x in X)
    assert plan.network == {"name": "lenet", "num_classes": None, "in_channels": None}


def test_what_was_compressed_is_compressed_further_and_can_be_loaded(tmp_path, no_timing):
    """The second time only the convolution that stayed dense is replaced; the plan has to name the others too."""
    torch.manual_seed(0)
    torch.save(lenet().state_dict(), tmp_path / "lenet.pth")
    dense = {"weights": str(tmp_path / "lenet.pth"), "first": True}
    once = compress(
        "lenet",
        budget="kernels=2",
        criterion="weight",
        example_input=ONE,
        keep=["features.3"],
        out=tmp_path / "one",
        **dense,
    )
    twice = compress(
        str(tmp_path / "one"),
        budget="kernels=1",
        criterion="weight",
        example_input=ONE,
        first=True,
        out=tmp_path / "two",
    )
    student, plan = load_student(tmp_path / "two")
    assert dk_layers(student).keys() == dk_layers(twice.model).keys() > dk_layers(once.model).keys()
    with torch.no_grad():
        assert torch.equal(student(ONE), twice.model(ONE))
    assert plan.macs == macs(student, ONE)
    assert plan.parameters == parameters(student)


def test_layers_of_dominant_kernels_already_keep_their_form_and_new_ones_get_theirs(tmp_path, no_timing, monkeypatch):
    exported, usual = [], of_torch.TorchNetwork.onnx

    def watched(network, forms):
        if not (network.layers.keys() - network.forms.keys()):
            exported.append({**network.forms, **forms})
        return usual(network, forms)

    monkeypatch.setattr(of_torch.TorchNetwork, "onnx", watched)
    torch.manual_seed(0)
    torch.save(lenet().state_dict(), tmp_path / "lenet.pth")
    options = {"example_input": ONE, "first": True}
    weights = str(tmp_path / "lenet.pth")
    compress(
        "lenet",
        budget="kernels=2",
        criterion="weight",
        keep=["features.3"],
        weights=weights,
        out=tmp_path / "one",
        **options,
    )
    one = load_student(tmp_path / "one")[1]
    assert one.forms.keys() == dk_layers(load_student(tmp_path / "one")[0]).keys()
    for budget in ("kernels=1", "latency=1"):
        twice = compress(str(tmp_path / "one"), budget=budget, criterion="weight", out=tmp_path / budget, **options)
        assert twice.plan.forms.keys() == dk_layers(twice.model).keys()
        assert twice.plan.forms.items() >= one.forms.items()
    assert exported[0] == {}  # of the teachers
    assert len(exported) > 2
    assert all(forms == one.forms for forms in exported[1:])


@pytest.mark.parametrize("frozen", ["all of it", "all but the head"])
def test_a_frozen_network_is_tuned_all_the_same(frozen):
    model = net()
    model.requires_grad_(False)
    if frozen == "all but the head":
        model[-1].requires_grad_(True)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    found = compress(model, X, "kernels=1", criterion="weight", tune=20)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    usual = compress(net(), X, "kernels=1", criterion="weight", tune=20)
    tuned, wanted = (
        next(each for each in result.metrics["decisions"] if each["what"] == "tuning") for result in (found, usual)
    )
    assert tuned == wanted
    assert tuned["after"] != tuned["before"]  # whether it was kept or not
    for name, layer in dk_layers(found.model).items():
        assert torch.equal(layer.kernels, dk_layers(usual.model)[name].kernels)


def test_random_numbers_and_threads_are_left_as_they_were():
    model = net()
    torch.manual_seed(77)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    compress(model, X, "kernels=1", criterion="weight", tune=2, threads=1 if threads > 1 else 2)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", [list, tuple])
def test_convolutions_in_a_list_of_the_network_are_replaced_there_too(kind):
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.steps = kind([self.first, {"second": self.second}["second"]])
            self.head = nn.Linear(8, 4)

        def forward(self, x):
            for step in self.steps:
                x = torch.relu(step(x))
            return self.head(x.mean((2, 3)))

    torch.manual_seed(0)
    model = Listed()
    result = compress(model, X, "kernels=1", criterion="loss", tune=0)
    assert result.metrics["student"]["macs"] == result.plan.macs < macs(model, ONE)
    assert isinstance(result.model.steps[1], DKConv2d)
    assert type(model.steps[1]) is nn.Conv2d


def test_a_convolution_that_is_called_past_its_place_is_named():
    class Past(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = net()
            self.elsewhere = SimpleNamespace(conv=self.body[3])

        def forward(self, x):
            return self.body[4:](self.elsewhere.conv(self.body[:3](x)))

    with pytest.raises(InputError, match=r"does not call 'body\.3' where it stands.*--keep body\.3"):
        compress(Past(), X, "kernels=1", criterion="loss", tune=0)


def test_a_network_that_looks_at_its_weights():
    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = net()

        def forward(self, x):
            return self.body(x.to(self.body[3].weight.dtype))

    assert compress(Looks(), X, "kernels=1", criterion="loss", tune=0).model(ONE).shape == (1, 4)


def test_a_network_of_chance_is_refused_before_the_work():
    model = nn.Sequential(net(), Dropped())
    with pytest.raises(InputError, match="other outputs each time for the same image"):
        compress(model, X, "kernels=1", criterion="response", tune=0)


@pytest.mark.parametrize("keep", ["neck", "*"])
def test_what_is_to_stay_dense_is_looked_at_before_any_image_is_answered(keep, monkeypatch):
    monkeypatch.setattr(of_torch.TorchNetwork, "predict", lambda *_: pytest.fail("images were answered"))
    with pytest.raises(InputError, match="--keep"):
        compress(net(), X, "macs=0.8", criterion="loss", keep=[keep])


def test_forgotten_weights_are_told_of(tmp_path, caplog):
    torch.save(lenet().state_dict(), tmp_path / "lenet.pth")
    for weights in (None, str(tmp_path / "lenet.pth")):
        caplog.clear()
        found = compress("lenet", budget="kernels=1", criterion="weight", example_input=ONE, weights=weights)
        said = any("lenet has random weights, as no --weights are given" in note for note in found.metrics["notes"])
        assert said == ("random weights" in caplog.text) == (weights is None)


class Deciding(nn.Module):
    """Brightens dark batches first: Python's own control flow, which an export writes as it went once."""

    def __init__(self):
        super().__init__()
        self.body = net()

    def forward(self, x):
        return self.body(x * 0.2 + 1 if x.mean() < -0.5 else x)


def test_a_file_that_differs_on_held_out_images_is_not_written(tmp_path, no_timing):
    """On noise it does not."""
    dark = [x - 2 * (number % 2) for number, x in enumerate(X)]
    with pytest.raises(InputError, match="on held-out images model.onnx and PyTorch differ by .* use torch.where"):
        compress(Deciding(), dark, "kernels=1", criterion="response", tune=0, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    bright = [x - x.mean() for x in X]
    compress(Deciding(), bright, "kernels=1", criterion="response", tune=0, out=tmp_path / "out")


class Hooked(nn.Module):
    """Takes its maps by hooks that have captured the network, or that are given it."""

    def __init__(self, captured):
        super().__init__()
        self.body, self.maps = net(), {}
        hook = (lambda module, args, output: self.maps.update(last=output)) if captured else self.take
        self.body[8].register_forward_hook(hook)

    def take(self, module, args, output):
        self.maps["last"] = output

    def forward(self, x):
        self.body(x)
        return self.body[11](self.maps["last"].mean((2, 3)))


@pytest.mark.parametrize("ran", [False, True], ids=["fresh", "used before"])
def test_a_network_whose_copy_is_not_one_of_its_own_is_refused(ran):
    for captured in (True, False):
        model = Hooked(captured).eval()
        if ran:
            model(torch.cat(X))
        if captured:
            with pytest.raises(InputError, match="a copy of Hooked answers otherwise than the network itself: a hook"):
                compress(model, X, "kernels=1", criterion="response", tune=0)
        else:  # a method is bound to the copy
            assert compress(model, X, "kernels=1", criterion="response", tune=0).metrics["student"]


class Lambda(nn.Module):
    """Its last step is a function of its own, bound or not, with a weight."""

    def __init__(self, bound):
        super().__init__()
        self.body, self.gain = net(), nn.Parameter(torch.ones(4))
        self.last = self.scale if bound else lambda x: x * self.gain

    def scale(self, x):
        return x * self.gain

    def forward(self, x):
        return self.last(self.body(x))


def test_a_copy_that_computes_with_the_originals_weights_is_refused():
    """It answers alike as long as nobody changes the original."""
    with pytest.raises(InputError, match="a copy of Lambda computes with weights of the network itself"):
        compress(Lambda(bound=False).eval(), X, "kernels=1", criterion="response", tune=0)
    found = compress(Lambda(bound=True).eval(), X, "kernels=1", criterion="response", tune=0)
    assert found.model.last.__self__ is found.model


class Dropped(nn.Module):
    """Dropout that forgets to ask for the mode."""

    def forward(self, x):
        return nn.functional.dropout(x, 0.5)


def test_labels_of_one_column_count_and_others_are_refused():
    batches = images(40, labels=True)
    accuracies = [
        compress(
            net(), X, "kernels=1", criterion="weight", tune=0, test_data=[(x, shape(y)) for x, y in batches]
        ).metrics
        for shape in (lambda y: y, lambda y: y[:, None])
    ]
    assert accuracies[0]["student"]["accuracy"] == accuracies[1]["student"]["accuracy"]
    one_hot = [(x, nn.functional.one_hot(y, 4).float()) for x, y in batches]
    with pytest.raises(InputError, match=r"labels are torch\.float32 of shape \(40, 4\); expected one whole number"):
        compress(net(), X, "kernels=1", criterion="weight", tune=0, test_data=one_hot)


def test_targets_that_are_no_classes_are_passed_over():
    batches = [(x, [{"boxes": torch.zeros(2, 4)}] * len(x)) for x in X]
    assert (
        compress(net(), batches, "kernels=1", criterion="response", tune=0).metrics["student"]["agreement"] is not None
    )


class Boxes(nn.Module):
    """As torchvision's detectors: a dictionary for every image."""

    def __init__(self):
        super().__init__()
        self.backbone = net()[:6]

    def forward(self, x):
        return [{"boxes": maps.flatten(1)[:, :4], "scores": maps.mean((1, 2))} for maps in self.backbone(x)]


def test_a_detector_with_as_many_outputs_as_images_is_refused_before_the_work(monkeypatch):
    def work(*_, **__):
        raise AssertionError("no work")

    monkeypatch.setattr(of_torch, "find_convolutions", work)
    with pytest.raises(InputError, match="2 outputs for one image and 4 for two.*model.backbone"):
        compress(Boxes().eval(), X, "kernels=1", criterion="response")


@pytest.mark.parametrize("labels", [torch.zeros(10, 8, 8, dtype=torch.int64), torch.rand(10)])
def test_labels_that_cannot_be_trained_with_are_refused_before_the_work(labels):
    batches = [(x, labels) for x in X]
    with pytest.raises(InputError, match=r"labels are torch\..*expected one whole number per image.*epochs=0"):
        compress(net(), batches, "kernels=1", criterion="response", epochs=1)


def test_batches_of_several_image_sizes_are_tuned_on():
    batches = [torch.randn(1, 3, 8 + 2 * (number % 3), 8) for number in range(12)]
    compress(net(), batches, "kernels=1", criterion="response", tune=2)
    maps = compress(net()[:4], batches, "kernels=1", criterion="response", tune=0)
    assert 0 < maps.metrics["student"]["relative_error"] < 100


def test_two_holdouts_are_refused():
    with pytest.raises(InputError, match="holdout and holdout split both say"):
        compress(net(), X, "disagree=5", criterion="response", holdout=X, holdout_split="test[:50%]")


def test_weights_and_images_of_other_kinds_are_named():
    words = r"weights are torch\.bfloat16 and the images torch\.float32; give the network in torch\.float32"
    with pytest.raises(InputError, match=words):
        compress(net().bfloat16(), X, "kernels=1", criterion="response", tune=0)


def test_two_runs_do_not_share_an_out(tmp_path):
    out = tmp_path / "out"
    with unfinished(out, False, {"seed": 0}) as folder:
        (folder / "step-1.safetensors").touch()
        with pytest.raises(InputError, match=r"another run is at work in .*out\.unfinished; wait until it has ended"):
            compress(net(), X, "kernels=1", criterion="weight", tune=2, out=out, overwrite=True)
        assert (folder / "step-1.safetensors").exists()
    assert list(tmp_path.iterdir()) == []
    compress(net(), X, "kernels=1", criterion="weight", tune=2, out=out)
    assert list(tmp_path.iterdir()) == [out]
    with pytest.raises(InputError, match=r"out exists"), unfinished(out, False, {"seed": 0}):
        pytest.fail("the work had begun")
    assert list(tmp_path.iterdir()) == [out]


def test_an_npz_file_of_images_is_what_its_batches_are(tmp_path):
    images = torch.randn(300, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    np.savez(tmp_path / "in.npz", x=images.double().numpy())
    np.savez(tmp_path / "more.npz", x=-images.numpy())
    how = {"criterion": "response", "tune": 0}
    for budget, further, same in (
        ("macs=0.6", {}, {}),
        ("disagree=20", {"holdout": str(tmp_path / "more.npz")}, {"holdout": list((-images).split(128))}),
    ):
        found = compress(net(), str(tmp_path / "in.npz"), budget, **how, **further)
        expected = compress(net(), list(images.split(128)), budget, **how, **same)
        assert found.metrics["student"] == expected.metrics["student"]
    with pytest.raises(InputError, match="holdout images decide on a budget in points"):
        compress(net(), str(tmp_path / "in.npz"), "macs=0.6", holdout=str(tmp_path / "more.npz"), **how)
    np.savez(tmp_path / "rows.npz", x=images.double().numpy()[:, :, 0, 0])
    with pytest.raises(InputError, match=r"holds .*float64 of shape \(300, 3\)"):
        compress(net(), str(tmp_path / "rows.npz"), "macs=0.6", **how)


def test_a_third_run_does_not_slip_past_a_second_that_waited_for_the_first(tmp_path, monkeypatch):
    """A lock file that the first one deletes is held by who waited for it, and made anew by who comes next."""
    out, held, over = tmp_path / "out", threading.Event(), threading.Event()

    def second(lock):
        with lock.acquire(timeout=30):
            held.set()
            over.wait(30)

    made = []
    monkeypatch.setattr(run_unfinished, "FileLock", lambda path: made.append(FileLock(path)) or made[-1])
    with unfinished(out, False, {"seed": 0}):
        waiting = threading.Thread(target=second, args=[FileLock(made[0].lock_file)])
        waiting.start()
        time.sleep(0.3)
    assert held.wait(30)
    try:
        with pytest.raises(InputError, match="another run is at work"), unfinished(out, False, {"seed": 0}):
            pytest.fail("two at work")
    finally:
        over.set()
        waiting.join()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_somebody_else_is_not_taken_for_checkpoints(tmp_path):
    (tmp_path / "out.unfinished").mkdir()
    (tmp_path / "out.unfinished/notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"out\.unfinished, which a run needs for its checkpoints, is not dk2pnet's"):
        compress(net(), X, "kernels=1", criterion="weight", tune=2, out=tmp_path / "out")
    assert (tmp_path / "out.unfinished/notes.txt").read_text() == "mine"


def test_who_cannot_have_an_extra_file_goes_on_without_it(tmp_path, monkeypatch):
    def fails(*given):
        raise InputError("the student cannot be exported with torch.export; leave --pt2 away")

    def again(*given, **options):
        raise AssertionError("solved a second time")

    monkeypatch.setattr(deliver, "write_pt2", fails)
    with pytest.raises(InputError, match="leave --pt2 away"):
        compress(net(), X, "kernels=1", criterion="weight", tune=2, pt2=True, out=tmp_path / "out")
    monkeypatch.setattr("dk2pnet.students.closed_form.ClosedForm.solve", again)
    compress(net(), X, "kernels=1", criterion="weight", tune=2, out=tmp_path / "out")
    assert (tmp_path / "out/model.onnx").is_file()


@pytest.mark.parametrize(("out", "words"), [("file/below/out", "which is no folder"), ("link", "is a link to what")])
def test_a_place_that_cannot_be_written_is_noticed_first(tmp_path, out, words):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match=words):
        compress("no network", out=tmp_path / out)  # before the network is looked at


def test_the_log_of_the_tuning_is_kept_with_every_kind_of_budget(tmp_path, no_timing):
    for budget in ("kernels=1", "disagree=60"):
        compress(net(), X, budget, criterion="weight", tune=2, out=tmp_path / budget)
        assert (tmp_path / budget / "tuning.jsonl").read_text().count("step")
        assert any((tmp_path / budget / "tensorboard/tuning").iterdir())


class Maps(nn.Module):
    """Two outputs in a dictionary, as of torchvision's segmentation networks."""

    def __init__(self):
        super().__init__()
        self.body, self.out, self.aux = net()[:9], nn.Conv2d(10, 2, 1), nn.Conv2d(10, 2, 1)

    def forward(self, x):
        x = self.body(x)
        return {"out": self.out(x), "aux": self.aux(x)}


def test_a_program_of_several_outputs(tmp_path, no_timing):
    found = compress(
        Maps().eval(), budget="kernels=2", criterion="weight", example_input=ONE, pt2=True, out=tmp_path / "out"
    )
    assert found.metrics["student"]["pt2_difference"] < 1e-5
    program = torch.export.load(tmp_path / "out/model.pt2").module()
    assert program(torch.zeros(3, 3, 8, 8))["aux"].shape == (3, 2, 4, 4)


def test_training_options_without_training_are_refused():
    for given, words in (
        ({"method": "kd"}, "method is"),
        ({"hints": ["a=b"]}, "hints is"),
        ({"compile": True}, "compile"),
    ):
        with pytest.raises(InputError, match=f"{words}.* of the training with labels, and epochs is 0"):
            compress(net(), X, "macs=0.7", criterion="response", **given)


def test_what_is_written_is_what_was_measured(tmp_path, no_timing):
    result = compress(net(), X, "macs=0.6", criterion="loss", out=tmp_path / "out")
    got = run_onnx(session(tmp_path / "out/model.onnx"), X[0])[0]
    with torch.no_grad():
        wanted = result.model(X[0])
    torch.testing.assert_close(torch.as_tensor(got), wanted, rtol=1e-4, atol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_layers_that_run_dense_in_the_file_are_told_of():
    """Their multiply-adds are not those of the file."""
    plan = Plan(layers=[LayerPlan(str(n), "", counts=[1], form=form) for n, form in enumerate(("folded", "concat"))])
    timed = {side: {"latency_noisy": side == "student"} for side in ("teacher", "student")}
    dense, noise = deliver.notes_of_file(plan, timed)
    assert dense.startswith("1 of 2 layers of dominant kernels run as one dense convolution")
    assert "unsteady" in noise
    plan.layers[0].form = "branches"
    assert deliver.notes_of_file(plan, dict.fromkeys(timed, {"latency_noisy": False})) == []


def slower(dense):
    """`compare_latency` of a machine on which a student takes twice as long, or, all dense, `dense` times so."""

    def compare(networks, *_, **__):
        times = dict.fromkeys(networks, 1.0)
        if "student" in networks:
            graph = onnx.load_from_string(networks["student"]).graph
            times["student"] = 2.0 if sum(node.op_type == "Conv" for node in graph.node) > 3 else dense
        return {name: Latency(t, 0.999 * t, 1.001 * t, 3) for name, t in times.items()}

    return compare


def test_a_network_that_is_slower_than_its_teacher_is_written_dense_where_that_is_faster(tmp_path, monkeypatch):
    monkeypatch.setattr(
        deliver, "choose_forms", lambda student, sites, table: dict.fromkeys(student.layers, "branches")
    )
    found = {}
    for name, dense in (("folds", 1.0), ("stays", 2.0)):
        time_by(slower(dense), monkeypatch)
        result = compress(net(), X, "macs=0.6", criterion="response", out=tmp_path / name, tune=0)
        forms = {layer.form for layer in result.plan.layers if layer.counts is not None}
        notes = result.metrics["notes"]
        found[name] = forms, any("slower than the teacher" in note for note in notes)
        got = run_onnx(session(tmp_path / name / "model.onnx"), X[0])[0]
        torch.testing.assert_close(torch.as_tensor(got), result.model(X[0]).detach(), rtol=1e-4, atol=1e-5)
        assert Plan.load(tmp_path / name / "plan.json").forms == result.plan.forms
    assert found == {"folds": ({"folded"}, False), "stays": ({"branches"}, True)}


def test_accuracy_stands_beside_the_times_of_the_same_numbers():
    metrics = {
        "int8": [
            {"network": who, "numbers": numbers, "accuracy": 90.0 - (numbers == "int8"), "agreement": 98.0}
            for who in ("teacher", "student")
            for numbers in ("fp32", "int8")
        ],
        "teacher": {"accuracy": 90.0, "agreement": None},
        "student": {"accuracy": 90.0, "agreement": 99.0},
        "notes": [],
    }
    deliver._take_int8(metrics)
    assert metrics["teacher"] == {"accuracy": 89.0, "agreement": 98.0}
    assert metrics["student"] == {"accuracy": 89.0, "agreement": 98.0}
    assert "of the int8 networks" in metrics["notes"][0]


def test_a_wrong_export_is_refused(tmp_path, no_timing, monkeypatch):
    real = of_torch.export_onnx

    def wrong(model, *args, **options):
        model = copy.deepcopy(model)
        with torch.no_grad():
            model[-1].bias += 1
        return real(model, *args, **options)

    monkeypatch.setattr(of_torch, "export_onnx", wrong)
    with pytest.raises(InputError, match=r"was exported, but .*differ"):
        compress(net(), budget="macs=0.6", criterion="weight", example_input=ONE, out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("step", ["export_onnx", "save_student", "write_json", "write_page"])
@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_leaves_nothing(tmp_path, no_timing, monkeypatch, step, existing):
    out = tmp_path / "out"
    if existing:
        compress(net(), budget="kernels=1", criterion="weight", example_input=ONE, out=out)
    before = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(of_torch if step in ("export_onnx", "save_student") else deliver, step, full)
    with pytest.raises(InputError, match="disk is full") as caught:
        compress(net(), budget="macs=0.6", criterion="weight", example_input=ONE, out=out, overwrite=True)
    assert str(out) in str(caught.value)
    assert {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if existing else [])


def test_a_rename_that_fails_keeps_the_earlier_run(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    earlier = Plan().to_json()
    (out / "plan.json").write_text(earlier)
    real, calls = folders.os.replace, []

    def replace(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    monkeypatch.setattr(folders.os, "replace", replace)
    with pytest.raises(InputError, match="disk is full"), folders.new_folder(out, True) as folder:
        (folder / "plan.json").write_text("the new run")
    assert (out / "plan.json").read_text() == earlier
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": "macs=nan"}, "macs=nan"),
        ({"budget": "time=3"}, "time=3"),
        ({"criterion": "magic"}, "magic.*weight, response, loss"),
        ({"calibration_images": 1}, "calibration images is 1; expected 2 or more"),
        ({"memory": 0}, "memory is 0; expected more than 0"),
        ({"epochs": -1}, "epochs is -1"),
        ({"device": "abacus"}, "abacus"),
        ({"threads": 0}, "threads is 0"),
        ({"epochs": 1, "precision": "fp8"}, "fp8"),
        ({"epochs": 1, "learning_rate": 0.0}, "learning rate is 0.0"),
        ({"model": nn.Linear(3, 2)}, "Linear|image of shape"),
    ],
)
def test_options_are_checked(options, words):
    with pytest.raises(InputError, match=words):
        compress(**{"model": net(), "budget": "macs=0.6", "data": X, **options})


def test_public_names_are_there():
    assert all(hasattr(dk2pnet, name) for name in dk2pnet.__all__)
    assert find_convolutions(net(), ONE)[0].reason == "first convolution"


def test_why_a_layer_stays_dense():
    """10 outputs: one kernel per channel takes 19 of 90 numbers; 1 output: 10 of 9."""
    result = compress(net(), budget="macs=1.0", criterion="weight", example_input=ONE)
    assert {layer.reason for layer in result.plan.layers[1:]} == {"the budget leaves it dense"}
    thin = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 1, 3), nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 4))
    result = compress(thin, budget="macs=1.0", criterion="weight", example_input=ONE)
    assert result.plan.layers[1].reason == "dominant kernels would not be cheaper"


def test_a_layer_that_is_silent_takes_no_budget():
    model = net()
    with torch.no_grad():  # the first block lets nothing through
        model[1].weight.zero_()
        model[1].bias.fill_(-1.0)
    for criterion in ("response", "loss"):
        silent, after = (
            layer for layer in compress(model, X, "macs=0.6", criterion=criterion, tune=0).plan.layers[1:3]
        )
        assert silent.energy_kept in (0.0, None) or silent.kernels <= 6, criterion


def test_loss_without_gradients_is_refused():
    class Probe(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = net()[:-1], net()[-1]

        def forward(self, x):
            return self.head(self.body(x).detach())

    with pytest.raises(InputError, match="none come through the network.*--criterion response"):
        compress(Probe().eval(), X, "macs=0.6", criterion="loss", tune=0)


def test_compiled_and_parallel_wrappers_are_taken_off():
    plain = compress(net(), X, "macs=0.6", criterion="response", tune=0)
    for wrapped in (nn.DataParallel(net()), torch.compile(net(), backend="eager")):
        found = compress(wrapped, X, "macs=0.6", criterion="response", tune=0)
        assert [layer.counts for layer in found.plan.layers] == [layer.counts for layer in plain.plan.layers]


def test_extra_state_of_a_module_is_part_of_what_a_run_is_known_by(tmp_path, no_timing):
    class Extra(nn.ReLU):
        def get_extra_state(self):
            return {"version": 3}

        def set_extra_state(self, state):
            pass

    model = net()
    model[2] = Extra()
    assert len(digest_of(model.state_dict())) == 16
