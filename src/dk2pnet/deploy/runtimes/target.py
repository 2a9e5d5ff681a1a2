"""What is asked of a target, and the register of all."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor, nn

from dk2pnet import processes
from dk2pnet.data.arrays import Feed
from dk2pnet.errors import InputError

__all__ = ["TARGETS", "Example", "Network", "Target", "as_array", "register", "target_named"]

Network: TypeAlias = str | Path | bytes | nn.Module
Example: TypeAlias = np.ndarray | Tensor | Feed


class Target(ABC):
    """A runtime, with all that is to be set about it, by the name that users give."""

    name: str
    reads_onnx: bool
    """Whether it takes ONNX files or their content, else modules."""
    quantized: bool = False
    """Whether what it runs is int8."""
    package: str
    """The distribution, and its module, that it needs and whose version is recorded."""
    extra: str | None = None
    """Of dk2pnet, which installs the package; None: there is none, or dk2pnet always has the package."""

    def check(self) -> None:
        """`InputError` where it cannot be had on this machine."""
        if find_spec(self.package) is None:
            what = f"'dk2pnet[{self.extra}]'" if self.extra else self.package
            raise InputError(
                f"target {self.name} needs the package {self.package}; install it with: pip install {what}"
            )

    @abstractmethod
    def load(self, network: Any, example: Any, threads: int | None) -> Callable[[], object]:
        """Load a `Network` of the kind that it takes; each call of what is returned runs it once on the `Example`.

        `threads` is how many the network gets; None: the runtime's own choice.

        Raises
        ------
        InputError
            When the network cannot be loaded. (That it does not take the example may come out in the first call.)
        """

    def prepared(self, threads: int | None) -> AbstractContextManager[Any]:
        """What has to hold of the whole process while networks are loaded and run; put back at the end."""
        return contextlib.nullcontext()

    def version(self) -> str:
        """Of the package that is installed."""
        try:
            return metadata.version(self.package)
        except metadata.PackageNotFoundError:  # another distribution has the module: onnxruntime-gpu
            return import_module(self.package).__version__

    def processor(self) -> str:
        """Name of what it runs on."""
        return processes.processor()


TARGETS: dict[str, Target] = {}
"""By name, in the order in which they are told to users."""


def register(target: Target) -> None:
    """Add a target to `TARGETS`; `ValueError` where another one has its name."""
    if target.name in TARGETS:
        raise ValueError(f"there is a target {target.name} already; give another name")
    TARGETS[target.name] = target


def target_named(name: str) -> Target:
    """The registered target of that name; `InputError` where there is none."""
    if name not in TARGETS:
        raise InputError(f"target is {name!r}; expected one of {', '.join(TARGETS)}")
    return TARGETS[name]


def as_array(example: np.ndarray | Tensor) -> np.ndarray:
    """The example as runtimes outside PyTorch take it."""
    return np.ascontiguousarray(example.detach().cpu().numpy() if isinstance(example, Tensor) else example)
