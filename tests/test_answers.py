"""What networks answer: kept batch by batch, samples first, on disk where they are many."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dk2pnet import answers
from dk2pnet.answers import Predictions, class_numbers, in_pairs, predict
from dk2pnet.errors import InputError
from dk2pnet.measure import evaluation, layout_of
from dk2pnet.tasks import compare, divergence
from toys import by_view, network


def test_predict_collects_outputs_and_labels():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(4, 3)).train()
    x, y = torch.randn(7, 1, 2, 2), torch.arange(7) % 3
    done = []
    result = predict(model, zip(x.split(3), y.split(3), strict=True), progress=done.append)
    assert done == [3, 6, 7]
    assert len(result) == 7
    assert torch.equal(result.labels, y)
    torch.testing.assert_close(result.outputs[0], F.linear(x.flatten(1), model[2].weight, model[2].bias).detach())
    assert not result.outputs[0].requires_grad
    assert model.training
    assert predict(model, [(x, None)]).labels is None
    with pytest.raises(InputError, match="no images"):
        predict(model, [])


@pytest.mark.parametrize("batches", [[4, 4, 3], [4], [1, 1]])
def test_samples_come_first_where_the_network_puts_them_second(batches):
    """As recurrent and sequence networks answer: (T, B, classes)."""

    class Sequence(nn.Module):
        def forward(self, x):
            return x.flatten(1).repeat(6, 1, 1), x.flatten(1)

    x = torch.randn(sum(batches), 1, 2, 2)
    found = predict(Sequence(), [(part, None) for part in x.split(batches)])
    assert len(found) == sum(batches)
    assert found.shapes() == [(6, 4), (4,)]
    torch.testing.assert_close(found.outputs[0], x.flatten(1)[:, None].expand(-1, 6, -1))
    assert compare(found, found).errors.shape == (2, sum(batches))


def test_as_many_steps_as_samples_are_no_samples_in_second_place():
    found = Predictions([torch.arange(8.0).reshape(2, 2, 2)])
    assert found.shapes() == [(2, 2)]
    found.add([torch.zeros(1, 2, 2)], 1)
    assert found.moved == [False]


def test_what_is_too_much_for_memory_is_read_again_from_disk(monkeypatch):
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.Flatten(2))
    batches = [(x, None) for x in torch.randn(12, 1, 4, 4).split(4)]
    whole = predict(model, batches)
    monkeypatch.setattr(answers, "KEPT", 3 * 4 * 16 * 4)  # the first batch and no more
    found = predict(model, batches)
    assert [isinstance(row[0], int) for row in found._rows] == [False, True, True]
    assert torch.equal(found.outputs[0], whole.outputs[0])
    for _ in range(2):
        assert [count for count, _ in found.parts()] == [4, 4, 4]
    assert divergence(whole, found) == divergence(found, whole) == 0


@pytest.mark.parametrize("task", ["dense", "regress"])
def test_large_batches_are_compared_part_by_part(monkeypatch, task):
    torch.manual_seed(0)
    maps, near = torch.randn(9, 2, 4, 4), torch.randn(9, 2, 4, 4)
    wholes = [Predictions([each], task=task) for each in (maps, near)]
    wanted = compare(*wholes)
    monkeypatch.setattr(answers, "_PART", 2 * 2 * 4 * 4 * 4 * 2)  # two samples of each of the two
    seen = [(count, ours[0].shape[0], theirs[0].shape[0]) for count, ours, theirs in in_pairs(*wholes)]
    assert seen == [(2, 2, 2)] * 4 + [(1, 1, 1)]
    again = compare(*(Predictions([each], task=task) for each in (maps, near)))
    for a, b in zip(again[1:], wanted[1:], strict=True):
        assert a is b is None or torch.allclose(a, b, rtol=1e-12)
    other = Predictions([torch.zeros(9, 3)], task=task)  # whatever its shape: parts are of the same samples
    assert compare(wholes[0], other).errors.shape == (1, 9)


_GROWTH = """
import torch, psutil
from dk2pnet import answers
from dk2pnet.tasks import compare
torch.set_num_threads(1)
answers.KEPT = 0
sets = [answers.Predictions(task="dense") for _ in range(2)]
before = psutil.Process().memory_info().rss
for each in sets:
    for batch in range(60):
        each.add([torch.randn(2, 21, 112, 112)], 2)
compare(*sets)
print(psutil.Process().memory_info().rss - before)
"""


def test_memory_does_not_grow_with_the_number_of_maps():
    found = subprocess.run([sys.executable, "-c", _GROWTH], capture_output=True, text=True, check=True)
    assert int(found.stdout) < 2**27  # a batch is 2 MiB, all of the two sets 241; without `Trimmer` it is 370 MiB


def test_a_disk_that_is_full_is_said(monkeypatch):
    def full(file, array, allow_pickle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(answers, "KEPT", 0)
    monkeypatch.setattr(np, "save", full)
    with pytest.raises(InputError, match="could not be kept in .*No space left.*TMPDIR"):
        predict(nn.Flatten(), [(torch.zeros(1, 1, 2, 2), None)])


def test_answers_of_other_sizes_are_one_after_the_other_but_not_together():
    found = predict(nn.Identity(), [(torch.ones(1, 1, 2, 2), None), (torch.ones(2, 1, 3, 3), None)])
    assert [row[0].shape for _, row in found.parts()] == [(1, 1, 2, 2), (2, 1, 3, 3)]
    assert not found.of_one_size(0)
    with pytest.raises(InputError, match="differs in size from batch to batch"):
        _ = found.outputs


@pytest.mark.parametrize(("names", "said"), [(None, ""), (["y"], None)])
def test_a_mask_is_finite_where_outputs_have_names(names, said):
    assert Predictions([torch.tensor([[0.0, -torch.inf]])], names=names).infinite() == said
    assert Predictions([torch.tensor([[torch.nan, -torch.inf]])], names=names).infinite() is not None


@pytest.mark.parametrize("labels", [torch.tensor([1.0, 2.0]), torch.zeros(2, 2, dtype=torch.int64)])
def test_labels_that_are_no_classes_are_refused(labels):
    assert class_numbers(torch.tensor([[1], [2]])).tolist() == [1, 2]
    with pytest.raises(InputError, match="one whole number per image"):
        class_numbers(labels)


def test_the_layout_is_the_faster_one_where_the_network_can():
    x, layouts = torch.randn(4, 3, 8, 8), []
    plain, able = by_view(), network()
    for model in (plain, able):
        model[0] = nn.Conv2d(3, 8, 3, padding=1)
        model[0].register_forward_pre_hook(
            lambda _, args: layouts.append(args[0].is_contiguous(memory_format=torch.channels_last))
        )
    able.load_state_dict(plain.state_dict())
    assert layout_of(x, able) == torch.channels_last
    assert layout_of(x, able, plain) == torch.contiguous_format
    assert layout_of(torch.randn(4, 8)) == torch.contiguous_format
    with evaluation(plain):
        expected = plain(x)
    for model, fast in ((able, True), (plain, False)):
        torch.testing.assert_close(predict(model, [(x, None), (x, None)]).outputs[0], torch.cat([expected] * 2))
        assert layouts[-2:] == [fast, fast]


def test_outputs_of_another_number_in_every_batch_are_refused():
    class Boxes(nn.Module):
        def forward(self, x):
            return [part for part in x if part.mean() > 0]

    signs = torch.tensor([1.0, 1.0, -1.0, 1.0]).view(4, 1, 1, 1)
    batches = [(part, None) for part in (signs * torch.ones(4, 3, 2, 2)).split(2)]
    with pytest.raises(InputError, match="gives 1 outputs for one batch and 2 for another; expected as many for each"):
        predict(Boxes(), batches)
