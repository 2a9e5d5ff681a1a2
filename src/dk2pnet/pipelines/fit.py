"""Training as the pipelines do it: batches of a data set, validation after every epoch, a folder for checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from dk2pnet.data import ImageData, Normalization, UserBatches
from dk2pnet.errors import InputError
from dk2pnet.measure import accuracy, predict
from dk2pnet.pipelines.inputs import Progress, augmentation_for, batch_size_for
from dk2pnet.processes import count
from dk2pnet.training.trainer import TrainingOptions, train

__all__ = ["fit"]


def fit(
    model: nn.Module,
    data: ImageData | UserBatches,
    options: TrainingOptions,
    *,
    example: Tensor,
    teacher: nn.Module | None = None,
    name: str | None = None,
    normalization: Normalization | None = None,
    validation: ImageData | None = None,
    device: torch.device,
    folder: Path | None = None,
    progress: Progress,
) -> dict[str, float]:
    """Train `model` on `data` in place; returns the mean loss terms of the last epoch."""
    if isinstance(data, ImageData):
        assert normalization is not None
        norm, augment = normalization, augmentation_for(name or "")

        def epoch_of(epoch: int) -> Iterable[tuple[Tensor, Tensor | None]]:
            return data.batches(options.batch_size, norm, augment=augment, shuffle=True, seed=options.seed, epoch=epoch)

        steps = len(data.batches(options.batch_size, norm).part(0, 0, count()))
    else:

        def epoch_of(epoch: int) -> Iterable[tuple[Tensor, Tensor | None]]:
            return data

        steps = sum(1 for _ in data)
    if not steps:
        raise InputError(f"there are fewer images than the {count()} processes; start fewer of them")

    def validate() -> dict[str, float]:
        if validation is None or validation.labels is None:
            return {}
        assert normalization is not None
        batches = validation.batches(batch_size_for(validation.size), normalization)
        return {"validation_accuracy": accuracy(predict(model, batches, device))}

    return train(
        model,
        epoch_of,
        options,
        example=example,
        steps_per_epoch=steps,
        teacher=teacher,
        device=device,
        folder=folder,
        validate=validate,
        progress=lambda step, total, terms: progress(_described(step, steps, terms), step, total),
    )


def _described(step: int, steps: int, terms: dict[str, float]) -> str:
    parts = " ".join(f"{name} {value:.3f}" for name, value in terms.items())
    return f"training, epoch {(step - 1) // steps + 1}, {parts}"
