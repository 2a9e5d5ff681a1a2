"""Saving a student and loading it again: bit for bit, or not at all."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dk2pnet.decompose.solve import solve
from dk2pnet.errors import InputError
from dk2pnet.layer import DKConv2d
from dk2pnet.nets import lenet
from dk2pnet.networks.saved import is_saved, load_student, save_student
from dk2pnet.networks.torch.convert import convert
from dk2pnet.networks.torch.sites import find_convolutions
from dk2pnet.plan import LayerPlan, Plan

ONE = torch.zeros(1, 1, 8, 8)
SPEC = {"name": "lenet", "num_classes": 10, "in_channels": 1}


def make(seed=0):
    torch.manual_seed(seed)
    return lenet(1)


def student_of(teacher, kernels=2, example=ONE, spec=SPEC):
    layers, factors = [], {}
    for site in find_convolutions(teacher, example):
        count = None
        if not site.reason:
            count = [kernels + (channel % 2) for channel in range(site.module.in_channels)]
            factors[site.name] = solve(site.module.weight, count)
        layers.append(LayerPlan(site.name, site.shape, site.reason, count))
    plan = Plan(layers=layers, network=spec, input_shape=list(example.shape[1:]))
    return convert(teacher, plan, factors).eval(), plan


@pytest.fixture
def saved(tmp_path):
    student, plan = student_of(make())
    save_student(student, plan, tmp_path)
    return tmp_path, student, plan


def test_a_named_network_comes_back_bit_by_bit(saved):
    folder, student, plan = saved
    student.train()  # what it is loaded as does not depend on this
    loaded, again = load_student(folder)
    assert again == plan
    assert not any(module.training for module in loaded.modules())
    assert [name for name, m in loaded.named_modules() if isinstance(m, DKConv2d)] == ["features.3", "features.6"]
    x = torch.randn(5, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(loaded(x), student.eval()(x))
    state = student.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())


def test_the_factory_is_preferred_and_its_weights_do_not_matter(saved):
    folder, student, _ = saved
    loaded, _ = load_student(str(folder), factory=lambda: make(seed=5).double().float())
    x = torch.randn(5, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(loaded(x), student(x))


def test_saving_what_was_loaded_gives_the_same_files(saved, tmp_path_factory):
    folder, _, _ = saved
    other = tmp_path_factory.mktemp("again")
    save_student(*load_student(folder), other)
    for name in ("plan.json", "model.safetensors"):
        assert (other / name).read_bytes() == (folder / name).read_bytes()


def test_a_dense_network_is_saved_too(tmp_path):
    model = make().eval()
    save_student(model, Plan(network=SPEC), tmp_path)
    loaded, plan = load_student(tmp_path)
    assert plan.layers == []
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_buffers_and_half_precision_come_back(tmp_path):
    def build():
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)).half()

    torch.manual_seed(0)
    model = build().float().eval()
    model[1].running_mean.normal_()
    student, plan = student_of(model, spec=None)
    student.half()
    save_student(student, plan, tmp_path)
    loaded, _ = load_student(tmp_path, factory=build)
    for name, value in student.state_dict().items():
        assert loaded.state_dict()[name].dtype == value.dtype
        assert torch.equal(loaded.state_dict()[name], value)


def test_weights_that_were_exchanged_are_refused(saved):
    folder, _, _ = saved
    weights = load_file(folder / "model.safetensors")
    weights["classifier.bias"] += 1
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(InputError, match="SHA-256 differs") as caught:
        load_student(folder)
    assert str(folder) in str(caught.value)


def test_a_plan_without_a_hash_is_refused(saved):
    folder, _, _ = saved
    plan = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps(plan | {"weights_hash": None}))
    with pytest.raises(InputError, match="SHA-256 differs"):
        load_student(folder)


def test_whoever_may_read_the_plan_may_read_the_weights(saved):
    folder, _, _ = saved
    plan, weights = ((folder / name).stat().st_mode & 0o777 for name in ("plan.json", "model.safetensors"))
    assert oct(weights) == oct(plan)


@pytest.mark.parametrize("name", ["plan.json", "model.safetensors"])
def test_missing_files_are_refused(saved, name):
    folder, _, _ = saved
    (folder / name).unlink()
    assert is_saved(folder) == (name != "plan.json")
    with pytest.raises(InputError, match=f"{name}.*expected a folder that dk2pnet wrote"):
        load_student(folder)


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    assert not is_saved(tmp_path / "none")
    with pytest.raises(InputError, match=r"none.plan\.json cannot be read"):
        load_student(tmp_path / "none")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "7", '{"format": 1}', '{"format": 99}', '{"format": 1, "layers": [{"speed": 3}]}']
)
def test_a_spoilt_plan_is_refused(saved, text):
    folder, _, _ = saved
    (folder / "plan.json").write_text(text)
    with pytest.raises(InputError, match=r"plan\.json"):
        load_student(folder)


def test_a_plan_in_other_bytes_is_refused(saved):
    folder, _, _ = saved
    (folder / "plan.json").write_bytes(b"\xff\xfe\x00plan")
    with pytest.raises(InputError, match=r"plan\.json cannot be read"):
        load_student(folder)


def test_the_wrong_factory_is_refused(saved):
    folder, _, _ = saved

    def other():
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3))

    with pytest.raises(InputError, match="'features.3'.*no Conv2d of this network"):
        load_student(folder, factory=other)
    with pytest.raises(InputError, match="do not fit"):
        load_student(folder, factory=lambda: lenet(1, num_classes=7))
    with pytest.raises(InputError, match="do not fit"):
        load_student(folder, factory=lambda: lenet(3))


def test_a_network_with_another_number_of_channels_is_refused(saved):
    """The plan has counts for 16 channels; the network of the factory has 4 at the same place."""
    folder, _, _ = saved

    def narrow():
        model = lenet(1)
        model.features[3] = nn.Conv2d(4, 32, 3, padding=1)
        return model

    with pytest.raises(InputError, match="features.3"):
        load_student(folder, factory=narrow)


def test_an_object_needs_its_factory(tmp_path):
    student, plan = student_of(make(), spec=None)
    save_student(student, plan, tmp_path)
    with pytest.raises(InputError, match="factory=FUNCTION"):
        load_student(tmp_path)
    load_student(tmp_path, factory=make)


def test_code_that_a_folder_names_is_not_run(tmp_path):
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\ndef make(): pass\n")
    name = f"{tmp_path / 'code.py'}:make"
    student, plan = student_of(make(), spec={"name": name})
    save_student(student, plan, tmp_path)
    with pytest.raises(
        InputError, match=f"is not run; .* --model {re.escape(name)} --weights {re.escape(str(tmp_path))}"
    ):
        load_student(tmp_path)
    assert not (tmp_path / "ran").exists()
    load_student(tmp_path, factory=make)


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 8, 3)
            self.twin = self.conv
            self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)
            self.down.weight = self.up.weight

        def forward(self, x):
            return self.down(self.up(self.twin(self.stem(x)).mean((2, 3))))

    torch.manual_seed(0)
    student, plan = student_of(Tied(), spec=None)
    save_student(student, plan, tmp_path)
    loaded, _ = load_student(tmp_path, factory=Tied)
    assert loaded.twin is loaded.conv
    assert isinstance(loaded.conv, DKConv2d)
    assert loaded.down.weight is loaded.up.weight
    assert sum(tensor.numel() == 64 for tensor in load_file(tmp_path / "model.safetensors").values()) == 1
    x = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(loaded(x), student(x))
