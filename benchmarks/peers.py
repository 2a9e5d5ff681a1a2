"""Other methods of the field in one harness: same teacher, images, multiply-adds and fine-tuning.

    pip install -r benchmarks/requirements-peers.txt
    python benchmarks/peers.py --weights resnet32.th --data-dir DATA [--budgets 0.44 0.3] [--methods ...] [--one]

Every method gets the whole network's multiply-adds to within a percent. Low-rank methods spend them by one queue over
the network, each by its own measure of error (see peer_methods.py); Torch-Pruning ranks channels globally, over the
whole network or inside the blocks, whichever is closer to the teacher on the held-out images. Batch norm is
re-estimated on the calibration images, or matched to the teacher's there, where that brings the held-out answers
closer (for all). Then the same fine-tuning: softened logits and labels, 150 steps of 128 images, one learning rate.
Accuracy is the test split's, after the last step.
Rows already in the JSON are not made again; ``--one`` makes one and ends. Writes benchmarks/results/peers-MODEL.json.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

import dk2pnet
from common import network_parser, read_results, write_results
from dk2pnet.answers import predict
from dk2pnet.data import calibration_split, split_training
from dk2pnet.decompose.select import Candidate, Option, choose, select
from dk2pnet.decompose.solve import spectrum
from dk2pnet.deploy.costs import LatencyTable
from dk2pnet.deploy.export import onnx_bytes
from dk2pnet.deploy.latency import compare_latency
from dk2pnet.layer import set_form
from dk2pnet.measure import macs, parameters
from dk2pnet.modules import copy_model, replace_modules
from dk2pnet.networks.network import Site
from dk2pnet.networks.open import load_data, open_network
from dk2pnet.networks.torch.corrections import match_batch_norm, reestimate_batch_norm
from dk2pnet.networks.torch.gather import gather_moments
from dk2pnet.networks.torch.network import TorchNetwork
from dk2pnet.networks.torch.sites import find_convolutions
from dk2pnet.run.device import environment, pick_device
from dk2pnet.run.run import Run
from dk2pnet.students.latency_budget import choose_forms
from dk2pnet.tasks import accuracy, divergence
from dk2pnet.training.fit import Source, fit
from dk2pnet.training.trainer import TrainingOptions
from peer_methods import channel_pca, cp, gdws, gdws_weights, per_channel_svd, pruned, spatial_svd, tucker

METHODS = (
    "ours, loss",
    "ours, response",
    "GDWS, gradient weights",
    "GDWS, alpha = 1",
    "per-channel SVD",
    "response PCA",
    "spatial SVD",
    "Tucker-2",
    "CP",
    "Torch-Pruning",
)
Batches = Iterable[tuple[Tensor, Any]]
STEPS = {"images": 6400, "epochs": 3, "learning_rate": 0.01}


class Harness:
    """The teacher, its images (batches, normalised), and how a method makes a student of it."""

    def __init__(self, teacher: nn.Module, gather: Batches, held_out: Batches, test: Batches) -> None:
        self.teacher, self.gather, self.held_out, self.test = teacher.eval(), gather, held_out, test
        self.images = torch.cat([x for x, _ in itertools.islice(gather, -(-256 // len(next(iter(gather))[0])))])[:256]
        self.example = self.images[:1]
        self.sites = find_convolutions(self.teacher, self.example, first=True)
        self.open = {site.name: site for site in self.sites if not site.reason}
        self.total = macs(self.teacher, self.example)
        self.answers = predict(self.teacher, self.held_out)

    def accuracy(self, model: nn.Module) -> float:
        return accuracy(predict(model, self.test))

    def closer(self, *models: nn.Module) -> nn.Module:
        """The one whose held-out answers are closest to the teacher's."""
        return min(models, key=lambda model: divergence(self.answers, predict(model, self.held_out)))

    def with_batch_norm(self, model: nn.Module) -> nn.Module:
        """As it is, or with its batch norms re-estimated or matched to the teacher's: whichever is closest to it."""
        again, matched = copy_model(model), copy_model(model)
        reestimate_batch_norm(again, self.gather, torch.device("cpu"))
        match_batch_norm(matched, self.teacher, self.gather)
        return self.closer(model, again, matched)

    def replaced(self, modules: dict[str, nn.Module]) -> nn.Module:
        student = copy_model(self.teacher)
        named = dict(student.named_modules())
        replace_modules(student, {named[name]: module for name, module in modules.items()})
        return student.eval()

    def by_options(self, peers: Callable[[Site], list], budget: float) -> nn.Module:
        """Ranks by the queue over all layers, for a method with options per layer."""
        found = {name: peers(site) for name, site in self.open.items()}
        options: dict[str, list[Option]] = {}
        for name, of_layer in found.items():
            options[name] = [option for option, _ in of_layer] + [Option(self.open[name].macs, 0.0)]
        fixed = self.total - sum(site.macs for site in self.open.values())
        taken = choose(options, budget * self.total - fixed)
        return self.replaced({n: found[n][i][1]() for n, i in taken.items() if i < len(found[n])})

    def gdws(self, budget: float, alpha: dict[str, Tensor] | None) -> nn.Module:
        candidates = {}
        for name, site in self.open.items():
            conv = site.module
            assert isinstance(conv, nn.Conv2d)
            energies = spectrum(conv.weight)
            energies = energies / energies.sum() if alpha is None else energies * alpha[name].view(1, -1, 1)
            kernel = (conv.kernel_size[0] * conv.kernel_size[1] + conv.out_channels) * site.positions
            candidates[name] = Candidate(energies, kernel, site.macs)
        fixed = self.total - sum(site.macs for site in self.open.values())
        counts = select(candidates, budget * self.total - fixed)
        return self.replaced({n: gdws(self.open[n], c) for n, c in counts.items() if c is not None})

    def pca(self, budget: float) -> nn.Module:
        convolutions = {name: site.module for name, site in self.open.items()}
        moments: dict[str, Any] = {}
        for group in gather_moments(self.teacher, convolutions, self.gather):  # type: ignore[arg-type]
            moments |= group
        return self.by_options(lambda s: channel_pca(s, moments[s.name].A()[0], moments[s.name].mean()[0]), budget)

    def pruning(self, budget: float) -> nn.Module:
        inner = [m for n, m in self.teacher.named_modules() if n.endswith("conv2") or n == "conv1"]
        classifier = [m for m in self.teacher.modules() if isinstance(m, nn.Linear)][-1]
        found = []
        for ignored in ([], inner):
            low, high = 0.0, 0.95
            best: tuple[float, nn.Module] | None = None
            for _ in range(12):
                ratio = (low + high) / 2
                student = pruned(self.teacher, self.example, ratio, [classifier, *ignored])
                kept = macs(student, self.example) / self.total
                if best is None or abs(kept - budget) < abs(best[0] - budget):
                    best = kept, student
                low, high = (ratio, high) if kept > budget else (low, ratio)
            assert best is not None
            if abs(best[0] - budget) < 0.02:
                found.append(self.with_batch_norm(best[1].eval()))
        return self.closer(*found)

    def student(self, method: str, budget: float) -> nn.Module:
        """The student of another method."""
        if method == "GDWS, gradient weights":
            return self.gdws(budget, gdws_weights(self.teacher, self.open.values(), self.images[:64]))
        if method == "GDWS, alpha = 1":
            return self.gdws(budget, None)
        if method == "per-channel SVD":
            return self.by_options(per_channel_svd, budget)
        if method == "response PCA":
            return self.pca(budget)
        if method == "Torch-Pruning":
            return self.pruning(budget)
        return self.by_options({"spatial SVD": spatial_svd, "Tucker-2": tucker, "CP": cp}[method], budget)


class Named(Harness):
    """Of a network and a data set with names, with the fine-tuning that all rows get."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        training = load_data(options.data, "train", options.model, data_dir=options.data_dir)
        test = load_data(options.data, "test", options.model, data_dir=options.data_dir)
        assert training is not None
        assert test is not None
        network = open_network(options.model, weights=options.weights, normalize=options.normalize, data=training)
        self.norm = network.normalization
        assert self.norm is not None
        self.training, _ = split_training(training)
        gather, held_out = (data.batches(128, self.norm) for data in calibration_split(self.training, 2000))
        super().__init__(network.model, gather, held_out, test.batches(128, self.norm))

    def start(self, method: str, budget: float, seed: int = 0) -> nn.Module:
        """The student of any method, with the batch norm that is closer to the teacher."""
        torch.manual_seed(seed)
        if not method.startswith("ours"):
            return self.with_batch_norm(self.student(method, budget))
        options = self.options
        student = dk2pnet.compress(
            options.model,
            options.data,
            f"macs={budget:g}",
            criterion=method.split(", ")[1],
            tune=0,
            weights=options.weights,
            normalize=options.normalize,
            data_dir=options.data_dir,
            seed=seed,
        ).model
        set_form(student, "folded")
        return student

    def latency(self, student: nn.Module) -> float:
        """Relative to the teacher in ONNX Runtime, one thread; DK layers in the forms that are fastest there."""
        sites = {site.name: site for site in self.sites}
        forms = choose_forms(TorchNetwork(student), sites, LatencyTable("onnxruntime", 1))
        networks = {
            "teacher": onnx_bytes(self.teacher, self.example),
            "student": onnx_bytes(student, self.example, forms=forms),
        }
        found = compare_latency(networks, self.example, threads=1)
        return found["student"].median_ms / found["teacher"].median_ms

    def finetuned(self, student: nn.Module) -> float:
        images = self.training.subset(torch.arange(STEPS["images"]))
        options = TrainingOptions(
            epochs=int(STEPS["epochs"]), batch_size=128, learning_rate=STEPS["learning_rate"], method="kd", seed=0
        )
        source = Source(images, self.options.data, self.norm)
        fit(student, source, options, Run(), example=self.example, teacher=self.teacher)
        return self.accuracy(student.eval())


def main() -> None:
    parser = network_parser(__doc__)
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.44, 0.3])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--one", action="store_true", help="make one missing row, then end")
    options = parser.parse_args()
    name = f"peers-{options.model}"
    result = read_results(name, {"model": options.model, "data": options.data, "fine_tuning": STEPS, "rows": []})
    result["environment"] = environment(pick_device("cpu"))
    done = {(row["method"], row["budget"]) for row in result["rows"]}
    missing = [(m, b) for b in options.budgets for m in options.methods if (m, b) not in done]
    if not missing:
        return
    harness = Named(options)
    for method, budget in missing[: 1 if options.one else None]:
        start = time.perf_counter()
        student = harness.start(method, budget)
        row = {
            "method": method,
            "budget": budget,
            "macs_kept": macs(student, harness.example) / harness.total,
            "parameters": parameters(student),
            "teacher_accuracy": harness.accuracy(harness.teacher),
            "before": harness.accuracy(student),
            "latency": harness.latency(student),
            "seconds": time.perf_counter() - start,
        }
        row["after"] = harness.finetuned(student)
        result["rows"].append(row)
        write_results(name, result)
        print(row, flush=True)


if __name__ == "__main__":
    main()
