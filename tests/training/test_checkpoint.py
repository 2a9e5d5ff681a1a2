"""Checkpoints: what is loaded is what was saved, and neither damage nor a full disk takes the good ones away."""

import errno
import json
import logging
import math
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from dk2pnet.errors import InputError
from dk2pnet.run.seed import random_state, set_random_state
from dk2pnet.training.checkpoint import Checkpoints

IDENTITY = {"lr": 0.1, "hints": ("a=b",), "student": "0123"}
LOGGER = "dk2pnet.training.checkpoint"


def checkpoints(folder, **other):
    return Checkpoints(folder / "checkpoints", {**IDENTITY, **other}, every=0)


def filled(folder, steps=(1, 2)):
    """Checkpoints of some steps, and their paths."""
    kept = checkpoints(folder)
    return kept, [kept.save(step, {"step": step, "weights": torch.full((3,), float(step))}) for step in steps]


def names(folder):
    path = folder / "checkpoints"
    return sorted(each.name for each in path.iterdir()) if path.is_dir() else []


def equal(first, second):
    """Whether two trees are the same, types, NaN and bits included."""
    if isinstance(first, torch.Tensor):
        return (
            isinstance(second, torch.Tensor)
            and (first.dtype, first.shape) == (second.dtype, second.shape)
            and first.contiguous().flatten().view(torch.uint8).equal(second.contiguous().flatten().view(torch.uint8))
        )
    if type(first) is not type(second):
        return False
    if isinstance(first, dict):
        return list(first) == list(second) and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(equal, first, second))
    return first == second or (first != first and second != second)


# -- what is saved is what is loaded -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int8,
        torch.uint8,
        torch.bool,
    ],
)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3, 4, 5)])
def test_tensors_of_every_kind_come_back(tmp_path, dtype, shape):
    tensor = (10 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    checkpoints(tmp_path).save(1, {"x": tensor})
    assert equal(checkpoints(tmp_path).load(), {"x": tensor})


def test_trees_come_back(tmp_path):
    state = {
        "step": 7,
        "sums": {"loss": 0.1 + 0.2, "tiny": 5e-324, "large": 1.7976931348623157e308, "third": 1 / 3, "zero": -0.0},
        "odd": [math.inf, -math.inf, math.nan, None, True, False, "text \u00e9 \u2713", "", 2**62],
        "optimizer": {
            "state": {0: {"momentum": torch.randn(3)}, 11: {"momentum": None}},
            "groups": [{"params": [0, 1]}],
        },
        "nested": [[], {}, [[1, [torch.ones(2)]], {"tensor": torch.zeros(1), "items": {"a": 1}}]],
        "mixed": {1: "one", "1": "text one", -3: [torch.tensor(True)]},
    }
    checkpoints(tmp_path).save(7, state)
    loaded = checkpoints(tmp_path).load()
    assert equal(loaded, state)
    assert math.copysign(1, loaded["sums"]["zero"]) == -1


@pytest.mark.parametrize("state", [{}, {"a": None}, {"a": {"b": []}}])
def test_a_state_without_tensors_comes_back(tmp_path, state):
    checkpoints(tmp_path).save(0, state)
    assert equal(checkpoints(tmp_path).load(), state)


def test_tensors_of_other_layouts_and_shared_memory_come_back(tmp_path):
    base = torch.randn(2, 3, 4, 4)
    state = {
        "channels last": base.to(memory_format=torch.channels_last),
        "transposed": base.transpose(0, 3),
        "part": base[1:],
        "same": base,
        "again": base,
        "with gradient": torch.nn.Parameter(base),
    }
    checkpoints(tmp_path).save(1, state)
    loaded = checkpoints(tmp_path).load()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())
    loaded["same"].zero_()
    assert torch.equal(loaded["again"], base)
    assert not loaded["with gradient"].requires_grad


def test_an_optimizer_comes_back(tmp_path):
    def make():
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        return model, torch.optim.SGD([{"params": [p]} for p in model.parameters()], 0.1, momentum=0.9, nesterov=True)

    model, optimizer = make()
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    checkpoints(tmp_path).save(1, {"optimizer": state})
    other, fresh = make()
    fresh.load_state_dict(checkpoints(tmp_path).load()["optimizer"])
    assert fresh.state_dict()["param_groups"] == state["param_groups"]
    for parameter in (0, 1):
        assert torch.equal(
            fresh.state_dict()["state"][parameter]["momentum_buffer"], state["state"][parameter]["momentum_buffer"]
        )


def test_later_changes_of_a_tensor_do_not_reach_the_checkpoint(tmp_path):
    tensor = torch.ones(3)
    checkpoints(tmp_path).save(1, {"x": tensor})
    tensor.zero_()
    assert torch.equal(checkpoints(tmp_path).load()["x"], torch.ones(3))


# -- which are kept, which is loaded -----------------------------------------------------------------------------------


def test_a_fresh_folder_holds_nothing_and_is_not_made(tmp_path):
    fresh = checkpoints(tmp_path)
    assert fresh.load() is None
    assert fresh.last is None
    assert list(tmp_path.iterdir()) == []


def test_the_two_newest_are_kept(tmp_path):
    kept, paths = filled(tmp_path, (1, 2, 9, 10, 100))
    assert names(tmp_path) == sorted(path.name for path in paths[-2:])
    assert kept.last == paths[-1]
    again = checkpoints(tmp_path)
    assert again.load()["step"] == 100
    assert again.last == paths[-1]


def test_checkpoints_are_due_by_the_clock(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("dk2pnet.training.checkpoint.time.monotonic", lambda: now[0])
    kept = Checkpoints(tmp_path, IDENTITY, every=60)
    assert not kept.due()
    now[0] += 60
    assert kept.due()
    kept.save(1, {})
    assert not kept.due()
    now[0] += 59
    assert not kept.due()
    now[0] += 1
    assert kept.due()
    assert checkpoints(tmp_path).due()


def damage(path, how):
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "cut by one":
        path.write_bytes(data[:-1])
    elif how == "longer":
        path.write_bytes(data + b"\0")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "zeros":
        path.write_bytes(bytes(len(data)))
    else:
        place = {"first bit": 0, "bit of the header": 60, "last bit": len(data) - 1}[how]
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])


DAMAGE = ["truncated", "cut by one", "longer", "empty", "zeros", "first bit", "bit of the header", "last bit"]


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_loaded(tmp_path, caplog, how):
    _, paths = filled(tmp_path)
    damage(paths[1], how)
    again = checkpoints(tmp_path)
    with caplog.at_level(logging.WARNING, LOGGER):
        state = again.load()
    assert state["step"] == 1
    assert torch.equal(state["weights"], torch.ones(3))
    assert again.last == paths[0]
    (record,) = caplog.records
    assert (record.name, record.levelname) == (LOGGER, "WARNING")
    assert str(paths[1]) in record.getMessage()


def test_where_all_are_damaged_there_is_none(tmp_path, caplog):
    _, paths = filled(tmp_path)
    for path, how in zip(paths, ("empty", "last bit"), strict=True):
        damage(path, how)
    again = checkpoints(tmp_path)
    with caplog.at_level(logging.WARNING, LOGGER):
        assert again.load() is None
    assert again.last is None
    assert all(any(str(path) in record.getMessage() for record in caplog.records) for path in paths)


def test_no_warning_without_damage(tmp_path, caplog):
    filled(tmp_path)
    with caplog.at_level(logging.WARNING, LOGGER):
        checkpoints(tmp_path).load()
    assert not caplog.records


def test_damaged_ones_of_later_steps_do_not_push_out_new_ones(tmp_path):
    """Where none could be read the run begins anew, at earlier steps than those of the files."""
    _, paths = filled(tmp_path, (8, 9))
    for path in paths:
        damage(path, "last bit")
    again = checkpoints(tmp_path)
    assert again.load() is None
    for step in (1, 2, 3):
        path = again.save(step, {"step": step})
        assert path.exists()
        assert again.last == path
        assert checkpoints(tmp_path).load() == {"step": step}


def test_a_damaged_one_is_not_counted_among_the_two_that_are_kept(tmp_path):
    _, paths = filled(tmp_path, (8, 9))
    damage(paths[1], "last bit")
    again = checkpoints(tmp_path)
    assert again.load()["step"] == 8
    damage(again.save(10, {"step": 10}), "empty")
    assert checkpoints(tmp_path).load()["step"] == 8


def test_a_damaged_checkpoint_is_replaced_by_the_same_step_done_again(tmp_path, caplog):
    _, paths = filled(tmp_path)
    damage(paths[1], "truncated")
    again = checkpoints(tmp_path)
    again.load()
    again.save(2, {"step": 2, "another": "run gives another digest"})
    with caplog.at_level(logging.WARNING, LOGGER):
        caplog.clear()
        assert checkpoints(tmp_path).load()["step"] == 2


def test_other_files_are_left_alone_and_leftovers_cleaned(tmp_path):
    _, paths = filled(tmp_path)
    folder = tmp_path / "checkpoints"
    part = folder / f".{paths[1].name}.part"
    part.write_bytes(b"half a checkpoint")
    later = folder / ".step-000000099-0123456789abcdef.safetensors.part"
    later.write_bytes(b"")
    for name in ("notes.txt", "step-3.safetensors", "step-000000003-zz.safetensors"):
        (folder / name).write_text("of someone else")
    again = checkpoints(tmp_path)
    assert again.load()["step"] == 2
    again.save(3, {"step": 3})
    assert not part.exists()
    assert not later.exists()
    assert {"notes.txt", "step-3.safetensors", "step-000000003-zz.safetensors"} < set(names(tmp_path))
    assert checkpoints(tmp_path).load()["step"] == 3


# -- whose they are ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "key"),
    [({"lr": 0.2}, "lr"), ({"hints": ()}, "hints"), ({"student": None}, "student"), ({"new": 1}, "new")],
)
def test_a_checkpoint_of_another_run_is_refused_and_the_difference_named(tmp_path, other, key):
    _, paths = filled(tmp_path)
    before = [path.read_bytes() for path in paths]
    with pytest.raises(InputError) as error:
        checkpoints(tmp_path, **other).load()
    assert f"a run with {key} " in str(error.value)
    assert str(paths[1]) in str(error.value)
    assert "--out" in str(error.value)
    assert [path.read_bytes() for path in paths] == before


def test_a_key_that_is_gone_makes_another_run_too(tmp_path):
    filled(tmp_path)
    with pytest.raises(InputError, match="a run with student"):
        Checkpoints(tmp_path / "checkpoints", {key: IDENTITY[key] for key in ("lr", "hints")}).load()


def test_the_same_identity_may_be_written_another_way(tmp_path):
    """Tuples are lists in JSON, and the order of keys does not matter."""
    filled(tmp_path)
    identity = {"student": "0123", "hints": ["a=b"], "lr": 0.1}
    assert Checkpoints(tmp_path / "checkpoints", identity).load()["step"] == 2


def test_a_checkpoint_of_another_version_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("dk2pnet.training.checkpoint._FORMAT", 99)
    filled(tmp_path)
    monkeypatch.undo()
    with pytest.raises(InputError, match="format 99"):
        checkpoints(tmp_path).load()


def test_nothing_is_pickled(tmp_path):
    """The file is one of safetensors, which anyone can read without running what it holds."""
    from safetensors import safe_open

    _, paths = filled(tmp_path)
    with safe_open(paths[1], "pt") as file:
        header = json.loads(file.metadata()["dk2pnet"])
        assert [file.get_tensor(name).tolist() for name in file.keys()] == [[2.0] * 3]  # noqa: SIM118
    assert header["step"] == 2
    assert header["identity"] == {**IDENTITY, "hints": ["a=b"]}


# -- disks -------------------------------------------------------------------------------------------------------------


def failing(monkeypatch, where, number):
    """Make the system refuse at some point of writing."""

    def refuse(*args, **more):
        raise OSError(number, os.strerror(number))

    if where == "open":
        usual = Path.open
        monkeypatch.setattr(
            Path, "open", lambda path, *args: refuse() if path.suffix == ".part" else usual(path, *args)
        )
    elif where == "mkdir":
        monkeypatch.setattr(Path, "mkdir", refuse)
    elif where == "unlink":
        monkeypatch.setattr(Path, "unlink", refuse)
    else:
        monkeypatch.setattr(os, where, refuse)


@pytest.mark.parametrize("where", ["fsync", "replace"])
@pytest.mark.parametrize(("number", "what"), [(errno.ENOSPC, "the disk is full"), (errno.EIO, "error")])
def test_a_full_disk_leaves_the_checkpoints_that_are_there(tmp_path, monkeypatch, where, number, what):
    kept, paths = filled(tmp_path)
    before = [path.read_bytes() for path in paths]
    failing(monkeypatch, where, number)
    with pytest.raises(InputError, match=what) as error:
        kept.save(3, {"step": 3, "weights": torch.ones(100)})
    assert str(paths[1]) in str(error.value)
    assert names(tmp_path) == [path.name for path in paths]
    assert [path.read_bytes() for path in paths] == before
    assert kept.last == paths[1]
    monkeypatch.undo()
    assert checkpoints(tmp_path).load()["step"] == 2
    assert checkpoints(tmp_path).save(3, {"step": 3}).exists()


@pytest.mark.parametrize("where", ["open", "mkdir"])
@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_folder_that_cannot_be_written_is_an_input_error(tmp_path, monkeypatch, where, number):
    kept, paths = filled(tmp_path)
    failing(monkeypatch, where, number)
    if number == errno.EROFS:  # a file system that is mounted read-only refuses to remove what is not there, too
        failing(monkeypatch, "unlink", number)
    with pytest.raises(InputError, match="could not be written"):
        kept.save(3, {"step": 3})
    monkeypatch.undo()
    assert names(tmp_path) == [path.name for path in paths]
    assert checkpoints(tmp_path).load()["step"] == 2


def test_a_file_in_the_place_of_the_folder_is_an_input_error(tmp_path):
    (tmp_path / "checkpoints").write_text("not a folder")
    kept = checkpoints(tmp_path)
    assert kept.load() is None
    with pytest.raises(InputError, match="could not be written"):
        kept.save(1, {"step": 1})
    assert (tmp_path / "checkpoints").read_text() == "not a folder"


def test_an_interruption_while_writing_leaves_the_checkpoints_that_are_there(tmp_path, monkeypatch):
    kept, paths = filled(tmp_path)

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        kept.save(3, {"step": 3})
    monkeypatch.undo()
    again = checkpoints(tmp_path)
    assert again.load()["step"] == 2
    again.save(3, {"step": 3})
    assert not [name for name in names(tmp_path) if name.endswith(".part")]


# -- random states -----------------------------------------------------------------------------------------------------


def draws():
    return (
        torch.rand(3).tolist(),
        torch.randn(3).tolist(),
        np.random.rand(3).tolist(),
        np.random.randn(),
        random.random(),
        random.gauss(0, 1),
    )


@pytest.mark.parametrize("by_file", [False, True])
@pytest.mark.parametrize("odd", [False, True])
def test_all_generators_go_on_where_they_were(tmp_path, by_file, odd):
    """Also where NumPy and Python hold the second of two normal numbers back (`odd`)."""
    torch.manual_seed(1), np.random.seed(2), random.seed(3)
    if odd:
        np.random.randn(), random.gauss(0, 1)
    state = random_state()
    wanted = [draws(), draws()]
    torch.manual_seed(4), np.random.seed(5), random.seed(6)
    assert draws() != wanted[0]
    if by_file:
        checkpoints(tmp_path).save(1, {"random": state})
        state = checkpoints(tmp_path).load()["random"]
    set_random_state(state)
    assert [draws(), draws()] == wanted


def test_asking_for_the_state_draws_nothing():
    torch.manual_seed(1), np.random.seed(2), random.seed(3)
    wanted = draws()
    torch.manual_seed(1), np.random.seed(2), random.seed(3)
    state = random_state()
    assert draws() == wanted
    set_random_state(state)
    assert draws() == wanted
