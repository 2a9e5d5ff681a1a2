"""The table and the figure of `reproduce`, from results written by hand."""

import copy

import pytest

from dk2pnet.report.reproduction import (
    PUBLISHED,
    REPRODUCTION_HEADER,
    reproduction_figure,
    reproduction_rows,
    write_reproduction,
)

RESULTS = {
    "settings": {
        "data": "mnist",
        "student": "dk2pnet-14x12",
        "teacher": "resnet20",
        "epochs": 60,
        "learning_rate": 0.1,
        "images": None,
    },
    "teacher": {"accuracy": 99.6, "parameters": 269_434, "macs": 31_000_000},
    "student": {"parameters": 14_650, "macs": 1_900_000},
    "rows": [
        {"method": "labels", "accuracy": 99.1, "spread": None, "seeds": 1, "against_kd": None},
        {
            "method": "kp+kd",
            "accuracy": 99.512,
            "spread": 0.034,
            "seeds": 3,
            "against_kd": {"difference": 0.2, "low": -0.1, "high": 0.5, "seeds": [0, 1, 2]},
        },
    ],
    "continue": ["dk2pnet reproduce mnist --out OUT --method kd --seed 0"],
}


def test_rows():
    rows = reproduction_rows(RESULTS)
    assert all(len(row) == len(REPRODUCTION_HEADER) for row in rows)
    against = "+0.20 (-0.10 to +0.50)"
    assert rows[0] == ("teacher (resnet20)", "labels", "269,434", "31.0 M", "–", "99.60", "0.40", "–")
    assert rows[1] == ("dk2pnet-14x12", "labels only", "14,650", "1.90 M", "1", "99.10", "0.90", "–")
    assert rows[2] == ("dk2pnet-14x12", "KP + KD", "14,650", "1.90 M", "3", "99.51 ± 0.03", "0.49", against)
    assert rows[4] == ("FitNets' student", "published", "30,000", "–", "–", "99.49", "0.51", "–")
    assert len(rows) == 3 + len(PUBLISHED["mnist"])


def test_a_data_set_of_which_nothing_is_published():
    results = copy.deepcopy(RESULTS)
    results["settings"]["data"] = "mine"
    assert len(reproduction_rows(results)) == 3


def test_files(tmp_path):
    write_reproduction(RESULTS, tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert "Students: 60 epochs at learning rate 0.1; test accuracy of the last epoch." in text
    assert "99.51 ± 0.03" in text
    assert "+0.20 (-0.10 to +0.50)" in text
    assert "    dk2pnet reproduce mnist --out OUT --method kd --seed 0" in text
    assert {path.name for path in tmp_path.iterdir()} == {"results.md", "figure.svg"}
    before = (tmp_path / "figure.svg").read_bytes()
    write_reproduction(RESULTS, tmp_path)
    assert (tmp_path / "figure.svg").read_bytes() == before


def test_before_any_run_there_is_a_page_and_no_figure(tmp_path):
    write_reproduction(RESULTS | {"teacher": None, "student": None, "rows": []}, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"results.md"}
    assert "figure.svg" not in (tmp_path / "results.md").read_text()


@pytest.mark.parametrize(
    "data", [["mnist"], ["mnist", "cifar10", "mine"], ["mnist", "cifar10", "mine", "cifar100", "svhn"]]
)
def test_figure_has_a_panel_for_each_data_set(data):
    several = []
    for name in data:
        several.append(copy.deepcopy(RESULTS))
        several[-1]["settings"]["data"] = name
    panels = reproduction_figure(several).axes
    assert [axes.get_title(loc="left") for axes in panels] == data
    for axes, name in zip(panels, data, strict=True):
        labels = axes.get_legend_handles_labels()[1]
        assert ("FitNets (2015)" in labels) == (name in PUBLISHED)
        assert {"our teacher", "DK²PNet, labels only", "DK²PNet, KP + KD"} <= set(labels)
        where = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
        assert where["our teacher"] == [[269_434, 99.6]]


def test_two_schedules_of_a_data_set_share_a_panel():
    longer = copy.deepcopy(RESULTS)
    longer["settings"]["epochs"] = 90
    (axes,) = reproduction_figure([RESULTS, longer]).axes
    assert [text.get_text() for text in axes.texts] == ["60 epochs", "90 epochs"]
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert "our teacher" in legend
    assert len(legend) == len(set(legend))
    assert not reproduction_figure([RESULTS]).axes[0].texts  # a single one needs no telling apart
