"""What the rebuilding of the package changed, counted in its source, which is read and not run.

    python benchmarks/house.py [--before 2f471b1] [--after REVISION] [--record]

Without --after: the working tree. Revisions are read by `git show`, nothing is checked out. --record writes
benchmarks/results/house.json.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import plain_parser, write_results
from dk2pnet.report.tables import markdown_table

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "src/dk2pnet/"
sys.path.insert(0, str(ROOT / "tests"))
from test_house import FLOORS, imported  # noqa: E402

# Those of the house before, as its docs/layout.md had them; a room that it does not name counts as of the lowest.
OLD_FLOORS = (
    ("decompose", "measure", "nets", "layer", "plan", "data"),
    ("models", "convert", "calibration", "training", "deploy", "student", "report"),
    ("pipelines",),
    ("cli",),
)
MOST = 12  # parameters
HEADER = ("in the source", "before", "after")


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, encoding="utf-8").stdout


def sources(revision: str | None) -> dict[str, str]:
    """The Python files of the package by their path in it; None for the working tree."""
    if revision is None:
        folder = ROOT / PACKAGE
        return {str(path.relative_to(folder)): path.read_text("utf-8") for path in sorted(folder.rglob("*.py"))}
    paths = git("ls-tree", "-r", "--name-only", revision, PACKAGE).splitlines()
    return {p.removeprefix(PACKAGE): git("show", f"{revision}:{p}") for p in paths if p.endswith(".py")}


def figures(files: dict[str, str]) -> dict[str, Any]:
    """All that is counted in one state of the package."""
    trees = {path: ast.parse(text) for path, text in files.items()}
    lines = {path: text.splitlines() for path, text in files.items()}
    largest = max(lines, key=lambda path: len(lines[path]))
    several = [
        {"file": path, "function": node.name, "parameters": parameters(node)}
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and parameters(node) > MOST
    ]
    return {
        "files": len(files),
        "lines": sum(map(len, lines.values())),
        "largest": {"file": largest, "lines": len(lines[largest])},
        "functions": sorted(several, key=lambda each: (-each["parameters"], each["file"], each["function"])),
        "upward": upward(trees, OLD_FLOORS if "pipelines/__init__.py" in files else FLOORS),
        "repeated": sum(repeated(trees[path], lines[path]) for path in files),
        "ignores": sum(bool(re.search(r"#\s*type:\s*ignore", line)) for each in lines.values() for line in each),
    }


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """How many it has, `self` and `cls` aside."""
    given = function.args
    every = (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg)
    names = [each.arg for each in every if each is not None]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def upward(trees: dict[str, ast.Module], floors: Sequence[Sequence[str]]) -> list[str]:
    """Imports of a room on a higher floor, one for each file and room."""
    floor = {room: number for number, rooms in enumerate(floors) for room in rooms}
    found = []
    for path, tree in trees.items():
        room = path.split("/")[0].removesuffix(".py")
        if room not in ("__init__", "__main__"):
            used = sorted(set(imported(tree)))
            found += [f"{path}: {other}" for other in used if floor.get(other, 0) > floor.get(room, 0)]
    return found


def repeated(tree: ast.Module, lines: Sequence[str]) -> int:
    """Lines that say only ``x=x,``."""
    return sum(
        isinstance(each.value, ast.Name)
        and each.value.id == each.arg
        and lines[each.lineno - 1].strip() == f"{each.arg}={each.arg},"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for each in node.keywords
    )


def table_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row for each figure, before and after."""
    both = (found["before"], found["after"])

    def row(name: str, *cells: str) -> tuple[str, ...]:
        return (name, *cells)

    def most(state: dict[str, Any]) -> str:
        named = [f"{each['function']} ({each['parameters']})" for each in state["functions"][:3]]
        return ", ".join(named) or "none"

    return [
        row("files", *(f"{state['files']}" for state in both)),
        row("lines", *(f"{state['lines']:,}" for state in both)),
        row("lines of the largest file", *(f"{s['largest']['lines']} ({s['largest']['file']})" for s in both)),
        row(f"functions of more than {MOST} parameters", *(f"{len(state['functions'])}" for state in both)),
        row("… those with most", *map(most, both)),
        row("upward imports, each by its own floors", *(f"{len(state['upward'])}" for state in both)),
        row("lines that say only `x=x,`", *(f"{state['repeated']}" for state in both)),
        row("`type: ignore`", *(f"{state['ignores']}" for state in both)),
    ]


def main() -> None:
    parser = plain_parser(__doc__)
    parser.add_argument("--before", default="2f471b1")
    parser.add_argument("--after", help="a revision; without: the working tree")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/house.json")
    options = parser.parse_args()
    found = {
        state: {"revision": revision, **figures(sources(revision))}
        for state, revision in (("before", options.before), ("after", options.after))
    }
    print(markdown_table(HEADER, table_rows(found)))
    for state in ("before", "after"):
        print(f"\n{state} ({found[state]['revision'] or 'the working tree'})")
        for each in found[state]["functions"]:
            print(f"  {each['parameters']:3} parameters: {each['function']} in {each['file']}")
        for each in found[state]["upward"]:
            print(f"  upward: {each}")
    if options.record:
        write_results("house", found)


if __name__ == "__main__":
    main()
