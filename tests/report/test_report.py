"""Rows worked out by hand, and a page that parses, escapes, loads nothing and does not change."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import matplotlib
import pytest
from rich.console import Console

from dk2pnet.report import comparison_rows, format_count, layer_rows, markdown_table, rich_table, write_page
from dk2pnet.report.curve import CURVE_HEADER, curve_rows

HOSTILE = '<script src="http://evil.example/x.js">alert("$1$")</script> id="a'
VOID = {"meta", "br", "hr", "img", "link", "input"}


def dk(name, dense, macs, branches=(64, 32)):
    counts = [2] * branches[1] + [1] * (branches[0] - branches[1])
    sizes = {"kernels": sum(branches), "counts": counts, "branches": list(branches), "energy_kept": 0.975}
    return {
        "name": name,
        "kind": "dk",
        "reason": "",
        "shape": "64x64x3x3 /1",
        "macs_dense": dense,
        "macs": macs,
        **sizes,
    }


def dense(name, reason, macs):
    return {
        **{"name": name, "kind": "dense", "reason": reason, "shape": "3x16x3x3 /1", "macs_dense": macs, "macs": macs},
        **dict.fromkeys(("kernels", "counts", "branches", "energy_kept")),
    }


def example(layers=2):
    teacher = {"accuracy": 92.63, "agreement": None, "parameters": 464154, "macs": 69124352, "onnx_bytes": 1_870_000}
    student = {"accuracy": 91.5, "agreement": 96.2, "parameters": 120000, "macs": 20_000_000, "onnx_bytes": 512_000}
    return {
        "teacher": {**teacher, "latency_ms": 2.5},
        "student": {**student, "latency_ms": 1.25},
        "stages": [
            {"name": "converted", "accuracy": 80.0, "agreement": 82.5},
            {"name": "tuned", "accuracy": None, "agreement": 96.2},
        ],
        "layers": [
            dense("conv1", "first convolution", 442368),
            *(dk(f"layer{i}.0.conv", 2_359_296, 600_000 + 40_000 * i) for i in range(1, layers)),
        ],
        "decisions": [
            {"what": "bias correction", "before": 80.0, "after": 82.5, "kept": True, "measure": "agreement (%)"},
            {"what": "concat form", "before": 1.25, "after": 1.5, "kept": False, "measure": "latency (ms)"},
        ],
        "run": {
            **{"command": "dk2pnet compress resnet32 --seed 0", "seed": 0, "criterion": "loss", "budget": "macs 0.3"},
            "versions": {"torch": "2.6.0"},
            "hardware": {"cpu": "some processor", "threads": 2},
            "images": {"calibration": 2048, "held out": 1000, "test": 10000},
            "seconds": {"moments": 12.34, "solve": 0.5},
        },
    }


class Balance(HTMLParser):
    """Collects tags and text; an end tag must close the element that is open."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def page(metrics, folder):
    write_page(metrics, folder / "report.html")
    assert [p.name for p in folder.iterdir()] == ["report.html"]
    text = (folder / "report.html").read_text("utf-8")
    parsed = Balance()
    parsed.feed(text)
    parsed.close()
    assert parsed.open == []
    return text, parsed


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0"),
        (464154, "464,154"),
        (999_999, "999,999"),
        (1_234_567, "1.23 M"),
        (69_124_352, "69.1 M"),
        (999_600_000, "1.00 G"),
        (None, "–"),
    ],
)
def test_format_count(n, text):
    assert format_count(n) == text


def test_comparison_rows():
    assert comparison_rows(example()) == [
        ("accuracy", "92.63 %", "91.50 %", "-1.13 points"),
        ("agreement with the teacher", "–", "96.20 %", "–"),
        ("parameters", "464,154", "120,000", "3.9x fewer"),
        ("MACs (one image)", "69.1 M", "20.0 M", "3.5x fewer"),
        ("file size (ONNX)", "1.87 MB", "512 kB", "3.7x smaller"),
        ("latency", "2.50 ms", "1.25 ms", "2.0x faster"),
    ]


def test_missing_same_and_worse_values():
    metrics = example()
    metrics["teacher"] |= {"accuracy": None, "onnx_bytes": None, "latency_ms": 1.0}
    metrics["student"] |= {"accuracy": float("nan"), "agreement": None, "parameters": 464154}
    rows = {row[0]: row[1:] for row in comparison_rows(metrics)}
    assert "accuracy" not in rows
    assert "agreement with the teacher" not in rows
    assert rows["parameters"][2] == "same"
    assert rows["file size (ONNX)"] == ("–", "512 kB", "–")
    assert rows["latency"] == ("1.00 ms", "1.25 ms", "1.25x slower")


def test_layer_rows():
    assert layer_rows(example()) == [
        ("conv1", "first convolution", "442,368 -> 442,368"),
        ("layer1.0.conv", "kernels 96 in branches 64+32", "2.36 M -> 640,000"),
    ]


def test_markdown_table():
    assert markdown_table(["a|b", "n"], [["x", "1"], ["long", "–"]]) == "\n".join(
        ["| a\\|b |   n |", "| ---- | --: |", "| x    |   1 |", "| long |   – |"]
    )
    assert markdown_table(["a"], []) == "| a   |\n| --- |"


def test_rich_table_aligns_figures_and_prints_brackets():
    table = rich_table("[t]", ["layer", "n", "shape"], [["blocks[0]", "5", "64x3"], ["1", "–", "1x1"]])
    assert [column.justify for column in table.columns] == ["left", "right", "left"]
    console = Console(width=60)
    with console.capture() as capture:
        console.print(table)
    assert "blocks[0]" in capture.get()
    assert "[t]" in capture.get()


def test_page_says_it_all_and_loads_nothing(tmp_path):
    text, parsed = page(example(), tmp_path)
    words = " ".join(" ".join(parsed.text).split())
    assert "has 3.9x fewer parameters, needs 3.5x fewer multiply-adds for one image, is 3.7x smaller as a file" in words
    assert "It is 1.13 points less accurate (92.63 % before, 91.50 % after)." in words
    for part in ("not kept", "first convolution", "97.5 %", "dk2pnet compress resnet32", "some processor", "1.5"):
        assert part in words
    assert parsed.tags.count("svg") == 1
    assert ("lang", "en") in parsed.attributes
    assert "script" not in parsed.tags
    assert not [
        value for name, value in parsed.attributes if name.split(":")[-1] in ("src", "href") and value[0] != "#"
    ]
    assert not re.search(r"url\((?!#)|@import", text)
    assert "currentColor" in text
    assert "#010203" not in text  # the stand-in for it


def test_hostile_names_are_text(tmp_path):
    metrics = example()
    metrics["layers"][1]["name"] = metrics["stages"][0]["name"] = metrics["run"]["command"] = HOSTILE
    _, parsed = page(metrics, tmp_path)
    assert "script" not in parsed.tags
    assert "".join(parsed.text).count(HOSTILE) == 3
    assert HOSTILE[-31:] in "".join(parsed.text).replace(HOSTILE, "")  # in the chart, shortened and no formula


def test_many_layers_make_several_charts_with_unique_ids(tmp_path):
    _, parsed = page(example(layers=110), tmp_path)
    assert parsed.tags.count("svg") == 3
    ids = [value for name, value in parsed.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_a_bare_run_makes_a_page(tmp_path):
    bare = {"accuracy": None, "agreement": None, "parameters": 1, "macs": 1, "onnx_bytes": None, "latency_ms": None}
    _, parsed = page(
        {"teacher": bare, "student": bare, "stages": [], "layers": [], "decisions": [], "run": {}}, tmp_path
    )
    assert "svg" not in parsed.tags


def test_page_is_deterministic_and_leaves_matplotlib_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    text, _ = page(example(), tmp_path)
    assert page(example(), tmp_path)[0] == text
    assert dict(matplotlib.rcParams) == before


def test_a_failed_write_keeps_the_old_page(tmp_path, monkeypatch):
    text, _ = page(example(), tmp_path)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        write_page(example(layers=3), tmp_path / "report.html")
    assert [(p.name, p.read_text("utf-8")) for p in tmp_path.iterdir()] == [("report.html", text)]


@pytest.mark.parametrize(
    ("measure", "teacher", "value", "interval"),
    [
        ("accuracy", 92.0, "90.00 %", "89.00 to 91.50"),
        ("agreement with the teacher", 100.0, "90.00 %", "97.00 to 99.50"),
        ("error of the outputs", 0.0, "90.0000", "0.5000 to 3.0000"),
    ],
)
def test_the_interval_of_a_point_of_the_curve_is_that_of_its_loss(measure, teacher, value, interval):
    shares = {"macs_kept": 0.5, "parameters_kept": 0.25, "latency": None}
    point = {
        "budget": "macs=0.5",
        **shares,
        "tuned": None,
        "closed form": {"value": 90.0, "loss": {"low": 0.5, "high": 3}},
    }
    rows = curve_rows({"measure": measure, "teacher": {"value": teacher}, "points": [point], "knee": "macs=0.5"})
    assert len(CURVE_HEADER) == len(rows[1])
    assert rows[1] == ("macs=0.5", "0.50", "0.25", "–", value, "–", interval, "knee")
