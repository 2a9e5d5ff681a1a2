from __future__ import annotations

import shutil
import subprocess
import sys
import time
from importlib import metadata

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from dk2pnet.deploy import latency
from dk2pnet.deploy.export import onnx_bytes
from dk2pnet.deploy.latency import check_target, compare_latency, conditions, is_onnx
from dk2pnet.deploy.quantize import quantize_onnx
from dk2pnet.deploy.runtimes import TARGETS, Target, register, target_named
from dk2pnet.errors import InputError


class Toy(Target):
    """Sleeps as many milliseconds as its network has bytes."""

    name = "toy"
    reads_onnx = True
    package = "pytest"

    def load(self, network, example, threads):
        return lambda: time.sleep(len(network) / 1e3)


@pytest.fixture
def toy():
    register(Toy())
    yield TARGETS["toy"]
    del TARGETS["toy"]


def test_a_new_runtime_is_a_target_and_its_registration(toy):
    check_target("toy")
    assert is_onnx("toy")
    found = compare_latency({"long": b"12345678", "short": b"1"}, np.zeros((2, 3)), target="toy", seconds=0.05)
    assert found["long"].low_ms >= 8
    assert 1 <= found["short"].low_ms <= found["short"].median_ms < 8
    facts = conditions("toy", np.zeros((2, 3)), 1)
    assert (facts["target"], facts["pytest"], facts["batch"]) == ("toy", pytest.__version__, 2)
    with pytest.raises(InputError, match="target is 'tflite'; expected one of onnxruntime, .*, cuda, toy"):
        check_target("tflite")


def test_a_runtime_that_is_not_installed_is_refused(toy, monkeypatch):
    monkeypatch.setattr(Toy, "package", "no_such_runtime")
    with pytest.raises(InputError, match=r"needs the package no_such_runtime; .*: pip install no_such_runtime$"):
        check_target("toy")
    monkeypatch.setattr(Toy, "extra", "toys")
    with pytest.raises(InputError, match=r"install it with: pip install 'dk2pnet\[toys\]'$"):
        compare_latency({"it": b"1"}, np.zeros((2, 3)), target="toy")


def test_a_name_is_registered_once(toy):
    with pytest.raises(ValueError, match="there is a target toy already"):
        register(Toy())
    assert TARGETS["toy"] is toy


def test_those_that_come_with_it_and_what_they_are():
    assert latency.TARGETS == ("onnxruntime", "onnxruntime-int8", "openvino", "pytorch", "pytorch-compile", "cuda")
    assert tuple(TARGETS) == latency.TARGETS
    assert [name for name in TARGETS if is_onnx(name)] == ["onnxruntime", "onnxruntime-int8", "openvino"]
    assert [name for name, target in TARGETS.items() if target.quantized] == ["onnxruntime-int8"]
    packages = [target.package for target in TARGETS.values()]
    assert packages == ["onnxruntime", "onnxruntime", "openvino", "torch", "torch", "torch"]


def test_registering_imports_no_runtime():
    """Who needs only the names must not wait for libraries, nor have them all."""
    code = (
        "import sys, dk2pnet.deploy.latency\n"
        "print(sorted({'onnxruntime', 'openvino', 'torch._dynamo.convert_frame'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("name", latency.TARGETS)
def test_what_is_loaded_runs(name):
    target = target_named(name)
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("PyTorch finds no GPU here; the refusal of cuda has a test of its own")
    target.check()  # all others can be had wherever the extra `dev` is installed
    if name == "pytorch-compile" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile needs a C++ compiler")
    torch.manual_seed(0)
    module, example = nn.Conv2d(3, 4, 3).eval(), torch.randn(1, 3, 9, 9)
    network = onnx_bytes(module, example) if target.reads_onnx else module
    if target.quantized:
        network = quantize_onnx(network, [example])
    threads = torch.get_num_threads()
    with target.prepared(1):
        call = target.load(network, example, 1)
        output = call()
    assert torch.get_num_threads() == threads
    assert target.version()
    assert target.processor()
    first = next(iter(output.values())) if name == "openvino" else output[0] if target.reads_onnx else output.cpu()
    expected = module(example).detach().numpy()
    assert np.abs(np.asarray(first) - expected).max() <= (0.05 if target.quantized else 2e-3) * expected.max()


def test_threads_of_pytorch_are_set_and_put_back():
    before = torch.get_num_threads()
    with target_named("pytorch").prepared(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with target_named("onnxruntime").prepared(before + 1):
        assert torch.get_num_threads() == before


def test_every_network_is_compiled():
    """torch.compile would run the ninth of one class as it is."""
    graphs = []

    def count(graph, example):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    with target_named("pytorch-compile").prepared(None):
        for width in range(1, 13):
            torch.compile(nn.Sequential(nn.Conv2d(3, width, 1)), backend=count, dynamic=False)(torch.randn(1, 3, 4, 4))
    torch.compiler.reset()
    assert len(graphs) == 12


def test_another_distribution_may_have_the_runtime(monkeypatch):
    """Who has onnxruntime-gpu has the module onnxruntime, but no distribution of that name."""

    def missing(package):
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "version", missing)
    facts = conditions("onnxruntime", np.zeros((1, 3, 8, 8), np.float32), 1)
    assert facts["onnxruntime"] == onnxruntime.__version__


def test_a_gpu_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="target cuda needs a GPU, and PyTorch finds none; choose another --target"):
        check_target("cuda")
