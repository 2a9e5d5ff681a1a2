"""The terms of the training loss, and the methods that are made of them.

A new hint loss is one function ``(student, teacher, temperature) -> loss`` and one line in `METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dk2pnet.answers import class_numbers
from dk2pnet.errors import InputError

__all__ = [
    "DEFAULT_METHOD",
    "METHODS",
    "Method",
    "attention",
    "distillation",
    "euclidean",
    "kp_channel",
    "kp_position",
    "kp_unit",
    "labels",
    "method_named",
]

_IN_CACHE = 2**19  # numbers that a core keeps at hand


def labels(scores: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of class scores ``(B, classes)`` with labels ``(B,)``; `InputError` for one beyond the classes."""
    y = class_numbers(y)
    if int(y.max()) >= scores.shape[1]:
        raise InputError(f"the data has the label {int(y.max())}, but the network has {scores.shape[1]} classes")
    return F.cross_entropy(scores.float(), y)


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``tau^2 KL(teacher || student)`` of softened logits ``(B, classes)``, mean over the batch.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015.
    """
    log_student = F.log_softmax(student.float() / temperature, 1)
    log_teacher = F.log_softmax(teacher.float() / temperature, 1)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


# -- losses between two feature maps ------------------------------------------------------------------------------
# Maps are (B, C, H, W); those of student and teacher are brought to the smaller size by average pooling.
#
# The source of knowledge pre-regression (KP) is Wang et al., ECCV 2016: cross-entropy in place of FitNets' Euclidean
# hints. The axis is our choice: the abstract and introduction, all that is known to us of the paper, do not say it.


def kp_channel(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KP over channels: each position of each image is a distribution over the C channels.

    ``-tau^2 sum_c p_T log p_S`` with p the softmax at temperature tau, mean over images and positions. Equal C.
    """
    # A row for each position: in the channels-last layout that is how the maps lie in memory.
    student, teacher = (part.float().permute(0, 2, 3, 1).flatten(0, 2) for part in _same_size(student, teacher))
    log_student = F.log_softmax(student / temperature, 1)
    return -(temperature**2) * (F.softmax(teacher / temperature, 1) * log_student).sum() / len(student)


def kp_position(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KP over positions: each channel of each image is a distribution over the H W positions.

    ``-tau^2 sum_hw p_T log p_S`` with p the softmax at temperature tau, mean over images and channels. Equal C.
    """
    student, teacher = (part.float().flatten(2) for part in _same_size(student, teacher))
    log_student = F.log_softmax(student / temperature, 2)
    return -(temperature**2) * (F.softmax(teacher / temperature, 2) * log_student).sum(2).mean()


def kp_unit(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KP per unit: each unit is on or off, with the probability ``sigmoid(pre-activation / tau)``.

    ``-tau^2 (p_T log p_S + (1 - p_T) log(1 - p_S))``, mean over images, channels and positions. Maps *before* the
    activation: after a ReLU a sigmoid cannot say "off". Equal C.
    """
    student, teacher = (part.float() for part in _same_size(student, teacher))
    target = (teacher / temperature).sigmoid()
    return temperature**2 * F.binary_cross_entropy_with_logits(student / temperature, target)


def euclidean(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Euclidean hints: ``|student - teacher|^2 / |teacher|^2`` over the batch. Equal C; the temperature is not used.

    Source: Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, equation 3. They divide by 2; we divide by
    the teacher's energy, so that one weight serves every layer.
    """
    student, teacher = _same_size(student, teacher)
    found: Tensor = _Distance.apply(student, teacher)
    return found


class _Distance(torch.autograd.Function):
    """``|student - teacher|^2 / |teacher|^2`` in single precision, a few images at a time.

    The maps of a first stage are the largest tensors of a step: with all their differences and squares in single
    precision at once, this took a third of it.
    """

    @staticmethod
    def forward(context: Any, student: Tensor, teacher: Tensor) -> Tensor:
        difference, energies = torch.empty_like(student), []
        parts = 1 if student.is_cuda else min(max(student.numel() // _IN_CACHE, 1), len(student))
        for found, a, b in zip(*(x.chunk(parts) for x in (difference, student, teacher)), strict=True):
            b = b.float()
            exact = a.float() - b
            found.copy_(exact)
            energies.append(torch.stack([x.square().sum() for x in (exact, b)]))
        error, energy = torch.stack(energies).sum(0)
        energy = energy.clamp_min(1e-12)
        context.save_for_backward(difference, energy)
        return error / energy

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        difference, energy = context.saved_tensors
        return difference * (2 * gradients[0] / energy), None


def attention(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Attention transfer: mean squared difference of the attention maps ``sum_c x_c^2``, each of unit length.

    Any two C; the temperature is not used. Source: Zagoruyko, Komodakis, "Paying More Attention to Attention", ICLR
    2017, section 3.1; the mean over images and positions is that of their program.
    """
    student, teacher = (F.normalize(part.float().square().mean(1).flatten(1)) for part in _same_size(student, teacher))
    return F.mse_loss(student, teacher)


def _same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps, the larger one averaged in single precision."""
    height, width = (min(a, b) for a, b in zip(student.shape[2:], teacher.shape[2:], strict=True))
    size = (height, width)
    student, teacher = (
        part if part.shape[2:] == size else F.adaptive_avg_pool2d(part.float(), size) for part in (student, teacher)
    )
    return student, teacher


# -- methods ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """What a student is taught with.

    ``hint``: the loss between feature maps, if any, and ``beta`` its weight; ``regress``: which student maps pass a
    pre-regressor, a 1x1 convolution trained along (``where channels differ``, ``always``, ``never``), or a linear
    ``probe`` for the classes on either side; ``before_activation``: which maps; ``two_stage``: the middle hint alone
    first, then distillation alone.
    """

    teacher: bool = True
    hint: Callable[[Tensor, Tensor, float], Tensor] | None = None
    beta: float = 1.0
    regress: str = "where channels differ"
    before_activation: bool = False
    two_stage: bool = False


METHODS = {
    "labels": Method(teacher=False),
    "kd": Method(),
    "kp-channel": Method(hint=kp_channel, beta=10.0),
    "kp-position": Method(hint=kp_position, beta=10.0),
    "kp-unit": Method(hint=kp_unit, beta=100.0, before_activation=True),
    # The probes turn a map into class scores (B, classes, 1, 1), which are distributions over "channels" again.
    "kp-class": Method(hint=kp_channel, regress="probe"),
    "euclidean": Method(hint=euclidean, beta=10.0),
    "fitnets": Method(hint=euclidean, beta=10.0, regress="always", two_stage=True),
    "at": Method(hint=attention, beta=1000.0, regress="never"),
}
DEFAULT_METHOD = "kp-channel"


def method_named(name: str) -> Method:
    """The method of that name; `InputError` for any other."""
    if name not in METHODS:
        raise InputError(f"method is {name!r}; expected one of {', '.join(METHODS)}")
    return METHODS[name]
