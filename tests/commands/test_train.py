"""What `train` trains on and beside, and what a call that goes on with a killed one may change."""

from dataclasses import replace

import pytest
import torch

from dk2pnet import compress, load_student
from dk2pnet.commands.train import train
from dk2pnet.data import ImageData, Normalization, load
from dk2pnet.errors import InputError
from dk2pnet.options import TrainOptions
from dk2pnet.plan import Plan
from dk2pnet.run.run import Run
from dk2pnet.students import loss_budget
from dk2pnet.training import fit as fitting
from dk2pnet.training.trainer import TrainingOptions

OPTIONS = TrainOptions(epochs=2, learning_rate=0.05, method="labels", precision="fp32", checkpoint_every=0)


class Killed(Exception):
    """Stands for whatever ends a run."""


def call(out, options, progress):
    train("lenet", "digits", OPTIONS, out=out, images=300, **options, run=Run(progress))


@pytest.fixture
def cut(tmp_path):
    """OUT of a run that was killed at its third step of six, on one thread."""

    def stop(what, done, total):
        if what.startswith("training") and done == 3:
            raise Killed

    with pytest.raises(Killed):
        call(tmp_path / "out", {"seed": 0, "threads": 1, "checkpoint_every": 0}, stop)
    return tmp_path / "out"


def test_a_run_goes_on_with_other_threads_and_on_another_device(cut):
    steps = []
    how = {"threads": 2, "device": "cpu", "checkpoint_every": 60}  # it began with device auto
    call(cut, {"seed": 0, **how}, lambda what, done, total: steps.append((what, done)))
    trained = [done for what, done in steps if what.startswith("training")]
    assert min(trained) > 2
    assert (cut / "model.safetensors").is_file()


def test_a_run_with_another_seed_is_refused_and_named(cut):
    with pytest.raises(InputError, match="unfinished run with seed 0, this one has 1"):
        call(cut, {"seed": 1, "threads": 1, "checkpoint_every": 0}, lambda *any: None)


def test_a_run_whose_images_have_changed_is_refused(cut, monkeypatch):
    def darker(model, data, chosen):
        found = load(data, "train")
        return ImageData(found.name, found.images // 2, found.labels, found.classes)

    monkeypatch.setattr("dk2pnet.commands.train._images", darker)
    with pytest.raises(InputError, match="unfinished run with digest-of-images .*, this one has"):
        call(cut, {"seed": 0, "threads": 1, "checkpoint_every": 0}, lambda *any: None)


def test_what_decides_on_a_network_was_never_trained_on(tmp_path, monkeypatch):
    """Also where few of the images train; and no note says that it may have been."""
    seen = {}

    def spy(net, source, *args, **more):
        seen["trained"] = source.data.images
        return fitting.fit(net, source, *args, **more)

    def refuse(wanted, unit, prober, teacher, deciding):
        seen["deciding"] = torch.cat([x for x, _ in deciding])
        seen["may"] = loss_budget._may_have_trained(prober.teacher)
        raise Killed

    monkeypatch.setattr("dk2pnet.commands.train.fit", spy)
    monkeypatch.setattr(loss_budget, "smallest", refuse)
    out = tmp_path / "out"
    made = train("lenet", "digits", replace(OPTIONS, epochs=1), out=out, images=700)
    assert made["run"]["images"]["train"] == 630
    assert made["run"]["images"]["validation"] == 70
    plan = Plan.load(out / "plan.json")
    for model, weights, may in ((str(out), None, False), ("lenet", str(out / "model.safetensors"), True)):
        with pytest.raises(Killed):
            compress(model, "digits", "drop=20", weights=weights, normalize="0.5/0.5" if weights else None, tune=0)
        assert seen["may"] == may
    norm = Normalization.from_dict(plan.normalization)
    trained = {x.numpy().tobytes() for x in norm.apply(seen["trained"]).mul(100).round()}
    assert not trained & {x.numpy().tobytes() for x in seen["deciding"].mul(100).round()}


@pytest.mark.parametrize("weights", [None, "model.safetensors"])
def test_training_further_what_somebody_else_trained_says_nothing_of_what_it_has_seen(tmp_path, weights):
    first = tmp_path / "first"
    train("lenet", "digits", replace(OPTIONS, epochs=1), out=first, images=100)
    more = {"weights": str(first / weights)} if weights else {}
    train(
        "lenet" if weights else str(first),
        "digits",
        replace(OPTIONS, epochs=1),
        out=tmp_path / "out",
        images=50,
        **more,
    )
    unseen = [Plan.load(folder / "plan.json").unseen for folder in (first, tmp_path / "out")]
    assert unseen[0] is not None
    assert unseen[1] == (None if weights else unseen[0])


def test_a_failed_export_does_not_cost_the_training(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise InputError("such a layer is not known")

    monkeypatch.setattr("dk2pnet.commands.train.write_onnx", refuse)
    train("lenet", "digits", replace(OPTIONS, epochs=1), out=tmp_path / "out", images=100)
    assert (tmp_path / "out/model.safetensors").is_file()
    assert not (tmp_path / "out/model.onnx").exists()
    assert "no model.onnx was written: such a layer is not known" in caplog.text


def test_fewer_images_are_spread_over_all_classes(tmp_path, monkeypatch):
    """Rows of a folder lie class by class; the first so many would leave the last classes out."""
    pixels = torch.randint(256, (40, 1, 8, 8), dtype=torch.uint8)
    data = ImageData("mine", pixels, torch.arange(40) // 10)
    seen = []
    monkeypatch.setattr("dk2pnet.commands.train.load_data", lambda *_, **__: data)
    monkeypatch.setattr("dk2pnet.commands.train.load_test", lambda *_: None)
    monkeypatch.setattr("dk2pnet.commands.train.fit", lambda net, source, *_, **__: seen.append(source.data) or {})
    train("lenet", "mine", OPTIONS, out=tmp_path / "out", images=25)
    assert len(seen[0]) in (22, 23)
    assert set(seen[0].labels.tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("name", "augment", "used"),
    [
        ("photos", None, "natural"),
        ("here/MNIST", None, "digits"),
        ("ylecun/mnist", None, "digits"),
        ("house numbers", "digits", "digits"),
        ("mnist", "none", "none"),
    ],
)
def test_the_augmentation_is_by_name_unless_it_is_given(name, augment, used, tmp_path, monkeypatch):
    data = ImageData("mine", torch.randint(256, (40, 1, 8, 8), dtype=torch.uint8), torch.arange(40) % 10)
    seen = []

    def watched(network, epoch_of, *_, **__):
        seen.append(epoch_of(0).augment)
        return {}

    monkeypatch.setattr("dk2pnet.commands.train.load_data", lambda *_, **__: data)
    monkeypatch.setattr("dk2pnet.commands.train.load_test", lambda *_: None)
    monkeypatch.setattr(fitting, "train", watched)
    train("lenet", name, OPTIONS, out=tmp_path / "out", augment=augment)
    assert seen == [used]


def test_a_teacher_is_given_images_normalised_as_it_expects(tmp_path, monkeypatch):
    """The student was saved with one normalisation, its teacher with another."""
    for name, normalize in (("student", "0.2/0.5"), ("teacher", "0.6/0.25")):
        once = replace(OPTIONS, epochs=1)
        train("lenet", "digits", once, out=tmp_path / name, images=100, normalize=normalize, device="cpu")
    teacher, _ = load_student(tmp_path / "teacher")
    seen = []

    def watched(net, source, *_, teacher, **more):
        x, _ = next(iter(source.data.batches(4, source.normalization)))
        seen.append((source.normalization, source.data.images[:4], teacher.eval()(x)))
        return {}

    monkeypatch.setattr("dk2pnet.commands.train.fit", watched)
    for model in (str(tmp_path / "student"), "lenet"):
        options = replace(OPTIONS, method="kd")
        out = tmp_path / f"out{len(seen)}"
        taught = {"teacher": str(tmp_path / "teacher"), "device": "cpu"}
        train(model, "digits", options, out=out, images=100, **taught)
    norms = [Normalization((0.2,), (0.5,)), Normalization((0.6,), (0.25,))]  # one without weights takes the teacher's
    for (norm, images, found), expected in zip(seen, norms, strict=True):
        assert norm == expected
        torch.testing.assert_close(found, teacher(norms[1].apply(images)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("images", "batches"), [(16, 2), (17, 2), (18, 3)])
def test_one_image_alone_is_no_batch(images, batches, monkeypatch):
    """A batch norm on 1 x 1 maps cannot train on it."""
    seen = []
    monkeypatch.setattr(fitting, "train", lambda *_, steps_per_epoch, **__: seen.append(steps_per_epoch) or {})
    data = ImageData("mine", torch.zeros(images, 1, 8, 8, dtype=torch.uint8), torch.zeros(images, dtype=torch.int64))
    options = TrainingOptions(batch_size=8)
    norm = Normalization((0.5,), (0.5,))
    fitting.fit(torch.nn.Identity(), fitting.Source(data, normalization=norm), options, Run(), example=None)
    assert seen == [batches]
