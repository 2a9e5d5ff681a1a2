"""Which feature maps of the teacher teach which of the student, and how the maps are had while both run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from torch import Tensor, nn

from dk2pnet.errors import InputError
from dk2pnet.measure import evaluation

__all__ = ["HintPair", "Tap", "capture", "find_hints", "find_pairs", "parse_hints", "tap_of"]

_ACTIVATIONS = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.ELU,
    nn.CELU,
    nn.SELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Softplus,
    nn.Hardswish,
    nn.Hardtanh,
    nn.Sigmoid,
    nn.Tanh,
)


class HintPair(NamedTuple):
    """The output of the module `teacher` of the teacher (hint layer) teaches that of `student` (guided layer)."""

    teacher: str
    student: str


class Tap(NamedTuple):
    """A feature map: what goes into (`before`) or comes out of a module, at its last call of a forward pass."""

    module: str
    before: bool = False

    @property
    def key(self) -> str:
        """Its name in what `capture` gives: text, because torch.compile traces no other keys."""
        return f"before {self.module}" if self.before else self.module


class _StageEnd(NamedTuple):
    name: str
    size: tuple[int, int]
    depth: float  # how much of the network has run, 0 to 1


def find_hints(model: nn.Module, example: Tensor) -> list[str]:
    """Names of the modules that end the stages: the last one to run at each resolution above 1x1.

    `example` is ``(1, C, H, W)``.
    """
    return [end.name for end in _stage_ends(model, example)]


def find_pairs(student: nn.Module, teacher: nn.Module, example: Tensor, *, activations: bool = False) -> list[HintPair]:
    """A hint pair for each stage of the student, in the order in which the stages run.

    Stages of the same resolution belong together (in a converted network these are the same modules); what is left
    over is matched by relative depth, never crossing another pair. With `activations` a stage ends with its last
    activation, for what is taken before it.
    """
    hints, guided = (
        (activations and _stage_ends(model, example, _ACTIVATIONS)) or _stage_ends(model, example)
        for model in (teacher, student)
    )
    found: dict[int, int] = {}
    for number, end in enumerate(guided):
        same = [other for other, hint in enumerate(hints) if hint.size == end.size]
        if same:
            found[number] = same[0]
    for number, end in enumerate(guided):
        if number in found:
            continue
        first = max((found[other] + 1 for other in found if other < number), default=0)
        last = min((found[other] for other in found if other > number), default=len(hints))
        free = [other for other in range(first, last) if other not in found.values()]
        if free:
            found[number] = min(free, key=lambda other: abs(hints[other].depth - end.depth))
    pairs, reached = [], -1
    for number in sorted(found):
        if found[number] > reached:  # a network that comes back to a resolution could cross pairs
            reached = found[number]
            pairs.append(HintPair(hints[reached].name, guided[number].name))
    return pairs


def parse_hints(texts: Iterable[str]) -> list[HintPair]:
    """Hint pairs from ``teacher.layer=student.layer``, or ``layer`` where both have the same name."""
    pairs = []
    for text in texts:
        left, equals, right = text.partition("=")
        if not left or (equals and not right):
            raise InputError(f"hint is {text!r}; expected TEACHER.LAYER=STUDENT.LAYER, for example layer2=layer2")
        pairs.append(HintPair(left, right or left))
    return pairs


def tap_of(model: nn.Module, name: str, example: Tensor, *, before_activation: bool, whose: str) -> tuple[Tap, int]:
    """Where to take the output of the module `name`, or what it was before the activation; and its channels.

    The activation is the module whose output is that of `name`. A module that ends without an activation is taken as
    it is. `whose` ("teacher", "student") is for the errors: no such module, no feature map ``(B, C, H, W)``, or an
    activation that is a function and not a module.
    """
    modules = dict(model.named_modules())
    if name not in modules or not name:
        raise InputError(
            f"hint layer {name!r} is not a module of the {whose}; expected one like {', '.join(_some(modules))}"
        )
    outputs: dict[str, object] = {}
    # Both are looked at as soon as the module has run: what comes next may work in place.
    activation: str | None = None
    rectified = False
    with ExitStack() as stack:
        for other, module in modules.items():
            if other == name or isinstance(module, _ACTIVATIONS):

                def hook(module: nn.Module, args: tuple, output: object, other: str = other) -> None:
                    nonlocal activation, rectified
                    outputs[other] = output
                    if other == name and isinstance(output, Tensor) and output.numel():
                        ran = (each for each in outputs if isinstance(modules[each], _ACTIVATIONS))
                        activation = next((each for each in ran if outputs[each] is output), None)
                        rectified = bool(output.min() >= 0) and bool(output.max() > 0)

                stack.callback(module.register_forward_hook(hook).remove)
        with evaluation(model):
            model(example)
    output = outputs.get(name)
    if not isinstance(output, Tensor) or output.dim() != 4:
        what = f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise InputError(f"hint layer {name!r} of the {whose} gives {what}; expected a feature map (B, C, H, W)")
    channels = output.shape[1]
    if not before_activation:
        return Tap(name), channels
    if activation is not None:
        return Tap(activation, before=True), channels
    if rectified:
        raise InputError(
            f"hint layer {name!r} of the {whose} ends in an activation that is not a module, and this method needs the "
            "values before it; use another --method (kp-channel), or give a --hint that is before an activation"
        )
    return Tap(name), channels


@contextmanager
def capture(model: nn.Module, taps: Iterable[Tap]) -> Iterator[dict[str, Tensor]]:
    """A dictionary that holds the feature maps, by `Tap.key`, after every forward pass inside the block."""
    maps: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    with ExitStack() as stack:
        for tap in set(taps):
            module = modules[tap.module]
            if tap.before:
                handle = module.register_forward_pre_hook(_take_input(maps, tap.key))
            else:
                handle = module.register_forward_hook(_take_output(maps, tap.key))
            stack.callback(handle.remove)
        yield maps


def _take_output(maps: dict[str, Tensor], key: str) -> Callable[[nn.Module, tuple, Tensor], None]:
    def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
        maps[key] = output.clone()  # what comes next may work in place

    return hook


def _take_input(maps: dict[str, Tensor], key: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        maps[key] = args[0].clone()  # the activation may work in place

    return hook


def _stage_ends(model: nn.Module, example: Tensor, kinds: type | tuple[type, ...] = nn.Module) -> list[_StageEnd]:
    """The last module of one of the `kinds` at every resolution above 1x1, in order."""
    final: dict[str, tuple[tuple[int, int] | None, int]] = {}  # what `capture` sees: a module's last call
    calls = 0
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if not name:
                continue

            def hook(module: nn.Module, args: tuple, output: object, name: str = name) -> None:
                nonlocal calls
                calls += 1
                size = None
                if isinstance(output, Tensor) and output.dim() == 4 and min(output.shape[2:]) > 1:
                    size = (output.shape[2], output.shape[3])
                if isinstance(module, kinds):
                    final[name] = (size, calls)

            stack.callback(module.register_forward_hook(hook).remove)
        with evaluation(model):
            model(example)
    last: dict[tuple[int, int], tuple[int, str]] = {}
    for name, (size, call) in final.items():
        if size is not None:
            last[size] = max(last.get(size, (0, "")), (call, name))
    ends = [_StageEnd(name, size, call / calls) for size, (call, name) in last.items()]
    return sorted(ends, key=lambda end: end.depth)


def _some(modules: Iterable[str]) -> Sequence[str]:
    return [name for name in modules if name][:6]
