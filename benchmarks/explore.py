"""`dk2pnet explore` as a user sees it, and its time beside one `dk2pnet compress`.

    python benchmarks/explore.py --weights resnet32.th --data-dir DATA --runs FOLDER [--tune 150]

What both do is timed by part, `compress` with ``--tune 0``; the closed form (statistics, spectra, solving, corrections)
is compared, which `explore` does for all its budgets from one gathering. Killed, the command goes on after the points
that are done; then the times are those of the last call only, so give a fresh FOLDER for the comparison. Writes
benchmarks/results/explore-MODEL.json and docs/explore-MODEL.svg.
"""

from __future__ import annotations

from pathlib import Path

import torch

import dk2pnet
from common import network_parser, write_results
from dk2pnet.report.curve import curve_svg

ROOT = Path(__file__).resolve().parent.parent
CLOSED_FORM = ("moments", "spectra", "solve", "reconstruct", "correct", "whiten")


def main() -> None:
    parser = network_parser(__doc__)
    parser.add_argument("--runs", required=True, type=Path)
    parser.add_argument("--tune", default=None)
    options = parser.parse_args()
    common = {"weights": options.weights, "normalize": options.normalize, "data_dir": options.data_dir}
    one = dk2pnet.compress(options.model, options.data, "macs=0.3", criterion="loss", tune=0, **common)
    metrics = dk2pnet.explore(
        options.model,
        options.data,
        criterion="loss",
        tune=options.tune,
        threads=torch.get_num_threads(),
        out=options.runs / f"explore-{options.model}",
        **common,
    )
    for point in metrics["points"]:  # the commands name where the weights lie here
        del point["command"]
    metrics["run"].pop("command")
    seconds = [{part: each["run"]["seconds"].get(part, 0.0) for part in CLOSED_FORM} for each in (one.metrics, metrics)]
    totals = [sum(each.values()) for each in seconds]
    metrics["closed_form_seconds"] = {
        "compress": seconds[0],
        "explore": seconds[1],
        "ratio": totals[1] / totals[0],
        "ratio_without_reconstruction": (totals[1] - seconds[1]["reconstruct"])
        / (totals[0] - seconds[0]["reconstruct"]),
        "compress_total": totals[0],
        "explore_total": totals[1],
    }
    write_results(f"explore-{options.model}", metrics)
    (ROOT / "docs" / f"explore-{options.model}.svg").write_text(curve_svg(metrics))
    print(metrics["closed_form_seconds"], metrics["run"]["seconds"], metrics["knee"])


if __name__ == "__main__":
    main()
