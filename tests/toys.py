"""What the tests of training share: small images, a small network, its student, and how either is left."""

import torch
from torch import nn

from dk2pnet.decompose.solve import solve
from dk2pnet.layer import DKConv2d
from dk2pnet.networks.torch.convert import convert
from dk2pnet.networks.torch.sites import find_convolutions
from dk2pnet.plan import LayerPlan, Plan
from dk2pnet.training.trainer import TrainingOptions, train

ONE = torch.zeros(1, 1, 8, 8)
OPTIONS = TrainingOptions(epochs=2, batch_size=16, learning_rate=0.05, precision="fp32")


def toy(count=96, batch=16, seed=0, labels=True):
    """Four classes of 8x8 images: which quarter is bright."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 4
    x = 0.3 * torch.randn(count, 1, 8, 8, generator=generator)
    for number, label in enumerate(y.tolist()):
        top, left = 4 * (label // 2), 4 * (label % 2)
        x[number, 0, top : top + 4, left : left + 4] += 1
    order = torch.randperm(count, generator=generator)
    parts = zip(x[order].split(batch), y[order].split(batch), strict=True)
    return [(a, b if labels else None) for a, b in parts]


def network(seed=0):
    """Two stages, of 8x8 and of 4x4; the first convolution stays dense in a student, the second is a DK layer."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, 2, 1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12 * 16, 4),
    )


class ByView(nn.Module):
    """Flattens as many networks do, which is an error where maps lie channels last."""

    def forward(self, x):
        return x.view(x.size(0), -1)


def by_view(seed=0):
    """The same network."""
    model = network(seed)
    model[6] = ByView()
    return model


def run(model, data=None, options=OPTIONS, **more):
    data = toy() if data is None else data
    return train(model, lambda epoch: data, options, example=ONE, steps_per_epoch=len(data), **more)


def student_of(teacher, kernels=2):
    layers, factors = [], {}
    for site in find_convolutions(teacher, ONE):
        if not site.reason:
            count = [kernels] * site.module.in_channels
            factors[site.name] = solve(site.module.weight, count)
            layers.append(LayerPlan(site.name, site.shape, counts=count))
    return convert(teacher, Plan(layers=layers), factors)


def accuracy_of(model, data):
    model.eval()
    with torch.no_grad():
        return sum(int((model(x).argmax(1) == y).sum()) for x, y in data) / sum(len(x) for x, _ in data)


def hooks_of(model):
    """How many hooks of any kind the modules of a network have together."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def settings_of(model):
    """All that a run may change for its own sake and has to put back: hooks, modes, flags, forms, gradients."""
    return {
        "hooks": hooks_of(model),
        "modes": [module.training for module in model.modules()],
        "flags": [parameter.requires_grad for parameter in model.parameters()],
        "forms": [module.form for module in model.modules() if isinstance(module, DKConv2d)],
        "contiguous": [parameter.is_contiguous() for parameter in model.parameters()],
        "gradients": [parameter.grad is not None for parameter in model.parameters()],
    }


def same(first, second):
    """Whether two networks are equal bit for bit, buffers too."""
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
