"""What each step of the closed form brings on a CIFAR-10 ResNet trained by others (criterion `loss`, no training).

    python benchmarks/corrections.py --weights resnet32.th --data-dir DATA [--model resnet32] [--budgets 0.44 0.3 0.15]

Rows: per-channel SVDs in the metric of the moments; block coordinate descent; the same with centred moments and a free
bias; the layer-by-layer asymmetric reconstruction, first with nothing known of what follows a convolution, then with
the batch norm, the other side of a sum, and the ReLU. Columns: test accuracy and KL(teacher || student) on the held-out
calibration images, as it is and with batch norm re-estimated. The KL decides; the accuracy is only shown. Writes
benchmarks/results/corrections-MODEL.json.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from common import network_parser, write_results
from dk2pnet.answers import predict
from dk2pnet.data import calibration_split, split_training
from dk2pnet.decompose.solve import Factors, Problem, solve_many
from dk2pnet.layer import DKConv2d
from dk2pnet.measure import macs, parameters
from dk2pnet.modules import copy_model, replace_modules
from dk2pnet.networks.open import load_data, open_network
from dk2pnet.networks.torch.corrections import reestimate_batch_norm
from dk2pnet.networks.torch.gather import gather_moments
from dk2pnet.networks.torch.reconstruct import reconstruct
from dk2pnet.networks.torch.sites import find_convolutions
from dk2pnet.networks.torch.surroundings import Surroundings, surroundings_of
from dk2pnet.plan import Budget
from dk2pnet.run.device import environment
from dk2pnet.students.allocate import energies_of, spend
from dk2pnet.tasks import accuracy, divergence

RECONSTRUCTIONS = ("asymmetric, layer by layer", "… batch norm known", "… and the sum", "… and the ReLU")


def main() -> None:
    parser = network_parser(__doc__)
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.44, 0.3, 0.15])
    options = parser.parse_args()
    training = load_data(options.data, "train", options.model, data_dir=options.data_dir)
    test = load_data(options.data, "test", options.model, data_dir=options.data_dir)
    assert training is not None
    assert test is not None
    network = open_network(options.model, weights=options.weights, normalize=options.normalize, data=training)
    norm = network.normalization
    assert norm is not None
    gather, held = calibration_split(split_training(training)[0], 2000)
    gather_batches, held_batches, test_batches = (part.batches(128, norm) for part in (gather, held, test))
    teacher = network.model.eval()
    example = norm.apply(training.subset([0]).images)
    sites = find_convolutions(teacher, example, first=True)
    opened = {site.name: site for site in sites if not site.reason}
    convs: dict[str, nn.Conv2d] = {name: site.module for name, site in opened.items()}  # type: ignore[misc]
    wanted = predict(teacher, held_batches)
    moments = next(gather_moments(teacher, convs, gather_batches, gradients=True))
    energies = {name: energies_of(site, moments, "loss") for name, site in opened.items()}  # type: ignore[arg-type]
    rows = []

    def add(budget: float, name: str, make: Callable[[], nn.Module]) -> None:
        start = time.perf_counter()
        student = make()
        seconds = time.perf_counter() - start
        again = copy_model(student)
        reestimate_batch_norm(again, gather_batches)
        row = {"budget": f"macs={budget:g}", "step": name, "seconds": round(seconds, 1)}
        for suffix, model in (("", student), ("_bn", again)):
            row["accuracy" + suffix] = accuracy(predict(model, test_batches))
            row["kl" + suffix] = divergence(wanted, predict(model, held_batches))
        rows.append(row)
        print(json.dumps(row), flush=True)
        result = {"model": options.model, "rows": rows, **environment(torch.device("cpu"))}
        write_results(f"corrections-{options.model}", result)

    for budget in options.budgets:
        spent = spend(Budget("macs", budget), opened, energies, macs(teacher, example), parameters(teacher))
        counts = {name: count for name, count in spent.items() if count is not None}

        def problems(centred: bool = False, counts: dict = counts) -> list[Problem]:
            return [Problem(convs[k].weight, v, moments[k].A(centred), moments[k].B()) for k, v in counts.items()]

        def solved(sweeps: int, centred: bool = False, counts: dict = counts) -> nn.Module:
            factors = dict(zip(counts, solve_many(problems(centred, counts), sweeps=sweeps), strict=True))
            means = {k: moments[k].mean()[0] for k in counts} if centred else None
            return with_layers(teacher, factors, means)

        factors = dict(zip(counts, solve_many(problems()), strict=True))

        def rebuilt(known: int, factors: dict = factors) -> nn.Module:
            """The first so many of batch norm, sum and ReLU are known."""

            def part(*args: Any) -> dict[str, Surroundings]:
                found = surroundings_of(*args)
                return {
                    name: Surroundings(near.norm, near.other if known > 1 else None, near.rectified and known > 2)
                    for name, near in found.items()
                    if known
                }

            student = copy_model(teacher)
            with patch("dk2pnet.networks.torch.reconstruct.surroundings_of", part):
                reconstruct(teacher, student, sites, factors, gather_batches, images=len(gather))
            return student.eval()

        add(budget, "per-channel SVD in the metric", lambda solved=solved: solved(0))
        add(budget, "block coordinate descent", lambda solved=solved: solved(60))
        add(budget, "… centred, free bias", lambda solved=solved: solved(60, True))
        for known, name in enumerate(RECONSTRUCTIONS):
            add(budget, name, lambda known=known, rebuilt=rebuilt: rebuilt(known))


def with_layers(
    teacher: nn.Module, factors: dict[str, Factors], means: dict[str, torch.Tensor] | None = None
) -> nn.Module:
    """The student; with `means`, each layer's bias takes up the mean of what its weight lost."""
    student = copy_model(teacher)
    modules = dict(student.named_modules())
    layers: dict[nn.Module, nn.Module] = {}
    for name, found in factors.items():
        conv = modules[name]
        assert isinstance(conv, nn.Conv2d)
        layer = DKConv2d.from_factors(conv, found, form="folded")
        if means is not None:
            lost = (conv.weight - layer.fold()).detach().flatten(1).double() @ means[name]
            layer.bias = nn.Parameter((lost if layer.bias is None else layer.bias + lost).float())
        layers[conv] = layer
    replace_modules(student, layers)
    return student.eval()


if __name__ == "__main__":
    main()
