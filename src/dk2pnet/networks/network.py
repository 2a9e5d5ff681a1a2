"""What compression asks of a CNN, whatever it is made of."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from dk2pnet.answers import Predictions
from dk2pnet.data import Normalization
from dk2pnet.data.arrays import Arrays, Feed
from dk2pnet.data.samples import Batches, Batching, Samples
from dk2pnet.decompose.moments import Moments
from dk2pnet.decompose.solve import Factors
from dk2pnet.layer import DKConv2d
from dk2pnet.plan import Plan
from dk2pnet.run.run import Run
from dk2pnet.training.recipe import Recipe
from dk2pnet.training.trainer import TrainingOptions

__all__ = ["Corrections", "Learner", "Network", "NotLearnable", "Site", "Solution"]


@dataclass
class Site:
    """A convolution of a network that DK layers may replace. `reason` says why it stays dense, "" if they can.

    `module`: a convolution of the same weights and geometry; `positions`: output positions of one image, summed over
    all calls; `calls`: how often one forward pass runs it; `aliases`: further names of the same module.
    """

    name: str
    module: nn.Module
    reason: str = ""
    positions: int = 0
    calls: int = 0
    aliases: list[str] = field(default_factory=list)
    activation: int = 0  # numbers in the largest input and output of one image, together
    input_size: tuple[int, int] = (0, 0)  # height and width of the (last) input
    by_keyword: bool = False  # whether its input is given as ``input=``

    @property
    def conv(self) -> nn.Conv2d:
        """The module of a site that can be replaced."""
        assert isinstance(self.module, nn.Conv2d)
        return self.module

    @property
    def size(self) -> int:
        """Numbers in the weight."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.numel()

    @property
    def shape(self) -> str:
        """The weight's shape (output channels x input channels per group x kernel, the first two the other way round
        where it is transposed), then stride and groups where they are not 1."""
        module: Any = self.module
        text = "x".join(map(str, module.weight.shape))
        text += "" if set(module.stride) == {1} else " /" + "x".join(map(str, sorted(set(module.stride))))
        return text + ("" if module.groups == 1 else f" groups={module.groups}")

    @property
    def macs(self) -> int:
        """Multiply-adds of one image."""
        return self.size * self.positions


class Solution(NamedTuple):
    """Kernels per channel of the replaced layers, and their factors before any correction."""

    counts: Mapping[str, Tensor]
    factors: Mapping[str, Factors]


class Settings(NamedTuple):
    """Of the corrections: whether to `reconstruct` layer by layer; bytes of `memory`."""

    reconstruct: bool
    memory: int


# Yields what was corrected and the better student (None where it is not possible, and the name says why), and is sent
# whether that was kept; the next correction starts from what was.
Corrections = Generator["tuple[str, Network | None]", bool, None]


class NotLearnable(Exception):
    """Why a network cannot be tuned."""


class Learner(Protocol):
    """A network as PyTorch modules that can be tuned: the teacher, and students of it."""

    teacher: nn.Module
    example: Tensor  # (1, C, H, W), normalised
    options: TrainingOptions
    normalization: Normalization | None  # of what `data` gives, where that is a data set
    names: Mapping[str, str]  # by site, where its DK layer is among a student's modules
    at_once: int | None  # samples that it takes at once, None for any number

    def data(self, samples: Samples, memory: float) -> Any:
        """What it is tuned on: a data set, images of which so many bytes may be kept, or batches of tensors."""
        ...

    def held_out(self, samples: Samples, step: int) -> Batches:
        """Every so many-th of the held-out samples, as tensors."""
        ...

    def student(self, student: Any) -> nn.Module:
        """The student as a module of its own, whose DK layers (or all parameters) can be trained."""
        ...

    def learned(self, student: Any, module: nn.Module) -> Network:
        """The student with what the module has learnt."""
        ...

    def recipes(self, teacher: Predictions, start: Predictions, options: TrainingOptions) -> list[Recipe]:
        """What a student that answers the held-out samples so may be tuned with, where `options` do not ask for
        anything: the first one where nothing is tried."""
        ...


class Network(Protocol):
    """A trained CNN that can be compressed; a student of it is a network of the same kind."""

    normalization: Normalization | None
    batching: Batching  # how many samples it takes at once
    example: Any  # one input, as it is timed and exported: a tensor (1, C, H, W) or a `Feed`
    default_criterion: str
    task: str | None  # what its answers are for, one of `tasks.TASKS`, once that is known
    plan: Plan | None  # where it was compressed before
    spec: dict[str, Any] | None  # arguments of `named.make_network`; None for what has to be given again

    @property
    def macs(self) -> int:
        """Multiply-adds of one sample."""
        ...

    @property
    def parameters(self) -> int:
        """Numbers in its weights, shared ones once."""
        ...

    @property
    def facts(self) -> dict[str, Any]:
        """What else metrics.json is to say of a student."""
        ...

    @property
    def reconstructs_first(self) -> bool:
        """Whether the reconstruction comes before tuning, and not only where that is not kept."""
        ...

    @property
    def caveats(self) -> list[str]:
        """What its figures do not tell, a sentence each."""
        ...

    @property
    def layers(self) -> Mapping[str, DKConv2d]:
        """Its DK layers, by site."""
        ...

    def prepare(self, example: Tensor | Feed | None, input_size: int | None, run: Run) -> None:
        """Prove that it runs on `example`, and answers alike each time; learn its sizes. `InputError` otherwise."""
        ...

    def one_at_a_time(self) -> bool:
        """Take one sample at a time from now on; False where that is so already, or never helps."""
        ...

    def fit(self, memory: int) -> bool:
        """Take no more samples at once than `memory` bytes hold the maps of; True where these are fewer than before."""
        ...

    def arrays(self, path: str) -> Arrays:
        """The arrays of an ``.npz`` file, one for each input."""
        ...

    def sites(self, keep: Sequence[str] = (), first: bool = False) -> list[Any]:
        """All its convolutions in the order in which they run; `keep`, `first` say which stay dense beside others."""
        ...

    def predict(self, batches: Batches, run: Run, what: str = "", total: int = 0) -> Predictions:
        """What it answers, in evaluation mode, for its `task`; with `what` it shows progress."""
        ...

    def moments(
        self, sites: Mapping[str, Any], samples: Samples, gradients: bool, memory: int, run: Run
    ) -> Iterator[dict[str, Moments]]:
        """Moments of the sites over ``samples.gather``, in groups of layers that fit into `memory` bytes."""
        ...

    def with_kernels(self, counts: Mapping[str, Tensor], factors: Mapping[str, Factors] | None = None) -> Network:
        """A student with DK layers of so many kernels per channel; without `factors` only to be timed."""
        ...

    def corrections(self, student: Any, solution: Solution, samples: Samples, how: Settings, run: Run) -> Corrections:
        """What can be put right in a student of this network once its layers are replaced."""
        ...

    def after_tuning(self, student: Any, batches: Batches, run: Run) -> Corrections:
        """What can be put right in a student that was tuned with batch norm in training mode."""
        ...

    def learner(self, samples: Samples, sites: Mapping[str, Any], run: Run) -> Learner:
        """This network and its students as PyTorch modules. `NotLearnable` says why that cannot be."""
        ...

    def deployable(self, target: str, forms: Mapping[str, str]) -> Any:
        """As `compare_latency` takes it on that target, its DK layers in these emitted forms."""
        ...

    def onnx(self, forms: Mapping[str, str]) -> bytes:
        """Content of an ONNX file with the same answers."""
        ...

    def save(self, folder: Path, plan: Plan, samples: Samples | None, run: Run) -> float | None:
        """Write what OUT holds of it: model.onnx, checked, also on held-out samples (the difference found is returned),
        plan.json and weights."""
        ...

    def save_unfinished(self, folder: Path, plan: Plan) -> None:
        """Write a student of an unfinished run."""
        ...

    def load_unfinished(self, folder: Path) -> tuple[Network, Plan]:
        """A student of this network that `save_unfinished` wrote."""
        ...

    def digests(self) -> dict[str, str]:
        """What tells it from another network of the same name."""
        ...

    def result(self, plan: Plan) -> Any:
        """What `compress` hands back in Python."""
        ...
