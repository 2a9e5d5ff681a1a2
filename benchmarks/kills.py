"""Kill a training run with SIGKILL at random moments, restart it each time, and compare with an undisturbed run.

    python benchmarks/kills.py [--kills 20] [--epochs 60] [--seed 0]

A compressed LeNet beside the dense one on scikit-learn's digits, KP + KD, a checkpoint every 0.05 s; every second kill
comes while one is being written. Then the newest checkpoint of an interrupted run is cut short and another one's bytes
are changed, and both runs have to end alike too. Writes benchmarks/results/kills.json.
"""

from __future__ import annotations

import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import plain_parser, write_results
from dk2pnet.run.device import environment, pick_device


def command(out: Path, epochs: int, threads: int) -> list[str]:
    """Trains the student of the folder that `out` lies in beside its teacher."""
    options = ["--model", out.parent / "student", "--teacher", out.parent / "teacher", "--data", "digits", "--lr", 0.02]
    options += ["--epochs", epochs, "--checkpoint-every", 0.05, "--threads", threads, "--out", out]
    return program("train", *options)


def program(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "dk2pnet", *map(str, arguments)]


def finish(call: list[str]) -> str:
    """Run to the end; what it said."""
    result = subprocess.run(call, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(result.stderr)
    return result.stderr


def digest(out: Path) -> str:
    return hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()


def checkpoints(out: Path) -> list[Path]:
    folder = out.with_name(f"{out.name}.unfinished") / "checkpoints"
    return sorted(folder.glob("step-*.safetensors"))


def newest(out: Path) -> int:
    """The step of the newest checkpoint, 0 without one."""
    found = checkpoints(out)
    return int(found[-1].name.split("-")[1]) if found else 0


def kill_at(call: list[str], out: Path, step: int, delay: float | None) -> dict:
    """Start; kill once a checkpoint of that step or a later one is there; what was there then.

    `delay` seconds later, or (None) as soon as the next one is being written.
    """
    folder = out.with_name(f"{out.name}.unfinished") / "checkpoints"
    process = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and newest(out) < step:
        time.sleep(0.002)
    if delay is not None:
        time.sleep(delay)
    else:
        for left in folder.glob(".step-*.part"):  # by the kill before
            left.unlink()
        while process.poll() is None and not any(folder.glob(".step-*.part")):
            pass
    ended = process.poll() is not None
    process.send_signal(signal.SIGKILL)
    process.wait()
    if ended:
        raise SystemExit(f"the run ended before it could be killed at step {step}: {' '.join(call)}")
    return {"step": newest(out), "while_writing": any(folder.glob(".step-*.part"))}


def damaged(call: list[str], out: Path, damage: str) -> dict:
    """Kill once, damage the newest checkpoint, run to the end; what it said of the checkpoint, and the weights."""
    kill_at(call, out, 100, 0.0)
    path = checkpoints(out)[-1]
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    else:
        data[-1000] ^= 1
    path.write_bytes(data)
    said = next(line for line in finish(call).splitlines() if path.name in line)
    return {"said": said.replace(f"{out.parent}/", ""), "weights": digest(out)}


def main() -> None:
    parser = plain_parser(__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    moments = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        teacher, student = root / "teacher", root / "student"
        finish(program("train", "--model", "lenet", "--data", "digits", "--epochs", 3, "--out", teacher))
        finish(program("compress", "--model", teacher, "--data", "digits", "--budget", "kernels=2", "--out", student))
        finish(command(root / "undisturbed", options.epochs, options.threads))
        wanted = digest(root / "undisturbed")
        finish(command(root / "again", options.epochs, options.threads))
        print(f"undisturbed: {wanted[:16]}; again: {digest(root / 'again')[:16]}", flush=True)

        steps = json.loads((root / "undisturbed" / "log.jsonl").read_text().splitlines()[-1])["step"]
        out, kills = root / "killed", []
        call = command(out, options.epochs, options.threads)
        for step in sorted(moments.randrange(steps - 20) for _ in range(options.kills)):
            # The first ones may come before any checkpoint, while the program starts.
            kills.append(kill_at(call, out, step, None if len(kills) % 2 else moments.uniform(0, 0.2)))
            writing = ", while writing one" if kills[-1]["while_writing"] else ""
            print(f"kill {len(kills)}: newest checkpoint at step {kills[-1]['step']}{writing}", flush=True)
        finish(call)
        result = {
            "steps": steps,
            "kills": kills,
            "undisturbed": wanted,
            "again": digest(root / "again"),
            "killed": digest(out),
        }
        for damage in ("cut", "changed"):
            call = command(root / damage, options.epochs, options.threads)
            result[damage] = damaged(call, root / damage, damage)
            print(f"checkpoint {damage}: {result[damage]}", flush=True)
    result["identical"] = all(
        each == wanted
        for each in (result["again"], result["killed"], result["cut"]["weights"], result["changed"]["weights"])
    )
    result |= environment(pick_device("auto"))
    write_results("kills", result)
    print(f"{len(kills)} kills; weights identical: {result['identical']}")


if __name__ == "__main__":
    main()
