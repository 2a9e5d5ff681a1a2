"""The device that a run works on, and the machine and versions for the record."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from dk2pnet.errors import InputError
from dk2pnet.processes import join, processor

__all__ = ["environment", "pick_device"]


def pick_device(device: str, threads: int | None = None) -> torch.device:
    """``auto`` takes a GPU where there is one (each of several processes its own); `threads` sets PyTorch's threads."""
    if threads is not None:
        if threads < 1:
            raise InputError(f"threads is {threads}; expected 1 or more")
        torch.set_num_threads(threads)
    if (own := join(device)) is not None:
        return own
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {device!r} cannot be used ({reason}); give --device cpu or leave it away") from error
    return chosen


def environment(device: torch.device) -> dict[str, dict[str, Any]]:
    """Versions and hardware, for the report."""
    versions: dict[str, Any] = {"python": platform.python_version()}
    for package in ("dk2pnet", "torch", "onnx", "onnxruntime", "datasets"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    hardware: dict[str, Any] = {"processor": processor(), "threads": torch.get_num_threads(), "device": str(device)}
    if device.type == "cuda":
        hardware["gpu"] = torch.cuda.get_device_name(device)
    return {"versions": versions, "hardware": hardware}
