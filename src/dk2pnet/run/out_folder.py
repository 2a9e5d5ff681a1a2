"""The OUT folder: it appears whole or not at all, and what was there before is lost only once the new one is whole."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from dk2pnet.errors import InputError
from dk2pnet.plan import Plan

__all__ = ["check_out", "disk_message", "named", "new_folder", "write_json", "write_recipe"]


def check_out(out: str | Path | None, overwrite: bool) -> None:
    """Refuse an OUT that exists or that cannot be written, before any work is done."""
    if out is None:
        return
    if not isinstance(out, str | os.PathLike):
        raise InputError(
            f"out is of type {type(out).__name__}; expected the path of a folder, or None to write nothing"
        )
    path = Path(out)
    if path.exists() and not overwrite:
        raise InputError(f"{out} exists; give another --out, or --overwrite to replace it")
    if path.exists() and not (path.is_dir() and (_is_ours(path) or not any(path.iterdir()))):
        raise InputError(f"{out} is not a folder that dk2pnet wrote, so it is not replaced; give another --out")
    if path.is_symlink() and not path.exists():
        raise InputError(f"{out} is a link to what does not exist; give another --out")
    place = next(each for each in path.absolute().parents if each.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        reason = "which cannot be written to" if place.is_dir() else "which is no folder"
        raise InputError(f"{out} would lie in {place}, {reason}; give another --out")


def _is_ours(folder: Path) -> bool:
    """Whether a command of ours wrote the folder: others have files of these names too."""
    try:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        return "dk2pnet" in metrics["run"]["versions"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    try:
        Plan.load(folder / "plan.json")
    except InputError:
        return False
    return True


def named(out: str | Path) -> Path:
    """A path that has a name, as that of the current folder (``.``) has not."""
    out = Path(out)
    return out if out.name else out.absolute()


@contextmanager
def new_folder(out: str | Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place when the block ends without an error."""
    out = named(out)
    check_out(out, overwrite)
    temporary: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        temporary.chmod(0o755)
        yield temporary
        if out.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{out.name}-old-", dir=out.parent))
            os.replace(out, old / "out")
            try:
                os.replace(temporary, out)
            except BaseException:
                os.replace(old / "out", out)
                raise
            finally:
                shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(temporary, out)
    except BaseException as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) or "No space left" in str(error):
            raise InputError(disk_message(out, error)) from error
        raise


def disk_message(out: Path, error: BaseException) -> str:
    """One sentence about an error of the file system."""
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    if full:
        return (
            f"the disk is full: {out} could not be written and nothing of it was left; free space or give another --out"
        )
    return f"{out} could not be written ({error}); give an --out that can be"


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Indented JSON; the file appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_recipe(path: Path, command: str, options: Mapping[str, Any]) -> None:
    """The options of a command, complete, for ``--recipe``."""
    text = f"# dk2pnet {command} --recipe THIS_FILE --out NEW_FOLDER repeats the run\n"
    path.write_text(text + yaml.safe_dump(dict(options), sort_keys=False), encoding="utf-8")
