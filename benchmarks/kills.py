"""Kill a training run with SIGKILL at random moments, restart it each time, and compare with an undisturbed run.

    python benchmarks/kills.py [--kills 20] [--epochs 60] [--seed 0]

A VGG-8 student of another VGG-8 on scikit-learn's digits, KP + KD, a checkpoint every 0.05 s, so that many kills hit
while one is being written. Then the newest checkpoint of an interrupted run is cut short and another one's bytes are
changed, and both runs have to end alike too. Writes benchmarks/results/kills.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dk2pnet.pipelines.inputs import environment, pick_device

RESULTS = Path(__file__).parent / "results"


def command(out: Path, teacher: Path | None, epochs: int, threads: int) -> list[str]:
    options = ["--model", "vgg8", "--data", "digits", "--epochs", str(epochs), "--out", str(out)]
    options += ["--threads", str(threads)]
    if teacher is not None:
        options += ["--teacher", str(teacher), "--lr", "0.02", "--checkpoint-every", "0.05"]
    return [sys.executable, "-m", "dk2pnet", "train", *options]


def finish(call: list[str]) -> str:
    """Run to the end; what it said."""
    result = subprocess.run(call, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(result.stderr)
    return result.stderr


def digest(out: Path) -> str:
    return hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()


def kill_after(call: list[str], seconds: float) -> bool:
    """Start and kill; whether it was still running."""
    process = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return True


def state(out: Path) -> tuple[int, bool]:
    """The newest checkpoint's step, and whether one was being written."""
    folder = out.with_name(f"{out.name}.unfinished") / "checkpoints"
    names = sorted(path.name for path in folder.glob("step-*.safetensors"))
    return int(names[-1].split("-")[1]) if names else 0, any(folder.glob(".step-*.part"))


def damaged(call: list[str], out: Path, damage: str, seconds: float) -> tuple[str, str]:
    """Kill once, damage the newest checkpoint, run to the end; what it said of the checkpoint, and the weights."""
    while len(list((out.with_name(f"{out.name}.unfinished") / "checkpoints").glob("step-*.safetensors"))) < 2:
        kill_after(call, seconds)
    path = max((out.with_name(f"{out.name}.unfinished") / "checkpoints").glob("step-*.safetensors"))
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    else:
        data[-1000] ^= 1
    path.write_bytes(data)
    said = finish(call)
    return next(line for line in said.splitlines() if path.name in line).replace(str(out.parent), ""), digest(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    moments = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        teacher = root / "teacher"
        finish(command(teacher, None, 3, options.threads))
        start = time.perf_counter()
        finish(command(root / "undisturbed", teacher, options.epochs, options.threads))
        whole = time.perf_counter() - start
        wanted = digest(root / "undisturbed")
        finish(command(root / "again", teacher, options.epochs, options.threads))
        print(f"undisturbed: {whole:.0f} s, {wanted[:16]}; again: {digest(root / 'again')[:16]}", flush=True)

        out, kills = root / "killed", []
        call = command(out, teacher, options.epochs, options.threads)
        while len(kills) < options.kills and not out.exists():
            # From before the first step to well into the training; a start costs seconds.
            if kill_after(call, moments.uniform(0.3, 1.0) * whole / 3):
                step, writing = state(out)
                kills.append({"step": step, "while_writing": writing})
                print(
                    f"kill {len(kills)}: newest checkpoint at step {step}{', writing one' if writing else ''}",
                    flush=True,
                )
        finish(call) if not out.exists() else None
        result = {
            "kills": kills,
            "undisturbed": wanted,
            "again": digest(root / "again"),
            "killed": digest(out),
            "left_behind": sorted(path.name for path in root.iterdir()),
        }
        for damage in ("cut", "changed"):
            call = command(root / damage, teacher, options.epochs, options.threads)
            said, found = damaged(call, root / damage, damage, whole / 3)
            result[damage] = {"said": said, "weights": found}
            print(f"checkpoint {damage}: {said}; {found[:16]}", flush=True)
    result["identical"] = all(
        each == wanted
        for each in (result["again"], result["killed"], result["cut"]["weights"], result["changed"]["weights"])
    )
    result |= environment(pick_device("auto"))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "kills.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{len(kills)} kills; weights identical: {result['identical']}")


if __name__ == "__main__":
    main()
