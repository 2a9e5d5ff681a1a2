"""What benchmarks/house.py counts, on a package of four small files."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from house import figures, table_rows

FILES = {
    "errors.py": "def f(self, a, b, c, d, e, g, h, i, j, k, *l, m=1): ...\n",
    "layer.py": "def f(self, a, b, c, d, e, g, h, i, j, k, *l, m=1, **n): ...\n",
    "data/images.py": (
        "from dk2pnet.layer import f\n\n\ndef g(x):\n    from dk2pnet.networks.open import h\n\n    return h(\n"
        "        x=x,\n        y=x,\n        z=f(x=x),\n    )\n"
    ),
    "cli.py": "import dk2pnet.data.images\nfrom dk2pnet import errors\n\nx = 1  # type: ignore[assignment]\n",
}


def test_each_figure_by_hand():
    found = figures(FILES)
    assert (found["files"], found["lines"], found["repeated"], found["ignores"]) == (4, 17, 1, 1)
    assert found["largest"] == {"file": "data/images.py", "lines": 11}
    assert found["functions"] == [{"file": "layer.py", "function": "f", "parameters": 13}]
    assert found["upward"] == ["data/images.py: networks"]


def test_the_house_before_is_counted_by_its_own_floors():
    old = {"pipelines/__init__.py": "", "layer.py": "import dk2pnet.errors, dk2pnet.pipelines.x\n", "errors.py": ""}
    assert figures(old)["upward"] == ["layer.py: pipelines"]


def test_the_table_has_a_row_for_each():
    rows = table_rows({"before": figures(FILES), "after": figures({"errors.py": "x = 1\n"})})
    assert ("… those with most", "f (13)", "none") in rows
    assert ("lines", "17", "1") in rows
