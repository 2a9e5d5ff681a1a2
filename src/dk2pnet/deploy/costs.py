"""What a convolution costs on a target, in time: dense, and in every form that dominant kernels can take.

Multiply-adds do not tell: a depthwise convolution is bound by memory, a gather leaves the runtime's blocked layout, a
tiny operator costs its dispatch. So layers are timed, each between the neighbours that it has in a network, and the
times kept for the next run on the same machine.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from dk2pnet.deploy.emit import BLOCK, EMITTED, Branch, PlainLayer, branches_of, concatenated
from dk2pnet.deploy.export import onnx_bytes
from dk2pnet.deploy.latency import compare_latency, conditions, is_onnx
from dk2pnet.deploy.quantize import quantize_onnx
from dk2pnet.deploy.runtimes import target_named
from dk2pnet.layer import DKConv2d, arguments_of
from dk2pnet.processes import cores

__all__ = ["DENSE", "LatencyTable", "Sketch", "Spot", "fastest_forms", "gathered", "sketch_of"]


class Sketch(NamedTuple):
    """All of a form that its time depends on: per branch, whether its input is gathered and how many kernels it has;
    whether one pointwise convolution combines them all; and which branches need none, as those of a grouped layer with
    one kernel per group. No branches: the dense convolution."""

    branches: tuple[tuple[bool, int], ...]
    concat: bool = False
    alone: tuple[int, ...] = ()

    def __str__(self) -> str:
        parts = [f"{'g' if gathered else ''}{size}" for gathered, size in self.branches]
        for number in self.alone:
            parts[number] += " alone"
        return ("concat " if self.concat else "") + ("+".join(parts) or "dense")


DENSE = Sketch(())
_FORMAT = 3  # of the files; another number where the networks that are timed change
# A layer is written dense only where that is clearly faster: it makes the file larger.
DENSE_HANDICAP = 1.05


def gathered(channels: int, full: int, rest: int) -> Sketch:
    """`full` branches over all channels, and `rest` more kernels gathered, in whole blocks."""
    blocks = -(-rest // BLOCK) * BLOCK
    return Sketch(((False, channels),) * full + (((True, blocks),) if blocks else ()))


def sketch_of(layer: DKConv2d, form: str) -> Sketch:
    """The sketch of a DK layer in an emitted form."""
    if form == "folded":
        return DENSE
    branches = branches_of(layer, form)
    sizes = tuple((branch.channels is not None, len(branch.kernels)) for branch in branches)
    alone = tuple(number for number, branch in enumerate(branches) if branch.combination is None)
    return Sketch(sizes, concatenated(layer, form, branches), alone)


@dataclass(frozen=True)
class Spot:
    """A convolution at its place: geometry, and height and width of its input."""

    conv: nn.Conv2d | DKConv2d
    size: tuple[int, int]

    @property
    def key(self) -> str:
        """Equal for spots whose times are equal."""
        conv = self.conv
        shape = conv.in_channels, conv.out_channels, *conv.kernel_size
        rest = conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode
        return f"{shape} at {tuple(self.size)}: {rest}"


class LatencyTable:
    """Times of layers on one target, measured when asked for the first time, kept in a file.

    A machine is now faster, now slower. What is kept are ratios to a reference layer that is timed beside them; the
    reference is timed again when a table is opened, so that old and new entries add up.

    Parameters
    ----------
    target, threads
        As in `compare_latency`.
    folder
        Where the file is kept; None: ``$DK2PNET_CACHE``, or ``dk2pnet`` in the user's cache folder.
    progress
        Called with the number of layers timed and how many there are to time.
    """

    def __init__(
        self,
        target: str = "onnxruntime",
        threads: int | None = None,
        folder: Path | None = None,
        seconds: float = 0.1,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.target, self.threads, self.seconds = target, threads, seconds
        self.progress = progress or (lambda done, total: None)
        facts = conditions(target, torch.zeros(1, 1, 1, 1), threads or cores())
        name = hashlib.sha256(json.dumps([facts, torch.__version__, _FORMAT], sort_keys=True).encode()).hexdigest()[:16]
        self.path = (folder or _cache()) / "latency" / f"{name}.json"
        self.facts = facts
        self.ratios = self._kept()
        self.reference = _network(_REFERENCE, DENSE, target)
        self.reference_size = _REFERENCE.size

    def _kept(self) -> dict[str, dict[str, float]]:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            return {
                str(spot): {str(sketch): float(value) for sketch, value in times.items()}
                for spot, times in found["ratios"].items()
            }
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            return {}  # none yet, or damaged: measured again

    def ratios_of(self, wanted: Mapping[Spot, Sequence[Sketch]]) -> dict[str, dict[Sketch, float]]:
        """Times of sketches in units of the reference layer's, by key of the spot; missing ones are measured."""
        missing: dict[str, tuple[Spot, list[Sketch]]] = {}
        for spot, sketches in wanted.items():
            known = self.ratios.get(spot.key, {})
            entry = missing.setdefault(spot.key, (spot, []))[1]
            entry.extend(s for s in sketches if str(s) not in known and s not in entry)
        missing = {key: entry for key, entry in missing.items() if entry[1]}
        for done, (key, (spot, sketches)) in enumerate(missing.items()):
            self.progress(done, len(missing))
            self.ratios.setdefault(key, {}).update(self._measure(spot, sketches))
            self._save()
        if missing:
            self.progress(len(missing), len(missing))
        found: dict[str, dict[Sketch, float]] = {}
        for spot, sketches in wanted.items():
            times = self.ratios[spot.key]
            found.setdefault(spot.key, {}).update({sketch: times[str(sketch)] for sketch in sketches})
        return found

    def _measure(self, spot: Spot, sketches: Sequence[Sketch]) -> dict[str, float]:
        networks = {str(sketch): _network(spot, sketch, self.target) for sketch in sketches}
        x = torch.randn(1, 1, *spot.size, generator=torch.Generator().manual_seed(0))
        reference = torch.randn(1, 1, *_REFERENCE.size, generator=torch.Generator().manual_seed(0))
        found = compare_latency(
            {**networks, "": self.reference},
            {**dict.fromkeys(networks, x), "": reference},
            target=self.target,
            threads=self.threads,
            seconds=self.seconds,
            rounds_min=7,
        )
        return {name: found[name].median_ms / found[""].median_ms for name in networks}

    def _save(self) -> None:
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        for spot, times in self._kept().items():  # what another run has measured meanwhile
            self.ratios[spot] = times | self.ratios.get(spot, {})
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"conditions": self.facts, "ratios": self.ratios}, indent=1)
            temporary.write_text(text + "\n", encoding="utf-8")
            os.replace(temporary, self.path)
        except OSError:  # a cache that cannot be written is only slower
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def fastest_forms(layers: Mapping[str, tuple[DKConv2d, tuple[int, int]]], table: LatencyTable) -> dict[str, str]:
    """The fastest emitted form of every DK layer ``name: (layer, (H, W) of its input)``."""
    sketches: dict[str, dict[Sketch, str]] = {}
    for name, (layer, _) in layers.items():
        of_layer = sketches.setdefault(name, {})
        for form in EMITTED:  # of equal ones the plainer
            of_layer.setdefault(sketch_of(layer, form), form)
    wanted: dict[Spot, list[Sketch]] = {}
    spots = {name: Spot(layer, size) for name, (layer, size) in layers.items()}
    for name, of_layer in sketches.items():
        wanted[spots[name]] = list(of_layer)
    # Spots of equal geometry share what is measured.
    times = table.ratios_of(wanted)

    def price(name: str, sketch: Sketch) -> float:
        return times[spots[name].key][sketch] * (DENSE_HANDICAP if sketch == DENSE else 1.0)

    return {name: of_layer[min(of_layer, key=functools.partial(price, name))] for name, of_layer in sketches.items()}


_REFERENCE = Spot(nn.Conv2d(64, 64, 3, padding=1, device="meta"), (28, 28))


def _network(spot: Spot, sketch: Sketch, target: str) -> bytes | nn.Module:
    """A layer between neighbours as it has them in a network: its input comes from a convolution, in whatever layout
    the runtime keeps it, and what follows reads its output once."""
    conv = spot.conv
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    bias = numbers(conv.out_channels)
    layer: nn.Module
    if sketch.branches:
        width = conv.in_channels
        branches = []
        for number, (taken, size) in enumerate(sketch.branches):
            channels = torch.arange(size) * width // size if taken else None
            alone = number in sketch.alone
            combination = None if alone else numbers(conv.out_channels, size // conv.groups, 1, 1)
            kernels = numbers(size, 1, *conv.kernel_size)
            branches.append(Branch(channels, kernels, combination))
        layer = PlainLayer(conv, branches, bias, sketch.concat)
    else:
        layer = nn.Conv2d(**arguments_of(conv))
    before = nn.Conv2d(1, conv.in_channels, 1)
    network = nn.Sequential(before, nn.ReLU(), layer, nn.ReLU(), nn.AdaptiveAvgPool2d(1)).eval()
    if not is_onnx(target):
        return network
    content = onnx_bytes(network, torch.zeros(1, 1, *spot.size))
    return quantize_onnx(content, [numbers(1, 1, *spot.size)]) if target_named(target).quantized else content


def _cache() -> Path:
    if given := os.environ.get("DK2PNET_CACHE"):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "dk2pnet"
