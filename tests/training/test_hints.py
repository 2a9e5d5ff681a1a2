"""Which maps teach which, where they are taken, and that taking them leaves a network as it was."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet18

from dk2pnet.errors import InputError
from dk2pnet.nets import lenet, resnet20, resnet32, vgg8
from dk2pnet.training.hints import HintPair, Tap, capture, find_hints, find_pairs, parse_hints, tap_of
from toys import ONE, hooks_of, network, same, settings_of, student_of, toy

COLOUR = torch.zeros(1, 3, 32, 32)
LARGE = torch.zeros(1, 3, 64, 64)


def tower(*strides, padding=1, kernel=3, side=2):
    """One convolution per stride, on one channel."""
    layers = [nn.Conv2d(1 if number == 0 else side, side, kernel, s, padding) for number, s in enumerate(strides)]
    return nn.Sequential(*layers)


class Functional(nn.Module):
    """A convolution whose activation is a function."""

    def __init__(self, activation=F.relu):
        super().__init__()
        self.conv, self.activation = nn.Conv2d(1, 4, 3, padding=1), activation

    def forward(self, x):
        return self.activation(self.conv(x))


class Hourglass(nn.Module):
    """Down to half the resolution and back again."""

    def __init__(self):
        super().__init__()
        self.down, self.middle = nn.Conv2d(1, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 2, 1)
        self.up, self.end = nn.Upsample(scale_factor=2), nn.Conv2d(4, 2, 3, 1, 1)

    def forward(self, x):
        return self.end(self.up(self.middle(self.down(x))))


@pytest.fixture(scope="module")
def large():
    torch.manual_seed(0)
    return resnet18(weights=None).eval()


# -- stages and pairs --------------------------------------------------------------------------------------------------


def test_hints_are_the_ends_of_the_stages():
    assert find_hints(resnet20(), COLOUR) == ["layer1", "layer2", "layer3"]
    assert find_hints(lenet(1), ONE) == ["features.1", "features.4", "features.7"]
    assert find_hints(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), ONE) == []
    assert find_hints(Hourglass(), ONE) == ["middle", "end"]


class Bottleneck(nn.Module):
    """One activation module at two resolutions, as in ResNet-50: its last call is what can be taken."""

    def __init__(self, stride):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 3, stride, 1)
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(self.conv2(self.relu(self.conv1(x))))


@pytest.mark.parametrize("activations", [False, True])
def test_an_activation_called_at_two_resolutions_ends_the_stage_of_its_last_call(activations):
    model = nn.Sequential(nn.Conv2d(1, 2, 3, 1, 1), nn.ReLU(), Bottleneck(2), Bottleneck(2))
    pairs = find_pairs(model, model, ONE, activations=activations)
    with capture(model, [Tap(pair.student) for pair in pairs]) as maps:
        model(ONE)
        sizes = [maps[pair.student].shape[2] for pair in pairs]
    assert sizes == [8, 4, 2]


def test_finding_leaves_the_networks_alone():
    student, teacher = resnet20().train(), resnet32().eval()
    teacher.layer1.train()
    before = [(copy.deepcopy(model), settings_of(model)) for model in (student, teacher)]
    state = torch.get_rng_state()
    find_hints(student, COLOUR)
    find_pairs(student, teacher, COLOUR)
    tap_of(student, "layer1", COLOUR, before_activation=True, whose="student")
    assert torch.equal(torch.get_rng_state(), state)
    for model, (old, settings) in zip((student, teacher), before, strict=True):
        assert settings_of(model) == settings
        assert same(model, old)


def test_a_converted_network_pairs_modules_of_the_same_names():
    for teacher, example in ((network(), ONE), (lenet(1), ONE)):
        pairs = find_pairs(student_of(teacher), teacher, example)
        assert pairs == [HintPair(name, name) for name in find_hints(teacher, example)]
        assert len(pairs) >= 2


@pytest.mark.parametrize("make", [resnet20, vgg8, lenet])
def test_a_network_pairs_with_itself(make):
    model = make()
    assert find_pairs(model, model, COLOUR) == [HintPair(name, name) for name in find_hints(model, COLOUR)]


def test_networks_of_other_depth_pair_by_resolution():
    wanted = [HintPair(name, name) for name in ("layer1", "layer2", "layer3")]
    assert find_pairs(resnet20(), resnet32(), COLOUR) == wanted
    assert find_pairs(resnet32(), resnet20(), COLOUR) == wanted


def test_networks_of_another_kind_pair_by_resolution():
    """All have stages of 32, 16 and 8; what VGG-8 has beyond them teaches nothing."""
    small, large = ["features.1", "features.4", "features.7"], ["features.5", "features.12", "features.19"]
    assert find_pairs(lenet(), vgg8(), COLOUR) == [HintPair(a, b) for a, b in zip(large, small, strict=True)]
    assert find_pairs(vgg8(), lenet(), COLOUR) == [HintPair(a, b) for a, b in zip(small, large, strict=True)]
    assert find_pairs(resnet20(), vgg8(), COLOUR)[-1] == HintPair("features.19", "layer3")


def test_stages_of_other_resolutions_pair_by_relative_depth():
    """8, 4, 2 wide against 6, 3 wide, each at another place of its network."""
    teacher = tower(1, 2, 2)
    assert find_pairs(tower(1, 2, padding=0), teacher, ONE) == [HintPair("1", "0"), HintPair("2", "1")]
    early = nn.Sequential(*tower(1, padding=0), *(nn.Identity() for _ in range(8)), nn.Flatten())
    assert find_hints(early, ONE) == ["8"]
    late = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), *(nn.Identity() for _ in range(8)))
    assert find_pairs(late, teacher, ONE) == [HintPair("0", "0")]
    assert find_pairs(early, teacher, ONE) == [HintPair("2", "8")]


def test_what_is_left_over_is_not_taught_by_what_lies_beyond_its_neighbours():
    """The teacher's first stage (10) is nearest in depth to the student's second (5), but its second teaches the
    student's first, so that only the third is left."""
    teacher = nn.Sequential(nn.Conv2d(1, 2, 3, padding=2), nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3))
    student = nn.Sequential(*tower(1), nn.Conv2d(2, 2, 4), nn.Flatten(), *(nn.Identity() for _ in range(9)))
    assert find_pairs(student, teacher, ONE) == [HintPair("1", "0"), HintPair("2", "1")]


def test_what_is_left_over_goes_between_what_belongs_together():
    """Student 8, 6, 4 and teacher 8, 7, 4: the 6 is taught by the 7, which lies between the same neighbours."""
    student = nn.Sequential(*tower(1), nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3))
    teacher = nn.Sequential(*tower(1), nn.Conv2d(2, 2, 2), nn.Conv2d(2, 2, 4))
    assert find_pairs(student, teacher, ONE) == [HintPair(name, name) for name in "012"]
    assert find_pairs(student, tower(1, 2), ONE) == [HintPair("0", "0"), HintPair("1", "2")]


@pytest.mark.parametrize("seed", range(8))
def test_pairs_never_cross_nor_share_a_layer(seed):
    generator = torch.Generator().manual_seed(seed)

    def some():
        count = int(torch.randint(1, 5, (), generator=generator))
        strides = (torch.rand(count, generator=generator) < 0.4).long().add(1).tolist()
        return tower(*strides, padding=int(torch.randint(0, 2, (), generator=generator)), kernel=2)

    example = torch.zeros(1, 1, 24, 20)
    student, teacher = some(), some()
    pairs = find_pairs(student, teacher, example)
    assert pairs
    for order, names in (
        (find_hints(teacher, example), [pair.teacher for pair in pairs]),
        (find_hints(student, example), [pair.student for pair in pairs]),
    ):
        places = [order.index(name) for name in names]
        assert places == sorted(set(places))


def test_a_network_that_comes_back_to_a_resolution_crosses_nothing():
    """The teacher ends at the full resolution, the student begins there: only one of two pairs can be."""
    pairs = find_pairs(tower(1, 2), Hourglass(), ONE)
    assert len(pairs) == 1
    assert find_pairs(Hourglass(), Hourglass(), ONE) == [HintPair("middle", "middle"), HintPair("end", "end")]


def test_networks_without_maps_have_no_pairs():
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    assert find_pairs(flat, network(), ONE) == []
    assert find_pairs(network(), flat, ONE) == []


def test_hints_are_read_from_text():
    assert parse_hints(["layer1", "a.b=c.0.d"]) == [HintPair("layer1", "layer1"), HintPair("a.b", "c.0.d")]
    assert parse_hints([]) == []


@pytest.mark.parametrize("text", ["", "=", "=layer1", "layer1="])
def test_hints_that_name_no_layer_are_refused(text):
    with pytest.raises(InputError, match=r"TEACHER\.LAYER=STUDENT\.LAYER") as error:
        parse_hints(["layer1", text])
    assert repr(text) in str(error.value)


# -- where a map is taken ----------------------------------------------------------------------------------------------


def test_a_map_is_the_output_of_its_module(large):
    tap = tap_of(large, "layer2", LARGE, before_activation=False, whose="teacher")
    assert tap == (Tap("layer2"), 128)
    assert tap_of(network(), "0", ONE, before_activation=False, whose="student") == (Tap("0"), 8)


@pytest.mark.parametrize("inplace", [False, True])
def test_before_the_activation_is_the_input_of_the_activation(inplace):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace), nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(inplace)))
    for name, tap in (("1", ("1", 4)), ("2", ("2.1", 6)), ("2.1", ("2.1", 6))):
        found = tap_of(model, name, ONE, before_activation=True, whose="student")
        assert found == (Tap(tap[0], before=True), tap[1])


@pytest.mark.parametrize("activation", [nn.ReLU6(), nn.GELU(), nn.SiLU(), nn.Hardswish(), nn.LeakyReLU(), nn.Sigmoid()])
def test_other_activations_are_known_too(activation):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), activation)
    assert tap_of(model, "1", ONE, before_activation=True, whose="student")[0] == Tap("1", before=True)


def test_a_module_that_ends_without_activation_is_taken_as_it_is():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    nn.init.constant_(model[0].bias, -9.0)  # else all four channels may by chance be positive, as after an activation
    for name in ("0", "1"):
        assert tap_of(model, name, ONE + 1, before_activation=True, whose="student") == (Tap(name), 4)


def test_stages_of_a_resnet_whose_relus_work_in_place_and_twice(large):
    """`layer1` ends with the second call of its last block's ReLU."""
    for name, channels in (("layer1", 64), ("layer2", 128), ("layer3", 256), ("layer4", 512)):
        tap = tap_of(large, name, LARGE, before_activation=True, whose="teacher")
        assert tap == (Tap(f"{name}.1.relu", before=True), channels)


@pytest.mark.parametrize("name", ["layer1.0.bn1", "layer1.0.bn2", "layer1.0.conv1", "bn1"])
def test_a_layer_before_an_activation_in_place_is_taken_as_it_is(large, name):
    """What comes next changes its output; it is its own value that counts, from which the sign has not been cut."""
    tap, channels = tap_of(large, name, LARGE + 1, before_activation=True, whose="teacher")
    assert channels == 64
    own = []
    module = large.get_submodule(name)
    handle = module.register_forward_hook(lambda module, args, output: own.append(output.clone()))
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with capture(large, [tap]) as maps, torch.no_grad():
        large(x)
    handle.remove()
    assert torch.equal(maps[tap.key], own[0])
    assert (own[0] < 0).any()


def test_an_activation_that_is_a_function_is_refused_by_name():
    model = nn.Sequential(Functional(), nn.Conv2d(4, 4, 3))
    with pytest.raises(InputError, match=r"'0' of the teacher .*not a module.*--method.*--hint"):
        tap_of(model, "0", ONE + 1, before_activation=True, whose="teacher")
    assert tap_of(model, "0", ONE + 1, before_activation=False, whose="teacher") == (Tap("0"), 4)
    assert tap_of(model, "0.conv", ONE + 1, before_activation=True, whose="teacher") == (Tap("0.conv"), 4)
    assert hooks_of(model) == 0


@pytest.mark.parametrize("name", ["", "layer9", "0.weight"])
def test_a_layer_that_is_not_there_is_refused_and_some_that_are_are_named(name):
    with pytest.raises(InputError, match=r"not a module of the student; expected one like 0, 1, 2"):
        tap_of(network(), name, ONE, before_activation=False, whose="student")


@pytest.mark.parametrize(
    ("name", "what"), [("7", r"a tensor of shape \(1, 4\)"), ("8", "tuple"), ("unused", "NoneType")]
)
def test_a_layer_that_gives_no_map_is_refused(name, what):
    class Two(nn.Module):
        def forward(self, x):
            return x, x

    model = network()
    model.append(Two())
    holder = model
    if name == "unused":
        holder = Functional()
        holder.unused = nn.Conv2d(1, 1, 1)
    with pytest.raises(InputError, match=rf"'{name}' of the student gives {what}; expected a feature map"):
        tap_of(holder, name, ONE, before_activation=False, whose="student")
    assert hooks_of(holder) == 0


# -- taking maps -------------------------------------------------------------------------------------------------------


def test_capture_holds_the_latest_maps_and_goes_away():
    model = network().eval()
    x = toy()[0][0]
    with capture(model, [Tap("2"), Tap("5")]) as maps:
        model(torch.zeros_like(x))
        model(x)
        assert torch.equal(maps["2"], model[:3](x))
        assert torch.equal(maps["5"], model[:6](x))
    assert hooks_of(model) == 0
    with pytest.raises(KeyError), capture(model, [Tap("2"), Tap("none"), Tap("5", before=True)]):
        pass
    assert hooks_of(model) == 0


def test_capture_before_and_after_an_activation_in_place():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Hardtanh(-0.1, 0.1, inplace=True))
    x = torch.randn(2, 1, 8, 8)
    taps = [Tap("0"), Tap("1", before=True), Tap("1"), Tap("2", before=True), Tap("2")]
    assert len({tap.key for tap in taps}) == 5
    with capture(model, taps) as maps:
        model(x)
    wanted = F.conv2d(x, model[0].weight, model[0].bias)
    for tap, each in zip(
        taps, (wanted, wanted, wanted.relu(), wanted.relu(), wanted.relu().clamp_max(0.1)), strict=True
    ):
        assert torch.equal(maps[tap.key], each)


def test_capture_takes_the_last_call_of_a_module_that_runs_twice(large):
    block = large.layer1[0]
    x = torch.randn(1, 64, 8, 8, generator=torch.Generator().manual_seed(0))
    with capture(large, [Tap("layer1.0.relu", before=True)]) as maps, torch.no_grad():
        block(x)
        inner = F.relu(block.bn1(block.conv1(x)))
        wanted = block.bn2(block.conv2(inner)) + x
    assert torch.equal(maps["before layer1.0.relu"], wanted)


def test_gradients_flow_through_what_is_captured():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3))
    with capture(model, [Tap("1", before=True), Tap("1")]) as maps:
        model(torch.ones(1, 1, 8, 8))
        (maps["before 1"].sum() + maps["1"].sum()).backward()
    assert model[0].weight.grad.any()
    assert model[2].weight.grad is None


def test_capture_changes_no_output():
    model = student_of(network()).eval()
    x = toy()[0][0]
    wanted = model(x)
    with capture(model, [Tap("2"), Tap("5", before=True), Tap("0"), Tap("2")]):
        assert torch.equal(model(x), wanted)


def test_hooks_are_gone_after_an_exception():
    model, seen = network(), []

    def fail(images):
        with capture(model, [Tap("2"), Tap("5", before=True)]):
            seen.append(hooks_of(model))
            model(images)
            raise ZeroDivisionError

    with pytest.raises(RuntimeError):
        fail(torch.zeros(1, 5, 8, 8))
    with pytest.raises(ZeroDivisionError):
        fail(torch.zeros(2, 1, 8, 8))
    assert seen == [2, 2]
    assert hooks_of(model) == 0


def test_hooks_of_others_stay():
    model = network()
    calls = []
    handle = model[2].register_forward_hook(lambda *_: calls.append(1))
    with capture(model, [Tap("2")]):
        model(ONE.repeat(2, 1, 1, 1))
    find_pairs(model, model, ONE)
    assert hooks_of(model) == 1
    assert calls
    handle.remove()


def test_a_network_that_fails_on_the_example_keeps_no_hooks():
    model = network().train()
    for ask in (find_hints, lambda *what: tap_of(what[0], "2", what[1], before_activation=True, whose="student")):
        with pytest.raises(RuntimeError):
            ask(model, COLOUR)
        assert hooks_of(model) == 0
        assert all(module.training for module in model.modules())
