"""Every criterion at every budget on a CIFAR-10 ResNet trained by others, no training afterwards.

    python benchmarks/criteria.py --weights resnet32.th --data-dir DATA [--model resnet32] [--budgets macs=0.44 ...]

Each run is one `dk2pnet.compress` as the command line makes it; figures already in the JSON are not made again, so a
killed run goes on where it was. Writes benchmarks/results/criteria-MODEL.json.
"""

from __future__ import annotations

import time

import dk2pnet
from common import network_parser, read_results, write_results
from dk2pnet.run.device import environment, pick_device


def main() -> None:
    parser = network_parser(__doc__)
    parser.add_argument("--criteria", nargs="+", default=["weight", "response", "loss"])
    parser.add_argument(
        "--budgets", nargs="+", default=["macs=0.44", "macs=0.3", "macs=0.15", "kernels=1", "kernels=2", "kernels=3"]
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    options = parser.parse_args()
    name = f"criteria-{options.model}"
    result = read_results(name, {"model": options.model, "data": options.data, "rows": []})
    done = {(row["criterion"], row["budget"], row["seed"]) for row in result["rows"]}
    for budget in options.budgets:
        for criterion in options.criteria:
            for seed in options.seeds:
                if (criterion, budget, seed) in done:
                    continue
                start = time.perf_counter()
                metrics = dk2pnet.compress(
                    options.model,
                    options.data,
                    budget,
                    criterion=criterion,
                    tune=0,
                    weights=options.weights,
                    normalize=options.normalize,
                    data_dir=options.data_dir,
                    seed=seed,
                ).metrics
                total = metrics["teacher"]
                row = {
                    "criterion": criterion,
                    "budget": budget,
                    "seed": seed,
                    "teacher_accuracy": total["accuracy"],
                    "accuracy": metrics["student"]["accuracy"],
                    "agreement": metrics["student"]["agreement"],
                    "macs_kept": metrics["student"]["macs"] / total["macs"],
                    "parameters_kept": metrics["student"]["parameters"] / total["parameters"],
                    "decisions": metrics["decisions"],
                    "seconds": metrics["run"]["seconds"],
                    "seconds_all": round(time.perf_counter() - start, 1),
                }
                result["rows"].append(row)
                result |= environment(pick_device("auto"))
                write_results(name, result)
                figures = f"{row['accuracy']:.2f} % of {row['teacher_accuracy']:.2f} %, MACs x{row['macs_kept']:.3f}"
                print(f"{budget:10} {criterion:9} seed {seed}: {figures}, {row['seconds_all']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
