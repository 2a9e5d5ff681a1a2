"""Training on a data set or on batches: validation after every epoch, a folder for checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dk2pnet.answers import predict
from dk2pnet.data import USUAL_CROP, Crop, ImageData, Normalization
from dk2pnet.data.images import augmentation_for, batch_size_for
from dk2pnet.data.tensors import TensorBatches, TensorImages
from dk2pnet.decompose.whiten import Whitening
from dk2pnet.errors import InputError
from dk2pnet.processes import count
from dk2pnet.run.run import Run
from dk2pnet.tasks import accuracy
from dk2pnet.training.trainer import TrainingOptions, train

__all__ = ["Source", "fit"]


@dataclass(frozen=True)
class Source:
    """What is trained on: a data set of that `name`, a user's own images, or (the rest is not looked at then) batches.

    `augment`, `crop`, `whole`: as in `ImageData.batches`, None for what suits the data set.
    """

    data: Any
    name: str | None = None
    normalization: Normalization | None = None
    augment: str | None = None
    crop: Crop = USUAL_CROP
    whole: bool = False
    validation: ImageData | None = None

    def epoch(self, number: int, options: TrainingOptions) -> Any:
        """The batches of an epoch."""
        augment = augmentation_for(self.name or "") if self.augment is None else self.augment
        if isinstance(self.data, TensorImages):
            return self.data.batches(
                options.batch_size, augment=augment, seed=options.seed, epoch=number, crop=self.crop
            )
        if not isinstance(self.data, ImageData):
            return self.data
        assert self.normalization is not None
        return self.data.batches(
            options.batch_size,
            self.normalization,
            augment=augment,
            shuffle=True,
            seed=options.seed,
            epoch=number,
            crop=self.crop,
            # One image alone has no statistics for a batch norm.
            whole=self.whole or len(self.data) % options.batch_size == 1,
        )

    def steps(self, options: TrainingOptions) -> int:
        """Of an epoch, on each of the processes."""
        batches = self.epoch(0, options)
        if isinstance(self.data, ImageData):
            found = len(batches.part(0, 0, count()))
        else:
            found = len(batches) if isinstance(batches, TensorBatches) else sum(1 for _ in batches)
        if not found:
            raise InputError(f"there are fewer images than the {count()} processes; start fewer of them")
        return found


def fit(
    model: nn.Module,
    source: Source,
    options: TrainingOptions,
    run: Run,
    *,
    example: Tensor,
    teacher: nn.Module | None = None,
    whitenings: Mapping[str, Whitening] | None = None,
    what: str = "training",
    folder: Path | None = None,
    watch: Callable[[nn.Module, int, int], bool] | None = None,
) -> dict[str, float]:
    """Train `model` in place; returns the mean loss terms of the last epoch. `watch` as in `trainer.train`."""
    steps, validation, normalization = source.steps(options), source.validation, source.normalization

    def epoch_of(epoch: int) -> Iterable[tuple[Tensor, Tensor | None]]:
        return source.epoch(epoch, options)

    def validate() -> dict[str, float]:
        if validation is None or validation.labels is None:
            return {}
        assert normalization is not None
        batches = validation.batches(batch_size_for(validation.size), normalization)
        return {"validation_accuracy": accuracy(predict(model, batches, run.device))}

    return train(
        model,
        epoch_of,
        options,
        example=example,
        steps_per_epoch=steps,
        teacher=teacher,
        whitenings=whitenings,
        device=run.device,
        folder=folder,
        validate=validate,
        progress=lambda step, total, terms: run.progress(_described(what, step, steps, terms), step, total),
        watch=watch,
    )


def _described(what: str, step: int, steps: int, terms: dict[str, float]) -> str:
    parts = " ".join(f"{name} {value:.3f}" for name, value in terms.items())
    return f"{what}, epoch {(step - 1) // steps + 1}, {parts}"
