"""OpenVINO, on the CPU, in fp32."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dk2pnet.data.arrays import Feed
from dk2pnet.deploy.runtimes.target import Example, Target, as_array, register
from dk2pnet.errors import InputError

__all__ = ["OpenVino"]


class OpenVino(Target):
    """An ONNX file, compiled for the shape of the example."""

    name = "openvino"
    reads_onnx = True
    package = "openvino"
    extra = "openvino"

    def load(self, network: str | Path | bytes, example: Example, threads: int | None) -> Callable[[], object]:
        """As `Target.load`."""
        import openvino

        properties: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        if threads is not None:
            properties["INFERENCE_NUM_THREADS"] = threads
        core = _core()
        try:
            model = core.read_model(network if isinstance(network, bytes) else str(network))
            arrays = example.arrays if isinstance(example, Feed) else {model.input(0).any_name: as_array(example)}
            # As a deployed network has it: with the shape fixed, the compiler lays out memory once.
            model.reshape({name: list(array.shape) for name, array in arrays.items()})
            request = core.compile_model(model, "CPU", properties).create_infer_request()
        except RuntimeError as error:
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
            raise InputError(f"the network cannot be loaded by OpenVINO: {reason}") from error
        for name, array in arrays.items():
            request.set_tensor(name, openvino.Tensor(array, shared_memory=True))
        return request.infer


@functools.cache
def _core() -> Any:
    """One for the life of the process: with the last one OpenVINO unloads its plugin, and later forks may crash."""
    import openvino

    return openvino.Core()


register(OpenVino())
