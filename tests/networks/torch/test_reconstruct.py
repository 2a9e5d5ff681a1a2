"""The layer-by-layer reconstruction: both of its ways, what it promises, and what it leaves alone."""

import copy

import pytest
import torch
from torch import nn

from dk2pnet.decompose.solve import Problem, solve_many
from dk2pnet.layer import DKConv2d
from dk2pnet.modules import copy_model
from dk2pnet.networks.torch import reconstruct as module_of_it
from dk2pnet.networks.torch.reconstruct import reconstruct
from dk2pnet.networks.torch.sites import find_convolutions


@pytest.fixture(autouse=True)
def _ample(request, monkeypatch):
    """So few images of noise would choose to solve nothing."""
    if "chooses" not in request.keywords:
        monkeypatch.setattr(module_of_it, "_AMPLE", 0)


RIDGES = module_of_it._RIDGES
LITTLE = 1000  # bytes: as few images and positions as there may be


def network(seed=0, depth=4, width=8, groups=1, stride=1, bias=True, activation=nn.ReLU):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, width, 3, padding=1), activation()]
    for number in range(depth - 1):
        step = stride if number == 0 else 1
        layers += [nn.Conv2d(width, width, 3, step, 1, groups=groups, bias=bias), activation()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(4))
    model(torch.zeros(1, 3, 8, 8))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.mul_(1.7)  # so that signals neither fade nor grow
    return model.eval()


def images(count=48, batch=12, seed=1):
    x = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return [(part, None) for part in x.split(batch)]


def prepare(teacher, kernels):
    """The dense student with its first, data-free, folded weights, and what `reconstruct` asks for."""
    sites = find_convolutions(teacher, torch.zeros(1, 3, 8, 8))
    student = copy_model(teacher)
    return student, sites, given(student, [site.name for site in sites if not site.reason], kernels)


def given(student, names, kernels):
    """Data-free factors, which the student gets as folded weights."""
    found = {}
    for name in names:
        conv = student.get_submodule(name)
        count = torch.full((conv.in_channels,), kernels)
        found[name] = solve_many([Problem(conv.weight, count, None, None, conv.groups)])[0]
        with torch.no_grad():
            conv.weight.copy_(DKConv2d.from_factors(conv, found[name]).fold())
    return found


def run(teacher, kernels, batches=None, **options):
    batches = images() if batches is None else batches
    student, sites, factors = prepare(teacher, kernels)
    before = output_error(teacher, student, batches)
    count = sum(len(x) for x, _ in batches)
    found = reconstruct(teacher, student, sites, factors, batches, images=count, **options)
    return found, student, before


def output_error(teacher, student, batches):
    with torch.no_grad():
        return sum(float((teacher(x) - student(x)).square().sum()) for x, _ in batches)


CASES = [{}, {"groups": 2}, {"stride": 2}, {"groups": 2, "stride": 2, "bias": False}]


@pytest.fixture
def double():
    """In float32 the sums of the two ways differ by rounding, which a ReLU's free responses can make large."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Counted(list):
    """Batches that count how often they are gone through."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        return super().__iter__()


@pytest.mark.parametrize("shape", CASES)
def test_one_pass_and_a_pass_per_layer_give_the_same(shape, double, monkeypatch):
    """A network that cannot be traced has a pass for every layer. Behind a leaky ReLU no surroundings matter."""
    results = []
    for traceable in (True, False):
        if not traceable:
            monkeypatch.setattr(module_of_it, "traced", lambda *_: None)
        batches = Counted(images())
        teacher = network(activation=nn.LeakyReLU, **shape)
        student, sites, factors = prepare(teacher, 2)
        found = reconstruct(teacher, student, sites, factors, batches, images=48, positions=4)
        results.append((found, student, batches.passes))
    (one, first, few), (many, second, more) = results
    assert few == 2  # one of them for the first batch alone
    assert more == 1 + 3
    assert list(one) == list(many) == ["2", "4", "6"]
    for name in one:
        assert torch.equal(one[name].source, many[name].source)
        torch.testing.assert_close(one[name].kernels, many[name].kernels, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(one[name].combination, many[name].combination, rtol=1e-6, atol=1e-8)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


class Shrinking(nn.Module):
    """Every convolution's maps take a quarter of the memory of those before."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.convs = nn.ModuleList(nn.Conv2d(a, 8, 3, 2, 1) for a in (3, 8, 8))

    def forward(self, x):
        for conv in self.convs:
            x = torch.relu(conv(x))
        return x.flatten(1)


def test_as_many_images_are_on_the_way_as_find_room_and_no_image_twice(monkeypatch):
    """64 images of 16 x 16: in front of the last layer a map has 8 x 4 x 4 numbers, before the second one four times as
    many; both networks have one."""
    there = {}
    real = module_of_it.Walks.samples

    def seen(self, name, *args):
        there[name] = sorted(float(v) for p in self.under_way for v in p.student.waiting.flatten(1).double().sum(1))
        return real(self, name, *args)

    monkeypatch.setattr(module_of_it.Walks, "samples", seen)
    teacher = Shrinking().eval()
    batches = [(x, None) for x in torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(1)).split(10)]
    sites = find_convolutions(teacher, batches[0][0][:1])
    student = copy_model(teacher)
    factors = given(student, ["convs.1", "convs.2"], 9)  # all kernels: the maps are those of the teacher
    reconstruct(teacher, student, sites, factors, batches, images=64, memory=2 * 20 * 2 * 4 * 8 * 64)
    assert len(there["convs.1"]) == 16  # 20 find room, and 16 are evenly spread
    x = torch.cat([x for x, _ in batches])
    with torch.no_grad():
        wanted = sorted(teacher.convs[1](teacher.convs[0](x).relu()).relu().flatten(1).double().sum(1).tolist())
    assert there["convs.2"] == pytest.approx(wanted, rel=1e-3)  # all 64


def test_no_more_images_set_out_than_find_room_behind_the_first_convolution(monkeypatch):
    """In front of it 53 images of 3 x 16 x 16 would find room; of the maps of 8 x 16 x 16 behind it 20 do."""
    there = {}
    real = module_of_it.Walks.samples

    def seen(self, name, *args):
        there[name] = sum(len(p.student.waiting) for p in self.under_way)
        return real(self, name, *args)

    monkeypatch.setattr(module_of_it.Walks, "samples", seen)
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 4, 1), nn.Flatten()).eval()
    batches = [(x, None) for x in torch.randn(64, 3, 16, 16).split(10)]
    sites = find_convolutions(teacher, batches[0][0][:1], first=True)
    student = copy_model(teacher)
    reconstruct(
        teacher, student, sites, given(student, ["0", "2"], 9), batches, images=64, memory=2 * 20 * 2 * 4 * 2048
    )
    assert there == {"0": 16, "2": 16}


@pytest.mark.parametrize("batch", [5, 16, 48])
def test_the_batches_do_not_matter(batch):
    wanted, _, _ = run(network(), 2)
    got, _, _ = run(network(), 2, images(batch=batch))
    for name in wanted:
        torch.testing.assert_close(got[name].combination, wanted[name].combination, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", CASES)
@pytest.mark.parametrize("memory", [2 * 2**30, LITTLE])
def test_a_student_of_full_rank_is_the_teacher(shape, memory):
    teacher = network(**shape)
    _, student, _ = run(teacher, 9, memory=memory)
    fresh = images(seed=5)
    energy = sum(float(teacher(x).detach().square().sum()) for x, _ in fresh)
    assert output_error(teacher, student, fresh) < 1e-6 * energy


@pytest.mark.parametrize("shape", CASES)
@pytest.mark.parametrize("memory", [2 * 2**30, 2**19])
def test_the_outputs_come_closer_to_the_teachers(shape, memory):
    teacher = network(depth=5, **shape)
    _, student, before = run(teacher, 2 if "groups" in shape else 1, images(192, 48), memory=memory)
    assert output_error(teacher, student, images(192, 48)) < 0.85 * before


@pytest.mark.parametrize("shape", CASES)
def test_each_layer_is_solved_for_the_inputs_of_the_student(shape):
    """Against the definition: least squares from the student's own patches to the teacher's outputs, all positions;
    with a constant where there is a bias. Behind a leaky ReLU all responses matter."""
    teacher, batches = network(depth=3, activation=nn.LeakyReLU, **shape), images()
    found, student, _ = run(teacher, 2, batches, positions=64, damping=1e-6)
    x = torch.cat([x for x, _ in batches])
    with torch.no_grad():
        for name in ("2", "4"):
            conv, number = teacher.get_submodule(name), int(name)
            wanted, inputs = conv(teacher[:number](x)), student[:number](x)
            if conv.bias is not None:
                wanted = wanted - conv.bias.view(-1, 1, 1)
            patches = nn.functional.unfold(inputs, 3, 1, 1, conv.stride).transpose(1, 2).flatten(0, 1).double()
            y = wanted.flatten(2).transpose(1, 2).flatten(0, 1).double()
            source, kernels = found[name].source, found[name].kernels.flatten(1)
            maps = torch.stack([patches[:, 9 * c : 9 * c + 9] @ k for c, k in zip(source, kernels, strict=True)], 1)
            best = []
            for group in range(conv.groups):
                width = conv.out_channels // conv.groups
                mine = source // (conv.in_channels // conv.groups) == group
                columns = y[:, group * width : (group + 1) * width]
                given = maps[:, mine]
                if conv.bias is not None:
                    given = torch.cat([given, torch.ones(len(given), 1, dtype=given.dtype)], 1)
                best.append(torch.linalg.lstsq(given, columns).solution.T[:, : int(mine.sum())])
            torch.testing.assert_close(found[name].combination.flatten(1), torch.cat(best), rtol=1e-3, atol=1e-3)


def test_the_factors_are_those_in_the_student():
    teacher = network()
    found, student, _ = run(teacher, 2)
    modules = dict(teacher.named_modules())
    for name, factors in found.items():
        folded = DKConv2d.from_factors(modules[name], factors).fold()
        torch.testing.assert_close(student.get_submodule(name).weight, folded, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("memory", [2 * 2**30, LITTLE])
def test_everything_else_is_left_as_it_was(memory):
    teacher = network().train()
    teacher[2].eval()
    teacher[4].weight.requires_grad_(False)
    before = copy.deepcopy(teacher.state_dict())
    modes = [module.training for module in teacher.modules()]
    flags = [parameter.requires_grad for parameter in teacher.parameters()]
    student, sites, factors = prepare(teacher, 2)
    calls = []
    options = {"images": 48, "memory": memory, "progress": calls.append}
    reconstruct(teacher, student, sites, factors, images(), **options)
    assert calls == [1, 2, 3]
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    for model in (teacher, student):
        assert [module.training for module in model.modules()] == modes
        assert [parameter.requires_grad for parameter in model.parameters()] == flags
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    moved = {f"{name}.{what}" for name in factors for what in ("weight", "bias")}
    for name, value in student.state_dict().items():
        assert torch.equal(value, before[name]) != (name in moved)


@pytest.mark.parametrize("memory", [2 * 2**30, LITTLE])
def test_an_error_on_the_way_leaves_no_hooks(memory):
    teacher = network()
    student, sites, factors = prepare(teacher, 2)

    def fail(done):
        raise KeyboardInterrupt

    options = {"images": 48, "memory": memory, "progress": fail}
    with pytest.raises(KeyboardInterrupt):
        reconstruct(teacher, student, sites, factors, images(), **options)
    for model in (teacher, student):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_convolution_that_runs_twice_is_left_to_others():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.stem, self.conv, self.last = (nn.Conv2d(*ab, 3, padding=1) for ab in ((3, 6), (6, 6), (6, 6)))

        def forward(self, x):
            return self.last(self.conv(self.conv(self.stem(x)).relu()).relu()).mean((2, 3))

    found, _, _ = run(Twice().eval(), 2)
    assert list(found) == ["last"]


class Residual(nn.Module):
    """A stem and blocks with batch norms; the shortcut of a block is computed last."""

    def __init__(self, blocks=3, width=8, traceable=True):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.traceable = nn.Conv2d(3, width, 3, 1, 1), traceable
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, 1, 1, bias=False) for _ in range(2 * blocks))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(2 * blocks))
        self.sides = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(blocks))
        self.head = nn.Linear(width, 4)
        self.train()
        for _ in range(30):  # so that the norms keep statistics of their own
            self(torch.randn(16, 3, 8, 8))
        with torch.no_grad():
            for norm in self.norms:
                norm.weight.uniform_(0.3, 1.2)
                norm.bias.uniform_(-0.6, 0.4)
        self.eval()

    def forward(self, x):
        x = self.stem(x).relu()
        for number, side in enumerate(self.sides):
            first, second = 2 * number, 2 * number + 1
            y = self.norms[first](self.convs[first](x)).relu()
            y = self.norms[second](self.convs[second](y))
            x = (y + side(x)).relu()
        if not self.traceable and x.sum() < 0:
            raise AssertionError
        return self.head(x.mean((2, 3)))


def smooth(count=96, batch=24, seed=1):
    """Images whose neighbours are alike."""
    x = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    x = nn.functional.avg_pool2d(x, 3, 1, 1) * 3
    return [(part, None) for part in x.split(batch)]


@pytest.mark.parametrize("memory", [2 * 2**30, LITTLE])
def test_a_residual_student_of_full_rank_is_the_teacher(memory):
    teacher = Residual()
    _, student, _ = run(teacher, 9, memory=memory)
    assert output_error(teacher, student, images(seed=5)) < 1e-6 * energy_of(teacher)


def energy_of(teacher):
    return sum(float(teacher(x).detach().square().sum()) for x, _ in images(seed=5))


def test_knowing_the_surroundings_brings_unseen_outputs_closer():
    """The same network, once so that it cannot be traced."""
    errors = {}
    for traceable in (True, False):
        teacher = Residual(traceable=traceable)
        _, student, before = run(teacher, 2, smooth(384), positions=64)
        errors[traceable] = output_error(teacher, student, smooth(seed=7))
        assert output_error(teacher, student, smooth(384)) < before
    assert errors[True] < 0.9 * errors[False]


@pytest.mark.parametrize("memory", [2 * 2**30, LITTLE])
def test_a_sum_makes_up_for_its_other_side(memory):
    """The shortcut of the student is spoilt by a constant map; the convolution before the sum takes it away."""
    teacher = Residual(blocks=1)
    student, sites, factors = prepare(teacher, 9)
    with torch.no_grad():
        student.sides[0].bias += 0.5
    spoilt = output_error(teacher, student, images())
    reconstruct(teacher, student, sites, {"convs.1": factors["convs.1"]}, images(), images=48, memory=memory)
    assert output_error(teacher, student, images()) < 1e-6 * spoilt


def test_where_the_relu_is_silent_any_silent_response_will_do():
    """The same layer in front of a ReLU and of what is not known to be one, judged by what comes out."""

    class Unknown(nn.Module):
        def forward(self, x):
            return x.clamp(min=0)

    errors = []
    for last in (nn.ReLU(), Unknown()):
        torch.manual_seed(0)
        teacher = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), last, nn.Flatten(), nn.Linear(512, 4)).eval()
        with torch.no_grad():
            teacher[0].bias -= 0.5  # silent more often than not
        student, sites = copy_model(teacher), find_convolutions(teacher, torch.zeros(1, 3, 8, 8), first=True)
        reconstruct(teacher, student, sites, given(student, ["0"], 1), images(), images=48, positions=64)
        with torch.no_grad():
            errors.append(sum(float((teacher[:2](x) - student[:2](x)).square().sum()) for x, _ in images()))
    assert errors[0] < 0.95 * errors[1]


@pytest.mark.parametrize("memory", [2 * 2**30, LITTLE])
def test_a_parameter_in_the_sum_is_not_overlooked(memory):
    """`relu(conv(x) + p)`: with p of (C, 1, 1) as with p of (1, C, 1, 1), where it is silent is not known."""

    class Added(nn.Module):
        def __init__(self, *shape):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.added = nn.Conv2d(3, 8, 3, 1, 1), nn.Parameter(torch.full(shape, 2.0))

        def forward(self, x):
            return torch.relu(self.conv(x) + self.added).flatten(1)

    found = []
    for shape in ((8, 1, 1), (1, 8, 1, 1)):
        teacher = Added(*shape).eval()
        student, sites = copy_model(teacher), find_convolutions(teacher, torch.zeros(1, 3, 8, 8), first=True)
        factors = given(student, ["conv"], 1)
        reconstruct(teacher, student, sites, factors, images(), images=48, positions=64, memory=memory)
        found.append(student.conv.weight)
    torch.testing.assert_close(found[0], found[1])


class Halves(nn.Module):
    """Folds the halves of an image into the batch: in one batch of all images they lie in another order."""

    def __init__(self):
        super().__init__()
        self.body = network(depth=3)

    def forward(self, x):
        return self.body(torch.cat([x[:, :3], x[:, 3:]]))


def test_images_folded_into_the_batch_are_paired_with_themselves():
    teacher = Halves().eval()
    x = torch.randn(48, 6, 8, 8, generator=torch.Generator().manual_seed(1))
    weights = []
    for batch in (48, 12):
        batches = [(part, None) for part in x.split(batch)]
        sites = find_convolutions(teacher, x[:1])
        student = copy_model(teacher)
        factors = given(student, [site.name for site in sites if not site.reason], 2)
        reconstruct(teacher, student, sites, factors, batches, images=48, positions=1000)
        weights.append(student.body[2].weight)
    assert not torch.equal(weights[0], teacher.body[2].weight)
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-3, atol=1e-4)


def test_batches_of_several_image_sizes():
    torch.manual_seed(0)
    teacher = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    ).eval()
    batches = [(torch.randn(12, 3, side, side), None) for side in (6, 8, 12)]
    found, student, before = run(teacher, 2, batches, positions=40)
    assert list(found) == ["2"]
    assert output_error(teacher, student, batches) < before


def test_inputs_far_from_zero_are_solved_as_well_as_those_about_it():
    """As 16-bit images that nothing normalised. In float32 their variance is lost in the square of their mean."""
    errors = []
    for offset in (0.0, 1e4):
        torch.manual_seed(0)
        first = nn.Conv2d(3, 16, 3)
        teacher = nn.Sequential(first, nn.ReLU(), nn.Conv2d(16, 4, 3)).eval()
        with torch.no_grad():
            first.bias -= offset * first.weight.sum((1, 2, 3))
        sites = find_convolutions(teacher, torch.zeros(1, 3, 8, 8), first=True)
        student = copy_model(teacher)
        batches = [(x + offset, None) for x, _ in images()]
        reconstruct(teacher, student, sites, given(student, ["0"], 2), batches, images=48, positions=1000)
        errors.append(output_error(teacher, student, batches))
    assert errors[0] > 0
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


# -- few samples -------------------------------------------------------------------------------------------------------


def far(teacher, student, batches):
    """The error over the teacher's energy."""
    with torch.no_grad():
        energy = sum(float(teacher(x).square().sum()) for x, _ in batches)
    return output_error(teacher, student, batches) / energy


@pytest.mark.chooses
@pytest.mark.parametrize("memory", [2**31, LITTLE])
def test_with_fewer_samples_than_unknowns_new_images_are_answered_no_worse(memory):
    """72 unknowns an output and 12 images of noise, of which little memory takes four positions each."""
    teacher, few, new = network(), images(12), images(96, seed=5)
    plain, _, _ = prepare(teacher, 2)
    _, student, _ = run(teacher, 2, few, memory=memory)
    assert far(teacher, student, new) < 1.05 * far(teacher, plain, new)


@pytest.mark.chooses
def test_solved_freely_these_fit_noise(monkeypatch):
    monkeypatch.setattr(module_of_it, "_AMPLE", 0)
    teacher, few, new = network(), images(12), images(96, seed=5)
    plain, _, _ = prepare(teacher, 2)
    _, student, _ = run(teacher, 2, few, memory=LITTLE)
    assert far(teacher, student, new) > 1.05 * far(teacher, plain, new)


@pytest.mark.chooses
def test_with_samples_enough_kernels_are_solved_too(monkeypatch):
    """96 images have 64 positions each, and 36 unknowns ask for 720 samples."""
    monkeypatch.setattr(module_of_it._Combination, "solve", lambda *_: pytest.fail("asked"))
    found, _, _ = run(network(width=4), 2, images(96))
    assert list(found) == ["2", "4", "6"]


@pytest.mark.chooses
@pytest.mark.parametrize("groups", [1, 2])
def test_with_few_samples_the_kernels_stay_and_the_combination_is_solved(groups):
    """Against the definition: a ridge regression about the present combination, from what the student's kernels make of
    its own inputs to the teacher's outputs. Behind a leaky ReLU all responses matter."""
    teacher, batches = network(depth=2, width=8, groups=groups, activation=nn.LeakyReLU), images(40, 8)
    student, sites, factors = prepare(teacher, 2)
    before = factors["2"]
    # 8 * 8 positions of so few images: fewer than 20 for every unknown of 72, or 36 in a group
    few = batches[: 2 if groups == 1 else 1]
    found = reconstruct(teacher, student, sites, factors, few, images=sum(len(x) for x, _ in few), positions=64)["2"]
    assert torch.equal(found.kernels, before.kernels)
    assert torch.equal(found.source, before.source)
    x = torch.cat([x for x, _ in few])
    with torch.no_grad():
        inputs = teacher[:2](x)
        y = nn.functional.conv2d(inputs, teacher[2].weight, None, 1, 1, 1, groups)
        layer = DKConv2d.from_factors(teacher[2], before, "concat")
        features = nn.functional.conv2d(inputs[:, layer.source], layer.kernels, None, 1, 1, 1, len(layer.kernels))
        features = features[:, layer._group_order]
    wanted = []
    rows = {name: t.transpose(0, 1).flatten(1).T.double() for name, t in (("y", y), ("features", features))}
    for g, (ys, fs) in enumerate(zip(rows["y"].chunk(groups, 1), rows["features"].chunk(groups, 1), strict=True)):
        u, v = fs - fs.mean(0), ys - ys.mean(0)
        moments = u.T @ u / len(u)
        pull = torch.diag(moments.diagonal())
        now = before.combination.flatten(1).chunk(groups)[g]
        of_ridge = [torch.linalg.solve(moments + r * pull, u.T @ v / len(u) + r * pull @ now.T).T for r in RIDGES]
        wanted.append(torch.stack(of_ridge))
    wanted = torch.cat(wanted, 1)
    distances = (found.combination.flatten(1) - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
    assert float(distances.min()) < 1e-4


@pytest.mark.chooses
def test_where_the_first_layers_gain_nothing_it_stops(monkeypatch):
    monkeypatch.setattr(module_of_it, "_FIRST", 2)
    asked = []
    monkeypatch.setattr(module_of_it._Combination, "_ridge", lambda self, *_: asked.append(1))
    found, _, _ = run(network(), 2, images(12), positions=4)
    assert found == {}
    assert len(asked) == 2
