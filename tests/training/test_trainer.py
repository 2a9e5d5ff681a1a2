"""The loop: what is computed, what is learned, by every method, and what is put back afterwards."""

import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dk2pnet.errors import InputError
from dk2pnet.layer import DKConv2d
from dk2pnet.nets import NETS
from dk2pnet.training import trainer
from dk2pnet.training.hints import Tap, capture, find_hints, tap_of
from dk2pnet.training.losses import METHODS, distillation, euclidean, method_named
from dk2pnet.training.teaching import fit_probes, hinting
from dk2pnet.training.trainer import TrainingOptions, choose_precision, train
from toys import ONE, OPTIONS, accuracy_of, by_view, hooks_of, network, run, settings_of, student_of, toy

# Methods whose hints compare the maps as they are, with nothing trained between them.
DIRECT = ["kp-channel", "kp-position", "kp-unit", "euclidean", "at"]


def narrow(seed=1):
    """A student whose channels are fewer than those of `network`."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 7, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(112, 4)
    )


@pytest.fixture(scope="module")
def trained():
    model = network()
    run(model)
    return model


# -- the loop ----------------------------------------------------------------------------------------------------------


def test_training_learns():
    model, losses = network(), []
    last = run(model, progress=lambda step, total, terms: losses.append((step, total, terms["loss"])))
    assert [step for step, _, _ in losses] == list(range(1, 13))
    assert {total for _, total, _ in losses} == {12}
    assert last["loss"] == losses[-1][2] == last["labels"] < 0.5 * losses[0][2]
    assert accuracy_of(model, toy(seed=9)) > 0.9
    assert not any(module.training for module in model.modules())


def test_the_first_step_is_nesterov_with_decay_of_weights_only():
    """One step of one batch, worked out: the learning rate, no momentum yet, gradients far below the clipping."""
    options = TrainingOptions(epochs=1, learning_rate=0.1, weight_decay=0.01, precision="fp32")
    model, (x, y) = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), toy()[0]
    weight, bias = (parameter.detach().clone() for parameter in model.parameters())
    grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    assert sum(grad.square().sum() for grad in grads) < 25
    train(model, lambda epoch: [(x, y)], options, example=ONE, steps_per_epoch=1)
    torch.testing.assert_close(model[1].weight.detach(), weight - 0.1 * 1.9 * (grads[0] + 0.01 * weight))
    torch.testing.assert_close(model[1].bias.detach(), bias - 0.1 * 1.9 * grads[1])


def test_gradients_of_a_norm_above_five_are_scaled_to_it():
    options = TrainingOptions(epochs=1, learning_rate=0.1, weight_decay=0.0, precision="fp32")
    model, (x, y) = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), toy()[0]
    x = 100 * x
    before = model[1].weight.detach().clone()
    grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    norm = sum(grad.square().sum() for grad in grads).sqrt()
    assert norm > 10
    train(model, lambda epoch: [(x, y)], options, example=ONE, steps_per_epoch=1)
    torch.testing.assert_close(model[1].weight.detach(), before - 0.1 * 1.9 * grads[0] * 5 / norm)


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
    assert terms.keys() == {"loss", "kd", "hints"} | ({"labels"} if labels else set())


@pytest.mark.parametrize("method", DIRECT)
@pytest.mark.parametrize("beta", [0.3, None])
def test_the_loss_is_the_weighted_sum_of_its_terms(trained, method, beta):
    options = replace(OPTIONS, epochs=1, method=method, alpha=0.7, beta=beta, tau=3.0, kp_tau=2.0)
    student, way = student_of(trained), method_named(method)
    again, (x, y) = copy.deepcopy(student).train(), toy()[0]
    seen = []
    run(student, [(x, y)], options, teacher=trained, progress=lambda step, total, terms: seen.append(terms))
    trained.eval()
    names = find_hints(trained, ONE)
    assert len(names) == 2
    taps = [tap_of(trained, name, x[:1], before_activation=way.before_activation, whose="teacher")[0] for name in names]
    with torch.no_grad(), capture(again, taps) as mine, capture(trained, taps) as wanted:
        got, target = again(x), trained(x)
        hints = sum(float(way.hint(mine[tap.key], wanted[tap.key], 2.0)) for tap in taps)
    kd, labels = float(distillation(got, target, 3.0)), float(F.cross_entropy(got, y))
    terms = seen[0]
    assert terms["hints"] == pytest.approx(hints, rel=1e-4)
    assert terms["kd"] == pytest.approx(kd, rel=1e-4)
    assert terms["labels"] == pytest.approx(labels, rel=1e-4)
    weight = way.beta if beta is None else beta
    assert terms["loss"] == pytest.approx(0.3 * labels + 0.7 * kd + weight * hints, rel=1e-4)


@pytest.mark.parametrize(
    ("left", "weights"), [(1.0, (2, 2, 2, 2)), (0.5, (2, 1.75, 1.5, 1.25)), (0.0, (2, 1.5, 1, 0.5))]
)
def test_the_weight_of_the_hints_falls_linearly(trained, left, weights):
    options = replace(OPTIONS, epochs=4, alpha=0.0, beta=2.0, beta_end=left)
    seen = []
    student = student_of(trained)
    run(student, toy()[:1], options, teacher=trained, progress=lambda step, total, terms: seen.append(terms))
    for terms, weight in zip(seen, weights, strict=True):
        assert terms["loss"] == pytest.approx(terms["labels"] + weight * terms["hints"], rel=1e-4)


def test_wide_layers_of_one_kernel_per_channel_are_trained_as_two_convolutions_on_a_cpu():
    model = nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1),
        DKConv2d(24, 12, 3, padding=1, counts=1),
        DKConv2d(12, 24, 3, padding=1, counts=1, form="concat"),
        DKConv2d(24, 4, 3, padding=1, counts=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    layers, seen = [module for module in model if isinstance(module, DKConv2d)], []
    handle = model.register_forward_hook(lambda *_: seen.append([layer.form for layer in layers]))
    run(model, toy()[:1], replace(OPTIONS, epochs=1))
    handle.remove()
    assert seen == 2 * [["folded", "branches", "folded"]]  # a memory format is tried, then comes the one step
    assert [layer.form for layer in layers] == ["branches", "concat", "branches"]


def test_progress_gets_the_means_of_the_epoch_so_far():
    """Of data that is the same in every step, with a learning rate that changes next to nothing, all means are alike;
    of two kinds of batches in turn they go back and forth."""
    (x, y), seen = toy()[0], []
    data = [(x, y), (x, (y + 1) % 4)] * 3
    model = network().eval()
    run(model, data, replace(OPTIONS, learning_rate=1e-12), progress=lambda step, total, terms: seen.append(terms))
    losses = [F.cross_entropy(network().train()(a), b).item() for a, b in data[:2]]
    for start in (0, 6):
        for number in range(6):
            done = number + 1
            wanted = (losses[0] * math.ceil(done / 2) + losses[1] * (done // 2)) / done
            assert seen[start + number]["loss"] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", [lambda teacher: student_of(teacher, 1), lambda teacher: narrow()])
def test_every_method_teaches(trained, method, make):
    """A converted student, and one with other channels, which needs regressors between the maps."""
    student = make(trained)
    names = list(student.state_dict())
    terms = []
    options = replace(OPTIONS, epochs=4, method=method)
    run(student, options=options, teacher=trained, progress=lambda step, total, values: terms.append(values))
    assert accuracy_of(student, toy(seed=9)) > 0.9
    assert list(student.state_dict()) == names
    assert hooks_of(student) == hooks_of(trained) == 0
    wanted = {"loss", "labels"} | ({"kd"} if METHODS[method].teacher else set())
    if METHODS[method].hint is not None and not METHODS[method].two_stage:
        wanted.add("hints")
        assert terms[-1]["hints"] < terms[5]["hints"]  # means of the last epoch and of the first
    assert terms[-1].keys() == wanted


@pytest.mark.parametrize("name", ["resnet20", "vgg8", "lenet"])
@pytest.mark.parametrize("method", ["kp-channel", "kp-unit", "at"])
def test_hints_are_found_in_every_network_of_ours(name, method):
    torch.manual_seed(0)
    teacher, student, x = NETS[name](), NETS[name](), torch.randn(2, 3, 32, 32)
    options = replace(OPTIONS, epochs=1, learning_rate=1e-6, method=method)
    terms = train(student, lambda epoch: [(x, None)], options, example=x[:1], steps_per_epoch=1, teacher=teacher)
    assert terms["hints"] > 0


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.hint is not None])
def test_hints_alone_reach_the_layers_below_them(trained, method):
    """Without labels, the teacher's answers and decay: what lies behind the hint has nothing to learn from."""
    student = student_of(trained, 1)
    before = {name: value.clone() for name, value in student.named_parameters()}
    options = replace(OPTIONS, method=method, beta=1.0, epochs=4, hints=("2",), distill=0.0, weight_decay=0.0)
    run(student, toy(labels=False)[:1], options, teacher=trained)
    assert not torch.equal(student[0].weight, before["0.weight"])
    assert torch.equal(student[-1].weight, before[f"{len(student) - 1}.weight"])


# -- probes and regressors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [True, False])
def test_probes_learn_to_classify_from_maps(trained, labels):
    trained.eval()
    torch.manual_seed(0)
    taps = [(Tap("2"), 8), (Tap("5"), 12)]
    with hinting(trained, taps) as teacher:
        fit_probes(teacher, [8, 12], 4, [batch for seed in range(8) for batch in toy(seed=seed, labels=labels)])
        assert not any(parameter.requires_grad for parameter in teacher.parameters())
        assert not any(module.training for module in teacher.modules())
        right = torch.zeros(2)
        for x, y in toy(seed=9):
            _, scores = teacher(x)
            assert [score.shape for score in scores] == [(len(x), 4, 1, 1)] * 2
            right += torch.stack([(score.flatten(1).argmax(1) == y).sum() for score in scores])
    assert float(right[1]) / 96 > 0.5  # means over positions tell little of where the image is bright
    assert hooks_of(trained) == 0


def test_regressors_begin_as_the_identity_where_channels_agree(trained):
    """The first hint loss of FitNets is that of the maps themselves."""
    student, seen = student_of(trained, 1), []
    again, (x, y) = copy.deepcopy(student).train(), toy()[0]
    options = replace(OPTIONS, method="fitnets", hints=("2",), learning_rate=1e-12)
    run(student, [(x, y)], options, teacher=trained, progress=lambda step, total, terms: seen.append(terms))
    trained.eval()
    with torch.no_grad():
        wanted = float(euclidean(again[:3](x), trained[:3](x)))
    assert seen[0]["hints"] == pytest.approx(wanted, rel=1e-4, abs=1e-9)
    assert seen[0]["loss"] == pytest.approx(10 * wanted, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("method", ["kp-channel", "kp-class"])
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_networks_that_cannot_be_channels_last_learn_the_same(trained, whose, method):
    other = by_view()
    other.load_state_dict(trained.state_dict())
    students = []
    for part in ("neither", whose):
        student, teacher = student_of(other if part == "student" else trained), other if part == "teacher" else trained
        run(student, options=replace(OPTIONS, method=method), teacher=teacher)
        students.append(student.state_dict())
    for name, weight in students[0].items():
        torch.testing.assert_close(students[1][name], weight, atol=1e-3, rtol=1e-2)


def test_a_last_batch_of_one_image_is_no_obstacle(trained):
    for method in METHODS:
        run(student_of(trained), toy(33), replace(OPTIONS, method=method), teacher=trained)


# -- two stages --------------------------------------------------------------------------------------------------------


def test_in_stage_one_of_fitnets_only_layers_up_to_the_hint_change(trained):
    """The others stay bit for bit, whatever the weight decay; in stage two all change."""
    student = student_of(trained, 1)
    options = replace(OPTIONS, epochs=4, method="fitnets", hints=("2",), weight_decay=0.1)
    states, terms = [], []

    def progress(step, total, values):
        states.append({name: value.detach().clone() for name, value in student.named_parameters()})
        terms.append(values.keys())

    before = {name: value.detach().clone() for name, value in student.named_parameters()}
    run(student, options=options, teacher=trained, progress=progress)
    assert terms == [{"loss", "hints"}] * 6 + [{"loss", "labels", "kd"}] * 18
    for name, value in before.items():
        below = name.startswith(("0.", "1."))
        for state in states[:5]:
            assert torch.equal(state[name], value) != below, name
        assert torch.equal(states[5][name], value) != below, name
        assert not torch.equal(states[-1][name], states[5][name]), name
    assert {"3.kernels", "3.combination", "7.weight"} <= before.keys()


def test_fitnets_takes_the_middle_hint_and_a_quarter_of_the_epochs(trained, caplog):
    seen = []
    options = replace(OPTIONS, epochs=8, method="fitnets")
    with caplog.at_level("INFO", "dk2pnet.training.trainer"):
        run(student_of(trained), toy()[:1], options, teacher=trained, progress=lambda *each: seen.append(each[2]))
    assert ["hints" in terms for terms in seen] == [True] * 2 + [False] * 6
    assert "hints (teacher = student): 5 = 5" in caplog.text


def test_fitnets_in_one_epoch_is_refused(trained):
    with pytest.raises(InputError, match="--epochs 2"):
        run(student_of(trained), options=replace(OPTIONS, epochs=1, method="fitnets"), teacher=trained)


# -- compiling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["kp-channel", "kp-unit"])
def test_compiled_training_gives_the_losses_of_eager_training(trained, monkeypatch, method):
    """The graph that Dynamo traces, hooks and all, run as it is: no compiler is needed, and no part falls out of it."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    options, losses = replace(OPTIONS, epochs=1, method=method), {}
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend, fullgraph=True))
    for compiled in (False, True):
        seen = losses[compiled] = []
        student = student_of(trained, 1)
        given = replace(options, compile=compiled)
        run(student, options=given, teacher=trained, progress=lambda *each, seen=seen: seen.append(each[2]["hints"]))
        assert bool(graphs) == compiled
        assert hooks_of(student) == hooks_of(trained) == 0
    torch._dynamo.reset()
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)
    assert losses[True][-1] < losses[True][0]


# -- what is put back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_modes_forms_hooks_and_the_teacher_are_put_back(trained, method):
    teacher = copy.deepcopy(trained)
    teacher[1].train()
    teacher[0].weight.requires_grad_(False)
    before, settings = copy.deepcopy(teacher.state_dict()), settings_of(teacher)
    student = student_of(trained)
    layers = [module for module in student.modules() if isinstance(module, DKConv2d)]
    assert layers
    for layer in layers:
        layer.form = "concat"
    student[0].bias.requires_grad_(False)
    flags, bias = settings_of(student)["flags"], student[0].bias.clone()
    seen = []
    handle = student[0].register_forward_hook(
        lambda *_: seen.append((torch.is_grad_enabled(), student.training, {layer.form for layer in layers}))
    )
    run(student, toy()[:2], options=replace(OPTIONS, method=method), teacher=teacher)
    handle.remove()
    assert {tuple(forms) for training, mode, forms in seen if training and mode} == {("folded",)}
    assert all(layer.form == "concat" for layer in layers)
    assert not any(module.training for module in student.modules())
    assert settings_of(student)["flags"] == flags
    assert torch.equal(student[0].bias, bias)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert settings_of(teacher) == settings
    assert hooks_of(student) == 0


def test_a_loss_that_is_not_finite_is_refused_and_all_is_put_back(trained):
    student, data = student_of(trained), toy()
    spoilt = [*data[:2], (data[2][0] * float("nan"), data[2][1])]
    teacher = copy.deepcopy(trained)
    with pytest.raises(InputError, match=r"not finite at step 3 of 6 .*--lr"):
        run(student, spoilt, teacher=teacher)
    assert all(module.form != "folded" for module in student.modules() if isinstance(module, DKConv2d))
    assert all(torch.isfinite(parameter).all() for parameter in student.parameters())
    assert hooks_of(student) == hooks_of(teacher) == 0
    assert all(parameter.requires_grad for parameter in teacher.parameters())


class Infinite(torch.autograd.Function):
    """The identity, whose gradient is not finite."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")


@pytest.mark.parametrize("step", [3, 6])
def test_a_gradient_that_is_not_finite_is_refused_before_it_spoils_the_weights(step):
    """The loss alone does not show it, least of all at the last step."""

    class Spoiling(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += self.training
            return Infinite.apply(x) if self.training and self.calls == step else x

    model = network()
    model.insert(6, Spoiling())
    with pytest.raises(InputError, match=f"not finite at step {step} of 6"):
        run(model, options=replace(OPTIONS, epochs=1))
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_a_learning_rate_too_high_is_refused():
    with pytest.raises(InputError, match="not finite at step"):
        run(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), options=replace(OPTIONS, epochs=9, learning_rate=1e30))


def test_the_same_seed_gives_the_same_weights():
    def weights(seed):
        model = nn.Sequential(network(), nn.Dropout(0.3), nn.Linear(4, 4))
        torch.manual_seed(7)
        nn.init.normal_(model[2].weight)
        torch.rand(seed + 1)  # the state of the generator before does not matter
        run(model, options=replace(OPTIONS, epochs=1, seed=seed))
        return [parameter.detach() for parameter in model.parameters()]

    first, second, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_precisions_can_change_within_a_process():
    accuracies = []
    chosen = {"fp32": torch.float32, "bf16": torch.bfloat16}
    chosen["auto"] = chosen[choose_precision(torch.device("cpu"))]
    for precision in ("fp32", "bf16", "fp32", "auto"):
        model, types = network(), set()
        handle = model[3].register_forward_hook(lambda module, args, y, types=types: types.add(y.dtype))
        run(model, options=replace(OPTIONS, precision=precision))
        handle.remove()
        assert types == {chosen[precision]}
        accuracies.append(accuracy_of(model, toy(seed=9)))
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert min(accuracies) > 0.9


@pytest.mark.parametrize("amx", [True, False])
@pytest.mark.parametrize("avx512", [True, False])
def test_the_precision_of_choice_is_what_the_device_is_fast_in(monkeypatch, amx, avx512):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
    assert choose_precision(torch.device("cpu")) == ("bf16" if amx or avx512 else "fp32")


def test_the_precision_of_choice_where_pytorch_cannot_tell(monkeypatch):
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert choose_precision(torch.device("cpu")) == "fp32"


@pytest.mark.parametrize("epochs", [1, 2])
def test_every_epoch_asks_for_its_own_images(epochs):
    asked = []

    def epoch_of(epoch):
        asked.append(epoch)
        return toy()

    train(network(), epoch_of, replace(OPTIONS, epochs=epochs), example=ONE, steps_per_epoch=6)
    assert asked == list(range(epochs))


def test_unsuitable_data_is_refused(trained):
    with pytest.raises(InputError, match="no labels"):
        run(network(), toy(labels=False))
    with pytest.raises(InputError, match="label 9.*4 classes"):
        run(network(), [(x, y * 3) for x, y in toy()])
    with pytest.raises(InputError, match="needs a classifier"):
        run(nn.Sequential(nn.Conv2d(1, 4, 3)), toy())
    teacher = nn.Sequential(nn.Conv2d(1, 4, 3)).eval()
    with pytest.raises(InputError, match="needs a classifier"):
        run(student_of(teacher), toy(labels=False), replace(OPTIONS, method="kp-class"), teacher=teacher)


@pytest.mark.parametrize("method", METHODS)
def test_labels_beyond_the_classes_are_refused_by_every_method(trained, method):
    with pytest.raises(InputError, match="label 9.*4 classes"):
        run(student_of(trained), [(x, y * 3) for x, y in toy()], replace(OPTIONS, method=method), teacher=trained)


def test_hints_that_cannot_be_used_are_refused(trained):
    student = student_of(trained)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    with pytest.raises(InputError, match="'9' is not a module of the teacher"):
        run(student, options=replace(OPTIONS, hints=("9=2",)), teacher=trained)
    with pytest.raises(InputError, match="'7' of the student gives"):
        run(student, options=replace(OPTIONS, hints=("5=7",)), teacher=trained)
    with pytest.raises(InputError, match="no feature maps.*--hint.*--method kd"):
        run(flat, teacher=trained)
    run(flat, toy()[:1], replace(OPTIONS, method="kd"), teacher=trained)


def test_without_a_method_a_teacher_teaches_by_knowledge_pre_regression(trained):
    assert OPTIONS.method is None
    assert run(student_of(trained), teacher=trained).keys() == {"loss", "labels", "kd", "hints"}
    assert run(network()).keys() == {"loss", "labels"}


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.teacher])
def test_methods_with_a_teacher_are_refused_without(method):
    with pytest.raises(InputError, match=f"'{method}' needs a teacher"):
        run(network(), options=replace(OPTIONS, method=method))


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
        {"beta_end": 1.5},
        {"beta_end": -0.1},
        {"tau": 0.0},
        {"kp_tau": 0.0},
        {"precision": "fp16"},
        {"weight_decay": -1.0},
        {"method": "kp"},
        {"hints": ("layer1=",)},
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


def test_a_network_of_one_number_per_image_is_tuned_without_labels():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 1, 6), nn.Flatten(0)).eval()
    student = student_of(teacher, 1)
    assert teacher(toy()[0][0]).shape == (16,)
    terms = []
    run(
        student,
        toy(labels=False),
        replace(OPTIONS, method="kd"),
        teacher=teacher,
        progress=lambda step, total, values: terms.append(values),
    )
    assert terms[-1]["kd"] < terms[5]["kd"]


# -- by steps, with Adam, without labels -------------------------------------------------------------------------------

TUNE = TrainingOptions(
    steps=8, optimizer="adam", learning_rate=0.01, warmup=2, precision="fp32", method="euclidean", distill=0.0
)


def test_steps_end_inside_an_epoch_and_count_its_means(trained):
    seen, lines = [], []
    student = student_of(trained, 1)
    last = run(
        student,
        toy(labels=False),
        TUNE,
        teacher=trained,
        progress=lambda step, total, terms: seen.append((step, total, terms["loss"])),
        validate=lambda: lines.append(len(seen)) or {},
    )
    assert [step for step, _, _ in seen] == list(range(1, 9))  # six to an epoch
    assert {total for _, total, _ in seen} == {8}
    assert last["loss"] == pytest.approx(seen[-1][2])
    assert lines == [6, 8]


def test_the_warm_up_has_the_steps_that_were_asked_for():
    rates = [trainer._rate(step, trainer._Stage(0, 40), 4, 10) for step in range(40)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[-1] < 0.01
    assert rates[5:] == sorted(rates[5:], reverse=True)


def test_hints_alone_leave_the_layers_behind_them_as_they_are(trained):
    student = student_of(trained, 1)
    head = student[-1].weight.detach().clone()
    kernels = student[3].kernels.detach().clone()
    terms = run(student, toy(labels=False), TUNE, teacher=trained)
    assert torch.equal(student[-1].weight, head)
    assert not torch.equal(student[3].kernels, kernels)
    assert terms["loss"] == pytest.approx(METHODS["euclidean"].beta * terms["hints"], rel=1e-5)
    assert terms["kd"] > 0  # shown, not learned from


@pytest.mark.parametrize("mode", ["frozen", "training"])
def test_frozen_batch_norm_keeps_its_statistics(trained, mode):
    student = student_of(trained, 1)
    before = [m.running_mean.clone() for m in student.modules() if isinstance(m, nn.BatchNorm2d)]
    run(student, toy(labels=False), replace(TUNE, batch_norm=mode), teacher=trained)
    after = [m.running_mean for m in student.modules() if isinstance(m, nn.BatchNorm2d)]
    kept = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert all(kept) if mode == "frozen" else not any(kept)


def test_the_first_step_of_adam_has_the_size_of_the_rate():
    model, (x, y) = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), toy()[0]
    weight = model[1].weight.detach().clone()
    options = TrainingOptions(steps=1, optimizer="adam", learning_rate=0.01, weight_decay=0.5, precision="fp32")
    run(model, [(x, y)], options)
    moved = (model[1].weight.detach() - weight).abs()
    assert float(moved.max()) == pytest.approx(0.01, rel=1e-3)


def test_options_of_tuning_check_themselves():
    for bad in ({"optimizer": "lion"}, {"batch_norm": "off"}, {"steps": 0}, {"distill": -1.0}):
        with pytest.raises(InputError, match=str(next(iter(bad.values())))):
            TrainingOptions(**bad)


@pytest.mark.parametrize(("warmup", "first"), [(None, 1 / 2), (4, 1 / 4), (0, 1.0)])
def test_no_warm_up_is_none(warmup, first, monkeypatch):
    rates = []
    usual = trainer._rate

    def watched(*args):
        rates.append(usual(*args))
        return rates[-1]

    monkeypatch.setattr(trainer, "_rate", watched)
    options = replace(OPTIONS, epochs=20, warmup=warmup)
    run(network(), toy(32), options)  # two steps to an epoch
    assert rates[0] == pytest.approx(first)
    with pytest.raises(InputError, match="warm-up -1"):
        TrainingOptions(warmup=-1)


def test_a_network_that_is_frozen_is_refused_in_a_sentence():
    with pytest.raises(InputError, match="all weights of the network are frozen"):
        run(network().requires_grad_(False))


class WithHelp(nn.Module):
    """Auxiliary outputs while it trains, as in GoogLeNet; `classes` 0: maps, as of a detector."""

    def __init__(self, classes):
        super().__init__()
        self.body, self.classes = nn.Conv2d(1, 8, 3, padding=1), classes
        self.head, self.help = nn.Linear(8, classes or 4), nn.Linear(8, classes or 4)

    def forward(self, x):
        x = F.relu(self.body(x))
        x = x.mean((2, 3)) if self.classes else x.permute(0, 2, 3, 1)
        return (self.head(x), self.help(x)) if self.training else self.head(x)


@pytest.mark.parametrize("method", ["labels", "kd", "kp-channel"])
def test_auxiliary_heads_of_a_classifier_are_left_alone(method):
    torch.manual_seed(0)
    model, teacher = WithHelp(4), WithHelp(4)
    before = model.help.weight.detach().clone()
    options = replace(OPTIONS, method=method, weight_decay=0.0)
    run(model, options=options, teacher=None if method == "labels" else teacher)
    assert torch.equal(model.help.weight, before)
    assert model.help.weight.grad is None or not model.help.weight.grad.any()


def test_other_outputs_while_it_trains_do_not_stop_hints():
    torch.manual_seed(0)
    model, teacher = WithHelp(0), WithHelp(0)
    terms = run(model, toy(labels=False), TUNE, teacher=teacher)
    assert terms.keys() == {"loss", "hints"}
    with pytest.raises(InputError, match="2 outputs while it trains and the teacher 1"):
        run(model, toy(labels=False), replace(TUNE, distill=1.0), teacher=teacher)


def test_a_teacher_of_other_classes_teaches_by_hints_alone():
    torch.manual_seed(0)
    student, teacher = network(), network()
    teacher[-1] = nn.Linear(teacher[-1].in_features, 12)
    options = replace(OPTIONS, method="kp-channel")
    with pytest.raises(InputError, match=r"teacher gives 12 class scores and the student tensors of shape \(16, 4\)"):
        run(student, options=options, teacher=teacher)
    assert run(student, options=replace(options, alpha=0.0), teacher=teacher).keys() == {"loss", "hints", "labels"}


def test_in_stage_two_of_fitnets_the_regressors_have_a_gradient():
    """Several processes wait for one of every parameter."""
    torch.manual_seed(0)
    model, teacher, method = narrow(), network(), method_named("fitnets")
    pairs = trainer._pairs(model, teacher, method, OPTIONS, ONE)
    taps, hints = trainer.taps_of(model, teacher, pairs, method, ONE)
    x, y = toy()[0]
    with hinting(teacher, hints) as teaching, trainer.guided(model, taps, hints, method, 0) as student:
        stage = trainer._Stage(0, 1)
        _, loss = trainer._loss(student, teaching, x, y, stage, method, OPTIONS, 0.5, lambda: True)
        loss.backward()
        assert student.heads
        assert all(parameter.grad is not None for parameter in student.parameters())


def test_weights_of_other_than_four_dimensions_are_no_obstacle():
    model = network()
    model.register_buffer("grid", torch.zeros(1, 2, 2, 2, 2))
    run(model)
    assert model.grid.shape == (1, 2, 2, 2, 2)
    assert model[0].weight.is_contiguous()


def test_alone_the_accelerator_is_not_told_to_stay_on_the_cpu(monkeypatch):
    """It refuses that in a process that has used a GPU before; the device is our own choice anyway."""
    import accelerate

    asked = []

    class Watched(accelerate.Accelerator):
        def __init__(self, **given):
            asked.append(given["cpu"])
            super().__init__(**given)

    monkeypatch.setattr(accelerate, "Accelerator", Watched)
    run(network(), toy(32))
    assert asked == [False]
