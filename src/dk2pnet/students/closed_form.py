"""The student before any training: gather once, then select, solve, replace and correct for any budget."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dk2pnet import processes
from dk2pnet.decompose.moments import CRITERIA
from dk2pnet.decompose.solve import Factors
from dk2pnet.decompose.whiten import Whitening
from dk2pnet.errors import InputError
from dk2pnet.memory import Shares
from dk2pnet.networks.network import Network, NotLearnable, Settings, Solution
from dk2pnet.plan import Budget, Plan
from dk2pnet.run.out_folder import disk_message, write_json
from dk2pnet.run.run import Run
from dk2pnet.students.allocate import energies_of, make_plan, solve_layers, spend
from dk2pnet.students.decisions import Judge
from dk2pnet.students.latency_budget import spend_time
from dk2pnet.students.moments_store import MomentStore
from dk2pnet.students.teacher import Teacher
from dk2pnet.training.whitened import whitening_of

__all__ = ["ClosedForm", "Solved", "solved_once"]


@dataclass
class Solved:
    """A student, its plan, which corrections were kept, and what training it in the whitened form needs.

    ``search``: of a latency budget, what was asked of the table and what was measured. ``factors`` of the replaced
    layers, before any correction; a student that was read from a folder has none.
    """

    student: Network
    plan: Plan
    decisions: list[dict[str, Any]] = field(default_factory=list)
    search: list[dict[str, Any]] = field(default_factory=list)
    whitenings: dict[str, Whitening] = field(default_factory=dict)
    factors: Mapping[str, Factors] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.corrections = len(self.decisions)  # later ones are of tuning


class ClosedForm:
    """The teacher with the moments of its convolutions, gathered when entered; `solve` gives the student of a budget.

    Example::

        with ClosedForm(teacher, run) as closed:
            solved = closed.solve(Budget.parse("macs=0.44"))
    """

    def __init__(self, teacher: Teacher, run: Run) -> None:
        self.teacher, self.run = teacher, run
        self.network, self.samples, self.criterion = teacher.network, teacher.samples, teacher.criterion
        self.memory = Shares.of(teacher.options.memory)
        self.sites, self.open = teacher.sites, teacher.open_sites
        self.macs, self.parameters = self.network.macs, self.network.parameters
        self.energies: dict[str, Tensor] = {}
        self.store = MomentStore(self.memory.kept)

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
        needs_samples, needs_gradients = CRITERIA[self.criterion]
        clock = self.run.clock
        if not needs_samples:
            with clock("spectra"):
                self.energies = {name: energies_of(site, None, self.criterion) for name, site in self.open.items()}
            return
        assert self.samples is not None
        groups = self.network.moments(self.open, self.samples, needs_gradients, self.memory.statistics, self.run)
        try:
            while (group := clock.time("moments", lambda: next(groups, None))) is not None:
                for moments in group.values():
                    moments.merge(processes.sum_over_all)
                self.store.add_group(group)
                with clock("spectra"):
                    self.energies |= {name: energies_of(self.open[name], self.store, self.criterion) for name in group}
        except NotLearnable as reason:
            raise InputError(
                f"criterion {self.criterion!r} needs gradients, and the graph cannot be had as a PyTorch module, "
                f"{reason}; use --criterion response"
            ) from reason

    def solve(self, budget: Budget, whiten: bool = False) -> Solved:
        """Select, solve, replace and correct.

        With `whiten`, for a student that is going to be tuned: also the whitenings of all DK layers, and (unless the
        network `reconstructs_first`) no reconstruction, which takes most of the time: `without_tuning` makes up for it.
        """
        search: list[dict[str, Any]] = []
        forms: dict[str, str] = {}
        if budget.kind == "latency":
            with self.run.clock("latency search"):
                spent = spend_time(budget.value, self.teacher, self.energies, self.run)
            counts, forms, search = spent.counts, spent.forms, spent.attempts
        else:
            counts = spend(budget, self.open, self.energies, self.macs, self.parameters)
        plan = make_plan(self.teacher, counts, self.energies, budget)
        for layer in plan.layers:
            layer.form = forms.get(layer.name, layer.form)  # one of dominant kernels already keeps its own
        solved = self._solved(plan, {}, [], search, whiten)
        if whiten:
            self._whiten(solved)
        return solved

    def without_tuning(self, solved: Solved) -> Solved:
        """What `solve` gives without `whiten` at the same plan, for a student whose tuning was not kept."""
        if self.network.reconstructs_first:
            return solved
        of_tuning = solved.decisions[solved.corrections :]  # the corrections before it are made again
        return self._solved(solved.plan, solved.factors, of_tuning, solved.search, False)

    def _solved(
        self,
        plan: Plan,
        factors: Mapping[str, Factors],
        decisions: list[dict[str, Any]],
        search: list[dict[str, Any]],
        tuned_next: bool,
    ) -> Solved:
        counts = {
            layer.name: torch.tensor(layer.counts)
            for layer in plan.layers
            if layer.counts is not None and layer.name in self.open
        }
        if not factors:
            self.run.progress("solving", 0, len(counts))
            with self.run.clock("solve"):
                factors = solve_layers(counts, self.open, self.store, self.criterion, self.run.progress)
        student = self.network.with_kernels(counts, factors)
        if counts and self.samples is not None:
            assert self.teacher.held is not None
            reconstruct = self.teacher.options.rebuild and CRITERIA[self.criterion][0]
            reconstruct = reconstruct and (not tuned_next or self.network.reconstructs_first)
            corrections = self.network.corrections(
                student,
                Solution(counts, factors),
                self.samples,
                Settings(reconstruct, self.memory.ways),
                self.run,
            )
            judge = Judge(self.network, self.teacher.held, self.samples.held_out, self.run)
            student = judge.apply(corrections, student, decisions)
        return Solved(student, plan, decisions, search, factors=factors)

    def _whiten(self, solved: Solved) -> None:
        has_moments = CRITERIA[self.criterion][0]
        with self.run.clock("whiten"):
            for name, layer in solved.student.layers.items():
                if name in self.open:
                    solved.whitenings[name] = whitening_of(layer, self.store[name].A() if has_moments else None)


def solved_once(folder: Path, teacher: Network, run: Run, solve: Callable[[], Solved]) -> Solved:
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
            facts = {"decisions": solved.decisions, "search": solved.search, "seconds": run.clock.seconds}
            try:
                solved.student.save_unfinished(kept, solved.plan)
                save_file(constants, str(kept / "whitening.safetensors"))
                write_json(folder / notes, facts)
            except (SafetensorError, OSError) as error:
                raise InputError(disk_message(kept, error)) from error
        processes.wait()
    found = json.loads((folder / notes).read_text(encoding="utf-8"))
    run.clock.seconds = found["seconds"]
    student, plan = teacher.load_unfinished(kept)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(str(kept / "whitening.safetensors")).items():
        name, _, part = key.rpartition("/")
        parts.setdefault(name, {})[part] = tensor
    whitenings = {name: Whitening(**tensors) for name, tensors in parts.items()}
    return Solved(student, plan, found["decisions"], found["search"], whitenings, factors)
