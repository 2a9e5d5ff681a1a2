"""Training as the pipelines do it: batches of a data set, validation after every epoch, a folder for checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dk2pnet.data import SMALLEST_CROP, ImageData, Normalization, UserBatches
from dk2pnet.data.images import augmentation_for, batch_size_for
from dk2pnet.decompose.whiten import Whitening
from dk2pnet.errors import InputError
from dk2pnet.measure import accuracy, predict
from dk2pnet.processes import count
from dk2pnet.run.progress import Progress
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
    augment: str | None = None,
    least_crop: float = SMALLEST_CROP,
    whole: bool = False,
    whitenings: Mapping[str, Whitening] | None = None,
    what: str = "training",
    validation: ImageData | None = None,
    device: torch.device,
    folder: Path | None = None,
    progress: Progress,
) -> dict[str, float]:
    """Train `model` on `data` in place; returns the mean loss terms of the last epoch.

    `augment`, `least_crop`, `whole`: as in `ImageData.batches`, None for what suits the data set of that `name`; a
    user's own batches are taken as they are.
    """
    if isinstance(data, ImageData):
        assert normalization is not None
        whole = whole or len(data) % options.batch_size == 1  # one image alone has no statistics for a batch norm
        norm, kind = normalization, augmentation_for(name or "") if augment is None else augment

        def epoch_of(epoch: int) -> Iterable[tuple[Tensor, Tensor | None]]:
            return data.batches(
                options.batch_size,
                norm,
                augment=kind,
                shuffle=True,
                seed=options.seed,
                epoch=epoch,
                least=least_crop,
                whole=whole,
            )

        steps = len(epoch_of(0).part(0, 0, count()))  # type: ignore[attr-defined]
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
        whitenings=whitenings,
        device=device,
        folder=folder,
        validate=validate,
        progress=lambda step, total, terms: progress(_described(what, step, steps, terms), step, total),
    )


def _described(what: str, step: int, steps: int, terms: dict[str, float]) -> str:
    parts = " ".join(f"{name} {value:.3f}" for name, value in terms.items())
    return f"{what}, epoch {(step - 1) // steps + 1}, {parts}"
