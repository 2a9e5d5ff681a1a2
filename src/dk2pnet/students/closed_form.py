"""The student before any training: calibrate once, then select, solve, replace and correct for any budget."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dk2pnet import processes
from dk2pnet.data.samples import Batches, Images, Part
from dk2pnet.decompose.solve import Factors
from dk2pnet.decompose.whiten import Whitening
from dk2pnet.deploy.costs import LatencyTable
from dk2pnet.errors import InputError, Refused
from dk2pnet.layer import DKConv2d, set_form
from dk2pnet.measure import Predictions, divergence, evaluation, is_classifier, macs, parameters, predict
from dk2pnet.modules import copy_model
from dk2pnet.networks.network import Site
from dk2pnet.networks.open import Network
from dk2pnet.networks.saved import load_student, save_student
from dk2pnet.networks.torch.convert import convert, with_kernels
from dk2pnet.networks.torch.corrections import correct_biases, has_batch_norm, reestimate_batch_norm
from dk2pnet.networks.torch.gather import gather_moments
from dk2pnet.networks.torch.reconstruct import reconstruct
from dk2pnet.networks.torch.sites import find_convolutions
from dk2pnet.plan import Budget, Plan
from dk2pnet.run.clock import Clock
from dk2pnet.run.out_folder import disk_message, write_json
from dk2pnet.run.progress import Progress, silent
from dk2pnet.students.allocate import CRITERIA, energies_of, make_plan, solve_layers, spend
from dk2pnet.students.latency_budget import Spent, choose_forms, deployable, spend_latency
from dk2pnet.students.moments_store import MomentStore
from dk2pnet.training.whitened import whitening_of

__all__ = ["ClosedForm", "Solved", "keep_better", "measure_of", "renormalized", "solved_once"]

# Where not all images fit into memory at once, the layer-by-layer reconstruction makes do with so many of them.
_RECONSTRUCTION_IMAGES = 256
# Tuning estimates batch norm itself: where it comes next, so many images give the figures of its start.
_START_IMAGES = 512


@dataclass
class Solved:
    """A student, its plan, which corrections were kept, and what training it in the whitened form needs.

    ``search``: of a latency budget, what was asked of the table and what was measured. ``factors`` of the replaced
    layers, before any correction; a student that was read from a folder has none.
    """

    student: nn.Module
    plan: Plan
    decisions: list[dict[str, Any]] = field(default_factory=list)
    search: list[dict[str, float]] = field(default_factory=list)
    whitenings: dict[str, Whitening] = field(default_factory=dict)
    factors: Mapping[str, Factors] = field(default_factory=dict)


class ClosedForm:
    """The teacher with the moments of its convolutions, gathered when entered; `solve` gives the student of a budget.

    Example::

        with ClosedForm(teacher, teacher_held, network, images, example, "loss") as closed:
            solved = closed.solve(Budget.parse("macs=0.44"))
    """

    def __init__(
        self,
        teacher: nn.Module,
        teacher_held: Predictions | None,
        network: Network,
        images: Images | None,
        example: Tensor,
        criterion: str,
        *,
        keep: Sequence[str] = (),
        first: bool = False,
        memory: int = 2 * 2**30,
        rebuild: bool = True,
        seed: int = 0,
        target: str = "onnxruntime",
        threads: int | None = None,
        clock: Clock | None = None,
        progress: Progress = silent,
    ) -> None:
        self.teacher, self.teacher_held, self.network, self.images = teacher, teacher_held, network, images
        self.example, self.criterion, self.memory, self.rebuild = example, criterion, memory, rebuild
        self.seed, self.target, self.threads = seed, target, threads
        self.clock, self.progress = clock or Clock(), progress
        self.sites = find_convolutions(teacher, example, keep, first)
        self.open = {site.name: site for site in self.sites if not site.reason}
        if not self.open:
            raise InputError("the network has no convolution that can be decomposed: " + _reasons(self.sites))
        self.macs, self.parameters = macs(teacher, example), parameters(teacher)
        self.energies: dict[str, Tensor] = {}
        self.store = MomentStore()

    def __enter__(self) -> ClosedForm:
        self.store.__enter__()
        try:
            self._gather()
        except BaseException:
            self.store.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.store.__exit__(kind, error, trace)

    def _gather(self) -> None:
        """Moments and energies of all convolutions that can be decomposed."""
        needs_images, needs_gradients = CRITERIA[self.criterion]
        if not needs_images:
            with self.clock("spectra"):
                self.energies = {name: energies_of(site, None, self.criterion) for name, site in self.open.items()}
            return
        assert self.images is not None
        total = self.images.counts["calibration"]
        # Each process gathers from its part of the images.
        start, stop = (total * each // processes.count() for each in (processes.rank(), processes.rank() + 1))
        groups = gather_moments(
            self.teacher,
            {name: site.module for name, site in self.open.items()},  # type: ignore[misc]
            self.images.gather if stop - start == total else Part(self.images.gather, start, stop),
            gradients=needs_gradients,
            memory=self.memory,
            seed=self.seed,
            first_image=start,
            device=self.example.device,
            progress=lambda what, done: self.progress(f"moments, {what}", done, stop - start),
        )
        while (group := self.clock.time("moments", lambda: next(groups, None))) is not None:
            for moments in group.values():
                moments.merge(processes.sum_over_all)
            self.store.add_group(group)
            with self.clock("spectra"):
                self.energies |= {name: energies_of(self.open[name], self.store, self.criterion) for name in group}

    def solve(self, budget: Budget, whiten: bool = False) -> Solved:
        """Select, solve, replace and correct.

        With `whiten`, for a student that is going to be tuned: also the whitenings of all DK layers, and no
        reconstruction, which takes most of the time (`without_tuning` makes up for it); whether tuning starts better
        from it is not measured.
        """
        search: list[dict[str, float]] = []
        forms: dict[str, str] = {}
        if budget.kind == "latency":
            with self.clock("latency search"):
                spent = self._spend_time(budget.value)
            counts, forms, search = spent.counts, spent.forms, spent.attempts
        else:
            counts = spend(budget, self.open, self.energies, self.macs, self.parameters)
        replaced = {name: count for name, count in counts.items() if count is not None}
        plan = make_plan(
            self.sites,
            counts,
            self.energies,
            self.network,
            self.example,
            self.criterion,
            budget,
            self.macs,
            self.parameters,
        )
        for layer in plan.layers:
            layer.form = forms.get(layer.name, layer.form)  # one of dominant kernels already keeps its own
        factors = self._factors(replaced)
        student = self._converted(plan, factors)
        _check_called(student, replaced, self.example)
        solved = Solved(student, plan, search=search, factors=factors)
        if replaced and self.images is not None:
            self._correct(solved, replaced, tuned_next=whiten)
        if whiten:
            with self.clock("whiten"):
                modules = dict(solved.student.named_modules(remove_duplicate=False))
                has_moments = CRITERIA[self.criterion][0]
                for name in replaced:
                    layer = modules[name]
                    assert isinstance(layer, DKConv2d)
                    solved.whitenings[name] = whitening_of(layer, self.store[name].A() if has_moments else None)
        return solved

    def without_tuning(self, solved: Solved) -> Solved:
        """What `solve` gives without `whiten` at the same plan, for a student whose tuning was not kept."""
        counts = {
            layer.name: torch.tensor(layer.counts)
            for layer in solved.plan.layers
            if layer.counts is not None and layer.name in self.open
        }
        factors = solved.factors or self._factors(counts)
        student = self._converted(solved.plan, factors)
        again = Solved(student, solved.plan, list(solved.decisions), solved.search, factors=factors)
        self._correct(again, counts, tuned_next=False)
        return again

    def _factors(self, counts: Mapping[str, Tensor]) -> Mapping[str, Factors]:
        self.progress("solving", 0, len(counts))
        with self.clock("solve"):
            return solve_layers(counts, self.open, self.store, self.criterion, self.progress)

    def _converted(self, plan: Plan, factors: Mapping[str, Factors]) -> nn.Module:
        student = convert(self.teacher, plan, factors)
        set_form(student, "folded")
        return student

    def _correct(self, solved: Solved, counts: Mapping[str, Tensor], tuned_next: bool) -> None:
        """Reconstruction (not before tuning), then batch norm or biases; each is kept where it brings the student
        closer."""
        assert self.images is not None
        assert self.teacher_held is not None
        device, held, gather = self.example.device, self.images.held_out, self.images.gather
        if self.rebuild and not tuned_next and CRITERIA[self.criterion][0]:
            with self.clock("reconstruct"):
                better = self._reconstructed(solved.plan, solved.factors, counts)
            solved.student = keep_better(
                "layer-by-layer reconstruction",
                solved.student,
                better,
                self.teacher_held,
                held,
                device,
                solved.decisions,
            )
        with self.clock("correct"):
            if has_batch_norm(solved.student):
                if tuned_next:
                    gather = Part(gather, 0, _START_IMAGES)
                solved.student = renormalized(solved.student, self.teacher_held, gather, held, device, solved.decisions)
            else:
                corrected = copy_model(solved.student)
                correct_biases(corrected, self.teacher, [site.name for site in self.sites], gather, device)
                solved.student = keep_better(
                    "bias correction", solved.student, corrected, self.teacher_held, held, device, solved.decisions
                )

    def _reconstructed(self, plan: Plan, factors: Mapping[str, Factors], counts: Mapping[str, Tensor]) -> nn.Module:
        """The student of the asymmetric reconstruction."""
        assert self.images is not None
        dense = copy_model(self.teacher)
        modules = dict(dense.named_modules())
        converted = dict(convert(self.teacher, plan, factors).named_modules())
        with torch.no_grad():
            for name in counts:
                modules[name].weight.copy_(converted[name].fold())  # type: ignore[union-attr,operator]
        images_used = self.images.counts["calibration"]
        batches: Batches = self.images.gather
        activation = max(site.activation for site in self.sites)
        if 4 * 3 * activation * images_used > self.memory / 2 and images_used > _RECONSTRUCTION_IMAGES:
            images_used, batches = _RECONSTRUCTION_IMAGES, Part(self.images.gather, 0, _RECONSTRUCTION_IMAGES)
        found = reconstruct(
            self.teacher,
            dense,
            self.sites,
            counts,
            batches,
            images=images_used,
            memory=self.memory,
            seed=self.seed,
            device=self.example.device,
            progress=lambda done: self.progress("layer-by-layer reconstruction", done, len(counts)),
        )
        student = self._converted(plan, {**factors, **found})
        state = student.state_dict()  # biases and running means have moved too
        for name, value in dense.state_dict().items():
            if name in state:
                state[name].copy_(value)
        return student

    def _spend_time(self, fraction: float) -> Spent:
        """Spend a latency budget; with several processes the main one measures for all."""
        found: list[Spent | InputError | None] = [None]
        if processes.is_main():
            sizes = {name: site.input_size for name, site in self.open.items()}
            table = LatencyTable(self.target, self.threads)
            before = self.network.forms
            dense = deployable(self.teacher, self.example, self.target, before)

            def build(counts: Mapping[str, Tensor | None]) -> tuple[Any, dict[str, str]]:
                student = with_kernels(self.teacher, counts)
                forms = choose_forms(student, sizes, table)
                return deployable(student, self.example, self.target, before | forms), forms

            try:
                found[0] = spend_latency(
                    fraction, self.open, self.energies, table, dense, build, self.example.cpu(), progress=self.progress
                )
            except InputError as error:
                found[0] = error
        processes.broadcast(found)
        if isinstance(found[0], InputError):
            raise found[0]
        assert found[0] is not None
        return found[0]


def _check_called(student: nn.Module, names: Iterable[str], example: Tensor) -> None:
    """Refuse a student that runs past its new layers."""
    modules, called = dict(student.named_modules(remove_duplicate=False)), set()
    with ExitStack() as stack:
        for name in names:
            hook = modules[name].register_forward_hook(lambda *_, name=name: called.add(name))
            stack.callback(hook.remove)
        with evaluation(student):
            student(example)
    for name in names:
        if name not in called:
            raise Refused(
                f"the network does not call {name!r} where it stands, but by a reference of its own in whose place "
                f"nothing can be put; leave it dense (--keep {name})"
            )


def measure_of(teacher_held: Predictions) -> str:
    """What `measure.divergence` measures for this network."""
    return "KL(teacher || student)" if is_classifier(teacher_held.outputs) else "relative squared error"


def keep_better(
    what: str,
    before: nn.Module,
    after: nn.Module,
    teacher_held: Predictions,
    held_out: Batches,
    device: torch.device,
    decisions: list[dict[str, Any]],
) -> nn.Module:
    """The one of two students whose outputs on the held-out images are closer to the teacher's."""
    distances = [divergence(teacher_held, predict(model, held_out, device)) for model in (before, after)]
    processes.broadcast(distances)  # all take the main process's decision
    old, new = distances
    measure = measure_of(teacher_held)
    decisions.append({"what": what, "before": old, "after": new, "kept": new < old, "measure": measure})
    return after if new < old else before


def renormalized(
    student: nn.Module,
    teacher_held: Predictions,
    batches: Batches,
    held_out: Batches,
    device: torch.device,
    decisions: list[dict[str, Any]],
    when: str = "",
) -> nn.Module:
    """The student with its batch norm re-estimated on `batches`, where that brings it closer on `held_out`."""
    corrected = copy_model(student)
    reestimate_batch_norm(corrected, batches, device)
    what = f"batch-norm re-estimation {when}".rstrip()
    return keep_better(what, student, corrected, teacher_held, held_out, device, decisions)


def solved_once(folder: Path, teacher: nn.Module, clock: Clock, solve: Callable[[], Solved]) -> Solved:
    """What `solve` gives, kept in `folder`, so that a run that was killed does not solve again.

    With several processes all of them take the main one's.
    """
    kept, notes = folder / "closed-form", "closed-form.json"
    factors: Mapping[str, Factors] = {}
    if not (folder / notes).exists():
        solved = solve()
        factors = solved.factors
        if processes.is_main():
            shutil.rmtree(kept, ignore_errors=True)
            kept.mkdir()
            constants = {
                f"{name}/{key}": tensor.contiguous()
                for name, whitening in solved.whitenings.items()
                for key, tensor in asdict(whitening).items()
            }
            facts = {"decisions": solved.decisions, "search": solved.search, "seconds": clock.seconds}
            try:
                save_student(solved.student, solved.plan, kept)
                save_file(constants, str(kept / "whitening.safetensors"))
                write_json(folder / notes, facts)
            except (SafetensorError, OSError) as error:
                raise InputError(disk_message(kept, error)) from error
        processes.wait()
    found = json.loads((folder / notes).read_text(encoding="utf-8"))
    clock.seconds = found["seconds"]
    student, plan = load_student(kept, factory=lambda: copy_model(teacher).cpu())
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(str(kept / "whitening.safetensors")).items():
        name, _, part = key.rpartition("/")
        parts.setdefault(name, {})[part] = tensor
    whitenings = {name: Whitening(**tensors) for name, tensors in parts.items()}
    return Solved(student, plan, found["decisions"], found["search"], whitenings, factors)


def _reasons(sites: Sequence[Site]) -> str:
    return (
        "; ".join(f"{site.name}: {site.reason}" for site in sites[:4]) + (" ..." if len(sites) > 4 else "")
        or "none at all"
    )
