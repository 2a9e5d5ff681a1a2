"""Networks and graphs put together at random: nothing crashes, and what is said of the student is true of what is
written. A seed that fails says which network; `SEEDS` can be made longer."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from onnx import helper
from torch import nn

from dk2pnet import compress, load_student
from dk2pnet.answers import Predictions, predict
from dk2pnet.data.arrays import Feed, read_arrays
from dk2pnet.data.samples import Batching, array_samples
from dk2pnet.deploy.runtimes.onnxruntime import run_onnx, session
from dk2pnet.errors import TooSmall
from dk2pnet.measure import macs, parameters
from dk2pnet.networks.onnx.network import OnnxNetwork
from dk2pnet.run.run import Run
from dk2pnet.tasks import figures
from graphs import model, save, tensor, value, weights

pytestmark = pytest.mark.usefixtures("no_timing")
SEEDS = range(12)


# -- modules -----------------------------------------------------------------------------------------------------------


class Random(nn.Module):
    """Blocks of convolutions of any kernel, stride, padding, dilation and groups, with or without bias, batch norm and
    activation, behind each other, added to or put beside what came before, some of them called twice."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        random = np.random.default_rng(seed)
        torch.manual_seed(seed)
        self.steps: list[SimpleNamespace] = []
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        width, size = 3, 12
        for number in range(int(random.integers(3, 7))):
            groups = int(random.choice([1, 1, 1, 2])) if number and width % 2 == 0 else 1
            out = int(random.integers(2, 7)) * 2
            kernel = tuple(int(k) for k in random.choice([1, 2, 3, 3, 3, 5], 2))
            dilation = int(random.choice([1, 1, 2]))
            stride = int(random.choice([1, 1, 2])) if size >= 6 else 1
            how = str(random.choice(["plain", "plain", "add", "beside", "twice"]))
            if how in ("add", "twice"):
                out, stride, kernel = width, 1, (3, 3)
            padding = [dilation * (k - 1) // 2 for k in kernel]
            if how in ("add", "twice", "beside"):
                stride, dilation, padding = 1, 1, [k // 2 for k in kernel]
                kernel = tuple(k if k % 2 else k + 1 for k in kernel)
                padding = [k // 2 for k in kernel]
            bias = bool(random.integers(2))
            mode = str(random.choice(["zeros", "zeros", "reflect"])) if max(padding) < size else "zeros"
            self.convs.append(nn.Conv2d(width, out, kernel, stride, padding, dilation, groups, bias, padding_mode=mode))
            self.norms.append(nn.BatchNorm2d(out) if random.integers(2) else nn.Identity())
            act = str(random.choice(["relu", "silu", "none"]))
            self.steps.append(SimpleNamespace(how=how, act=act))
            width = width + out if how == "beside" else out
            size = -(-size // stride)
        self.head = nn.Linear(width, 5) if random.integers(2) else None
        for norm in self.norms:
            if isinstance(norm, nn.BatchNorm2d):
                nn.init.normal_(norm.running_mean, 0, 0.1)
                nn.init.uniform_(norm.running_var, 0.5, 1.5)

    def forward(self, x):
        for step, conv, norm in zip(self.steps, self.convs, self.norms, strict=True):
            y = norm(conv(x))
            y = F.relu(y) if step.act == "relu" else F.silu(y) if step.act == "silu" else y
            if step.how == "twice":
                y = norm(conv(y))
            x = x + y if step.how == "add" else torch.cat([x, y], 1) if step.how == "beside" else y
        return x if self.head is None else self.head(x.mean((2, 3)))


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_said_of_a_random_module_is_true(seed, tmp_path):
    teacher = Random(seed).eval()
    before = {name: each.clone() for name, each in teacher.state_dict().items()}
    images = torch.randn(40, 3, 12, 12, generator=torch.Generator().manual_seed(seed))
    budget = "params=0.7" if seed % 2 else "macs=0.7"
    try:
        found = compress(
            teacher,
            list(images.split(10)),
            budget,
            criterion="response",
            tune=0,
            rebuild=seed % 3 == 0,
            out=tmp_path / "o",
        )
    except TooSmall:  # one kernel in each layer is more already, as where 1 x 1 convolutions cost the most
        return
    student, said = found.model, found.metrics["student"]
    assert all(torch.equal(each, before[name]) for name, each in teacher.state_dict().items())
    # The plan, the student and the files have the same costs, within the budget.
    assert (said["macs"], said["parameters"]) == (macs(student, images[:1]), parameters(student))
    assert said["macs"] == found.plan.macs
    kept = said["macs"] / macs(teacher, images[:1]) if "macs" in budget else said["parameters"] / parameters(teacher)
    assert kept <= 0.7
    loaded, _ = load_student(tmp_path / "o", factory=lambda: Random(seed + 1 - 1))
    with torch.no_grad():
        expected = student(images)
        assert torch.allclose(loaded(images), expected, atol=1e-5)
        written = run_onnx(session(tmp_path / "o/model.onnx"), images)[0]
    scale = float(expected.abs().max())
    assert np.abs(written - expected.numpy()).max() <= 1e-3 * scale
    # The error is that of the images held out, every fifth.
    held = [(images[::5], None)]
    task = found.metrics["run"]["task"]
    answers = [predict(each, held, task=task) for each in (teacher, student)]
    assert figures(*answers)["relative_error"] == pytest.approx(said["relative_error"], rel=1e-3, abs=1e-3)


# -- graphs ------------------------------------------------------------------------------------------------------------


def random_graph(seed: int):
    """A graph of the same kinds of blocks, with one or two outputs."""
    random = np.random.default_rng(seed)
    nodes, held, maps = [], [], [("x", 3)]
    for number in range(int(random.integers(2, 6))):
        name, width = maps[-1]
        groups = 2 if number and width % 2 == 0 and random.random() < 0.25 else 1
        out = 2 * int(random.integers(2, 7))
        kernel = [int(k) for k in random.choice([1, 2, 3, 3, 3], 2)]
        how = str(random.choice(["plain", "plain", "add", "beside", "pool"]))
        out = width if how == "add" else out
        if groups == 2 and out % 2:
            groups = 1
        held.append(tensor(f"w{number}", weights(out, width // groups, *kernel, seed=seed * 100 + number) / 3))
        attributes = {"auto_pad": str(random.choice(["SAME_UPPER", "SAME_LOWER"]))}
        if how in ("plain", "pool") and random.random() < 0.5:
            attributes = {"pads": [1, 0, 1, 1], "strides": [1, int(random.choice([1, 2]))]}
        inputs = [name, f"w{number}"]
        if random.integers(2):
            held.append(tensor(f"b{number}", weights(out, seed=seed)))
            inputs.append(f"b{number}")
        nodes.append(helper.make_node("Conv", inputs, [f"c{number}"], name=f"conv{number}", group=groups, **attributes))
        current = f"c{number}"
        if random.integers(2):
            names = [f"{part}{number}" for part in ("s", "t", "m", "v")]
            held += [tensor(each, np.abs(weights(out, seed=seed + n)) + 0.5) for n, each in enumerate(names)]
            nodes.append(helper.make_node("BatchNormalization", [current, *names], [f"n{number}"]))
            current = f"n{number}"
        act = str(random.choice(["Relu", "Sigmoid", "Identity"]))
        nodes.append(helper.make_node(act, [current], [f"a{number}"]))
        current, width_now = f"a{number}", out
        if how == "add":
            nodes.append(helper.make_node("Add", [name, current], [f"j{number}"]))
            current = f"j{number}"
        elif how == "beside":
            nodes.append(helper.make_node("Concat", [name, current], [f"j{number}"], axis=1))
            current, width_now = f"j{number}", out + width
        elif how == "pool":
            pool = {"kernel_shape": [2, 2], "auto_pad": "SAME_UPPER"}
            nodes.append(helper.make_node("MaxPool", [current], [f"j{number}"], **pool))
            current = f"j{number}"
        maps.append((current, width_now))
    outputs = [maps[-1][0]] + ([maps[1][0]] if len(maps) > 2 and random.random() < 0.3 else [])
    gives = [value(name, "n", dict(maps)[name], "h2", f"w{number}x") for number, name in enumerate(outputs)]
    return model(nodes, [value("x", "n", 3, 11, 10)], gives, held)


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_said_of_a_random_graph_is_true(seed, tmp_path):
    made = random_graph(seed)
    path = save(made, tmp_path)
    x = weights(30, 3, 11, 10, seed=seed)
    np.savez(tmp_path / "in.npz", x=x)
    budget = "params=0.7" if seed % 2 else "macs=0.7"
    how = {"tune": 0, "rebuild": seed % 3 == 0, "threads": 1, "first": True}
    try:
        found = compress(str(path), str(tmp_path / "in.npz"), budget, out=tmp_path / "o", **how)
    except TooSmall:  # one kernel in each layer is more already, as where 1 x 1 convolutions cost the most
        return
    said, of_teacher = found.metrics["student"], found.metrics["teacher"]
    network = OnnxNetwork.read(path)
    network.prepare(Feed({"x": x[:1]}), None, Run())
    assert (network.macs, network.parameters) == (found.plan.macs_dense, found.plan.parameters_dense)
    assert of_teacher["onnx_macs"] == network.macs
    assert said["macs"] == found.plan.macs
    assert (said["macs"] / network.macs if "macs" in budget else said["parameters"] / network.parameters) <= 0.7
    # Counted anew, the file holds what the plan says, and the zeros that fill groups up, which a note tells of.
    forms = {layer.form for layer in found.plan.layers if layer.counts}
    if "folded" not in forms:
        assert said["onnx_macs"] >= said["macs"]
        told = any("filled up with zeros" in note for note in found.metrics["notes"])
        assert told == (said["onnx_macs"] > 1.02 * said["macs"])
    samples = array_samples(read_arrays(tmp_path / "in.npz", network.graph.takes), 30, Batching(8))
    answers = []
    for each in (path, tmp_path / "o/model.onnx"):
        running, names = session(each, 1), [value.name for value in made.graph.output]
        seen = Predictions(names=names, task=found.metrics["run"]["task"])
        for feed, _ in samples.held_out:
            seen.add(run_onnx(running, feed), len(feed), inputs=list(feed.arrays.values()))
        answers.append(seen)
    assert figures(*answers)["relative_error"] == pytest.approx(said["relative_error"], rel=1e-3, abs=1e-2)
