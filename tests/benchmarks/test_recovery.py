"""What the benchmark of recovery without labels takes from others does what their papers say."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import recovery
from dk2pnet.layer import DKConv2d


def test_fskd_undoes_a_mixing_of_the_outputs_and_absorbs_it():
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 3, stride=2, bias=False)
    teacher = nn.Sequential(first, nn.BatchNorm2d(4), nn.ReLU(), second, nn.Flatten(), nn.Linear(5 * 3 * 3, 2))
    student = copy.deepcopy(teacher)
    for place, conv in ((0, first), (3, second)):
        student[place] = layer = DKConv2d.from_dense(conv, 9)  # exact
        mixing = torch.eye(conv.out_channels) + 0.3 * torch.randn(conv.out_channels, conv.out_channels)
        with torch.no_grad():
            layer.combination.copy_((mixing @ layer.combination.flatten(1)).view_as(layer.combination))
            if layer.bias is not None:
                layer.bias.copy_(mixing @ layer.bias)
    images = torch.randn(40, 3, 8, 8)
    size = sum(parameter.numel() for parameter in student.parameters())

    def error():
        with torch.no_grad():
            return float((student.eval()(images) - teacher.eval()(images)).square().mean())

    before = error()
    recovery.fskd(student, teacher, [(images[:20], None), (images[20:], None)])
    assert error() < 1e-4 * before
    assert sum(parameter.numel() for parameter in student.parameters()) == size


def test_mir_compares_what_the_classifier_sees():
    torch.manual_seed(0)
    teacher = torch.randn(2, 3, 4, 4)
    shuffled = teacher.flatten(2)[:, :, torch.randperm(16)].view_as(teacher)
    assert float(recovery.pooled(shuffled, teacher)) == pytest.approx(0, abs=1e-10)
    assert float(recovery.pooled(2 * teacher, teacher)) == pytest.approx(1)
