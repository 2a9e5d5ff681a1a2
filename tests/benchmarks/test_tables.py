"""No figure in README.md or docs/ is typed by hand: every table is the one that the JSON makes."""

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from tables import TABLES

ROOT = Path(__file__).resolve().parents[2]


def test_every_table_has_a_place():
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))]
    assert [name for name in TABLES if not any(f"<!-- table: {name} -->" in text for text in texts)] == []


def test_the_tables_are_those_of_the_json():
    command = [sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
