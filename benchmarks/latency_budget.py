"""A latency budget against the MAC budget that ends at the same measured latency: whose network is more accurate?

    python benchmarks/latency_budget.py --weights resnet32.th --data-dir DATA [--fractions 0.4 0.6] [--seeds 0 1 2]

For every fraction one `dk2pnet.compress` with ``latency=F``; then MAC budgets are tried, by bisection and without
solving them well, until the network that they give takes the same time (both in the emitted forms that are fastest for
them, measured beside the dense network); then one `dk2pnet.compress` with that MAC budget. No training anywhere.
Figures already in the JSON are not made again. Writes benchmarks/results/latency_budget-MODEL.json.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import dk2pnet
from common import network_parser, read_results, write_results
from dk2pnet.run.device import environment, pick_device


def main() -> None:
    parser = network_parser(__doc__)
    parser.add_argument("--criterion", default="loss")
    parser.add_argument("--fractions", nargs="+", type=float, default=[0.6, 0.4])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--probes", type=int, default=6)
    options = parser.parse_args()
    name = f"latency_budget-{options.model}"
    result = read_results(name, {"model": options.model, "data": options.data, "rows": [], "probes": []})
    result["environment"] = environment(pick_device("cpu"))

    def run(budget: str, seed: int, rebuild: bool) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            metrics = dk2pnet.compress(
                options.model,
                options.data,
                budget,
                criterion=options.criterion,
                tune=0,
                weights=options.weights,
                normalize=options.normalize,
                data_dir=options.data_dir,
                threads=options.threads,
                rebuild=rebuild,
                seed=seed,
                out=Path(folder) / "out",
            ).metrics
        teacher, student = metrics["teacher"], metrics["student"]
        return {
            "budget": budget,
            "seed": seed,
            "criterion": options.criterion,
            "threads": options.threads,
            "accuracy": student["accuracy"],
            "teacher_accuracy": teacher["accuracy"],
            "latency": student["latency_ms"] / teacher["latency_ms"],
            "macs_kept": student["macs"] / teacher["macs"],
            "search": metrics["latency_search"],
            "seconds": metrics["run"]["seconds"],
        }

    for seed in options.seeds:
        for fraction in options.fractions:
            found = [row for row in result["rows"] if (row["fraction"], row["seed"]) == (fraction, seed)]
            ours = next((row for row in found if row["kind"] == "latency"), None)
            if ours is None:
                ours = {"kind": "latency", "fraction": fraction, **run(f"latency={fraction:g}", seed, True)}
                result["rows"].append(ours)
                write_results(name, result)
            if any(row["kind"] == "macs" for row in found):
                continue
            low, high = 0.05, 1.0
            best: dict[str, Any] | None = None
            asked = ours["macs_kept"]
            for _ in range(options.probes):
                try:
                    probe = run(f"macs={asked:.4f}", seed, False)
                except dk2pnet.InputError:  # fewer than one kernel per layer
                    low, asked = asked, (asked + high) / 2
                    continue
                result["probes"].append({"fraction": fraction, **probe})
                write_results(name, result)
                if best is None or abs(probe["latency"] - ours["latency"]) < abs(best["latency"] - ours["latency"]):
                    best = probe
                if abs(probe["latency"] / ours["latency"] - 1) < 0.02:
                    break
                low, high = (asked, high) if probe["latency"] < ours["latency"] else (low, asked)
                asked = (low + high) / 2
            assert best is not None
            row = {"kind": "macs", "fraction": fraction, **run(best["budget"], seed, True)}
            result["rows"].append(row)
            write_results(name, result)
            print(fraction, seed, ours["accuracy"], ours["latency"], row["accuracy"], row["latency"], flush=True)


if __name__ == "__main__":
    main()
