"""The figures of a run as rows of text, for a terminal, for Markdown and for the page."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

from rich.table import Table
from rich.text import Text

__all__ = [
    "DASH",
    "INT8_HEADER",
    "PROBES_HEADER",
    "change",
    "comparison_rows",
    "decided_sentence",
    "format_count",
    "int8_rows",
    "is_measured",
    "is_told",
    "layer_rows",
    "markdown_table",
    "numeric_columns",
    "percent",
    "probe_rows",
    "rich_table",
]

DASH = "–"
NOT_TOLD = "not told: unsteady"


def is_measured(value: float | None) -> TypeGuard[float]:
    """Whether there is a figure (one that is not finite was not measured either)."""
    return value is not None and math.isfinite(value)


def format_count(n: float | None) -> str:
    """``464154 -> '464,154'``, ``69_120_000 -> '69.1 M'``: exact below a million, then three significant digits."""
    return _scaled(n, "", 1e6, {"M": 1e6, "G": 1e9, "T": 1e12}) if is_measured(n) else DASH


def percent(value: float | None) -> str:
    """``92.63 -> '92.63 %'``."""
    return f"{value:.2f} %" if is_measured(value) else DASH


def _bytes(value: float) -> str:
    return _scaled(value, "B", 1e3, {"kB": 1e3, "MB": 1e6, "GB": 1e9})


def _milliseconds(value: float) -> str:
    return f"{_three_digits(value)} ms"


def _scaled(value: float, unit: str, exact_below: float, units: Mapping[str, float]) -> str:
    if abs(value) < exact_below:
        return f"{round(value):,} {unit}".rstrip()
    # 0.9995: what rounds up to 1000 of a unit is written as 1.00 of the next.
    name, scale = [(name, scale) for name, scale in units.items() if abs(value) >= 0.9995 * scale][-1]
    return f"{_three_digits(value / scale)} {name}"


def _three_digits(value: float) -> str:
    size = abs(value)
    return f"{value:,.{0 if size >= 99.95 else 1 if size >= 9.995 else 2 if size >= 0.9995 else 3}f}"


# Measure, its name, how a value is written, and the words for less and for more of it ("" for a difference in points).
_MEASURES: tuple[tuple[str, str, Callable[[Any], str], tuple[str, str]], ...] = (
    ("accuracy", "accuracy", percent, ("", "")),
    ("agreement", "agreement with the teacher", percent, ("", "")),
    ("relative_error", "relative error of the outputs", percent, ("", "")),
    ("parameters", "parameters", format_count, ("fewer", "more")),
    ("macs", "MACs (one image)", format_count, ("fewer", "more")),
    ("onnx_bytes", "file size (ONNX)", _bytes, ("smaller", "larger")),
    ("latency_ms", "latency", _milliseconds, ("faster", "slower")),
)
_WORDS = {key: words for key, _, _, words in _MEASURES}


def change(key: str, teacher: float | None, student: float | None) -> str:
    """What happened to one figure: ``'-1.13 points'``, ``'3.9x fewer'``, ``'same'``, or a dash."""
    if not (is_measured(teacher) and is_measured(student)):
        return DASH
    less, more = _WORDS[key]
    if not less:
        points = f"{student - teacher:+.2f}"
        return "same" if float(points) == 0 else f"{points} points"
    if teacher == student:
        return "same"
    if teacher <= 0 or student <= 0:
        return DASH
    ratio = max(teacher / student, student / teacher)
    text = f"{ratio:.{2 if ratio < 1.995 else 1 if ratio < 99.95 else 0}f}"
    return "about the same" if text == "1.00" else f"{text}x {less if student < teacher else more}"


def is_told(metrics: Mapping[str, Any]) -> bool:
    """Whether the times say which of both is faster, and by how much: a busy machine's do not."""
    return metrics["student"].get("latency_told", True)


def comparison_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Teacher beside student: rows of (measure, teacher, student, change); what neither has is left out.

    Example::

        comparison_rows(metrics)[0]      # ('accuracy', '92.63 %', '91.50 %', '-1.13 points')
    """
    rows = []
    for key, name, write, _ in _MEASURES:
        pair = [metrics[who].get(key) for who in ("teacher", "student")]
        if any(map(is_measured, pair)):
            teacher, student = (write(value) if is_measured(value) else DASH for value in pair)
            what = change(key, *pair) if key != "latency_ms" or is_told(metrics) else NOT_TOLD
            rows.append((name, teacher, student, what))
    return rows


INT8_HEADER = ("network", "numbers", "accuracy", "agreement", "file size", "latency")


def int8_rows(metrics: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Teacher and student, in fp32 and in int8: one row each under `INT8_HEADER`."""
    return [
        (
            row["network"],
            row["numbers"],
            percent(row["accuracy"]),
            percent(row["agreement"]),
            _bytes(row["bytes"]),
            _milliseconds(row["latency_ms"]),
        )
        for row in metrics.get("int8", ())
    ]


PROBES_HEADER = ("budget", "MACs kept", "loss", "95 % interval", "within")


def probe_rows(metrics: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The networks that a budget in points looked at, largest first: one row each under `PROBES_HEADER`."""
    probes = [probe for probe in metrics.get("decided", {}).get("probes", ()) if "value" in probe]
    return [
        (
            probe["budget"],
            f"{probe['macs_kept']:.3f}",
            f"{probe['value']:.3g}",
            f"{probe['low']:.3g} to {probe['high']:.3g}",
            "yes" if probe["within"] else "no",
        )
        for probe in sorted(probes, key=lambda probe: -probe["macs_kept"])
    ]


def decided_sentence(decided: Mapping[str, Any]) -> str:
    """What the budget in points came to, on the images that decided and on those that confirmed."""
    confirmed = decided["confirmed"]
    first, second = (
        f"{part['value']:.3g} {decided['unit']} (95 % interval {part['low']:.3g} to {part['high']:.3g}, "
        f"{part['images']:,} images)"
        for part in (decided, confirmed)
    )
    return f"Loss for {decided['budget']}, by {decided['decided_by']}: {first}; on {confirmed['on']}: {second}."


def layer_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """One row per convolution: (name, what was done to it, MACs before -> after)."""
    rows = []
    for layer in metrics.get("layers", ()):
        if layer["kind"] == "dk":
            done = f"kernels {format_count(layer.get('kernels'))}"
            if layer.get("branches"):
                done += f" in branches {'+'.join(map(str, layer['branches']))}"
            if layer.get("form"):
                done += f", {layer['form']}"
        else:
            done = layer.get("reason") or "dense"
        rows.append((layer["name"], done, f"{format_count(layer['macs_dense'])} -> {format_count(layer['macs'])}"))
    return rows


def numeric_columns(rows: Sequence[Sequence[str]]) -> list[bool]:
    """Which columns hold figures; never the first, which names the row even where the name is a number."""
    columns = [[cell for cell in column if cell != DASH] for column in zip(*rows, strict=True)]
    return [i > 0 and bool(c) and all(map(_FIGURE.match, c)) for i, c in enumerate(columns)]


# A shape such as 64x32x3x3 is no figure, though 3.9x fewer is one.
_FIGURE = re.compile(r"[+-]?\d(?!\d*x\d)|same$|about the same$")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A GitHub Markdown table whose source is aligned too; figures stand to the right. Ends without a newline."""
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    right = numeric_columns(rows) or [False] * len(header)
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)) + " |"
        for row in cells
    ]
    rule = "| " + " | ".join("-" * (w - 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True)) + " |"
    return "\n".join([lines[0], rule, *lines[1:]])


def rich_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """The same table for a terminal."""
    # Text, not str: Rich would read the brackets of a name such as `blocks[0]` as markup.
    table = Table(title=Text(title), title_justify="left")
    for name, right in zip(header, numeric_columns(rows) or [False] * len(header), strict=True):
        table.add_column(Text(name), justify="right" if right else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    return table
