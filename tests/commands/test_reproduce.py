"""Runs that are there are kept, others are refused or counted as missing; the statistics are worked out by hand."""

import json
import shlex

import pytest

from dk2pnet.commands import reproduce as module
from dk2pnet.commands.reproduce import METHODS, SETUPS, reproduce
from dk2pnet.errors import InputError
from dk2pnet.training.losses import METHODS as LOSSES

NETWORK = {"parameters": 1000, "macs": 20_000}
RUN = {"run": {"versions": {"torch": "2"}, "hardware": {"processor": "one"}}}


@pytest.fixture
def trained(monkeypatch):
    """In place of training: a folder with the accuracy that follows from method and seed; returns the calls."""
    calls = []

    def pretend(model, data, options, *, out, run):
        given = {"teacher": options.teacher, "teacher_weights": options.teacher_weights, "images": options.images}
        calls.append((model, out.name, options, given))
        accuracy = 80.0 + list(LOSSES).index(options.method) + (options.seed if options.alpha else 2 * options.seed)
        network = {"accuracy": accuracy, "validation_accuracy": accuracy - 1, **NETWORK}
        out.mkdir(parents=True)
        (out / "metrics.json").write_text(json.dumps({"network": network, **RUN}))

    monkeypatch.setattr(module, "train", pretend)
    return calls


def test_the_teacher_first_then_every_method_and_seed(trained, tmp_path):
    results = reproduce("mnist", out=tmp_path / "out", seeds=(0, 1), epochs=3)
    names = [name for _, name, _, _ in trained]
    assert names == ["teacher", *(f"{name}-0" for name in METHODS), *(f"{name}-1" for name in METHODS)]
    assert [model for model, *_ in trained] == ["resnet20", *["dk2pnet-14x12"] * 2 * len(METHODS)]
    for _, name, options, given in trained[1:]:
        assert (options.epochs, options.seed) == (3, int(name[-1]))
        assert given.get("teacher") == (None if name.startswith("labels") else str(tmp_path / "out/teacher"))
    assert trained[0][2].epochs == SETUPS["mnist"].teacher_epochs
    assert {row["method"]: row["seeds"] for row in results["rows"]} == dict.fromkeys(METHODS, 2)
    assert results == json.loads((tmp_path / "out/results.json").read_text())
    assert "| KP + KD " in (tmp_path / "out/results.md").read_text()
    assert (tmp_path / "out/figure.svg").read_text().startswith("<?xml")


def test_mean_spread_and_paired_difference(trained, tmp_path):
    # kd: 81 + seed, kp+kd: 82 + seed -> always +1; seeds 0, 1, 2 spread by 1.
    results = reproduce("mnist", out=tmp_path / "out", methods=["kd", "kp+kd"])
    kd, kp = results["rows"]
    assert (kd["accuracy"], kd["spread"], kd["seeds"]) == (pytest.approx(82), pytest.approx(1), 3)
    assert kd["against_kd"] is None
    assert kp["against_kd"] == {"difference": 1.0, "low": 1.0, "high": 1.0, "seeds": [0, 1, 2]}


def test_what_another_process_is_writing_is_no_run_yet(trained, tmp_path):
    (tmp_path / "out/.kd-1-ab12").mkdir(parents=True)
    (tmp_path / "out/.kd-1-ab12/metrics.json").write_text("{")
    results = reproduce("mnist", out=tmp_path / "out", methods=["kd"], seeds=(0,))
    assert [run["seed"] for run in results["runs"]] == [0]


def test_minutes_are_those_of_the_median_speed(tmp_path):
    """A run that was stopped for a while has a slow line in its log."""
    speeds = (256.0, 1.0, 128.0)
    lines = [json.dumps({"step": 60 * (number + 1), "images_per_second": speed}) for number, speed in enumerate(speeds)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    assert module._time_of(tmp_path) == {"minutes": 180 * 128 / 128 / 60}


def test_interval_of_the_paired_difference():
    # Differences 0, 1, 2: mean 1, deviation 1, Student's t at 2 degrees of freedom 4.3027.
    runs = [{"method": "kd", "seed": s, "accuracy": 90.0} for s in range(4)]
    runs += [{"method": "kp+kd", "seed": s, "accuracy": 90.0 + s} for s in range(3)]
    paired = module._paired(runs, "kp+kd", "kd")
    assert (paired["difference"], paired["seeds"]) == (1.0, [0, 1, 2])
    assert (paired["low"], paired["high"]) == (pytest.approx(1 - 2.4841, abs=1e-3), pytest.approx(3.4841, abs=1e-3))
    assert module._paired(runs[:5], "kp+kd", "kd") is None


def test_what_is_there_is_not_made_again_and_the_rest_is_named(trained, tmp_path):
    out = tmp_path / "out"
    first = reproduce("cifar10", out=out, methods=["kd"], seeds=(0,), epochs=5)
    assert first["continue"] == [
        shlex.join(
            [
                "dk2pnet",
                "reproduce",
                "cifar10",
                "--out",
                "OUT",
                "--student",
                "dk2pnet-32x32",
                "--teacher",
                "resnet20x4",
                *rest,
            ]
        )
        for rest in (
            ["--epochs", "5", "--teacher-epochs", "100", "--lr", "0.1"]
            + [part for name in METHODS if name != "kd" for part in ("--method", name)]
            + ["--seed", "0"],
            ["--epochs", "5", "--teacher-epochs", "100", "--lr", "0.1"]
            + [part for name in METHODS for part in ("--method", name)]
            + ["--seed", "1", "--seed", "2"],
        )
    ]
    made = len(trained)
    reproduce("cifar10", out=out, methods=["kd"], seeds=(0,), epochs=5)
    assert len(trained) == made
    whole = reproduce("cifar10", out=out, epochs=5)
    assert len(trained) == 1 + 3 * len(METHODS)
    assert whole["continue"] == []


def test_a_teacher_of_the_users_own(trained, tmp_path):
    results = reproduce(
        "cifar10", out=tmp_path / "out", teacher="resnet44", teacher_weights="a/b.th", methods=["kd"], seeds=(0,)
    )
    assert [name for _, name, _, _ in trained] == ["kd-0"]
    assert trained[0][3]["teacher"] == "resnet44"
    assert trained[0][3]["teacher_weights"] == "a/b.th"
    assert "--teacher resnet44 --teacher-weights b.th" in results["continue"][0]


def test_a_teacher_named_without_weights_is_trained_first(trained, tmp_path):
    results = reproduce("cifar10", out=tmp_path / "out", teacher="vgg8", teacher_epochs=7, methods=["kd"], seeds=(0,))
    assert [(model, name, options.epochs) for model, name, options, _ in trained] == [
        ("vgg8", "teacher", 7),
        ("dk2pnet-32x32", "kd-0", 200),
    ]
    assert trained[1][3]["teacher"] == str(tmp_path / "out/teacher")
    assert "--teacher vgg8 --epochs 200 --teacher-epochs 7" in results["continue"][0]


def test_a_teacher_is_not_taken_for_that_of_another_setup(trained, tmp_path, monkeypatch):
    """The first call is stopped when its teacher is there and no student yet."""
    pretend = module.train

    def stopped(model, data, options, *, out, run):
        if out.name != "teacher":
            raise KeyboardInterrupt
        pretend(model, data, options, out=out, run=run)

    monkeypatch.setattr(module, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        reproduce("mnist", out=tmp_path / "out", quick=True)
    monkeypatch.setattr(module, "train", pretend)
    with pytest.raises(InputError, match="holds runs with data mnist, this call has cifar10"):
        reproduce("cifar10", out=tmp_path / "out")
    assert reproduce("mnist", out=tmp_path / "out", quick=True)["continue"] == []


def test_what_is_missing_of_a_quick_one_is_quick(trained, tmp_path):
    command = reproduce("mnist", out=tmp_path / "out", quick=True, methods=["kd"])["continue"][0]
    assert " --quick " in f"{command} "


def test_other_settings_are_refused_and_change_nothing(trained, tmp_path):
    out = tmp_path / "out"
    reproduce("mnist", out=out, methods=["kd"], seeds=(0,), epochs=2)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="runs with epochs 2, this call has 3; give the same, or another --out"):
        reproduce("mnist", out=out, epochs=3)
    with pytest.raises(InputError, match="runs with data mnist, this call has cifar10"):
        reproduce("cifar10", out=out)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"methods": ["magic"]}, "method is 'magic'; expected some of labels, kd, fitnets"),
        ({"seeds": ()}, "seeds are none"),
        ({"seeds": (0, -1)}, "seeds are 0, -1; expected one or more, each 0 or more"),
        ({"teacher_weights": "x.th"}, "without a teacher"),
        ({"teacher": "resnet99"}, "network 'resnet99' is not known"),
        ({"teacher": "resnet20", "teacher_weights": "x.th", "teacher_epochs": 3}, "a teacher that is trained; leave"),
    ],
)
def test_bad_input(trained, tmp_path, given, words):
    with pytest.raises(InputError, match=words):
        reproduce("mnist", out=tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()
    assert not trained


def test_a_folder_of_something_else_is_left_alone(trained, tmp_path):
    (tmp_path / "letters.txt").write_text("dear")
    with pytest.raises(InputError, match="not a folder that dk2pnet reproduce wrote"):
        reproduce("mnist", out=tmp_path)
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(InputError, match="not a file that dk2pnet reproduce wrote"):
        reproduce("mnist", out=tmp_path)
    assert (tmp_path / "letters.txt").read_text() == "dear"
