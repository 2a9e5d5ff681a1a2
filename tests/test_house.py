"""Imports run downward only: a room may use those of its own floor and of the floors below it (docs/layout.md)."""

import ast
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "src" / "dk2pnet"
FLOORS = (
    ("errors", "__version__"),
    (
        "layer",
        "plan",
        "modules",
        "measure",
        "memory",
        "answers",
        "digest",
        "tasks",
        "estimates",
        "processes",
        "decompose",
        "nets",
    ),
    ("options",),
    ("data",),
    ("training", "deploy", "report", "run"),
    ("networks",),
    ("students",),
    ("commands",),
    ("cli",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def imported(tree: ast.AST) -> Iterator[str]:
    """Rooms that are imported anywhere in a file, but for what only type checkers see."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            names = [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: write the import out, from dk2pnet on"
            names = [f"{node.module}.{each.name}" for each in node.names]
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        else:
            yield from imported(node)
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("dk2pnet."))


def test_imports_run_downward():
    upward = []
    for path in sorted(SOURCE.rglob("*.py")):
        place = path.relative_to(SOURCE)
        room = place.parts[0].removesuffix(".py")
        if room not in ("__init__", "__main__"):
            used = imported(ast.parse(path.read_text(encoding="utf-8")))
            upward += [f"{place}: {other}" for other in sorted(set(used)) if FLOOR.get(other, 99) > FLOOR[room]]
    assert upward == []
