"""Keeps the moments of many layers: in memory while they fit into one group, else in a temporary folder."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from types import TracebackType

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dk2pnet.decompose.moments import Moments
from dk2pnet.errors import InputError

__all__ = ["MomentStore"]


class MomentStore:
    """Maps names to `Moments`, together up to `memory` bytes; a context manager that removes what it wrote."""

    def __init__(self, memory: float = math.inf) -> None:
        self.memory = memory
        self._memory: dict[str, Moments] = {}
        self._counts: dict[str, tuple[int, int]] = {}
        self._files: dict[str, Path] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> MomentStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._memory.clear()
        if self._folder is not None:
            self._folder.cleanup()

    def add_group(self, group: dict[str, Moments]) -> None:
        """Keep a group of layers; all go to disk once they are more than the memory given."""
        self._memory |= group
        if self._files or sum(moments.bytes for moments in self._memory.values()) > self.memory:
            for name, moments in self._memory.items():
                self._write(name, moments)
            self._memory = {}

    def __getitem__(self, name: str) -> Moments:
        if name in self._memory:
            return self._memory[name]
        tensors = load_file(str(self._files[name]))
        positions, images = self._counts[name]
        return Moments(tensors["input"], tensors["mean"], positions, tensors.get("output"), images)

    def _write(self, name: str, moments: Moments) -> None:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="dk2pnet-moments-")
        path = Path(self._folder.name) / f"{len(self._files)}.safetensors"
        tensors = {"input": moments.input_sum, "mean": moments.mean_sum}
        if moments.output_sum is not None:
            tensors["output"] = moments.output_sum
        try:
            save_file(tensors, str(path))
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"the moments could not be kept in {path.parent.parent} ({error}); give more --memory, or a "
                "folder with more room in the environment variable TMPDIR"
            ) from error
        self._files[name] = path
        self._counts[name] = (moments.positions, moments.images)
