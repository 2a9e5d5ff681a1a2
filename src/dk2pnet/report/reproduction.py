"""What `dk2pnet reproduce` shows: a table, and accuracy against parameters beside the figures of others."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure

from dk2pnet.report.tables import DASH, format_count, markdown_table

__all__ = [
    "PUBLISHED",
    "REPRODUCTION_HEADER",
    "reproduction_figure",
    "reproduction_rows",
    "write_figure",
    "write_reproduction",
]


class Published(NamedTuple):
    """A figure of others: test accuracy in percent."""

    name: str
    parameters: int
    accuracy: float


# Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, with parameters as rounded there.
PUBLISHED: dict[str, list[Published]] = {
    "mnist": [
        Published("FitNets' teacher", 361_000, 99.45),
        Published("FitNets' student", 30_000, 99.49),
        Published("FitNets' student, KD", 30_000, 99.35),
        Published("FitNets' student, labels", 30_000, 98.10),
    ],
    "cifar10": [
        Published("FitNets' teacher", 9_000_000, 90.18),
        Published("FitNets' student 1", 250_000, 89.01),
        Published("FitNets' student 2", 862_000, 91.06),
        Published("FitNets' student 3", 1_600_000, 91.10),
        Published("FitNets' student 4", 2_500_000, 91.61),
    ],
    "cifar100": [Published("FitNets' teacher", 9_000_000, 63.54), Published("FitNets' student", 2_500_000, 64.96)],
    "svhn": [Published("FitNets' teacher", 4_900_000, 97.62), Published("FitNets' student", 1_500_000, 97.58)],
}
_NAMES = {
    "labels": "labels only",
    "kd": "KD",
    "fitnets": "FitNets, two stages",
    "euclidean+kd": "Euclidean hints + KD, one stage",
    "at": "attention transfer",
    "kp": "KP",
    "kp+kd": "KP + KD",
    "kp-falling+kd": "KP, its weight falling to 0, + KD",
}
_TICKS = (1e3, 3e3, 1e4, 3e4, 1e5, 3e5, 1e6, 3e6, 1e7, 3e7)
_OTHERS, _TEACHER = "#8a94a0", "#1c2126"
_SHOWN = {"labels": "#b4c4d4", "kd": "#6f9fcb", "kp+kd": "#2a6fb0", "kp-falling+kd": "#123f6b"}  # what the figure shows

AGAINST_KD = "Against KD: points above it with the same seeds, and the 95 % interval of their mean."
REPRODUCTION_HEADER = ("network", "taught by", "parameters", "MACs", "seeds", "test %", "error %", "against KD")


def reproduction_rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The teacher, the student by each method, then the figures of others, under `REPRODUCTION_HEADER`.

    The last column has a dash below two seeds that both methods have.
    """
    settings = results["settings"]
    rows: list[tuple[str, ...]] = []
    if results["teacher"]:
        figures = results["teacher"]
        rows.append((f"teacher ({settings['teacher']})", "labels", *_sizes(figures), DASH, *_accuracy(figures), DASH))
    for row in results["rows"]:
        who = (settings["student"], _NAMES[row["method"]])
        figures = (*_sizes(results["student"]), str(row["seeds"]), *_accuracy(row))
        rows.append((*who, *figures, _against(row["against_kd"])))
    for each in PUBLISHED.get(settings["data"], ()):
        figures = (f"{each.accuracy:.2f}", f"{100 - each.accuracy:.2f}")
        rows.append((each.name, "published", format_count(each.parameters), DASH, DASH, *figures, DASH))
    return rows


def _sizes(figures: Mapping[str, Any]) -> tuple[str, str]:
    return format_count(figures["parameters"]), format_count(figures["macs"])


def _accuracy(figures: Mapping[str, Any]) -> tuple[str, str]:
    if figures["accuracy"] is None:
        return DASH, DASH
    spread = f" ± {figures['spread']:.2f}" if figures.get("spread") is not None else ""
    return f"{figures['accuracy']:.2f}{spread}", f"{100 - figures['accuracy']:.2f}"


def _against(paired: Mapping[str, Any] | None) -> str:
    return f"{paired['difference']:+.2f} ({paired['low']:+.2f} to {paired['high']:+.2f})" if paired else DASH


def write_reproduction(results: Mapping[str, Any], folder: Path) -> None:
    """Write ``results.md`` and ``figure.svg`` into the folder; each appears whole."""
    settings = results["settings"]
    schedule = f"{settings['epochs']} epochs at learning rate {settings['learning_rate']:g}"
    if settings["images"]:
        schedule += f" on {settings['images']:,} images of the training split"
    said = f"Students: {schedule}; test accuracy of the last epoch. {AGAINST_KD}"
    lines = [f"# {settings['data']}", "", said, ""]
    lines += [markdown_table(REPRODUCTION_HEADER, reproduction_rows(results)), ""]
    lines += ["![accuracy against parameters](figure.svg)"] if results["rows"] else []
    if results["continue"]:
        lines += ["", "Not run yet:", "", *(f"    {command}" for command in results["continue"])]
    _replace(folder / "results.md", "\n".join(lines) + "\n")
    if results["rows"]:
        write_figure([results], folder / "figure.svg")


def write_figure(several: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The figure of `reproduction_figure` as a file that a README can show, on white in any theme."""
    with matplotlib.rc_context({"svg.hashsalt": "dk2pnet", "svg.fonttype": "path", "font.size": 9.0}):
        temporary = path.with_name(f".{os.getpid()}-{path.name}")
        reproduction_figure(several).savefig(temporary, format="svg", metadata={"Date": None})
        os.replace(temporary, path)


def reproduction_figure(several: Sequence[Mapping[str, Any]]) -> Figure:
    """A panel for each data set: test accuracy against parameters, ours and those of others; up and left is better.

    Results of one data set at several schedules share a panel, each student with its number of epochs beside it.
    """
    panels: dict[str, list[Mapping[str, Any]]] = {}
    for results in several:
        panels.setdefault(results["settings"]["data"], []).append(results)
    columns = len(panels) if len(panels) <= 3 else 2  # as wide as a page shows legibly
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * rows), layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in places[len(panels) :]:
        axes.remove()
    for axes, (data, found) in zip(places, panels.items(), strict=False):
        others = PUBLISHED.get(data, ())
        for marker, label, is_teacher in (("s", "FitNets (2015)", False), ("D", "their teacher", True)):
            shown = [each for each in others if each.name.endswith("teacher") == is_teacher and "," not in each.name]
            if shown:
                x, y = zip(*((each.parameters, each.accuracy) for each in shown), strict=True)
                axes.plot(x, y, color=_OTHERS, marker=marker, linestyle="" if is_teacher else "-", label=label)
        for results in found:
            teacher, by_method = results["teacher"], {row["method"]: row for row in results["rows"]}
            if teacher and teacher["accuracy"] is not None:
                axes.plot(teacher["parameters"], teacher["accuracy"], "D", color=_TEACHER, label="our teacher")
            methods = [name for name in _SHOWN if name in by_method]
            for name in methods:
                where = (results["student"]["parameters"], by_method[name]["accuracy"])
                label = f"DK²PNet, {_NAMES[name]}"
                axes.errorbar(*where, yerr=by_method[name]["spread"], fmt="o", color=_SHOWN[name], label=label)
            if len(found) > 1 and methods:
                beside = (results["student"]["parameters"], max(by_method[name]["accuracy"] for name in methods))
                text = f"{results['settings']['epochs']} epochs"
                axes.annotate(text, beside, (-6, -2), textcoords="offset points", ha="right", fontsize=7)
                axes.margins(x=0.3)  # room for it: students are the smallest
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        ticks = [tick for tick in _TICKS if low <= tick <= high]
        axes.set_xticks(ticks, [f"{tick / 1e6:g} M" if tick >= 1e6 else f"{tick / 1e3:g} K" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("parameters")
        axes.set_ylabel("test accuracy %")
        axes.set_title(data, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        by_label = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))  # each label once
        axes.legend(by_label.values(), by_label.keys(), frameon=False, fontsize=7)
    return figure


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
