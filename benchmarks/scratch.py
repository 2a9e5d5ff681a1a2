"""Note what a `dk2pnet train` from scratch came to: accuracy and images per second.

    dk2pnet train --model resnet20 --data cifar10 --epochs 20 --out TEACHER
    python benchmarks/scratch.py TEACHER

Writes benchmarks/results/scratch.json.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import yaml

from common import plain_parser, write_results


def main() -> None:
    parser = plain_parser(__doc__)
    parser.add_argument("out", type=Path, help="a folder that dk2pnet train wrote")
    out = parser.parse_args().out
    metrics = json.loads((out / "metrics.json").read_text())
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    row = {key: recipe[key] for key in ("model", "data", "epochs", "batch_size", "learning_rate", "precision", "seed")}
    row |= {key: metrics["network"][key] for key in ("accuracy", "validation_accuracy", "parameters", "macs")}
    row["images_per_second"] = statistics.median(line["images_per_second"] for line in log)
    result = {"rows": [row], **{key: metrics["run"][key] for key in ("versions", "hardware")}}
    write_results("scratch", result)


if __name__ == "__main__":
    main()
