"""Static int8 of an ONNX file, by ONNX Runtime's own quantiser."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx.version_converter
from torch import Tensor

from dk2pnet.data.arrays import Feed
from dk2pnet.errors import InputError

__all__ = ["quantize_onnx"]

_OPSET = 13  # the first whose QuantizeLinear has an axis


def quantize_onnx(source: str | Path | bytes, batches: Iterable[Tensor | np.ndarray | Feed]) -> bytes:
    """The content of an ONNX file with int8 weights and activations, calibrated on `batches` ``(B, C, H, W)``.

    Convolutions and matrix products get quantise/dequantise pairs around them, which runtimes fuse; weights have a
    scale for each output channel (one for all where an old file cannot be brought to operator set 13). Activations are
    unsigned and weights signed: the combination that processors with VNNI multiply in one instruction.

    Raises
    ------
    InputError
        When there are no batches, or the quantiser cannot read the network.
    """
    # Imported here: the quantiser is not needed to run a network.
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    model = onnx.load_model_from_string(source) if isinstance(source, bytes) else onnx.load_model(str(source))
    model, per_channel = _newer(model)
    constant = {weight.name for weight in model.graph.initializer}
    name = next(entry.name for entry in model.graph.input if entry.name not in constant)

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left: Iterator[Tensor | np.ndarray | Feed] = iter(batches)
            self.count = 0

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.left, None)
            if batch is None:
                return None
            self.count += 1
            if isinstance(batch, Feed):
                return batch.arrays
            array = batch.detach().cpu().numpy() if isinstance(batch, Tensor) else batch
            return {name: np.ascontiguousarray(array, dtype=np.float32)}

    reader = Reader()
    disabled = logging.root.manager.disable
    with tempfile.TemporaryDirectory(prefix="dk2pnet-int8-") as folder:
        try:
            logging.disable(logging.WARNING)  # it advises a pre-processing that our graphs have had
            inferred = onnx.shape_inference.infer_shapes(model)
            quantize_static(
                inferred,
                str(Path(folder) / "int8.onnx"),
                reader,
                quant_format=QuantFormat.QDQ,
                per_channel=per_channel,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
        except Exception as error:
            if reader.count == 0:
                raise InputError("there are no images to calibrate int8 with; give --data") from error
            reason = str(error).partition("\n")[0]
            raise InputError(f"the network cannot be quantised by ONNX Runtime: {reason}") from error
        finally:
            logging.disable(disabled)
        if reader.count == 0:
            raise InputError("there are no images to calibrate int8 with; give --data")
        return (Path(folder) / "int8.onnx").read_bytes()


def _newer(model: onnx.ModelProto) -> tuple[onnx.ModelProto, bool]:
    """The model with an operator set that knows scales for each output channel, and whether it has one."""
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if opset >= _OPSET:
        return model, True
    try:
        newer = onnx.version_converter.convert_version(model, _OPSET)
        onnx.checker.check_model(newer)
    except Exception:  # whatever the converter does not know: then one scale serves a whole weight
        return model, False
    return newer, True
