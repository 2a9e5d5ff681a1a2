"""What documents name is there."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_tests_and_files_that_hold_a_fault_exist():
    text = (ROOT / "docs/faults.md").read_text(encoding="utf-8")
    tests = {
        name for path in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    assert not set(re.findall(r"`(test_\w+)`", text)) - tests
    rows = [line.split("|") for line in text.splitlines() if re.match(r"\| \d+ \|", line)]
    assert [int(row[1]) for row in rows] == list(range(1, 35))
    for row in rows:
        for name in re.findall(r"`([\w/]+\.py)`", row[5]):
            assert (ROOT / "src/dk2pnet" / name).is_file(), name
