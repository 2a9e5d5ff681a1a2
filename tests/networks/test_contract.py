"""What `networks.network.Network` promises, held by every kind of network; a third kind, written here, proves that the
protocol is all that students/ asks for."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dk2pnet.answers import Predictions
from dk2pnet.data.arrays import Feed
from dk2pnet.data.samples import Batching, user_samples
from dk2pnet.decompose.moments import Moments
from dk2pnet.decompose.solve import solve
from dk2pnet.deploy.export import export_onnx
from dk2pnet.deploy.runtimes.onnxruntime import run_onnx, session
from dk2pnet.layer import DKConv2d
from dk2pnet.networks.network import Learner, Network, NotLearnable, Settings, Site, Solution
from dk2pnet.networks.onnx.learner import OnnxLearner
from dk2pnet.networks.onnx.network import OnnxNetwork
from dk2pnet.networks.patches import input_patches
from dk2pnet.networks.torch.network import TorchLearner, TorchNetwork
from dk2pnet.options import CompressOptions
from dk2pnet.plan import Budget, Plan
from dk2pnet.run.run import Run
from dk2pnet.students.closed_form import ClosedForm
from dk2pnet.students.decisions import Judge
from dk2pnet.students.probes import Prober
from dk2pnet.students.teacher import Teacher
from dk2pnet.students.tuning_steps import Tuning
from dk2pnet.tasks import MEASURES, divergence
from graphs import needs_onnx_tuning

RUN = Run()
BATCHES = [x.cumsum(3) / 4 for x in torch.randn(24, 3, 5, 5, generator=torch.Generator().manual_seed(1)).split(8)]


def chain():
    """Three convolutions, of which the first stays dense; no batch norm, and biases."""
    torch.manual_seed(0)
    first, second, third = (nn.Conv2d(*sizes, 3, padding=1) for sizes in ((3, 4), (4, 6), (6, 5)))
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


class Listed:
    """A third kind of network: weights in a list, run by hand; nothing but what the protocol asks for."""

    normalization = plan = spec = None
    batching = Batching()
    default_criterion, reconstructs_first, task = "response", False, None

    def __init__(self, convs, layers=None):
        self.convs, self.layers, self.example = convs, layers or {}, torch.zeros(1, 3, 5, 5)
        self.facts, self.caveats = {}, []

    def _run(self, x, see=lambda name, x: None):
        for number, conv in enumerate(self.convs):
            name = f"layer {number}"
            see(name, x)
            weight = self.layers[name].fold() if name in self.layers else conv.weight
            bias = self.layers[name].bias if name in self.layers else conv.bias
            x = F.conv2d(x, weight, bias, padding=1)
            x = x.relu() if number < len(self.convs) - 1 else x.mean((2, 3))
        return x.detach()

    @property
    def macs(self):
        dense = sum(25 * self._size(number) for number in range(len(self.convs)))
        return dense

    @property
    def parameters(self):
        return sum(self._size(number) + len(conv.bias) for number, conv in enumerate(self.convs))

    def _size(self, number):
        layer = self.layers.get(f"layer {number}")
        return self.convs[number].weight.numel() if layer is None else layer.kernels.numel() + layer.combination.numel()

    def prepare(self, example, input_size, run):
        self.example = example[:1]

    def one_at_a_time(self):
        return False

    def fit(self, memory):
        return False

    def arrays(self, path):
        raise NotImplementedError

    def sites(self, keep=(), first=False):
        found = []
        for number, conv in enumerate(self.convs):
            reason = "first convolution" if number == 0 and not first else ""
            found.append(Site(f"layer {number}", conv, reason, 25, 1, input_size=(5, 5), activation=25 * 10))
        return found

    def predict(self, batches, run, what="", total=0):
        found = Predictions(task=self.task)
        for x, _ in batches:
            found.add([self._run(x)], len(x))
        return found

    def moments(self, sites, samples, gradients, memory, run):
        sums = {}
        for name, site in sites.items():
            sums[name] = Moments.zeros(1, site.conv.weight[0].numel())
        for x, _ in samples.gather:
            self._run(x, lambda name, x: name in sums and sums[name].add_patches(input_patches(sites[name].conv, x)))
        yield sums

    def with_kernels(self, counts, factors=None):
        layers = {}
        for name, count in counts.items():
            conv = self.convs[int(name.split()[1])]
            found = DKConv2d.from_factors(conv, factors[name]) if factors else DKConv2d.from_dense(conv, count.tolist())
            layers[name] = found.requires_grad_(False)
        student = Listed(self.convs, layers)
        student.task = self.task
        return student

    def corrections(self, student, solution, samples, how, run):
        worse = Listed(self.convs, {name: copy.deepcopy(layer) for name, layer in student.layers.items()})
        for layer in worse.layers.values():
            layer.bias += 1.0
        kept = yield "nonsense", worse
        assert not kept

    def after_tuning(self, student, batches, run):
        yield from ()

    def learner(self, samples, sites, run):
        raise NotLearnable("it is a toy")

    def _module(self):
        convs = [self.layers.get(f"layer {number}", conv) for number, conv in enumerate(self.convs)]
        steps = [step for conv in convs for step in (conv, nn.ReLU())][:-1]
        return nn.Sequential(*steps, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()

    def onnx(self, forms):
        from dk2pnet.deploy.export import onnx_bytes

        return onnx_bytes(self._module(), self.example)

    def deployable(self, target, forms):
        return self.onnx(forms)

    def save(self, folder, plan, samples, run):
        (folder / "model.onnx").write_bytes(self.onnx({}))

    def save_unfinished(self, folder, plan):
        torch.save({name: layer.state_dict() for name, layer in self.layers.items()}, folder / "layers.pt")
        (folder / "plan.json").write_text(plan.to_json())

    def load_unfinished(self, folder):
        plan, states = Plan.load(folder / "plan.json"), torch.load(folder / "layers.pt", weights_only=True)
        counts = {entry.name: torch.tensor(entry.counts) for entry in plan.layers if entry.counts is not None}
        student = self.with_kernels(counts)
        for name, state in states.items():
            student.layers[name].load_state_dict(state)
        return student, plan

    def digests(self):
        return {}

    def result(self, plan):
        return self._module()


def of_torch(tmp_path):
    return TorchNetwork(chain())


def of_onnx(tmp_path):
    export_onnx(chain(), torch.zeros(1, 3, 5, 5), tmp_path / "chain.onnx")
    return OnnxNetwork.read(tmp_path / "chain.onnx")


def of_list(tmp_path):
    return Listed([layer for layer in chain() if isinstance(layer, nn.Conv2d)])


@pytest.fixture(params=[of_torch, of_onnx, of_list], ids=["torch", "onnx", "toy"])
def teacher(request, tmp_path):
    """What students begin with, of each kind; the option are those of compress."""
    network = request.param(tmp_path)
    samples = user_samples(BATCHES, None, 24, batching=network.batching)
    network.prepare(samples.first, None, RUN)
    network.task = "regress"
    held = network.predict(samples.held_out, RUN)
    sites = network.sites()
    return Teacher(network, samples, held, sites, "response", Tuning(), None, None, CompressOptions())


def answers(network, x):
    return network.predict([(x, None)], RUN).outputs[0]


def every(teacher, kernels):
    """So many kernels in every channel, by the weight alone."""
    counts = {name: torch.full((site.conv.in_channels,), kernels) for name, site in teacher.open_sites.items()}
    factors = {name: solve(teacher.open_sites[name].conv.weight.detach(), count) for name, count in counts.items()}
    return teacher.network.with_kernels(counts, factors), counts, factors


def test_sizes_are_those_worked_out_by_hand(teacher):
    weights, biases = 3 * 4 * 9 + 4 * 6 * 9 + 6 * 5 * 9, 4 + 6 + 5
    assert teacher.network.macs == 25 * weights
    assert teacher.network.parameters == weights + biases
    assert [bool(site.reason) for site in teacher.sites] == [True, False, False]
    assert [site.positions for site in teacher.sites] == [25, 25, 25]
    assert [site.input_size for site in teacher.open_sites.values()] == [(5, 5), (5, 5)]
    assert teacher.network.layers == {}


def test_what_its_answers_are_for_is_kept_by_students(teacher):
    assert teacher.held.task == "regress"
    student, _, _ = every(teacher, 1)
    assert student.predict(teacher.samples.held_out, RUN).task == "regress"


def test_it_answers_as_the_module_that_it_came_from(teacher):
    with torch.no_grad():
        torch.testing.assert_close(answers(teacher.network, BATCHES[0]), chain()(BATCHES[0]), rtol=1e-4, atol=1e-5)
    assert divergence(teacher.held, teacher.held) == 0


def test_all_kernels_are_exact_and_the_teacher_is_left_as_it_was(teacher):
    before = answers(teacher.network, BATCHES[0])
    student, counts, _ = every(teacher, 9)
    assert student.layers.keys() == counts.keys()
    torch.testing.assert_close(answers(student, BATCHES[0]), before, rtol=1e-3, atol=1e-4)
    assert torch.equal(answers(teacher.network, BATCHES[0]), before)


def test_a_student_is_a_network_of_the_same_kind_with_the_counts_of_its_kernels(teacher):
    student, counts, _ = every(teacher, 1)
    assert type(student) is type(teacher.network)
    change = sum(
        int(counts[name].sum()) * (9 + site.conv.out_channels) - site.size for name, site in teacher.open_sites.items()
    )
    assert student.parameters == teacher.network.parameters + change
    assert student.macs == teacher.network.macs + 25 * change


def test_moments_are_those_of_the_inputs_of_its_sites(teacher):
    (found,) = teacher.network.moments(teacher.open_sites, teacher.samples, False, 2**30, RUN)
    listed = of_list(None)
    (wanted,) = listed.moments({site.name: site for site in listed.sites()[1:]}, teacher.samples, False, 2**30, RUN)
    for mine, theirs in zip(found.values(), wanted.values(), strict=True):
        torch.testing.assert_close(mine.A(), theirs.A(), rtol=1e-4, atol=1e-6)  # so few positions are all taken


def test_moments_do_not_hang_on_how_many_layers_fit_into_memory(teacher):
    """A group takes a pass over the samples of its own."""
    once, several = (
        {
            name: sums
            for group in teacher.network.moments(teacher.open_sites, teacher.samples, False, memory, RUN)
            for name, sums in group.items()
        }
        for memory in (2**30, 1)
    )
    assert once.keys() == several.keys()
    for name, sums in once.items():
        assert torch.equal(sums.A(), several[name].A())
        assert float(sums.A().abs().max()) > 0


def test_no_correction_that_is_kept_takes_the_student_further_away(teacher):
    student, counts, factors = every(teacher, 1)
    judge, decisions = Judge(teacher.network, teacher.held, teacher.samples.held_out, RUN), []
    how = Settings(True, 2**30)
    steps = teacher.network.corrections(student, Solution(counts, factors), teacher.samples, how, RUN)
    better = judge.apply(steps, student, decisions)
    assert decisions
    assert judge.divergence(better) <= judge.divergence(student)
    for decision in decisions:
        assert decision["kept"] == (decision["after"] < decision["before"])
        assert decision["measure"] == MEASURES[teacher.task]


def test_its_onnx_file_gives_its_answers_in_every_form(teacher):
    student, _, _ = every(teacher, 2)
    for form in ("branches", "concat", "folded"):
        content = student.onnx(dict.fromkeys(student.layers, form))
        found = run_onnx(session(content, 1), BATCHES[0])[0]
        torch.testing.assert_close(torch.from_numpy(found), answers(student, BATCHES[0]), rtol=1e-3, atol=1e-4)


def test_what_an_unfinished_run_keeps_is_read_again_bit_for_bit(teacher, tmp_path):
    with ClosedForm(teacher, RUN) as closed:
        solved = closed.solve(Budget.parse("macs=0.6"))
    (tmp_path / "kept").mkdir()
    solved.student.save_unfinished(tmp_path / "kept", solved.plan)
    again, plan = teacher.network.load_unfinished(tmp_path / "kept")
    assert plan.layers == solved.plan.layers
    assert torch.equal(answers(again, BATCHES[0]), answers(solved.student, BATCHES[0]))


def test_students_are_made_of_it_for_any_budget(teacher):
    """The whole of students/ but tuning: moments, allocation, closed form, corrections, the one judge."""
    with Prober(teacher, None, RUN) as prober:
        found = [prober.make(Budget("macs", share)) for share in (0.5, 0.7, 0.9)]
    judge = Judge(teacher.network, teacher.held, teacher.samples.held_out, RUN)
    errors = [judge.divergence(probe.student) for probe in found]
    assert errors == sorted(errors, reverse=True)
    for probe in found:
        plan = probe.solved.plan
        assert plan.macs == probe.student.macs <= probe.budget.value * plan.macs_dense
        assert plan.parameters == probe.student.parameters


@needs_onnx_tuning
def test_its_learner_gives_its_answers_and_takes_back_what_was_learnt(teacher):
    if isinstance(teacher.network, Listed):
        with pytest.raises(NotLearnable, match="it is a toy"):
            teacher.network.learner(teacher.samples, teacher.open_sites, RUN)
        return
    learner = teacher.network.learner(teacher.samples, teacher.open_sites, RUN)
    last = list(teacher.open_sites)[-1]  # the one before it stays dense, which must not shift the layers' places
    counts = {last: torch.full((teacher.open_sites[last].conv.in_channels,), 2)}
    factors = {last: solve(teacher.open_sites[last].conv.weight.detach(), counts[last])}
    student = teacher.network.with_kernels(counts, factors)
    module, x = learner.student(student), BATCHES[0]
    with torch.no_grad():
        (found,) = module(x) if isinstance(module(x), tuple) else (module(x),)
        torch.testing.assert_close(found.flatten(1), answers(student, x), rtol=1e-3, atol=1e-4)
        assert module.get_submodule(learner.names[last]).counts == student.layers[last].counts
        module.get_submodule(learner.names[last]).combination.mul_(2)
    before = answers(student, x)
    learnt = learner.learned(student, module)
    assert not torch.allclose(answers(learnt, x), before, rtol=1e-2)
    assert torch.equal(answers(student, x), before)


def test_both_kinds_are_networks_to_a_type_checker():
    """mypy reads it; here it only has to run."""

    def network(each: Network) -> Network:
        return each

    def learner(each: Learner) -> Learner:
        return each

    for make, kinds in ((network, (TorchNetwork, OnnxNetwork)), (learner, (TorchLearner, OnnxLearner))):
        for kind in kinds:
            assert make(SimpleNamespace(kind=kind)).kind is kind


def test_an_image_is_fed_to_the_one_input_of_a_graph(tmp_path):
    network = of_onnx(tmp_path)
    feed = network.feed(BATCHES[0])
    assert list(feed.arrays) == ["input"]
    assert len(feed) == 8
    assert network.feed(feed) is feed
    assert isinstance(feed[:2], Feed)
    np.testing.assert_array_equal(feed[:2].arrays["input"], BATCHES[0][:2].numpy())
