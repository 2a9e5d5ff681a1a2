"""The training loop, on Hugging Face Accelerate: trains teachers, and students beside their teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dk2pnet.calibration.gather import inference_of
from dk2pnet.errors import InputError
from dk2pnet.measure import is_classifier, outputs_of, use_form
from dk2pnet.training.hints import capture, find_hints
from dk2pnet.training.losses import distillation, kp_channel

__all__ = ["TrainingOptions", "train"]


@dataclass(frozen=True)
class TrainingOptions:
    """How to train. Defaults suit training from scratch; `pipelines.compress` lowers the learning rate.

    ``alpha``, ``tau``: weight and temperature of distillation against the labels' cross-entropy (used with a teacher);
    ``beta``, ``kp_tau``: weight of each KP term and its temperature; ``precision``: ``fp32`` or ``bf16`` (autocast).
    """

    epochs: int = 20
    batch_size: int = 128
    learning_rate: float = 0.1
    weight_decay: float = 5e-4
    alpha: float = 0.9
    tau: float = 4.0
    beta: float = 1.0
    kp_tau: float = 1.0
    precision: str = "fp32"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise InputError(
                f"training was asked for {self.epochs} epochs of batches of {self.batch_size}; "
                "expected 1 or more of each"
            )
        if not (
            0 < self.learning_rate < math.inf
            and self.weight_decay >= 0
            and self.tau > 0
            and self.kp_tau > 0
            and 0 <= self.alpha <= 1
            and self.beta >= 0
        ):
            raise InputError(
                f"learning rate {self.learning_rate}, weight decay {self.weight_decay}, alpha {self.alpha}, "
                f"tau {self.tau}, beta {self.beta}, KP tau {self.kp_tau}; expected rates and temperatures above 0, "
                "alpha between 0 and 1, weight decay and beta 0 or more"
            )
        if self.precision not in ("fp32", "bf16"):
            raise InputError(f"precision is {self.precision!r}; expected fp32 or bf16")


def train(
    model: nn.Module,
    epoch_of: Callable[[int], Iterable[tuple[Tensor, Tensor | None]]],
    options: TrainingOptions,
    *,
    example: Tensor,
    steps_per_epoch: int,
    teacher: nn.Module | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
) -> dict[str, float]:
    """Train `model` in place; returns the mean loss terms of the last epoch.

    One stage, SGD with Nesterov momentum, one epoch of warm-up and a cosine to 0. The loss is the labels'
    cross-entropy, and with a `teacher` (a network with the same module names)
    ``(1 - alpha) CE + alpha tau^2 KL(teacher || student) + beta sum KP``; data without labels needs a teacher and
    leaves CE out. DK layers are trained in their ``folded`` form, which is fastest and gives the same gradients.

    `epoch_of` gives the batches of an epoch by its number; `example` is one normalised image ``(1, C, H, W)``;
    `progress` is called after every step with (steps done, steps in all, loss terms of the step).
    """
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    set_seed(options.seed)
    # Precision by autocast rather than by the accelerator, which fixes it once for the whole process.
    accelerator = Accelerator(cpu=torch.device(device).type == "cpu")
    half = torch.autocast(accelerator.device.type, torch.bfloat16, enabled=options.precision == "bf16")
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.SGD(
        [{"params": decayed, "weight_decay": options.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=options.learning_rate,
        momentum=0.9,
        nesterov=True,
    )
    total = options.epochs * steps_per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, total, steps_per_epoch))
    prepared, optimizer = accelerator.prepare(model, optimizer)
    example = example.to(accelerator.device)
    sums: dict[str, float] = {}
    with ExitStack() as stack:
        stack.enter_context(use_form(model, "folded"))
        names = []
        teacher_maps: dict[str, Tensor] = {}
        if teacher is not None:
            teacher.to(accelerator.device)
            stack.enter_context(inference_of(teacher))
            names = [name for name in find_hints(teacher, example) if name in dict(model.named_modules())]
            teacher_maps = stack.enter_context(capture(teacher, names))
        maps = stack.enter_context(capture(model, names))
        prepared.train()
        step = 0
        for epoch in range(options.epochs):
            sums = {}
            for x, y in epoch_of(epoch):
                if y is None and teacher is None:
                    raise InputError(
                        "the images have no labels, which training without a teacher needs; give labelled images"
                    )
                x, y = x.to(accelerator.device), None if y is None else y.to(accelerator.device)
                with half:
                    outputs = outputs_of(prepared(x))
                    terms = {}
                    if y is not None:
                        terms["labels"] = _labels_loss(outputs, y)
                    if teacher is not None:
                        with torch.no_grad():
                            wanted = outputs_of(teacher(x))
                        terms["kd"] = _output_loss(outputs, wanted, options.tau)
                        pairs = [kp_channel(maps[n], teacher_maps[n], options.kp_tau) for n in names]
                        if pairs:
                            terms["kp"] = torch.stack(pairs).sum()
                loss = _weighted(terms, options)
                if not bool(torch.isfinite(loss)):
                    parts = ", ".join(f"{name} {float(value.detach()):g}" for name, value in terms.items())
                    raise InputError(
                        f"the loss is not finite at step {step + 1} of {total} ({parts}); "
                        "lower the learning rate with --lr"
                    )
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(prepared.parameters(), 5.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                step += 1
                values = {"loss": float(loss.detach()), **{name: float(term.detach()) for name, term in terms.items()}}
                for name, value in values.items():
                    sums[name] = sums.get(name, 0.0) + value / steps_per_epoch
                if progress is not None:
                    progress(step, total, values)
    model.eval()
    return sums


def _rate(step: int, total: int, steps_per_epoch: int) -> float:
    """One epoch of linear warm-up (at most a tenth of the run), then a cosine to 0."""
    warmup = max(1, min(steps_per_epoch, total // 10))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def _labels_loss(outputs: list[Tensor], y: Tensor) -> Tensor:
    if not is_classifier(outputs):
        raise InputError(
            "training with labels needs a classifier (one row of class scores per image); give images without labels"
        )
    if int(y.max()) >= outputs[0].shape[1]:
        raise InputError(f"the data has the label {int(y.max())}, but the network has {outputs[0].shape[1]} classes")
    return F.cross_entropy(outputs[0].float(), y)


def _output_loss(outputs: list[Tensor], wanted: list[Tensor], tau: float) -> Tensor:
    """Softened logits for a classifier, else the squared error relative to the teacher's energy."""
    if is_classifier(wanted):
        return distillation(outputs[0], wanted[0], tau)
    error = torch.stack([(a.float() - b.float()).square().sum() for a, b in zip(outputs, wanted, strict=True)]).sum()
    return error / torch.stack([b.float().square().sum() for b in wanted]).sum().clamp_min(1e-12)


def _weighted(terms: dict[str, Tensor], options: TrainingOptions) -> Tensor:
    if "kd" not in terms:
        return terms["labels"]
    loss = terms["kd"] * (options.alpha if "labels" in terms else 1.0)
    if "labels" in terms:
        loss = loss + (1 - options.alpha) * terms["labels"]
    if "kp" in terms:
        loss = loss + options.beta * terms["kp"]
    return loss
