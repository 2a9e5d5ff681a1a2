"""DK layers in their whitened form: the same network inside the block, a plain one afterwards, however it ends."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from dk2pnet.layer import DKConv2d
from dk2pnet.training.trainer import TrainingOptions
from dk2pnet.training.whitened import whitened, whitening_of
from toys import ONE, OPTIONS, network, run, same, settings_of, student_of, toy

ADAM = TrainingOptions(
    steps=20, optimizer="adam", learning_rate=0.01, warmup=3, precision="fp32", method="euclidean", distill=0.0
)


def moments(layer, seed=0):
    width = layer.in_channels // layer.groups * layer.kernel_size[0] * layer.kernel_size[1]
    root = torch.randn(layer.groups, width, 300, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.mT / 300


def whitenings(model):
    return {name: whitening_of(m, moments(m)) for name, m in model.named_modules() if isinstance(m, DKConv2d)}


@pytest.fixture(scope="module")
def trained():
    model = network()
    run(model)
    return model


LAYERS = {
    "uneven counts": dict(counts=[2, 1, 0, 3, 1, 4], groups=1),
    "groups": dict(counts=[2, 0, 1, 1, 1, 1], groups=2),
    "half of the branches grouped unevenly": dict(counts=[3, 0, 0, 1, 1, 1], groups=2),
}


@pytest.mark.parametrize("which", LAYERS)
@pytest.mark.parametrize("form", ["folded", "branches", "concat"])
def test_the_layer_computes_the_same_inside_and_afterwards(which, form):
    torch.manual_seed(0)
    layer = DKConv2d(6, 4, (3, 2), padding=1, form=form, **LAYERS[which])
    model, x = nn.Sequential(layer), torch.randn(2, 6, 5, 5)
    before, state = model(x), set(model.state_dict())
    with whitened(model, whitenings(model)):
        assert torch.allclose(model(x), before, atol=1e-5)
        kappa = layer.parametrizations.kernels.original
        assert torch.allclose(kappa.flatten(1).norm(dim=1), torch.ones(len(kappa)))
    assert torch.allclose(model(x), before, atol=1e-5)
    assert set(model.state_dict()) == state
    assert type(layer) is DKConv2d
    assert all(isinstance(parameter, nn.Parameter) for parameter in (layer.kernels, layer.combination))


def test_whatever_happens_inside_the_layers_are_plain_again():
    model = student_of(network())
    with pytest.raises(ZeroDivisionError), whitened(model, whitenings(model)):
        raise ZeroDivisionError
    assert not any("parametrizations" in name for name, _ in model.named_parameters())
    broken = whitenings(model) | {"0": None}  # no DK layer
    with pytest.raises(AssertionError), whitened(model, broken):
        pass
    assert not any("parametrizations" in name for name, _ in model.named_parameters())


def test_a_whitened_student_learns_and_is_left_plain(trained):
    student = student_of(trained, kernels=1)
    before, losses = settings_of(student), []
    data = toy(labels=False)
    run(
        student,
        data,
        ADAM,
        teacher=trained,
        whitenings=whitenings(student),
        progress=lambda step, total, terms: losses.append(terms["hints"]),
    )
    assert losses[-1] < 0.5 * losses[0]
    assert settings_of(student) == before | {"modes": [False] * len(before["modes"])}
    assert not any("parametrizations" in name for name in student.state_dict())


def test_a_whitened_run_goes_on_bit_for_bit(trained, tmp_path):
    options = replace(ADAM, checkpoint_every=0)

    def go(folder=None, stop=None):
        student = student_of(trained, kernels=1)

        def progress(step, total, terms):
            if step == stop:
                raise KeyboardInterrupt

        run(
            student,
            toy(labels=False),
            options,
            teacher=trained,
            whitenings=whitenings(student),
            folder=folder,
            progress=progress,
        )
        return student

    whole = go()
    for stop in (5, 13):
        with pytest.raises(KeyboardInterrupt):
            go(tmp_path, stop)
    assert same(go(tmp_path), whole)


def test_with_labels_and_sgd_it_works_too(trained):
    student = student_of(trained, kernels=1)
    losses = []
    run(
        student,
        toy(),
        replace(OPTIONS, method="kd", epochs=3, learning_rate=0.02),
        teacher=trained,
        whitenings=whitenings(student),
        progress=lambda step, total, terms: losses.append(terms["loss"]),
    )
    assert losses[-1] < losses[0]


def test_whitening_the_whole_is_no_other_network(trained):
    """A whitened copy of a student still answers as the student does, in evaluation."""
    student = student_of(trained)
    twin = copy.deepcopy(student)
    with whitened(twin, whitenings(twin)), torch.no_grad():
        assert torch.allclose(twin.eval()(ONE), student.eval()(ONE), atol=1e-5)
