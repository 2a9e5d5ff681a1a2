"""Small runs of the commands, and the figures of them that no rebuilding of the code may change.

    OMP_NUM_THREADS=1 python tests/goldens/runs.py --record

writes them to goldens.json. Times, and what depends on times (forms, sizes of files), are left out. Training
on another kind of processor rounds otherwise and ends elsewhere: record there first, with the code before the change.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # as pytest has it

import numpy as np
import onnxruntime
import pytest
import torch
import yaml

from functional import command_line
from functional.command_line import here, works
from graphs import save, small, weights
from timing import still

GOLDENS = Path(__file__).with_name("goldens.json")
DIGITS = ["--data", "digits"]
COMMON = ["--threads", 1, "--device", "cpu", "--seed", 0]
FP32 = ["--precision", "fp32"]  # `auto` is bf16 on some processors


@dataclass(frozen=True)
class Run:
    """A command, without --out; the runs that it reads; and, of an ONNX file in, the shape that its output is fed."""

    args: tuple
    needs: tuple[str, ...] = ()
    fed: tuple[int, ...] | None = None


def _train(*args, needs=()):
    return Run(("train", *DIGITS, *args, *COMMON, *FP32), needs)


def _compress(*args, teacher="teacher", data=DIGITS, command="compress"):
    return Run((command, "--model", teacher, *data, *args, *COMMON, *FP32), (teacher,))


def _of_onnx(model, data, *args, needs=(), fed):
    return Run(("compress", "--model", model, "--data", data, *args, "--threads", 1, "--seed", 0), needs, fed)


def _evaluate(model, needs):
    return Run(("evaluate", "--model", model, *DIGITS, "--threads", 1), (needs,))


FEW = ["--calibration-images", 300]
# One layer of the small network: searches are quick.
ONE = ["--keep", "features.6", "--calibration-images", 200]
ONE_BLOCK = ["--keep", "layer1.1", "--keep", "layer1.2", "--keep", "layer2", "--keep", "layer3"]

RUNS = {
    "teacher": _train("--model", "lenet", "--epochs", 2, "--lr", 0.1, "--batch-size", 16),
    "resnet": _train("--model", "resnet20", "--epochs", 1, "--images", 640, "--lr", 0.1, "--batch-size", 16),
    "student": _train("--model", "dk2pnet-8x8", "--teacher", "teacher", "--epochs", 1, needs=("teacher",)),
    "loss": _compress("--budget", "macs=0.5", "--tune", 0, *FEW),
    "response": _compress("--budget", "params=0.2", "--criterion", "response", "--tune", 20, *FEW),
    "response-int8": _compress("--budget", "params=0.5", "--criterion", "response", "--tune", 5, "--int8", *FEW),
    "weight": _compress("--budget", "kernels=2", "--criterion", "weight", "--input-size", 32, data=()),
    "drop": _compress("--budget", "drop=12", "--tune", 3, "--holdout-split", "test[:60%]", *ONE),
    "disagree": _compress("--budget", "disagree=4", "--tune", 0, "--no-rebuild", *ONE),
    "error": _compress("--budget", "error=0.02", "--tune", 3, *ONE),
    "kp": _compress("--budget", "macs=0.3", "--epochs", 1, "--method", "kp-channel", "--no-rebuild", *FEW),
    "resnet-loss": _compress("--budget", "macs=0.9", "--tune", 5, *ONE_BLOCK, *FEW, teacher="resnet"),
    "explore": _compress("--budget", "macs=0.75", "--budget", "macs=0.61", "--tune", 5, *ONE, command="explore"),
    "npz": _of_onnx("small.onnx", "inputs.npz", "--budget", "kernels=2", fed=(2, 3, 12, 10)),
    "onnx": _of_onnx(
        "teacher/model.onnx", "digits", "--budget", "macs=0.2", "--tune", 30, *FEW, needs=("teacher",), fed=(2, 1, 8, 8)
    ),
    "evaluate": _evaluate("loss", "loss"),
    "evaluate-onnx": _evaluate("onnx/model.onnx", "onnx"),
}


# -- what is recorded --------------------------------------------------------------------------------------------------

# Times, sizes of files (by the forms of layers, which are chosen by time), and the machine.
_LEFT_OUT = re.compile(
    r"seconds|latency.*|.*_ms|onnx_bytes|bytes|versions|hardware|command|form|onnx_difference|pt2_difference"
)
_NOTES_LEFT_OUT = ("unsteady while times were taken", "run as one dense convolution")
_MAY_BE_PATHS = ("model", "teacher", "data", "weights", "teacher_weights", "data_dir", "calibration_data", "holdout")


def _kept(value):
    if isinstance(value, dict):
        return {key: _kept(each) for key, each in value.items() if not _LEFT_OUT.fullmatch(key)}
    if isinstance(value, list):
        said = [each for each in value if not any(note in str(each) for note in _NOTES_LEFT_OUT)]
        return [_kept(each) for each in (said if all(isinstance(each, str) for each in value) else value)]
    return value


def _recipe(path, place):
    options = yaml.safe_load(path.read_text())
    paths = [key for key in _MAY_BE_PATHS if options.get(key) and (place / options[key]).exists()]
    return {key: value for key, value in options.items() if key not in paths and key != "out"}


def _outputs(path, shape):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    found = session.run(None, {session.get_inputs()[0].name: x})
    return [[float(f"{value:.4g}") for value in output.flatten()] for output in found]


def _figures(run, out, place, answer):
    if run.args[0] == "evaluate":
        return {"said": re.sub(r", bytes [\d,]+", "", answer.out.strip())}
    found = {"metrics": _kept(json.loads((out / "metrics.json").read_text()))}
    found["recipe"] = _recipe(out / "recipe.yaml", place)
    if (out / "plan.json").exists():
        plan = _kept(json.loads((out / "plan.json").read_text()))
        found["plan"] = {key: value for key, value in plan.items() if key != "weights_hash"}
    if (out / "model.safetensors").exists():
        found["weights"] = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    if run.fed is not None:
        found["outputs"] = _outputs(out / "model.onnx", run.fed)
    return found


def machine():
    """What the last bits of weights depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor()
    return {"processor": processor, "kernels": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__}


class Runs:
    """The figures of runs in a folder; each is made once, after those that it reads."""

    def __init__(self, place):
        self.place, self.found, self.seconds = place, {}, {}
        save(small(), place, "small.onnx")
        np.savez(place / "inputs.npz", x=weights(20, 3, 12, 10, seed=1))

    def __getitem__(self, name):
        if name in self.found:
            return self.found[name]
        run = RUNS[name]
        for each in run.needs:
            self[each]
        out, start = self.place / name, time.perf_counter()
        args = run.args if run.args[0] == "evaluate" else (*run.args, "--out", name)
        with pytest.MonkeyPatch.context() as patch:
            # Every network takes a millisecond, so that no time decides on a form.
            patch.setattr(command_line, "quick", still)
            patch.setenv("DK2PNET_CACHE", str(self.place / "cache"))
            answer = works(here, *args, cwd=self.place)
        self.seconds[name] = time.perf_counter() - start
        self.found[name] = json.loads(json.dumps(_figures(run, out, self.place, answer)))
        return self.found[name]


# -- comparison --------------------------------------------------------------------------------------------------------


def flat(value, path=""):
    """`value` as leaves by their path; what has a name is called by it."""
    if isinstance(value, dict) and value:
        parts = [(f"{path}.{key}" if path else key, each) for key, each in value.items()]
    elif isinstance(value, list) and any(isinstance(each, (dict, list)) for each in value):
        names = [each.get("name", "") if isinstance(each, dict) else "" for each in value]
        parts = [(f"{path}[{n} {names[n]}]".replace(" ]", "]"), each) for n, each in enumerate(value)]
    else:
        return {path: value}
    return {key: leaf for where, each in parts for key, leaf in flat(each, where).items()}


def _same(one, other):
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if float in (type(one), type(other)) and {type(one), type(other)} <= {int, float}:
        return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-9)
    return type(one) is type(other) and one == other


def differences(golden, found, same_machine=True):
    """A line for each figure that differs; weights only count on the machine that recorded them."""
    before, after = flat(golden), flat(found)
    lines = []
    for key in dict.fromkeys([*before, *after]):
        if key not in after or key not in before:
            side = "is gone" if key in before else "is new"
            lines.append(f"{key} {side}: {before.get(key, after.get(key))!r}")
        elif (key != "weights" or same_machine) and not _same(before[key], after[key]):
            lines.append(f"{key}: {before[key]!r} -> {after[key]!r}")
    return lines


def _text(goldens):
    """JSON with a line for each list of numbers."""
    text = json.dumps(goldens, indent=1)
    return re.sub(r"\[[^][{}\"]*\]", lambda found: " ".join(found[0].split()), text) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--record", action="store_true", help="write goldens.json; without: only compare")
    record = parser.parse_args().record
    goldens = {} if record else json.loads(GOLDENS.read_text())
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(Path(folder))
        for name in RUNS:
            found = runs[name]
            print(f"{name}: {runs.seconds[name]:.1f} s", flush=True)
            for line in [] if record else differences(goldens["runs"][name], found, goldens["machine"] == machine()):
                print(f"   {line}")
    print(f"together {sum(runs.seconds.values()):.0f} s")
    if record:
        GOLDENS.write_text(_text({"machine": machine(), "runs": runs.found}))


if __name__ == "__main__":
    main()
