"""The curve before the choice: what about eight budgets would cost and lose, from moments gathered once."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from dk2pnet import processes
from dk2pnet.answers import Predictions
from dk2pnet.decompose.select import cheapest
from dk2pnet.deploy.costs import LatencyTable
from dk2pnet.deploy.latency import check_target, compare_latency, conditions, ratio_of
from dk2pnet.errors import InputError, TooSmall
from dk2pnet.estimates import estimate
from dk2pnet.networks.network import Network
from dk2pnet.options import ExploreOptions, flag_of, plain_value, recipe_of
from dk2pnet.plan import Budget
from dk2pnet.report.curve import write_curve_page
from dk2pnet.run.device import environment
from dk2pnet.run.out_folder import check_out, new_folder, write_json, write_recipe
from dk2pnet.run.run import Run
from dk2pnet.run.unfinished import unfinished
from dk2pnet.students.allocate import candidates_of
from dk2pnet.students.latency_budget import choose_forms
from dk2pnet.students.probes import Probe, Prober
from dk2pnet.students.teacher import Teacher, check_for_onnx
from dk2pnet.tasks import accuracy, agreement, has_accuracy

__all__ = ["compress_command", "default_budgets", "explore", "knee"]

_LARGEST, _SMALLEST = 0.7, 0.08  # of the multiply-adds, between which the budgets are spread evenly in logarithms


def explore(
    model: str | Path | nn.Module,
    data: str | Iterable[Any] | None = None,
    options: ExploreOptions | None = None,
    *,
    out: str | Path | None = None,
    run: Run | None = None,
    **flat: Any,
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
    model, data : as in `compress`
    options, flat : an `ExploreOptions`, or its fields by name; docs/options.md lists them
    out : folder to write: metrics.json, report.html, recipe.yaml; None writes nothing. A run that was killed goes on
        after the last point that was done
    run : how the work shows its progress

    Raises
    ------
    InputError
        One sentence that says what was given, what was expected and what to do.
    """
    chosen = ExploreOptions.of(options, flat)
    given = [Budget.parse(budget) for budget in chosen.budgets]
    for budget in given:
        if budget.in_points:
            raise InputError(f"explore shows what budgets lose, and {budget} is a loss; give macs=0.3, or none")
    if data is None and chosen.calibration_data is None:
        raise InputError("explore measures on images and none were given; give --data")
    if chosen.target is not None:
        check_target(chosen.target)
    check_for_onnx(model, chosen)
    check_out(out, chosen.overwrite)
    with (run or Run()).at_work(chosen.device, chosen.threads, chosen.seed) as work, ExitStack() as whole:
        first = chosen.first or all(budget.kind != "kernels" for budget in given)
        teacher = Teacher.open(model, data, chosen, work, first)
        chosen = replace(chosen, criterion=teacher.criterion, budgets=[str(budget) for budget in given])
        arguments = {"model": model, "data": data}
        folder = None
        if out is not None:
            recipe = recipe_of(arguments, chosen)
            kept = {key: value for key, value in recipe.items() if key != "checkpoint_every"} | teacher.digests()
            folder = whole.enter_context(unfinished(out, chosen.overwrite, {"command": "explore", **kept}))
        prober = whole.enter_context(Prober(teacher, folder, work))
        wanted = given or _spread(prober, chosen.points, folder)
        with work.clock("evaluate"):
            scale = _Scale(teacher, work)
        timer = _Timer(teacher, work) if processes.is_main() else None
        rows = []
        notes = list(teacher.notes)
        for number, budget in enumerate(wanted):
            work.progress(f"exploring {budget}", number, len(wanted))
            try:
                rows.append(_point(budget, prober, scale, timer, folder))
            except TooSmall as error:
                notes.append(str(error))
        if not rows:
            raise TooSmall(notes[-1])
        samples = teacher.samples
        assert samples is not None
        samples.counts["deciding"] = len(scale.teacher)
        samples.counts.pop("test", None)
        rows.sort(key=lambda point: -point["macs_kept"])
        value, network = scale.of_teacher(), teacher.network
        metrics: dict[str, Any] = {
            "measure": scale.name,
            "decided_by": samples.decided_by,
            "teacher": {"value": value, "macs": network.macs, "parameters": network.parameters},
            "points": rows,
            "knee": knee(rows, value, scale.sign),
            "tuning_steps": prober.steps,
            "notes": notes,
            "run": {
                "command": work.command or "dk2pnet.explore(...)",
                "seed": chosen.seed,
                "criterion": teacher.criterion,
                "task": teacher.task,
                "images": samples.counts,
                "seconds": work.clock.seconds,
                "latency": conditions(teacher.target, network.example, work.threads),
                **environment(work.device),
            },
        }
        if prober.steps:  # a time was turned into so many
            chosen = replace(chosen, tune=prober.steps)
        usual = replace(chosen, criterion=None) if teacher.criterion == network.default_criterion else chosen
        for point in rows:
            point["command"] = compress_command(arguments, usual, point["budget"])
        if out is not None and processes.is_main():
            with new_folder(Path(out), chosen.overwrite) as new:
                write_json(new / "metrics.json", metrics)
                write_recipe(new / "recipe.yaml", "explore", recipe_of(arguments, chosen))
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


def compress_command(arguments: Mapping[str, Any], options: ExploreOptions, budget: str) -> str:
    """The command that makes one point's network."""
    words = ["dk2pnet", "compress"]
    for name, value in arguments.items():
        if (text := plain_value(value)) is not None:
            words += [f"--{name}", str(text)]
    left_out = ("budgets", "points", "checkpoint_every", "holdout", "holdout_split", "overwrite")
    plain = options.plain()
    for each in options.changed():
        value, flag = plain[each.name], flag_of(each)
        if each.name in left_out or value is None:
            continue
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            values = value if isinstance(value, list) else [value]
            words += [part for one in values for part in (flag, str(one))]
    return shlex.join([*words, "--budget", budget, "--out", f"out-{budget}"])


# -- inside ------------------------------------------------------------------------------------------------------------


def _best(point: Mapping[str, Any]) -> float:
    return (point["tuned"] or point["closed form"])["value"]


def _spread(prober: Prober, points: int, folder: Path | None) -> list[Budget]:
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


class _Scale:
    """Gives the figure of a network on the deciding images, and what it loses against the teacher."""

    def __init__(self, teacher: Teacher, run: Run) -> None:
        assert teacher.samples is not None
        self.samples, self.run = teacher.samples.decide, run
        self.teacher = teacher.network.predict(self.samples, run)
        self.kind = "error"
        if has_accuracy(self.teacher):
            self.kind = "drop"
        elif agreement(self.teacher, self.teacher) is not None:
            self.kind = "disagree"
        names = {"drop": "accuracy", "disagree": "agreement with the teacher", "error": "error of the outputs"}
        self.name = names[self.kind]
        self.sign = -1 if self.kind == "error" else 1

    def of_teacher(self) -> float:
        """Its own figure."""
        return self._figure(self.teacher)

    def of(self, student: Network) -> dict[str, Any]:
        """Figure and loss of a student."""
        answers = student.predict(self.samples, self.run)
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

    def __init__(self, teacher: Teacher, run: Run) -> None:
        self.network, self.sites, self.run = teacher.network, teacher.open_sites, run
        self.target = teacher.target
        self.table = LatencyTable(self.target, run.threads)
        self.dense: Any = None

    def of(self, student: Network, forms: Mapping[str, str]) -> dict[str, float]:
        """Milliseconds of both, and their ratio."""
        with self.run.clock("choosing forms"):
            sites = {name: site for name, site in self.sites.items() if name not in forms}
            forms = {**forms, **choose_forms(student, sites, self.table)}
        with self.run.clock("export"):
            if self.dense is None:
                self.dense = self.network.deployable(self.target, {})
            network = student.deployable(self.target, forms)
        with self.run.clock("latency"):
            found = compare_latency(
                {"dense": self.dense, "student": network},
                self.network.example,
                target=self.target,
                threads=self.run.threads,
            )
        dense, mine = found["dense"], found["student"]
        ratio = ratio_of(mine, dense)
        times = {"teacher_ms": dense.median_ms, "student_ms": mine.median_ms}
        return times | {"ratio": ratio.median_ms, "told": not ratio.noisy}


def _point(budget: Budget, prober: Prober, scale: _Scale, timer: _Timer | None, folder: Path | None) -> dict[str, Any]:
    """One row, kept in `folder` once it is whole."""
    place = folder / "probes" / str(budget) if folder is not None else None
    path = place / "point.json" if place is not None else None
    if path is None or not path.exists():
        probe = prober.make(budget)
        row = _row(probe, scale, timer)
        if path is None:
            return row
        if processes.is_main():
            write_json(path, {"row": row, "steps": prober.steps})
        processes.wait()
    found = json.loads(path.read_text(encoding="utf-8"))
    prober.steps = found["steps"]
    return found["row"]


def _row(probe: Probe, scale: _Scale, timer: _Timer | None) -> dict[str, Any]:
    plan = probe.solved.plan
    with scale.run.clock("evaluate"):
        closed = scale.of(probe.solved.student)
        tuned = None if probe.tuned is None else scale.of(probe.tuned)
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
