"""Which feature maps of the teacher teach which of the student."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from dk2pnet.measure import evaluation

__all__ = ["capture", "find_hints"]


def find_hints(model: nn.Module, example: Tensor) -> list[str]:
    """Names of the modules that end the stages: the last one to run at each resolution above 1x1.

    For a converted network, whose student has the same modules. `example` is ``(1, C, H, W)``.
    """
    last: dict[tuple[int, int], str] = {}
    handles = []
    for name, module in model.named_modules():
        if not name:
            continue

        def hook(module: nn.Module, args: tuple, output: object, name: str = name) -> None:
            if isinstance(output, Tensor) and output.dim() == 4 and min(output.shape[2:]) > 1:
                last[(output.shape[2], output.shape[3])] = name

        handles.append(module.register_forward_hook(hook))
    try:
        with evaluation(model):
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    return list(last.values())


@contextmanager
def capture(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """A dictionary that holds the outputs of the named modules after every forward pass inside the block."""
    maps: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    handles = []
    try:
        for name in names:

            def hook(module: nn.Module, args: tuple, output: Tensor, name: str = name) -> None:
                maps[name] = output

            handles.append(modules[name].register_forward_hook(hook))
        yield maps
    finally:
        for handle in handles:
            handle.remove()
