"""What people give by mistake, or have in another form: one clear sentence before any work, and no traceback."""

import pytest
import torch
from torch import nn

from dk2pnet import InputError, compress, load_student, save_student
from dk2pnet.layer import DKConv2d
from dk2pnet.plan import LayerPlan, Plan


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()


X = list(torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(1)).split(8))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x, y, scale=1.0):
        return self.net(x + scale * y)


def scripted_part():
    whole = net()
    return nn.Sequential(torch.jit.script(whole[:2]), *whole[2:]).eval()


MODELS = {
    "a number": (lambda: 5, "model is of type int; expected a torch.nn.Module, the name of a network"),
    "nothing": (lambda: None, "model is of type NoneType; expected a torch.nn.Module"),
    "TorchScript": (lambda: torch.jit.script(net()), "the network is TorchScript.*give the module it was made of"),
    "TorchScript in part": (scripted_part, "'0' of the network is TorchScript"),
    "an exported program": (lambda: torch.export.export(net(), (X[0],)), "model is an exported program"),
    "its module": (lambda: torch.export.export(net(), (X[0],)).module(), "the network is an exported program"),
    "two inputs": (TwoInputs, "forward takes x, y, and images are one input; give a module whose forward takes images"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("what", MODELS)
def test_networks(what):
    make, said = MODELS[what]
    with pytest.raises(InputError, match=said):
        compress(make(), X, "macs=0.7", criterion="response", tune=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_numbers_that_a_file_cannot_have_are_refused_before_the_work(tmp_path, dtype):
    given = net().to(dtype), [x.to(dtype) for x in X], "macs=0.7"
    with pytest.raises(InputError, match=rf"are {dtype}, which model.onnx cannot have; give both in torch.float32"):
        compress(*given, criterion="response", tune=0, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert compress(*given, criterion="response", tune=0).model[0].weight.dtype == dtype


def test_a_network_without_weights():
    with pytest.raises(InputError, match="the network has no weights yet .*meta.*; load some first"):
        compress(net().to("meta"), X, "macs=0.7", criterion="response", tune=0)


def test_a_network_with_nothing_left_says_so():
    model = nn.Sequential(DKConv2d.from_dense(net()[0], 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with pytest.raises(InputError, match="no convolution that can be decomposed: all are dominant kernels already"):
        compress(model, X, "macs=0.7", criterion="response", tune=0)


def test_an_out_that_is_no_path():
    with pytest.raises(InputError, match="out is of type int; expected the path of a folder, or None"):
        compress(net(), X, "macs=0.7", criterion="response", tune=0, out=5)


@pytest.mark.parametrize("given", [nn.Linear(3, 4), "conv1"])
def test_what_is_no_convolution(given):
    with pytest.raises(InputError, match=f"conv is of type {type(given).__name__}; expected a torch.nn.Conv2d"):
        DKConv2d.from_dense(given, 1)
    with pytest.raises(InputError, match="expected a torch.nn.Conv2d"):
        DKConv2d.like(given, 1)


@pytest.mark.parametrize("given", ["resnet18", net(), lambda: None])
def test_factories(tmp_path, given):
    model = net()
    model[2] = DKConv2d.from_dense(model[2], 1)
    folder = tmp_path / "made" / "here"
    save_student(model, Plan(layers=[LayerPlan("2", "", counts=[1] * 8)]), folder)
    with pytest.raises(InputError, match="factory .*expected a function without arguments that returns the dense"):
        load_student(folder, factory=given)
    assert isinstance(load_student(folder, factory=net)[0][2], DKConv2d)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written to .*; give another folder"):
        save_student(net(), Plan(), tmp_path / "file")


@pytest.mark.parametrize("tune", [0, 2])
def test_networks_made_in_inference_mode_are_taken(tune):
    with torch.inference_mode():
        model = net()
    result = compress(model, X, "macs=0.7", criterion="response", tune=tune)
    assert isinstance(result.model[2], DKConv2d)
    assert not any(p.is_inference() for p in result.model.parameters())
    assert all(p.is_inference() for p in model.parameters())


class Scale(nn.Module):
    """Has nothing to learn."""

    def forward(self, x):
        return 2 * x


def test_a_scripted_part_without_weights_is_no_obstacle():
    whole = net()
    model = nn.Sequential(whole[0], torch.jit.script(Scale()), *whole[1:]).eval()
    assert compress(model, X, "kernels=1", criterion="response", tune=0).metrics["student"]
