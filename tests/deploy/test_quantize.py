from __future__ import annotations

import onnx
import pytest
import torch
from torch import nn

from dk2pnet.deploy.export import onnx_bytes
from dk2pnet.deploy.quantize import quantize_onnx
from dk2pnet.deploy.runtimes.onnxruntime import run_onnx, session
from dk2pnet.errors import InputError
from dk2pnet.layer import DKConv2d
from graphs import small


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        DKConv2d(16, 16, 3, padding=1, counts=2, form="folded"),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    ).eval()


def test_weights_are_int8_and_answers_nearly_the_same():
    model = net()
    x = torch.rand(64, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    content = quantize_onnx(onnx_bytes(model, x[:1]), x.split(16))
    kinds = {tensor.data_type for tensor in onnx.load_model_from_string(content).graph.initializer if tensor.dims}
    assert onnx.TensorProto.INT8 in kinds
    with torch.no_grad():
        expected = model(x)
    found = torch.from_numpy(run_onnx(session(content, 1), x)[0])  # any batch size
    assert float((found - expected).norm() / expected.norm()) < 0.1
    assert float((found - expected).abs().max()) > 0


def test_a_file_works_as_its_content_does(tmp_path):
    x = torch.rand(4, 3, 12, 12)
    content = onnx_bytes(net(), x[:1])
    (tmp_path / "net.onnx").write_bytes(content)
    assert quantize_onnx(tmp_path / "net.onnx", [x]) == quantize_onnx(content, [x])
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


def test_no_images_and_what_cannot_be_quantised_are_refused():
    content = onnx_bytes(net(), torch.rand(1, 3, 12, 12))
    with pytest.raises(InputError, match="no images to calibrate int8 with"):
        quantize_onnx(content, [])
    with pytest.raises(InputError, match="cannot be quantised"):
        quantize_onnx(content, [torch.rand(1, 2, 12, 12)])


@pytest.mark.parametrize("opset", [11, 12, 17])
def test_files_of_old_operator_sets(opset):
    """Scales for each channel came with operator set 13."""
    x = torch.rand(32, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    content = small(opset=opset).SerializeToString()
    found, expected = (
        torch.from_numpy(run_onnx(session(each, 1), x)[0]) for each in (quantize_onnx(content, x.split(8)), content)
    )
    assert 0 < float((found - expected).norm() / expected.norm()) < 0.1
