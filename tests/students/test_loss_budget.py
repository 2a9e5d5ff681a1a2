"""Budgets in points, from images to the network: which images decide, which report, and what is said."""

import pytest
import torch
from test_tuning import X, net

from dk2pnet import InputError, compress, explore
from dk2pnet.answers import predict
from dk2pnet.commands.explore import compress_command, default_budgets, knee
from dk2pnet.data import ImageData, Normalization, part_of_split
from dk2pnet.data.samples import Part, named_samples
from dk2pnet.estimates import estimate
from dk2pnet.options import ExploreOptions
from dk2pnet.run.run import Run
from dk2pnet.students.probes import Prober
from dk2pnet.tasks import accuracy
from toys import toy

MORE = toy(400, 50, seed=5)
TEST = toy(400, 50, seed=6)
PLAIN = Normalization((0.0,), (1.0,))


def data(count, seed=0, classes=("a", "b")):
    images = torch.randint(0, 256, (count, 1, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return ImageData(f"data{seed}", images, torch.arange(count) % 2, list(classes))


def count(batches):
    return sum(len(x) for x, _ in batches)


def rows(batches):
    return {tuple(image.flatten().tolist()) for x, _ in batches for image in x}


# -- which images decide -----------------------------------------------------------------------------------------------


def named(training, test, **more):
    return named_samples(training, test, PLAIN, 50, **more)


def test_by_default_the_validation_tenth_decides():
    images = named(data(200), data(60, 1))
    assert count(images.decide) == 20
    assert not rows(images.decide) & (rows(images.gather) | rows(images.held_out) | rows(images.test))
    assert count(images.test) == 60


def test_a_part_of_the_test_split_decides_and_the_rest_reports():
    images = named(data(200), data(60, 1), holdout_split="test[:25%]")
    assert (count(images.decide), count(images.test)) == (15, 45)
    assert not rows(images.decide) & rows(images.test)


def test_a_part_of_the_training_split_that_decides_is_in_nothing_else():
    images = named(data(200), data(60, 1), holdout_split="train[-80:]")
    assert count(images.decide) == 80
    used = rows(images.gather) | rows(images.held_out) | rows(images.train.batches(50, PLAIN))
    assert not rows(images.decide) & used
    assert count(images.test) == 60


def test_a_folder_of_others_decides():
    images = named(data(200), data(60, 1), holdout=data(30, 2))
    assert count(images.decide) == 30
    assert images.decided_by == "data2"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"holdout_split": "valid[:5]"}, "a part of train or test"),
        ({"holdout_split": "test[:x]"}, "cannot be understood"),
        ({"holdout_split": "test[:0]"}, "holds no images"),
        ({"holdout": data(30, 2, ("a", "c"))}, "has the classes a, c, .*expected the same"),
    ],
)
def test_a_holdout_that_cannot_be_is_refused(more, words):
    with pytest.raises(InputError, match=words):
        named(data(200), data(60, 1), **more)


def test_slices_are_those_of_datasets():
    whole = data(40)
    for text, first, length in (("test[:50%]", 0, 20), ("test[-10:]", 30, 10), ("test[5:8]", 5, 3), ("test", 0, 40)):
        part, others = part_of_split(text, whole)
        assert torch.equal(part.images, whole.images[first : first + length])
        assert len(part) + len(others) == 40


# -- the whole way -----------------------------------------------------------------------------------------------------


def test_a_drop_is_decided_on_the_holdout_and_confirmed_on_the_test_images():
    result = compress(net(), X, "drop=3", criterion="loss", holdout=MORE, test_data=TEST, tune=10)
    decided = result.metrics["decided"]
    teacher = net()
    measured = estimate("drop", predict(teacher, MORE), predict(result.model, MORE))
    assert decided["value"] == measured.value <= 3
    assert (decided["low"], decided["high"]) == (measured.low, measured.high)
    confirmed = estimate("drop", predict(teacher, TEST), predict(result.model, TEST))
    assert decided["confirmed"] == {"on": "the test images", **confirmed.to_dict()}
    assert result.metrics["run"]["images"]["deciding"] == 400
    assert result.metrics["run"]["images"]["test"] == 400
    kept = [probe["macs_kept"] for probe in decided["probes"] if probe.get("within")]
    assert result.plan.macs / result.plan.macs_dense == min(kept)


@pytest.mark.parametrize("budget", ["disagree=6", "error=0.1"])
def test_without_labels_the_held_out_images_decide_and_a_fifth_confirms(budget):
    result = compress(net(), X, budget, criterion="loss", tune=0)
    decided = result.metrics["decided"]
    assert decided["value"] <= float(budget.partition("=")[2])
    assert decided["images"] == 25  # of 32 held-out ones
    assert decided["confirmed"]["images"] == 7
    assert decided["confirmed"]["on"] == "images put aside"
    assert "had decided on corrections" in result.metrics["notes"][-1]


def test_a_target_given_asks_for_the_fastest(monkeypatch):
    from dk2pnet.students import loss_budget as points

    units = []
    smallest = points.smallest

    def see(wanted, unit, *rest, **more):
        units.append(unit)
        return smallest(wanted, "macs", *rest, **more)

    monkeypatch.setattr(points, "smallest", see)
    compress(net(), X, "error=0.3", criterion="loss", tune=0)
    compress(net(), X, "error=0.3", criterion="loss", tune=0, target="onnxruntime")
    assert units == ["macs", "latency"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": "drop=1"}, "labelled images"),
        ({"budget": "drop=1", "data": None}, "none were given"),
        ({"budget": "drop=1", "epochs": 2}, "leave --epochs away"),
        ({"budget": "drop=0"}, "drop=0.5"),
        ({"budget": "disagree=101"}, "disagree=2"),
        ({"budget": "macs=0.5", "holdout": MORE}, "budget in points"),
        ({"budget": "drop=1", "holdout": "folder"}, "holdout=BATCHES"),
        ({"budget": "drop=0.05", "holdout": MORE}, "320 images cannot tell a drop of 0.05 points"),
    ],
)
def test_what_cannot_be_decided_is_refused(options, words):
    given = {"budget": "drop=1", "criterion": "loss", "data": X, "tune": 0} | options
    if given["data"] is None:
        given["criterion"] = "weight"
    with pytest.raises(InputError, match=words):
        compress(net(), given.pop("data"), given.pop("budget"), criterion=given.pop("criterion"), **given)


def test_too_few_images_are_refused_before_any_network_is_made(monkeypatch):
    monkeypatch.setattr(Prober, "make", lambda *_: pytest.fail("a network was made"))
    with pytest.raises(InputError, match=r"320 images cannot tell a drop of 0.1 points: of a student"):
        compress(net(), X, "drop=0.1", criterion="loss", holdout=MORE, tune=0)


def test_a_refusal_leaves_nothing_in_the_way(tmp_path):
    with pytest.raises(InputError, match="cannot tell"):
        compress(net(), X, "drop=0.05", criterion="loss", holdout=MORE, tune=0, out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


# -- explore -----------------------------------------------------------------------------------------------------------


def test_the_knee_is_farthest_from_the_chord():
    points = [
        {"budget": f"macs={x}", "macs_kept": x, "tuned": None, "closed form": {"value": y}}
        for x, y in ((0.5, 91.9), (0.25, 91.0), (0.125, 84.0), (0.0625, 52.0))
    ]
    # Each halving is a quarter of the way; 40 points are lost in all: 0.25-0.0025, 0.5-0.025, 0.75-0.2.
    assert knee(points, 92.0, 1) == "macs=0.125"
    straight = [
        {"budget": f"macs={x}", "macs_kept": x, "tuned": None, "closed form": {"value": 92.0 - 10 * n}}
        for n, x in enumerate((0.5, 0.25, 0.125), 1)
    ]
    assert knee(straight, 92.0, 1) is None
    errors = [{**p, "closed form": {"value": 92.0 - p["closed form"]["value"]}} for p in points]
    assert knee(errors, 0.0, -1) == "macs=0.125"


def test_budgets_are_spread_down_to_what_can_be_reached():
    shares = [budget.value for budget in default_budgets(0.05, 8)]
    assert shares[0] == 0.7
    assert shares[-1] == 0.08
    assert len(shares) == 8
    ratios = [a / b for a, b in zip(shares, shares[1:], strict=False)]
    assert max(ratios) / min(ratios) < 1.2
    bounded = [budget.value for budget in default_budgets(0.31, 5)]
    assert bounded[0] == 0.7
    assert 0.31 < bounded[-1] < 0.33
    assert [budget.value for budget in default_budgets(0.9, 5)] == [0.92]
    assert [budget.value for budget in default_budgets(0.99, 5)] == [1.0]


def test_the_command_of_a_point_makes_its_network():
    arguments = {"model": "resnet32", "data": "my images"}
    options = ExploreOptions(keep=["a", "b.*"], first=True, seed=3, budgets=["macs=0.5"], holdout="folder")
    assert compress_command(arguments, options, "macs=0.3") == (
        "dk2pnet compress --model resnet32 --data 'my images' --keep a --keep 'b.*' --first --seed 3 --budget macs=0.3 "
        "--out out-macs=0.3"
    )
    options = ExploreOptions(precision="fp32", device="cpu", tune=40, rebuild=False)
    assert compress_command({"model": "resnet32", "data": None}, options, "macs=0.3") == (
        "dk2pnet compress --model resnet32 --no-rebuild --tune 40 --precision fp32 --device cpu --budget macs=0.3 "
        "--out out-macs=0.3"
    )


def test_explore_shows_what_compress_gives(no_timing):
    gathered = []
    found = explore(
        net(),
        X,
        criterion="loss",
        budgets=["macs=0.9", "macs=0.6"],
        holdout=MORE,
        tune=10,
        run=Run(lambda what, done, total: gathered.append(what.startswith("moments"))),
    )
    assert sum(gathered) == len(X)  # one pass over the images for all budgets
    assert found["measure"] == "accuracy"
    assert found["teacher"]["value"] == pytest.approx(accuracy(predict(net(), MORE)))
    assert [point["budget"] for point in found["points"]] == ["macs=0.9", "macs=0.6"]
    for point in found["points"]:
        same = compress(net(), X, point["budget"], criterion="loss", tune=10)
        assert point["macs"] == same.plan.macs
        assert point["parameters"] == same.plan.parameters
        best = point["tuned"] or point["closed form"]
        assert best["loss"] == estimate("drop", predict(net(), MORE), predict(same.model, MORE)).to_dict()
        assert best["value"] == pytest.approx(accuracy(predict(same.model, MORE)))
        assert [layer["counts"] for layer in point["layers"]] == [layer.counts for layer in same.plan.layers]


def test_what_was_refused_does_not_stand_in_the_way(tmp_path):
    """As a time that is too short for one step."""
    with pytest.raises(InputError, match="one step takes"):
        explore(net(), X, criterion="response", budgets=["macs=0.6"], tune="0.000001s", out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_explore_chooses_its_budgets_and_goes_on_with_them(tmp_path, no_timing, monkeypatch):
    whole = explore(net(), X, criterion="response", points=3, tune=0)
    assert whole["measure"] == "agreement with the teacher"
    shares = [float(point["budget"].partition("=")[2]) for point in whole["points"]]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == 0.7
    assert len(shares) == 3
    begun = []

    def killed(what, done, total):
        begun.append(what)
        if what == f"exploring macs={shares[1]:g}":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        explore(net(), X, criterion="response", points=3, tune=0, out=tmp_path / "out", run=Run(killed))
    assert (tmp_path / "out.unfinished/budgets.json").is_file()
    monkeypatch.setattr("dk2pnet.commands.explore.default_budgets", None)  # they are known by now
    found = explore(net(), X, criterion="response", points=3, tune=0, out=tmp_path / "out")
    assert [point["closed form"] for point in found["points"]] == [point["closed form"] for point in whole["points"]]
    assert not (tmp_path / "out.unfinished").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budgets": ["drop=1"]}, "drop=1 is a loss"),
        ({"points": 1}, "points is 1"),
        ({"budgets": ["macs=2"]}, "macs=2"),
        ({"target": "toaster"}, "toaster"),
        ({"augment": "wild"}, "wild"),
        ({"tune": "soon"}, "soon"),
    ],
)
def test_explore_refuses_what_it_cannot_show(options, words):
    with pytest.raises(InputError, match=words):
        explore(net(), X, **options)


# -- other people's images ---------------------------------------------------------------------------------------------


def test_other_images_calibrate_and_the_own_ones_report():
    other = data(90, 3)
    images = named(data(200), data(60, 1), calibration=other)
    everything = rows(other.batches(90, PLAIN))
    assert rows(images.gather) | rows(images.held_out) <= everything
    assert not rows(images.train.batches(200, PLAIN)) & everything
    assert count(images.gather) + count(images.held_out) == 50
    assert count(images.decide) == 20
    assert images.tune.labels is None


@pytest.mark.parametrize(("start", "stop"), [(0, 10), (3, 4), (3, 9), (5, 5), (8, 10), (0, 3)])
def test_a_part_of_batches_is_those_images(start, stop):
    x = torch.arange(10)[:, None]
    found = [a for a, _ in Part(list(zip(x.split(3), x.split(3), strict=True)), start, stop)]
    assert torch.cat([*found, x[:0]]).equal(x[start:stop])
