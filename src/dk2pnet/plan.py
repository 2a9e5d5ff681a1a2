"""`Plan` and `Budget`: plain data, JSON in and out."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from dk2pnet.errors import InputError

__all__ = ["FORMAT", "KINDS", "Budget", "LayerPlan", "Plan"]

FORMAT = 1
KINDS = ("macs", "params", "kernels", "latency", "drop", "disagree", "error")
_POINTS = ("drop", "disagree", "error")


@dataclass(frozen=True)
class Budget:
    """What the student may cost: ``macs``, ``params`` or measured ``latency`` as a fraction of the whole teacher's, or
    ``kernels`` per input channel; or what it may lose: ``drop`` points of accuracy, ``disagree`` percent of other
    answers than the teacher's, or ``error`` of the outputs (squared, relative). Example: ``Budget.parse("macs=0.44")``.
    """

    kind: str
    value: float

    @classmethod
    def parse(cls, text: str | Budget) -> Budget:
        """Read ``KIND=VALUE``; `InputError` says what is wrong with it."""
        if isinstance(text, Budget):
            return text
        kind, _, number = str(text).partition("=")
        expected = (
            "expected macs=F, params=F or latency=F with 0 < F <= 1 (fraction of the whole network's), "
            "kernels=1, 2, ..., or what may be lost: drop=0.5 (points of accuracy), disagree=2 (% of answers), "
            "error=0.02 (of the outputs, squared and relative)"
        )
        try:
            value = float(number)
        except ValueError:
            raise InputError(f"budget is {text!r}; {expected}") from None
        whole = value == int(value) if math.isfinite(value) else False
        most = 100 if kind in ("drop", "disagree") else 1
        good = kind in KINDS and (value >= 1 and whole if kind == "kernels" else 0 < value <= most)
        if not good:
            near = get_close_matches(kind, KINDS, 1, 0.5) if kind not in KINDS else []
            hint = f"did you mean {near[0]}={number}? " if near else ""
            raise InputError(f"budget is {text!r}; {hint}{expected}")
        return cls(kind, value)

    @property
    def in_points(self) -> bool:
        """Whether it says what may be lost, and not what the student may cost."""
        return self.kind in _POINTS

    def __str__(self) -> str:
        return f"{self.kind}={self.value:g}"


@dataclass
class LayerPlan:
    """One convolution: `counts` holds the kernels per input channel, or is None where it stays dense for `reason`.

    `macs_dense`, `macs` (one image, all calls), `parameters_dense`, `parameters`: before and after. `energy_kept` is
    the fraction of the criterion's energy that the layer keeps. `aliases` are the other names of a shared module.
    `form` is the exact form that the layer has in the exported file (`deploy.emit`), None where none was chosen.
    """

    name: str
    shape: str
    reason: str = ""
    counts: list[int] | None = None
    macs_dense: int = 0
    macs: int = 0
    parameters_dense: int = 0
    parameters: int = 0
    energy_kept: float | None = None
    aliases: list[str] = field(default_factory=list)
    form: str | None = None

    @property
    def kernels(self) -> int | None:
        """R, or None where the layer is dense."""
        return None if self.counts is None else sum(self.counts)

    @property
    def branches(self) -> list[int] | None:
        """Kernels per branch."""
        if self.counts is None:
            return None
        return [sum(count > branch for count in self.counts) for branch in range(max(self.counts))]


@dataclass
class Plan:
    """Which convolution gets which kernels, and all that is needed to rebuild the student from its weights.

    ``network``: arguments of `models.make_network` (None: the caller has to give the factory); ``input_shape``:
    (C, H, W); ``normalization``: mean and std per channel of pixels in [0, 1]; ``weights_hash``: SHA-256 of
    model.safetensors; ``unseen``: what tells apart the tenth of a training split that the network was not trained on,
    where dk2pnet trained it (`data.splits.identity_of`).
    """

    layers: list[LayerPlan] = field(default_factory=list)
    network: dict[str, Any] | None = None
    input_shape: list[int] | None = None
    normalization: dict[str, list[float]] | None = None
    criterion: str | None = None
    budget: str | None = None
    macs_dense: int = 0
    macs: int = 0
    parameters_dense: int = 0
    parameters: int = 0
    weights_hash: str | None = None
    unseen: str | None = None
    format: int = FORMAT

    def to_json(self) -> str:
        """Text for plan.json."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Undo `to_json`; `InputError` for anything else."""
        try:
            data = json.loads(text)
            if data["format"] != FORMAT:
                raise InputError(
                    f"plan.json has format {data['format']}; this version reads format {FORMAT}: "
                    "use the version of dk2pnet that wrote it"
                )
            layers = [LayerPlan(**layer) for layer in data.pop("layers")]
            return cls(layers=layers, **data)
        except InputError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"plan.json cannot be read ({error}); expected the file that dk2pnet wrote") from error

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a plan.json."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} cannot be read ({error}); expected a folder that dk2pnet wrote") from error
        return cls.from_json(text)

    @property
    def forms(self) -> dict[str, str]:
        """The emitted forms that were chosen, by layer."""
        return {layer.name: layer.form for layer in self.layers if layer.form is not None}

    def summary(self) -> str:
        """One line per convolution: what was done to it, or why nothing."""
        lines = []
        for layer in self.layers:
            done = f"dense: {layer.reason}"
            if layer.counts is not None:
                done = f"{layer.kernels} kernels in branches {'+'.join(map(str, layer.branches or []))}"
                done += f", MACs x{layer.macs / max(layer.macs_dense, 1):.2f}"
                done += f", {layer.form}" if layer.form else ""
            also = f" (also {', '.join(layer.aliases)})" if layer.aliases else ""
            lines.append(f"{layer.name}{also}  {layer.shape}  {done}")
        return "\n".join(lines)
