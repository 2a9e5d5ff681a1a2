"""What an OUT folder holds: the network ready to deploy, checked and timed, its int8 and torch.export forms where they
are asked for, every figure, and the page."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dk2pnet.answers import Predictions
from dk2pnet.data.arrays import Feed
from dk2pnet.data.samples import Batches, Samples
from dk2pnet.deploy.costs import LatencyTable
from dk2pnet.deploy.emit import plain_model
from dk2pnet.deploy.latency import compare_latency, conditions, latency_figures
from dk2pnet.deploy.quantize import quantize_onnx
from dk2pnet.deploy.runtimes.onnxruntime import run_onnx, session
from dk2pnet.errors import InputError, first_line
from dk2pnet.measure import outputs_of
from dk2pnet.networks.network import Network
from dk2pnet.networks.onnx.network import count_macs
from dk2pnet.networks.torch.network import TorchNetwork
from dk2pnet.options import CompressOptions
from dk2pnet.plan import LayerPlan, Plan
from dk2pnet.report.page import write_page
from dk2pnet.run.out_folder import new_folder, write_json, write_recipe
from dk2pnet.run.run import Run
from dk2pnet.run.unfinished import keep_logs
from dk2pnet.students.latency_budget import choose_forms
from dk2pnet.students.teacher import Teacher
from dk2pnet.tasks import accuracy, agreement, has_accuracy, squared_error

__all__ = ["deliver", "notes_of_file", "write_int8", "write_pt2"]

INT8, PT2 = "model.int8.onnx", "model.pt2"
# Ranges of activations settle after a few hundred images; the quantiser keeps every activation of each of its batches.
_CALIBRATION_IMAGES = 256
_SLOWER = 0.02  # more of the teacher's time than this is slower
_FILLED = 0.02  # more multiply-adds than the plan's are worth a note


def deliver(
    out: Path,
    teacher: Teacher,
    student: Network,
    plan: Plan,
    metrics: dict[str, Any],
    recipe: Mapping[str, Any],
    logs: tuple[Path, Path | None] | None,
    run: Run,
) -> None:
    """Choose forms, write, check, measure. `logs`: the folder of the unfinished run, and where its tuning lies."""
    network, samples, options, clock = teacher.network, teacher.samples, teacher.options, run.clock
    assert isinstance(options, CompressOptions)
    target, threads = teacher.target, run.threads
    with new_folder(out, options.overwrite) as folder:
        run.progress("exporting", 0, 0)
        with clock("choosing forms"):
            table = LatencyTable(target, threads, progress=lambda done, of: run.progress("timing layers", done, of))
            sites = {name: site for name, site in teacher.open_sites.items() if name not in plan.forms}
            forms = choose_forms(student, sites, table)
        for layer in plan.layers:
            layer.form = forms.get(layer.name, layer.form)
        difference, files, times = _write_fastest(folder, teacher, student, plan, run)
        metrics["student"]["onnx_difference"] = difference
        for side, content in files.items():
            metrics[side]["onnx_bytes"] = len(content)
            metrics[side] |= times[side]
            metrics[side]["onnx_macs"] = count_macs(content, network.example, run.threads)
        counted = metrics["teacher"]["onnx_macs"], metrics["student"]["onnx_macs"]
        metrics["notes"] = [*metrics["notes"], *notes_of_file(plan, times, counted)]
        if not times["student"].get("latency_told", True) and metrics["latency_search"]:
            measured = metrics["latency_search"][-1]
            metrics["notes"].append(
                f"the budget of time was searched on that machine (at the end {measured['measured']:.2f} of the "
                f"teacher's time, between {measured['interval'][0]:.2f} and {measured['interval'][1]:.2f}): search "
                "again where nothing else runs"
            )
        metrics["run"]["latency"] = conditions(target, network.example, threads)
        for layer, figures in zip(plan.layers, metrics["layers"], strict=True):
            figures["form"] = layer.form
        if samples is not None and (options.int8 or target == "onnxruntime-int8"):
            with clock("int8"):
                fixed = network.batching.fixed
                metrics["int8"] = write_int8(files, folder, samples, network.example, run, fixed, teacher.task)
            if target == "onnxruntime-int8":
                _take_int8(metrics)
            if "relative_error" in (row := metrics["int8"][-1]):  # the table has no column for it
                metrics["notes"].append(
                    f"{INT8}: its outputs differ from the teacher's by {row['relative_error']:.2f} % (root mean "
                    "square, relative)"
                )
        if options.pt2:
            assert isinstance(student, TorchNetwork)
            with clock("pt2"):
                example = student.example.cpu()
                metrics["student"]["pt2_difference"] = write_pt2(student.model, plan.forms, example, folder / PT2)
        write_json(folder / "metrics.json", metrics)
        write_recipe(folder / "recipe.yaml", "compress", recipe)
        write_page(metrics, folder / "report.html")
        if logs is not None:
            keep_logs(logs[0], folder, logs[1])


_Written = tuple[float | None, dict[str, bytes], dict[str, dict[str, Any]]]


def _write_fastest(folder: Path, teacher: Teacher, student: Network, plan: Plan, run: Run) -> _Written:
    """Write the student in the plan's forms; where it is slower than its teacher so, and faster as dense convolutions,
    in these: layers that are faster one by one need not be so together.

    Returns how far the file is from the network, both files, and the figures of their times.
    """
    network, target, clock = teacher.network, teacher.target, run.clock
    with clock("export"):
        dense = network.onnx({})

    def attempt() -> _Written:
        with clock("export"):
            difference = student.save(folder, plan, teacher.samples, run)
            files = {"teacher": dense, "student": (folder / "model.onnx").read_bytes()}
        timed: Mapping[str, Any] = files
        if target not in ("onnxruntime", "openvino"):
            timed = {"teacher": network.deployable(target, {}), "student": student.deployable(target, plan.forms)}
        run.progress("measuring latency", 0, 0)
        with clock("latency"):
            found = compare_latency(timed, network.example, target=target, threads=run.threads)
        return difference, files, latency_figures(found)

    chosen = attempt()
    forms = {layer.name: layer.form for layer in plan.layers}
    folded = _folded(plan)
    if not folded or not is_slower(chosen[2]):
        return chosen
    for layer in folded:
        layer.form = "folded"
    other = attempt()
    if other[2]["student"]["latency_ratio"] < chosen[2]["student"]["latency_ratio"]:
        return other
    for layer in plan.layers:
        layer.form = forms[layer.name]
    with clock("export"):
        student.save(folder, plan, teacher.samples, run)
    return chosen


def notes_of_file(
    plan: Plan, timed: Mapping[str, Mapping[str, Any]], counted: tuple[int | None, int | None] = (None, None)
) -> list[str]:
    """What a reader of the multiply-adds and the times has to know of the file that was written; `counted`: the
    multiply-adds of the dense file, and of that one."""
    notes = []
    chosen = [layer.form for layer in plan.layers if layer.counts is not None and layer.form is not None]
    if "folded" in chosen:
        notes.append(
            f"{chosen.count('folded')} of {len(chosen)} layers of dominant kernels run as one dense convolution in "
            "model.onnx, which is faster there; the multiply-adds are those of their kernels"
        )
    elif None not in counted and plan.macs and plan.macs_dense:
        added = counted[1] - counted[0] - (plan.macs - plan.macs_dense)  # type: ignore[operator]
        if added > _FILLED * plan.macs:
            notes.append(
                f"model.onnx does {added / plan.macs:.0%} more multiply-adds than the kernels ask for: groups of them "
                "are filled up with zeros, which is faster there"
            )
    if any(timed[side]["latency_noisy"] for side in ("teacher", "student")):
        notes.append("the machine was unsteady while times were taken: do not trust small differences of latency")
    elif is_slower(timed):
        notes.append(
            f"the student is slower than the teacher here ({timed['student']['latency_ratio']:.2f} of its time), "
            "though it multiplies less: a budget of measured time (latency=0.7) spends where it pays"
        )
    return notes


def is_slower(times: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether the student takes longer than the teacher, beyond what the measurement leaves open."""
    student = times["student"]
    return student.get("latency_told", False) and student["latency_ratio_interval"][0] > 1 + _SLOWER


def _folded(plan: Plan) -> list[LayerPlan]:
    """The layers of dominant kernels that do not run as one dense convolution yet."""
    return [layer for layer in plan.layers if layer.counts is not None and layer.form not in (None, "folded")]


def _take_int8(metrics: dict[str, Any]) -> None:
    """Accuracy and agreement of the int8 networks beside their times: what runs is what is judged."""
    for row in metrics["int8"]:
        if row["numbers"] == "int8":
            metrics[row["network"]] |= {"accuracy": row["accuracy"], "agreement": row["agreement"]}
    metrics["notes"].append("accuracy and agreement are those of the int8 networks, as the times are")


def write_int8(
    files: Mapping[str, bytes],
    folder: Path,
    samples: Samples,
    example: Any,
    run: Run,
    whole: bool = False,
    task: str | None = None,
) -> list[dict[str, Any]]:
    """Quantise teacher and student on calibration samples, write the student's int8 file, and compare all four.

    `whole`: the files take whole batches only; `task`: of the teacher.
    Returns one row each: `network`, `numbers` (fp32 or int8), `accuracy` on the test split (None without one),
    `agreement` with the teacher's fp32 answers there, or else on held-out samples (None where the task has no classes,
    and instead the `relative_error` in percent), `bytes`, `latency_ms` in ONNX Runtime.
    """
    contents: dict[tuple[str, str], bytes] = {}
    for name, content in files.items():
        contents[name, "fp32"] = content
        run.progress(f"quantising the {name}", 0, 0)
        contents[name, "int8"] = quantize_onnx(content, _first(samples.gather, _CALIBRATION_IMAGES, whole))
    (folder / INT8).write_bytes(contents["student", "int8"])
    networks = {f"{name} {kind}": content for (name, kind), content in contents.items()}
    times = compare_latency(networks, example, threads=run.threads)
    rows = []
    reference: Predictions | None = None
    on_test: Predictions | None = None
    for (name, kind), content in contents.items():
        held = _predict(content, samples.held_out, run.threads, task)
        reference = reference or held
        right, same = None, agreement(reference, held)
        if samples.test is not None and task == "classify":
            run.progress(f"evaluating: {name} {kind}", 0, 0)
            answers = _predict(content, samples.test, run.threads, task)
            on_test = on_test or answers
            if has_accuracy(answers):
                right, same = accuracy(answers), agreement(on_test, answers)
        row: dict[str, Any] = {"network": name, "numbers": kind, "accuracy": right}
        row |= {"agreement": same, "bytes": len(content)}
        row |= {"latency_ms": times[f"{name} {kind}"].median_ms}
        if row["agreement"] is None:
            row["relative_error"] = 100 * squared_error(reference, held) ** 0.5
        rows.append(row)
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
        raise InputError(
            f"the student cannot be exported with torch.export ({first_line(error)}); leave --pt2 away"
        ) from error
    with torch.no_grad():
        expected = plain(x)
    pairs = zip(outputs_of(found), outputs_of(expected), strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in pairs)


def _first(batches: Batches, most: int, whole: bool) -> Iterable[Any]:
    """Inputs of so many samples (or a few more, in `whole` batches), else 32 at once at most where they are tensors."""
    done = 0
    for x, _ in batches:
        for part in x.split(32) if isinstance(x, Tensor) and not whole else [x]:
            if done >= most:
                return
            part = part if whole else part[: most - done]
            yield part.cpu() if isinstance(part, Tensor) else part
            done += len(part)


def _predict(content: bytes, batches: Batches, threads: int | None, task: str | None) -> Predictions:
    running = session(content, threads)
    found = Predictions(names=[output.name for output in running.get_outputs()], task=task)
    for x, y in batches:
        inputs = list(x.arrays.values()) if isinstance(x, Feed) else [x]
        found.add(run_onnx(running, x), len(x), y, inputs)
    return found
