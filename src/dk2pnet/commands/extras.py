"""What a run writes beside model.onnx when asked: an int8 file with its figures, and a `torch.export` program."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dk2pnet.deploy.emit import plain_model
from dk2pnet.deploy.latency import compare_latency
from dk2pnet.deploy.quantize import quantize_onnx
from dk2pnet.deploy.runtimes.onnxruntime import run_onnx, session
from dk2pnet.errors import InputError
from dk2pnet.measure import Predictions, accuracy, agreement, is_classifier, outputs_of
from dk2pnet.run.progress import Progress

__all__ = ["INT8", "PT2", "write_int8", "write_pt2"]

INT8, PT2 = "model.int8.onnx", "model.pt2"
# Ranges of activations settle after a few hundred images; the quantiser keeps every activation of each of its batches.
_CALIBRATION_IMAGES = 256

_Batches = Iterable[tuple[Tensor, Tensor | None]]


def write_int8(
    files: Mapping[str, Path],
    folder: Path,
    gather: _Batches,
    held_out: _Batches,
    test: _Batches | None,
    example: Tensor,
    threads: int | None,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Quantise teacher and student on calibration images, write the student's int8 file, and compare all four.

    Returns one row each: `network`, `numbers` (fp32 or int8), `accuracy` on the test split (None without one),
    `agreement` with the teacher's fp32 answers on held-out images, `bytes`, `latency_ms` in ONNX Runtime.
    """
    contents: dict[tuple[str, str], bytes] = {}
    for name, path in files.items():
        contents[name, "fp32"] = path.read_bytes()
        progress(f"quantising the {name}", 0, 0)
        contents[name, "int8"] = quantize_onnx(path, _images(gather, _CALIBRATION_IMAGES))
    (folder / INT8).write_bytes(contents["student", "int8"])
    networks = {f"{name} {kind}": content for (name, kind), content in contents.items()}
    times = compare_latency(networks, example, threads=threads)
    rows = []
    reference: Predictions | None = None
    for (name, kind), content in contents.items():
        running = session(content, threads)
        held = _predict(running, held_out)
        reference = reference or held
        right = None
        if test is not None and is_classifier(held.outputs):
            progress(f"evaluating: {name} {kind}", 0, 0)
            answers = _predict(running, test)
            right = accuracy(answers) if answers.labels is not None else None
        rows.append(
            {
                "network": name,
                "numbers": kind,
                "accuracy": right,
                "agreement": agreement(reference, held),
                "bytes": len(content),
                "latency_ms": times[f"{name} {kind}"].median_ms,
            }
        )
    return rows


def write_pt2(model: nn.Module, forms: Mapping[str, str], example: Tensor, path: Path) -> float:
    """Write the student as a `torch.export` program with a free batch size; the largest relative difference to it."""
    plain = plain_model(model, forms)
    x = example.detach().cpu()[:1].repeat(3, *[1] * (example.dim() - 1))
    try:
        program = torch.export.export(plain, (x[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
        temporary = path.with_name(f".{path.name}.{os.getpid()}.pt2")
        try:
            torch.export.save(program, temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        with torch.no_grad():
            found = torch.export.load(path).module()(x)
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(f"the student cannot be exported with torch.export ({reason}); leave --pt2 away") from error
    with torch.no_grad():
        expected = plain(x)
    pairs = zip(outputs_of(found), outputs_of(expected), strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in pairs)


def _images(batches: _Batches, most: int) -> Iterable[Tensor]:
    done = 0
    for x, _ in batches:
        for part in x.split(32):
            if done >= most:
                return
            yield part[: most - done].cpu()
            done += len(part)


def _predict(running: Any, batches: _Batches) -> Predictions:
    outputs, labels = [], []
    for x, y in batches:
        outputs.append([torch.from_numpy(array) for array in run_onnx(running, x)])
        if y is not None:
            labels.append(y.cpu())
    joined = [torch.cat(parts) for parts in zip(*outputs, strict=True)]
    return Predictions(joined, torch.cat(labels) if len(labels) == len(outputs) else None)
