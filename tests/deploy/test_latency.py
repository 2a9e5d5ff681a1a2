from __future__ import annotations

from collections import namedtuple

import numpy as np
import pytest
import torch
from torch import nn

from dk2pnet.data.arrays import Feed
from dk2pnet.deploy import latency
from dk2pnet.deploy.export import export_onnx, onnx_bytes
from dk2pnet.deploy.latency import Latency, _summary, compare_latency, conditions, is_onnx
from dk2pnet.errors import InputError
from toys import by_view


def test_heavy_network_is_slower(tmp_path):
    example = torch.randn(1, 8, 32, 32)
    light = nn.Conv2d(8, 16, 3, padding=1)
    heavy = nn.Sequential(light, *[nn.Conv2d(16, 16, 3, padding=1) for _ in range(10)])  # 21 times the MACs
    for name, net in (("light", light), ("heavy", heavy)):
        export_onnx(net, example, tmp_path / f"{name}.onnx")
    paths = {name: tmp_path / f"{name}.onnx" for name in ("heavy", "light")}
    result = compare_latency(paths, example, threads=1, seconds=0.1)
    assert list(result) == ["heavy", "light"]
    for found in result.values():
        assert 0 < found.low_ms <= found.median_ms <= found.high_ms
        assert found.runs >= 15
    assert result["heavy"].low_ms > 2 * result["light"].high_ms
    assert compare_latency(paths, example.numpy(), threads=1, seconds=0, rounds_min=3)["light"].runs == 3


def test_median_and_interval_by_hand():
    # n = 15: P(Binomial(15, 1/2) <= 3) = 576 / 32768 = 1.8 %, and <= 4 is 5.9 %: the 4th and the 12th of 15.
    times = [float(second) for second in (3, 1, 2, 15, 14, 13, 4, 5, 6, 12, 11, 10, 7, 8, 9)]
    result = _summary(times)
    assert (result.median_ms, result.low_ms, result.high_ms, result.runs) == (8000, 4000, 12000, 15)
    assert _summary([2.0, 1.0]).low_ms == 1000
    assert _summary([1.0]).high_ms == 1000
    # n = 6: P(Binomial(6, 1/2) <= 0) = 1 / 64 = 1.6 %: first and last; n = 100: the 40th and the 61st.
    assert _summary([1.0, 2, 3, 4, 5, 6]).low_ms == 1000
    hundred = _summary([float(second) for second in range(1, 101)])
    assert (hundred.low_ms, hundred.high_ms) == (40000, 61000)


def test_bad_input(tmp_path):
    export_onnx(nn.Conv2d(3, 4, 3), torch.randn(1, 3, 8, 8), tmp_path / "net.onnx")
    paths = {"net": tmp_path / "net.onnx"}
    with pytest.raises(InputError, match="nothing to time"):
        compare_latency({}, torch.randn(1, 3, 8, 8))
    with pytest.raises(InputError, match="does not exist"):
        compare_latency({"none": tmp_path / "none.onnx"}, torch.randn(1, 3, 8, 8))
    with pytest.raises(InputError, match="does not take an input of shape"):
        compare_latency(paths, torch.randn(1, 2, 8, 8))


def heavy_and_light():
    torch.manual_seed(0)
    return {
        "heavy": nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3), nn.Conv2d(64, 4, 3)).eval(),
        "light": nn.Conv2d(3, 4, 3).eval(),
    }


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "pytorch"])
def test_every_target_sees_which_network_is_slower(target):
    example = torch.randn(1, 3, 40, 40)
    networks = heavy_and_light()
    if is_onnx(target):
        networks = {name: onnx_bytes(module, example) for name, module in networks.items()}
    threads = torch.get_num_threads()
    result = compare_latency(networks, example, target=target, threads=1, seconds=0.1)
    assert result["heavy"].low_ms > result["light"].high_ms
    assert torch.get_num_threads() == threads


def test_a_network_that_cannot_be_channels_last_is_timed_as_it_is():
    model = by_view()
    found = compare_latency({"it": model}, torch.zeros(1, 1, 8, 8), target="pytorch", seconds=0.01)
    assert found["it"].median_ms > 0
    assert model[3].weight.is_contiguous()


def test_each_network_may_have_an_input_of_its_own():
    networks = {"a": onnx_bytes(nn.Conv2d(1, 2, 1), torch.zeros(1, 1, 4, 4)), "b": heavy_and_light()["light"]}
    networks["b"] = onnx_bytes(networks["b"], torch.zeros(1, 3, 9, 9))
    examples = {"a": torch.zeros(1, 1, 4, 4), "b": torch.zeros(1, 3, 9, 9)}
    assert set(compare_latency(networks, examples, seconds=0, rounds_min=2)) == {"a", "b"}


def test_it_ends_early_when_the_interval_is_tight():
    networks = {"light": onnx_bytes(heavy_and_light()["light"], torch.zeros(1, 3, 9, 9))}
    result = compare_latency(networks, torch.zeros(1, 3, 9, 9), threads=1, seconds=30, tight=1e9)
    assert result["light"].runs == 15


@pytest.mark.parametrize(
    ("times", "noisy"), [([1.0] * 20, False), ([1.0] * 10 + [1.05] * 10, False), ([1.0] * 10 + [2.0] * 10, True)]
)
def test_an_unsteady_machine_is_seen(times, noisy):
    assert _summary(times).noisy is noisy


def test_a_machine_too_unsteady_to_tell_is_told(caplog):
    steady, unsteady = _summary([1.0] * 20), _summary([1.0] * 10 + [2.0] * 10)
    assert not latency.latency_figures({"teacher": steady})["teacher"]["latency_noisy"]
    assert caplog.records == []
    figures = latency.latency_figures({"teacher": steady, "student": unsteady})
    assert figures["student"]["latency_noisy"]
    assert figures["student"]["latency_interval_ms"] == [1000, 2000]
    assert "the interval of the student is +-33 % of its median" in caplog.text


def test_what_slows_both_down_moves_neither_their_ratio_nor_its_interval():
    """Half of the turns on a machine half as fast."""
    slow = [1.0] * 10 + [2.0] * 10
    teacher, student = _summary(slow), _summary([0.6 * each for each in slow])
    ratio = latency.ratio_of(student, teacher)
    assert (ratio.median_ms, ratio.low_ms, ratio.high_ms) == pytest.approx((0.6, 0.6, 0.6))
    figures = latency.latency_figures({"teacher": teacher, "student": student})["student"]
    assert figures["latency_noisy"]
    assert figures["latency_ratio"] == pytest.approx(0.6)
    assert figures["latency_told"]


def test_without_turns_the_ratio_is_that_of_the_medians_and_its_interval_the_widest():
    ratio = latency.ratio_of(Latency(1.0, 0.9, 1.2, 5), Latency(2.0, 1.8, 2.2, 5))
    assert (ratio.median_ms, ratio.low_ms, ratio.high_ms) == pytest.approx((0.5, 0.9 / 2.2, 1.2 / 1.8))


Times = namedtuple("Times", "user system idle")


@pytest.mark.parametrize(
    ("computed", "seconds", "spent", "busy"),
    [
        (1.0, 1.0, Times(1.0, 0.0, 1.0), False),  # one thread on a machine of two
        (2.0, 1.0, Times(1.9, 0.1, 0.0), False),  # two threads, nobody else
        (0.6, 1.0, Times(1.9, 0.1, 0.0), True),  # one thread that shares its processor
        (1.0, 1.0, Times(1.9, 0.1, 0.0), True),  # two that share two
        (1.0, 1.0, Times(3.0, 0.0, 5.0), False),  # others, on processors of their own
        (0.01, 0.1, Times(0.2, 0.0, 0.0), False),  # too short to tell
    ],
)
def test_who_has_the_processor_is_seen(monkeypatch, computed, seconds, spent, busy):
    now = iter([Times(5.0, 2.0, 9.0), *[Times(*(a + b for a, b in zip((5.0, 2.0, 9.0), spent, strict=True)))] * 9])
    monkeypatch.setattr(latency.psutil, "cpu_times", lambda: next(now))
    assert latency._Others().crowd(computed, seconds) is busy


def test_times_of_a_busy_machine_tell_no_ratio(monkeypatch, caplog):
    monkeypatch.setattr(latency._Others, "crowd", lambda *_: True)
    content = onnx_bytes(heavy_and_light()["light"], torch.zeros(1, 3, 9, 9))
    found = compare_latency({"teacher": content, "student": content}, torch.zeros(1, 3, 9, 9), seconds=0, rounds_min=2)
    assert found["teacher"].busy
    assert not latency.latency_figures(found)["student"]["latency_told"]
    assert "The machine is too busy" in caplog.text


def test_what_is_wrong_with_a_target_is_said(monkeypatch):
    example = torch.zeros(1, 3, 9, 9)
    light = heavy_and_light()["light"]
    with pytest.raises(InputError, match="target is 'tflite'; expected one of onnxruntime, onnxruntime-int8, openvino"):
        compare_latency({"light": light}, example, target="tflite")
    with pytest.raises(InputError, match="light is Conv2d; target onnxruntime expects an ONNX file"):
        compare_latency({"light": light}, example)
    with pytest.raises(InputError, match="light is bytes; target pytorch expects a module"):
        compare_latency({"light": b""}, example, target="pytorch")
    with pytest.raises(InputError, match="cannot be loaded by OpenVINO"):
        compare_latency({"light": b"nonsense"}, example, target="openvino")
    with pytest.raises(InputError, match="the network does not take an input of shape"):
        compare_latency({"light": light}, torch.zeros(1, 2, 9, 9), target="pytorch")
    monkeypatch.setattr("dk2pnet.deploy.runtimes.target.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'dk2pnet\[openvino\]'"):
        compare_latency({"light": b""}, example, target="openvino")


def test_the_conditions_of_a_measurement():
    facts = conditions("onnxruntime", torch.zeros(2, 3, 9, 9), 1)
    assert {key: facts[key] for key in ("target", "threads", "batch", "input")} == {
        "target": "onnxruntime",
        "threads": 1,
        "batch": 2,
        "input": [3, 9, 9],
    }
    assert facts["onnxruntime"]
    assert facts["processor"]


def test_a_feed_says_how_many_samples_were_timed():
    """Its first input may have no axis at all, or one that is not that of samples."""
    feed = Feed({"threshold": np.array(0.5, np.float32), "x": np.zeros((3, 2), np.float32)}, 3)
    assert (conditions("onnxruntime", feed, 1)["batch"], conditions("onnxruntime", feed, 1)["input"]) == (3, [])
