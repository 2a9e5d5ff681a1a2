"""ONNX against PyTorch for every network in nets/ and four of torchvision (random weights, two kernels a channel).

Exports each converted network once and compares it in ONNX Runtime at batch sizes 1 and 7; counts depthwise
convolutions with a multiplier. Writes benchmarks/results/export.json.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from torch import nn

import dk2pnet
from common import write_results
from dk2pnet.deploy.export import check_onnx, export_onnx, multiplier_convolutions
from dk2pnet.nets import NETS
from dk2pnet.networks.named import make_network
from dk2pnet.run.device import environment

TORCHVISION = ("resnet18", "vgg11_bn", "mobilenet_v3_small", "convnext_tiny")


def main() -> None:
    cases = [(name, 32) for name in NETS] + [(f"torchvision/{name}", 224) for name in TORCHVISION]
    rows = []
    for name, side in cases:
        torch.manual_seed(0)
        rows.append(measure(name, make_network(name), side))
        print(json.dumps(rows[-1]), flush=True)
    result = {"rows": rows, **environment(torch.device("cpu"))}
    write_results("export", result)


def measure(name: str, model: nn.Module, side: int) -> dict:
    """Convert, export and compare one network."""
    for module in model.modules():  # batch norm as after training: neither 0 nor 1
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    example = torch.randn(1, 3, side, side)
    row: dict = {"model": name, "decomposed": 0}
    try:
        result = dk2pnet.compress(model, budget="kernels=2", criterion="weight", example_input=example)
        student, row["decomposed"] = result.model, sum(layer.counts is not None for layer in result.plan.layers)
    except dk2pnet.InputError as error:
        student, row["said"] = model.eval(), str(error)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(student, example, path)
        for batch in (1, 7):
            row[f"difference_batch_{batch}"] = check_onnx(path, student, [torch.randn(batch, 3, side, side)])
        row["multiplier_convolutions"] = len(multiplier_convolutions(path))
    return row


if __name__ == "__main__":
    main()
