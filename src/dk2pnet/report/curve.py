"""What `dk2pnet explore` shows: rows for a terminal, and a page with the curve."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from dk2pnet.report.page import DENSE, INK, STUDENT, STYLE, facts_of, svg_of, write_template
from dk2pnet.report.tables import DASH, format_count

__all__ = ["CURVE_HEADER", "curve_rows", "curve_svg", "knee_sentence", "write_curve_page"]


CURVE_HEADER = ("budget", "MACs", "params", "time", "closed form", "tuned", "95 % interval", "")


def curve_rows(metrics: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The teacher and the points, largest first, under `CURVE_HEADER`: what is kept of its costs, and the figures.

    The interval is that of the last figure; the knee is marked.
    """
    teacher = metrics["teacher"]
    rows: list[tuple[str, ...]] = [
        ("teacher", "1.00", "1.00", "1.00", _figure(metrics, teacher["value"]), DASH, DASH, "")
    ]
    for point in metrics["points"]:
        best = point["tuned"] or point["closed form"]
        loss = best["loss"]
        sign = -1 if metrics["measure"] != "error of the outputs" else 1
        base = 100.0 if metrics["measure"].startswith("agreement") else teacher["value"]
        base = base if sign < 0 else 0.0
        low, high = sorted((base + sign * loss["low"], base + sign * loss["high"]))
        rows.append(
            (
                point["budget"],
                f"{point['macs_kept']:.2f}",
                f"{point['parameters_kept']:.2f}",
                f"{point['latency']['ratio']:.2f}" if point["latency"] and point["latency"].get("told", True) else DASH,
                _figure(metrics, point["closed form"]["value"]),
                _figure(metrics, point["tuned"]["value"]) if point["tuned"] else DASH,
                f"{_figure(metrics, low, '')} to {_figure(metrics, high, '')}",
                "knee" if point["budget"] == metrics["knee"] else "",
            )
        )
    return rows


def knee_sentence(metrics: Mapping[str, Any], command: bool = True) -> str:
    """Where the curve bends, and what it was measured on."""
    images = metrics["run"]["images"]["deciding"]
    where = f"{metrics['measure'].capitalize()} on {metrics['decided_by']} ({images:,} images)."
    if metrics["knee"] is None:
        return f"{where} The curve has no knee: every cut costs about as much as the one before."
    point = next(each for each in metrics["points"] if each["budget"] == metrics["knee"])
    ready = f"; for its network: {point['command']}" if command else "."
    return f"{where} The knee is {metrics['knee']}{ready}"


def write_curve_page(metrics: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write the page of an `explore` run: one HTML file that loads nothing from elsewhere."""
    points = metrics["points"]
    names = [layer["name"] for layer in points[0]["layers"]] if points else []
    layers = []
    for number, name in enumerate(names):
        cells = [point["layers"][number] for point in points]
        layers.append(
            (name, *("dense" if c["counts"] is None else f"{c['kernels'] / len(c['counts']):.2f}" for c in cells))
        )
    run = metrics["run"]
    write_template(
        path,
        "curve.html",
        summary=f"The teacher has {format_count(metrics['teacher']['macs'])} multiply-adds and "
        f"{format_count(metrics['teacher']['parameters'])} parameters. {knee_sentence(metrics, command=False)}",
        notes=metrics["notes"],
        caption=f"{metrics['measure'].capitalize()} against multiply-adds (left, logarithmic) and against measured "
        "latency (right), both relative to the teacher's. The line across is the teacher; the ring is the knee.",
        chart=curve_svg(metrics),
        header=CURVE_HEADER,
        points=curve_rows(metrics),
        commands=[point["command"] for point in points],
        layer_header=("layer", *(point["budget"] for point in points)),
        layers=layers,
        command=run["command"],
        facts=facts_of(run),
    )


def _figure(metrics: Mapping[str, Any], value: float, unit: str = " %") -> str:
    return f"{value:.4f}" if metrics["measure"].startswith("error") else f"{value:.2f}{unit}"


def curve_svg(metrics: Mapping[str, Any]) -> Markup:
    """The curve as an ``<svg>`` element: the figure against MACs and against latency, closed form and tuned."""
    points = metrics["points"]
    timed = all(point["latency"] for point in points)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 3.4), layout="constrained")
        panels = figure.subplots(1, 2 if timed else 1, sharey=True, squeeze=False)[0]
        for panel, axes in enumerate(panels):
            where = [point["latency"]["ratio"] if panel else point["macs_kept"] for point in points]
            axes.axhline(metrics["teacher"]["value"], color=INK, linewidth=0.8, linestyle=":")
            for stage, color in (("closed form", DENSE), ("tuned", STUDENT)):
                shown = [(x, point[stage]["value"]) for x, point in zip(where, points, strict=True) if point[stage]]
                if shown:
                    axes.plot(*zip(*shown, strict=True), color=color, marker="o", markersize=4, label=stage)
            for x, point in zip(where, points, strict=True):
                if point["budget"] == metrics["knee"]:
                    y = (point["tuned"] or point["closed form"])["value"]
                    axes.plot(x, y, marker="o", markersize=11, fillstyle="none", color=INK, linestyle="none")
            axes.set_xlabel("latency kept" if panel else "MACs kept", color=INK)
            if not panel:
                axes.set_xscale("log")
                ticks = [tick for tick in (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0) if tick >= min(where) * 0.8]
                axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
                axes.minorticks_off()
                axes.set_ylabel(metrics["measure"], color=INK)
                axes.legend(frameon=False, labelcolor=INK, loc="lower right")
            axes.spines[["top", "right"]].set_visible(False)
            axes.spines[["bottom", "left"]].set_color(INK)
        label = (
            f"Curve of {metrics['measure']} against multiply-adds and latency; the table below gives the same figures."
        )
        return svg_of(figure, "curve-", label)
