"""Training runs of `train_network` that are cut off, and what the call that goes on may change."""

import pytest

from dk2pnet.errors import InputError
from dk2pnet.pipelines.train import train_network
from dk2pnet.training.trainer import TrainingOptions

OPTIONS = TrainingOptions(epochs=2, learning_rate=0.05, method="labels", precision="fp32", checkpoint_every=0)


class Killed(Exception):
    """Stands for whatever ends a run."""


def call(out, recipe, progress):
    train_network("lenet", "digits", out, options=OPTIONS, images=300, recipe=recipe, progress=progress)


@pytest.fixture
def cut(tmp_path):
    """OUT of a run that was killed at its third step of six, on one thread."""

    def stop(what, done, total):
        if what.startswith("training") and done == 3:
            raise Killed

    with pytest.raises(Killed):
        call(tmp_path / "out", {"seed": 0, "threads": 1, "checkpoint_every": 0}, stop)
    return tmp_path / "out"


def test_a_run_goes_on_with_other_threads(cut):
    steps = []
    call(cut, {"seed": 0, "threads": 2, "checkpoint_every": 60}, lambda what, done, total: steps.append((what, done)))
    trained = [done for what, done in steps if what.startswith("training")]
    assert min(trained) > 2
    assert (cut / "model.safetensors").is_file()


def test_a_run_with_another_seed_is_refused_and_named(cut):
    with pytest.raises(InputError, match="unfinished run with seed 0, this one has 1"):
        call(cut, {"seed": 1, "threads": 1, "checkpoint_every": 0}, lambda *any: None)
