"""dk2pnet: make trained convolutional networks fast to run, by dominant kernels and knowledge pre-regression."""

from importlib import import_module

__version__ = "0.1.0"

from dk2pnet.errors import InputError
from dk2pnet.layer import DKConv2d, set_form
from dk2pnet.plan import Budget, Plan

# What pulls in the data and export libraries is imported when first asked for.
_LATER = {
    "compress": "commands.compress",
    "Result": "commands.compress",
    "explore": "commands.explore",
    "train": "commands.train",
    "evaluate": "commands.evaluate",
    "reproduce": "commands.reproduce",
    "Run": "run.run",
    "load_student": "networks.saved",
    "save_student": "networks.saved",
    "plain_model": "deploy.emit",
    **dict.fromkeys(
        ("CompressOptions", "ExploreOptions", "TrainOptions", "EvaluateOptions", "ReproduceOptions"), "options"
    ),
}

__all__ = [
    "Budget",
    "CompressOptions",
    "DKConv2d",
    "EvaluateOptions",
    "ExploreOptions",
    "InputError",
    "Plan",
    "ReproduceOptions",
    "Result",
    "Run",
    "TrainOptions",
    "compress",
    "evaluate",
    "explore",
    "load_student",
    "plain_model",
    "reproduce",
    "save_student",
    "set_form",
    "train",
]


def __getattr__(name: str) -> object:
    if name in _LATER:
        return getattr(import_module(f"dk2pnet.{_LATER[name]}"), name)
    raise AttributeError(f"module 'dk2pnet' has no attribute {name!r}")
