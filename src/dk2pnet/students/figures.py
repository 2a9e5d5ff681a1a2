"""What the report says of a network: accuracy and agreement on the test split, where there is one, else agreement on
the held-out samples; on these also how far its outputs are from the teacher's."""

from __future__ import annotations

from typing import Any

from dk2pnet import tasks
from dk2pnet.answers import Predictions
from dk2pnet.errors import InputError
from dk2pnet.networks.network import Network
from dk2pnet.plan import LayerPlan
from dk2pnet.run.run import Run
from dk2pnet.students.teacher import Teacher

__all__ = ["Figures", "layer_figures"]


class Figures:
    """`test` keeps what was answered on the test split, by stage."""

    def __init__(self, teacher: Teacher, run: Run) -> None:
        self.teacher, self.run = teacher, run
        self.test: dict[str, Predictions] = {}

    def of(self, network: Network, name: str) -> dict[str, Any]:
        """A stage: the network's name and figures; None where they cannot be had."""
        figures: dict[str, Any] = {"name": name, "accuracy": None, "agreement": None}
        samples, held = self.teacher.samples, self.teacher.held
        if samples is None:
            return figures
        if held is not None and network is not self.teacher.network:
            answers = network.predict(samples.held_out, self.run)
            if answers.infinite():
                raise InputError(
                    "the compressed network's outputs are not finite; give more calibration images or a larger budget"
                )
            figures |= tasks.figures(held, answers)
        if samples.test is not None:
            total = samples.counts.get("test", 0)
            answers = network.predict(samples.test, self.run, f"evaluating: {name}", total)
            self.test[name] = answers
            samples.counts["test"] = len(answers)
            if tasks.has_accuracy(answers):
                figures["accuracy"] = tasks.accuracy(answers)
                # Side by side with it, so of the same images.
                if network is not self.teacher.network and "teacher" in self.test:
                    figures["agreement"] = tasks.agreement(self.test["teacher"], answers)
        return figures


def layer_figures(layer: LayerPlan) -> dict[str, Any]:
    """A convolution's entry in metrics.json."""
    return {
        "name": layer.name,
        "kind": "dense" if layer.counts is None else "dk",
        "reason": layer.reason,
        "shape": layer.shape,
        "kernels": layer.kernels,
        "counts": layer.counts,
        "branches": layer.branches,
        "macs_dense": layer.macs_dense,
        "macs": layer.macs,
        "energy_kept": layer.energy_kept,
    }
