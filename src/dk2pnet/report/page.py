"""One self-contained HTML page that proves what a run did."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from io import StringIO
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from dk2pnet.report.tables import (
    DASH,
    INT8_HEADER,
    PROBES_HEADER,
    change,
    comparison_rows,
    decided_sentence,
    format_count,
    int8_rows,
    is_measured,
    is_told,
    layer_rows,
    numeric_columns,
    percent,
    probe_rows,
)

__all__ = ["DENSE", "INK", "STUDENT", "STYLE", "facts_of", "svg_of", "write_page", "write_template"]

DENSE, STUDENT = "#b4c4d4", "#2a6fb0"  # both stand out on white and on black paper
INK = "#010203"  # Matplotlib knows no CSS: this stand-in becomes currentColor, so that text follows the page's colour
STYLE: dict[Any, Any] = {"svg.hashsalt": "dk2pnet", "svg.fonttype": "none", "font.size": 9.0, "text.color": INK}
STYLE |= {f"{axis}tick.{what}": INK for axis in "xy" for what in ("color", "labelcolor")}
_LAYERS_PER_CHART = 40  # a chart of so many bars fits on one printed page


def write_page(metrics: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write the report of a run to ``path``: one HTML file that loads nothing from elsewhere.

    ``metrics`` is what ``metrics.json`` holds. The same metrics give the same bytes, and the file appears whole or
    not at all.
    """
    run = metrics.get("run", {})
    write_template(
        path,
        "page.html",
        summary=_summary(metrics),
        comparison=comparison_rows(metrics),
        stages=[
            (s["name"], *(percent(s.get(key)) for key in ("accuracy", "agreement", "relative_error")))
            for s in metrics["stages"]
        ],
        decisions=[
            (d["what"], d["measure"], _number(d["before"]), _number(d["after"]), "kept" if d["kept"] else "not kept")
            for d in metrics.get("decisions", ())
        ],
        probes_header=PROBES_HEADER,
        probes=probe_rows(metrics),
        decided=decided_sentence(metrics["decided"]) if metrics.get("decided") else "",
        notes=metrics.get("notes", ()),
        int8_header=INT8_HEADER,
        int8=int8_rows(metrics),
        charts=_charts(metrics.get("layers", ())),
        layers=[
            (
                name,
                layer.get("shape", DASH).replace(" ", "\N{NO-BREAK SPACE}"),
                done,
                macs,
                _energy(layer.get("energy_kept")),
            )
            for (name, done, macs), layer in zip(layer_rows(metrics), metrics.get("layers", ()), strict=True)
        ],
        command=run.get("command", ""),
        facts=facts_of(run),
    )


def write_template(path: str | os.PathLike[str], name: str, **values: Any) -> None:
    """Write one of this folder's templates, filled with `values`, as one file that loads nothing from elsewhere."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda each: files("dk2pnet.report").joinpath(each).read_text("utf-8")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals["numeric_columns"] = numeric_columns
    page = environment.get_template(name).render(**values)
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(page, encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _summary(metrics: Mapping[str, Any]) -> str:
    """What was gained and what was lost, in plain words."""
    teacher, student = metrics["teacher"], metrics["student"]
    phrases = {
        "parameters": "has {} parameters",
        "macs": "needs {} multiply-adds for one image",
        "onnx_bytes": "is {} as a file",
        "latency_ms": "runs {}",
    }
    said = []
    for key, phrase in phrases.items():
        what = change(key, teacher.get(key), student.get(key))
        if "x " in what and (key != "latency_ms" or is_told(metrics)):
            said.append(phrase.format(what))
    costs = ", ".join(said[:-1]) + " and " * (len(said) > 1) + said[-1] if said else "costs as much to run"
    before, after = teacher.get("accuracy"), student.get("accuracy")
    accuracy = "What that does to its accuracy was not measured."
    if is_measured(before) and is_measured(after):
        points = round(after - before, 2)
        moved = f"{abs(points):.2f} points {'more' if points > 0 else 'less'} accurate" if points else "as accurate"
        accuracy = f"It is {moved} ({percent(before)} before, {percent(after)} after)."
    text = f"Compared with the teacher, the student {costs}. {accuracy}"
    if is_measured(student.get("relative_error")):
        text += (
            f" On the held-out inputs its outputs differ from the teacher's by {percent(student['relative_error'])} "
            "(root mean square, relative)."
        )
    if is_measured(student.get("agreement")):
        which = "held-out" if student.get("accuracy") is None else "test"
        text += f" It gives the teacher's answer on {percent(student['agreement'])} of the {which} images."
    return text


def _number(value: float | None) -> str:
    if not is_measured(value):
        return DASH
    return format_count(value) if abs(value) >= 1e4 else f"{value:.4g}"


def _energy(value: float | None) -> str:
    return f"{100 * value:.1f} %" if is_measured(value) else DASH


def facts_of(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What somebody needs to know to repeat the run, as (name, value)."""
    facts = [(key, str(run[key])) for key in ("seed", "criterion", "task", "budget") if run.get(key) is not None]
    told = (("images", format_count), ("seconds", _number), ("latency", str), ("versions", str), ("hardware", str))
    for key, write in told:
        if run.get(key):
            facts.append((key, ", ".join(f"{name} {write(value)}" for name, value in run[key].items())))
    return facts


def _charts(layers: Sequence[Mapping[str, Any]]) -> list[Markup]:
    widest = max((max(layer["macs_dense"], layer["macs"]) for layer in layers), default=0)
    starts = range(0, len(layers), _LAYERS_PER_CHART)
    return [_chart(layers[start : start + _LAYERS_PER_CHART], start, widest) for start in starts]


def _chart(layers: Sequence[Mapping[str, Any]], start: int, widest: float) -> Markup:
    """Bars of MACs per layer as an ``<svg>`` element; all charts of a page share their scale."""
    label = (
        f"Bar chart: MACs of the teacher and of the student for layers {start + 1} to {start + len(layers)}; "
        "the table below gives the same figures."
    )
    with matplotlib.rc_context(STYLE):
        height = 0.21 * len(layers) + 0.75
        # A Figure by itself: pyplot would keep it alive, and choose a backend for the caller's whole process.
        figure = Figure(figsize=(8, height), layout="constrained")
        axes = figure.add_subplot()
        rows = range(len(layers))
        axes.barh(rows, [layer["macs_dense"] for layer in layers], height=0.8, color=DENSE)
        axes.barh(rows, [layer["macs"] for layer in layers], height=0.45, color=STUDENT)
        axes.set_yticks(rows, [_short(layer["name"]) for layer in layers], parse_math=False)
        for row, layer in enumerate(layers):
            end = max(layer["macs_dense"], layer["macs"])
            axes.annotate(_mark(layer), (end, row), (4, 0), textcoords="offset points", va="center", fontsize=8)
        axes.set_ylim(len(layers) - 0.4, -0.6)
        axes.set_xlim(0, 1.08 * widest or 1)
        axes.xaxis.set_major_formatter(lambda value, _: format_count(value))
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(INK)
        figure.legend(
            handles=[Patch(color=DENSE, label="MACs, teacher"), Patch(color=STUDENT, label="MACs, student")],
            loc="outside upper right",
            ncols=2,
            frameon=False,
        )
        return svg_of(figure, f"chart{start}-", label)


def svg_of(figure: Figure, prefix: str, label: str) -> Markup:
    """A figure as an ``<svg>`` element whose text follows the page's colour; ids get the prefix."""
    out = StringIO()
    # Without metadata: no date, which would differ from run to run, and no addresses.
    figure.savefig(
        out,
        format="svg",
        transparent=True,
        metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
    )
    text = out.getvalue()
    text = text[text.index("<svg") :]  # an element inside a page has no XML prologue
    # Several charts stand in one page, where an id must be unique. Text cannot match: its < is escaped.
    text = re.sub(r"<[^>]*>", lambda tag: _adapt(tag[0], prefix), text)
    return Markup(text.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1))


def _adapt(tag: str, prefix: str) -> str:
    return re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>{prefix}", tag.replace(INK, "currentColor"))


def _short(name: str) -> str:
    name = " ".join(name.split())
    return name if len(name) <= 32 else f"…{name[-31:]}"  # the end tells layers apart


def _mark(layer: Mapping[str, Any]) -> str:
    """Mean kernels per input channel."""
    if layer["kind"] != "dk":
        return "dense"
    counts = layer.get("counts")
    return f"{sum(counts) / len(counts):.1f}" if counts else ""
