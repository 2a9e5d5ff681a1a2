"""The student with its pre-regressors, the teacher with its probes: what both show for one batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dk2pnet.errors import InputError
from dk2pnet.measure import inference_of, outputs_of
from dk2pnet.training.hints import HintPair, Tap, capture, tap_of
from dk2pnet.training.losses import Method, labels

__all__ = ["WithMaps", "fit_probes", "guided", "hinting", "taps_of"]


class WithMaps(nn.Module):
    """A network that also gives its maps at some layers, each through a head (pre-regressor, probe or nothing).

    One module, so that several processes average the gradients of the heads too, and torch.compile sees the whole.
    """

    def __init__(
        self, model: nn.Module, taps: Sequence[Tap], heads: Sequence[nn.Module], maps: dict[str, Tensor]
    ) -> None:
        super().__init__()
        self.model, self.heads = model, nn.ModuleList(heads)
        self.keys, self.maps = [tap.key for tap in taps], maps

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The outputs, and a map for each tap."""
        outputs = outputs_of(self.model(x))
        silent = [key for key in self.keys if key not in self.maps]
        if silent:
            raise InputError(
                f"hint layer {silent[0]!r} does not run in training, only in evaluation; give --hints other layers"
            )
        maps = [head(self.maps[key]) for key, head in zip(self.keys, self.heads, strict=True)]
        self.maps.clear()  # nothing of one step is kept alive into the next
        return outputs, maps


def taps_of(
    student: nn.Module, teacher: nn.Module, pairs: Sequence[HintPair], method: Method, example: Tensor
) -> tuple[list[tuple[Tap, int]], list[tuple[Tap, int]]]:
    """Taps and channels of the student and of the teacher for each hint pair."""
    before = method.before_activation
    guided = [tap_of(student, pair.student, example, before_activation=before, whose="student") for pair in pairs]
    hints = [tap_of(teacher, pair.teacher, example, before_activation=before, whose="teacher") for pair in pairs]
    return guided, hints


@contextmanager
def guided(
    student: nn.Module, taps: Sequence[tuple[Tap, int]], hints: Sequence[tuple[Tap, int]], method: Method, classes: int
) -> Iterator[WithMaps]:
    """The student with pre-regressors; the hooks are gone when the block ends, however it ends."""
    regressors = [
        _regressor(method, channels, wanted, classes) for (_, channels), (_, wanted) in zip(taps, hints, strict=True)
    ]
    names = [tap for tap, _ in taps]
    with capture(student, names) as maps:
        yield WithMaps(student, names, regressors, maps).to(next(student.parameters()).device)


@contextmanager
def hinting(teacher: nn.Module, taps: Sequence[tuple[Tap, int]]) -> Iterator[WithMaps]:
    """The teacher in inference mode; hooks and modes are put back when the block ends, however it ends."""
    names = [tap for tap, _ in taps]
    with inference_of(teacher), capture(teacher, names) as maps:
        yield WithMaps(teacher, names, [nn.Identity() for _ in names], maps).eval()


def _regressor(method: Method, channels: int, wanted: int, classes: int) -> nn.Module:
    """A 1x1 convolution (the identity to begin with where channels agree), a probe, or nothing."""
    if method.regress == "probe":
        return _Probe(channels, classes)
    if method.regress == "never" or (method.regress == "where channels differ" and channels == wanted):
        return nn.Identity()
    convolution = nn.Conv2d(channels, wanted, 1)
    if channels == wanted:
        nn.init.dirac_(convolution.weight)
        assert convolution.bias is not None
        nn.init.zeros_(convolution.bias)
    return convolution


class _Probe(nn.Module):
    """(B, C, H, W) -> class scores (B, classes, 1, 1) of the mean over positions, which batch norm makes comparable."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(channels, affine=False), nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        x = x.float().mean((2, 3))
        if self.training and len(x) == 1:  # no statistics of one image
            x = F.batch_norm(x, self.norm.running_mean, self.norm.running_var)
        else:
            x = self.norm(x)
        return self.linear(x)[:, :, None, None]


def fit_probes(
    teacher: WithMaps,
    channels: Sequence[int],
    classes: int,
    batches: Iterable[tuple[Tensor, Tensor | None]],
) -> None:
    """Give the teacher linear probes, trained on `batches` with their labels, else with the teacher's answers.

    Adam at 1e-2, one pass; the probes are in evaluation mode and need no gradient afterwards.
    """
    device = next(teacher.model.parameters()).device
    probes = nn.ModuleList(_Probe(count, classes) for count in channels).to(device)
    optimizer = torch.optim.Adam(probes.parameters(), 1e-2)
    for x, y in batches:
        if len(x) < 2:  # batch norm needs two
            continue
        with torch.no_grad():
            outputs, maps = teacher(x.to(device))
        scores = [probe(each).flatten(1) for probe, each in zip(probes, maps, strict=True)]
        if y is None:
            losses = [F.cross_entropy(each, outputs[0].float().softmax(1)) for each in scores]
        else:
            losses = [labels(each, y.to(device)) for each in scores]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
    teacher.heads = probes.eval().requires_grad_(False)
