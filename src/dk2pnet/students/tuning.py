"""Tuning: the teacher is distilled into the student on the calibration images, without labels, in about a minute."""

from __future__ import annotations

import json
import logging
import math
import re
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from dk2pnet import processes
from dk2pnet.data import ImageData, Normalization
from dk2pnet.data.arrays import Feeds
from dk2pnet.data.samples import Images
from dk2pnet.errors import InputError, Refused
from dk2pnet.measure import Predictions, divergence, predict, squared_error
from dk2pnet.modules import copy_model
from dk2pnet.networks.torch.corrections import has_batch_norm
from dk2pnet.run.out_folder import write_json
from dk2pnet.run.progress import Progress, silent
from dk2pnet.students.closed_form import Solved, keep_better, measure_of, renormalized
from dk2pnet.training.fit import fit
from dk2pnet.training.hints import find_pairs
from dk2pnet.training.trainer import NotFinite, TrainingOptions

__all__ = ["AUTOMATIC_MACS", "Tuner", "Tuning", "tuning_of"]

AUTOMATIC_STEPS = 150
# Of one image through CIFAR's ResNet-56: 150 steps of networks up to this size take minutes on two cores.
AUTOMATIC_MACS = 125_485_696
_FEWEST_IMAGES = 100  # below this nobody has measured what automatic tuning does
_FEWEST_FOR_BATCH_NORM = 16  # images in a batch, for statistics of their own
_CROP = 0.5  # the least share of a large image
_WARM, _TIMED = 3, 5  # steps, to turn a time into a number of steps
_DROPOUTS = ("StochasticDepth", "DropBlock2d", "DropBlock3d")  # torchvision's own, whose rate is called p too
_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|min|h)")
_SECONDS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}

# Hints and rates are chosen by agreement on unused training images (docs/results.md); the form is the prototype's.
OPTIONS = TrainingOptions(
    optimizer="adam", learning_rate=1e-2, warmup=10, method="euclidean", distill=0.0, batch_norm="training"
)
# A start whose outputs are off by more than this (relative squared error) has a longer way to go, in larger steps.
_FAR, _FAR_RATE = 1 / 3, 3e-2

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tuning:
    """So many steps, or what fits into so many seconds; 0 steps for none, for the reason `said`."""

    steps: int = 0
    seconds: float | None = None
    said: str = ""

    @property
    def wanted(self) -> bool:
        """Whether any tuning is to be done."""
        return self.steps > 0 or self.seconds is not None


def tuning_of(tune: str | int | None, *, epochs: int, images: Images | Feeds | None, macs: int) -> Tuning:
    """What ``--tune`` asks for; None (or ``auto``) is 150 steps where they are cheap and there are images enough.

    `macs`: of the teacher, for one image.

    Raises
    ------
    InputError
        When the text is not understood, or tuning was asked for and cannot be done.
    """
    count = images.counts["calibration"] + images.counts["held out"] if images is not None else 0
    if tune is None or tune == "auto":
        if epochs:
            return Tuning(said="")  # the training does what tuning would
        if images is None:
            return Tuning(said="no tuning: there are no images; give --data, and --tune 150 for so many steps")
        if count < _FEWEST_IMAGES:
            return Tuning(
                said=f"no tuning: {count} calibration images are fewer than {_FEWEST_IMAGES}; give more, or --tune 150"
            )
        if macs > AUTOMATIC_MACS:
            return Tuning(
                said=f"no tuning: a step would take long in a network of {macs / 1e6:,.0f} M multiply-adds; "
                "--tune 10m gives it ten minutes"
            )
        return Tuning(AUTOMATIC_STEPS)
    wanted = _parse(tune)
    if wanted.wanted and (images is None or images.counts["calibration"] < 2):
        have = "no images" if images is None else f"{count} image(s) for calibration"
        raise InputError(
            f"tuning was asked for (--tune {tune}) with {have}, a fifth of which only decides; "
            "give at least 3 images with --data, or --tune 0"
        )
    return wanted


def _parse(tune: str | int) -> Tuning:
    text = str(tune).strip()
    match = _TIME.fullmatch(text)
    if match and float(match[1]) > 0:
        return Tuning(seconds=float(match[1]) * _SECONDS[match[2]])
    if text.isdecimal():
        return Tuning(int(text))
    raise InputError(f"tune is {tune!r}; expected a number of steps (150), a time (2m, 90s) or 0 for none")


class Tuner:
    """Tunes students of one teacher on the same images, in the same way.

    `normalization`, `augment`: of the images of a data set (None where they are a user's own batches). `options`: None
    for `OPTIONS` at a learning rate by how far from the teacher a student starts.
    """

    def __init__(
        self,
        teacher: nn.Module,
        teacher_held: Predictions,
        images: Images,
        *,
        example: Tensor,
        name: str | None = None,
        normalization: Normalization | None = None,
        augment: str | None = None,
        precision: str = "auto",
        seed: int = 0,
        checkpoint_every: float = 60.0,
        options: TrainingOptions | None = None,
        whitened: bool = True,
        progress: Progress = silent,
    ) -> None:
        self.teacher, self.teacher_held, self.images, self.example = teacher, teacher_held, images, example
        self.name, self.normalization, self.augment, self.progress = name, normalization, augment, progress
        self.whitened, self.rate_by_start = whitened, options is None
        options = options or OPTIONS
        count = images.counts["calibration"]
        batch = min(options.batch_size if max(example.shape[2:]) <= 64 else 32, count)
        changes: dict[str, Any] = {"batch_size": batch, "precision": precision, "seed": seed}
        if not isinstance(images.tune, ImageData):  # a user's own batches are taken as they are
            batch = min(len(x) for x, _ in images.gather)
        if batch < _FEWEST_FOR_BATCH_NORM:
            changes["batch_norm"] = "frozen"
        self.options = replace(options, checkpoint_every=checkpoint_every, **changes)
        if all_alike(images):
            _log.warning("the calibration images are all alike: what is tuned on them says little about others")

    def tune(self, solved: Solved, steps: int, folder: Path | None = None) -> nn.Module | None:
        """The tuned student, or None where tuning does not bring it closer to the teacher.

        What was decided is added to ``solved.decisions``. `folder` is for checkpoints and the log.
        """
        device, held = self.example.device, self.images.held_out
        tuned, start = copy_model(solved.student), predict(solved.student, held, device)
        try:
            self._train(tuned, solved, steps, folder, self.rate_for(start))
        except NotFinite as error:
            what = str(error).split(";")[0]  # its advice is for a training that was asked for
            _log.warning("tuning was given up, the closed form is kept: %s", what)
            before = divergence(self.teacher_held, start)
            decision = {"what": "tuning (given up)", "before": before, "after": None, "kept": False}
            solved.decisions.append(decision | {"measure": measure_of(self.teacher_held)})
            return None
        if has_batch_norm(tuned):
            gather = self.images.gather
            tuned = renormalized(tuned, self.teacher_held, gather, held, device, solved.decisions, "after tuning")
        kept = keep_better("tuning", solved.student, tuned, self.teacher_held, held, device, solved.decisions)
        return tuned if kept is tuned else None

    def rate_for(self, start: Predictions) -> float:
        """The learning rate for a student that answers the held-out images so.

        The higher one is for batch norm in training mode only: frozen it made things worse (docs/results.md).
        """
        usual = self.options.learning_rate
        if not self.rate_by_start or self.options.batch_norm == "frozen":
            return usual
        return _FAR_RATE if squared_error(self.teacher_held, start) > _FAR else usual

    def steps_in(self, seconds: float, solved: Solved, folder: Path | None = None) -> int:
        """How many steps take so long here. Measured once: `folder` keeps the answer for a run that goes on."""
        path = folder / "steps.json" if folder is not None else None
        if path is not None and path.exists():
            return json.loads(path.read_text(encoding="utf-8"))["steps"]
        times: list[float] = []
        quiet, self.progress = self.progress, lambda what, done, total: times.append(time.perf_counter())
        try:
            self._train(copy_model(solved.student), solved, _WARM + _TIMED, None, self.options.learning_rate)
        except NotFinite:
            return 1  # which meets it again, and gives up
        finally:
            self.progress = quiet
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
        options = replace(self.options, steps=steps, learning_rate=rate)
        if options.method != "kd" and not options.hints and not find_pairs(student, self.teacher, self.example):
            options = replace(options, method="kd", distill=1.0)  # no feature maps: the outputs alone teach
        with _without_dropout(student):
            fit(
                student,
                self.images.tune,
                options,
                example=self.example,
                teacher=self.teacher,
                name=self.name,
                normalization=self.normalization,
                augment=self.augment,
                least_crop=_CROP,
                whole=True,
                whitenings=solved.whitenings if self.whitened else None,
                what="tuning",
                device=self.example.device,
                folder=folder,
                progress=self.progress,
            )


def all_alike(images: Images) -> bool:
    """Whether all calibration images are one and the same."""
    first = None
    for x, _ in images.gather:
        first = x[:1] if first is None else first
        if x.shape[1:] != first.shape[1:] or not torch.equal(x, first.expand_as(x)):
            return False
    return images.counts["calibration"] > 1


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
