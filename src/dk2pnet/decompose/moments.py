"""The sums behind A and B: kept raw, in float64, so that they add up over batches and over processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["BLOCK", "CRITERIA", "Moments"]

# Rows of a triangle that are multiplied at once: a product of equal matrices is symmetric, half of it is enough.
BLOCK = 1024

# What a criterion needs: moments of the inputs (A), and gradients at the outputs (B).
CRITERIA = {"weight": (False, False), "response": (True, False), "loss": (True, True)}


@dataclass
class Moments:
    """Second moments at one convolution with G groups, N outputs and C inputs a group, kernels of q numbers.

    ``input_sum (G, C q, C q)`` sums u u' over positions, ``mean_sum (G, C q)`` sums u, ``positions`` counts them;
    ``output_sum (G, N, N)`` sums g g' over all positions of all images, ``images`` counts the images. u is an input
    patch, g the gradient of the log-likelihood at the layer's output.
    """

    input_sum: Tensor
    mean_sum: Tensor
    positions: int = 0
    output_sum: Tensor | None = None
    images: int = 0

    @classmethod
    def zeros(cls, groups: int, inputs: int, outputs: int | None = None) -> Moments:
        """Empty sums for ``inputs = C q`` and, where B is wanted, ``outputs = N``."""
        double = torch.float64
        return cls(
            torch.zeros(groups, inputs, inputs, dtype=double),
            torch.zeros(groups, inputs, dtype=double),
            output_sum=None if outputs is None else torch.zeros(groups, outputs, outputs, dtype=double),
        )

    @staticmethod
    def bytes_needed(groups: int, inputs: int, outputs: int | None = None) -> int:
        """Memory of the sums and of the float32 product that is added to them."""
        return groups * (inputs * inputs + (outputs or 0) ** 2) * (8 + 4)

    @property
    def bytes(self) -> int:
        """Of the sums."""
        parts = [part for part in (self.input_sum, self.mean_sum, self.output_sum) if part is not None]
        return sum(part.numel() * part.element_size() for part in parts)

    def add_patches(self, patches: Tensor) -> None:
        """Add input patches ``(n, G, C q)``: products in float32, summed in float64."""
        if patches.dtype.itemsize < 4:  # sums of squares leave the range of float16
            patches = patches.float()
        by_group = patches.detach().transpose(0, 1)
        for group, rows in enumerate(by_group):
            total = self.input_sum[group]
            for start in range(0, rows.shape[1], BLOCK):
                stop = min(start + BLOCK, rows.shape[1])
                product = (rows[:, start:stop].T @ rows[:, start:]).to(total)
                total[start:stop, start:] += product
                total[stop:, start:stop] += product[:, stop - start :].T
        self.mean_sum += patches.sum(0, dtype=torch.float64).to(self.mean_sum)
        self.positions += patches.shape[0]

    def add_gradients(self, gradients: Tensor) -> None:
        """Add output gradients ``(G, N, n)`` of any number of positions; `images` is counted by `count_images`."""
        assert self.output_sum is not None
        for group, columns in enumerate(gradients):
            self.output_sum[group] += (columns @ columns.T).to(self.output_sum)

    def count_images(self, images: int) -> None:
        """Say how many images the gradients added so far came from."""
        self.images += images

    def __add__(self, other: Moments) -> Moments:
        output_sum = None
        if self.output_sum is not None and other.output_sum is not None:
            output_sum = self.output_sum + other.output_sum
        return Moments(
            self.input_sum + other.input_sum,
            self.mean_sum + other.mean_sum,
            self.positions + other.positions,
            output_sum,
            self.images + other.images,
        )

    def merge(self, add: Callable[[list[Tensor]], None]) -> None:
        """Add up with the same layer's moments elsewhere: `add` replaces each tensor by its sum over all places."""
        counts = torch.tensor([self.positions, self.images], dtype=torch.int64)
        add([part for part in (self.input_sum, self.mean_sum, self.output_sum, counts) if part is not None])
        self.positions, self.images = counts.tolist()

    def A(self, centred: bool = False) -> Tensor:
        """``E[u u']`` over images and positions, (G, C q, C q); `centred`: the covariance, for a free bias."""
        second = self.input_sum / max(self.positions, 1)
        if centred:
            mean = self.mean()
            second -= mean.unsqueeze(2) * mean.unsqueeze(1)
        return second

    def mean(self) -> Tensor:
        """``E[u]``, (G, C q)."""
        return self.mean_sum / max(self.positions, 1)

    def B(self) -> Tensor | None:
        """Fisher information of the outputs, ``E[sum over positions of g g']`` over images, (G, N, N)."""
        return None if self.output_sum is None else self.output_sum / max(self.images, 1)

    def finite(self) -> bool:
        """Whether no activation and no gradient was infinite or not a number."""
        return all(bool(torch.isfinite(part).all()) for part in (self.input_sum, self.output_sum) if part is not None)
