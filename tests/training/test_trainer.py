"""The loop, its losses and its hints: what is computed, what is learned, and what is put back afterwards."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dk2pnet.convert import convert, find_convolutions
from dk2pnet.decompose.solve import solve
from dk2pnet.errors import InputError
from dk2pnet.layer import DKConv2d
from dk2pnet.nets import lenet, resnet20
from dk2pnet.plan import LayerPlan, Plan
from dk2pnet.training.hints import capture, find_hints
from dk2pnet.training.losses import distillation, kp_channel
from dk2pnet.training.trainer import TrainingOptions, train

ONE = torch.zeros(1, 1, 8, 8)
OPTIONS = TrainingOptions(epochs=2, batch_size=16, learning_rate=0.05)


def toy(count=96, batch=16, seed=0, labels=True):
    """Four classes of 8x8 images: which quarter is bright."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 4
    x = 0.3 * torch.randn(count, 1, 8, 8, generator=generator)
    for number, label in enumerate(y.tolist()):
        top, left = 4 * (label // 2), 4 * (label % 2)
        x[number, 0, top : top + 4, left : left + 4] += 1
    order = torch.randperm(count, generator=generator)
    parts = zip(x[order].split(batch), y[order].split(batch), strict=True)
    return [(a, b if labels else None) for a, b in parts]


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, 2, 1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12 * 16, 4),
    )


def run(model, data=None, options=OPTIONS, **more):
    data = toy() if data is None else data
    return train(model, lambda epoch: data, options, example=ONE, steps_per_epoch=len(data), **more)


def student_of(teacher, kernels=2):
    layers, factors = [], {}
    for site in find_convolutions(teacher, ONE):
        if not site.reason:
            count = [kernels] * site.module.in_channels
            factors[site.name] = solve(site.module.weight, count)
            layers.append(LayerPlan(site.name, site.shape, counts=count))
    return convert(teacher, Plan(layers=layers), factors)


def accuracy_of(model, data):
    model.eval()
    with torch.no_grad():
        return sum(int((model(x).argmax(1) == y).sum()) for x, y in data) / sum(len(x) for x, _ in data)


@pytest.fixture(scope="module")
def trained():
    model = network()
    run(model)
    return model


# -- losses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [1.0, 2.5])
def test_kp_is_the_cross_entropy_over_channels(tau):
    torch.manual_seed(0)
    s, t = (torch.randn(2, 5, 3, 4, dtype=torch.float64).float() for _ in range(2))
    total = 0.0
    for image in range(2):
        for row in range(3):
            for column in range(4):
                p = torch.exp(t[image, :, row, column] / tau)
                q = torch.exp(s[image, :, row, column] / tau)
                total -= float((p / p.sum() * torch.log(q / q.sum())).sum())
    assert float(kp_channel(s, t, tau)) == pytest.approx(tau**2 * total / 24, rel=1e-5)


@pytest.mark.parametrize("tau", [1.0, 2.5])
def test_the_gradient_of_kp(tau):
    torch.manual_seed(0)
    s, t = torch.randn(2, 5, 3, 4, requires_grad=True), torch.randn(2, 5, 3, 4)
    kp_channel(s, t, tau).backward()
    wanted = tau * (F.softmax(s / tau, 1) - F.softmax(t / tau, 1)) / 24
    torch.testing.assert_close(s.grad, wanted.detach())


def test_kp_is_least_at_the_teacher_and_blind_to_an_offset_of_all_channels():
    torch.manual_seed(0)
    t = torch.randn(2, 5, 4, 4)
    least = kp_channel(t, t)
    p = F.softmax(t, 1)
    torch.testing.assert_close(least, -(p * p.log()).sum(1).mean())
    assert kp_channel(t + 0.3 * torch.randn_like(t), t) > least
    torch.testing.assert_close(kp_channel(t + torch.randn(2, 1, 4, 4), t), least)


def test_kp_brings_larger_maps_to_the_smaller_size():
    torch.manual_seed(0)
    s, t = torch.randn(2, 5, 8, 8), torch.randn(2, 5, 4, 4)
    torch.testing.assert_close(kp_channel(s, t), kp_channel(F.avg_pool2d(s, 2), t))
    torch.testing.assert_close(kp_channel(t, s), kp_channel(t, F.avg_pool2d(s, 2)))


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_distillation_and_its_gradient(tau):
    torch.manual_seed(0)
    s, t = torch.randn(6, 10, requires_grad=True), torch.randn(6, 10)
    p, q = F.softmax(t / tau, 1), F.softmax(s / tau, 1)
    loss = distillation(s, t, tau)
    torch.testing.assert_close(loss, tau**2 * (p * (p / q).log()).sum(1).mean())
    loss.backward()
    torch.testing.assert_close(s.grad, (tau * (q - p) / 6).detach())
    assert float(distillation(t, t, tau)) == pytest.approx(0, abs=1e-6)


# -- hints -------------------------------------------------------------------------------------------------------------


def test_hints_are_the_ends_of_the_stages():
    assert find_hints(resnet20(), torch.zeros(1, 3, 32, 32)) == ["layer1", "layer2", "layer3"]
    names = find_hints(lenet(1), ONE)
    assert names == ["features.1", "features.4", "features.7"]


def test_hints_leave_the_network_alone():
    model = resnet20().train()
    before = copy.deepcopy(model.state_dict())
    find_hints(model, torch.zeros(1, 3, 32, 32))
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_capture_holds_the_latest_outputs_and_goes_away():
    model = network().eval()
    x = toy()[0][0]
    with capture(model, ["2", "5"]) as maps:
        model(torch.zeros_like(x))
        model(x)
        assert torch.equal(maps["2"], model[:3](x))
        assert torch.equal(maps["5"], model[:6](x))
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(KeyError), capture(model, ["2", "none"]):
        pass
    assert not any(module._forward_hooks for module in model.modules())


# -- the loop ----------------------------------------------------------------------------------------------------------


def test_training_learns():
    model, losses = network(), []
    last = run(model, progress=lambda step, total, terms: losses.append((step, total, terms["loss"])))
    assert [step for step, _, _ in losses] == list(range(1, 13))
    assert {total for _, total, _ in losses} == {12}
    assert last["loss"] == pytest.approx(sum(loss for _, _, loss in losses[6:]) / 6)
    assert last["loss"] == last["labels"] < 0.5 * losses[0][2]
    assert accuracy_of(model, toy(seed=9)) > 0.9
    assert not any(module.training for module in model.modules())


def test_the_first_step_is_nesterov_with_decay_of_weights_only():
    """One step of one batch, worked out: the learning rate, no momentum yet, gradients far below the clipping."""
    options = TrainingOptions(epochs=1, learning_rate=0.1, weight_decay=0.01)
    model, (x, y) = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), toy()[0]
    weight, bias = (parameter.detach().clone() for parameter in model.parameters())
    grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    assert sum(grad.square().sum() for grad in grads) < 25
    train(model, lambda epoch: [(x, y)], options, example=ONE, steps_per_epoch=1)
    torch.testing.assert_close(model[1].weight.detach(), weight - 0.1 * 1.9 * (grads[0] + 0.01 * weight))
    torch.testing.assert_close(model[1].bias.detach(), bias - 0.1 * 1.9 * grads[1])


@pytest.mark.parametrize("labels", [True, False])
def test_a_student_comes_closer_to_its_teacher(trained, labels):
    student = student_of(trained, 1)
    data = toy(labels=labels)

    def distance():
        with torch.no_grad():
            return sum(float((student.eval()(x) - trained.eval()(x)).square().sum()) for x, _ in toy(seed=5))

    before = distance()
    terms = run(student, data, teacher=trained)
    assert distance() < 0.5 * before
    assert terms.keys() == {"loss", "kd", "kp"} | ({"labels"} if labels else set())


def test_the_loss_is_the_weighted_sum_of_its_terms(trained):
    options = TrainingOptions(epochs=1, learning_rate=0.01, alpha=0.7, beta=0.3, tau=3.0, kp_tau=2.0)
    student = student_of(trained)
    again, (x, y) = copy.deepcopy(student).train(), toy()[0]
    seen = []
    run(student, [(x, y)], options, teacher=trained, progress=lambda step, total, terms: seen.append(terms))
    trained.eval()
    with torch.no_grad():
        names = find_hints(trained, ONE)
        with capture(again, names) as mine, capture(trained, names) as wanted:
            got, target = again(x), trained(x)
            kp = sum(float(kp_channel(mine[name], wanted[name], 2.0)) for name in names)
        kd, labels = float(distillation(got, target, 3.0)), float(F.cross_entropy(got, y))
    assert len(names) == 2
    terms = seen[0]
    assert terms["kp"] == pytest.approx(kp, rel=1e-4)
    assert terms["kd"] == pytest.approx(kd, rel=1e-4)
    assert terms["labels"] == pytest.approx(labels, rel=1e-4)
    assert terms["loss"] == pytest.approx(0.3 * labels + 0.7 * kd + 0.3 * kp, rel=1e-4)


def test_modes_forms_hooks_and_the_teacher_are_put_back(trained):
    teacher = copy.deepcopy(trained)
    teacher[1].train()
    teacher[0].weight.requires_grad_(False)
    before = copy.deepcopy(teacher.state_dict())
    modes = [module.training for module in teacher.modules()]
    flags = [parameter.requires_grad for parameter in teacher.parameters()]
    student = student_of(trained)
    layers = [module for module in student.modules() if isinstance(module, DKConv2d)]
    assert layers
    for layer in layers:
        layer.form = "concat"
    folded = []
    handle = student[0].register_forward_hook(lambda *_: folded.append([layer.form for layer in layers]))
    run(student, teacher=teacher)
    handle.remove()
    assert {form for forms in folded for form in forms} == {"folded"}
    assert all(layer.form == "concat" for layer in layers)
    assert not any(module.training for module in student.modules())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert [module.training for module in teacher.modules()] == modes
    assert [parameter.requires_grad for parameter in teacher.parameters()] == flags
    assert all(parameter.grad is None for parameter in teacher.parameters())
    for model in (student, teacher):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_loss_that_is_not_finite_is_refused_and_all_is_put_back(trained):
    student, data = student_of(trained), toy()
    spoilt = [*data[:2], (data[2][0] * float("nan"), data[2][1])]
    teacher = copy.deepcopy(trained)
    with pytest.raises(InputError, match=r"not finite at step 3 of 6 .*--lr"):
        run(student, spoilt, teacher=teacher)
    assert all(module.form != "folded" for module in student.modules() if isinstance(module, DKConv2d))
    assert all(torch.isfinite(parameter).all() for parameter in student.parameters())
    for model in (student, teacher):
        assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in teacher.parameters())


def test_a_learning_rate_too_high_is_refused():
    with pytest.raises(InputError, match="not finite at step"):
        run(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), options=TrainingOptions(epochs=9, learning_rate=1e30))


def test_the_same_seed_gives_the_same_weights():
    def weights(seed):
        model = nn.Sequential(network(), nn.Dropout(0.3), nn.Linear(4, 4))
        torch.manual_seed(7)
        nn.init.normal_(model[2].weight)
        torch.rand(seed + 1)  # the state of the generator before does not matter
        run(model, options=TrainingOptions(epochs=1, learning_rate=0.05, seed=seed))
        return [parameter.detach() for parameter in model.parameters()]

    first, second, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_precisions_can_change_within_a_process():
    accuracies = []
    for precision in ("fp32", "bf16", "fp32"):
        model = network()
        run(model, options=TrainingOptions(epochs=2, learning_rate=0.05, precision=precision))
        accuracies.append(accuracy_of(model, toy(seed=9)))
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert min(accuracies) > 0.9


@pytest.mark.parametrize("epochs", [1, 2])
def test_every_epoch_asks_for_its_own_images(epochs):
    asked = []

    def epoch_of(epoch):
        asked.append(epoch)
        return toy()

    train(network(), epoch_of, TrainingOptions(epochs=epochs, learning_rate=0.01), example=ONE, steps_per_epoch=6)
    assert asked == list(range(epochs))


def test_unsuitable_data_is_refused(trained):
    with pytest.raises(InputError, match="no labels"):
        run(network(), toy(labels=False))
    with pytest.raises(InputError, match="label 9.*4 classes"):
        run(network(), [(x, y * 3) for x, y in toy()])
    with pytest.raises(InputError, match="needs a classifier"):
        run(nn.Sequential(nn.Conv2d(1, 4, 3)), toy())


@pytest.mark.parametrize(
    "bad",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"learning_rate": math.inf},
        {"alpha": 1.1},
        {"beta": -1.0},
        {"tau": 0.0},
        {"kp_tau": 0.0},
        {"precision": "fp16"},
        {"weight_decay": -1.0},
    ],
)
def test_options_check_themselves(bad):
    with pytest.raises(InputError, match="expected"):
        TrainingOptions(**bad)


def test_a_network_of_feature_maps_is_tuned_without_labels():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1)).eval()
    student = student_of(teacher, 1)
    terms = []
    run(student, toy(labels=False), teacher=teacher, progress=lambda step, total, values: terms.append(values))
    assert terms[-1]["kd"] < 0.7 * terms[0]["kd"]
    with torch.no_grad():
        x = toy()[0][0]
        error = (student(x) - teacher(x)).square().sum() / teacher(x).square().sum()
    assert float(error) == pytest.approx(terms[-1]["kd"], rel=0.5)
