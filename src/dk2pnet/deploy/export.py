"""PyTorch in, one ONNX file out, and the proof that both compute the same.

Exporter: the TorchScript one of `torch.onnx`, on every PyTorch from 2.6 on. The newer one (`dynamo=True`) is only asked
when the first cannot do it: with PyTorch 2.6 and a current onnxscript it cannot export a batch normalisation
(github.com/microsoft/onnxscript/issues/2651), it takes seconds where the other takes tenths, and it writes the stack
traces of the exporting machine into the file.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from dk2pnet.deploy.emit import with_plain_layers
from dk2pnet.deploy.fuse import fold_batch_norms
from dk2pnet.deploy.runtimes.onnxruntime import run_onnx, session
from dk2pnet.errors import InputError, first_line
from dk2pnet.measure import outputs_of

__all__ = [
    "check_onnx",
    "export_onnx",
    "multiplier_convolutions",
    "onnx_bytes",
    "read_metadata",
]

# Known to every runtime in use; the first with LayerNormalization as one operator. The dynamo exporter starts at 18.
OPSET = 17
DYNAMO_OPSET = 18


def export_onnx(
    model: nn.Module,
    example: Tensor,
    path: str | Path,
    *,
    forms: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
    input_name: str = "input",
    output_name: str = "output",
) -> None:
    """Write `model` to one self-contained ONNX file with a free batch size, every DK layer in an exact plain form.

    Example::

        export_onnx(student, torch.randn(1, 3, 32, 32), "model.onnx", metadata={"seed": "0"})

    A copy of the model in eval mode on the CPU is exported; the model itself is not touched. The file appears whole or
    not at all.

    Parameters
    ----------
    model
        Takes one tensor; gives a tensor, or a tuple, list or dict of tensors.
    example
        An input, ``(B, C, H, W)``; the file takes any B, but only this C, H and W.
    forms
        The emitted form (`emit.EMITTED`) of DK layers by module name; ``branches`` where it says nothing.
    metadata
        Written to the file's metadata, see `read_metadata`.
    output_name
        Name of the (first) output; further ones are called ``output_1``, ``output_2``, ...

    Raises
    ------
    InputError
        When the model does not take the example, or cannot be exported with a free batch size.
    """
    path = Path(path)
    content = onnx_bytes(model, example, forms=forms, metadata=metadata, input_name=input_name, output_name=output_name)
    # Not tempfile: its files are readable by their owner alone, and os.replace would keep that.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def onnx_bytes(
    model: nn.Module,
    example: Tensor,
    *,
    forms: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
    input_name: str = "input",
    output_name: str = "output",
) -> bytes:
    """What `export_onnx` writes."""
    name = type(model).__name__
    try:
        net = with_plain_layers(_cpu_copy(model), forms)
    except Exception as error:
        raise InputError(f"cannot copy {name} to export it: {first_line(error)}") from error
    if example.dim() < 2 or len(example) == 0:
        raise InputError(f"example has shape {tuple(example.shape)}; expected at least one image, (B, C, H, W)")
    # Two images to trace with and three to check with: the exporters take a dimension of size 1 for a constant.
    three = example.detach().cpu()[:1].repeat(3, *[1] * (example.dim() - 1))
    try:
        with torch.no_grad():
            output = net(three)
    except Exception as error:
        shape = tuple(example.shape)
        raise InputError(f"{name} does not take the example of shape {shape}: {first_line(error)}") from error
    expected = _tensors(output, name)
    names = [output_name if index == 0 else f"{output_name}_{index}" for index in range(len(expected))]
    if not isinstance(output, Tensor):
        net = _Flat(net)
    shapes = [tuple(tensor.shape) for tensor in expected]
    return _export(net, name, three, shapes, dict(metadata or {}), input_name, names)


def check_onnx(path: str | Path, model: nn.Module, inputs: Sequence[Tensor], tolerance: float = 1e-4) -> float:
    """Run `inputs` through the file (ONNX Runtime, CPU) and `model` (PyTorch, CPU, eval mode, its own forms).

    Returns
    -------
    float
        The largest relative difference, ``max |onnx - torch| / max |torch|`` per output.

    Raises
    ------
    InputError
        When the file is not there or cannot be loaded.
    RuntimeError
        When the file breaks the ONNX standard, does not run, or differs by more than `tolerance`.
    """
    path = Path(path)
    running = session(path)
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise RuntimeError(f"{path.name} is not valid ONNX: {first_line(error)}") from error
    # On the CPU, because a GPU's convolutions may round to TF32, which the tolerance would blame on the file.
    reference = _cpu_copy(model)
    worst = 0.0
    for x in inputs:
        with torch.no_grad():
            expected = _tensors(reference(x.detach().cpu()), type(model).__name__)
        try:
            found = run_onnx(running, x)
        except Exception as error:
            raise RuntimeError(
                f"{path.name} fails on an input of shape {tuple(x.shape)}: {first_line(error)}"
            ) from error
        shapes = [array.shape for array in found], [tuple(tensor.shape) for tensor in expected]
        if shapes[0] != shapes[1]:
            raise RuntimeError(f"{path.name} gives outputs of shape {shapes[0]}; PyTorch gives {shapes[1]}")
        for number, (a, b) in enumerate(zip(found, expected, strict=True)):
            difference = _relative_difference(a, b.numpy())
            if not difference <= tolerance:  # not ">": a NaN must not pass
                raise RuntimeError(
                    f"{path.name} and PyTorch differ by {difference:.2e} (relative; output {number}, input of shape"
                    f" {tuple(x.shape)}); at most {tolerance:.2e} is allowed"
                )
            worst = max(worst, difference)
    return worst


def multiplier_convolutions(path: str | Path) -> list[str]:
    """Names of the depthwise convolutions with a channel multiplier: groups = input channels > 1, outputs > groups.

    Runtimes send them down a slow path; a converted network must have none that the original did not have.
    """
    proto = onnx.shape_inference.infer_shapes(_load(path))
    shapes = {info.name: [dim.dim_value for dim in info.type.tensor_type.shape.dim] for info in proto.graph.value_info}
    shapes.update({initializer.name: list(initializer.dims) for initializer in proto.graph.initializer})
    found = []
    for node in proto.graph.node:
        if node.op_type != "Conv":
            continue
        groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
        outputs, inputs_per_group = (shapes.get(node.input[1]) or [0, 0])[:2]
        if groups > 1 and inputs_per_group == 1 and outputs > groups:
            found.append(node.name or node.output[0])
    return found


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata that `export_onnx` wrote. Raises InputError when the file is not there or not ONNX."""
    return {entry.key: entry.value for entry in _load(path).metadata_props}


# -- the model to export ---------------------------------------------------------------------------------------------


def _cpu_copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).cpu().eval()


class _Flat(nn.Module):
    """A model whose outputs are a plain tuple of tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(_tensors(self.model(x), "model"))


def _tensors(output: Any, name: str) -> list[Tensor]:
    try:
        values = outputs_of(output)
    except InputError:
        values = []
    if not values:
        raise InputError(f"{name} gives {type(output).__name__}; expected a tensor, or a tuple or dict of tensors")
    return values


# -- the exporters ---------------------------------------------------------------------------------------------------


def _export(
    net: nn.Module,
    name: str,
    three: Tensor,
    shapes: list[tuple[int, ...]],
    metadata: dict[str, str],
    input_name: str,
    output_names: list[str],
) -> bytes:
    """The file's content, proven to take a batch size that the model was not traced with."""
    first: Exception | None = None
    for exporter in (_torchscript, _dynamo):
        try:
            with _quiet(), torch.no_grad():
                proto = exporter(net, three[:2], input_name, output_names)
            fold_batch_norms(proto)
            onnx.helper.set_model_props(proto, metadata)
            content = proto.SerializeToString()
            found = [output.shape for output in run_onnx(session(content, 1, name), three)]
            if found != shapes:
                raise RuntimeError(f"the batch size cannot be left free: outputs of shape {found}, expected {shapes}")
            return content
        except Exception as error:
            first = first or error
    assert first is not None
    raise InputError(f"cannot export {name} to ONNX: {first_line(first)}") from first


def _torchscript(net: nn.Module, x: Tensor, input_name: str, output_names: list[str]) -> onnx.ModelProto:
    file = io.BytesIO()
    torch.onnx.export(
        net,
        (x,),
        file,  # type: ignore[arg-type]  # the stub knows only paths, this exporter files too
        input_names=[input_name],
        output_names=output_names,
        dynamic_axes={name: {0: "batch"} for name in (input_name, *output_names)},
        opset_version=OPSET,
        dynamo=False,
    )
    return onnx.load_model_from_string(file.getvalue())


def _dynamo(net: nn.Module, x: Tensor, input_name: str, output_names: list[str]) -> onnx.ModelProto:
    program = torch.onnx.export(
        net,
        (x,),
        input_names=[input_name],
        output_names=output_names,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        opset_version=DYNAMO_OPSET,
        optimize=True,
        verbose=False,
        dynamo=True,
    )
    assert program is not None
    proto = program.model_proto
    # Notes of the exporter, among them stack traces with the paths of the exporting machine.
    graph = proto.graph
    for entry in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        entry.ClearField("metadata_props")
        entry.ClearField("doc_string")
    return proto


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Neither warnings, nor log lines, nor prints: the exporters are talkative, and their errors are raised anyway."""
    disabled = logging.root.manager.disable
    with contextlib.ExitStack() as stack:
        stack.callback(logging.disable, disabled)
        logging.disable(logging.CRITICAL)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        # The file descriptor too: on failure the C++ side of the TorchScript exporter prints the whole graph, whatever
        # `verbose` says.
        if sys.stdout is not None:
            sys.stdout.flush()
        with contextlib.suppress(OSError):  # no descriptor 1, nothing to silence
            saved = os.dup(1)
            stack.callback(os.close, saved)
            stack.callback(os.dup2, saved, 1)
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), 1)
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield


# -- small things ----------------------------------------------------------------------------------------------------


def _load(path: str | Path) -> onnx.ModelProto:
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist; expected an ONNX file")
    try:
        proto = onnx.load(str(path))
    except Exception as error:
        raise InputError(f"{path} is not an ONNX file: {first_line(error)}") from error
    if not proto.HasField("graph"):
        raise InputError(f"{path} is not an ONNX file: it holds no graph")
    return proto


def _relative_difference(a: np.ndarray, b: np.ndarray) -> float:
    if b.size == 0:
        return 0.0
    difference = float(np.abs(a.astype(np.float64) - b).max())
    return difference / max(float(np.abs(b).max()), np.finfo(np.float32).tiny)
