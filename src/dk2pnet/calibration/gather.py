"""Runs a model over calibration images and gathers the moments of its convolutions in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dk2pnet.decompose.moments import Moments
from dk2pnet.errors import InputError
from dk2pnet.measure import is_classifier, kept_modes, outputs_of

__all__ = ["gather_moments", "in_groups", "inference_of", "input_patches", "patches_of", "sampled_outputs"]

# Patches are copied in pieces of about this many bytes.
_PIECE_BYTES = 64 * 2**20


def gather_moments(
    model: nn.Module,
    convolutions: Mapping[str, nn.Conv2d],
    batches: Iterable[tuple[Tensor, Tensor | None]],
    *,
    gradients: bool = False,
    memory: int = 2 * 2**30,
    positions: int = 32,
    seed: int = 0,
    first_image: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[str, int], None] | None = None,
) -> Iterator[dict[str, Moments]]:
    """Yield the moments of `convolutions` in groups of layers whose sums fit into `memory` bytes.

    Each group takes one pass over `batches`, which therefore must be re-iterable; labels are not looked at.

    Parameters
    ----------
    model : the network, run in evaluation mode; its modes, gradients' settings and weights are left as they were
    gradients : also gather B, from the gradient of the log-likelihood of labels sampled from the model
    positions : at most so many positions of each image, evenly spread; B always sums over all positions
    seed : of the sampled positions and labels, which depend on the image's index only, so that any split of the
        images over batches or processes gathers the same numbers
    first_image : index of the first image, where another process gathers from those before it
    progress : called with (what, images done) after every batch

    Raises
    ------
    InputError
        When an activation is not finite, when there are no images, or when B is wanted from a network whose output is
        not one row of class scores per image.
    """
    start = 0
    for names in in_groups(convolutions, memory, gradients):
        group = {name: convolutions[name] for name in names}
        what = f"layers {start + 1}-{start + len(names)} of {len(convolutions)}"
        yield _one_pass(model, group, batches, gradients, positions, seed, first_image, device, what, progress)
        start += len(names)


@contextmanager
def inference_of(model: nn.Module) -> Iterator[nn.Module]:
    """Evaluation mode without parameter gradients inside the block; every mode and flag is put back afterwards."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    with kept_modes(model):
        try:
            model.eval()
            for parameter in flags:
                parameter.requires_grad_(False)
            yield model
        finally:
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)


def input_patches(conv: nn.Conv2d, x: Tensor, index: int | np.ndarray = 0, positions: int = 0, seed: int = 0) -> Tensor:
    """The patches of ``x (B, C_total, H, W)`` that `conv` multiplies by its weight, ``(n, G, C q)``.

    `positions` > 0 samples so many per image, keyed by the image's index; 0 takes all. `index` holds the image of every
    row, or is that of the first row.
    """
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = F.pad(x, _padding(conv), mode=mode)
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
    piece = max(1, _PIECE_BYTES // (4 * per_image * _geometry(conv)[1] * conv.groups))
    # A network may fold several pieces of an image into the batch; they share the image's index.
    index = first + np.arange(len(x)) * images // len(x)
    for start in range(0, len(x), piece):
        part = slice(start, start + piece)
        yield input_patches(conv, x[part], index[part], positions, seed)


def in_groups(convolutions: Mapping[str, nn.Conv2d], memory: int, gradients: bool = False) -> Iterator[list[str]]:
    """Names of layers whose moments fit into `memory` bytes together, at least one at a time."""
    group: list[str] = []
    total = 0
    for name, conv in convolutions.items():
        size = _bytes_needed(conv, gradients)
        if group and total + size > memory:
            yield group
            group, total = [], 0
        group.append(name)
        total += size
    if group:
        yield group


# -- inside -------------------------------------------------------------------------------------------------------


def _geometry(conv: nn.Conv2d) -> tuple[int, int, int]:
    """groups, C q, N."""
    kh, kw = conv.kernel_size
    return conv.groups, conv.in_channels // conv.groups * kh * kw, conv.out_channels // conv.groups


def _padding(conv: nn.Conv2d) -> list[int]:
    """What `conv` pads its input with, for `F.pad`; by its present attributes, which may have been changed."""
    if conv.padding_mode != "zeros":  # then PyTorch too pads by what it worked out when the layer was made
        return conv._reversed_padding_repeated_twice
    if conv.padding == "same":
        totals = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
    sides = (0, 0) if conv.padding == "valid" else conv.padding
    return [int(side) for side in reversed(sides) for _ in range(2)]


def _bytes_needed(conv: nn.Conv2d, gradients: bool) -> int:
    groups, inputs, outputs = _geometry(conv)
    return Moments.bytes_needed(groups, inputs, outputs if gradients else None)


def _uniform(indices: np.ndarray, seed: int) -> np.ndarray:
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
    start = (_uniform(indices, 2 * seed) * total).astype(np.int64)
    return torch.from_numpy((start[:, None] + np.arange(count) * step) % total)


def _sampled_labels(logits: Tensor, first_index: int, seed: int) -> Tensor:
    """A label drawn from the model's own distribution for each image."""
    edges = logits.detach().double().softmax(1).cumsum(1)
    draws = _uniform(np.arange(first_index, first_index + len(logits)), 2 * seed + 1)
    labels = torch.searchsorted(edges, torch.from_numpy(draws).unsqueeze(1).to(edges.device)).squeeze(1)
    return labels.clamp_max(logits.shape[1] - 1)


def _one_pass(
    model: nn.Module,
    convolutions: dict[str, nn.Conv2d],
    batches: Iterable[tuple[Tensor, Tensor | None]],
    gradients: bool,
    positions: int,
    seed: int,
    first_image: int,
    device: torch.device | str,
    what: str,
    progress: Callable[[str, int], None] | None,
) -> dict[str, Moments]:
    moments = {}
    for name, conv in convolutions.items():
        groups, inputs, outputs = _geometry(conv)
        moments[name] = Moments.zeros(groups, inputs, outputs if gradients else None)
    done = size = 0

    def see_input(name: str) -> Callable:
        def hook(module: nn.Conv2d, args: tuple[Tensor, ...]) -> None:
            for patches in patches_of(module, args[0].detach(), size, first_image + done, positions, seed):
                moments[name].add_patches(patches)

        return hook

    def see_gradient(name: str) -> Callable:
        def hook(module: nn.Conv2d, args: tuple, output: Tensor) -> None:
            if not output.requires_grad:
                raise InputError(
                    f"criterion 'loss' needs gradients, but the network runs {name!r} without them (torch.no_grad or "
                    f"detach in its forward pass); use --criterion response, or --keep {name}"
                )

            def take(gradient: Tensor) -> None:
                columns = gradient.detach().float().transpose(0, 1).reshape(module.groups, -1, gradient[:, 0].numel())
                moments[name].add_gradients(columns)

            output.register_hook(take)

        return hook

    with ExitStack() as stack:
        stack.enter_context(inference_of(model))
        for name, conv in convolutions.items():
            stack.callback(conv.register_forward_pre_hook(see_input(name)).remove)
            if gradients:
                stack.callback(conv.register_forward_hook(see_gradient(name)).remove)
        for x, _ in batches:
            x = x.to(device)
            size = len(x)
            if gradients:
                # Parameters ask for no gradients here; the graph hangs on the input.
                with torch.enable_grad():
                    outputs = outputs_of(model(x.detach().requires_grad_().clone()))  # which it may change in place
                    if not is_classifier(outputs):
                        shapes = " and ".join(str(tuple(output.shape)) for output in outputs)
                        raise InputError(
                            "criterion 'loss' needs a classifier (one row of class scores per image), but the network "
                            f"returns {shapes}; use --criterion response"
                        )
                    logits = outputs[0]
                    if not logits.requires_grad:
                        raise InputError(
                            "criterion 'loss' needs gradients, and none come through the network to its convolutions "
                            "(detach() or no_grad() in its forward?); use --criterion response"
                        )
                    labels = _sampled_labels(logits, first_image + done, seed)
                    F.cross_entropy(logits, labels, reduction="sum").backward()
                for sums in moments.values():
                    sums.count_images(size)
            else:
                with torch.no_grad():
                    model(x)
            done += size
            if progress is not None:
                progress(what, done)
    if done == 0:
        raise InputError("there are no calibration images; give --data with at least two images")
    for name, sums in moments.items():
        if not sums.finite():
            raise InputError(
                f"the activations or gradients at {name!r} are not finite on the calibration images; "
                "check the weights and the normalisation"
            )
    return moments
