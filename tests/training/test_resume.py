"""Runs that are cut off and go on: they end with the weights, bit for bit, of runs that were not; and what a run that
fails leaves behind."""

import copy
import errno
import itertools
import json
import logging
import os
import random
import time
from dataclasses import replace
from functools import cache, cached_property

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dk2pnet.data import ImageData, Normalization
from dk2pnet.errors import InputError
from dk2pnet.layer import DKConv2d
from dk2pnet.nets import lenet
from dk2pnet.training import trainer
from dk2pnet.training.log import TrainingLog
from dk2pnet.training.losses import METHODS
from dk2pnet.training.trainer import TrainingOptions, choose_precision, train
from toys import ONE, network, run, same, settings_of, student_of, toy

STEPS = 4  # of an epoch
OPTIONS = TrainingOptions(
    epochs=3, batch_size=8, learning_rate=0.05, method="labels", precision="fp32", checkpoint_every=0
)
TOTAL = 3 * STEPS
SEEDS = itertools.count()
DATA = toy(8 * STEPS, 8)
IMAGES, LABELS = (torch.cat(parts) for parts in zip(*DATA, strict=True))


class Killed(Exception):
    """Stands for whatever ends a run."""


class Run:
    """A run that can be repeated: the same network, data and options every time."""

    def __init__(self, model, options=OPTIONS, teacher=None, data=lambda epoch: DATA):
        self.model, self.options, self.teacher, self.data = model, options, teacher, data

    def __call__(self, folder=None, stop=None, **more):
        """The trained network and the terms; `Killed` after step `stop`, of which no checkpoint is written then."""
        torch.manual_seed(next(SEEDS))  # what came before does not matter
        self.last = copy.deepcopy(self.model)
        self.seen = []

        def progress(step, total, terms):
            self.seen.append((step, terms))
            if step == stop:
                raise Killed

        given = {"options": self.options, "epoch_of": self.data, "teacher": self.teacher} | more
        data, options = given.pop("epoch_of"), given.pop("options")
        terms = train(
            self.last, data, options, example=ONE, steps_per_epoch=STEPS, folder=folder, progress=progress, **given
        )
        return self.last, terms

    def cut(self, folder, *stops, **more):
        """Killed at these steps, one after the other."""
        for stop in stops:
            with pytest.raises(Killed):
                self(folder, stop, **more)

    @cached_property
    def whole(self):
        """Network, terms and steps of the run that is not cut off, and writes nothing."""
        model, terms = self()
        assert [step for step, _ in self.seen] == list(range(1, TOTAL + 1))
        return model, terms, self.seen

    def check(self, folder, *stops):
        """Cut off at `stops` or not at all, it is the same."""
        model, terms, steps = self.whole
        self.cut(folder, *stops)
        other, others = self(folder)
        first = self.seen[0][0]
        assert first == max([1, *stops])
        assert self.seen == steps[first - 1 :]
        assert same(model, other)
        assert terms == others


class Noisy(nn.Module):
    """A network that draws from the global generator in every step."""

    def __init__(self):
        super().__init__()
        self.network, self.dropout, self.linear = network(), nn.Dropout(0.3), nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(self.dropout(self.network(x)))


def dropout():
    torch.manual_seed(5)
    return Noisy()


def damage(folder, count=1):
    """Spoil the newest checkpoints; their paths."""
    paths = sorted((folder / "checkpoints").glob("step-*.safetensors"))[-count:]
    for path in paths:
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
    return paths


def steps_of(folder):
    return sorted(int(path.name.split("-")[1]) for path in (folder / "checkpoints").glob("step-*.safetensors"))


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """No power cut comes in these tests; `test_checkpoint` looks after what has to reach the disk."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="module")
def trained():
    model = network()
    run(model)
    return model


@pytest.fixture(scope="module")
def student(trained):
    model = student_of(trained, 1)
    assert any(isinstance(module, DKConv2d) for module in model.modules())
    return model


# -- bit for bit -------------------------------------------------------------------------------------------------------


@cache
def plain():
    return Run(network())


@cache
def drawing(data=lambda epoch: DATA):
    """A run of a network that draws from the generator which some data draw from too."""
    return Run(dropout(), data=data)


@pytest.mark.parametrize("stop", [1, 2, STEPS, STEPS + 1, STEPS + 2, 2 * STEPS, TOTAL - 1, TOTAL])
def test_a_plain_network_goes_on_bit_for_bit(tmp_path, stop):
    """Cut off at the first step, mid-epoch, at an epoch's last step and first step, at the last step of all."""
    plain().check(tmp_path, stop)


def test_cut_off_again_and_again(tmp_path):
    plain().check(tmp_path, *range(1, TOTAL + 1))


def test_wider_layers_go_on_bit_for_bit(tmp_path):
    """Where the layout of a tensor in memory may decide how sums are rounded."""
    torch.manual_seed(0)
    Run(lenet(1, 4)).check(tmp_path, 3, STEPS + 1, TOTAL - 1)


@pytest.mark.parametrize("method", METHODS)
def test_a_student_goes_on_bit_for_bit_with_every_method(tmp_path, trained, student, method):
    """FitNets is cut off on both sides of the step between its stages."""
    options = replace(OPTIONS, method=method)
    Run(student, options, trained).check(tmp_path, 3, STEPS, STEPS + 1, STEPS + 2, TOTAL)


def test_fitnets_goes_on_across_its_stages(tmp_path, trained, student):
    fitnets = Run(student, replace(OPTIONS, method="fitnets", hints=("2",)), trained)
    for stop in (2, STEPS, STEPS + 1, STEPS + 3):
        fitnets.check(tmp_path / str(stop), stop)


@pytest.mark.parametrize("method", ["kp-channel", "kp-class", "fitnets"])
def test_regressors_between_other_channels_go_on_too(tmp_path, trained, method):
    torch.manual_seed(3)
    narrow = nn.Sequential(nn.Conv2d(1, 5, 3, 2, 1), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(80, 4))
    Run(narrow, replace(OPTIONS, method=method), trained).check(tmp_path, 3, STEPS + 1, STEPS + 3)


def test_without_labels_it_goes_on_too(tmp_path, trained, student):
    unlabelled = toy(8 * STEPS, 8, labels=False)
    options = replace(OPTIONS, method="kp-channel")
    Run(student, options, trained, lambda epoch: unlabelled).check(tmp_path, 3, STEPS + 1)


@pytest.mark.parametrize("method", ["labels", "kp-channel"])
def test_bf16_goes_on_bit_for_bit(tmp_path, trained, student, method):
    options = replace(OPTIONS, method=method, precision="bf16")
    Run(student, options, trained).check(tmp_path, 3, STEPS + 1, STEPS + 3)


@pytest.mark.parametrize("stop", [1, 3, STEPS, STEPS + 1, STEPS + 2])
def test_dropout_goes_on_bit_for_bit(tmp_path, stop):
    drawing().check(tmp_path, stop)


# -- data of all kinds -------------------------------------------------------------------------------------------------


def shuffling(epoch, loader=DataLoader(TensorDataset(IMAGES, LABELS), batch_size=8, shuffle=True)):
    """A loader that draws its order from the global generator when its iteration begins."""
    return loader


class Augmented(torch.utils.data.Dataset):
    """Draws from PyTorch's, NumPy's and Python's global generators for every image."""

    def __len__(self):
        return 8 * STEPS

    def __getitem__(self, index):
        x, y = IMAGES[index], LABELS[index]
        return x + 0.1 * torch.randn_like(x) + 0.1 * np.random.randn() + 0.1 * random.random(), y


def augmenting(epoch):
    return DataLoader(Augmented(), batch_size=8, shuffle=True)


def of_its_epoch(epoch):
    order = torch.randperm(STEPS, generator=torch.Generator().manual_seed(epoch)).tolist()
    return [DATA[number] for number in order]


def lazily(epoch):
    """Draws when a batch is asked for, and no sooner."""
    for x, y in DATA:
        yield x + 0.1 * torch.randn_like(x), y


def of_images(epoch):
    data = ImageData("toy", (IMAGES * 40 + 100).clamp(0, 255).byte(), LABELS)
    return data.batches(8, Normalization((0.5,), (0.25,)), augment="natural", shuffle=True, seed=1, epoch=epoch)


@pytest.mark.parametrize("data", [shuffling, augmenting, of_its_epoch, lazily, of_images])
@pytest.mark.parametrize("stop", [1, 2, STEPS, STEPS + 1, STEPS + 2, TOTAL])
def test_data_goes_on_bit_for_bit(tmp_path, data, stop):
    """Beside a network that draws from the same generators."""
    drawing(data).check(tmp_path, stop)


@pytest.mark.parametrize("data", [shuffling, augmenting])
def test_shuffled_data_goes_on_after_several_cuts(tmp_path, data):
    """Cut off twice in one epoch, and twice at the same step, at which no checkpoint is made."""
    drawing(data).check(tmp_path, 3, 4, 6, 7, 8, 8, 9)


@pytest.mark.parametrize("data", [shuffling, of_images])
def test_probes_are_fitted_once(tmp_path, trained, student, data):
    Run(student, replace(OPTIONS, method="kp-class"), trained, data).check(tmp_path, 2, STEPS + 1, STEPS + 3)


def test_batches_of_images_are_only_made_from_where_it_goes_on(tmp_path, monkeypatch):
    """What has been trained on is not decoded again."""
    made = []
    usual = Normalization.apply
    monkeypatch.setattr(Normalization, "apply", lambda self, images: made.append(len(images)) or usual(self, images))
    again = Run(network(), data=of_images)
    again.cut(tmp_path, 4)
    made.clear()
    again(tmp_path)
    assert len(made) == TOTAL - 3


# -- checkpoints that do not serve -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [4, STEPS + 1, STEPS + 2, TOTAL])
def test_a_damaged_newest_checkpoint_costs_a_step_and_no_bit(tmp_path, caplog, stop):
    again = drawing()
    model, terms, _ = again.whole
    again.cut(tmp_path, stop)
    (path,) = damage(tmp_path)
    with caplog.at_level(logging.WARNING):
        other, others = again(tmp_path)
    assert str(path) in caplog.text
    assert again.seen[0][0] == stop - 1
    assert same(model, other)
    assert terms == others
    assert steps_of(tmp_path) == [TOTAL - 1, TOTAL]


def test_where_all_checkpoints_are_damaged_the_run_begins_anew(tmp_path, caplog):
    anew = drawing()
    model, terms, _ = anew.whole
    anew.cut(tmp_path, 8)
    damage(tmp_path, 2)
    with caplog.at_level(logging.WARNING):
        anew.cut(tmp_path, 3)
    assert caplog.text.count("damaged") == 2
    other, others = anew(tmp_path)
    assert anew.seen[0][0] == 3  # of the new beginning, not of the files that are damaged
    assert same(model, other)
    assert terms == others


def test_checkpoints_that_are_not_due_are_not_written(tmp_path):
    rare = Run(network(), replace(OPTIONS, checkpoint_every=3600))
    rare.cut(tmp_path, 5)
    assert steps_of(tmp_path) == []
    rare(tmp_path)
    assert rare.seen[0][0] == 1
    assert steps_of(tmp_path) == [TOTAL]


def test_how_often_checkpoints_are_written_is_no_other_run(tmp_path):
    often = plain()
    model, terms, _ = often.whole
    often.cut(tmp_path, 6)
    other, others = often(tmp_path, options=replace(OPTIONS, checkpoint_every=3600))
    assert often.seen[0][0] == 6
    assert same(model, other)
    assert terms == others


@pytest.mark.parametrize("method", ["kp-channel", "kp-class", "fitnets"])
def test_a_run_that_was_finished_returns_at_once(tmp_path, trained, student, method):
    finished = Run(student, replace(OPTIONS, method=method), trained)
    model, terms = finished(tmp_path, validate=lambda: {"accuracy": 50.0})
    log = (tmp_path / "log.jsonl").read_bytes()

    def never(*any):
        raise AssertionError

    other, others = finished(tmp_path, epoch_of=never, validate=never)
    assert finished.seen == []
    assert same(model, other)
    assert terms == others
    assert not any(module.training for module in other.modules())
    assert (tmp_path / "log.jsonl").read_bytes() == log


@pytest.mark.parametrize(
    "other",
    [
        {"epochs": 4},
        {"learning_rate": 0.1},
        {"method": "kd"},
        {"hints": ("2",)},
        {"alpha": 0.5},
        {"beta": 1.0},
        {"precision": "bf16"},
        {"seed": 1},
    ],
)
def test_other_options_are_refused_and_named(tmp_path, trained, student, other):
    first = Run(student, replace(OPTIONS, method="kp-channel"), trained)
    first.cut(tmp_path, 3)
    before = copy.deepcopy(first.model), settings_of(first.model)
    with pytest.raises(InputError, match=f"with {next(iter(other))} .*--out"):
        first(tmp_path, options=replace(first.options, **other))
    assert same(first.last, before[0])
    assert settings_of(first.last) == before[1]
    first(tmp_path)
    assert first.seen[0][0] == 3


def test_other_networks_are_refused_and_named(tmp_path, trained, student):
    options = replace(OPTIONS, method="kd")
    Run(student, options, trained).cut(tmp_path, 3)
    for key, other in (
        ("student", Run(student_of(trained, 2), options, trained)),
        ("teacher", Run(student, options, network(7))),
    ):
        with pytest.raises(InputError, match=f"a run with {key} "):
            other(tmp_path)


def test_a_precision_by_choice_goes_on_where_it_is_asked_for(tmp_path):
    chosen = Run(network(), replace(OPTIONS, precision="auto"))
    chosen.cut(tmp_path, 3)
    chosen(tmp_path, options=replace(OPTIONS, precision=choose_precision(torch.device("cpu"))))
    assert chosen.seen[0][0] == 3


def test_a_precision_by_choice_may_be_another_one_elsewhere(tmp_path, monkeypatch):
    """A run begun on a GPU with bf16 goes on where the processor has no units for it."""
    chosen = Run(network(), replace(OPTIONS, precision="auto"))
    monkeypatch.setattr(trainer, "choose_precision", lambda device: "bf16")
    chosen.cut(tmp_path, 3)
    monkeypatch.setattr(trainer, "choose_precision", lambda device: "fp32")
    chosen(tmp_path)
    assert chosen.seen[0][0] == 3


# -- the log -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damaged", [0, 1, 2])
def test_every_line_of_the_log_is_there_once(tmp_path, monkeypatch, damaged):
    """Also those after the checkpoint that a run goes on from, which are written again."""
    monkeypatch.setattr(trainer, "_LOG_STEPS", 1)
    figures = {"accuracy": 12.5}
    plain()(tmp_path / "whole", validate=lambda: figures)
    for stop in (STEPS - 1, STEPS, STEPS + 1, TOTAL):
        plain().cut(tmp_path / "cut", stop, validate=lambda: figures)
        if damaged:
            damage(tmp_path / "cut", damaged)
    plain()(tmp_path / "cut", validate=lambda: figures)
    wanted, found = lines(tmp_path / "whole"), lines(tmp_path / "cut")
    assert [line["step"] for line in found] == list(range(1, TOTAL + 1))
    assert [line["epoch"] for line in found] == [1 + step // STEPS for step in range(TOTAL)]
    assert [line["step"] for line in found if "accuracy" in line] == [STEPS, 2 * STEPS, 3 * STEPS]
    for line in wanted + found:
        assert line.pop("images_per_second") > 0
    assert found == wanted


def test_the_speed_in_the_log_is_that_of_the_steps_without_validation(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def validate():
        now[0] += 1000.0
        return {}

    log = TrainingLog(tmp_path)
    for _ in range(2):
        for _ in range(4):
            now[0] += 0.5
            log.add({"loss": 1.0}, 8)
        log.write(4, 1, 0.1, validate())
    log.close()
    assert [line["images_per_second"] for line in lines(tmp_path)] == [16.0, 16.0]


def test_lines_hold_the_means_since_the_line_before(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "_LOG_STEPS", 3)
    losses, run = [], plain()
    run(tmp_path)
    for step, terms in run.seen:
        done = (step - 1) % STEPS + 1
        losses.append(terms["loss"] * done - (run.seen[step - 2][1]["loss"] * (done - 1) if done > 1 else 0))
    start = 0
    assert [line["step"] for line in lines(tmp_path)] == [3, 4, 6, 8, 9, 12]
    for line in lines(tmp_path):
        assert line["loss"] == pytest.approx(np.mean(losses[start : line["step"]]), rel=1e-6)
        assert line["labels"] == line["loss"]
        assert line["learning_rate"] >= 0
        start = line["step"]


def test_a_line_cut_off_by_a_kill_is_done_again(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "_LOG_STEPS", 1)
    plain().cut(tmp_path, 6)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "ep')
    plain()(tmp_path)
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, TOTAL + 1))


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain()()
    assert list(tmp_path.iterdir()) == []


# -- runs that fail ----------------------------------------------------------------------------------------------------


def nan_at(number):
    """Data of which one batch of the second epoch is spoilt."""

    def data(epoch):
        return [(x * float("nan"), y) if (epoch, each) == (1, number) else (x, y) for each, (x, y) in enumerate(DATA)]

    return data


@pytest.mark.parametrize("number", [0, 2, STEPS - 1])
def test_a_loss_that_is_not_finite_is_told_whole(tmp_path, trained, student, number):
    """The step, the terms, the last good checkpoint: from which the run goes on once the data is repaired."""
    repaired = Run(student, replace(OPTIONS, method="kp-channel"), trained)
    model, terms, _ = repaired.whole
    step = STEPS + number + 1
    with pytest.raises(InputError) as error:
        repaired(tmp_path, epoch_of=nan_at(number))
    message = str(error.value)
    assert f"not finite at step {step} of {TOTAL} (hints nan, labels nan, kd nan)" in message
    assert "--lr" in message
    assert steps_of(tmp_path) == [step - 2, step - 1]
    (newest,) = (tmp_path / "checkpoints").glob(f"step-{step - 1:09d}-*")
    assert str(newest) in message
    other, others = repaired(tmp_path)
    assert repaired.seen[0][0] == step
    assert same(model, other)
    assert terms == others


def test_a_first_step_that_is_not_finite_names_no_checkpoint(tmp_path):
    with pytest.raises(InputError, match=r"not finite at step 1 of 12 \(labels nan\); lower"):
        plain()(tmp_path, epoch_of=lambda epoch: [(x * float("nan"), y) for x, y in DATA])


def test_a_learning_rate_too_high_is_refused(tmp_path):
    linear = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, 4))
    with pytest.raises(InputError, match=r"not finite at step \d+ of 12 .*lower the learning rate \(1e\+20\)"):
        Run(linear, replace(OPTIONS, learning_rate=1e20))(tmp_path)
    assert all(line["step"] < TOTAL for line in lines(tmp_path))


@pytest.mark.parametrize("count", [0, 1, STEPS - 1])
@pytest.mark.parametrize("epoch", [0, 2])
def test_fewer_batches_than_steps_are_refused(tmp_path, count, epoch):
    few = plain()
    with pytest.raises(InputError, match=rf"gave {count} batches in epoch {epoch + 1}; expected {STEPS}"):
        few(tmp_path, epoch_of=lambda number: DATA[:count] if number == epoch else DATA)
    assert len(few.seen) == STEPS * epoch + count


def test_batches_that_were_there_before_are_missed_too(tmp_path):
    plain().cut(tmp_path, 4)
    with pytest.raises(InputError, match=f"batches in epoch 1; expected {STEPS}"):
        plain()(tmp_path, epoch_of=lambda epoch: DATA[:2])


def test_more_batches_than_steps_are_left_over(tmp_path):
    model, terms, _ = plain().whole
    other, others = plain()(epoch_of=lambda epoch: [*DATA, *DATA])
    assert same(model, other)
    assert terms == others


def test_a_disk_that_fills_up_leaves_a_run_to_go_on(tmp_path, monkeypatch):
    model, terms, _ = plain().whole
    usual = os.replace

    def replace_until(source, target):
        if "step-000000006" in str(target):
            raise OSError(errno.ENOSPC, "No space left on device")
        usual(source, target)

    monkeypatch.setattr(os, "replace", replace_until)
    with pytest.raises(InputError, match="the disk is full.*last good one is .*step-000000005"):
        plain()(tmp_path)
    assert steps_of(tmp_path) == [4, 5]
    monkeypatch.undo()
    other, others = plain()(tmp_path)
    assert plain().seen[0][0] == 6
    assert same(model, other)
    assert terms == others


def fails(kind):
    """What to change in a run so that it fails in this way."""

    def refuse(*any):
        raise Killed

    def fail_in(epoch):
        yield from DATA[:2]
        raise Killed

    return {
        "data": {"epoch_of": fail_in},
        "too few batches": {"epoch_of": lambda epoch: DATA[:2]},
        "not finite": {"epoch_of": nan_at(1)},
        "labels": {"epoch_of": lambda epoch: [(x, y + 9) for x, y in DATA]},
        "images": {"epoch_of": lambda epoch: [(x[:, :, 0], y) for x, y in DATA]},
        "validation": {"validate": refuse},
        "progress": {"stop": 3},
    }[kind]


FAILURES = ["data", "too few batches", "not finite", "labels", "images", "validation", "progress"]


def settings_around(folder, kind, method, trained, student):
    """Settings of teacher and student before and after a run that fails, both in odd modes to begin with."""
    teacher, model = copy.deepcopy(trained), copy.deepcopy(student).eval()
    for each in (teacher, model):
        each[1].train()
        each[0].weight.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, DKConv2d):
            module.form = "concat"
    before = settings_of(teacher), settings_of(model)
    failing = Run(model, replace(OPTIONS, method=method), teacher)
    with pytest.raises((Killed, InputError, RuntimeError)):
        failing(folder, **fails(kind))
    assert same(teacher, trained)
    return before, (settings_of(teacher), settings_of(failing.last))


@pytest.mark.parametrize("kind", FAILURES)
@pytest.mark.parametrize("method", ["labels", "kp-unit", "kp-class", "fitnets"])
def test_whatever_fails_all_is_put_back(tmp_path, trained, student, kind, method):
    """Hooks, forms, what needs a gradient, the teacher's modes and weights; the student's modes: see below."""
    before, after = settings_around(tmp_path, kind, method, trained, student)
    for settings in (before[1], after[1]):
        del settings["modes"]
    assert after == before


@pytest.mark.parametrize("kind", FAILURES)
def test_whatever_fails_the_modes_of_the_student_are_put_back(tmp_path, trained, student, kind):
    before, after = settings_around(tmp_path, kind, "kp-channel", trained, student)
    assert after[1]["modes"] == before[1]["modes"]


@pytest.mark.parametrize("hints", [("2=none",), ("none=2",), ("7=7",)])
def test_hints_that_cannot_be_used_leave_all_as_it_was(tmp_path, trained, student, hints):
    failing = Run(student, replace(OPTIONS, method="kp-unit", hints=hints), trained)
    settings = settings_of(trained), settings_of(student)
    with pytest.raises(InputError):
        failing(tmp_path)
    assert (settings_of(trained), settings_of(failing.last)) == settings
    assert same(failing.last, student)
