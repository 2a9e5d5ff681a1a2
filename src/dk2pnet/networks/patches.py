"""Input patches of convolutions and the positions at which they are sampled, keyed by the image's index."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dk2pnet.decompose.moments import Moments
from dk2pnet.layer import padding_of

__all__ = ["geometry_of", "in_groups", "input_patches", "patches_of", "sampled_outputs", "uniform_of"]

# Patches are copied in pieces of about this many bytes.
_PIECE_BYTES = 64 * 2**20


def input_patches(conv: nn.Conv2d, x: Tensor, index: int | np.ndarray = 0, positions: int = 0, seed: int = 0) -> Tensor:
    """The patches of ``x (B, C_total, H, W)`` that `conv` multiplies by its weight, ``(n, G, C q)``.

    `positions` > 0 samples so many per image, keyed by the image's index; 0 takes all. `index` holds the image of every
    row, or is that of the first row.
    """
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = F.pad(x, padding_of(conv), mode=mode)
    (kh, kw), (sh, sw), (dh, dw) = conv.kernel_size, conv.stride, conv.dilation
    height = (x.shape[2] - dh * (kh - 1) - 1) // sh + 1
    width = (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
    b, c, h, w = x.stride()
    size = (*x.shape[:2], height, width, kh, kw)
    windows = x.as_strided(size, (b, c, h * sh, w * sw, h * dh, w * dw), x.storage_offset())
    if 0 < positions < height * width:
        where = _positions(index, len(x), height * width, positions, seed).to(x.device)
        rows = torch.arange(len(x), device=x.device).unsqueeze(1)
        picked = windows[rows, :, where // width, where % width]  # (B, P, C, kh, kw)
    else:
        picked = windows.permute(0, 2, 3, 1, 4, 5)
    return picked.reshape(-1, conv.groups, x.shape[1] // conv.groups * kh * kw)


def sampled_outputs(y: Tensor, index: int | np.ndarray, positions: int, seed: int) -> Tensor:
    """``y (B, N, H, W)`` at the positions that `input_patches` samples for these images, ``(B, P, N)``."""
    rows = y.permute(0, 2, 3, 1).flatten(1, 2)
    if 0 < positions < rows.shape[1]:
        where = _positions(index, len(y), rows.shape[1], positions, seed).to(y.device)
        rows = rows[torch.arange(len(y), device=y.device).unsqueeze(1), where]
    return rows.contiguous()


def patches_of(conv: nn.Conv2d, x: Tensor, images: int, first: int, positions: int, seed: int) -> Iterator[Tensor]:
    """`input_patches` of ``x (B, C_total, H, W)``, which holds the images from number `first` on, piece by piece."""
    per_image = positions or x.shape[2] * x.shape[3]
    piece = max(1, _PIECE_BYTES // (4 * per_image * geometry_of(conv)[1] * conv.groups))
    # A network may fold several pieces of an image into the batch; they share the image's index.
    index = first + np.arange(len(x)) * images // len(x)
    for start in range(0, len(x), piece):
        part = slice(start, start + piece)
        yield input_patches(conv, x[part], index[part], positions, seed)


def in_groups(
    convolutions: Mapping[str, nn.Conv2d],
    memory: int,
    gradients: bool = False,
    maps: Mapping[str, int] | None = None,
) -> Iterator[list[str]]:
    """Names of layers whose moments, and `maps` (bytes of each), fit into `memory` bytes, at least one at a time."""
    group: list[str] = []
    total = 0
    for name, conv in convolutions.items():
        size = _bytes_needed(conv, gradients) + (maps[name] if maps is not None else 0)
        if group and total + size > memory:
            yield group
            group, total = [], 0
        group.append(name)
        total += size
    if group:
        yield group


# -- inside -------------------------------------------------------------------------------------------------------


def geometry_of(conv: nn.Conv2d) -> tuple[int, int, int]:
    """groups, C q, N."""
    kh, kw = conv.kernel_size
    return conv.groups, conv.in_channels // conv.groups * kh * kw, conv.out_channels // conv.groups


def _bytes_needed(conv: nn.Conv2d, gradients: bool) -> int:
    groups, inputs, outputs = geometry_of(conv)
    return Moments.bytes_needed(groups, inputs, outputs if gradients else None)


def uniform_of(indices: np.ndarray, seed: int) -> np.ndarray:
    """One number in [0, 1) for every index: a hash (the finaliser of SplitMix64), so that no order matters."""
    with np.errstate(over="ignore"):
        z = indices.astype(np.uint64) + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64)
        z = z * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) / 2**53


def _positions(index: int | np.ndarray, rows: int, total: int, count: int, seed: int) -> Tensor:
    """`count` different positions of `total` for each row, (B, count): a golden-ratio walk from a hashed start."""
    indices = np.arange(index, index + rows) if isinstance(index, int) else index
    step = max(int(total * 0.6180339887), 1)
    while np.gcd(step, total) != 1:
        step += 1
    start = (uniform_of(indices, 2 * seed) * total).astype(np.int64)
    return torch.from_numpy((start[:, None] + np.arange(count) * step) % total)
