from __future__ import annotations

import pytest
import torch
from torch import nn

from dk2pnet.deploy.latency import _summary, compare_latency
from dk2pnet.deploy.onnx import export_onnx
from dk2pnet.errors import InputError


def test_heavy_network_is_slower(tmp_path):
    example = torch.randn(1, 8, 32, 32)
    light = nn.Conv2d(8, 16, 3, padding=1)
    heavy = nn.Sequential(light, *[nn.Conv2d(16, 16, 3, padding=1) for _ in range(10)])  # 21 times the MACs
    for name, net in (("light", light), ("heavy", heavy)):
        export_onnx(net, example, tmp_path / f"{name}.onnx")
    paths = {name: tmp_path / f"{name}.onnx" for name in ("heavy", "light")}
    result = compare_latency(paths, example, threads=1, seconds=0.1)
    assert list(result) == ["heavy", "light"]
    for latency in result.values():
        assert 0 < latency.low_ms <= latency.median_ms <= latency.high_ms
        assert latency.runs >= 15
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
