"""A training that is looked at now and then: its best weights, and whether it leads anywhere."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dk2pnet import processes
from dk2pnet.run.out_folder import write_json
from dk2pnet.training.whitened import plain_state

__all__ = ["Watch"]

# When a run is looked at, as shares of its steps, and from how many steps on.
_LOOKS, _FEWEST_TO_LOOK = (0.5, 0.75, 0.9), 50
_LOST = 2  # a run that is so many times as far from the teacher as its start is ended


class Watch:
    """Looks at a training now and then by the held-out samples: keeps the best weights, ends what leads nowhere.

    `distance`: from the teacher. `folder` keeps the best for a run that goes on.
    """

    def __init__(
        self, distance: Callable[[nn.Module], float], start: nn.Module, steps: int, folder: Path | None
    ) -> None:
        self.distance, self.folder = distance, folder
        self.looks = {math.ceil(steps * share) for share in _LOOKS} if steps >= _FEWEST_TO_LOOK else set()
        self.limit = _LOST * distance(start) if self.looks else math.inf
        self.best: tuple[float, int, dict[str, Tensor]] | None = None
        self.last = 0
        if folder is not None and (folder / "best.json").exists():
            notes = json.loads((folder / "best.json").read_text(encoding="utf-8"))
            self.best = notes["distance"], notes["step"], load_file(str(folder / "best.safetensors"))

    def __call__(self, model: nn.Module, step: int, total: int) -> bool:
        """After every step."""
        self.last = step
        if step not in self.looks and step != total:
            return True
        found = [self.distance(model)]
        processes.broadcast(found)
        if self.best is None or found[0] <= self.best[0]:
            self.best = found[0], step, plain_state(model)
            if self.folder is not None and processes.is_main():
                save_file(
                    {name: t.contiguous() for name, t in self.best[2].items()}, str(self.folder / "best.safetensors")
                )
                write_json(self.folder / "best.json", {"distance": found[0], "step": step})
        return found[0] <= self.limit

    def put_best(self, model: nn.Module) -> None:
        """Give the model the best weights, where they are not its last."""
        if self.best is not None and self.best[1] != self.last:
            model.load_state_dict(self.best[2])
