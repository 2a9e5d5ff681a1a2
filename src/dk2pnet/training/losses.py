"""The terms of the training loss."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["distillation", "kp_channel"]


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``tau^2 KL(teacher || student)`` of softened logits ``(B, classes)``, mean over the batch.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015.
    """
    log_student = F.log_softmax(student.float() / temperature, 1)
    log_teacher = F.log_softmax(teacher.float() / temperature, 1)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def kp_channel(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Knowledge pre-regression over channels: feature maps ``(B, C, H, W)`` of equal C.

    Each position of each image is a categorical distribution over the channels; the loss is the cross-entropy
    ``-sum p_T log p_S``, averaged over images and positions and multiplied by ``tau^2``. Larger maps are brought to
    the smaller size by average pooling.

    Source: Wang et al., ECCV 2016 (cross-entropy in place of FitNets' Euclidean hints). The axis is our choice: the
    abstract and introduction, all that is known to us of the paper, do not say it.
    """
    size = min(student.shape[2:], teacher.shape[2:])
    if student.shape[2:] != teacher.shape[2:]:
        student, teacher = F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size)
    log_student = F.log_softmax(student.float() / temperature, 1)
    target = F.softmax(teacher.float() / temperature, 1)
    return -(temperature**2) * (target * log_student).sum(1).mean()
