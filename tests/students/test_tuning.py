"""Tuning: what `tune` asks for, when it is done, what is kept, and that it goes on where it was."""

import copy
import logging
import math
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dk2pnet import InputError, compress
from dk2pnet.answers import Predictions, predict
from dk2pnet.data.samples import user_samples
from dk2pnet.measure import macs
from dk2pnet.networks.named import make_network
from dk2pnet.networks.torch.corrections import reestimate_batch_norm
from dk2pnet.options import CompressOptions
from dk2pnet.plan import Budget
from dk2pnet.run.run import Run
from dk2pnet.students import closed_form, latency_budget
from dk2pnet.students import tuning as tune
from dk2pnet.students.latency_budget import Spent
from dk2pnet.students.teacher import Teacher
from dk2pnet.students.tuning_steps import AUTOMATIC_MACS, AUTOMATIC_SECONDS, images_in_step, tuning_of
from dk2pnet.tasks import divergence
from dk2pnet.training import fit, trainer
from toys import OPTIONS, network, run, toy

X = [x for x, _ in toy(160, 32)]
LABELLED = toy(160, 32)


@cache
def trained():
    """A teacher whose second convolution one kernel per channel does not hold."""
    model = network()
    run(model, options=replace(OPTIONS, epochs=6))
    with torch.no_grad():
        model[3].weight += 0.3 * torch.randn(model[3].weight.shape, generator=torch.Generator().manual_seed(0))
    reestimate_batch_norm(model, [(x, None) for x in X])
    return model.eval()


def net():
    return copy.deepcopy(trained())


def counts(calibration=160, held=40):
    return SimpleNamespace(counts={"calibration": calibration, "held out": held})


# -- what it asks for --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "steps", "seconds"),
    [("150", 150, None), (7, 7, None), ("2m", 0, 120.0), ("90s", 0, 90.0), ("0.5 h", 0, 1800.0), ("1min", 0, 60.0)],
)
def test_steps_and_times(text, steps, seconds):
    asked = tuning_of(text, epochs=0, samples=counts(), macs=1)
    assert (asked.steps, asked.seconds, asked.wanted) == (steps, seconds, True)


@pytest.mark.parametrize("text", ["0", 0])
def test_nought_is_none(text):
    assert not tuning_of(text, epochs=0, samples=counts(), macs=1).wanted


@pytest.mark.parametrize("text", ["two minutes", "-5", "0s", "1.5", "2d", ""])
def test_anything_else_is_refused(text):
    with pytest.raises(InputError, match="a number of steps .150., a time .2m, 90s. or 0"):
        tuning_of(text, epochs=0, samples=counts(), macs=1)


def test_automatic_is_for_networks_up_to_resnet56_with_images_enough():
    assert macs(make_network("resnet56"), torch.zeros(1, 3, 32, 32)) == AUTOMATIC_MACS
    assert tuning_of(None, epochs=0, samples=counts(), macs=AUTOMATIC_MACS).steps == 150
    assert tuning_of("auto", epochs=0, samples=counts(80, 20), macs=1).steps == 150
    assert tuning_of(None, epochs=0, samples=counts(), macs=AUTOMATIC_MACS + 1).seconds == AUTOMATIC_SECONDS
    for off, words in (
        ({"samples": counts(79, 20)}, "99 calibration images"),
        ({"samples": None}, "no images"),
    ):
        asked = tuning_of(None, **{"epochs": 0, "samples": counts(), "macs": 1} | off)
        assert not asked.wanted
        assert words in asked.said
        assert "--tune" in asked.said


def test_with_epochs_automatic_is_off_and_what_is_given_is_done():
    asked = tuning_of(None, epochs=1, samples=counts(), macs=1)
    assert not asked.wanted
    assert asked.said == ""
    assert tuning_of(20, epochs=1, samples=counts(), macs=1).steps == 20


@pytest.mark.parametrize("have", [None, counts(1, 1)])
def test_what_was_asked_for_and_cannot_be_done_is_refused(have):
    with pytest.raises(InputError, match="--tune 150"):
        tuning_of("150", epochs=0, samples=have, macs=1)


# -- what it does ------------------------------------------------------------------------------------------------------


def decision_of(result):
    return next(each for each in result.metrics["decisions"] if each["what"].startswith("tuning"))


def names(result):
    return [stage["name"] for stage in result.metrics["stages"]]


def test_tuning_brings_the_student_closer_and_its_stage_is_there():
    plain = compress(net(), X, "kernels=1", criterion="weight", tune=0)
    tuned = compress(net(), X, "kernels=1", criterion="weight", tune=60)
    assert names(plain) == ["teacher", "closed form"]
    assert names(tuned) == ["teacher", "closed form", "tuned"]
    decision = decision_of(tuned)
    assert decision["what"] == "tuning"
    assert decision["kept"]
    teacher, held = net(), user_samples(X, None, 2000).held_out
    before, after = (divergence(predict(teacher, held), predict(r.model, held)) for r in (plain, tuned))
    assert after < before
    assert decision["before"] == pytest.approx(before, rel=1e-3)
    assert decision["after"] == pytest.approx(after, rel=1e-3)
    assert tuned.metrics["tuning_steps"] == 60
    assert plain.plan.to_json() == tuned.plan.to_json()


def test_automatic_tuning_happens():
    assert names(compress(net(), X, "kernels=1", criterion="weight"))[-1] == "tuned"
    few = compress(net(), [x for x, _ in toy(64, 16)], "kernels=1", criterion="loss")
    assert names(few)[-1] == "closed form"
    assert "fewer than 100" in few.metrics["notes"][0]


def test_given_with_epochs_it_comes_first():
    found = compress(net(), LABELLED, "kernels=1", criterion="weight", tune=5, epochs=1, learning_rate=1e-3)
    assert names(found) == ["teacher", "closed form", "tuned", "trained"]


def spoiled(monkeypatch):
    """Every tuning makes the student worse."""
    spoil = tune.Tuner._train

    def worse(self, student, solved, steps, *more, **named):
        spoil(self, student, solved, 1, *more, **named)
        with torch.no_grad():
            student[-1].weight.mul_(-1)

    monkeypatch.setattr(tune.Tuner, "_train", worse)


@pytest.mark.parametrize("criterion", ["weight", "loss"])
@pytest.mark.parametrize("kept", [True, False])
def test_what_makes_it_worse_is_not_kept_and_nothing_is_solved_twice(monkeypatch, tmp_path, criterion, kept):
    plain = compress(net(), X, "kernels=1", criterion=criterion, tune=0)
    spoiled(monkeypatch)
    solves = []
    real = closed_form.solve_layers
    monkeypatch.setattr(closed_form, "solve_layers", lambda *args: solves.append(1) or real(*args))
    found = compress(net(), X, "kernels=1", criterion=criterion, tune=5, out=tmp_path / "out" if kept else None)
    assert not decision_of(found)["kept"]
    assert len(solves) == 1
    first = torch.cat(X)
    assert torch.equal(found.model(first), plain.model(first))
    said = [each["what"] for each in found.metrics["decisions"]]
    again = [each["what"] for each in plain.metrics["decisions"]]
    assert said[said.index("tuning") + 1 :] == again
    assert len(set(said)) == len(said)  # each correction is told of once


def test_what_runs_by_itself_costs_no_result(monkeypatch, caplog):
    def broken(*_, **__):
        raise RuntimeError("out of memory")

    plain = compress(net(), X, "kernels=1", criterion="weight", tune=0)
    monkeypatch.setattr(tune, "fit", broken)
    found = compress(net(), X, "kernels=1", criterion="weight")
    assert decision_of(found)["what"] == "tuning (failed)"
    assert not decision_of(found)["kept"]
    assert all(torch.equal(a, b) for a, b in zip(found.model.parameters(), plain.model.parameters(), strict=True))
    assert "the closed form is kept (out of memory); --tune 0 leaves it away" in caplog.text
    with pytest.raises(RuntimeError, match="out of memory"):  # who asks for it is told
        compress(net(), X, "kernels=1", criterion="weight", tune=5)


def test_a_student_that_was_read_again_is_solved_again_where_its_tuning_is_not_kept():
    work = Run()
    teacher = Teacher.open(net(), X, CompressOptions(tune=5), work)
    found = []
    with closed_form.ClosedForm(teacher, work) as closed:
        solved = closed.solve(Budget.parse("kernels=1"), whiten=True)
        for factors in (solved.factors, {}):
            found.append(closed.without_tuning(replace(solved, factors=factors)).student.model.state_dict())
    assert all(torch.equal(found[0][name], value) for name, value in found[1].items())


def test_where_tuning_is_not_kept_a_latency_is_not_searched_again(monkeypatch):
    spoiled(monkeypatch)
    asked = []

    def spend(fraction, sites, *_, **more):
        asked.append(fraction)
        counts = {name: torch.ones(site.module.in_channels, dtype=torch.int64) for name, site in sites.items()}
        return Spent(counts, dict.fromkeys(counts, "concat"), fraction, [{"asked": fraction, "measured": fraction}])

    monkeypatch.setattr(latency_budget, "spend_latency", spend)
    found = compress(net(), X, "latency=0.9", criterion="loss", tune=5)
    assert not decision_of(found)["kept"]
    assert asked == [0.9]
    assert found.metrics["latency_search"] == [{"asked": 0.9, "measured": 0.9}]
    assert {layer.form for layer in found.plan.layers if layer.counts} == {"concat"}


@pytest.mark.parametrize("tune_for", [5, "2s"])
def test_no_number_while_tuning_goes_back_to_the_closed_form(tune_for, monkeypatch, caplog):
    def broken(*args, **more):
        raise trainer.NotFinite("the loss is not finite at step 3 of 5; lower the learning rate with --lr")

    monkeypatch.setattr(tune, "fit", broken)
    with caplog.at_level(logging.WARNING):
        found = compress(net(), X, "kernels=1", criterion="weight", tune=tune_for)
    assert "the closed form is kept: the loss is not finite at step 3 of 5\n" in caplog.text
    assert decision_of(found)["after"] is None
    assert not decision_of(found)["kept"]


def test_images_all_alike_are_warned_of(caplog):
    same = [X[0][:1].expand(20, -1, -1, -1).contiguous()] * 6
    with caplog.at_level(logging.WARNING):
        compress(net(), same, "kernels=1", criterion="response", tune=2)
    assert "all alike" in caplog.text


def test_batches_too_small_for_statistics_freeze_batch_norm(monkeypatch):
    seen = []
    real = tune.fit
    monkeypatch.setattr(
        tune, "fit", lambda m, d, options, *rest, **more: seen.append(options) or real(m, d, options, *rest, **more)
    )
    compress(net(), [x for x, _ in toy(16, 8)], "kernels=1", criterion="loss", tune=2)
    compress(net(), X, "kernels=1", criterion="weight", tune=2)
    assert [options.batch_norm for options in seen] == ["frozen", "training"]
    assert seen[0].batch_size == 12  # all that there are


def test_all_but_batch_norm_is_as_in_evaluation_while_tuning():
    """So noise is off, however it is made, and the head of a detector that decodes only in evaluation runs."""
    modes = []

    class Noise(nn.Module):
        def forward(self, x):
            if torch.is_grad_enabled():
                modes.append(self.training)
            return nn.functional.dropout(x, 0.5, self.training)

    model = nn.Sequential(*net()[:-1], Noise(), nn.Dropout(0.5), net()[-1]).eval()
    student = compress(model, X, "kernels=1", criterion="weight", tune=3).model
    assert modes
    assert not any(modes)
    assert not any(module.training for module in student.modules())


class Decoding(nn.Module):
    """What it gives in training, and where its last convolution runs, differs from evaluation."""

    def __init__(self, form):
        super().__init__()
        self.form, self.body = form, nn.Sequential(*net()[:6])
        self.decode = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1), nn.ReLU())

    def forward(self, x):
        maps = self.body(x)
        if self.training:
            return [maps] if self.form == "pair" else maps
        return (self.decode(maps), [maps]) if self.form == "pair" else self.decode(maps)


@pytest.mark.parametrize("form", ["maps", "pair"])
def test_a_network_that_does_more_in_evaluation_is_tuned(form):
    torch.manual_seed(0)
    found = compress(Decoding(form).eval(), X, "kernels=1", criterion="response", tune=5)
    decision = decision_of(found)
    assert decision["what"] == "tuning"  # not given up
    assert decision["after"] > 0


def test_a_network_of_feature_maps_is_tuned_on_its_outputs_error():
    model = nn.Sequential(*net()[:6]).eval()
    found = compress(model, X, "kernels=1", criterion="response", tune=40, augment="none")
    decision = decision_of(found)
    assert decision["measure"] == "relative squared error"
    assert decision["after"] < decision["before"]


def test_the_model_given_is_not_changed_by_tuning():
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compress(model, X, "kernels=1", criterion="weight", tune=5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("criterion", "most"), [("weight", 0.5), ("response", 1.5), ("loss", 1.5)])
def test_every_criterion_can_be_tuned(criterion, most, monkeypatch):
    """By the images' moments little is left to gain here, and nothing may be spoilt."""
    hints, train = [], fit.train

    def watched(*args, progress, **options):
        def seen(step, total, terms):
            hints.append(terms["hints"])
            progress(step, total, terms)

        return train(*args, progress=seen, **options)

    monkeypatch.setattr(fit, "train", watched)
    decision = decision_of(compress(net(), X, "kernels=1", criterion=criterion, tune=40, augment="none"))
    assert decision["after"] < most * decision["before"]
    assert decision["after"] != decision["before"]
    assert hints[-1] < hints[0]


def test_where_tuning_is_not_kept_the_reconstruction_is_tried():
    found = compress(net(), X, "kernels=1", criterion="loss", tune=40)
    plain = compress(net(), X, "kernels=1", criterion="loss", tune=0)
    assert not decision_of(found)["kept"]
    assert any(each["what"].startswith("layer-by-layer") for each in found.metrics["decisions"])
    assert torch.equal(found.model(X[0]), plain.model(X[0]))
    assert names(found) == ["teacher", "closed form"]


def away(held, error):
    """Answers with that relative squared error: farther from the mean, by one share everywhere."""
    mean, n = held.outputs[0].mean(0), len(held)
    found = Predictions(task=held.task)
    for count, (x,) in held.parts():
        found.add([torch.from_numpy(x) + (torch.from_numpy(x) - mean) * math.sqrt(error * n / (n - 1))], count)
    return found


@pytest.mark.parametrize(
    ("error", "batch", "given", "wanted"),
    [
        (0.3, 32, None, 0.01),
        (0.4, 32, None, 0.03),
        (float("inf"), 32, None, 0.03),
        (0.4, 8, None, 0.03),  # which are put together
        (0.4, 32, replace(trainer.TUNING, learning_rate=0.002), 0.002),
    ],
)
def test_the_rate_is_higher_where_the_start_is_far(error, batch, given, wanted):
    wide = [part for x in X for part in x.split(batch)]
    work = Run()
    teacher = Teacher.open(net(), wide, CompressOptions(tune=5, calibration_images=160), work)
    tuner = tune.Tuner(teacher, work, given)
    off = away(teacher.held, error)
    student = SimpleNamespace(predict=lambda *_: off)
    assert tuner._recipes(SimpleNamespace(student=student))[0].rate == pytest.approx(wanted)


@pytest.mark.parametrize(("error", "wanted"), [(0.3, 0.01), (0.4, 0.03)])
def test_a_network_without_batch_norm_has_one_recipe_at_the_usual_rate(error, wanted):
    model = nn.Sequential(*(module for module in net() if not isinstance(module, nn.BatchNorm2d)))
    teacher = Teacher.open(model, X, CompressOptions(tune=5, calibration_images=160), Run())
    off = away(teacher.held, error)
    tuner = tune.Tuner(teacher, Run())
    recipes = tuner._recipes(SimpleNamespace(student=SimpleNamespace(predict=lambda *_: off)))
    assert [recipe.rate for recipe in recipes] == [wanted]


@pytest.mark.parametrize(
    ("side", "at_once", "images"), [(64, None, 128), (65, None, 32), (640, 5, 5), (640, 100, 32), (32, 100, 100)]
)
def test_how_many_images_a_step_sees(side, at_once, images):
    """No more than are known to fit into memory."""
    learner = SimpleNamespace(example=torch.zeros(1, 3, side, 20), at_once=at_once)
    assert images_in_step(learner, 128) == images


def _of_large_images(*head):
    torch.manual_seed(0)
    stages = [nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1), nn.ReLU()]
    return nn.Sequential(*stages, *head).eval()


@pytest.mark.parametrize(
    ("head", "side", "augment", "seen"),
    [
        ([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)], 96, None, 64),
        ([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)], 96, "none", 96),
        ([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)], 64, None, 64),
        ([nn.Flatten(), nn.Linear(4 * 24 * 24, 3)], 96, None, 96),  # a weight for every position
        ([nn.Upsample(scale_factor=4)], 96, None, 64),
        ([nn.Upsample((24, 24))], 96, None, 96),  # maps whose size is fixed belong to other stages
    ],
)
def test_steps_on_large_images_see_windows_of_them_where_the_network_can(head, side, augment, seen):
    batches = [torch.rand(20, 3, side, side) for _ in range(2)]
    options = CompressOptions(tune=5, calibration_images=40, augment=augment)
    tuner = tune.Tuner(Teacher.open(_of_large_images(*head), batches, options, Run()), Run())
    x, _ = next(iter(tuner.source.epoch(0, tuner.options)))
    assert x.shape[2:] == (seen, seen)


def test_single_images_that_are_not_kept_freeze_batch_norm():
    singles = [part for x in X for part in x.split(1)]
    teacher = Teacher.open(net(), singles, CompressOptions(tune=5, calibration_images=160, memory=1e-9), Run())
    tuner = tune.Tuner(teacher, Run())
    assert (tuner.options.batch_size, tuner.options.batch_norm) == (1, "frozen")


# -- times, and going on -----------------------------------------------------------------------------------------------


def test_a_time_becomes_a_number_of_steps_that_the_recipe_tells(tmp_path, no_timing):
    found = compress(net(), X, "kernels=1", criterion="weight", tune="1s", out=tmp_path / "out")
    steps = found.metrics["tuning_steps"]
    assert steps >= 1
    assert f"tune: {steps}\n" in (tmp_path / "out/recipe.yaml").read_text()


def test_a_time_is_divided_by_that_of_a_step_and_a_killed_run_keeps_its_number(tmp_path, no_timing, monkeypatch):
    now, pace, begun = [0.0], [0.25], []

    def train(self, student, solved, steps, folder, *_, **__):
        begun.append(steps)
        for number in range(steps):
            now[0] += pace[0]
            self.run.progress("tuning", number + 1, steps)
        if folder is not None and len(begun) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(tune.Tuner, "_train", train)
    monkeypatch.setattr(tune.time, "perf_counter", lambda: now[0])
    options = {"tune": "2s", "out": tmp_path / "out"}
    with pytest.raises(KeyboardInterrupt):
        compress(net(), X, "kernels=1", criterion="weight", **options)
    assert begun[-1] == 8
    pace[0] = 0.5
    assert compress(net(), X, "kernels=1", criterion="weight", **options).metrics["tuning_steps"] == 8
    assert begun[2:] == [8]  # no second look at the clock


def test_a_time_under_one_step_is_refused(monkeypatch):
    with pytest.raises(InputError, match="one step takes"):
        compress(net(), X, "kernels=1", criterion="weight", tune="0.000001s")


@pytest.mark.parametrize("changed", ["weights", "images"])
def test_what_another_network_or_other_images_left_is_not_gone_on_with(tmp_path, no_timing, monkeypatch, changed):
    """Objects have no name by which the two calls could be told apart."""

    def killed(*_, **__):
        raise KeyboardInterrupt

    real = tune.fit
    monkeypatch.setattr(tune, "fit", killed)
    with pytest.raises(KeyboardInterrupt):
        compress(net(), X, "kernels=1", criterion="weight", tune=5, out=tmp_path / "out")
    monkeypatch.setattr(tune, "fit", real)
    other = net()
    with torch.no_grad():
        other[0].weight.mul_(1 if changed == "images" else 2)
    images = [x + 1 for x in X] if changed == "images" else X
    with pytest.raises(InputError, match=f"holds an unfinished run with digest-of-{changed} .*--overwrite to drop it"):
        compress(other, images, "kernels=1", criterion="weight", tune=5, out=tmp_path / "out")
    compress(other, images, "kernels=1", criterion="weight", tune=5, out=tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out.unfinished").exists()


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_loader_that_shuffles_is_read_once(shuffle):
    """So the images that decide are kept apart, and labels belong to the images that they came with."""
    numbers = torch.arange(150)
    images = numbers.float().view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    loader = DataLoader(TensorDataset(images, numbers), batch_size=32, shuffle=shuffle)
    samples = user_samples(loader, loader, 100, loader)

    def passes(batches):
        return [[int(n) for x, _ in batches for n in x[:, 0, 0, 0]] for _ in range(2)]

    parts = {name: passes(getattr(samples, name)) for name in ("gather", "held_out", "test", "decide")}
    assert all(once == again for once, again in parts.values())
    gather, held_out = (set(parts[name][0]) for name in ("gather", "held_out"))
    assert (len(gather), len(held_out), len(gather | held_out)) == (80, 20, 100)
    assert (sorted(gather | held_out) == list(range(100))) != shuffle
    assert sorted(parts["test"][0]) == sorted(parts["decide"][0]) == list(range(150))
    assert all(torch.equal(x[:, 0, 0, 0].long(), y) for x, y in samples.test)
    passed = passes(samples.train)
    assert (passed[0] == passed[1]) != shuffle


def test_a_loader_that_shuffles_more_than_fits_is_refused():
    loader = DataLoader(TensorDataset(torch.randn(150, 3, 4, 4)), batch_size=32, shuffle=True)
    with pytest.raises(
        InputError, match="test_data gives other images in every pass, .* 128 images take 0.0 GiB; give"
    ):
        user_samples(X, loader, 100, memory=100 * 3 * 16 * 4)


def test_images_that_come_one_by_one_are_put_into_batches(monkeypatch):
    """One image of 1 x 1 has no statistics at all."""
    seen = []
    real = tune.fit

    def watched(model, source, options, run, **more):
        seen.append((options.batch_norm, {len(x) for x, _ in source.epoch(0, options)}))
        return real(model, source, options, run, **more)

    monkeypatch.setattr(tune, "fit", watched)
    for size in (1, 32):
        compress(net(), [part for x in X for part in x.split(size)], "kernels=1", criterion="weight", tune=2)
    assert seen[0] == seen[1] == (trainer.TUNING.batch_norm, {128})


def test_a_killed_tuning_goes_on_with_the_same_bits(tmp_path, no_timing, monkeypatch):
    options = {"tune": 20, "checkpoint_every": 0.0}
    solved: list[str] = []

    def watch(what, *_):
        solved.extend([what] * what.startswith("solving"))

    whole = compress(net(), X, "kernels=1", criterion="weight", **options, out=tmp_path / "whole", run=Run(watch))
    assert solved
    real = tune.fit

    def killed(model, source, options, run, **more):
        def stop(what, done, total):
            run.progress(what, done, total)
            if done == 11:
                raise KeyboardInterrupt

        return real(model, source, options, replace(run, progress=stop), **more)

    monkeypatch.setattr(tune, "fit", killed)
    with pytest.raises(KeyboardInterrupt):
        compress(net(), X, "kernels=1", criterion="weight", **options, out=tmp_path / "cut")
    assert any((tmp_path / "cut.unfinished").rglob("step-*.safetensors"))
    monkeypatch.setattr(tune, "fit", real)
    solved.clear()
    again = compress(net(), X, "kernels=1", criterion="weight", **options, out=tmp_path / "cut", run=Run(watch))
    assert not solved  # the closed form is not made again
    assert all(torch.equal(value, again.model.state_dict()[n]) for n, value in whole.model.state_dict().items())
    assert (tmp_path / "cut/tuning.jsonl").exists()
    assert not (tmp_path / "cut.unfinished").exists()
