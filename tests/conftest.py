from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Times of layers are kept between runs; tests neither read nor change the user's."""
    os.environ["DK2PNET_CACHE"] = str(tmp_path_factory.mktemp("cache"))
