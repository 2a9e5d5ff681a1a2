"""What is found behind a convolution, and having the other side of a sum before its turn."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dk2pnet.networks.torch.surroundings import Walk, surroundings_of, traced

EXAMPLE = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """As torchvision's: the shortcut is computed after the second convolution has run."""

    def __init__(self, how="iadd", shortcut=1, inplace=True):
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 1, 1)
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace)
        self.down = nn.Sequential(nn.Conv2d(4, 4, shortcut, padding=shortcut // 2), nn.BatchNorm2d(4))

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        side = self.down(x)
        if self.how == "iadd":
            y += side
        elif self.how == "torch.add":
            y = torch.add(side, y)
        elif self.how == "method":
            y = side.add_(y)
        elif self.how == "scaled":
            y = torch.add(y, side, alpha=2)
        elif self.how == "concatenated":
            y = torch.cat([y, side], 1)
        return self.relu(y).mean((2, 3))


def found(model, solved):
    model = model.eval()
    graph = traced(model, EXAMPLE)
    assert graph is not None
    return surroundings_of(model, graph, solved), graph


@pytest.mark.parametrize("how", ["iadd", "torch.add", "method"])
def test_the_norm_the_sum_and_the_rectifier_of_a_residual_block(how):
    near, _ = found(Block(how), ["conv1", "conv2"])
    assert (near["conv1"].norm, near["conv1"].other, near["conv1"].rectified) == ("bn1", None, True)
    assert (near["conv2"].norm, near["conv2"].rectified) == ("bn2", True)
    assert str(near["conv2"].other) == "down_1"


@pytest.mark.parametrize("how", ["scaled", "concatenated"])
def test_what_is_no_plain_sum_is_none(how):
    near, _ = found(Block(how), ["conv2"])
    assert (near["conv2"].norm, near["conv2"].other, near["conv2"].rectified) == ("bn2", None, False)


def test_a_side_that_is_to_be_solved_itself_cannot_be_had_first():
    near, _ = found(Block(shortcut=3), ["conv1", "conv2", "down.0"])
    assert near["conv2"].other is None
    assert not near["conv2"].rectified  # its input is a sum of which only one side is known
    assert str(near["down.0"].other) == "bn2"  # which has run by then
    assert near["down.0"].rectified


class Odd(nn.Module):
    """Convolutions whose responses go to several places, through one norm twice, or through nothing."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d, self.e = (nn.Conv2d(4, 4, 3, 1, 1) for _ in range(5))
        self.shared = nn.BatchNorm2d(4)

    def forward(self, x):
        a = self.a(x)
        x = a.relu() + a
        x = self.shared(self.b(x)) + self.shared(self.c(x))
        side = self.d(x)
        return F.relu(self.e(x) + x.relu_() + side).mean((2, 3))


def test_what_is_not_certain_is_left_out():
    near, _ = found(Odd(), ["a", "b", "c", "d", "e", "missing"])
    assert set(near) == {"a", "b", "c", "d", "e"}
    assert all(near[name].norm is None for name in near)
    assert not near["a"].rectified
    assert near["e"].other is None  # what works in place would come before its turn
    assert not near["e"].rectified


def test_the_other_side_ahead_of_its_turn_changes_nothing():
    model = Block()
    near, graph = found(model, ["conv1", "conv2"])
    walk, seen = Walk(model, graph), []
    handle = model.conv2.register_forward_pre_hook(lambda *_: seen.append(walk.ahead(near["conv2"].other).clone()))
    got = walk.run(EXAMPLE)
    handle.remove()
    assert torch.equal(got, model(EXAMPLE))
    assert torch.equal(seen[0], model.down(EXAMPLE))


class ByValue(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Frozen(nn.Module):
    """A number that tracing would fix."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.calls


@pytest.mark.parametrize("model", [ByValue(), Frozen()])
def test_a_model_that_cannot_be_traced_has_no_graph(model):
    assert traced(model.eval(), EXAMPLE) is None


class OwnTensor(nn.Module):
    """Makes a tensor in its forward pass, which the tracer hangs on the module that it traces."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.conv(x * torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1))


def test_a_model_that_makes_tensors_of_its_own_has_no_graph_and_is_left_as_it_was():
    model = OwnTensor().eval()
    before = set(vars(model))
    assert traced(model, torch.randn(1, 4, 5, 5)) is None
    assert set(vars(model)) == before
