"""How the tests run the commands, and what a run writes."""

import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from dk2pnet import cli
from timing import quick, time_by

FILES = {"plan.json", "model.safetensors", "model.onnx", "metrics.json", "report.html", "recipe.yaml"}
LOGS = {"log.jsonl", "tensorboard"}  # of a training


@dataclass
class Answer:
    code: int
    out: str
    err: str


def shell(*args, cwd):
    """The console script in a fresh process, without a network."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "hf"), "COLUMNS": "200"}
    command = [sys.executable, "-m", "dk2pnet.cli", *map(str, args)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    return Answer(done.returncode, done.stdout, done.stderr)


def here(*args, cwd):
    """The same entry point in this process; latencies are measured for a moment only."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(cwd)
        patch.setenv("COLUMNS", "200")
        patch.setattr(sys, "argv", ["dk2pnet", *map(str, args)])
        time_by(quick, patch)
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
    return Answer(code, out.getvalue(), err.getvalue())


def works(run, *args, cwd):
    answer = run(*args, cwd=cwd)
    assert answer.code == 0, answer.err
    return answer


def snapshot(folder):
    """Every file and folder under `folder` with a hash of its content; Python's byte code is not ours."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
        if "__pycache__" not in path.parts and "hf" not in path.relative_to(folder).parts[:1]
    }


def error_of(answer):
    """The one sentence of a refusal."""
    assert answer.code == 2, answer.err
    assert "Traceback" not in answer.out + answer.err
    lines = [line for line in answer.err.splitlines() if line.strip()]
    assert lines[-1].startswith("Error: ")
    assert answer.err.count("Error: ") == 1
    return lines[-1]


def figures(folder):
    return json.loads((folder / "metrics.json").read_text())


def accuracy_in(answer):
    return float(answer.out.partition("accuracy ")[2].split()[0])


def teach(folder, run=here):
    """Train a small network on digits into ``teacher/``; what the command answered."""
    options = ["--model", "lenet", "--data", "digits", "--epochs", 3, "--lr", 0.05, "--batch-size", 16]
    return works(run, "train", *options, "--out", "teacher", cwd=folder)


def noise(folder, count, shape):
    """Images of three kinds, each in a folder of its own, of which none shows anything."""
    rng = np.random.default_rng(0)
    for number in range(count):
        kind = folder / f"kind{number % 3}"
        kind.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(kind / f"{number}.png")
