"""Save and load a network: plan.json says how to build it, model.safetensors holds its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from dk2pnet.errors import InputError, first_line
from dk2pnet.networks.named import make_network
from dk2pnet.networks.torch.convert import convert
from dk2pnet.plan import Plan

__all__ = ["PLAN", "WEIGHTS", "is_saved", "load_student", "save_student"]

PLAN, WEIGHTS = "plan.json", "model.safetensors"


def save_student(model: nn.Module, plan: Plan, folder: str | Path) -> None:
    """Write plan.json and model.safetensors into `folder`, which is made; weights shared by several modules once.

    The plan is given the hash of the weights. `InputError` where they cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_model(model, str(folder / WEIGHTS))
        plan.weights_hash = _hash(folder / WEIGHTS)
        (folder / PLAN).write_text(plan.to_json(), encoding="utf-8")
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"the network cannot be written to {folder} ({first_line(error)}); give another folder"
        ) from error
    (folder / WEIGHTS).chmod((folder / PLAN).stat().st_mode)  # safetensors makes files that only their owner can read


def is_saved(folder: str | Path) -> bool:
    """Whether `folder` holds a network that `load_student` can read."""
    return (Path(folder) / PLAN).is_file()


def load_student(folder: str | Path, factory: Callable[[], nn.Module] | None = None) -> tuple[nn.Module, Plan]:
    """Rebuild a saved network in evaluation mode, without its training script.

    `factory` makes the dense network; it is needed where the network was given as a Python object, or by
    FILE.py:FUNCTION: the code that a folder names is not run, only what its reader names.

    Raises
    ------
    InputError
        When the folder has no plan or weights, or they do not belong together; when a factory is needed, or the one
        given makes another network.
    """
    folder = Path(folder)
    plan = Plan.load(folder / PLAN)
    weights = folder / WEIGHTS
    if not weights.is_file() and (folder / "model.onnx").is_file():
        raise InputError(f"{folder} holds a network that came as an ONNX file; give {folder / 'model.onnx'}")
    if not weights.is_file():
        raise InputError(f"{folder} has no {WEIGHTS}; expected a folder that dk2pnet wrote")
    if plan.weights_hash != _hash(weights):
        raise InputError(
            f"{weights} is not the file that {PLAN} describes (its SHA-256 differs); restore both together"
        )
    if factory is not None:
        expected = "expected a function without arguments that returns the dense network, such as lambda: model"
        if isinstance(factory, nn.Module) or not callable(factory):
            raise InputError(f"factory is of type {type(factory).__name__}; {expected}")
        dense = factory()
        if not isinstance(dense, nn.Module):
            raise InputError(f"factory returns {type(dense).__name__}; {expected}")
    elif plan.network is not None and ".py:" in str(plan.network.get("name", "")):
        name = plan.network["name"]
        raise InputError(
            f"the network in {folder} is made by {name}, and code that a folder names is not run; if you know "
            f"it, name it yourself: --model {name} --weights {folder} (in Python: factory=FUNCTION)"
        )
    elif plan.network is not None:
        dense = make_network(**plan.network)
    else:
        raise InputError(
            f"{folder} holds a network that was given as a Python object; "
            "load it in Python with load_student(folder, factory=FUNCTION_THAT_MAKES_THE_DENSE_NETWORK)"
        )
    model = convert(dense, plan)
    try:
        load_model(model, str(weights), strict=True)
    except (SafetensorError, RuntimeError) as error:
        raise InputError(
            f"the weights in {folder} do not fit the network of its plan ({str(error).splitlines()[0]}); "
            "give the factory that made it"
        ) from error
    return model.eval(), plan


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
