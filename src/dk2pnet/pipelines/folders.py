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

import torch
import yaml
from torch import Tensor, nn

from dk2pnet import __version__
from dk2pnet.deploy.onnx import check_onnx, export_onnx
from dk2pnet.errors import InputError
from dk2pnet.plan import Plan
from dk2pnet.processes import is_main, wait

__all__ = ["check_out", "keep_logs", "new_folder", "unfinished_folder", "write_json", "write_onnx", "write_recipe"]


def check_out(out: str | Path | None, overwrite: bool) -> None:
    """Refuse an OUT that exists, before any work is done."""
    if out is None:
        return
    path = Path(out)
    if path.exists() and not overwrite:
        raise InputError(f"{out} exists; give another --out, or --overwrite to replace it")
    if path.exists() and not (path.is_dir() and ((path / "plan.json").is_file() or not any(path.iterdir()))):
        raise InputError(f"{out} is not a folder that dk2pnet wrote, so it is not replaced; give another --out")


def unfinished_folder(out: str | Path, overwrite: bool, asked: Mapping[str, Any]) -> Path:
    """The folder ``OUT.unfinished`` of a run that takes long: its checkpoints and logs until OUT is written.

    `asked` are the options of the run. A folder that a run with others left is refused, or emptied with `overwrite`.
    """
    out = Path(out)
    folder = out.with_name(f"{out.name}.unfinished")
    asked = json.loads(json.dumps(asked))
    if is_main():
        path = folder / "asked.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else asked
        except json.JSONDecodeError:  # killed while it was written: nothing else is there yet
            found = asked
        for key in {**asked, **found}:
            if asked.get(key) != found.get(key) and not overwrite:
                raise InputError(
                    f"{folder} holds an unfinished run with {key.replace('_', '-')} {found.get(key)}, this one has "
                    f"{asked.get(key)}; repeat the command that began it, give another --out, or --overwrite to drop it"
                )
        if asked != found:
            shutil.rmtree(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(path, asked)
        except OSError as error:
            raise InputError(_disk_message(out, error)) from error
    wait()
    return folder


def keep_logs(unfinished: Path, folder: Path) -> None:
    """Copy the logs of an unfinished run into the new OUT folder."""
    if (unfinished / "log.jsonl").exists():
        shutil.copy2(unfinished / "log.jsonl", folder)
    if (unfinished / "tensorboard").exists():
        shutil.copytree(unfinished / "tensorboard", folder / "tensorboard")


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


def write_onnx(model: nn.Module, plan: Plan, example: Tensor, path: Path) -> float:
    """Export with normalisation in the metadata; the largest relative difference to PyTorch at batches of 1 and 7."""
    metadata = {
        "dk2pnet": __version__,
        "input_shape": json.dumps(plan.input_shape),
        "normalization": json.dumps(plan.normalization),
    }
    export_onnx(model, example, path, metadata=metadata)
    probes = [
        torch.randn(count, *example.shape[1:], generator=torch.Generator().manual_seed(count)) for count in (1, 7)
    ]
    return check_onnx(path, model, probes)
