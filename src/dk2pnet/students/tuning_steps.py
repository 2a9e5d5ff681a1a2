"""How long students are tuned: so many steps, or so much time, or not at all and why."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass

from dk2pnet.data.images import SMALL
from dk2pnet.data.samples import Samples
from dk2pnet.errors import InputError
from dk2pnet.networks.network import Learner

__all__ = ["AUTOMATIC_MACS", "AUTOMATIC_SECONDS", "Tuning", "images_in_step", "tuning_of"]

_LARGE_BATCH = 32  # large images in a step
AUTOMATIC_STEPS = 150
# Larger ones are given so many seconds, and at most so many steps (on a GPU).
AUTOMATIC_SECONDS, _MOST = 480.0, 1000
# Of one image through CIFAR's ResNet-56: 150 steps of networks up to this size take minutes on two cores.
AUTOMATIC_MACS = 125_485_696
_FEWEST_IMAGES = 100  # below this nobody has measured what automatic tuning does
_log = logging.getLogger(__name__)
_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|min|h)")
_SECONDS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Tuning:
    """So many steps, or what fits into so many seconds (but `most` steps); 0 steps for none, for the reason `said`.

    `by_itself`: nobody asked for it, so that it may not cost the result of what came before it.
    """

    steps: int = 0
    seconds: float | None = None
    said: str = ""
    most: int | None = None
    by_itself: bool = False

    @property
    def wanted(self) -> bool:
        """Whether any tuning is to be done."""
        return self.steps > 0 or self.seconds is not None


def images_in_step(learner: Learner, usual: int) -> int:
    """How many images a step of tuning sees: `usual` of small ones, fewer of large ones, and no more than are taken at
    once."""
    size = usual if max(learner.example.shape[2:]) <= SMALL else _LARGE_BATCH
    return size if learner.at_once is None else min(size, learner.at_once)


def tuning_of(tune: str | int | None, *, epochs: int, samples: Samples | None, macs: int) -> Tuning:
    """What ``--tune`` asks for; None (or ``auto``) is 150 steps where they are cheap, else some minutes, which the log
    tells, where there are images enough.

    `macs`: of the teacher, for one image.

    Raises
    ------
    InputError
        When the text is not understood, or tuning was asked for and cannot be done.
    """
    count = samples.counts["calibration"] + samples.counts["held out"] if samples is not None else 0
    if tune is None or tune == "auto":
        if epochs:
            return Tuning(said="")  # the training does what tuning would
        if samples is None:
            return Tuning(said="no tuning: there are no images; give --data, and --tune 150 for so many steps")
        if count < _FEWEST_IMAGES:
            return Tuning(
                said=f"no tuning: {count} calibration images are fewer than {_FEWEST_IMAGES}; give more, or --tune 150"
            )
        if macs > AUTOMATIC_MACS:
            _log.info(
                "tuning will take about %.0f minutes on a CPU; --tune 0 for none, --tune 20m for more",
                AUTOMATIC_SECONDS / 60,
            )
            return Tuning(seconds=AUTOMATIC_SECONDS, most=_MOST, by_itself=True)
        return Tuning(AUTOMATIC_STEPS, by_itself=True)
    wanted = _parse(tune)
    if wanted.wanted and (samples is None or samples.counts["calibration"] < 2):
        have = "no images" if samples is None else f"{count} image(s) for calibration"
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
