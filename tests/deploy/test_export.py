from __future__ import annotations

import logging

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from dk2pnet.deploy.export import check_onnx, export_onnx, multiplier_convolutions, read_metadata
from dk2pnet.deploy.runtimes.onnxruntime import run_onnx, session
from dk2pnet.errors import InputError
from dk2pnet.layer import DKConv2d


def dk(*args, counts=2, form="folded", **kwargs):
    return DKConv2d.from_dense(nn.Conv2d(*args, **kwargs), counts, form=form)


def small_net():
    """Two DK layers, one with channels that have no kernel; batch-norm statistics that are not the initial ones."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        dk(8, 12, 3, padding=1, counts=[2, 0, 1, 3, 2, 2, 1, 1]),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        dk(12, 6, 3, stride=2, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    )
    for module in net:
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean)
    return net.eval()


def batches(channels=3, size=11):
    return [torch.randn(batch, channels, size, size + 1) for batch in (1, 7)]


def node_types(path):
    return [node.op_type for node in onnx.load(path).graph.node]


LAYERS = {
    "plain": lambda: dk(6, 8, 3),
    "padding, stride, no bias": lambda: dk(6, 8, 3, padding=1, stride=2, bias=False),
    "channels without kernels": lambda: dk(6, 8, 3, padding=1, counts=[0, 3, 1, 0, 2, 1]),
    "one kernel in all": lambda: dk(6, 8, 3, counts=[0, 0, 0, 1, 0, 0]),
    "wide kernel, dilation": lambda: dk(6, 8, (3, 5), padding=(2, 4), dilation=2, counts=3),
    "same": lambda: dk(6, 8, 3, padding="same", dilation=2),
    "same, even kernel": lambda: dk(6, 8, (4, 2), padding="same"),
    "reflect": lambda: dk(6, 8, 3, padding=1, padding_mode="reflect", stride=(1, 2)),
    "circular": lambda: dk(6, 8, 3, padding=2, padding_mode="circular"),
    "replicate, same": lambda: dk(6, 8, 4, padding="same", padding_mode="replicate"),
    "groups": lambda: dk(6, 8, 3, padding=1, groups=2, counts=[2, 1, 1, 1, 1, 2]),
    "groups, uneven branches": lambda: dk(6, 8, 3, padding=1, groups=2, counts=[2, 1, 1, 4, 0, 0]),
    "groups, one kernel per group": lambda: dk(6, 8, 3, groups=2, counts=[1, 0, 0, 0, 1, 0]),
    "groups, one kernel per group, uneven branches": lambda: dk(4, 8, 3, groups=2, counts=[1, 1, 2, 0]),
    "one input channel": lambda: dk(1, 8, 3, counts=4),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("kind", LAYERS)
def test_layer_exports_exactly(kind, tmp_path):
    torch.manual_seed(0)
    layer = LAYERS[kind]().eval()
    example, *others = batches(layer.in_channels)
    export_onnx(layer, example, tmp_path / "layer.onnx")
    assert check_onnx(tmp_path / "layer.onnx", layer, [example, *others]) < 1e-5
    assert multiplier_convolutions(tmp_path / "layer.onnx") == []


def test_network_exports_at_any_batch_size_and_is_left_alone(tmp_path):
    net = small_net()
    net[0].train()
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for example in batches():  # traced with one image, and with seven
        export_onnx(net, example, tmp_path / "net.onnx")
        assert check_onnx(tmp_path / "net.onnx", net, batches()) < 1e-5
    assert net[0].training
    assert not net[1].training
    assert net[3].form == net[6].form == "folded"
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


def test_graph_of_a_dk_layer_is_clean(tmp_path):
    # Above the sizes at which exporters stop folding constants.
    layer = dk(96, 128, 3, padding=1, counts=[2] * 60 + [0] * 6 + [3] * 30)
    export_onnx(layer.eval(), torch.randn(1, 96, 6, 6), tmp_path / "layer.onnx")
    graph = onnx.load(tmp_path / "layer.onnx").graph
    # Two branches are completed to all 96 channels; the 30 kernels left over are gathered and padded to 32.
    assert sorted(node_types(tmp_path / "layer.onnx")) == ["Add"] * 2 + ["Conv"] * 6 + ["Gather"]
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    weights = {initializer.name: tuple(initializer.dims) for initializer in graph.initializer}
    assert sorted(weights[node.input[1]] for node in convolutions) == [
        (32, 1, 3, 3),
        (96, 1, 3, 3),
        (96, 1, 3, 3),
        (128, 32, 1, 1),
        (128, 96, 1, 1),
        (128, 96, 1, 1),
    ]


def test_shared_layer_is_written_once(tmp_path):
    layer = dk(6, 6, 3, padding=1, counts=1)
    net = nn.Sequential(layer, nn.ReLU(), layer).eval()
    export_onnx(net, torch.randn(1, 6, 8, 8), tmp_path / "net.onnx")
    assert check_onnx(tmp_path / "net.onnx", net, [torch.randn(2, 6, 8, 8)]) < 1e-5
    elements = sum(int(np.prod(each.dims)) for each in onnx.load(tmp_path / "net.onnx").graph.initializer)
    assert elements == layer.kernels.numel() + layer.combination.numel() + layer.bias.numel()


class Several(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.body = dk(3, 4, 3)

    def forward(self, x: Tensor):
        y = self.body(x)
        mean = y.mean((2, 3))
        kinds = {
            "tuple": (y, mean),
            "dict": {"map": y, "mean": mean},
            "nested": {"maps": [y], "aux": None, "mean": mean},
        }
        return kinds[self.kind]


@pytest.mark.parametrize("kind", ["tuple", "dict", "nested"])
def test_several_outputs_and_names(kind, tmp_path):
    net = Several(kind).eval()
    export_onnx(net, batches()[0], tmp_path / "net.onnx", input_name="image", output_name="out")
    running = session(tmp_path / "net.onnx", threads=1)
    assert [entry.name for entry in running.get_inputs()] == ["image"]
    assert [entry.name for entry in running.get_outputs()] == ["out", "out_1"]
    assert check_onnx(tmp_path / "net.onnx", net, batches()) < 1e-5


def test_metadata_comes_back(tmp_path):
    metadata = {"seed": "0", "comment": "Größe, 'quotes'\nand lines"}
    export_onnx(small_net(), batches()[0], tmp_path / "net.onnx", metadata=metadata)
    assert read_metadata(tmp_path / "net.onnx") == metadata
    assert session(tmp_path / "net.onnx").get_modelmeta().custom_metadata_map == metadata


def test_nothing_of_this_machine_and_no_chatter(tmp_path, capfd, recwarn, caplog):
    caplog.set_level(logging.DEBUG)
    export_onnx(small_net(), batches()[0], tmp_path / "net.onnx")
    out, err = capfd.readouterr()
    assert (out, err, list(recwarn), caplog.records) == ("", "", [], [])
    assert b".py" not in (tmp_path / "net.onnx").read_bytes()


class Spectrum(nn.Module):
    def forward(self, x: Tensor):
        return torch.linalg.matrix_exp(x)


class FrozenBatch(nn.Module):
    """Leaves the batch size to Python, where the exporters lose sight of it."""

    def forward(self, x: Tensor):
        return x.reshape(int(x.shape[0]), -1) * float(len(x))


class Sinh(nn.Module):
    """Unknown to the TorchScript exporter."""

    def forward(self, x: Tensor):
        return torch.sinh(x)


class NotATensor(nn.Module):
    def forward(self, x: Tensor):
        return "cat"


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (Spectrum(), "cannot export Spectrum to ONNX: "),
        (FrozenBatch(), "cannot export FrozenBatch to ONNX: the batch size cannot be left free"),
        (NotATensor(), "NotATensor gives str; expected a tensor"),
        (nn.Conv2d(2, 2, 3), r"Conv2d does not take the example of shape \(1, 3, 8, 8\)"),
    ],
)
def test_what_cannot_be_exported_leaves_nothing(net, message, tmp_path):
    with pytest.raises(InputError, match=message) as caught:
        export_onnx(net.eval(), torch.randn(1, 3, 8, 8), tmp_path / "net.onnx")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_other_exporter_takes_over(tmp_path, capfd):
    net = nn.Sequential(dk(3, 8, 3, counts=[2, 0, 1]), Sinh()).eval()
    export_onnx(net, batches()[0], tmp_path / "net.onnx")
    assert capfd.readouterr() == ("", "")
    assert check_onnx(tmp_path / "net.onnx", net, batches()) < 1e-5
    assert b".py" not in (tmp_path / "net.onnx").read_bytes()


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "net.onnx"
    path.write_text("old")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        export_onnx(dk(3, 4, 3), torch.randn(1, 3, 8, 8), path)
    assert [each.name for each in tmp_path.iterdir()] == ["net.onnx"]
    assert path.read_text() == "old"


def test_check_finds_another_model_and_not_a_number(tmp_path):
    net, other = small_net(), small_net()
    export_onnx(net, batches()[0], tmp_path / "net.onnx")
    with torch.no_grad():
        other[-1].weight[0, 0] += 0.1
    with pytest.raises(RuntimeError, match="net.onnx and PyTorch differ by"):
        check_onnx(tmp_path / "net.onnx", other, batches())
    with pytest.raises(RuntimeError, match="differ by nan"):
        check_onnx(tmp_path / "net.onnx", net, [torch.full((1, 3, 11, 12), torch.nan)])
    with pytest.raises(RuntimeError, match=r"fails on an input of shape \(1, 3, 5, 5\)"):
        check_onnx(tmp_path / "net.onnx", net, [torch.randn(1, 3, 5, 5)])
    with pytest.raises(RuntimeError, match="gives outputs of shape"):
        check_onnx(tmp_path / "net.onnx", net[:-1], batches())


@pytest.mark.parametrize("read", [session, read_metadata, multiplier_convolutions])
def test_bad_file_is_an_input_error(read, tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read(tmp_path / "none.onnx")
    path = tmp_path / "bad.onnx"
    export_onnx(small_net(), batches()[0], path)
    for content in (b"", b"not a network at all", path.read_bytes()[:2000]):
        path.write_bytes(content)
        with pytest.raises(InputError, match="bad.onnx"):
            read(path)


@pytest.mark.parametrize(
    ("channels", "outputs", "groups", "constant", "found"),
    [(4, 8, 4, False, 1), (4, 8, 4, True, 1), (4, 4, 4, False, 0), (4, 8, 2, False, 0), (1, 8, 1, False, 0)],
)
def test_multiplier_convolution_is_reported(channels, outputs, groups, constant, found, tmp_path):
    weight = np.ones((outputs, channels // groups, 3, 3), np.float32)
    tensor = onnx.numpy_helper.from_array(weight, "w")
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], name="the one", group=groups)]
    if constant:
        nodes.insert(0, helper.make_node("Constant", [], ["w"], value=tensor))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", channels, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", outputs, 6, 6])],
        [] if constant else [tensor],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    assert multiplier_convolutions(tmp_path / "m.onnx") == ["the one"] * found


def test_session_and_run(tmp_path):
    net = small_net()
    export_onnx(net, batches()[0], tmp_path / "net.onnx")
    running = session(tmp_path / "net.onnx", threads=1)
    assert isinstance(running, onnxruntime.InferenceSession)
    assert running.get_session_options().intra_op_num_threads == 1
    x = torch.randn(2, 3, 11, 12)
    with torch.no_grad():
        expected = net(x).numpy()
    for given in (x, x.numpy(), x.to(memory_format=torch.channels_last)):
        np.testing.assert_allclose(run_onnx(running, given)[0], expected, atol=1e-5)
    with pytest.raises(InputError, match="threads is 0"):
        session(tmp_path / "net.onnx", threads=0)
