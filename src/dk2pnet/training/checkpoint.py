"""Atomic checkpoints: the whole state of a training run in one safetensors file whose name holds its digest.

Nothing is pickled. Tensors of the state are the file's tensors, everything else is JSON in its metadata.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from dk2pnet.errors import InputError

__all__ = ["Checkpoints"]

_NAME = re.compile(r"step-(\d{9})-([0-9a-f]{16})\.safetensors")
_FORMAT = 1
_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run in a folder: the two newest are kept.

    Example::

        checkpoints = Checkpoints(Path("OUT.unfinished/checkpoints"), {"lr": 0.1}, every=60)
        state = checkpoints.load()          # None in a fresh folder
        checkpoints.save(100, {"model": model.state_dict(), "sums": {"loss": 0.5}})

    Parameters
    ----------
    folder : made when the first checkpoint is written
    identity : what the run was asked to do, JSON-able; a checkpoint of a run that was asked for something else is not
        taken for this one's
    every : seconds between two checkpoints that `due` asks for
    free : parts of the identity that may differ
    """

    def __init__(
        self, folder: str | Path, identity: Mapping[str, Any], every: float = 60.0, free: Collection[str] = ()
    ) -> None:
        self.folder, self.every, self.free = Path(folder), every, free
        self.identity = json.loads(json.dumps(identity))
        self.last: Path | None = None
        self._time = time.monotonic()

    def due(self) -> bool:
        """Whether `every` seconds have passed since the last checkpoint (or the start)."""
        return time.monotonic() - self._time >= self.every

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write the checkpoint of `step`; a kill or a full disk at any moment leaves those before it as they are.

        `state` is a tree of dictionaries (keys: strings or whole numbers), lists, tensors and JSON values.
        """
        tensors: dict[str, Tensor] = {}
        tree = _without_tensors(state, tensors)
        header = {"format": _FORMAT, "step": step, "identity": self.identity, "state": tree}
        data = save(tensors, {"dk2pnet": json.dumps(header)})
        path = self.folder / f"step-{step:09d}-{hashlib.sha256(data).hexdigest()[:16]}.safetensors"
        temporary = self.folder / f".{path.name}.part"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(self.folder)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            what = "the disk is full" if error.errno == errno.ENOSPC else str(error)
            good = f"; the last good one is {self.last}" if self.last else ""
            raise InputError(
                f"the checkpoint {path} could not be written ({what}){good}; "
                "make room and repeat the command: it goes on from there"
            ) from error
        self.last, self._time = path, time.monotonic()
        for old in self._paths()[2:] + list(self.folder.glob(".step-*.part")):
            old.unlink(missing_ok=True)
        return path

    def load(self) -> dict[str, Any] | None:
        """The state in the newest good checkpoint, or None. A damaged one is named in a warning and passed over."""
        for path in self._paths():
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest()[:16] != path.stem.rpartition("-")[2]:
                _log.warning("checkpoint %s is damaged (its SHA-256 differs): not used, the one before it is", path)
                with suppress(OSError):  # out of the way of new ones; another process may have done it
                    os.replace(path, path.with_suffix(".damaged"))
                continue
            header = json.loads(_metadata(data)["dk2pnet"])
            if header["format"] != _FORMAT:
                raise InputError(
                    f"checkpoint {path} has the format {header['format']}, this version reads {_FORMAT}; "
                    f"finish the run with the version that began it, or remove {self.folder}"
                )
            self._check_identity(path, header["identity"])
            self.last = path
            return _with_tensors(header["state"], load(data))
        return None

    def _check_identity(self, path: Path, found: dict[str, Any]) -> None:
        for key in {**found, **self.identity}:
            if key not in self.free and found.get(key) != self.identity.get(key):
                raise InputError(
                    f"checkpoint {path} belongs to a run with {key} {_short(found.get(key))}, this one has "
                    f"{_short(self.identity.get(key))}; repeat the command that began it, give another --out, "
                    f"or remove {self.folder.parent} to start anew"
                )

    def _paths(self) -> list[Path]:
        """Checkpoints, newest first."""
        if not self.folder.is_dir():
            return []
        return sorted((path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)), reverse=True)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _metadata(data: bytes) -> dict[str, str]:
    """The metadata of a safetensors file: 8 bytes of length, then JSON."""
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _without_tensors(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """The tree as JSON; tensors move to `tensors`, dictionaries become lists of pairs, which keep numbers as keys."""
    if isinstance(tree, Tensor):
        name = str(len(tensors))
        tensors[name] = tree.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(tree, Mapping):
        return {"items": [[key, _without_tensors(value, tensors)] for key, value in tree.items()]}
    if isinstance(tree, list | tuple):
        return [_without_tensors(value, tensors) for value in tree]
    return tree


def _with_tensors(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(tree, dict):
        if "tensor" in tree:
            return tensors[tree["tensor"]]
        return {key: _with_tensors(value, tensors) for key, value in tree["items"]}
    if isinstance(tree, list):
        return [_with_tensors(value, tensors) for value in tree]
    return tree
