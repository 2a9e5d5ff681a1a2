"""Teacher and student side by side, from one convolution to the next: what each of them is given, and should give."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress

import torch
from torch import Tensor, nn

from dk2pnet.data.samples import Every
from dk2pnet.decompose.solve import Factors
from dk2pnet.networks.patches import input_patches, sampled_outputs
from dk2pnet.networks.torch.surroundings import Walk

__all__ = ["Passes", "Samples", "Walks"]

_PIECE = 2**24  # numbers of patches that are multiplied at once
_FEWEST, _UNTRACED = 16, 256  # images: on the way at least; of networks that are no graph, at most


class Samples:
    """The student's input patches of one layer at the sampled positions, ``(n, G, C q)``; with `factors` what their
    kernels make of them, ``(n, G, R / G)``."""

    def __init__(self, factors: Factors | None = None) -> None:
        self.factors = factors
        self.parts: list[Tensor] = []
        self.precise = False  # whether the pieces are float64

    def add(self, conv: nn.Conv2d, x: Tensor, first: int, positions: int, seed: int) -> None:
        """Add images ``first ...`` with inputs ``x (B, C, H, W)``."""
        patches = input_patches(conv, x, first, positions, seed)
        self.parts.append(patches if self.factors is None else _extracted(patches, self.factors))

    def pieces(self, rows: Tensor | None = None) -> Iterable[Tensor]:
        """All patches, or those of the `rows` (n,) chosen, ``(G, n, C q)`` a piece."""
        done = 0
        for part in self.parts:
            size = max(1, _PIECE // part[0].numel())
            for start in range(0, len(part), size):
                piece = part[start : start + size]
                done += len(piece)
                if rows is not None:
                    piece = piece[rows[done - len(piece) : done].to(piece.device)]
                piece = piece.transpose(0, 1)
                yield piece.double() if self.precise else piece.float() if piece.dtype.itemsize < 4 else piece


class Walks:
    """The images on their way through both networks as graphs, one pass of each for all layers.

    They go from layer to layer, and wait there until it is solved. Where maps are large only some of the images, evenly
    spread, are on the way; others set out once all find room.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        graph: torch.fx.Graph,
        others: Mapping[str, torch.fx.Node | None],
        batches: Iterable[tuple[Tensor, Tensor | None]],
        images: int,
        memory: int,
        seed: int,
        device: torch.device | str,
    ) -> None:
        self.models, self.graph, self.others = (teacher, student), graph, others
        self.batches, self.images, self.memory, self.seed, self.device = batches, images, memory, seed, device
        self.under_way: list[_Passage] = []
        self.room: dict[str, int] = {}
        self.parts: list[tuple[int, int, int]] = []  # offset and step of images that have not set out, and their number

    def _passage(self, x: Tensor, first: int) -> _Passage:
        teacher, student = (Walk(model, self.graph) for model in self.models)
        return _Passage(teacher, student, x.to(self.device), first)

    def measure(self, x: Tensor, names: Sequence[str]) -> None:
        """How many images find room in front of each of the layers, by a few of them."""
        few = self._passage(x, 0)
        for name in names:
            few.reach(name)
            self.room[name] = int(self.memory / 2 / max(few.bytes / len(x), 1))
        # Who has set out comes by all later layers too: in front of a first convolution are images, behind it maps.
        for name, later in zip(reversed(names[:-1]), reversed(names[1:]), strict=True):
            self.room[name] = min(self.room[name], self.room[later])
        # Every image with an index of 0 modulo the step sets out first, then those in the middle between two of them.
        step = 1
        while self.images // step > self.room[names[0]] and self.images // step >= 2 * _FEWEST:
            step *= 2
        self.parts = [(0, step, -(-self.images // step))]
        while step > 1:
            self.parts.append((step // 2, step, self.images // step))
            step //= 2

    def reach(self, name: str) -> int:
        """Let them go on to a layer; returns how many images are there."""
        for passage in self.under_way:
            passage.reach(name)
        while self.parts and (not self.under_way or self._count() + self.parts[0][2] <= self.room[name]):
            offset, step, _ = self.parts.pop(0)
            for x, _ in Every(self.batches, step, True, offset):
                passage = self._passage(x, self._count())
                passage.reach(name)
                self.under_way.append(passage)
        return self._count()

    def _count(self) -> int:
        return sum(passage.images for passage in self.under_way)

    def samples(self, name: str, samples: Samples, positions: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gather the student's inputs; returns the teacher's outputs without bias, and the other sides of a sum, of
        teacher and student, all ``(n, N)``."""
        teacher, student = (model.get_submodule(name) for model in self.models)
        assert isinstance(teacher, nn.Conv2d)
        assert isinstance(student, nn.Conv2d)
        wanted: list[Tensor] = []
        others: tuple[list[Tensor], list[Tensor]] = ([], [])
        node = self.others.get(name)
        for passage in self.under_way:

            def sampled(y: Tensor, first: int = passage.first) -> Tensor:
                return sampled_outputs(y, first, positions, self.seed).flatten(0, 1).cpu()

            wanted.append(sampled(_without_bias(teacher, teacher(passage.teacher.waiting))))
            samples.add(student, passage.student.waiting, passage.first, positions, self.seed)
            for walk, found in zip((passage.teacher, passage.student), others, strict=True):
                if node is not None:
                    value = walk.ahead(node)
                    # A parameter for every channel counts as one of another size.
                    found.append(sampled(value) if isinstance(value, Tensor) and value.dim() == 4 else torch.zeros(0))
        theirs, mine = (torch.cat(found) if found else None for found in others)
        return torch.cat(wanted), theirs, mine


class Passes:
    """The same for networks that are no graph: a pass of both, cut short, for every layer, and of fewer images."""

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        batches: Iterable[tuple[Tensor, Tensor | None]],
        images: int,
        seed: int,
        device: torch.device | str,
    ) -> None:
        self.models, self.seed, self.device = (teacher, student), seed, device
        step = max(1, images // _UNTRACED)
        self.batches, self.images = Every(batches, step, True), -(-images // step)

    def reach(self, name: str) -> int:
        """How many images there are."""
        return self.images

    def samples(self, name: str, samples: Samples, positions: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """As `Walks.samples`; the other side of a sum is not known."""
        wanted: list[Tensor] = []
        done = 0

        def of_teacher(module: nn.Conv2d, args: tuple[Tensor, ...], outputs: Tensor) -> None:
            outputs = _without_bias(module, outputs)
            wanted.append(sampled_outputs(outputs, done, positions, self.seed).flatten(0, 1).cpu())
            raise _Stop

        def of_student(module: nn.Conv2d, args: tuple[Tensor, ...]) -> None:
            samples.add(module, args[0], done, positions, self.seed)
            raise _Stop

        with ExitStack() as stack:
            teacher, student = (model.get_submodule(name) for model in self.models)
            stack.callback(teacher.register_forward_hook(of_teacher).remove)
            stack.callback(student.register_forward_pre_hook(of_student).remove)
            for x, _ in self.batches:
                for model in self.models:
                    with suppress(_Stop):
                        model(x.to(self.device))
                done += len(x)
        return torch.cat(wanted), None, None


# -- inside ------------------------------------------------------------------------------------------------------------


class _Stop(Exception):
    """Ends a forward pass early: nothing behind the layer in hand matters."""


class _Passage:
    """A batch on its way through both networks."""

    def __init__(self, teacher: Walk, student: Walk, x: Tensor, first: int) -> None:
        self.teacher, self.student, self.first, self.images = teacher, student, first, len(x)
        for walk in (teacher, student):
            walk.start(x)

    def reach(self, name: str) -> None:
        for walk in (self.teacher, self.student):
            walk.until(name)

    @property
    def bytes(self) -> int:
        """Of the maps that are kept while it stands still."""
        maps = [m for walk in (self.teacher, self.student) for m in walk.env.values() if isinstance(m, Tensor)]
        return sum({m.data_ptr(): m.numel() * m.element_size() for m in maps}.values())


def _without_bias(conv: nn.Conv2d, y: Tensor) -> Tensor:
    return y if conv.bias is None else y - conv.bias.view(-1, 1, 1)


def _extracted(patches: Tensor, factors: Factors) -> Tensor:
    """Feature extraction of ``patches (n, G, C q)``: ``(n, G, R / G)``, the kernels of a group in their order."""
    groups, inputs = patches.shape[1:]
    kernels, source = factors.kernels.flatten(1).to(patches), factors.source.to(patches.device)
    width = inputs // kernels.shape[1]  # channels of a group
    order = torch.argsort(source // width, stable=True).view(groups, -1)
    windows = patches.view(len(patches), groups, width, -1)
    return torch.stack(
        [(windows[:, g, source[mine] % width] * kernels[mine]).sum(2) for g, mine in enumerate(order)], 1
    )
