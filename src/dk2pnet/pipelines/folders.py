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

__all__ = ["check_out", "new_folder", "write_json", "write_recipe"]


def check_out(out: str | Path | None, overwrite: bool) -> None:
    """Refuse an OUT that exists, before any work is done."""
    if out is None:
        return
    path = Path(out)
    if path.exists() and not overwrite:
        raise InputError(f"{out} exists; give another --out, or --overwrite to replace it")
    if path.exists() and not (path.is_dir() and ((path / "plan.json").is_file() or not any(path.iterdir()))):
        raise InputError(f"{out} is not a folder that dk2pnet wrote, so it is not replaced; give another --out")


@contextmanager
def new_folder(out: str | Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place when the block ends without an error."""
    out = Path(out)
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
            raise InputError(_disk_message(out, error)) from error
        raise


def _disk_message(out: Path, error: BaseException) -> str:
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    if full:
        return (
            f"the disk is full: {out} could not be written and nothing of it was left; free space or give another --out"
        )
    return f"{out} could not be written ({error}); give an --out that can be"


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Indented JSON."""
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def write_recipe(path: Path, command: str, options: Mapping[str, Any]) -> None:
    """The options of a command, complete, for ``--recipe``."""
    text = f"# dk2pnet {command} --recipe THIS_FILE --out NEW_FOLDER repeats the run\n"
    path.write_text(text + yaml.safe_dump(dict(options), sort_keys=False), encoding="utf-8")
