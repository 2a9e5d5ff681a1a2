"""dk2pnet: make trained convolutional networks fast to run, by dominant kernels and knowledge pre-regression."""

__version__ = "0.1.0"

from dk2pnet.errors import InputError
from dk2pnet.layer import DKConv2d, set_form
from dk2pnet.plan import Budget, Plan

__all__ = [
    "Budget",
    "DKConv2d",
    "InputError",
    "Plan",
    "Result",
    "compress",
    "explore",
    "load_student",
    "plain_model",
    "reproduce",
    "save_student",
    "set_form",
]


def __getattr__(name: str) -> object:
    # What pulls in the data and export libraries is imported when first asked for.
    if name in ("compress", "Result"):
        from dk2pnet.commands import compress as module

        return getattr(module, name)
    if name == "explore":
        from dk2pnet.commands import explore as explore_module

        return explore_module.explore
    if name == "reproduce":
        from dk2pnet.commands import reproduce as reproduce_module

        return reproduce_module.reproduce
    if name in ("load_student", "save_student"):
        from dk2pnet.networks import saved as student

        return getattr(student, name)
    if name == "plain_model":
        from dk2pnet.deploy import emit

        return emit.plain_model
    raise AttributeError(f"module 'dk2pnet' has no attribute {name!r}")
