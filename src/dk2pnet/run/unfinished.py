"""The folder ``OUT.unfinished`` of a run that takes long: a run that was killed goes on from there."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dk2pnet.errors import InputError, Refused
from dk2pnet.processes import is_main, wait
from dk2pnet.run.out_folder import check_out, disk_message, named, write_json

__all__ = ["keep_logs", "unfinished"]

_log = logging.getLogger(__name__)


@contextmanager
def unfinished(out: str | Path, overwrite: bool, asked: Mapping[str, Any]) -> Iterator[Path]:
    """The folder ``OUT.unfinished`` of a run that takes long, for checkpoints and logs; gone once the block has ended.

    A run that stops before anything is worth keeping leaves nothing. One that stops later leaves the folder, for the
    same command to go on with. `asked` are the options of the run: a folder that a run with others left is refused, or
    emptied with `overwrite`. A second run is refused while the first is at work.
    """
    out = named(out)
    folder = out.with_name(f"{out.name}.unfinished")
    with _alone_in(folder) if is_main() else nullcontext():
        if is_main():
            check_out(out, overwrite)  # another run may have ended since it was checked
            _enter(folder, overwrite, json.loads(json.dumps(asked)))
        wait()
        try:
            yield folder
        except BaseException as error:
            # What was refused must not stand in the way of another attempt.
            if is_main() and (isinstance(error, Refused) or not _worth_keeping(folder)):
                shutil.rmtree(folder, ignore_errors=True)
            raise
        if is_main():
            shutil.rmtree(folder, ignore_errors=True)
        wait()


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """No other run of this machine is in the folder inside the block; a killed one gives it free.

    The lock is never deleted (who waits for a deleted one holds another than who comes next), so it does not lie where
    a user would find it, but in the machine's temporary folder.
    """
    lock = FileLock(_locks() / f"{hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(
            f"another run is at work in {folder}; wait until it has ended, or give another --out"
        ) from error
    except (OSError, RuntimeError) as error:  # a file system without locks
        _log.warning("nothing keeps another run out of %s: %s", folder, error)
    try:
        yield
    finally:
        if lock.is_locked:
            lock.release()


def _locks() -> Path:
    """A folder of this user's own, as another's file could not be opened."""
    place = Path(tempfile.gettempdir()) / f"dk2pnet-locks-{getattr(os, 'getuid', int)()}"
    with suppress(OSError):  # then the lock says so
        place.mkdir(mode=0o700, exist_ok=True)
    return place


def _worth_keeping(folder: Path) -> bool:
    return any(any(folder.rglob(what)) for what in ("closed-form.json", "step-*.safetensors"))


def _enter(folder: Path, overwrite: bool, asked: dict[str, Any]) -> None:
    path = folder / "asked.json"
    if folder.exists() and not path.is_file() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder}, which a run needs for its checkpoints, is not dk2pnet's; give another --out")
    found = json.loads(path.read_text(encoding="utf-8")) if _worth_keeping(folder) else asked
    for key in {**asked, **found}:
        if asked.get(key) != found.get(key) and not overwrite:
            raise InputError(
                f"{folder} holds an unfinished run with {key.replace('_', '-')} {found.get(key)}, this one has "
                f"{asked.get(key)}; repeat the command that began it, give another --out, or --overwrite to drop it"
            )
    try:
        if asked != found or not _worth_keeping(folder):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write_json(path, asked)
    except OSError as error:
        raise InputError(disk_message(folder, error)) from error


def keep_logs(unfinished: Path, folder: Path, made: Path | None = None) -> None:
    """Copy the logs of an unfinished run into the new OUT folder; those of its tuning lie in ``made/tuning``."""
    places = [(unfinished, "log.jsonl", "")]
    if made is not None:
        places.append((made / "tuning", "tuning.jsonl", "tuning"))
    for place, name, below in places:
        if (place / "log.jsonl").exists():
            shutil.copy2(place / "log.jsonl", folder / name)
        if (place / "tensorboard").exists():
            shutil.copytree(place / "tensorboard", folder / "tensorboard" / below, dirs_exist_ok=True)
