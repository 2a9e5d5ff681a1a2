"""Networks by name, and weights from files of every layout, sound or not."""

import argparse
import copy
import io
import os
import pickle
import re
import sys
import textwrap
from collections import OrderedDict
from urllib.error import URLError

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from dk2pnet.data import Normalization
from dk2pnet.errors import InputError
from dk2pnet.nets import NETS
from dk2pnet.networks.named import default_input_size, default_normalization, make_network
from dk2pnet.networks.weights import check_finite, load_weights


def lenet(seed):
    torch.manual_seed(seed)
    return make_network("lenet", in_channels=1)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def refused(model, path, *words):
    """Loading fails with one sentence that has all the words, and leaves the model alone."""
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError) as caught:
        load_weights(model, path)
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    for word in words:
        assert word in message, message
    assert same(model.state_dict(), before)
    return message


# -- networks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet20", "vgg8", "lenet"])
def test_own_networks(name):
    assert make_network(name).eval()(torch.zeros(1, 3, 8, 8)).shape == (1, 10)
    assert make_network(name, num_classes=4, in_channels=1).eval()(torch.zeros(1, 1, 8, 8)).shape == (1, 4)


def test_own_networks_have_no_published_weights():
    with pytest.raises(InputError, match="no published weights for 'resnet20'.*--weights"):
        make_network("resnet20", pretrained=True)


@pytest.mark.parametrize("number", [0, -1])
@pytest.mark.parametrize("name", ["lenet", "torchvision/resnet18", "timm/resnet18"])
def test_numbers_below_one(name, number):
    with pytest.raises(InputError, match=f"num_classes is {number}; expected 1 or more"):
        make_network(name, num_classes=number)
    with pytest.raises(InputError, match=f"in_channels is {number}; expected 1 or more"):
        make_network(name, in_channels=number)


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [("rsnet20", "resnet20"), ("LeNet", "lenet"), ("resnet18", "torchvision/resnet18"), ("", ""), ("a/b", "")],
)
def test_unknown_name(name, suggestion):
    with pytest.raises(InputError) as caught:
        make_network(name)
    assert all(known in str(caught.value) for known in (*NETS, "torchvision/NAME", "timm/NAME", "FILE.py:FUNCTION"))
    assert (
        (f"did you mean {suggestion}" in str(caught.value)) if suggestion else ("did you mean" not in str(caught.value))
    )


def test_torchvision():
    assert make_network("torchvision/squeezenet1_1").num_classes == 1000
    model = make_network("torchvision/resnet18", num_classes=5, in_channels=3).eval()
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 5)


def test_torchvision_errors():
    with pytest.raises(InputError, match="no model 'resnet19'; the closest names are .*resnet18"):
        make_network("torchvision/resnet19")
    with pytest.raises(InputError, match="reads 3 channels, but 1 were asked for"):
        make_network("torchvision/resnet18", in_channels=1)


@pytest.fixture
def downloads(monkeypatch):
    """What torchvision would download, by a part of the address; anything else fails."""
    answers = {}

    def load(url, *args, **kwargs):
        for part, state in answers.items():
            if part in url:
                return state
        raise URLError("no connection")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", load)
    return answers


def test_segmentation_makes_no_download(downloads):
    model = make_network("torchvision/lraspp_mobilenet_v3_large", num_classes=2).eval()
    assert model(torch.zeros(1, 3, 32, 32))["out"].shape == (1, 2, 32, 32)


def test_torchvision_published_weights(downloads):
    with pytest.raises(InputError, match="torchvision/squeezenet1_1 could not be downloaded .*--weights FILE"):
        make_network("torchvision/squeezenet1_1", pretrained=True)
    torch.manual_seed(3)
    downloads["squeezenet1_1"] = make_network("torchvision/squeezenet1_1").state_dict()
    assert same(make_network("torchvision/squeezenet1_1", pretrained=True).state_dict(), downloads["squeezenet1_1"])
    with pytest.raises(InputError, match="leave the number of classes away"):
        make_network("torchvision/squeezenet1_1", num_classes=5, pretrained=True)


def test_published_weights_of_another_network_than_the_name_stands_for(downloads):
    # GoogLeNet's come with a transformed input; rebuilt from its name, the student would silently answer otherwise.
    downloads["googlenet"] = make_network("torchvision/googlenet").state_dict()
    with pytest.raises(InputError, match="do not belong to the network"):
        make_network("torchvision/googlenet", pretrained=True)


def test_timm():
    model = make_network("timm/resnet18", num_classes=4, in_channels=1).eval()
    assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 4)
    assert make_network("timm/resnet18.a1_in1k").num_classes == 1000


def test_timm_errors(monkeypatch):
    with pytest.raises(InputError, match="no model 'resnet19'; the closest names are .*resnet18"):
        make_network("timm/resnet19")
    with pytest.raises(InputError, match="no weights 'resnet18.nobody'; it knows .*resnet18.a1_in1k"):
        make_network("timm/resnet18.nobody")

    def fail(*args, **kwargs):
        raise OSError("no connection\nat all")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(InputError, match=r"timm/resnet18 could not be downloaded \(no connection\).*--weights FILE"):
        make_network("timm/resnet18", pretrained=True)


def test_timm_without_published_weights():
    published = {name.partition(".")[0] for name in timm.list_pretrained("resnet*")}
    name = next(name for name in timm.list_models("resnet*") if name not in published)
    with pytest.raises(InputError, match=f"no published weights for timm/{name}; give a file"):
        make_network(f"timm/{name}", pretrained=True)


def test_timm_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    for ask in (make_network, default_normalization, default_input_size):
        with pytest.raises(InputError, match=r"timm is not installed.*pip install"):
            ask("timm/resnet18")


# -- networks from a file ----------------------------------------------------------------------------------------------


def write(path, text):
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path


@pytest.fixture
def factory(tmp_path):
    write(tmp_path / "sibling_of_the_net.py", "WIDTH = 6\n")
    return write(
        tmp_path / "my net.py",
        """
        from __future__ import annotations
        from dataclasses import dataclass
        from torch import nn
        from sibling_of_the_net import WIDTH

        @dataclass
        class Config:
            width: int = WIDTH

        NUMBER = 3

        def make():
            return nn.Conv2d(3, Config().width, 3)

        def wrong():
            return {"no": "module"}

        def fails():
            raise KeyError("lost")

        def asks(width):
            return nn.Conv2d(3, width, 3)
        """,
    )


def test_file(factory):
    path = list(sys.path)
    assert make_network(f"{factory}:make").out_channels == 6
    assert sys.path == path
    assert "my net" not in sys.modules
    assert default_normalization(f"{factory}:make") is None
    assert default_input_size(f"{factory}:make") is None


def test_file_relative_in_a_folder_named_like_a_library(factory, tmp_path, monkeypatch):
    (tmp_path / "timm").mkdir()
    factory.rename(tmp_path / "timm" / "net.py")
    (tmp_path / "sibling_of_the_net.py").rename(tmp_path / "timm" / "sibling_of_the_net.py")
    monkeypatch.chdir(tmp_path)
    assert make_network("timm/net.py:make").out_channels == 6
    assert default_normalization("timm/net.py:make") is None
    assert default_input_size("timm/net.py:make") is None


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("nothing", "has no function 'nothing'; .*make, wrong, fails"),
        ("NUMBER", "has no function 'NUMBER'"),
        ("wrong", "returned dict; expected a torch.nn.Module"),
        ("fails", "failed .*KeyError: 'lost'"),
        ("asks", "failed .*expected a function without arguments"),
    ],
)
def test_file_errors(factory, function, message):
    path = list(sys.path)
    with pytest.raises(InputError, match=message):
        make_network(f"{factory}:{function}")
    assert sys.path == path


def test_file_missing_broken_or_asked_too_much(factory, tmp_path):
    with pytest.raises(InputError, match=r"none\.py does not exist"):
        make_network(f"{tmp_path}/none.py:make")
    broken = write(tmp_path / "broken.py", "def make(:\n")
    with pytest.raises(InputError, match=r"failed \(SyntaxError"):
        make_network(f"{broken}:make")
    with pytest.raises(InputError, match="leave num_classes and in_channels away"):
        make_network(f"{factory}:make", num_classes=3)
    with pytest.raises(InputError, match="no published weights"):
        make_network(f"{factory}:make", pretrained=True)


# -- weights that fit --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th", ".bin", ".PTH"])
def test_suffixes(tmp_path, suffix):
    torch.save(lenet(1).state_dict(), tmp_path / f"w{suffix}")
    model = lenet(2)
    load_weights(model, str(tmp_path / f"w{suffix}"))
    assert same(model.state_dict(), lenet(1).state_dict())


def test_safetensors(tmp_path):
    save_file(lenet(1).state_dict(), tmp_path / "w.safetensors")
    model = lenet(2)
    load_weights(model, tmp_path / "w.safetensors")
    assert same(model.state_dict(), lenet(1).state_dict())


def test_the_format_before_zip_files(tmp_path):
    torch.save(lenet(1).state_dict(), tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    model = lenet(2)
    load_weights(model, tmp_path / "w.pt")
    assert same(model.state_dict(), lenet(1).state_dict())


def prefixed(prefix, state):
    return OrderedDict((prefix + key, value) for key, value in state.items())


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("keys", [(), *[(k,) for k in ("state_dict", "model", "model_state_dict", "net", "weights")]])
def test_layouts(tmp_path, prefix, keys):
    content = prefixed(prefix, lenet(1).state_dict())
    for key in keys:
        content = {"epoch": 3, "best_prec1": 92.6, "optimizer": {"state": {}}, key: content}
    torch.save(content, tmp_path / "w.pt")
    model = lenet(2)
    load_weights(model, tmp_path / "w.pt")
    assert same(model.state_dict(), lenet(1).state_dict())


def test_nested_twice(tmp_path):
    torch.save({"model": {"state_dict": prefixed("module.", lenet(1).state_dict())}}, tmp_path / "w.pt")
    model = lenet(2)
    load_weights(model, tmp_path / "w.pt")
    assert same(model.state_dict(), lenet(1).state_dict())


@pytest.mark.parametrize("prefix", ["model.", "net.", "backbone.", "a.b.", "module.model._orig_mod."])
def test_any_prefix_of_all_names(tmp_path, prefix):
    content = {"state_dict": prefixed(prefix, lenet(1).state_dict()), "pytorch-lightning_version": "2.5"}
    torch.save(content, tmp_path / "w.ckpt.pt")
    model = lenet(2)
    load_weights(model, tmp_path / "w.ckpt.pt")
    assert same(model.state_dict(), lenet(1).state_dict())


def test_parts_that_were_compiled(tmp_path):
    state = {key.replace("features.", "features._orig_mod."): value for key, value in lenet(1).state_dict().items()}
    torch.save(state, tmp_path / "w.pt")
    model = lenet(2)
    load_weights(model, tmp_path / "w.pt")
    assert same(model.state_dict(), lenet(1).state_dict())


def test_a_network_among_others(tmp_path):
    """The part that fits is the one; where two do, nobody knows which is meant."""
    fitting, other = prefixed("student.", lenet(1).state_dict()), prefixed("teacher.", nn.Linear(2, 2).state_dict())
    torch.save(fitting | other, tmp_path / "w.pt")
    model = lenet(2)
    load_weights(model, tmp_path / "w.pt")
    assert same(model.state_dict(), lenet(1).state_dict())
    torch.save(fitting | prefixed("teacher.", lenet(3).state_dict()), tmp_path / "two.pt")
    refused(lenet(2), tmp_path / "two.pt", "several times, under student., teacher.", "save the one that is meant")


AVERAGES = {
    "torchvision": lambda raw, mean: {
        "model": raw,
        "model_ema": prefixed("module.", mean) | {"n_averaged": torch.tensor(5)},
        "args": argparse.Namespace(lr=0.1),
    },
    "timm": lambda raw, mean: {"state_dict": raw, "state_dict_ema": mean, "args": argparse.Namespace(lr=0.1)},
    "further down": lambda raw, mean: {"ema": {"module": mean, "updates": 7}, "model": raw},
}


@pytest.mark.parametrize("make", AVERAGES.values(), ids=AVERAGES)
def test_the_average_over_training_is_taken_and_said(tmp_path, make, caplog):
    torch.save(make(lenet(3).state_dict(), lenet(1).state_dict()), tmp_path / "w.pt")
    model = lenet(2)
    load_weights(model, tmp_path / "w.pt")
    assert same(model.state_dict(), lenet(1).state_dict())
    assert re.search(r"w\.pt holds weights under \w+ and their average under \w*ema: the average", caplog.text)


def test_an_average_that_holds_no_weights_is_passed_over(tmp_path, caplog):
    torch.save({"model": lenet(1).state_dict(), "ema": {"decay": 0.99}}, tmp_path / "w.pt")
    model = lenet(2)
    load_weights(model, tmp_path / "w.pt")
    assert same(model.state_dict(), lenet(1).state_dict())
    assert not caplog.text


def test_prefix_that_is_the_networks_own(tmp_path):
    for state in (prefixed("module.", lenet(1).state_dict()), prefixed("_orig_mod.module.", lenet(1).state_dict())):
        torch.save(state, tmp_path / "w.pt")
        model = nn.DataParallel(lenet(2))
        load_weights(model, tmp_path / "w.pt")
        assert same(model.module.state_dict(), lenet(1).state_dict())


def test_network_with_a_layer_called_model(tmp_path):
    model, other = (nn.ModuleDict({"model": nn.Linear(2, 2)}) for _ in range(2))
    torch.save(other.state_dict(), tmp_path / "w.pt")
    load_weights(model, tmp_path / "w.pt")
    assert same(model.state_dict(), other.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_cast(tmp_path, dtype):
    state = {key: value.to(dtype) for key, value in lenet(1).state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    model = lenet(2)
    load_weights(model, tmp_path / "w.safetensors")
    assert same(model.state_dict(), {key: value.float() for key, value in state.items()})


def test_old_batch_norm_without_its_counter(tmp_path):
    state = {key: v for key, v in nn.BatchNorm2d(4).state_dict().items() if key != "num_batches_tracked"}
    torch.save({key: value + 1 for key, value in state.items()}, tmp_path / "w.pt")
    model = nn.BatchNorm2d(4)
    load_weights(model, tmp_path / "w.pt")
    assert torch.equal(model.weight, torch.full((4,), 2.0))


# -- weights that do not -----------------------------------------------------------------------------------------------


def test_no_such_file(tmp_path):
    refused(lenet(1), tmp_path / "none.pt", "do not exist", ".safetensors")
    (tmp_path / "folder.pt").mkdir()
    refused(lenet(1), tmp_path / "folder.pt", "are a folder")
    (tmp_path / "w.onnx").write_bytes(b"x")
    refused(lenet(1), tmp_path / "w.onnx", "unknown kind", ".safetensors")


def saved(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "make",
    [
        lambda: b"",
        lambda: b"hello world\n",
        lambda: b"<!DOCTYPE html><html>",
        lambda: b"version https://git-lfs.github.com/spec/v1\n",
        lambda: bytes(range(256)) * 4,
        lambda: saved(lenet(1).state_dict())[:20_000],
        lambda: saved(lenet(1).state_dict(), _use_new_zipfile_serialization=False)[:-50],
        lambda: saved(lenet(1).state_dict(), _use_new_zipfile_serialization=False)[:60],
    ],
    ids=["empty", "text", "html", "lfs", "bytes", "cut", "cut-old", "cut-old-early"],
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_damaged_files(tmp_path, make, suffix):
    path = tmp_path / f"w{suffix}"
    path.write_bytes(make())
    message = refused(lenet(1), path, "cannot be read", "fetch it again")
    assert "()" not in message


def test_truncated_safetensors(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(lenet(1).state_dict(), path)
    path.write_bytes(path.read_bytes()[:-10])
    refused(lenet(1), path, "cannot be read", "fetch it again")


class Attack:
    """Unpickling it would make a folder."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("write", [saved, lambda c: saved(c, _use_new_zipfile_serialization=False), None])
def test_malicious_pickle_is_refused_and_not_run(tmp_path, write):
    attack = {"conv1.weight": Attack(tmp_path / "owned")}
    # A plain pickle of protocol 2 is read as far as the object; PyTorch refuses others before.
    content = write(attack) if write else pickle.dumps(attack, protocol=2)
    (tmp_path / "w.pt").write_bytes(content)
    refused(lenet(1), tmp_path / "w.pt", "more than tensors", "foreign code", "state_dict() alone", "safetensors")
    assert not (tmp_path / "owned").exists()
    pickle.loads(pickle.dumps(attack))  # it would have worked
    assert (tmp_path / "owned").exists()


class Options:
    """Something a training script keeps beside the weights."""


def test_objects_beside_the_weights_are_not_made(tmp_path, monkeypatch):
    torch.save({"args": Options(), "best": np.float64(3), "state_dict": lenet(1).state_dict()}, tmp_path / "w.pt")
    monkeypatch.setattr(Options, "__new__", None)  # making one would be an error
    model = lenet(2)
    load_weights(model, tmp_path / "w.pt")
    assert same(model.state_dict(), lenet(1).state_dict())


def test_more_than_tensors(tmp_path):
    torch.save(lenet(1), tmp_path / "module.pt")
    refused(lenet(1), tmp_path / "module.pt", "more than tensors", "a whole network")
    torch.save({"args": Options(), "model": lenet(1)}, tmp_path / "options.pt")
    refused(lenet(1), tmp_path / "options.pt", "more than tensors", "objects of the training script")
    torch.save(lenet(1).state_dict() | {"features.0.weight": Options()}, tmp_path / "one.pt")
    refused(lenet(1), tmp_path / "one.pt", "more than tensors", "objects of the training script")
    torch.jit.save(torch.jit.trace(lenet(1), torch.zeros(1, 1, 8, 8)), tmp_path / "script.pt")
    refused(lenet(1), tmp_path / "script.pt", "more than tensors")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.zeros(1)], ["a list"]),
        (torch.zeros(3), ["a Tensor"]),
        ({}, ["a dict with nothing in it"]),
        ({"state_dict": {}}, ["a dict with nothing in it"]),
        ({"epoch": 3, "optimizer": {"state": {}}}, ["a dict with epoch, optimizer"]),
        ({0: torch.zeros(1)}, ["a dict"]),
        (7, ["a int"]),
    ],
)
def test_no_state_dict(tmp_path, content, words):
    torch.save(content, tmp_path / "w.pt")
    refused(lenet(1), tmp_path / "w.pt", "hold no state_dict but", "model.state_dict()", *words)


def test_keys_that_do_not_fit(tmp_path):
    torch.save(make_network("resnet20").state_dict(), tmp_path / "w.pt")
    message = refused(
        make_network("vgg8"),
        tmp_path / "w.pt",
        "not in the network: conv1.weight (16, 3, 3, 3), bn1.weight (16,), bn1.bias (16,), ...",
        "the number of classes they belong to",
    )
    counts = re.findall(r"(\d+) (missing|not in the network)", message)
    unexpected = len(make_network("resnet20").state_dict())
    missing = [key for key in make_network("vgg8").state_dict() if not key.endswith("num_batches_tracked")]
    assert counts == [(str(len(missing)), "missing"), (str(unexpected), "not in the network")]


def test_shapes_that_do_not_fit(tmp_path):
    torch.save(make_network("resnet20").state_dict(), tmp_path / "w.pt")
    refused(
        make_network("resnet20", num_classes=100),
        tmp_path / "w.pt",
        "2 of another shape: linear.weight (10, 64) instead of (100, 64), linear.bias (10,) instead of (100,))",
    )


def test_one_missing_and_one_too_many(tmp_path):
    state = lenet(1).state_dict()
    first = next(iter(state))
    state["else"] = torch.zeros(2)
    state["epoch"] = 3
    shape = tuple(state.pop(first).shape)
    torch.save(state, tmp_path / "w.pt")
    refused(lenet(1), tmp_path / "w.pt", f"1 missing: {first} {shape}", "2 not in the network: else (2,), epoch)")


def test_values_of_another_kind(tmp_path):
    state = lenet(1).state_dict()
    first, second, *_ = state
    state[first] = state[first].to(torch.int8)
    state[second] = [0.5]
    torch.save(state, tmp_path / "w.pt")
    refused(
        lenet(1),
        tmp_path / "w.pt",
        f"2 of another kind: {first} torch.int8 instead of torch.float32, {second} list instead of a tensor",
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_weights_that_are_not_finite(tmp_path, value):
    state = {key: tensor.double() for key, tensor in lenet(1).state_dict().items()}
    name = list(state)[2]
    state[name].view(-1)[1] = value  # the last one is finite, but not in the network's precision
    torch.save(state, tmp_path / "w.pt")
    refused(lenet(1), tmp_path / "w.pt", f"NaN or infinity in {name}")


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_check_finite():
    model = make_network("resnet20")
    check_finite(model)
    model.layer2[0].bn1.running_var[3] = float("inf")
    with pytest.raises(InputError, match=r"infinity in layer2\.0\.bn1\.running_var;"):
        check_finite(model)
    with torch.no_grad():
        model.layer1[0].conv1.weight[0] = float("nan")
    with pytest.raises(InputError, match=r"infinity in layer1\.0\.conv1\.weight;"):
        check_finite(model)


@pytest.mark.parametrize(("given", "taken", "kind"), [(3, 1, "grey"), (1, 3, "coloured")])
def test_weights_for_images_of_other_colours_are_called_that(tmp_path, given, taken, kind):
    path = tmp_path / "weights.pt"
    torch.save(make_network("resnet20", in_channels=given).state_dict(), path)
    words = rf"they are for images of {given} channel\(s\), and these are {kind}: convert the images$"
    with pytest.raises(InputError, match=words):
        load_weights(make_network("resnet20", in_channels=taken), path)


def test_check_finite_lets_masks_be_and_wants_shapes():
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.full((2, 2), -float("inf")), persistent=False)
    model.register_buffer("causal", torch.triu(torch.full((3, 3), -float("inf")), 1))
    check_finite(model)
    with pytest.raises(InputError, match="0.weight of the network has no shape yet"):
        check_finite(nn.Sequential(nn.LazyConv2d(3, 3)))


def test_defaults():
    imagenet = Normalization.parse("imagenet")
    assert (default_normalization("torchvision/resnet18"), default_input_size("torchvision/resnet18")) == (
        imagenet,
        224,
    )
    assert (default_normalization("resnet20"), default_input_size("resnet20")) == (None, None)
    assert (default_normalization("timm/resnet18"), default_input_size("timm/resnet18")) == (imagenet, 224)
    half = Normalization((0.5,) * 3, (0.5,) * 3)
    name = "timm/inception_v3.tf_in1k"
    assert (default_normalization(name), default_input_size(name)) == (half, 299)


def test_torchvision_networks_that_were_published_for_other_images_say_so():
    assert default_input_size("torchvision/efficientnet_b3") == 300
    assert default_input_size("torchvision/inception_v3") == 299
    assert default_normalization("torchvision/efficientnet_v2_l") == Normalization((0.5,) * 3, (0.5,) * 3)
    assert default_input_size("torchvision/no_such_network") == 224  # make_network refuses it
