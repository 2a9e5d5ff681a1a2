from __future__ import annotations

import onnx
import pytest
import torch
from torch import nn

from dk2pnet.deploy.emit import EMITTED
from dk2pnet.deploy.export import check_onnx, export_onnx
from dk2pnet.deploy.fuse import fold_batch_norms
from dk2pnet.layer import DKConv2d


def norm(channels):
    module = nn.BatchNorm2d(channels)
    nn.init.uniform_(module.running_var, 0.5, 2)
    nn.init.normal_(module.running_mean)
    nn.init.normal_(module.weight)
    nn.init.normal_(module.bias)
    return module


class Block(nn.Module):
    """A residual block of DK layers; `tapped`: the sum before the first norm is read by somebody else too."""

    def __init__(self, bias, tapped=False):
        super().__init__()
        torch.manual_seed(0)
        counts = [3] * 6 + [1] * 10
        self.first = DKConv2d(16, 16, 3, padding=1, bias=bias, counts=counts, form="folded")
        self.second = DKConv2d(16, 16, 3, padding=1, bias=bias, counts=2, form="folded")
        self.norms = nn.ModuleList([norm(16), norm(16)])
        self.tapped = tapped

    def forward(self, x):
        sums = self.first(x)
        y = self.norms[1](self.second(self.norms[0](sums).relu()))
        return (x + y).relu() + (sums if self.tapped else 0)


def kinds(path):
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", EMITTED)
def test_no_batch_norm_is_left_behind_a_dk_layer(tmp_path, form, bias):
    net = Block(bias).eval()
    x = torch.randn(2, 16, 9, 9)
    export_onnx(net, x, tmp_path / "net.onnx", forms={"first": form, "second": form})
    assert "BatchNormalization" not in kinds(tmp_path / "net.onnx")
    assert check_onnx(tmp_path / "net.onnx", net, [x]) < 1e-5


def test_a_norm_stays_where_its_input_is_read_elsewhere(tmp_path):
    net = Block(True, tapped=True).eval()
    x = torch.randn(2, 16, 9, 9)
    export_onnx(net, x, tmp_path / "net.onnx")
    assert kinds(tmp_path / "net.onnx").count("BatchNormalization") == 1
    assert check_onnx(tmp_path / "net.onnx", net, [x]) < 1e-5


def test_a_shared_convolution_is_scaled_for_one_of_its_norms_only(tmp_path):
    conv, first, second = DKConv2d(4, 4, 3, padding=1, counts=2, form="folded"), norm(4), norm(4)
    net = nn.Sequential(conv, first, nn.ReLU(), conv, second).eval()
    x = torch.randn(2, 4, 6, 6)
    export_onnx(net, x, tmp_path / "net.onnx")
    assert "BatchNormalization" not in kinds(tmp_path / "net.onnx")
    assert check_onnx(tmp_path / "net.onnx", net, [x]) < 1e-5


def test_a_sum_of_two_convolutions_with_biases_before_one_norm(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.norm = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), norm(4)

        def forward(self, x):
            return self.norm(self.a(x) + self.b(x)).relu()

    net = Two().eval()
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    export_onnx(net, x, tmp_path / "net.onnx")
    assert check_onnx(tmp_path / "net.onnx", net, [x]) < 1e-5


def test_nothing_to_fold_changes_nothing(tmp_path):
    export_onnx(nn.Sequential(norm(3), nn.Conv2d(3, 4, 3)).eval(), torch.randn(1, 3, 6, 6), tmp_path / "net.onnx")
    model = onnx.load(tmp_path / "net.onnx")
    before = model.SerializeToString()
    assert fold_batch_norms(model) == 0
    assert model.SerializeToString() == before
