"""A PyTorch module as compression sees it."""

from __future__ import annotations

import inspect
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dk2pnet import __version__, processes
from dk2pnet.answers import Predictions, predict
from dk2pnet.data import ImageData, Normalization
from dk2pnet.data.arrays import Arrays, Feed
from dk2pnet.data.images import SMALL, batch_size_for
from dk2pnet.data.samples import Batches, Batching, Every, Part, Samples, spread
from dk2pnet.data.tensors import TensorImages, images_of
from dk2pnet.decompose.moments import Moments
from dk2pnet.decompose.solve import Factors
from dk2pnet.deploy.emit import plain_model
from dk2pnet.deploy.export import check_onnx, export_onnx, onnx_bytes
from dk2pnet.deploy.latency import is_onnx
from dk2pnet.deploy.quantize import quantize_onnx
from dk2pnet.digest import digest_of
from dk2pnet.errors import InputError, Refused, first_line
from dk2pnet.layer import DKConv2d, set_fast_form, set_form
from dk2pnet.measure import evaluation, macs, parameters
from dk2pnet.modules import copy_model, make_weights_plain
from dk2pnet.networks.network import Corrections, Settings, Site, Solution
from dk2pnet.networks.saved import load_student, save_student
from dk2pnet.networks.torch.convert import with_kernels
from dk2pnet.networks.torch.corrections import (
    correct_biases,
    has_batch_norm,
    match_batch_norm,
    reestimate_batch_norm,
    statistics_are_folded,
)
from dk2pnet.networks.torch.gather import gather_moments
from dk2pnet.networks.torch.reconstruct import reconstruct
from dk2pnet.networks.torch.sites import find_convolutions
from dk2pnet.plan import Plan
from dk2pnet.run.run import Run
from dk2pnet.tasks import squared_error
from dk2pnet.training.recipe import Recipe
from dk2pnet.training.trainer import TUNING, TrainingOptions

__all__ = ["TorchNetwork"]

# Images that batch norms are compared on with the teacher's: more change nothing.
_NORM_IMAGES = 512
# A start whose outputs are off by more than this (relative squared error) has a longer way to go, in larger steps.
_FAR, _FAR_RATE = 1 / 3, 3e-2
# Held-out images by which a file is compared with the network, and how far they may differ (of noise: `check_onnx`).
_COMPARED, _COMPARED_BATCHES, _TOLERANCE = 16, 4, 1e-3
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_FROZEN_SHARE = 0.3  # the rate with batch norm frozen, as a share of the usual one


@dataclass
class TorchNetwork:
    """A module with its weights; `plan` where it was compressed before. Source of the protocol: `networks.network`."""

    model: nn.Module
    spec: dict[str, Any] | None = None
    normalization: Normalization | None = None
    plan: Plan | None = None
    example: Tensor = field(default_factory=lambda: torch.zeros(1))
    given: nn.Module | None = None  # the user's own, which is never changed
    task: str | None = None
    calls: dict[str, int] = field(default_factory=dict)  # of a convolution, in one forward pass
    batching: Batching = Batching()

    default_criterion = "loss"
    reconstructs_first = False  # it takes minutes, which are worth more as steps of tuning (docs/tuning.md)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.example.device

    @property
    def forms(self) -> dict[str, str]:
        """Of its own DK layers."""
        return self.plan.forms if self.plan is not None else {}

    @cached_property
    def macs(self) -> int:
        """Of one image."""
        return macs(self.model, self.example)

    @property
    def parameters(self) -> int:
        """Shared ones once."""
        return parameters(self.model)

    @property
    def facts(self) -> dict[str, Any]:
        """Nothing more."""
        return {}

    @property
    def caveats(self) -> list[str]:
        """None."""
        return []

    @property
    def layers(self) -> dict[str, DKConv2d]:
        """All DK layers, by each of their names."""
        modules = self.model.named_modules(remove_duplicate=False)
        return {name: module for name, module in modules if isinstance(module, DKConv2d)}

    # -- before any work ---------------------------------------------------------------------------------------------

    def prepare(self, example: Tensor | Feed | None, input_size: int | None, run: Run) -> None:
        """Copy the module to the run's device, and run `example` through it, or an image of the size that is known."""
        if example is None:
            shape = self.plan.input_shape if self.plan is not None else None
            if shape is None and input_size is not None:
                shape = [(self.spec or {}).get("in_channels") or 3, input_size, input_size]
            if shape is None:
                raise InputError(
                    "the size of the images is not known; give --data or --input-size (in Python: example_input)"
                )
            example = torch.zeros(1, *shape)
        if not isinstance(example, Tensor) or example.dim() != 4 or not example.is_floating_point():
            what = f"{example.dtype} of shape {tuple(example.shape)}" if isinstance(example, Tensor) else "no tensor"
            raise InputError(f"example_input is {what}; expected a float tensor (1, C, H, W)")
        self.given = self.given or self.model
        self.model = make_weights_plain(copy_model(self.model)).eval().to(run.device)
        for parameter in self.model.parameters():  # of a frozen one the students' layers would not be tuned
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
        self.example = example[:1].detach().to(run.device)
        self._check_output()

    def _check_output(self) -> None:
        try:
            found, again = (predict(self.model, [(self.example, None)], self.device) for _ in range(2))
        except InputError:
            raise
        except Exception as error:  # whatever the network itself raises
            if self._answers_of_the_original() is not None:
                raise self._captured() from error
            self._check_inputs()
            kinds = {parameter.dtype for parameter in self.model.parameters() if parameter.is_floating_point()}
            if len(kinds) == 1 and kinds != {self.example.dtype}:
                raise InputError(
                    f"the network's weights are {kinds.pop()} and the images {self.example.dtype}; give the network in "
                    f"{self.example.dtype}, as by model.float()"
                ) from error
            raise InputError(
                f"the network cannot run an image of shape {tuple(self.example.shape)} ({first_line(error)}); "
                "give images of its size (--input-size)"
            ) from error
        self._check_number(len(found.names))
        if not all(_alike(a, b) for a, b in zip(found.outputs, again.outputs, strict=True)):
            raise InputError(
                "the network gives other outputs each time for the same image, also in evaluation mode, so nothing can "
                "be compared with it; look for dropout without training=self.training"
            )
        self._check_copy()

    def _check_inputs(self) -> None:
        """Refuse a network that takes more than images, or was exported for batches of one size."""
        if any("guards" in name for name, _ in self.model.named_modules()):  # as torch.export leaves
            raise InputError(
                "the network is an exported program, which takes what it was exported with; give the module it was "
                "made of, or write it as ONNX and give that file"
            )
        takes = inspect.signature(self.model.forward).parameters.values()
        needed = [each.name for each in takes if each.default is each.empty and each.kind in _POSITIONAL]
        if len(needed) > 1:
            raise InputError(
                f"the network's forward takes {', '.join(needed)}, and images are one input; give a module whose "
                "forward takes images alone, and calls it"
            )

    def _check_number(self, one: int) -> None:
        """Refuse a network with as many outputs as it finds objects, or images: none belongs to one of another's."""
        try:
            two = len(predict(self.model, [(torch.cat([self.example] * 2), None)], self.device).names)
        except Exception:  # it may take one image only, which will be met again
            return
        if two != one:
            raise InputError(
                f"the network gives {one} outputs for one image and {two} for two, as detectors that select boxes do, "
                "so that students cannot be compared with it; give the part of it that always gives as many "
                "(model.backbone), and put the student in its place"
            )

    def _check_copy(self) -> None:
        """Refuse a network whose copy is not one of its own: hooks and functions in it that captured the original
        change the original's attributes, and the copy goes on answering by what those were when it was made."""
        original = self._answers_of_the_original()
        if original is None:
            return
        assert self.given is not None
        with _Foreign(self.given, self.model) as foreign, evaluation(self.model):
            self.model(self.example)
        if foreign.found:
            raise self._captured("computes with weights of the network itself")
        for x, wanted in zip(self._two_inputs(), original, strict=True):
            copied = predict(self.model, [(x, None)], self.device).outputs
            same = len(copied) == len(wanted.outputs)
            if not same or not all(_alike(a, b) for a, b in zip(wanted.outputs, copied, strict=True)):
                raise self._captured()

    def _two_inputs(self) -> list[Tensor]:
        noise = torch.randn(self.example.shape, generator=torch.Generator().manual_seed(0))
        return [self.example, noise.to(self.example)]

    def _answers_of_the_original(self) -> list[Predictions] | None:
        """None where it cannot run either."""
        if self.given is None:
            return None
        try:
            return [predict(self.given, [(x, None)], self.home) for x in self._two_inputs()]
        except Exception:
            return None

    def _captured(self, what: str = "answers otherwise than the network itself") -> InputError:
        return InputError(
            f"a copy of {type(self.given).__name__} {what}: a hook or a function in it has captured the original, as "
            "forward hooks that write to self and lambdas that read it do, so that no student could be told apart from "
            "it; let forward() do that"
        )

    @property
    def home(self) -> torch.device:
        """Where the network that was given lies."""
        return next((p.device for p in (self.given or self.model).parameters()), torch.device("cpu"))

    def one_at_a_time(self) -> bool:
        """A module takes any number."""
        return False

    def fit(self, memory: int) -> bool:
        """Of images that are read here; a user's own batches stay as they are."""
        size = self.batching.size or batch_size_for(self.example.shape[2:])
        maps = 4 * max((site.activation for site in self.sites()), default=0)
        fitting = max(memory // max(maps, 1), 1)
        if fitting >= size:
            return False
        self.batching = Batching(fitting)
        return True

    def arrays(self, path: str) -> Arrays:
        """Not yet: a module takes images."""
        raise InputError(f"{path} holds arrays, which feed .onnx models; give a data set, or batches in Python")

    def sites(self, keep: Sequence[str] = (), first: bool = False) -> list[Site]:
        """By running the example."""
        found = find_convolutions(self.model, self.example, keep, first)
        self.calls = {site.name: site.calls for site in found}
        return found

    def digests(self) -> dict[str, str]:
        """Of the weights."""
        return {"digest_of_weights": digest_of(self.model.state_dict())}

    # -- what it answers ---------------------------------------------------------------------------------------------

    def predict(self, batches: Batches, run: Run, what: str = "", total: int = 0) -> Predictions:
        """In evaluation mode, on the device where it is."""
        return predict(self.model, batches, run.device, run.says(what, total) if what else None, self.task)

    # -- students ----------------------------------------------------------------------------------------------------

    def moments(
        self, sites: Mapping[str, Site], samples: Samples, gradients: bool, memory: int, run: Run
    ) -> Iterator[dict[str, Moments]]:
        """Each of several processes gathers from its part of the images."""
        total = samples.counts["calibration"]
        start, stop = (total * each // processes.count() for each in (processes.rank(), processes.rank() + 1))
        yield from gather_moments(
            self.model,
            {name: site.conv for name, site in sites.items()},
            samples.gather if stop - start == total else Part(samples.gather, start, stop),
            gradients=gradients,
            memory=memory,
            seed=run.seed,
            first_image=start,
            device=self.device,
            progress=lambda what, done: run.progress(f"moments, {what}", done, stop - start),
        )

    def _student(self, model: nn.Module) -> TorchNetwork:
        set_fast_form(model, self.device)
        return replace(self, model=model)

    def with_kernels(self, counts: Mapping[str, Tensor], factors: Mapping[str, Factors] | None = None) -> TorchNetwork:
        """A copy with DK layers; `Refused` where the network does not call one where it stands."""
        student = self._student(with_kernels(self.model, counts, factors))
        if factors is not None:
            _check_called(student.model, {name: self.calls.get(name, 1) for name in counts}, self.example)
        return student

    def corrections(
        self, student: TorchNetwork, solution: Solution, samples: Samples, how: Settings, run: Run
    ) -> Corrections:
        """The asymmetric reconstruction, then batch norm re-estimated, or biases where there is none."""
        clock = run.clock
        with clock("correct"):
            if has_batch_norm(student.model):
                matched = student._matched(self, spread(samples, _NORM_IMAGES))
                if (yield "batch-norm re-estimation", matched):
                    student = matched
        if how.reconstruct:
            with clock("reconstruct"):
                better = self._reconstructed(solution, samples, how.memory, run)
            if (yield "layer-by-layer reconstruction", better):
                assert better is not None
                student = better
        with clock("correct"):
            if not has_batch_norm(student.model):
                corrected = student._student(copy_model(student.model))
                order = [site.name for site in self.sites()]
                correct_biases(corrected.model, self.model, order, samples.gather, self.device)
                yield "bias correction", corrected
            elif how.reconstruct and better is not None:
                yield (
                    "batch-norm re-estimation after reconstruction",
                    better._matched(self, spread(samples, _NORM_IMAGES)),
                )

    def _matched(self, teacher: TorchNetwork, batches: Batches) -> TorchNetwork:
        corrected = self._student(copy_model(self.model))
        match_batch_norm(corrected.model, teacher.model, batches, self.device)
        return corrected

    def after_tuning(self, student: TorchNetwork, batches: Batches, run: Run) -> Corrections:
        """Batch norms matched to the teacher's, or by the student's own statistics, which it has learnt with."""
        if has_batch_norm(student.model):
            what = "batch-norm re-estimation after tuning"
            yield what, student._matched(self, batches)
            yield f"{what}, by its own statistics", student._renormalized(batches)

    def _renormalized(self, batches: Batches) -> TorchNetwork:
        corrected = self._student(copy_model(self.model))
        reestimate_batch_norm(corrected.model, batches, self.device)
        return corrected

    def _reconstructed(self, solution: Solution, samples: Samples, memory: int, run: Run) -> TorchNetwork | None:
        """The student of the asymmetric reconstruction; None where it gains nothing."""
        dense, sites = copy_model(self.model), self.sites()
        modules = dict(dense.named_modules())
        counts = solution.counts
        converted = dict(with_kernels(self.model, counts, solution.factors).named_modules())
        with torch.no_grad():
            for name in counts:
                conv, layer = modules[name], converted[name]
                assert isinstance(conv, nn.Conv2d)
                assert isinstance(layer, DKConv2d)
                conv.weight.copy_(layer.fold())
        found = reconstruct(
            self.model,
            dense,
            sites,
            solution.factors,
            samples.gather,
            images=samples.counts["calibration"],
            memory=memory,
            seed=run.seed,
            device=self.device,
            progress=run.says("layer-by-layer reconstruction", len(counts)),
        )
        if not found:
            return None
        student = self._student(with_kernels(self.model, counts, {**solution.factors, **found}))
        state = student.model.state_dict()  # biases and running means have moved too
        for name, value in dense.state_dict().items():
            if name in state:
                state[name].copy_(value)
        return student

    def learner(self, samples: Samples, sites: Mapping[str, Site], run: Run) -> TorchLearner:
        """Every PyTorch network can be tuned."""
        names = {name: name for name in sites}
        return TorchLearner(self.model, self.example, self.normalization, names, self.batching.size)

    # -- on the way out ----------------------------------------------------------------------------------------------

    def deployable(self, target: str, forms: Mapping[str, str]) -> Any:
        """Content of an ONNX file, or a module of plain layers."""
        forms = {**self.forms, **forms}
        if not is_onnx(target):
            return plain_model(self.model, forms)
        content = self.onnx(forms)
        # Its time does not depend on the ranges of the activations.
        return quantize_onnx(content, [self.example.cpu()]) if target == "onnxruntime-int8" else content

    def onnx(self, forms: Mapping[str, str]) -> bytes:
        """By PyTorch's exporters."""
        return onnx_bytes(self.model, self.example, forms={**self.forms, **forms})

    def save(self, folder: Path, plan: Plan, samples: Samples | None, run: Run) -> float | None:
        """model.onnx, model.safetensors and plan.json."""
        self.model.cpu().eval()
        set_form(self.model, "branches")
        images = () if samples is None else [x[:_COMPARED] for x, _ in islice(samples.held_out, _COMPARED_BATCHES)]
        difference = write_onnx(self.model, plan, self.example.cpu(), folder / "model.onnx", images)
        save_student(self.model, plan, folder)
        return difference

    def save_unfinished(self, folder: Path, plan: Plan) -> None:
        """Weights and plan."""
        save_student(self.model, plan, folder)

    def load_unfinished(self, folder: Path) -> tuple[TorchNetwork, Plan]:
        """On the device of this network."""
        model, plan = load_student(folder, factory=lambda: copy_model(self.model).cpu())
        return self._student(model.to(self.device)), plan

    def result(self, plan: Plan) -> nn.Module:
        """The module, on the device of the one that was given."""
        self.model.eval()
        set_form(self.model, "branches")
        return self.model.to(self.home)


@dataclass
class TorchLearner:
    """The modules themselves."""

    teacher: nn.Module
    example: Tensor
    normalization: Normalization | None
    names: Mapping[str, str]
    at_once: int | None
    options: TrainingOptions = TUNING

    def data(self, samples: Samples, memory: float) -> ImageData | TensorImages | Batches:
        """Images, which can be augmented."""
        return images_of(samples.tune, memory)

    def held_out(self, samples: Samples, step: int) -> Batches:
        """As they are."""
        return Every(samples.held_out, step, True)

    def student(self, student: TorchNetwork) -> nn.Module:
        """A copy."""
        return copy_model(student.model)

    def learned(self, student: TorchNetwork, module: nn.Module) -> TorchNetwork:
        """The copy."""
        return student._student(module)

    def recipes(self, teacher: Predictions, start: Predictions, options: TrainingOptions) -> list[Recipe]:
        """Batch norm in training mode suits small images like those that the network was trained with, frozen others.

        A student that starts far from the teacher learns from larger steps (docs/results.md).
        """
        usual = options.learning_rate
        rate = _FAR_RATE if squared_error(teacher, start) > _FAR else usual
        trained, frozen = [Recipe(rate, "training")], [Recipe(usual * _FROZEN_SHARE, "frozen")]
        if not has_batch_norm(self.teacher):
            return trained
        if options.batch_norm == "frozen" or statistics_are_folded(self.teacher):
            return frozen
        return frozen + trained if max(self.example.shape[2:]) > SMALL else trained + frozen


class _Foreign(TorchDispatchMode):
    """Sees whether a copy computes with tensors of its original, as a function in it does that has captured that."""

    def __init__(self, original: nn.Module, copied: nn.Module) -> None:
        super().__init__()
        theirs, mine = ({id(t): t for t in (*m.parameters(), *m.buffers())} for m in (original, copied))
        self.places = {t.data_ptr() for t in theirs.values() if t.numel()} - {t.data_ptr() for t in mine.values()}
        self.found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for each in tree_leaves((args, kwargs)):
            if isinstance(each, Tensor) and each.numel() and each.data_ptr() in self.places:
                self.found = True
        return func(*args, **(kwargs or {}))


def write_onnx(model: nn.Module, plan: Plan, example: Tensor, path: Path, images: Sequence[Tensor] = ()) -> float:
    """Export with normalisation in the metadata; the largest relative difference to PyTorch, for noise in batches of 1
    and 7, and for batches of `images`: noise does not take every way through a network that decides by values."""
    metadata = {
        "dk2pnet": __version__,
        "input_shape": json.dumps(plan.input_shape),
        "normalization": json.dumps(plan.normalization),
    }
    export_onnx(model, example, path, forms=plan.forms, metadata=metadata)
    probes = [
        torch.randn(count, *example.shape[1:], generator=torch.Generator().manual_seed(count)).to(example.dtype)
        for count in (1, 7)
    ]
    try:
        difference = check_onnx(path, model, probes)
    except RuntimeError as error:
        raise InputError(f"the network was exported, but {error}") from error
    try:
        return max(difference, check_onnx(path, model, images, _TOLERANCE)) if images else difference
    except RuntimeError as error:
        raise InputError(
            f"the network was exported, but on held-out images {error}: what it decides by the values of its input (an "
            "if in its forward) is written as it went for one image; use torch.where, or give it without an OUT"
        ) from error


def _check_called(student: nn.Module, calls: Mapping[str, int], example: Tensor) -> None:
    """Refuse a student that runs past its new layers, always or in some of the places where the network calls them."""
    modules, called = dict(student.named_modules(remove_duplicate=False)), Counter[str]()
    with ExitStack() as stack:
        for name in calls:
            hook = modules[name].register_forward_hook(lambda *_, name=name: called.update([name]))
            stack.callback(hook.remove)
        with evaluation(student):
            student(example)
    for name, times in calls.items():
        if called[name] < times:
            raise Refused(
                f"the network does not call {name!r} where it stands, but by a reference of its own in whose place "
                f"nothing can be put; leave it dense (--keep {name})"
            )


def _alike(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding, which on a GPU may change from run to run."""
    if a.shape != b.shape or not (a.isfinite().all() and b.isfinite().all()):
        return a.shape == b.shape  # what is not finite is refused elsewhere
    return torch.allclose(a, b, 1e-2, 1e-3 * float(a.abs().max()) if a.numel() else 0.0)
