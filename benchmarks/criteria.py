"""Every criterion at every budget on a CIFAR-10 ResNet trained by others, no training afterwards.

    python benchmarks/criteria.py --weights resnet32.th --data-dir DATA [--model resnet32] [--budgets macs=0.44 ...]

Each run is one `dk2pnet.compress` as the command line makes it; figures already in the JSON are not made again, so a
killed run goes on where it was. Writes benchmarks/results/criteria-MODEL.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import dk2pnet
from dk2pnet.pipelines.inputs import environment, pick_device

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet32")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--data-dir", default=None)
    parser.add_argument("--normalize", default="imagenet")
    parser.add_argument("--criteria", nargs="+", default=["weight", "response", "loss"])
    parser.add_argument(
        "--budgets", nargs="+", default=["macs=0.44", "macs=0.3", "macs=0.15", "kernels=1", "kernels=2", "kernels=3"]
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    options = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"criteria-{options.model}.json"
    result = (
        json.loads(path.read_text()) if path.exists() else {"model": options.model, "data": options.data, "rows": []}
    )
    done = {(row["criterion"], row["budget"], row["seed"]) for row in result["rows"]}
    for budget in options.budgets:
        for criterion in options.criteria:
            for seed in options.seeds:
                if (criterion, budget, seed) in done:
                    continue
                start = time.perf_counter()
                metrics = dk2pnet.compress(
                    options.model,
                    budget,
                    criterion,
                    options.data,
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
                path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
                figures = f"{row['accuracy']:.2f} % of {row['teacher_accuracy']:.2f} %, MACs x{row['macs_kept']:.3f}"
                print(f"{budget:10} {criterion:9} seed {seed}: {figures}, {row['seconds_all']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
