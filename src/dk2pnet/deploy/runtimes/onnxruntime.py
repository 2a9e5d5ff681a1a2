"""ONNX Runtime, on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
from torch import Tensor

from dk2pnet.data.arrays import Feed
from dk2pnet.errors import InputError, first_line

__all__ = ["run_onnx", "session"]


def session(
    source: str | Path | bytes, threads: int | None = None, name: str = "the network"
) -> onnxruntime.InferenceSession:
    """Load an ONNX file, or its content, into ONNX Runtime on the CPU with `threads` threads (None: one per core).

    `name` stands for a content in errors.

    Raises
    ------
    InputError
        When the file is not there or ONNX Runtime cannot load it.
    """
    if threads is not None and threads < 1:
        raise InputError(f"threads is {threads}; expected 1 or more")
    if isinstance(source, bytes):
        return _session(source, threads, name)
    path = Path(source)
    if not path.is_file():
        raise InputError(f"{path} does not exist; expected an ONNX file")
    return _session(str(path), threads, str(path))


def run_onnx(session: onnxruntime.InferenceSession, x: Tensor | np.ndarray | Feed) -> list[np.ndarray]:
    """Run a network of one input on ``x (B, C, H, W)``, or of several on a `Feed`; all outputs in order."""
    if isinstance(x, Feed):
        return session.run(None, x.arrays)
    array = x.detach().cpu().numpy() if isinstance(x, Tensor) else x
    return session.run(None, {session.get_inputs()[0].name: np.ascontiguousarray(array)})


def _session(model: str | bytes, threads: int | None, name: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    # By default the threads keep spinning after a run, for up to a second: they would slow down whatever comes next,
    # and when sessions are timed in turns that is the other network.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise InputError(f"{name} cannot be loaded by ONNX Runtime: {first_line(error)}") from error
