"""Tuning: the teacher is distilled into the student on the calibration samples, without labels, in about a minute."""

from __future__ import annotations

import json
import logging
import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from dk2pnet import processes
from dk2pnet.data import ImageData
from dk2pnet.data.samples import Samples
from dk2pnet.errors import Refused
from dk2pnet.networks.network import Network
from dk2pnet.run.out_folder import write_json
from dk2pnet.run.run import Run
from dk2pnet.students.closed_form import Solved
from dk2pnet.students.decisions import Judge
from dk2pnet.students.teacher import Teacher
from dk2pnet.training.fit import Source, fit
from dk2pnet.training.hints import find_pairs
from dk2pnet.training.trainer import NotFinite, TrainingOptions

__all__ = ["Tuner"]

_FEWEST_FOR_BATCH_NORM = 16  # images in a batch, for statistics of their own
_CROP = 0.5  # the least share of a large image
_WARM, _TIMED = 3, 5  # steps, to turn a time into a number of steps
_DROPOUTS = ("StochasticDepth", "DropBlock2d", "DropBlock3d")  # torchvision's own, whose rate is called p too

_log = logging.getLogger(__name__)


class Tuner:
    """Tunes students of one teacher on the same samples, in the same way.

    `options`: None for the learner's own, at a learning rate by how far from the teacher a student starts.
    """

    def __init__(
        self, teacher: Teacher, run: Run, options: TrainingOptions | None = None, whitened: bool = True
    ) -> None:
        assert teacher.learner is not None
        assert teacher.samples is not None
        assert teacher.held is not None
        self.teacher, self.run, self.whitened, self.rate_by_start = teacher, run, whitened, options is None
        self.learner, self.samples, self.held = teacher.learner, teacher.samples, teacher.held
        self.judge = Judge(teacher.network, self.held, self.samples.held_out, run)
        self.source = Source(
            self.learner.data(self.samples),
            teacher.named,
            self.learner.normalization,
            teacher.options.augment,
            least_crop=_CROP,
            whole=True,
        )
        options, example = options or self.learner.options, self.learner.example
        count = self.samples.counts["calibration"]
        batch = min(options.batch_size if max(example.shape[2:]) <= 64 else 32, count)
        precision = teacher.options.precision if options.precision == "auto" else options.precision
        changes: dict[str, Any] = {"batch_size": batch, "precision": precision, "seed": run.seed}
        if not isinstance(self.source.data, ImageData):  # a user's own batches are taken as they are
            batch = min(len(x) for x, _ in self.samples.gather)
        if batch < _FEWEST_FOR_BATCH_NORM:
            changes["batch_norm"] = "frozen"
        self.options = replace(options, checkpoint_every=teacher.options.checkpoint_every, **changes)
        if all_alike(self.samples):
            _log.warning("the calibration images are all alike: what is tuned on them says little about others")

    def tune(self, solved: Solved, steps: int, folder: Path | None = None) -> Network | None:
        """The tuned student, or None where tuning does not bring it closer to the teacher.

        What was decided is added to ``solved.decisions``. `folder` is for checkpoints and the log.
        """
        module = self.learner.student(solved.student)
        rate = self.options.learning_rate
        if self.rate_by_start:
            rate = self.learner.rate_for(
                self.held, solved.student.predict(self.samples.held_out, self.run), self.options
            )
        try:
            self._train(module, solved, steps, folder, rate)
        except NotFinite as error:
            what = str(error).split(";")[0]  # its advice is for a training that was asked for
            _log.warning("tuning was given up, the closed form is kept: %s", what)
            before = self.judge.divergence(solved.student)
            solved.decisions.append(self.judge.entry("tuning (given up)", before, None, False))
            return None
        tuned = self.learner.learned(solved.student, module)
        tuned = self.judge.apply(
            self.teacher.network.after_tuning(tuned, self.samples, self.run), tuned, solved.decisions
        )
        kept = self.judge.closer("tuning", solved.student, tuned, solved.decisions)
        return tuned if kept is tuned else None

    def steps_in(self, seconds: float, solved: Solved, folder: Path | None = None) -> int:
        """How many steps take so long here. Measured once: `folder` keeps the answer for a run that goes on."""
        path = folder / "steps.json" if folder is not None else None
        if path is not None and path.exists():
            return json.loads(path.read_text(encoding="utf-8"))["steps"]
        times: list[float] = []
        loud, self.run = self.run, replace(self.run, progress=lambda *_: times.append(time.perf_counter()))
        try:
            module = self.learner.student(solved.student)
            self._train(module, solved, _WARM + _TIMED, None, self.options.learning_rate)
        except NotFinite:
            return 1  # which meets it again, and gives up
        finally:
            self.run = loud
        each = statistics.median(b - a for a, b in zip(times[_WARM - 1 :], times[_WARM:], strict=False))
        found = [math.floor(seconds / each)]
        processes.broadcast(found)  # every process has to do as many
        steps = found[0]
        if steps < 1:
            raise Refused(
                f"tuning was asked for {seconds:g} s, and one step takes {each:.1f} s; give more time, or --tune 0"
            )
        if path is not None and processes.is_main():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"steps": steps})
        return steps

    def _train(self, student: nn.Module, solved: Solved, steps: int, folder: Path | None, rate: float) -> None:
        options, learner = replace(self.options, steps=steps, learning_rate=rate), self.learner
        if options.method != "kd" and not options.hints and not find_pairs(student, learner.teacher, learner.example):
            options = replace(options, method="kd", distill=1.0)  # no feature maps: the outputs alone teach
        names = learner.names
        whitenings = {names[name]: whitening for name, whitening in solved.whitenings.items()}
        with _without_dropout(student):
            fit(
                student,
                self.source,
                options,
                self.run,
                example=learner.example,
                teacher=learner.teacher,
                whitenings=whitenings if self.whitened else None,
                what="tuning",
                folder=folder,
            )


def all_alike(samples: Samples) -> bool:
    """Whether all calibration images are one and the same."""
    first = None
    for x, _ in samples.gather:
        if not isinstance(x, torch.Tensor):
            return False
        first = x[:1] if first is None else first
        if x.shape[1:] != first.shape[1:] or not torch.equal(x, first.expand_as(x)):
            return False
    return samples.counts["calibration"] > 1


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """The student starts at the teacher's answers: noise in it would only hide what is left to learn."""
    rates = {(m, "p"): m.p for m in model.modules() if isinstance(m, _DropoutNd) or type(m).__name__ in _DROPOUTS}
    # timm's, which is a float there; in other modules it may be anything.
    rates |= {
        (m, "drop_prob"): m.drop_prob for m in model.modules() if isinstance(getattr(m, "drop_prob", None), float)
    }
    try:
        for module, name in rates:
            setattr(module, name, 0.0)
        yield
    finally:
        for (module, name), rate in rates.items():
            setattr(module, name, rate)
