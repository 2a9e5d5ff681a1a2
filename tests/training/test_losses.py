"""The terms of the loss: their values worked out by hand, their gradients, where they are least, what they bear."""

import math

import pytest
import torch
import torch.nn.functional as F

from dk2pnet.errors import InputError
from dk2pnet.training import losses
from dk2pnet.training.losses import (
    DEFAULT_METHOD,
    METHODS,
    attention,
    distillation,
    euclidean,
    kp_channel,
    kp_position,
    kp_unit,
    method_named,
)

KP = [kp_channel, kp_position, kp_unit]
HINTS = list(dict.fromkeys(method.hint for method in METHODS.values() if method.hint is not None))
LOG3 = math.log(3)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def maps(seed=0, shape=(2, 5, 3, 4), scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator), scale * torch.randn(*shape, generator=generator)


def probabilities(loss, x, tau=1.0):
    """The distribution that an axis of KP makes of a map."""
    if loss is kp_unit:
        return (x / tau).sigmoid()
    return F.softmax(x / tau, 1) if loss is kp_channel else F.softmax(x.flatten(2) / tau, 2).view_as(x)


def distributions(loss, x):
    """How many distributions a map holds: what the loss is the mean over."""
    return {kp_channel: x[:, 0].numel(), kp_position: x.shape[0] * x.shape[1], kp_unit: x.numel()}[loss]


def gradient(loss, student, teacher, tau=1.0):
    student = student.clone().requires_grad_()
    loss(student, teacher, tau).backward()
    return student.grad


# -- knowledge pre-regression ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [1.0, 2.5])
def test_kp_is_the_cross_entropy_over_channels(tau):
    s, t = maps()
    total = 0.0
    for image in range(2):
        for row in range(3):
            for column in range(4):
                p = torch.exp(t[image, :, row, column] / tau)
                q = torch.exp(s[image, :, row, column] / tau)
                total -= float((p / p.sum() * torch.log(q / q.sum())).sum())
    assert float(kp_channel(s, t, tau)) == pytest.approx(tau**2 * total / 24, rel=1e-5)


@pytest.mark.parametrize("tau", [1.0, 2.5])
def test_kp_is_the_cross_entropy_over_positions(tau):
    s, t = maps(1)
    total = 0.0
    for image in range(2):
        for channel in range(5):
            p, q = torch.exp(t[image, channel] / tau), torch.exp(s[image, channel] / tau)
            total -= float((p / p.sum() * torch.log(q / q.sum())).sum())
    assert float(kp_position(s, t, tau)) == pytest.approx(tau**2 * total / 10, rel=1e-5)


@pytest.mark.parametrize("tau", [1.0, 2.5])
def test_kp_per_unit_is_the_binary_cross_entropy(tau):
    s, t = maps(2)
    p, q = 1 / (1 + torch.exp(-t / tau)), 1 / (1 + torch.exp(-s / tau))
    wanted = -(tau**2) * (p * torch.log(q) + (1 - p) * torch.log(1 - q)).mean()
    torch.testing.assert_close(kp_unit(s, t, tau), wanted)


def test_kp_on_two_channels_by_hand():
    """One position. The teacher says 3 : 1, the student 1 : 3, so that the loss is 3/4 log 4 + 1/4 log(4/3)."""
    t, s = torch.tensor([LOG3, 0.0]).view(1, 2, 1, 1), torch.tensor([0.0, LOG3]).view(1, 2, 1, 1)
    assert float(kp_channel(s, t)) == pytest.approx(0.75 * math.log(4) + 0.25 * math.log(4 / 3))
    assert float(kp_channel(t, t)) == pytest.approx(0.25 * math.log(4) + 0.75 * math.log(4 / 3))
    assert float(kp_position(s, t)) == 0  # one position alone is certain


def test_kp_on_two_positions_by_hand():
    """One channel: the same numbers, but positions now compete and channels do not."""
    t, s = torch.tensor([LOG3, 0.0]).view(1, 1, 1, 2), torch.tensor([0.0, LOG3]).view(1, 1, 1, 2)
    assert float(kp_position(s, t)) == pytest.approx(0.75 * math.log(4) + 0.25 * math.log(4 / 3))
    assert float(kp_channel(s, t)) == 0  # one channel alone is certain


def test_kp_per_unit_by_hand():
    """Two units: one that the teacher has on with 3/4 and the student with 1/2, one off with 3/4 in both."""
    t, s = torch.tensor([LOG3, -LOG3]).view(1, 2, 1, 1), torch.tensor([0.0, -LOG3]).view(1, 2, 1, 1)
    both = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert float(kp_unit(s, t)) == pytest.approx((math.log(2) + both) / 2)


@pytest.mark.parametrize("loss", KP)
@pytest.mark.parametrize("tau", [1.0, 2.5])
def test_the_gradient_of_kp_is_the_difference_of_probabilities(loss, tau):
    s, t = maps(3)
    wanted = tau * (probabilities(loss, s, tau) - probabilities(loss, t, tau)) / distributions(loss, s)
    torch.testing.assert_close(gradient(loss, s, t, tau), wanted)


def test_the_gradient_of_kp_over_channels_as_derived():
    s, t = maps(4)
    batch, _, height, width = s.shape
    wanted = (F.softmax(s, 1) - F.softmax(t, 1)) / (batch * height * width)
    torch.testing.assert_close(gradient(kp_channel, s, t), wanted)


@pytest.mark.parametrize("loss", KP)
@pytest.mark.parametrize("seed", range(5))
def test_kp_is_least_at_the_teacher(loss, seed):
    """There the gradient vanishes and the loss is the teacher's entropy; elsewhere it is larger."""
    t, noise = maps(seed, (2, 4, 3, 3), scale=2.0)
    assert gradient(loss, t, t).abs().max() < 1e-7
    p = probabilities(loss, t).double()
    entropy = -(p * p.log()).sum()
    if loss is kp_unit:
        entropy -= ((1 - p) * (1 - p).log()).sum()
    least = loss(t, t)
    assert float(least) == pytest.approx(float(entropy) / distributions(loss, t), rel=1e-5)
    for size in (0.03, 0.3, 3.0, 30.0):
        assert loss(t + size * noise, t) > least


@pytest.mark.parametrize("loss", KP)
def test_a_step_against_the_gradient_lowers_kp(loss):
    s, t = maps(5)
    for tau in (0.5, 1.0, 4.0):
        slope = gradient(loss, s, t, tau)
        assert loss(s - 0.1 * slope, t, tau) < loss(s, t, tau)


def test_kp_is_blind_to_what_its_distributions_do_not_hold():
    """The same number added to all that competes changes no probability; a unit competes with none."""
    s, t = maps(6)
    over_channels, over_positions = torch.randn(2, 1, 3, 4), torch.randn(2, 5, 1, 1)
    torch.testing.assert_close(kp_channel(s + over_channels, t), kp_channel(s, t))
    torch.testing.assert_close(kp_position(s + over_positions, t), kp_position(s, t))
    assert not torch.isclose(kp_channel(s + over_positions, t), kp_channel(s, t))
    assert not torch.isclose(kp_position(s + over_channels, t), kp_position(s, t))
    assert not torch.isclose(kp_unit(s + 1, t), kp_unit(s, t))


@pytest.mark.parametrize("loss", KP)
def test_the_gradient_of_kp_is_bounded_and_that_of_plain_hints_is_not(loss):
    s, t = maps(7)
    for scale in (1.0, 1e3, 1e6):
        assert float(gradient(loss, scale * s, t).abs().max()) <= 1 / distributions(loss, s)
        assert torch.isfinite(loss(scale * s, scale * t))
    small, large = (float(gradient(euclidean, scale * s, t).abs().max()) for scale in (1.0, 1e3))
    assert large > 100 * small


@pytest.mark.parametrize("loss", KP)
def test_temperature_does_not_weaken_kp(loss):
    """With tau^2, soft distributions give gradients near (student - teacher) / n, centred over what competes."""
    s, t = maps(8)
    difference = s - t
    if loss is kp_channel:
        wanted = (difference - difference.mean(1, keepdim=True)) / 5
    elif loss is kp_position:
        wanted = (difference - difference.mean((2, 3), keepdim=True)) / 12
    else:
        wanted = difference / 4
    for tau in (100.0, 300.0):
        got = gradient(loss, s, t, tau) * distributions(loss, s)
        torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.01)


@pytest.mark.parametrize("loss", KP)
def test_temperature_is_a_change_of_scale(loss):
    s, t = maps(9)
    torch.testing.assert_close(loss(s, t, 2.5), 2.5**2 * loss(s / 2.5, t / 2.5, 1.0))


# -- the other hints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1, 50, 10**9])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_euclidean_hints_of_a_few_images_at_a_time_are_those_of_all(monkeypatch, at_once, layout):
    monkeypatch.setattr(losses, "_IN_CACHE", at_once)
    s, t = (x.contiguous(memory_format=layout).requires_grad_() for x in maps(5, (7, 5, 3, 4)))
    for scale in (1.0, 0.0):  # of equal maps there is no slope
        student = scale * s + (1 - scale) * t.detach()
        wanted = (student - t.detach()).square().sum() / t.detach().square().sum()
        found = euclidean(student, t.detach())
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(*(torch.autograd.grad(x, s, retain_graph=True)[0] for x in (found, wanted)))
    assert float(euclidean(s, torch.zeros_like(s)).detach()) > 1e6


def test_euclidean_hints_by_hand():
    t = torch.tensor([[1.0, 2.0], [0.0, 2.0]]).view(1, 2, 1, 2)
    s = torch.tensor([[1.0, 0.0], [3.0, 2.0]]).view(1, 2, 1, 2)
    assert float(euclidean(s, t)) == pytest.approx((4 + 9) / 9)
    assert float(euclidean(t, t)) == 0
    assert float(euclidean(torch.zeros_like(t), t)) == pytest.approx(1)
    assert torch.isfinite(euclidean(s, torch.zeros_like(t)))


def test_euclidean_hints_do_not_depend_on_the_scale_of_both():
    s, t = maps(10)
    torch.testing.assert_close(euclidean(100 * s, 100 * t), euclidean(s, t))


def test_attention_by_hand():
    """Energies 9 : 16 over two positions are the unit vector of (9, 16); the student's lie at one position alone."""
    t = torch.tensor([[3.0, 0.0], [0.0, 4.0]]).view(1, 2, 1, 2)
    s = torch.tensor([[7.0, 0.0]]).view(1, 1, 1, 2)
    length = math.hypot(9, 16)
    wanted = ((1 - 9 / length) ** 2 + (16 / length) ** 2) / 2
    assert float(attention(s, t)) == pytest.approx(wanted, rel=1e-5)


def test_attention_is_blind_to_channels_signs_and_scale():
    s, t = maps(11)
    torch.testing.assert_close(attention(-3 * s[:, [4, 2, 0, 1, 3]], t), attention(s, t))
    torch.testing.assert_close(attention(torch.cat([s, s, s], 1), t), attention(s, t))
    assert float(attention(2 * t, t)) == pytest.approx(0, abs=1e-9)
    assert attention(s, t) > 0


def test_attention_takes_any_two_numbers_of_channels():
    s = torch.randn(2, 3, 4, 4, requires_grad=True)
    attention(s, torch.randn(2, 7, 4, 4)).backward()
    assert torch.isfinite(s.grad).all()
    assert s.grad.any()


@pytest.mark.parametrize("loss", HINTS)
def test_maps_of_zeros_give_finite_losses_and_gradients(loss):
    s, t = maps(12)
    nothing = torch.zeros_like(s)
    for student, teacher in ((nothing, t), (s, nothing), (nothing, nothing)):
        assert torch.isfinite(loss(student, teacher, 1.0))
        assert torch.isfinite(gradient(loss, student, teacher)).all()


# -- sizes and types ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", HINTS)
def test_larger_maps_are_averaged_down_to_the_smaller_size(loss):
    large, small = torch.randn(2, 5, 8, 8), torch.randn(2, 5, 4, 4)
    torch.testing.assert_close(loss(large, small, 1.0), loss(F.avg_pool2d(large, 2), small, 1.0))
    torch.testing.assert_close(loss(small, large, 1.0), loss(small, F.avg_pool2d(large, 2), 1.0))


@pytest.mark.parametrize("loss", HINTS)
def test_each_side_is_averaged_where_it_is_larger(loss):
    """One map is smaller in height and the other in width: both are brought to the smaller of each."""
    s, t = torch.randn(2, 5, 8, 3), torch.randn(2, 5, 4, 6)
    wanted = loss(F.avg_pool2d(s, (2, 1)), F.avg_pool2d(t, (1, 2)), 1.0)
    torch.testing.assert_close(loss(s, t, 1.0), wanted)


@pytest.mark.parametrize("loss", HINTS)
def test_sizes_that_do_not_divide_are_taken_too(loss):
    s, t = torch.randn(2, 5, 7, 5), torch.randn(2, 5, 3, 4)
    assert torch.isfinite(loss(s, t, 1.0))
    assert gradient(loss, s, t).shape == s.shape


@pytest.mark.parametrize("loss", HINTS)
def test_half_precision_maps_give_a_single_precision_loss(loss):
    s, t = maps(13)
    got = loss(s.bfloat16(), t.bfloat16(), 2.0)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, loss(s.bfloat16().float(), t.bfloat16().float(), 2.0))
    torch.testing.assert_close(got, loss(s, t, 2.0), rtol=0.05, atol=0.01)


@pytest.mark.parametrize("loss", HINTS)
def test_every_loss_is_one_number_and_a_mean_over_images(loss):
    """Twice the same images give the same loss."""
    s, t = maps(14)
    assert loss(s, t, 1.0).shape == ()
    torch.testing.assert_close(loss(torch.cat([s, s]), torch.cat([t, t]), 1.0), loss(s, t, 1.0))


# -- distillation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_distillation_and_its_gradient(tau):
    s, t = torch.randn(6, 10, requires_grad=True), torch.randn(6, 10)
    p, q = F.softmax(t / tau, 1), F.softmax(s / tau, 1)
    loss = distillation(s, t, tau)
    torch.testing.assert_close(loss, tau**2 * (p * (p / q).log()).sum(1).mean())
    loss.backward()
    torch.testing.assert_close(s.grad, (tau * (q - p) / 6).detach())
    assert float(distillation(t, t, tau)) == pytest.approx(0, abs=1e-6)


def test_distillation_by_hand():
    """Teacher 3 : 1, student 1 : 1 for one image, equal for the other; at temperature 2 from logits twice as large."""
    t, s = torch.tensor([[LOG3, 0.0], [1.0, 1.0]]), torch.tensor([[5.0, 5.0], [0.0, 0.0]])
    one = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert float(distillation(s, t, 1.0)) == pytest.approx(one / 2, rel=1e-5)
    assert float(distillation(2 * s, 2 * t, 2.0)) == pytest.approx(4 * one / 2, rel=1e-5)


def test_distillation_bears_large_logits_and_half_precision():
    s, t = 1e4 * torch.eye(3), 1e4 * torch.eye(3).roll(1, 0)
    assert torch.isfinite(distillation(s, t, 1.0))
    got = distillation(torch.randn(4, 3).bfloat16(), torch.randn(4, 3).bfloat16(), 4.0)
    assert got.dtype == torch.float32


# -- methods -----------------------------------------------------------------------------------------------------------


def test_an_unknown_method_is_refused_and_the_choices_named():
    with pytest.raises(InputError) as error:
        method_named("kp")
    assert "'kp'" in str(error.value)
    assert all(name in str(error.value) for name in METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_consistent(name):
    method = method_named(name)
    assert name == name.lower()
    assert method.regress in ("where channels differ", "always", "never", "probe")
    assert method.beta > 0
    if method.hint is None:
        assert method.regress == "where channels differ"
        assert not method.two_stage
        assert not method.before_activation
    else:
        assert method.teacher
    if method.hint is kp_unit:  # a sigmoid of what a ReLU gives is never below 1/2
        assert method.before_activation
    if method.hint in (*KP, euclidean):  # they compare channel with channel
        assert method.regress != "never"


def test_all_losses_between_maps_are_used_by_a_method():
    assert {*KP, euclidean, attention} <= set(HINTS)


def test_the_default_method_is_knowledge_pre_regression_by_a_teacher():
    assert method_named(DEFAULT_METHOD).hint is kp_channel
    assert [name for name, method in METHODS.items() if not method.teacher] == ["labels"]
    assert [name for name, method in METHODS.items() if method.two_stage] == ["fitnets"]
