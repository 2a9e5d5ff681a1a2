"""Where networks run: one file for each runtime, which registers the targets that it makes of it.

A new runtime is a file with a `Target` that it registers, and its name in the import below. What a runtime needs is
imported when it is used, never here.
"""

from dk2pnet.deploy.runtimes import onnxruntime, openvino, pytorch  # they register themselves, in this order
from dk2pnet.deploy.runtimes.target import TARGETS, Example, Network, Target, register, target_named

__all__ = [
    "TARGETS",
    "Example",
    "Network",
    "Target",
    "onnxruntime",
    "openvino",
    "pytorch",
    "register",
    "target_named",
]
