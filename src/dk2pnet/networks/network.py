"""What compression asks of a CNN, whatever it is made of."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

__all__ = ["Site"]


@dataclass
class Site:
    """A convolution found in a model. `reason` says why it stays dense, "" if it can be decomposed.

    `positions`: output positions of one image, summed over all calls; `calls`: how often one forward pass runs it;
    `aliases`: further names of the same module.
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
    def shape(self) -> str:
        """The weight's shape (output channels x input channels per group x kernel, the first two the other way round
        where it is transposed), then stride and groups where they are not 1."""
        weight = self.module.weight.shape  # type: ignore[union-attr]
        text = "x".join(map(str, weight))
        stride, groups = self.module.stride, self.module.groups
        text += "" if set(stride) == {1} else " /" + "x".join(map(str, sorted(set(stride))))  # type: ignore[arg-type]
        return text + ("" if groups == 1 else f" groups={groups}")

    @property
    def macs(self) -> int:
        """Multiply-adds of one image."""
        return self.module.weight.numel() * self.positions  # type: ignore[union-attr,operator]
