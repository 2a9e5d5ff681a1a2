"""What is left dense or refused before any work, because of what the machine has."""

import pytest
import torch
from torch import nn

from dk2pnet import InputError, compress
from dk2pnet.options import CompressOptions
from dk2pnet.run.run import Run
from dk2pnet.students.closed_form import ClosedForm
from dk2pnet.students.teacher import Teacher


def wide():
    """A kernel of 256 places over 32 channels: 8,192 unknowns, whose second moments take 768 MiB."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 4, (1, 256), padding=(0, 128)), nn.Flatten(2)
    ).eval()


X = list(torch.randn(12, 3, 2, 16, generator=torch.Generator().manual_seed(1)).split(4))


def test_a_layer_whose_statistics_do_not_fit_stays_dense(caplog):
    teacher = Teacher.open(wide(), X, CompressOptions(memory=2.0, tune=0), Run())
    assert list(teacher.open_sites) == ["0"]
    said = "its statistics take 1.5 GiB while it is solved, more than half of --memory 2"
    assert [site.reason for site in teacher.sites] == ["", said]
    assert f"2 stays dense: {said}" in caplog.text
    for options in ({"memory": 4.0}, {"memory": 2.0, "criterion": "weight"}):
        teacher = Teacher.open(wide(), X, CompressOptions(tune=0, **options), Run())
        assert list(teacher.open_sites) == ["0", "2"]


def test_a_budget_that_asks_for_more_memory_says_so_before_anything_is_gathered(monkeypatch):
    monkeypatch.setattr(ClosedForm, "_gather", lambda self: pytest.fail("gathered"))
    with pytest.raises(InputError, match=r"macs=0.1 cannot be reached: .*, or more --memory than 2: 2 ask for it$"):
        compress(wide(), X, "macs=0.1", memory=2.0, tune=0)
    with pytest.raises(InputError, match=r"params=0.001 cannot be reached: .*; give at least that$"):
        compress(wide(), X, "params=0.001", tune=0)


def test_where_none_fits_that_is_the_reason():
    with pytest.raises(InputError, match="no convolution that can be decomposed.*statistics take 1.5 GiB"):
        Teacher.open(wide(), X, CompressOptions(memory=2.0, tune=0, keep=["0"]), Run())


def test_small_layers_fit_whatever_is_asked():
    teacher = Teacher.open(wide()[:1], X, CompressOptions(memory=1e-6, tune=0), Run())
    assert list(teacher.open_sites) == ["0"]
