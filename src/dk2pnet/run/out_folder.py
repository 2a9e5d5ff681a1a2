"""The OUT folder: it appears whole or not at all, and what was there before is lost only once the new one is whole."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout
from torch import Tensor, nn

from dk2pnet import __version__
from dk2pnet.deploy.export import check_onnx, export_onnx
from dk2pnet.errors import InputError, Refused
from dk2pnet.plan import Plan
from dk2pnet.processes import is_main, wait

__all__ = [
    "check_out",
    "disk_message",
    "keep_logs",
    "new_folder",
    "unfinished",
    "write_json",
    "write_onnx",
    "write_recipe",
]


def check_out(out: str | Path | None, overwrite: bool) -> None:
    """Refuse an OUT that exists or that cannot be written, before any work is done."""
    if out is None:
        return
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


@contextmanager
def unfinished(out: str | Path, overwrite: bool, asked: Mapping[str, Any]) -> Iterator[Path]:
    """The folder ``OUT.unfinished`` of a run that takes long, for checkpoints and logs; gone once the block has ended.

    A run that stops before anything is worth keeping leaves nothing. One that stops later leaves the folder, for the
    same command to go on with. `asked` are the options of the run: a folder that a run with others left is refused, or
    emptied with `overwrite`. A second run is refused while the first is at work.
    """
    out = _named(out)
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
    """No other run is in the folder inside the block; a killed one gives it free."""
    place = folder.with_name(f".{folder.name}.lock")
    lock = FileLock(place)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(
            f"another run is at work in {folder}; wait until it has ended, or give another --out"
        ) from error
    except (OSError, RuntimeError):
        pass  # a file system without locks, or a place that cannot be written to, which is said when it is
    try:
        yield
    finally:
        if lock.is_locked:
            lock.release()
            with suppress(OSError):
                place.unlink()


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


def _named(out: str | Path) -> Path:
    """A path that has a name, as that of the current folder (``.``) has not."""
    out = Path(out)
    return out if out.name else out.absolute()


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


@contextmanager
def new_folder(out: str | Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place when the block ends without an error."""
    out = _named(out)
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


def write_onnx(model: nn.Module, plan: Plan, example: Tensor, path: Path) -> float:
    """Export with normalisation in the metadata; the largest relative difference to PyTorch at batches of 1 and 7."""
    metadata = {
        "dk2pnet": __version__,
        "input_shape": json.dumps(plan.input_shape),
        "normalization": json.dumps(plan.normalization),
    }
    export_onnx(model, example, path, forms=plan.forms, metadata=metadata)
    probes = [
        torch.randn(count, *example.shape[1:], generator=torch.Generator().manual_seed(count)).to(example.dtype)
        for count in (1, 7)
    ]
    try:
        return check_onnx(path, model, probes)
    except RuntimeError as error:
        raise InputError(f"the network was exported, but {error}") from error
