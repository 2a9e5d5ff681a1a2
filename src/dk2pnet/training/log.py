"""What a training run writes down: a JSON line and TensorBoard scalars every few steps."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

__all__ = ["TrainingLog"]


class TrainingLog:
    """``log.jsonl`` and TensorBoard events (where the package `tensorboard` is installed) in a folder.

    A line holds step, epoch, learning rate, images per second and the mean loss terms since the line before; at the end
    of an epoch also what the run validates. `folder` None writes nothing.
    """

    def __init__(self, folder: Path | None, first_step: int = 0) -> None:
        """Steps after `first_step` that an interrupted run has written are forgotten: they are done again."""
        self._file = self._board = None
        self._sums: dict[str, float] = {}
        self._steps = self._images = 0
        self._time = self._last = time.perf_counter()
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "log.jsonl"
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= first_step]
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1 if first_step else None)

    def add(self, terms: Mapping[str, float], images: int) -> None:
        """The loss terms of one step."""
        for name, value in terms.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._steps += 1
        self._images += images
        self._last = time.perf_counter()  # what comes before the line is written, such as a validation, is not training

    def write(self, step: int, epoch: int, rate: float, more: Mapping[str, float] | None = None) -> None:
        """A line with the means since the line before."""
        seconds = self._last - self._time
        line = {"step": step, "epoch": epoch, "learning_rate": rate}
        if self._steps:
            line["images_per_second"] = round(self._images / max(seconds, 1e-9), 1)
            line |= {name: value / self._steps for name, value in self._sums.items()}
        line |= more or {}
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        if self._board is not None:
            for name, value in line.items():
                if name != "step":
                    self._board.add_scalar(name, value, step)
        self._sums, self._steps, self._images, self._time = {}, 0, 0, time.perf_counter()

    def close(self) -> None:
        """Finish the files."""
        for each in (self._file, self._board):
            if each is not None:
                each.close()


def _lines(path: Path) -> list[str]:
    """The whole lines of a file; a kill may have cut the last one."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            json.loads(line)
        except json.JSONDecodeError:
            break
        lines.append(line)
    return lines
