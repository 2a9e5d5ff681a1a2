"""dk2pnet: make trained convolutional networks fast to run, by dominant kernels and knowledge pre-regression."""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

from dk2pnet.errors import InputError
from dk2pnet.plan import Budget, Plan

if TYPE_CHECKING:
    from dk2pnet.commands.compress import Result, compress
    from dk2pnet.commands.evaluate import evaluate
    from dk2pnet.commands.explore import explore
    from dk2pnet.commands.reproduce import reproduce
    from dk2pnet.commands.train import train
    from dk2pnet.deploy.emit import plain_model
    from dk2pnet.layer import DKConv2d, set_form
    from dk2pnet.networks.saved import load_student, save_student
    from dk2pnet.options import CompressOptions, EvaluateOptions, ExploreOptions, ReproduceOptions, TrainOptions
    from dk2pnet.run.run import Run

# What pulls in PyTorch, and the data and export libraries, is imported when first asked for: a spelling mistake on the
# command line is answered at once.
_LATER = {
    "DKConv2d": "layer",
    "set_form": "layer",
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
