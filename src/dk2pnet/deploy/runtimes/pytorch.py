"""PyTorch: modules as they are, compiled, and on a GPU."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from dk2pnet.deploy.runtimes.target import Target, register
from dk2pnet.errors import InputError
from dk2pnet.measure import in_layout, layout_of

__all__ = ["PyTorch", "PyTorchCompiled", "PyTorchCuda"]


class PyTorch(Target):
    """A copy of the module, on the CPU, in the layout that is fastest there."""

    name = "pytorch"
    reads_onnx = False
    package = "torch"
    device = "cpu"

    def load(self, network: nn.Module, example: np.ndarray | Tensor, threads: int | None) -> Callable[[], object]:
        """As `Target.load`; `prepared` has the threads."""
        try:
            module = copy.deepcopy(network).eval().to(self.device)
        except Exception as error:
            raise InputError(f"{type(network).__name__} cannot be copied to time it ({error})") from error
        x = example.detach() if isinstance(example, Tensor) else torch.from_numpy(example)
        x = x.to(self.device)
        # The layout in which PyTorch's convolutions are fastest on processors and GPUs, for networks that can.
        in_layout(module, torch.channels_last)
        layout = layout_of(x, module)
        in_layout(module, layout)
        return self.caller(module, x.to(memory_format=layout))

    def caller(self, function: Callable[[Tensor], object], x: Tensor) -> Callable[[], object]:
        """The call that runs it once, to the end."""

        def call() -> object:
            with torch.inference_mode():
                return function(x)

        return call

    @contextlib.contextmanager
    def prepared(self, threads: int | None) -> Iterator[None]:
        """PyTorch has one number of threads for the whole process; it is put back."""
        before = torch.get_num_threads()
        if threads is not None:
            torch.set_num_threads(threads)
        try:
            yield
        finally:
            if torch.get_num_threads() != before:
                torch.set_num_threads(before)


class PyTorchCompiled(PyTorch):
    """The same through `torch.compile`."""

    name = "pytorch-compile"

    def caller(self, function: Callable[[Tensor], object], x: Tensor) -> Callable[[], object]:
        """As `PyTorch.caller`; the first call compiles."""
        return super().caller(torch.compile(function, dynamic=False), x)

    @contextlib.contextmanager
    def prepared(self, threads: int | None) -> Iterator[None]:
        """As many compiled networks as are asked for: torch.compile gives up on a class of them after the eighth."""
        import torch._dynamo.config as limits

        names = ("recompile_limit", "accumulated_recompile_limit", "cache_size_limit", "accumulated_cache_size_limit")
        with super().prepared(threads), limits.patch({name: 2**20 for name in names if hasattr(limits, name)}):
            yield


class PyTorchCuda(PyTorch):
    """The module on a GPU."""

    name = "cuda"
    device = "cuda"

    def check(self) -> None:
        """`InputError` where PyTorch finds no GPU."""
        if not torch.cuda.is_available():
            raise InputError("target cuda needs a GPU, and PyTorch finds none; choose another --target")

    def caller(self, function: Callable[[Tensor], object], x: Tensor) -> Callable[[], object]:
        """As `PyTorch.caller`: a call on a GPU returns before it is done, so each is waited for."""
        run = super().caller(function, x)

        def call() -> object:
            output = run()
            torch.cuda.synchronize()
            return output

        return call

    def processor(self) -> str:
        """Name of the GPU."""
        return torch.cuda.get_device_name()


register(PyTorch())
register(PyTorchCompiled())
register(PyTorchCuda())
