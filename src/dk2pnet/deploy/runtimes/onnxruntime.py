"""ONNX Runtime, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from dk2pnet.data.arrays import Feed
from dk2pnet.deploy.runtimes.target import Example, Target, as_array, register
from dk2pnet.errors import InputError, first_line
from dk2pnet.memory import give_back

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["OnnxRuntime", "OnnxRuntimeInt8", "run_onnx", "session"]


class OnnxRuntime(Target):
    """An ONNX file."""

    name = "onnxruntime"
    reads_onnx = True
    package = "onnxruntime"

    def load(self, network: str | Path | bytes, example: Example, threads: int | None) -> Callable[[], object]:
        """As `Target.load`."""
        running = session(network, threads, as_deployed=True)
        if isinstance(example, Feed):
            arrays = example.arrays
            return lambda: running.run(None, arrays)
        array = as_array(example)
        name = running.get_inputs()[0].name
        return lambda: running.run(None, {name: array})


class OnnxRuntimeInt8(OnnxRuntime):
    """The same; its files are quantised before they come here."""

    name = "onnxruntime-int8"
    quantized = True


def session(
    source: str | Path | bytes, threads: int | None = None, name: str = "the network", as_deployed: bool = False
) -> onnxruntime.InferenceSession:
    """Load an ONNX file, or its content, into ONNX Runtime on the CPU with `threads` threads (None: one per core).

    `name` stands for a content in errors. `as_deployed`: with ONNX Runtime's own settings, as it is timed; else without
    the plan that it makes of all tensors' places, which takes twice the memory at large sizes and no less time.

    Raises
    ------
    InputError
        When the file is not there or ONNX Runtime cannot load it.
    """
    if threads is not None and threads < 1:
        raise InputError(f"threads is {threads}; expected 1 or more")
    if isinstance(source, bytes):
        return _session(source, threads, name, as_deployed)
    path = Path(source)
    if not path.is_file():
        raise InputError(f"{path} does not exist; expected an ONNX file")
    return _session(str(path), threads, str(path), as_deployed)


def run_onnx(session: onnxruntime.InferenceSession, x: Tensor | np.ndarray | Feed) -> list[np.ndarray]:
    """Run a network of one input on ``x (B, C, H, W)``, or of several on a `Feed`; all outputs in order.

    They are copies: what ONNX Runtime hands out lies among all that the session has taken, which none of it leaves as
    long as one output is kept.
    """
    arrays = x.arrays if isinstance(x, Feed) else {session.get_inputs()[0].name: as_array(x)}
    return [each.copy() if isinstance(each, np.ndarray) else each for each in session.run(None, arrays)]


def _session(model: str | bytes, threads: int | None, name: str, as_deployed: bool) -> onnxruntime.InferenceSession:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    # By default the threads keep spinning after a run, for up to a second: they would slow down whatever comes next,
    # and when sessions are timed in turns that is the other network.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.enable_mem_pattern = as_deployed
    if threads is not None:
        options.intra_op_num_threads = threads
    give_back()  # what the session before this one held
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise InputError(f"{name} cannot be loaded by ONNX Runtime: {first_line(error)}") from error


register(OnnxRuntime())
register(OnnxRuntimeInt8())
