"""Arrays by the names of a network's inputs: read, checked, split and batched; and noise in declared shapes."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
from onnx import TensorProto, helper

from dk2pnet.data.arrays import Feed, example_feed, image_batches, read_arrays
from dk2pnet.data.samples import Batching, Every, all_alike, array_samples
from dk2pnet.errors import InputError
from dk2pnet.networks.onnx.graph import input_of
from graphs import value, weights


def inputs_of(*values):
    return [input_of(each) for each in values]


INPUTS = inputs_of(value("x", "n", 3, "h", "w"))


def samples(path, inputs, count, batching=Batching(8)):
    return array_samples(read_arrays(path, inputs), count, batching)


def test_samples_are_split_and_batched(tmp_path):
    path = tmp_path / "inputs.npz"
    np.savez(path, a=np.arange(60).reshape(20, 3), b=np.arange(20.0))
    inputs = inputs_of(value("a", "n", 3), value("b", "n"))
    found = samples(path, inputs, 20)
    assert found.counts == {"calibration": 16, "held out": 4}
    assert found.first.samples == 4
    assert [len(feed) for feed, _ in found.gather] == [4, 4, 4, 4]
    one_by_one = samples(path, inputs, 20, Batching(1, True))
    assert [len(feed) for feed, _ in one_by_one.held_out] == [1, 1, 1, 1]
    assert one_by_one.counts == found.counts
    seen = [feed.arrays for part in (found.gather, found.held_out) for feed, _ in part]
    assert sorted(np.concatenate([each["b"] for each in seen])) == list(range(20))
    assert all((each["a"] == 3 * each["b"][:, None] + [0, 1, 2]).all() for each in seen)
    assert seen[0]["a"].dtype == np.float32  # as the graph takes it
    again = [feed.arrays["b"] for feed, _ in found.gather]
    np.testing.assert_array_equal(np.concatenate(again), np.concatenate([each["b"] for each in seen[:4]]))
    assert all(labels is None for _, labels in found.gather)


def test_no_more_samples_than_are_wanted_and_the_held_out_ones_decide(tmp_path):
    path = tmp_path / "inputs.npz"
    np.savez(path, x=weights(50, 3, 2, 2))
    found = samples(path, INPUTS, 20)
    assert found.counts == {"calibration": 16, "held out": 4}
    assert found.decide is found.held_out
    assert found.decided_by == "the held-out samples"
    assert found.test is None


def test_the_last_fifth_is_held_out_as_neighbours_are_alike(tmp_path):
    path = tmp_path / "inputs.npz"
    np.savez(path, x=np.arange(50.0)[:, None, None, None] * np.ones((1, 3, 2, 2)))

    def numbers(batches):
        return np.concatenate([feed.arrays["x"][:, 0, 0, 0] for feed, _ in batches])

    found = samples(path, INPUTS, 50)
    assert list(numbers(found.held_out)) == list(range(40, 50))
    assert sorted(numbers(found.gather)) == list(range(40))
    assert list(numbers(found.gather)) != list(range(40))  # batches of neighbours would teach little
    few = samples(path, INPUTS, 20)
    assert max(numbers(few.gather)) < min(numbers(few.held_out))
    arrays = read_arrays(path, INPUTS)
    np.savez(tmp_path / "other.npz", x=100 + np.arange(7.0)[:, None, None, None] * np.ones((1, 3, 2, 2)))
    given = array_samples(arrays, 50, Batching(8), read_arrays(tmp_path / "other.npz", INPUTS))
    assert given.counts == {"calibration": 50, "held out": 7}
    assert list(numbers(given.held_out)) == list(range(100, 107))
    assert given.decided_by.endswith("other.npz")


def test_samples_that_are_all_alike_are_found(tmp_path):
    path = tmp_path / "inputs.npz"
    np.savez(path, x=np.ones((20, 3, 2, 2)) * np.arange(3.0)[:, None, None])
    assert all_alike(samples(path, INPUTS, 20))
    assert all_alike(samples(path, INPUTS, 20, Batching(1, True)))
    np.savez(path, x=weights(20, 3, 2, 2))
    assert not all_alike(samples(path, INPUTS, 20))
    assert not all_alike(samples(path, INPUTS, 20, Batching(1, True)))


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"x": np.zeros((4, 3, 2, 2), np.int64)}, r"int64 of shape \(4, 3, 2, 2\)"),
        ({"x": np.zeros((4, 3, 2, 2)), "y": np.zeros(4)}, "'y'"),
        ({"x": np.zeros((0, 3, 2, 2))}, r"\(0, 3, 2, 2\)"),
        ({}, "nothing"),
    ],
)
def test_what_are_no_images_for_a_pytorch_network(arrays, said, tmp_path):
    np.savez(tmp_path / "in.npz", **arrays)
    with pytest.raises(InputError, match=f"holds .*{said}.*expected one float array"):
        image_batches(str(tmp_path / "in.npz"), lambda size: 2)


def test_a_fixed_batch_leaves_over_what_fills_none(tmp_path):
    path = tmp_path / "inputs.npz"
    np.savez(path, x=weights(38, 3, 2, 2))
    found = samples(path, INPUTS, 38, Batching(3, True))
    assert [len(feed) for feed, _ in found.gather] == [3] * 10
    assert [len(feed) for feed, _ in found.held_out] == [3, 3]
    assert found.counts == {"calibration": 30, "held out": 6}
    with pytest.raises(InputError, match=r"holds 38 sample\(s\); expected at least 60"):
        samples(path, INPUTS, 38, Batching(10, True))


def test_the_only_array_needs_no_name(tmp_path):
    np.savez(tmp_path / "inputs.npz", weights(5, 3, 2, 2))
    assert list(read_arrays(tmp_path / "inputs.npz", INPUTS).arrays) == ["x"]


def test_an_input_without_an_axis_for_samples_is_fed_one_by_one(tmp_path):
    path = tmp_path / "inputs.npz"
    np.savez(path, a=weights(10, 3), b=np.full(10, 16000))
    scalar = helper.make_tensor_value_info("b", TensorProto.INT64, [])
    found = samples(path, inputs_of(value("a", "n", 3), scalar), 10)
    assert found.first.arrays["a"].shape == (1, 3)
    assert found.first.arrays["b"].shape == ()
    assert found.first.samples == 1
    assert len(list(found.gather)) == 8


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"a": np.zeros((4, 3)), "b": np.zeros(5)}, r"hold \[4, 5\] samples"),
        ({"a": np.zeros((4, 3))}, r"holds the arrays \['a'\]; expected one for each input of the graph: \['a', 'b'\]"),
        ({"a": np.zeros((4, 2)), "b": np.zeros(4)}, r"has the shape \(4, 2\); the graph takes float \(\?, 3\)"),
        ({"a": np.zeros(4), "b": np.zeros(4)}, r"has the shape \(4,\); the graph takes float \(\?, 3\)"),
        ({"a": np.zeros(()), "b": np.zeros(4)}, r"has the shape \(\); the graph takes float \(\?, 3\)"),
        ({"a": np.zeros((4, 3)), "b": np.zeros((4, 1, 1))}, r"has the shape \(4, 1, 1\); the graph takes float \(\?\)"),
        ({"a": np.zeros((0, 3)), "b": np.zeros(0)}, r"has the shape \(0, 3\)"),
        ({"a": np.zeros((1, 3)), "b": np.zeros(1)}, r"holds 1 sample\(s\); expected at least 2"),
        ({"a": np.zeros((4, 3)), "b": np.array(list("abcd"))}, "is <U1; the graph takes float32"),
    ],
)
def test_arrays_that_do_not_fit(arrays, sentence, tmp_path):
    np.savez(tmp_path / "inputs.npz", **arrays)
    with pytest.raises(InputError, match=sentence):
        samples(tmp_path / "inputs.npz", inputs_of(value("a", "n", 3), value("b", "n")), 10)


def test_pickled_arrays_are_not_loaded(tmp_path):
    np.savez(tmp_path / "inputs.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(InputError, match="cannot be read as .npz"):
        read_arrays(tmp_path / "inputs.npz", INPUTS)


def test_files_that_are_not_there_or_something_else(tmp_path):
    (tmp_path / "text.npz").write_text("nothing")
    (tmp_path / "empty.npz").write_bytes(b"")
    np.savez(tmp_path / "whole.npz", x=weights(40, 3, 4, 4))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:2000])
    np.save(tmp_path / "array.npy", weights(4, 3, 2, 2))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    for name in ("none", "text", "empty", "cut", "array"):
        with pytest.raises(InputError, match=f"{name}.npz cannot be read as .npz .*expected one array per input"):
            read_arrays(tmp_path / f"{name}.npz", INPUTS)


def spoilt(content, change):
    """A zip file with one change to the header of its first entry, there and in the list at the end."""
    content, listed = bytearray(content), content.rfind(b"PK\x01\x02")
    place = {"encrypted": 6, "of another method": 8}[change]
    for at in (place, listed + place + 2):
        content[at] = content[at] | 1 if change == "encrypted" else 99
    return bytes(content)


def test_files_that_numpy_cannot_read(tmp_path):
    """Each of them ends in another kind of exception."""
    path = tmp_path / "x.npz"
    np.savez_compressed(path, x=weights(40, 3, 4, 4))
    whole = path.read_bytes()
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (10**12, 3, 4, 4)})
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as file:
        file.writestr("x.npy", header.getvalue())
    files = {
        "encrypted": spoilt(whole, "encrypted"),
        "another method": spoilt(whole, "of another method"),
        "corrupt": whole[:200] + bytes(800) + whole[1000:],
        "huge": (tmp_path / "huge.npz").read_bytes(),
    }
    for content in files.values():
        path.write_bytes(content)
        with pytest.raises(InputError, match="x.npz cannot be read as .npz .*expected one array per input"):
            read_arrays(path, INPUTS)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x.txt", "hello")
    with pytest.raises(InputError, match="holds 'x.txt', which is no array; expected what numpy.savez writes"):
        read_arrays(path, INPUTS)


def test_noise_in_declared_shapes():
    feed = example_feed(inputs_of(value("x", "n", 3, "h", 5), value("k", 2, kind=TensorProto.INT64)), 7)
    assert {name: array.shape for name, array in feed.arrays.items()} == {"x": (1, 3, 7, 5), "k": (2,)}
    assert feed.arrays["k"].dtype == np.int64
    assert feed.samples == 1
    assert example_feed(inputs_of(value("x", 4, 3, 2, 2)), None).samples == 4
    with pytest.raises(InputError, match=r"size of the input 'x' is left open, float \(\?, 3, \?, \?\)"):
        example_feed(INPUTS, None)


def test_parts_of_a_feed_keep_the_inputs_together():
    feed = Feed({"a": np.arange(12).reshape(6, 2), "b": np.arange(6)}, 6)
    aside, rest = (list(Every([(feed, None)], 5, chosen)) for chosen in (True, False))
    (((one, _),), ((other, _),)) = aside, rest
    assert (one.samples, other.samples) == (2, 4)
    for part, rows in ((one, [0, 5]), (other, [1, 2, 3, 4])):
        np.testing.assert_array_equal(part.arrays["b"], rows)
        np.testing.assert_array_equal(part.arrays["a"][:, 0], 2 * part.arrays["b"])
    single = Feed({"a": np.zeros(()), "b": np.zeros((1, 3))})
    assert single[[0]] is single  # of which nothing can be cut
