"""Networks that are no classifiers, the whole way: what is decided, reported and allowed by what answers are for."""

import pytest
import torch
from torch import nn

from dk2pnet import InputError, answers, compress
from dk2pnet.answers import predict
from dk2pnet.tasks import relative_errors


class Net(nn.Module):
    """Three biased convolutions over 3 x 8 x 8, then `answer` of their maps (8 channels, 4 x 4)."""

    def __init__(self, answer):
        super().__init__()
        torch.manual_seed(0)
        convs = (nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1))
        self.body = nn.Sequential(*(step for conv in convs for step in (conv, nn.ReLU())))
        self.head, self.boxes = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 2, 3, padding=1)
        self.answer = answer

    def forward(self, x):
        return self.answer(self, self.body(x))


def pixels(net, maps):
    return 320 + 400 * net.head(maps).mean((2, 3))


def labels(net, maps):
    return (8 * net.head(maps).mean((2, 3))).sigmoid()


def directions(net, maps):
    return nn.functional.normalize(net.head(maps).flatten(1))


def segments(net, maps):
    return nn.functional.interpolate(20 * net.head(maps), scale_factor=2.0).softmax(1)


def sequence(net, maps):
    return net.head(maps).flatten(2).permute(2, 0, 1)  # (T, B, classes)


def detector(net, maps):
    return 640 + 40 * net.boxes(maps), (9 * net.head(maps)).sigmoid()


def images(count=125, batch=8, seed=1):
    x = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return list((x.cumsum(3) / 3).split(batch))


X = images()
HELD = [(x, None) for x in images(seed=2)]

# network, task, criterion by itself, what decides
TASKS = {
    "pixels": (pixels, "regress", "response", "relative squared error"),
    "labels": (labels, "multilabel", "response", "KL(teacher || student)"),
    "directions": (directions, "embed", "response", "relative squared error"),
    "segments": (segments, "dense", "response", "KL(teacher || student)"),
    "sequence": (sequence, "regress", "response", "relative squared error"),
    "detector": (detector, "regress", "response", "relative squared error"),
}


@pytest.mark.parametrize("name", TASKS)
def test_a_network_is_judged_by_what_its_answers_are_for(name):
    answer, task, criterion, measure = TASKS[name]
    model = Net(answer).eval()
    result = compress(model, X, "macs=0.6", calibration_images=125, tune=0)
    run, student = result.metrics["run"], result.metrics["student"]
    assert (run["task"], run["criterion"]) == (task, criterion)
    assert run["images"] == {"calibration": 100, "held out": 25}
    assert result.metrics["notes"] == []
    assert {decision["measure"] for decision in result.metrics["decisions"]} == {measure}
    assert (student["agreement"] is None) == (task in ("regress", "embed"))
    found = relative_errors(predict(model, HELD, task=task), predict(result.model, HELD, task=task))
    assert len(student["relative_errors"]) == len(found)
    for said, true in zip(student["relative_errors"].values(), found.values(), strict=True):
        assert said == pytest.approx(100 * true**0.5, rel=0.5), "of other images than those that decided"
    assert student["relative_error_worst"] >= student["relative_error"] > 0


def test_numbers_are_no_scores_whatever_is_decided():
    """Where numbers were judged as scores, a shift of all of them would cost nothing."""
    model = Net(pixels).eval()
    wanted = predict(model, HELD, task="regress")
    errors = {}
    for task in ("regress", "classify"):
        result = compress(model, X, "macs=0.5", criterion="response", task=task, calibration_images=125, tune=0)
        assert result.metrics["run"]["task"] == task
        assert (result.metrics["student"]["agreement"] is None) == (task == "regress")
        errors[task] = relative_errors(wanted, predict(result.model, HELD))["output"]
    assert errors["regress"] <= errors["classify"]


def test_what_may_be_scores_or_not_is_said_and_can_be_told():
    model = nn.Sequential(Net(pixels), nn.BatchNorm1d(4)).eval()
    model[1].running_mean.fill_(320)
    said = [note for note in compress(model, X, "macs=0.6", tune=0).metrics["notes"] if "--task" in note]
    assert len(said) == 1
    assert said[0].startswith("the 4 numbers that the network gives for an image are taken for scores of classes")
    assert compress(model, X, "macs=0.6", tune=0, task="regress").metrics["notes"] == []


@pytest.mark.parametrize(
    ("answer", "options", "said"),
    [
        (
            pixels,
            {"task": "dense"},
            r"task is 'dense', and the network returns \(1, 4\); expected class scores at every",
        ),
        (segments, {"task": "classify"}, r"task is 'classify', and the network returns \(1, 4, 8, 8\); expected rows"),
        (pixels, {"task": "classes"}, "task is 'classes'; expected one of classify, multilabel, dense, embed, regress"),
        (
            pixels,
            {"criterion": "loss"},
            r"returns \(1, 4\), taken for task 'regress'; use --criterion response, or --t",
        ),
        (segments, {"criterion": "loss"}, r"returns \(1, 4, 8, 8\), taken for task 'dense'; use --criterion response$"),
    ],
)
def test_what_does_not_go_together_is_refused_before_the_work(answer, options, said):
    with pytest.raises(InputError, match=said):
        compress(Net(answer).eval(), X, "macs=0.6", **options)
    with pytest.raises(InputError, match="disagree.*needs a classifier.*task 'regress'.*error=0.02"):
        compress(Net(pixels).eval(), X, "disagree=5")


def test_an_error_is_that_of_every_output():
    """Boxes of hundreds of pixels do not hide what the scores lose."""
    model = Net(detector).eval()
    result = compress(model, X, "error=0.2", calibration_images=125, tune=0, holdout=[x for x, _ in HELD])
    assert 0 < result.metrics["decided"]["value"] <= 0.2
    wide = relative_errors(predict(model, HELD), predict(result.model, HELD))
    assert max(wide.values()) <= 0.22
    assert result.plan.macs < 0.95 * result.plan.macs_dense


def test_two_heads_of_classes_can_be_told():
    """Agreement is that of both; there is no accuracy, as labels are of one."""

    def heads(net, maps):
        return 4 * net.head(maps).mean((2, 3)), 4 * net.boxes(maps).mean((2, 3))

    labelled = [(x, torch.zeros(len(x), dtype=torch.int64)) for x in X]
    result = compress(
        Net(heads).eval(), X, "macs=0.6", task="classify", test_data=labelled, tune=0, criterion="response"
    )
    assert result.metrics["student"]["accuracy"] is None
    assert 0 < result.metrics["student"]["agreement"] <= 100


def test_labels_and_positions_can_disagree():
    for answer in (labels, segments):
        result = compress(Net(answer).eval(), X, "disagree=20", calibration_images=125, tune=0)
        assert result.metrics["decided"]["value"] <= 20


def test_maps_that_memory_does_not_hold_make_the_same_student(monkeypatch):
    model = Net(segments).eval()
    plain = compress(model, X, "macs=0.6", calibration_images=125, tune=0)
    monkeypatch.setattr(answers, "KEPT", 5000)
    kept = compress(model, X, "macs=0.6", calibration_images=125, tune=0)
    assert kept.metrics["student"] == plain.metrics["student"]
    assert kept.metrics["decisions"] == plain.metrics["decisions"]
