"""Loads and runs a foreign ONNX file in a process of its own, where a crash or a hunger for memory does no harm.

Run as a script by `probe`, without the package, which would take seconds to import: FOLDER holds model.onnx and
feed.npz, and the script writes result.json.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dk2pnet.data.arrays import Feed

__all__ = ["probe"]


def probe(content: bytes, feed: Feed | None, name: str, seconds: float = 300.0) -> None:
    """Prove that ONNX's checker accepts the file and that ONNX Runtime loads it and runs `feed`.

    Raises
    ------
    InputError
        When something refuses it, crashes on it, or does not come to an end within `seconds`; `name` is the file's.
    """
    import numpy as np

    from dk2pnet.errors import InputError

    with tempfile.TemporaryDirectory(prefix="dk2pnet-probe-") as place:
        folder = Path(place)
        (folder / "model.onnx").write_bytes(content)
        if feed is not None:
            arrays: dict[str, Any] = {str(n): array for n, array in enumerate(feed.arrays.values())}
            np.savez(folder / "feed.npz", **arrays)
            (folder / "names.json").write_text(json.dumps(list(feed.arrays)))
        try:
            done = subprocess.run(
                [sys.executable, __file__, place], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            raise InputError(
                f"{name} did not finish one run within {seconds:g} s; give smaller inputs, or another file"
            ) from None
        try:
            result = json.loads((folder / "result.json").read_text())
        except (OSError, ValueError):
            raise InputError(
                f"ONNX Runtime or the ONNX checker crashes on {name} (exit code {done.returncode}); the file is "
                "damaged, or it needs more memory than there is"
            ) from None
    if result["error"]:
        what = {
            "checked": "is not valid ONNX",
            "loaded": "cannot be loaded by ONNX Runtime",
            "run": "cannot be run on the first inputs",
        }
        raise InputError(
            f"{name} {what[result['stage']]}: {result['error'].rstrip('.')}; give a file that runs as it is"
        )


def _limit_memory() -> None:
    """No more address space than the machine has memory: an allocation fails where it would have the process killed."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (total, hard))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main(folder: Path) -> None:
    """Check the model, load it, and run it if there is something to feed it; write what went wrong, or nothing."""
    import numpy as np
    import onnx
    import onnxruntime

    stage, error = "checked", ""
    try:
        onnx.checker.check_model((folder / "model.onnx").read_bytes())
        stage = "loaded"
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
        if (folder / "feed.npz").exists():
            stage = "run"
            with np.load(folder / "feed.npz") as arrays:
                names = json.loads((folder / "names.json").read_text())
                session.run(None, {name: arrays[str(number)] for number, name in enumerate(names)})
    except Exception as problem:
        lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
        error = (lines or [type(problem).__name__])[0]
        # ONNX Runtime puts a code, and the place of this script's copy, before what it has to say.
        error = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : |Load model from \S+ failed:\s*", "", error)
    (folder / "result.json").write_text(json.dumps({"stage": stage, "error": error}))


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose onnx.py would be found in the place of the package
    _limit_memory()
    main(Path(sys.argv[1]))
