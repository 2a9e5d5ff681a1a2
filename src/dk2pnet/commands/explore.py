"""The curve before the choice: what about eight budgets would cost and lose, from moments gathered once."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from dk2pnet import processes
from dk2pnet.data import Normalization
from dk2pnet.decompose.select import cheapest
from dk2pnet.deploy.costs import LatencyTable
from dk2pnet.deploy.latency import check_target, compare_latency, conditions
from dk2pnet.errors import InputError, TooSmall
from dk2pnet.estimates import estimate
from dk2pnet.measure import Predictions, accuracy, agreement, is_classifier, macs, parameters, predict
from dk2pnet.networks.torch.sites import find_convolutions
from dk2pnet.plan import Budget
from dk2pnet.report.curve import write_curve_page
from dk2pnet.run.clock import Clock
from dk2pnet.run.device import environment, pick_device
from dk2pnet.run.out_folder import check_out, new_folder, unfinished, write_json, write_recipe
from dk2pnet.run.progress import Progress, silent
from dk2pnet.run.seed import left_as_found
from dk2pnet.students.allocate import candidates_of
from dk2pnet.students.latency_budget import choose_forms, deployable
from dk2pnet.students.probes import Probe, Prober
from dk2pnet.students.teacher import Prepared, check_options, plain_options, prepare

__all__ = ["compress_command", "default_budgets", "explore", "knee"]

_LARGEST, _SMALLEST = 0.7, 0.08  # of the multiply-adds, between which the budgets are spread evenly in logarithms


@left_as_found()
def explore(
    model: str | nn.Module,
    data: str | Iterable[Any] | None = None,
    criterion: str = "loss",
    *,
    budgets: Sequence[str | Budget] = (),
    points: int = 8,
    weights: str | None = None,
    normalize: str | Normalization | None = None,
    data_dir: str | None = None,
    holdout: str | Iterable[Any] | None = None,
    holdout_split: str | None = None,
    input_size: int | None = None,
    classes: int | None = None,
    keep: Sequence[str] = (),
    first: bool = False,
    calibration_images: int = 2000,
    calibration_data: str | None = None,
    memory: float = 2.0,
    rebuild: bool = True,
    tune: str | int | None = None,
    augment: str | None = None,
    precision: str = "auto",
    checkpoint_every: float = 60.0,
    seed: int = 0,
    device: str = "auto",
    threads: int | None = None,
    target: str = "onnxruntime",
    out: str | Path | None = None,
    overwrite: bool = False,
    command: str | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Accuracy against multiply-adds, parameters and measured latency, closed form and tuned; returns the figures.

    Example::

        found = dk2pnet.explore("resnet32", "cifar10", weights="resnet32.th", normalize="cifar10")
        found["knee"], [(p["budget"], (p["tuned"] or p["closed form"])["value"]) for p in found["points"]]

    The figures are from images that decide on budgets in points in `compress`, and not from the test split unless
    `holdout_split` names a part of it: accuracy where they have labels, else agreement with the teacher, or the
    outputs' error of a network that is no classifier. Returns the content of metrics.json: measure, decided_by,
    teacher, points (in which ``tuned`` is None where tuning was off or not kept), knee, tuning_steps, notes, run.

    Parameters
    ----------
    budgets : ``macs=F``, ``params=F``, ``latency=F`` or ``kernels=K``; without any, `points` shares of the
        multiply-adds
    out : folder to write: metrics.json, report.html, recipe.yaml; None writes nothing. A run that was killed goes on
        after the last point that was done

    The other options are those of `compress`.

    Raises
    ------
    InputError
        One sentence that says what was given, what was expected and what to do.
    """
    asked = dict(locals())
    check_options(criterion, calibration_images, memory, augment)
    check_target(target)
    if isinstance(model, str) and model.lower().endswith(".onnx"):
        raise InputError(f"explore takes no .onnx model such as {model}; compress it with --budget latency=F instead")
    if data is None and calibration_data is None:
        raise InputError("explore measures on images and none were given; give --data")
    given = [Budget.parse(budget) for budget in budgets]
    for budget in given:
        if budget.in_points:
            raise InputError(f"explore shows what budgets lose, and {budget} is a loss; give macs=0.3, or none")
    if points < 2:
        raise InputError(f"points is {points}; expected 2 or more")
    check_out(out, overwrite)
    chosen = pick_device(device, threads)
    clock = Clock()
    ready = prepare(
        model,
        data,
        criterion,
        calibration_data=calibration_data,
        weights=weights,
        normalize=normalize,
        data_dir=data_dir,
        test_data=None,
        holdout=holdout,
        holdout_split=holdout_split,
        example_input=None,
        input_size=input_size,
        classes=classes,
        calibration_images=calibration_images,
        tune=tune,
        epochs=0,
        seed=seed,
        device=chosen,
    )
    recipe = plain_options(asked, ("command", "progress", "overwrite", "out"))
    with ExitStack() as whole:
        folder = None
        if out is not None:
            kept = {key: value for key, value in recipe.items() if key != "checkpoint_every"} | ready.digests()
            folder = whole.enter_context(unfinished(out, overwrite, {"command": "explore", **kept}))
        prober = whole.enter_context(
            ready.prober(
                keep=keep,
                first=first,
                memory=memory,
                rebuild=rebuild,
                augment=augment,
                precision=precision,
                checkpoint_every=checkpoint_every,
                target=target,
                threads=threads,
                folder=folder,
                clock=clock,
                progress=progress,
            )
        )
        wanted = given or _spread(prober, ready, points, folder)
        with clock("evaluate"):
            judge = _Judge(ready)
        timer = _Timer(ready, target, threads, clock) if processes.is_main() else None
        rows = []
        notes = [ready.tuning.said] * bool(ready.tuning.said)
        for number, budget in enumerate(wanted):
            progress(f"exploring {budget}", number, len(wanted))
            try:
                rows.append(_point(budget, prober, judge, timer, clock, folder))
            except TooSmall as error:
                notes.append(str(error))
        if not rows:
            raise TooSmall(notes[-1])
        images = ready.images
        assert images is not None
        images.counts["deciding"] = len(judge.teacher)
        images.counts.pop("test", None)
        rows.sort(key=lambda point: -point["macs_kept"])
        teacher = judge.of_teacher()
        metrics: dict[str, Any] = {
            "measure": judge.name,
            "decided_by": images.decided_by,
            "teacher": {
                "value": teacher,
                "macs": macs(ready.teacher, ready.example),
                "parameters": parameters(ready.teacher),
            },
            "points": rows,
            "knee": knee(rows, teacher, judge.sign),
            "tuning_steps": prober.steps,
            "notes": notes,
            "run": {
                "command": command or "dk2pnet.explore(...)",
                "seed": seed,
                "criterion": criterion,
                "images": images.counts,
                "seconds": clock.seconds,
                "latency": conditions(target, ready.example, threads),
                **environment(chosen),
            },
        }
        if prober.steps:  # a time was turned into so many
            recipe["tune"] = prober.steps
        for point in rows:
            point["command"] = compress_command(recipe, point["budget"])
        if out is not None and processes.is_main():
            with new_folder(Path(out), overwrite) as new:
                write_json(new / "metrics.json", metrics)
                write_recipe(new / "recipe.yaml", "explore", recipe)
                write_curve_page(metrics, new / "report.html")
    return metrics


def default_budgets(least: float, points: int) -> list[Budget]:
    """Shares of the multiply-adds, evenly spread in logarithms from 0.7 down to 0.08 or what can just be reached."""
    low = max(_SMALLEST, least * 1.02)
    if low >= _LARGEST:
        return [Budget("macs", min(math.ceil(low * 100) / 100, 1.0))]
    shares = sorted({float(f"{share:.2g}") for share in np.geomspace(low, _LARGEST, points)}, reverse=True)
    if shares[-1] < low:
        shares[-1] = min(math.ceil(low * 1000) / 1000, 1.0)
    return [Budget("macs", share) for share in shares]


def knee(points: Sequence[Mapping[str, Any]], teacher: float, sign: int) -> str | None:
    """The budget whose point lies farthest from the chord of the curve, on the side of less loss for fewer MACs.

    In (log MACs, figure), each scaled to the chord's ends: the dense teacher and the smallest network. None where no
    point lies on that side.
    """
    curve = [(1.0, teacher, None), *((p["macs_kept"], _best(p), p["budget"]) for p in points)]
    (x0, y0, _), (x1, y1, _) = curve[0], curve[-1]
    if x1 >= x0 or (y0 - y1) * sign <= 0:
        return None
    found, farthest = None, 1e-6
    for x, y, budget in curve[1:-1]:
        along = (math.log(x0) - math.log(x)) / (math.log(x0) - math.log(x1))
        distance = along - (y0 - y) / (y0 - y1)
        if distance > farthest:
            found, farthest = budget, distance
    return found


def compress_command(options: Mapping[str, Any], budget: str) -> str:
    """The command that makes one point's network."""
    words = ["dk2pnet", "compress"]
    left_out = ("budgets", "points", "checkpoint_every", "holdout", "holdout_split")
    usual = {"criterion": "loss", "calibration_images": 2000, "memory": 2.0, "seed": 0, "target": "onnxruntime"}
    usual |= {"precision": "auto", "device": "auto"}
    for key, value in options.items():
        if key in left_out or value is None or value == usual.get(key) or value is False or value == []:
            continue
        name = "--" + key.replace("_", "-")
        if value is True:
            words += [] if key == "rebuild" else [name]
        elif isinstance(value, list):
            words += [part for each in value for part in (name, str(each))]
        else:
            words += [name, str(value)]
    if options.get("rebuild") is False:
        words.append("--no-rebuild")
    return shlex.join([*words, "--budget", budget, "--out", f"out-{budget}"])


# -- inside ------------------------------------------------------------------------------------------------------------


def _best(point: Mapping[str, Any]) -> float:
    return (point["tuned"] or point["closed form"])["value"]


def _spread(prober: Prober, ready: Prepared, points: int, folder: Path | None) -> list[Budget]:
    """The budgets of this run, the same when it goes on."""
    path = folder / "budgets.json" if folder is not None else None
    if path is not None and path.exists():
        return [Budget.parse(text) for text in json.loads(path.read_text(encoding="utf-8"))["budgets"]]
    closed = prober.closed
    candidates = candidates_of(Budget("macs", 1.0), closed.open, closed.energies)
    fixed = closed.macs - sum(candidate.dense_cost for candidate in candidates.values())
    budgets = default_budgets((cheapest(candidates) + fixed) / closed.macs, points)
    if path is not None and processes.is_main():
        write_json(path, {"budgets": [str(budget) for budget in budgets]})
    return budgets


class _Judge:
    """Gives the figure of a network on the deciding images, and what it loses against the teacher."""

    def __init__(self, ready: Prepared) -> None:
        assert ready.images is not None
        assert ready.images.decide is not None
        self.images, self.device = ready.images.decide, ready.device
        self.teacher = predict(ready.teacher, self.images, self.device)
        self.kind = "error"
        if is_classifier(self.teacher.outputs):
            self.kind = "disagree" if self.teacher.labels is None else "drop"
        names = {"drop": "accuracy", "disagree": "agreement with the teacher", "error": "error of the outputs"}
        self.name = names[self.kind]
        self.sign = -1 if self.kind == "error" else 1

    def of_teacher(self) -> float:
        """Its own figure."""
        return self._figure(self.teacher)

    def of(self, student: nn.Module) -> dict[str, Any]:
        """Figure and loss of a student."""
        answers = predict(student, self.images, self.device)
        return {"value": self._figure(answers), "loss": estimate(self.kind, self.teacher, answers).to_dict()}

    def _figure(self, answers: Predictions) -> float:
        if self.kind == "drop":
            return accuracy(answers)
        if self.kind == "disagree":
            figure = agreement(self.teacher, answers)
            assert figure is not None
            return figure
        return estimate("error", self.teacher, answers).value


class _Timer:
    """Measures a student beside the teacher."""

    def __init__(self, ready: Prepared, target: str, threads: int | None, clock: Clock) -> None:
        self.ready, self.target, self.threads, self.clock = ready, target, threads, clock
        self.example: Tensor = ready.example.cpu()
        self.sizes = {site.name: site.input_size for site in find_convolutions(ready.teacher, ready.example)}
        self.table = LatencyTable(target, threads)
        self.dense: Any = None

    def of(self, student: nn.Module, forms: Mapping[str, str]) -> dict[str, float]:
        """Milliseconds of both, and their ratio."""
        student = student.cpu()
        with self.clock("choosing forms"):
            sizes = {name: size for name, size in self.sizes.items() if name not in forms}
            forms = {**forms, **choose_forms(student, sizes, self.table)}
        with self.clock("export"):
            if self.dense is None:
                self.dense = deployable(self.ready.teacher, self.example, self.target, self.ready.network.forms)
            network = deployable(student, self.example, self.target, forms)
        with self.clock("latency"):
            found = compare_latency(
                {"dense": self.dense, "student": network}, self.example, target=self.target, threads=self.threads
            )
        dense, mine = found["dense"].median_ms, found["student"].median_ms
        return {"teacher_ms": dense, "student_ms": mine, "ratio": mine / dense}


def _point(
    budget: Budget, prober: Prober, judge: _Judge, timer: _Timer | None, clock: Clock, folder: Path | None
) -> dict[str, Any]:
    """One row, kept in `folder` once it is whole."""
    place = folder / "probes" / str(budget) if folder is not None else None
    path = place / "point.json" if place is not None else None
    if path is None or not path.exists():
        probe = prober.make(budget)
        row = _row(probe, judge, timer, clock)
        if path is None:
            return row
        if processes.is_main():
            write_json(path, {"row": row, "steps": prober.steps})
        processes.wait()
    found = json.loads(path.read_text(encoding="utf-8"))
    prober.steps = found["steps"]
    return found["row"]


def _row(probe: Probe, judge: _Judge, timer: _Timer | None, clock: Clock) -> dict[str, Any]:
    plan = probe.solved.plan
    with clock("evaluate"):
        closed = judge.of(probe.solved.student)
        tuned = None if probe.tuned is None else judge.of(probe.tuned)
    return {
        "budget": str(probe.budget),
        "macs": plan.macs,
        "macs_kept": plan.macs / plan.macs_dense,
        "parameters": plan.parameters,
        "parameters_kept": plan.parameters / plan.parameters_dense,
        "closed form": closed,
        "tuned": tuned,
        "latency": None if timer is None else timer.of(probe.student, plan.forms),
        "layers": [{"name": layer.name, "counts": layer.counts, "kernels": layer.kernels} for layer in plan.layers],
    }
