"""Batch-norm re-estimation against direct averages; bias correction against mean responses."""

import copy

import pytest
import torch
from torch import nn

from dk2pnet.layer import DKConv2d
from dk2pnet.networks.torch.corrections import (
    correct_biases,
    has_batch_norm,
    match_batch_norm,
    reestimate_batch_norm,
    statistics_are_folded,
)


def images(sizes=(8, 8, 8), seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, 3, 6, 6, generator=generator), None) for size in sizes]


def normed():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.BatchNorm2d(4)
    )
    for module in (model[1], model[4]):
        module.running_mean.normal_()
        module.running_var.uniform_(0.5, 2)
        module.momentum = 0.3
    return model.eval()


# -- batch norm --------------------------------------------------------------------------------------------------------


def test_the_statistics_are_the_average_over_the_batches():
    """Of the batches' means and unbiased variances; a layer sees its inputs normalised by the batch."""
    model, batches = normed(), images()
    reestimate_batch_norm(model, batches)
    first = [model[0](x) for x, _ in batches]
    second = [model[3]((nn.functional.batch_norm(y, None, None, training=True) * 1.0).relu()) for y in first]
    for norm, parts in ((model[1], first), (model[4], second)):
        mean = torch.stack([part.mean((0, 2, 3)) for part in parts]).mean(0)
        var = torch.stack([part.transpose(0, 1).flatten(1).var(1) for part in parts]).mean(0)
        torch.testing.assert_close(norm.running_mean, mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var, var, rtol=1e-4, atol=1e-5)


def test_what_was_there_before_does_not_matter_and_repeating_changes_nothing():
    a, b = normed(), normed()
    b[1].running_mean.fill_(1e6)
    b[4].running_var.fill_(1e-6)
    for model in (a, b):
        reestimate_batch_norm(model, images())
    once = copy.deepcopy(a.state_dict())
    reestimate_batch_norm(a, images())
    for model in (a, b):
        assert all(torch.equal(value, once[name]) for name, value in model.state_dict().items())


def test_momentum_modes_and_weights_are_put_back():
    model = normed()
    model[1].train()
    before = copy.deepcopy(dict(model.named_parameters()))
    reestimate_batch_norm(model, images())
    assert [model[1].momentum, model[4].momentum] == [0.3, 0.3]
    assert [model[1].training, model[4].training, model.training] == [True, False, False]
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_momentum_and_modes_are_put_back_after_an_error():
    model = normed()
    with pytest.raises(RuntimeError):
        reestimate_batch_norm(model, [(torch.zeros(2, 7, 6, 6), None)])
    assert [model[1].momentum, model[4].momentum] == [0.3, 0.3]
    assert not any(module.training for module in model.modules())


def test_dropout_stays_off():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.9), nn.BatchNorm2d(4)).eval()
    reestimate_batch_norm(model, images())
    wanted = torch.stack([model[0](x).mean((0, 2, 3)) for x, _ in images()]).mean(0)
    torch.testing.assert_close(model[2].running_mean, wanted.detach())


def test_a_last_batch_of_one_image_is_left_out():
    a, b = normed(), normed()
    reestimate_batch_norm(a, images((8, 8)))
    reestimate_batch_norm(b, images((8, 8)) + images((1,), seed=3))
    assert all(torch.equal(a.state_dict()[name], value) for name, value in b.state_dict().items())


def test_batches_of_one_image_do_not_wipe_the_statistics():
    """A loader of single images is not said to be wrong; there is nothing to estimate from, and all stays as it was."""
    model, before = normed(), normed().state_dict()
    reestimate_batch_norm(model, images((1, 1, 1)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_norm_that_the_network_does_not_pass_keeps_its_statistics():
    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.used(x)

    model = Beside()
    for norm in (model.used, model.unused):
        nn.init.constant_(norm.running_mean, 5.0)
    reestimate_batch_norm(model, [(torch.randn(8, 3, 4, 4), None)])
    assert float(model.used.running_mean.abs().max()) < 1
    assert model.unused.running_mean.tolist() == [5.0] * 3


def test_a_channel_that_was_scaled_and_shifted_answers_as_the_teacher_again():
    """Whatever the images are: their statistics are not those of the norms here."""
    teacher, student = normed(), normed()
    with torch.no_grad():
        for conv in (student[0], student[3]):
            conv.weight.mul_(torch.linspace(0.3, 2.5, len(conv.weight)).view(-1, 1, 1, 1))
        student[3].bias.add_(torch.tensor([1.0, -2.0, 0.5, 0.0]))
    x = images((16,), seed=7)[0][0] * 3 + 1
    assert not torch.allclose(student(x), teacher(x), atol=0.1)
    match_batch_norm(student, teacher, images())
    torch.testing.assert_close(student(x), teacher(x), rtol=1e-3, atol=1e-3)


def test_of_images_like_those_of_training_it_is_the_usual_estimate():
    teacher, mine, usual = normed(), normed(), normed()
    reestimate_batch_norm(teacher, images((64,)))
    torch.manual_seed(3)
    noise = torch.randn_like(mine[0].weight)
    with torch.no_grad():
        for student in (mine, usual):
            student[0].weight += 0.3 * noise
    match_batch_norm(mine, teacher, images((64,)))
    reestimate_batch_norm(usual, images((64,)))
    for layer in (1, 4):
        torch.testing.assert_close(mine[layer].running_mean, usual[layer].running_mean, rtol=0.01, atol=0.01)
        torch.testing.assert_close(mine[layer].running_var, usual[layer].running_var, rtol=0.01, atol=0.01)


def test_folded_statistics_stay_what_they_are():
    teacher = normed()
    for norm in (teacher[1], teacher[4]):
        norm.reset_running_stats()
    assert statistics_are_folded(teacher)
    assert not statistics_are_folded(normed())
    student = copy.deepcopy(teacher)
    match_batch_norm(student, teacher, images())
    torch.testing.assert_close(student.state_dict(), teacher.state_dict(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (24,)])
def test_how_the_images_are_cut_into_batches_hardly_matters_to_a_first_norm(sizes):
    teacher, student, other = normed(), normed(), normed()
    with torch.no_grad():
        for each in (student, other):
            each[0].weight += 0.1
    match_batch_norm(student, teacher, [(x, None) for x in images((24,))[0][0].split(sizes[0])])
    match_batch_norm(other, teacher, images((24,)))
    torch.testing.assert_close(student[1].running_mean, other[1].running_mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(student[1].running_var, other[1].running_var, rtol=1e-4, atol=1e-5)


def test_following_leaves_modes_hooks_and_norms_that_differ():
    teacher, student = normed(), normed()
    student[4] = nn.BatchNorm2d(4)
    student[1].train()
    teacher[4] = nn.BatchNorm2d(4, track_running_stats=False)
    before = student[4].running_mean.clone()
    match_batch_norm(student, teacher, images())
    assert student[1].training
    assert torch.equal(student[4].running_mean, before)
    assert not any(module._forward_pre_hooks for model in (teacher, student) for module in model.modules())
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_has_batch_norm():
    assert has_batch_norm(normed())
    assert not has_batch_norm(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)))
    assert not has_batch_norm(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)))


# -- biases ------------------------------------------------------------------------------------------------------------


def converted(conv, kernels, seed=0):
    """A DK layer of random factors in the place of `conv`."""
    torch.manual_seed(seed)
    counts = [kernels] * conv.in_channels
    options = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.bias is not None)
    layer = DKConv2d(conv.in_channels, conv.out_channels, *options, counts=counts)
    with torch.no_grad():
        layer.kernels.normal_()
        layer.combination.normal_()
        if layer.bias is not None:
            layer.bias.copy_(conv.bias)
    return layer.eval()


def plain(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1, bias=bias), nn.ReLU(), nn.Conv2d(8, 4, 3)
    ).eval()


def means(model, name, batches):
    sizes, outputs = [], []
    for x, _ in batches:
        for number, module in enumerate(model):
            x = module(x)
            if str(number) == name:
                outputs.append(x.detach().double().mean((0, 2, 3)))
                sizes.append(len(x))
                break
    weights = torch.tensor(sizes, dtype=torch.float64)
    return (torch.stack(outputs) * weights.unsqueeze(1)).sum(0) / weights.sum()


def test_one_layer_answers_on_average_as_the_teacher():
    teacher, batches = plain(), images((8, 8, 3))
    student = copy.deepcopy(teacher)
    student[2] = converted(teacher[2], 1)
    assert not torch.allclose(means(student, "2", batches), means(teacher, "2", batches), atol=1e-3)
    shift = means(teacher, "2", batches) - means(student, "2", batches)
    before = student[2].bias.detach().clone()
    correct_biases(student, teacher, ["2"], batches)
    torch.testing.assert_close(student[2].bias.detach().double(), before.double() + shift, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(means(student, "2", batches), means(teacher, "2", batches), rtol=1e-5, atol=1e-5)


def test_layers_are_corrected_one_after_the_other():
    teacher, batches = plain(), images()
    student = copy.deepcopy(teacher)
    student[2], student[4] = converted(teacher[2], 1), converted(teacher[4], 2)
    correct_biases(student, teacher, ["2", "4"], batches)
    for name in ("2", "4"):
        torch.testing.assert_close(means(student, name, batches), means(teacher, name, batches), rtol=1e-4, atol=1e-4)


def test_dense_layers_between_them_are_left_alone():
    """The names are those of all convolutions, also of those that stay dense."""
    teacher, batches = plain(), images()
    student = copy.deepcopy(teacher)
    student[2] = converted(teacher[2], 1)
    correct_biases(student, teacher, ["0", "2", "4"], batches)
    torch.testing.assert_close(means(student, "2", batches), means(teacher, "2", batches), rtol=1e-4, atol=1e-4)
    for number in (0, 4):
        assert torch.equal(student[number].bias, teacher[number].bias)
        assert torch.equal(student[number].weight, teacher[number].weight)


def test_a_layer_without_bias_gets_none():
    teacher, batches = plain(bias=False), images()
    student = copy.deepcopy(teacher)
    student[2] = converted(teacher[2], 1)
    before = copy.deepcopy(student.state_dict())
    correct_biases(student, teacher, ["2"], batches)
    assert student[2].bias is None
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_correction_leaves_no_hooks_modes_or_gradients():
    teacher = plain().train()
    student = copy.deepcopy(teacher)
    student[2] = converted(teacher[2], 1)
    before = copy.deepcopy(teacher.state_dict())
    correct_biases(student, teacher, ["2"], images())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(module.training for module in teacher.modules())
    assert [module.training for module in student] == [True, True, False, True, True]
    for model in (teacher, student):
        assert not any(module._forward_hooks for module in model.modules())
        assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
