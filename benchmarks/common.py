"""What the benchmarks share: the options that name a trained network, and results as JSON in benchmarks/results."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from dk2pnet.run.out_folder import write_json

RESULTS = Path(__file__).resolve().parent / "results"


def plain_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the module's docstring, line by line."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def network_parser(doc: str | None) -> argparse.ArgumentParser:
    """The same with the options of a network that others trained, and its data set."""
    parser = plain_parser(doc)
    parser.add_argument("--model", default="resnet32")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--data-dir", default=None)
    parser.add_argument("--normalize", default="imagenet")
    return parser


def read_results(name: str, new: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What benchmarks/results/NAME.json holds; `new`, where it is given, if there is no such file."""
    path = RESULTS / f"{name}.json"
    if new is not None and not path.exists():
        return dict(new)
    return json.loads(path.read_text(encoding="utf-8"))


def write_results(name: str, result: Mapping[str, Any]) -> None:
    """Write benchmarks/results/NAME.json, which appears whole."""
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / f"{name}.json", result)


class Rows:
    """Rows under ``rows`` of benchmarks/results/NAME.json, to which several processes may add at once.

    `key` tells two rows apart: a new row takes the place of the one with its key. Rows lie in the order of `order`
    (their key's, without it).
    """

    def __init__(
        self,
        name: str,
        key: Callable[[Mapping[str, Any]], Any],
        order: Callable[[Mapping[str, Any]], Any] | None = None,
    ) -> None:
        self.name, self.key, self.order = name, key, order or key

    def read(self) -> list[dict[str, Any]]:
        return read_results(self.name, {"rows": []})["rows"]

    def add(self, row: dict[str, Any], about: Mapping[str, Any]) -> None:
        """Add a row; `about` is what the file says of all of them."""
        RESULTS.mkdir(exist_ok=True)
        with FileLock(RESULTS / f".{self.name}.lock"):
            rows = [other for other in self.read() if self.key(other) != self.key(row)] + [row]
            write_results(self.name, {**about, "rows": sorted(rows, key=self.order)})


RATES = (3e-3, 1e-2)
FURTHER = {1e-2: 3e-2, 3e-2: 1e-1, 3e-3: 1e-3, 1e-3: 3e-4, 3e-4: 1e-4}


def searched(row: Callable[[float, str], dict[str, Any]]) -> dict[str, Any]:
    """The row of the learning rate and batch norm at which the student agrees most with the teacher on validation.

    `row` makes the row of a rate and a mode: first `RATES` in training mode, then further in the direction of the
    better one as long as that helps, then frozen batch norm at that rate.
    """
    rows = [row(rate, "training") for rate in RATES]
    while True:
        best = max(rows, key=lambda each: each["validation_agreement"])
        further = FURTHER.get(best["lr"])
        if further is None or further in {each["lr"] for each in rows}:
            break
        rows.append(row(further, "training"))
    return max([best, row(best["lr"], "frozen")], key=lambda each: each["validation_agreement"])
