"""Counts worked out by hand; modes, layouts and outputs."""

import pytest
import torch
from torch import nn

from dk2pnet.errors import InputError
from dk2pnet.layer import DKConv2d
from dk2pnet.measure import evaluation, is_classifier, macs, outputs_of, parameters, use_form
from dk2pnet.nets import lenet, resnet20


def dk(counts, outputs=8, groups=1, bias=True, stride=1):
    return DKConv2d(len(counts), outputs, 3, stride, 1, 1, groups, bias, counts=counts)


# -- counts ------------------------------------------------------------------------------------------------------------


class Tokens(nn.Module):
    """The 3 pixels of a (4, 1, 3) image as tokens of 4 numbers, for a layer that takes a sequence."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        if isinstance(self.layer, nn.MultiheadAttention):
            return self.layer(tokens, tokens, tokens, need_weights=False)[0]
        return self.layer(tokens)[0] if isinstance(self.layer, nn.RNNBase) else self.layer(tokens)


ATTENTION = 3 * 4 * 12 + 2 * 3 * 3 * 4 + 3 * 4 * 4  # into queries, keys and values; both products; out of them

# a network, the shape of its input, parameters, multiply-adds
COUNTED = {
    "attention": (Tokens(nn.MultiheadAttention(4, 2, batch_first=True)), (4, 1, 3), 4 * 12 + 12 + 20, ATTENTION),
    "transformer": (
        Tokens(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)),
        (4, 1, 3),
        80 + 2 * 8 + 4 * 8 + 8 + 8 * 4 + 4,
        ATTENTION + 2 * 3 * 4 * 8,
    ),
    "LSTM": (Tokens(nn.LSTM(4, 5, batch_first=True)), (4, 1, 3), 20 * (4 + 5 + 2), 3 * 20 * (4 + 5)),
    "GRU": (Tokens(nn.GRU(4, 5, batch_first=True)), (4, 1, 3), 15 * (4 + 5 + 2), 3 * 15 * (4 + 5)),
    "convolution": (nn.Conv2d(3, 8, 3, padding=1), (3, 6, 6), 8 * 3 * 9 + 8, 36 * 8 * 3 * 9),
    "strided": (nn.Conv2d(3, 8, 3, 2, 1, bias=False), (3, 7, 7), 216, 16 * 216),
    "no padding": (nn.Conv2d(3, 8, (3, 5), bias=False), (3, 6, 8), 360, 4 * 4 * 360),
    "grouped": (nn.Conv2d(4, 8, 3, padding=1, groups=2), (4, 5, 5), 8 * 2 * 9 + 8, 25 * 144),
    "depthwise": (nn.Conv2d(4, 4, 3, padding=1, groups=4), (4, 5, 5), 40, 25 * 36),
    "dilated": (nn.Conv2d(2, 4, 3, dilation=2, bias=False), (2, 8, 8), 72, 16 * 72),
    "linear": (nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), (3, 2, 2), 65, 60),
    "norms and activations cost nothing": (
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)),
        (3, 4, 4),
        16 + 8,
        16 * 12,
    ),
    "transposed": (nn.ConvTranspose2d(3, 4, 2, 2, bias=False), (3, 5, 5), 48, 25 * 48),
    "DK": (dk([2, 0, 1]), (3, 6, 6), 3 * 9 + 8 * 3 + 8, 36 * (27 + 24)),
    "DK strided": (dk([1, 1], bias=False, stride=2), (2, 8, 8), 2 * 9 + 8 * 2, 16 * (18 + 16)),
    "DK grouped": (dk([1, 2, 2, 1], groups=2), (4, 5, 5), 6 * 9 + 8 * 3 + 8, 25 * (54 + 24)),
}


@pytest.mark.parametrize("name", COUNTED)
def test_counts(name):
    model, shape, weights, multiplied = COUNTED[name]
    assert parameters(model) == weights
    assert macs(model, torch.zeros(1, *shape)) == multiplied
    assert macs(model, torch.zeros(5, *shape)) == multiplied, "of one image"


@pytest.mark.parametrize("form", ["folded", "branches", "concat"])
def test_dk_layers_are_counted_in_their_cheap_form(form):
    layer = dk([2, 0, 1])
    layer.form = form
    assert macs(layer, torch.zeros(1, 3, 6, 6)) == 36 * (27 + 24)
    assert layer.form == form


def test_counts_of_known_networks():
    assert parameters(resnet20()) == 269_722
    assert macs(resnet20(), torch.zeros(1, 3, 32, 32)) == 40_551_040
    # 16x1x5x5 at 8x8, 32x16x3x3 at 4x4, 64x32x3x3 at 2x2 and the classifier
    assert macs(lenet(1), torch.zeros(1, 1, 8, 8)) == 64 * 400 + 16 * 4608 + 4 * 18432 + 640


def test_shared_weights_are_counted_once_and_shared_work_twice():
    conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    model = nn.Sequential(conv, nn.ReLU(), conv)
    assert parameters(model) == 144
    assert macs(model, torch.zeros(1, 4, 3, 3)) == 2 * 9 * 144


def test_counting_leaves_the_network_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    model[1].eval()
    before = model[1].running_mean.clone()
    macs(model, torch.randn(1, 3, 5, 5))
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert torch.equal(model[1].running_mean, before)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


# -- contexts ----------------------------------------------------------------------------------------------------------


def test_forms_and_modes_are_put_back_after_an_error():
    model = nn.Sequential(dk([1, 1]), dk([1] * 8)).train()
    model[0].form, model[1].form = "concat", "branches"
    model[1].eval()

    def fail():
        with use_form(model, "folded"), evaluation(model):
            assert [layer.form for layer in model] == ["folded", "folded"]
            assert not any(module.training for module in model.modules())
            assert not torch.is_grad_enabled()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [layer.form for layer in model] == ["concat", "branches"]
    assert [model.training, model[0].training, model[1].training] == [True, True, False]
    assert torch.is_grad_enabled()


# -- outputs -----------------------------------------------------------------------------------------------------------


def test_outputs_of_containers():
    a, b, c = torch.zeros(1), torch.ones(2), torch.ones(3)
    found = outputs_of({"x": a, "y": (b, None, [c])})
    assert [id(tensor) for tensor in found] == [id(a), id(b), id(c)]
    for wrong in ("text", 3, None, [a, "text"]):
        with pytest.raises(InputError, match="expected a tensor"):
            outputs_of(wrong)


def test_what_a_classifier_is():
    assert is_classifier([torch.zeros(5, 2)])
    for other in ([torch.zeros(5, 1)], [torch.zeros(5, 2, 1, 1)], [torch.zeros(5, 2)] * 2, []):
        assert not is_classifier(other)
