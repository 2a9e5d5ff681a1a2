"""Tuning: the teacher is distilled into the student on the calibration samples, without labels, in about a minute."""

from __future__ import annotations

import json
import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dk2pnet import processes
from dk2pnet.answers import Predictions, predict
from dk2pnet.data import Crop, ImageData
from dk2pnet.data.images import SMALL
from dk2pnet.data.samples import spread
from dk2pnet.data.tensors import TensorImages
from dk2pnet.errors import Refused
from dk2pnet.memory import Shares
from dk2pnet.networks.network import Network
from dk2pnet.run.out_folder import write_json
from dk2pnet.run.run import Run
from dk2pnet.students.closed_form import Solved
from dk2pnet.students.decisions import Judge
from dk2pnet.students.teacher import Teacher
from dk2pnet.students.tuning_steps import images_in_step
from dk2pnet.tasks import divergence
from dk2pnet.training.fit import Source, fit
from dk2pnet.training.hints import find_pairs
from dk2pnet.training.recipe import Recipe, choose, steps_beside_trials, trial_steps
from dk2pnet.training.trainer import NotFinite, TrainingOptions
from dk2pnet.training.watch import Watch
from dk2pnet.training.whitened import plain_state

__all__ = ["Tuner"]

_FEWEST_FOR_BATCH_NORM = 16  # images in a batch, for statistics of their own
_CROP = 0.5  # the least share of a large image
# Of a crop's sides. A step costs half as much, and of two that see other images more is learnt than of a whole one.
_WINDOW = 5 / 7
_WARM, _TIMED = 3, 5  # steps, to turn a time into a number of steps
_TRIAL_IMAGES = 256  # that batch norm is estimated on after a trial
_WATCHED, _WATCHED_SMALL = 128, 1000  # held-out images that trials and looks use, large ones and small ones

_log = logging.getLogger(__name__)


class Tuner:
    """Tunes students of one teacher on the same samples, in the same way.

    `options`: None for the learner's own, with the recipe that the held-out samples choose for each student.
    """

    def __init__(
        self, teacher: Teacher, run: Run, options: TrainingOptions | None = None, whitened: bool = True
    ) -> None:
        assert teacher.learner is not None
        assert teacher.samples is not None
        assert teacher.held is not None
        self.teacher, self.run, self.whitened, self.chooses = teacher, run, whitened, options is None
        self.learner, self.samples, self.held = teacher.learner, teacher.samples, teacher.held
        self.judge = Judge(teacher.network, self.held, self.samples.held_out, run)
        self.source = Source(
            self.learner.data(self.samples, Shares.of(teacher.options.memory).images),
            teacher.named,
            self.learner.normalization,
            teacher.options.augment,
            crop=Crop(_CROP),
            whole=True,
        )
        options, example = options or self.learner.options, self.learner.example
        count = self.samples.counts["calibration"]
        batch = min(images_in_step(self.learner, options.batch_size), count)
        precision = teacher.options.precision if options.precision == "auto" else options.precision
        if not isinstance(self.source.data, ImageData):  # as many at once as the network is known to take
            least = min(len(x) for x, _ in self.samples.gather)
            images = self.source.data if isinstance(self.source.data, TensorImages) else None
            batch = batch if images is not None and images.kept is not None else least
        changes: dict[str, Any] = {"batch_size": batch, "precision": precision, "seed": run.seed, "task": teacher.task}
        if batch < _FEWEST_FOR_BATCH_NORM:
            changes["batch_norm"] = "frozen"
        self.options = replace(options, checkpoint_every=teacher.options.checkpoint_every, **changes)
        self.large = max(example.shape[2:]) > SMALL
        windows = Crop(_CROP, _WINDOW)
        if self.large and self._takes(windows):
            self.source = replace(self.source, crop=windows)

    def tune(self, solved: Solved, steps: int, folder: Path | None = None) -> Network | None:
        """The tuned student, or None where tuning does not bring it closer to the teacher.

        What was decided is added to ``solved.decisions``. `folder` is for checkpoints and the log.
        """
        try:
            recipe, begun = self._recipe(solved, steps, folder)
            module = self.learner.student(solved.student)
            if begun is not None:
                module.load_state_dict(begun)
            watch = Watch(self._distance, module, steps, folder)
            self._train(module, solved, steps, folder, recipe, watch)
        except NotFinite as error:
            what = str(error).split(";")[0]  # its advice is for a training that was asked for
            _log.warning("tuning was given up, the closed form is kept: %s", what)
            before = self.judge.divergence(solved.student)
            solved.decisions.append(self.judge.entry("tuning (given up)", before, None, False))
            return None
        watch.put_best(module)
        tuned = self.learner.learned(solved.student, module)
        if recipe.batch_norm == "training":
            corrections = self.teacher.network.after_tuning(tuned, self.samples.gather, self.run)
            tuned = self.judge.apply(corrections, tuned, solved.decisions)
        kept = self.judge.closer("tuning", solved.student, tuned, solved.decisions)
        solved.decisions[-1]["recipe"] = asdict(recipe)
        return tuned if kept is tuned else None

    def steps_in(self, seconds: float, solved: Solved, folder: Path | None = None) -> int:
        """How many steps take so long here, trials included. Measured once: `folder` keeps the answer for a run that
        goes on."""
        path = folder / "steps.json" if folder is not None else None
        if path is not None and path.exists():
            return json.loads(path.read_text(encoding="utf-8"))["steps"]
        times: list[float] = []
        loud, self.run = self.run, replace(self.run, progress=lambda *_: times.append(time.perf_counter()))
        try:
            any_recipe = Recipe(self.options.learning_rate, self.options.batch_norm)
            self._train(self.learner.student(solved.student), solved, _WARM + _TIMED, None, any_recipe)
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
        if self.chooses:
            steps = steps_beside_trials(steps)
        if path is not None and processes.is_main():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"steps": steps})
        return steps

    def _takes(self, crop: Crop) -> bool:
        """Whether the network runs on what is cut out, with feature maps at the same places: one with a linear layer
        for every position, or with sizes written into it, does not."""
        teacher, example = self.learner.teacher, self.learner.example
        height, width = crop.size_of((example.shape[2], example.shape[3]))
        cut = example[:, :, :height, :width].contiguous()
        try:
            return find_pairs(teacher, teacher, cut) == find_pairs(teacher, teacher, example)
        except Exception as error:  # whatever a network raises that is given another size
            _log.debug("images are not cut smaller: %s", error)
            return False

    # -- the recipe --------------------------------------------------------------------------------------------------

    def _recipes(self, solved: Solved) -> list[Recipe]:
        if not self.chooses:
            return [Recipe(self.options.learning_rate, self.options.batch_norm)]
        start = solved.student.predict(self.samples.held_out, self.run)
        return self.learner.recipes(self.held, start, self.options)

    def _recipe(self, solved: Solved, steps: int, folder: Path | None) -> tuple[Recipe, Mapping[str, Tensor] | None]:
        """The one that leads closest to the teacher in a few steps, or almost at a higher rate, and the best weights of
        all trials, if those are closer than the start's; `folder` keeps both for a run that goes on."""
        path, weights = (None, None) if folder is None else (folder / "recipe.json", folder / "begun.safetensors")
        if path is not None and weights is not None and path.exists():
            recipe = Recipe(**json.loads(path.read_text(encoding="utf-8"))["chosen"])
            return recipe, load_file(str(weights)) if weights.exists() else None
        recipes, length = self._recipes(solved), trial_steps(steps)
        if not self.chooses or not length:
            return recipes[0], None
        reached = [self._distance(self.learner.student(solved.student))]
        processes.broadcast(reached)
        start = reached[0]
        begun: Mapping[str, Tensor] | None = None

        def trial(recipe: Recipe) -> float:
            nonlocal begun
            module = self.learner.student(solved.student)
            try:
                self._train(module, solved, length, None, recipe, what=f"trying {recipe}")
            except NotFinite:
                return math.inf
            if recipe.batch_norm == "training":
                tried = self.learner.learned(solved.student, module)
                few = spread(self.samples, _TRIAL_IMAGES)
                _, better = next(self.teacher.network.after_tuning(tried, few, self.run), ("", None))
                module = module if better is None else self.learner.student(better)
            found = [self._distance(module)]
            processes.broadcast(found)
            if found[0] < reached[0]:
                reached[0], begun = found[0], plain_state(module)
            return found[0]

        chosen, tried = choose(recipes, trial, start)
        _log.info("tuning: %s, the best of %d trials of %d steps", chosen, len(tried), length)
        if path is not None and processes.is_main():
            path.parent.mkdir(parents=True, exist_ok=True)
            if begun is not None:
                assert weights is not None
                save_file({name: tensor.contiguous() for name, tensor in begun.items()}, str(weights))
            write_json(path, {"chosen": asdict(chosen), "steps": length, "start": start, "tried": tried})
        return chosen, begun

    def _distance(self, module: nn.Module) -> float:
        """From the teacher, on some of the held-out samples, of a module in training."""
        answers, batches = self._some
        return divergence(answers, predict(module, batches, self.run.device))

    @cached_property
    def _some(self) -> tuple[Predictions, list[Any]]:
        """Some held-out samples as the learner takes them, and the answers of its teacher."""
        step = max(1, self.samples.counts["held out"] // (_WATCHED if self.large else _WATCHED_SMALL))
        batches = list(self.learner.held_out(self.samples, step))
        return predict(self.learner.teacher, batches, self.run.device, task=self.teacher.task), batches

    def _train(
        self,
        student: nn.Module,
        solved: Solved,
        steps: int,
        folder: Path | None,
        recipe: Recipe,
        watch: Callable[[nn.Module, int, int], bool] | None = None,
        what: str = "tuning",
    ) -> None:
        options = replace(self.options, steps=steps, learning_rate=recipe.rate, batch_norm=recipe.batch_norm)
        learner = self.learner
        if options.method != "kd" and not options.hints and not find_pairs(student, learner.teacher, learner.example):
            options = replace(options, method="kd", distill=1.0)  # no feature maps: the outputs alone teach
        names = learner.names
        whitenings = {names[name]: whitening for name, whitening in solved.whitenings.items()}
        fit(
            student,
            self.source,
            options,
            self.run,
            example=learner.example,
            teacher=learner.teacher,
            whitenings=whitenings if self.whitened else None,
            what=what,
            folder=folder,
            watch=watch,
        )
