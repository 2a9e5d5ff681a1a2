"""Runs a model over calibration images and gathers the moments of its convolutions in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dk2pnet.decompose.moments import Moments
from dk2pnet.errors import InputError
from dk2pnet.measure import in_layout, inference_of, is_classifier, layout_of, outputs_of
from dk2pnet.networks.patches import geometry_of, in_groups, patches_of, uniform_of
from dk2pnet.tasks import log_scores

__all__ = ["gather_moments"]

_ROWS = 2048  # patches of a layer that are multiplied at once, at most


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


# -- inside -------------------------------------------------------------------------------------------------------


def _sampled_labels(log_probabilities: Tensor, first_index: int, seed: int) -> Tensor:
    """A label drawn from the model's own distribution for each image."""
    edges = log_probabilities.detach().double().softmax(1).cumsum(1)
    draws = uniform_of(np.arange(first_index, first_index + len(log_probabilities)), 2 * seed + 1)
    labels = torch.searchsorted(edges, torch.from_numpy(draws).unsqueeze(1).to(edges.device)).squeeze(1)
    return labels.clamp_max(log_probabilities.shape[1] - 1)


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
    waiting: dict[str, list[Tensor]] = {}
    for name, conv in convolutions.items():
        groups, inputs, outputs = geometry_of(conv)
        moments[name] = Moments.zeros(groups, inputs, outputs if gradients else None)
        waiting[name] = []
    done = size = 0

    def add(name: str) -> None:
        moments[name].add_patches(torch.cat(waiting[name]))
        waiting[name].clear()

    def see_input(name: str) -> Callable:
        def hook(module: nn.Conv2d, args: tuple[Tensor, ...]) -> None:
            for patches in patches_of(module, args[0].detach(), size, first_image + done, positions, seed):
                waiting[name].append(patches)
                # Products of few rows spend their time on adding up large sums.
                if sum(map(len, waiting[name])) >= min(_ROWS, patches.shape[2]):
                    add(name)

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
        layout = None
        for x, _ in batches:
            x = x.to(device)
            if layout is None:
                layout = layout_of(x[:2], model)
                in_layout(model, layout)
                stack.callback(in_layout, model, torch.contiguous_format)
                for name, conv in convolutions.items():
                    stack.callback(conv.register_forward_pre_hook(see_input(name)).remove)
                    if gradients:
                        stack.callback(conv.register_forward_hook(see_gradient(name)).remove)
            x = x.to(memory_format=layout)
            size = len(x)
            if gradients:
                # Parameters ask for no gradients here; the graph hangs on the input.
                with torch.enable_grad():
                    answers = outputs_of(model(x.detach().requires_grad_().clone()))  # which it may change in place
                    if not is_classifier(answers):
                        shapes = " and ".join(str(tuple(output.shape)) for output in answers)
                        raise InputError(
                            "criterion 'loss' needs a classifier (one row of class scores per image), but the network "
                            f"returns {shapes}; use --criterion response"
                        )
                    logits = answers[0]
                    if not logits.requires_grad:
                        raise InputError(
                            "criterion 'loss' needs gradients, and none come through the network to its convolutions "
                            "(detach() or no_grad() in its forward?); use --criterion response"
                        )
                    scores = log_scores(logits)
                    labels = _sampled_labels(scores, first_image + done, seed)
                    F.nll_loss(scores, labels, reduction="sum").backward()
                for sums in moments.values():
                    sums.count_images(size)
            else:
                with torch.no_grad():
                    model(x)
            done += size
            if progress is not None:
                progress(what, done)
    for name, rows in waiting.items():
        if rows:
            add(name)
    if done == 0:
        raise InputError("there are no calibration images; give --data with at least two images")
    for name, sums in moments.items():
        if not sums.finite():
            raise InputError(
                f"the activations or gradients at {name!r} are not finite on the calibration images; "
                "check the weights and the normalisation"
            )
    return moments
