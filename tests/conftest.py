from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Times of layers are kept between runs; tests neither read nor change the user's."""
    os.environ["DK2PNET_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def no_timing(monkeypatch, tmp_path_factory):
    """Every network takes a millisecond; other tests do not find such times in the cache."""
    from timing import still, time_by

    monkeypatch.setenv("DK2PNET_CACHE", str(tmp_path_factory.mktemp("still")))
    time_by(still, monkeypatch)


@pytest.fixture
def quick_timing(monkeypatch, tmp_path_factory):
    """Latencies are measured for a moment only, and kept for this test only."""
    from timing import quick, time_by

    monkeypatch.setenv("DK2PNET_CACHE", str(tmp_path_factory.mktemp("quick")))
    time_by(quick, monkeypatch)
