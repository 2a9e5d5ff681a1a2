"""Asymmetric reconstruction, layer by layer in the order of execution.

Every layer is solved for the *student's* own inputs (the layers before it are already replaced) and the *teacher's*
outputs, so that it also undoes what the layers before it did wrong. Source: Zhang, Zou, He, Sun, "Accelerating Very
Deep Convolutional Networks for Classification and Detection", 2015, section 3.3; here for dominant kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from dk2pnet.calibration.gather import inference_of, input_patches, sampled_outputs
from dk2pnet.convert import Convolution
from dk2pnet.decompose.solve import Factors, Problem, solve_many
from dk2pnet.layer import DKConv2d

__all__ = ["reconstruct"]


class _Stop(Exception):
    """Ends a forward pass early: nothing behind the layer in hand matters."""


def reconstruct(
    teacher: nn.Module,
    student: nn.Module,
    sites: Sequence[Convolution],
    counts: Mapping[str, Tensor],
    fisher: Mapping[str, Tensor | None],
    batches: Iterable[tuple[Tensor, Tensor | None]],
    *,
    images: int,
    memory: int = 2 * 2**30,
    positions: int = 32,
    seed: int = 0,
    damping: float = 1e-3,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> dict[str, Factors]:
    """Solve the layers of `counts` one after the other; returns their factors.

    Parameters
    ----------
    teacher, student : the dense network, and a dense copy of it that is changed layer after layer into the (folded)
        student; it must already carry the folded weights of layers that are replaced but not solved here
    sites : the convolutions of the teacher in the order of execution
    counts, fisher : by name, kernels per input channel ``(C,)`` and B (or None)
    batches, images : re-iterable calibration batches, and how many images they hold
    memory : bytes for activations and the teacher's outputs. Where all images fit, one forward pass of them all is
        enough, in which each layer is replaced just before it runs; else there is a pass, cut short, for every layer
    progress : called with the number of layers done
    """
    order = [site for site in sites if site.name in counts and site.calls == 1]
    outputs = sum(site.module.out_channels for site in order)  # type: ignore[misc]
    most = int(memory / 2 / max(4 * images * outputs, 1))
    positions = max(min(positions, most), 4)
    modules = dict(student.named_modules())
    targets = _teacher_outputs(teacher, order, batches, positions, seed, device)
    activation = max((site.activation for site in sites), default=0)
    at_once = 4 * 3 * activation * images <= memory / 2
    results: dict[str, Factors] = {}

    def solve(name: str, sums: _Sums) -> None:
        conv = modules[name]
        assert isinstance(conv, nn.Conv2d)
        A, cross = sums.means()
        problem = Problem(conv.weight, counts[name], A, fisher.get(name), conv.groups, target=cross)
        results[name] = solve_many([problem], damping)[0]
        with torch.no_grad():
            conv.weight.copy_(DKConv2d.from_factors(conv, results[name]).fold())
        targets.pop(name)
        if progress is not None:
            progress(len(results))

    with inference_of(student), torch.no_grad():
        if at_once:
            handles = []
            for site in order:

                def replace_first(module: nn.Conv2d, args: tuple[Tensor, ...], name: str = site.name) -> None:
                    sums = _Sums(module)
                    sums.add(module, args[0], 0, targets[name], positions, seed)
                    solve(name, sums)

                handles.append(modules[site.name].register_forward_pre_hook(replace_first))
            try:
                student(torch.cat([x for x, _ in batches]).to(device))
            finally:
                for handle in handles:
                    handle.remove()
        else:
            for site in order:
                solve(
                    site.name,
                    _gather_until(student, modules[site.name], batches, targets[site.name], positions, seed, device),
                )
    return results


class _Sums:
    """E[u' u''] and E[y u''] of one layer: u' the student's input patches, y the teacher's outputs without bias."""

    def __init__(self, conv: nn.Conv2d) -> None:
        groups, width = conv.groups, conv.out_channels // conv.groups
        inputs = conv.weight[0].numel()
        self.square = torch.zeros(groups, inputs, inputs, dtype=torch.float64)
        self.cross = torch.zeros(groups, width, inputs, dtype=torch.float64)
        self.count = 0

    def add(self, conv: nn.Conv2d, x: Tensor, first: int, targets: Tensor, positions: int, seed: int) -> None:
        """Add images ``first ...`` with inputs ``x (B, C, H, W)``; ``targets (images, P, N)`` of all images."""
        piece = max(1, 2**24 // max(positions * conv.weight[0].numel() * conv.groups, 1))
        for start in range(0, len(x), piece):
            part = x[start : start + piece]
            patches = input_patches(conv, part, first + start, positions, seed).transpose(0, 1)  # (G, n, C q)
            y = targets[first + start : first + start + len(part)].flatten(0, 1).to(patches)
            y = y.view(len(y), conv.groups, -1).permute(1, 2, 0)  # (G, N, n)
            self.square += (patches.transpose(1, 2) @ patches).to(self.square)
            self.cross += (y @ patches).to(self.cross)
            self.count += patches.shape[1]

    def means(self) -> tuple[Tensor, Tensor]:
        """Both moments."""
        return self.square / max(self.count, 1), self.cross / max(self.count, 1)


def _teacher_outputs(
    teacher: nn.Module,
    order: Sequence[Convolution],
    batches: Iterable[tuple[Tensor, Tensor | None]],
    positions: int,
    seed: int,
    device: torch.device | str,
) -> dict[str, Tensor]:
    """The teacher's responses at the sampled positions, without bias: (images, P, N) per layer."""
    parts: dict[str, list[Tensor]] = {site.name: [] for site in order}
    done = 0
    handles = []
    for site in order:

        def see(module: nn.Conv2d, args: tuple, output: Tensor, name: str = site.name) -> None:
            if module.bias is not None:
                output = output - module.bias.view(-1, 1, 1)
            parts[name].append(sampled_outputs(output, done, positions, seed).cpu())

        handles.append(site.module.register_forward_hook(see))
    try:
        with inference_of(teacher), torch.no_grad():
            for x, _ in batches:
                teacher(x.to(device))
                done += len(x)
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(part) for name, part in parts.items()}


def _gather_until(
    student: nn.Module,
    conv: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor | None]],
    targets: Tensor,
    positions: int,
    seed: int,
    device: torch.device | str,
) -> _Sums:
    assert isinstance(conv, nn.Conv2d)
    sums = _Sums(conv)
    done = 0

    def see(module: nn.Conv2d, args: tuple[Tensor, ...]) -> None:
        sums.add(module, args[0], done, targets, positions, seed)
        raise _Stop

    handle = conv.register_forward_pre_hook(see)
    try:
        for x, _ in batches:
            try:
                student(x.to(device))
            except _Stop:
                done += len(x)
    finally:
        handle.remove()
    return sums
