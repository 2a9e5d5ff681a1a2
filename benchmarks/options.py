"""Writes docs/options.md: the options of every verb, from options.py."""

from __future__ import annotations

from pathlib import Path

from dk2pnet.options import VERBS, table_of

PAGE = Path(__file__).parent.parent / "docs" / "options.md"
HEAD = """# Options

Made from `src/dk2pnet/options.py` by `python benchmarks/options.py`. In Python the options are given by name
(`compress(model, data, "macs=0.44", tune=500)`) or as an object (`CompressOptions(tune=500)`); `recipe.yaml` holds
all of them, and `--recipe recipe.yaml` gives them again.
"""


def page() -> str:
    """What docs/options.md holds."""
    parts = [HEAD]
    for name, verb in VERBS.items():
        given = ", ".join(f"`{each.name if each.positional else '--' + each.name}`" for each in verb.arguments)
        parts.append(f"## {name}\n\nTakes {given}.\n\n{table_of(name)}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
