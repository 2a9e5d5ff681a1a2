"""Other ways to recover a student without labels, for `tuning.py losses`: MiR's loss and FSKD's layers.

MiR: Wang, Liu, Wu, "Compressing Models with Few Samples: Mimicking then Replacing", CVPR 2022: the student mimics the
teacher's penultimate features. FSKD: Li, Li, Fang, Zhang, "Few Sample Knowledge Distillation for Efficient Network
Compression", arXiv 1812.01839: a 1x1 convolution behind each compressed one, fitted to the teacher's output in closed
form, and absorbed.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dk2pnet.layer import DKConv2d, set_form
from dk2pnet.measure import inference_of
from dk2pnet.training.hints import Tap, capture, find_pairs
from dk2pnet.training.losses import METHODS, Method, euclidean


def pooled(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """The features that the classifier sees: Euclidean hints between the maps' means over positions."""
    student, teacher = (F.adaptive_avg_pool2d(part.float(), 1) for part in (student, teacher))
    return euclidean(student, teacher, temperature)


def add_mir() -> None:
    """Make ``mir`` a method of training in this process."""
    METHODS["mir"] = Method(hint=pooled, beta=10.0)


def penultimate(student: nn.Module, teacher: nn.Module, example: Tensor) -> tuple[str, ...]:
    """The hint of the last stage alone."""
    pair = find_pairs(student, teacher, example)[-1]
    return (f"{pair.teacher}={pair.student}",)


def fskd(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor | None]],
    device: torch.device | str = "cpu",
) -> None:
    """Fit a 1x1 convolution behind each DK layer (of one group), in order, and absorb it into the combination.

    Least squares from the student's output, as it is with all layers before it fitted, to the teacher's; in float64
    and damped towards the identity, which few images need.
    """
    layers = {name: module for name, module in student.named_modules() if isinstance(module, DKConv2d)}
    set_form(student, "folded")  # each layer is run over all images for each layer before it
    with inference_of(student), inference_of(teacher), torch.no_grad():
        for name, layer in layers.items():
            assert layer.groups == 1
            gram: Tensor | float = 0.0
            cross: Tensor | float = 0.0
            with capture(student, [Tap(name)]) as own, capture(teacher, [Tap(name)]) as wanted:
                for x, _ in batches:
                    student(x.to(device))
                    teacher(x.to(device))
                    mine, target = (maps[name].double().transpose(0, 1).flatten(1) for maps in (own, wanted))
                    gram, cross = gram + mine @ mine.T, cross + target @ mine.T
            assert isinstance(gram, Tensor)
            damping = 1e-4 * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
            fitted = torch.linalg.solve(gram + damping, (cross + damping).T).T
            layer.combination.copy_((fitted @ layer.combination.double().flatten(1)).view_as(layer.combination))
            if layer.bias is not None:
                layer.bias.copy_(fitted @ layer.bias.double())
