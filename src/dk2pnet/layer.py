"""`DKConv2d`: a convolution by dominant kernels.

Kernel ``r`` reads one input channel ``source[r]`` (feature extraction), and a 1x1 convolution combines what the R
kernels extract (feature combination)::

    z_r = kernels[r] * x[source[r]]
    y_n = sum_r combination[n, r] z_r + bias_n

Source: Wang, Deng, Wang, "Accelerating Convolutional Neural Networks with Dominant Convolutional Kernel and Knowledge
Pre-regression", ECCV 2016 (the split into extraction and combination). Free counts per channel follow Dbouk and
Shanbhag, "Generalized Depthwise-Separable Convolutions", NeurIPS 2021.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.fx import Proxy

from dk2pnet.decompose.solve import Factors, solve
from dk2pnet.errors import InputError

__all__ = ["FORMS", "DKConv2d", "arguments_of", "padding_of", "set_fast_form", "set_form"]

# Multiply-adds of a dense product in whose time a CPU does one of a depthwise convolution. Wide vectors (AVX512) speed
# up the dense one more, but for single precision where no channels are gathered.
_DEPTHWISE, _DEPTHWISE_WIDE = 12.4, 32.0
FORMS = ("folded", "branches", "concat", "gathered")


class _Branch(NamedTuple):
    """Kernels ``start:stop`` of the storage order: at most one per input channel."""

    start: int
    stop: int
    full: bool  # every input channel in order, so that the input need not be gathered


class DKConv2d(nn.Module):
    """A convolution ``(B, C, H, W) -> (B, N, H', W')`` by R dominant kernels of size ``kh x kw``.

    Example::

        layer = DKConv2d(16, 32, 3, padding=1, counts=2)      # two kernels for each of the 16 channels: R = 32
        layer.kernels.shape, layer.combination.shape          # (32, 1, 3, 3), (32, 32, 1, 1)
        layer(torch.randn(1, 16, 8, 8)).shape                 # (1, 32, 8, 8)

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        As in `torch.nn.Conv2d`.
    counts
        Kernels per input channel: one number for all, or C numbers (0 allowed). Every group must have the same sum.
    form
        Which exact form `forward` computes: ``branches`` (sum over branches of depthwise + pointwise), ``concat``
        (depthwise branches concatenated, one pointwise), ``gathered`` (the same by one gather of channels and one
        depthwise convolution; not for export) or ``folded`` (one dense convolution).
        All forms give the same outputs and the same gradients.

    Attributes
    ----------
    kernels : Parameter, (R, 1, kh, kw)
    combination : Parameter, (N, R / groups, 1, 1); column j of a row in group g belongs to the j-th kernel of group g
    bias : Parameter (N,) or None
    source : buffer, int64 (R,): the input channel of each kernel, sorted by branch (first every channel's most
        dominant kernel, then every second one, ...), inside a branch by channel.

    Raises
    ------
    InputError
        When the counts do not fit the channels and groups.
    """

    source: Tensor
    _group_order: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        counts: int | Sequence[int] = 1,
        form: str = "branches",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        # A Conv2d on the meta device checks the arguments and normalises them exactly as PyTorch does.
        like = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device="meta",
        )
        self._take_geometry(like)
        self.form = form
        source = _sources(counts, self.in_channels, groups)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.kernels = nn.Parameter(torch.empty(len(source), 1, *self.kernel_size, **factory))
        self.combination = nn.Parameter(torch.empty(out_channels, len(source) // groups, 1, 1, **factory))
        self.bias = nn.Parameter(torch.empty(out_channels, **factory)) if bias else None
        self.register_buffer("source", torch.tensor(source, dtype=torch.int64, device=device))
        self._arrange(source)
        self.reset_parameters()

    def _take_geometry(self, conv: nn.Conv2d) -> None:
        self.in_channels = conv.in_channels
        self.out_channels = conv.out_channels
        self.kernel_size = conv.kernel_size
        self.stride = conv.stride
        self.padding = conv.padding
        self.dilation = conv.dilation
        self.groups = conv.groups
        self.padding_mode = conv.padding_mode
        self._reversed_padding_repeated_twice = list(conv._reversed_padding_repeated_twice)  # as PyTorch calls it

    @property
    def form(self) -> str:
        """The exact form that `forward` computes, one of `FORMS`."""
        return self._form

    @form.setter
    def form(self, form: str) -> None:
        if form not in FORMS:
            raise InputError(f"form is {form!r}; expected one of {', '.join(FORMS)}")
        self._form = form

    @property
    def counts(self) -> list[int]:
        """Kernels per input channel, C numbers."""
        return torch.bincount(self.source.cpu(), minlength=self.in_channels).tolist()

    @property
    def branch_sizes(self) -> list[int]:
        """Kernels per branch, most dominant branch first."""
        return [branch.stop - branch.start for branch in self._branches]

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As of every module, but for a bias that a layer without one is given afterwards, as by a tool that folds
        batch norms into ``conv.weight``: that is not kept here, and the bias alone would be wrong."""
        if name == "bias" and param is not None and "bias" in self.__dict__:  # where None stands
            raise RuntimeError(
                "a layer of dominant kernels was made without a bias and is given one, as by a tool that folds batch "
                "norms into conv.weight, which cannot be set here; fold batch norms before compressing"
            )
        super().register_parameter(name, param)

    def reset_parameters(self) -> None:
        """Draw kernels of about unit norm and a combination as PyTorch draws a 1x1 convolution's."""
        if self.kernels.is_meta:
            return
        nn.init.normal_(self.kernels, std=1 / math.sqrt(self.kernel_size[0] * self.kernel_size[1]))
        nn.init.kaiming_uniform_(self.combination, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.combination.shape[1])
            nn.init.uniform_(self.bias, -bound, bound)

    def _arrange(self, source: list[int]) -> None:
        """Derive from the sources what the forms need: branches, gathers, and the order of kernels by group."""
        device = torch.device("cpu") if self.source.is_meta else self.source.device
        for name in [name for name in self._buffers if name.startswith("_gather_")]:
            del self._buffers[name]
            self._non_persistent_buffers_set.discard(name)
        self._branches: list[_Branch] = []
        start = 0
        for number, size in enumerate(_branch_sizes(source)):
            channels = source[start : start + size]
            full = channels == list(range(self.in_channels))
            if not full:
                self.register_buffer(f"_gather_{number}", torch.tensor(channels, device=device), persistent=False)
            self._branches.append(_Branch(start, start + size, full))
            start += size
        group_of = torch.tensor(source) // (self.in_channels // self.groups)
        order = torch.argsort(group_of, stable=True)
        self.register_buffer("_group_order", order.to(device), persistent=False)
        # A branch whose kernels are spread evenly over the groups has a grouped pointwise convolution of its own.
        parts = [group_of[branch.start : branch.stop] for branch in self._branches]
        sizes = [torch.bincount(part, minlength=self.groups) for part in parts]
        self._even = all(bool((size == size[0]).all()) for size in sizes)

    # -- building ------------------------------------------------------------------------------------------------

    @classmethod
    def like(cls, conv: nn.Conv2d, counts: int | Sequence[int], form: str = "branches") -> DKConv2d:
        """An untrained layer with the geometry, dtype, device and modes of `conv`."""
        _check_convolution(conv)
        layer = cls(
            **arguments_of(conv),
            bias=conv.bias is not None,
            counts=counts,
            form=form,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        layer._reversed_padding_repeated_twice = list(conv._reversed_padding_repeated_twice)  # set when it was made
        return layer.train(conv.training).requires_grad_(conv.weight.requires_grad)

    @classmethod
    def from_factors(cls, conv: nn.Conv2d, factors: Factors, form: str = "branches") -> DKConv2d:
        """Make the layer that takes the place of `conv`, with kernels and combination found by `decompose.solve` and
        `conv`'s bias."""
        layer = cls.like(conv, torch.bincount(factors.source, minlength=conv.in_channels).tolist(), form)
        with torch.no_grad():
            layer.kernels.copy_(factors.kernels)
            layer.combination.copy_(factors.combination)
            if layer.bias is not None and conv.bias is not None:
                layer.bias.copy_(conv.bias)
        return layer

    @classmethod
    def from_dense(cls, conv: nn.Conv2d, counts: int | Sequence[int], form: str = "branches") -> DKConv2d:
        """Approximate `conv` by the best `counts` kernels per channel (criterion ``weight``: Eckart-Young).

        Example: ``DKConv2d.from_dense(nn.Conv2d(16, 32, 3), counts=9)`` equals the convolution exactly.
        """
        _check_convolution(conv)
        source = _sources(counts, conv.in_channels, conv.groups)
        per_channel = torch.bincount(torch.tensor(source), minlength=conv.in_channels)
        return cls.from_factors(conv, solve(conv.weight.detach(), per_channel, groups=conv.groups), form)

    def fold(self) -> Tensor:
        """The dense weight ``(N, C / groups, kh, kw)`` that the layer stands for, differentiable."""
        groups, width = self.groups, self.out_channels // self.groups
        kernels, source = self.kernels.flatten(1), self.source
        if groups > 1:
            kernels, source = kernels[self._group_order], source[self._group_order]
        columns = self.combination.view(groups, width, -1).transpose(1, 2).reshape(self._branches[-1].stop, width)
        blocks = columns.unsqueeze(2) * kernels.unsqueeze(1)  # (R, N / groups, kh kw)
        weight = blocks.new_zeros(self.in_channels, width, kernels.shape[1]).index_add(0, source, blocks)
        weight = weight.view(groups, -1, width, kernels.shape[1]).transpose(1, 2)
        return weight.reshape(self.out_channels, -1, *self.kernel_size)

    @property
    def weight(self) -> Tensor:
        """The folded weight, for networks that look at their convolutions' or call them by function."""
        return self.fold()

    def to_dense(self) -> nn.Conv2d:
        """The plain `torch.nn.Conv2d` with the folded weight."""
        conv = nn.Conv2d(
            **arguments_of(self),
            bias=self.bias is not None,
            device=self.kernels.device,
            dtype=self.kernels.dtype,
        )
        conv._reversed_padding_repeated_twice = list(self._reversed_padding_repeated_twice)
        with torch.no_grad():
            conv.weight.copy_(self.fold())
            if self.bias is not None and conv.bias is not None:
                conv.bias.copy_(self.bias)
        return conv.train(self.training)

    # -- computing -----------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``x (B, C, H, W)`` (or ``(C, H, W)``) in the chosen form."""
        known = not isinstance(x, Proxy)  # `torch.fx` follows with something that has no shape: it takes (B, C, H, W)
        if known and x.shape[-3] != self.in_channels:  # a gather would pass over channels too many
            raise RuntimeError(f"expected {self.in_channels} input channels, but the input has shape {tuple(x.shape)}")
        unbatched = known and x.dim() == 3
        if unbatched:
            x = x.unsqueeze(0)
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, padding_of(self), mode=self.padding_mode), 0
        if self._form == "folded":
            y = F.conv2d(x, self.fold(), self.bias, self.stride, padding, self.dilation, self.groups)
        elif self._form == "branches" and self._even:
            y = self._sum_of_branches(x, padding)
        elif self._form == "gathered":
            order = self._group_order
            x, kernels = _gathered(x, self.source[order]), self.kernels[order]
            x = F.conv2d(x, kernels, None, self.stride, padding, self.dilation, self._branches[-1].stop)
            y = self._combine(x, self.combination, self.bias, self._branches[-1].stop)
        else:
            y = self._concatenated(x, padding)
        return y.squeeze(0) if unbatched else y

    def _extract(self, number: int, x: Tensor, padding: Any) -> Tensor:
        """Feature extraction of one branch: a depthwise convolution without a multiplier."""
        start, stop, full = self._branches[number]
        if not full:
            channels = self._buffers[f"_gather_{number}"]
            assert channels is not None
            x = x.index_select(1, channels)
        kernels = self.kernels[start:stop]
        return F.conv2d(x, kernels, None, self.stride, padding, self.dilation, stop - start)

    def _sum_of_branches(self, x: Tensor, padding: Any) -> Tensor:
        result: Tensor | None = None
        column = 0
        for number, branch in enumerate(self._branches):
            width = (branch.stop - branch.start) // self.groups
            combination = self.combination[:, column : column + width]
            bias = self.bias if number == 0 else None
            part = self._combine(self._extract(number, x, padding), combination, bias, branch.stop - branch.start)
            result = part if result is None else result + part
            column += width
        assert result is not None
        return result

    def _concatenated(self, x: Tensor, padding: Any) -> Tensor:
        parts = [self._extract(number, x, padding) for number in range(len(self._branches))]
        extracted = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        if self.groups > 1:
            extracted = extracted.index_select(1, self._group_order)
        return self._combine(extracted, self.combination, self.bias, self._branches[-1].stop)

    def _combine(self, extracted: Tensor, combination: Tensor, bias: Tensor | None, kernels: int) -> Tensor:
        """Feature combination of so many kernels' maps: a 1x1 convolution, grouped as the layer is."""
        if kernels > self.groups or self.groups in (1, self.out_channels):
            return F.conv2d(extracted, combination, bias, groups=self.groups)
        # One kernel per group would make the 1x1 a depthwise convolution with a multiplier, slow everywhere.
        repeated = extracted.repeat_interleave(self.out_channels // self.groups, 1)
        return F.conv2d(repeated, combination, bias, groups=self.out_channels)

    # -- state ---------------------------------------------------------------------------------------------------

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take the number of kernels and their sources from the state, so that it loads without knowing the counts."""
        kernels, combination, source = (state_dict.get(prefix + name) for name in ("kernels", "combination", "source"))
        problem = None
        if (
            isinstance(kernels, Tensor)
            and isinstance(combination, Tensor)
            and isinstance(source, Tensor)
            and not source.is_meta
        ):
            sources = source.flatten().tolist()
            problem = _problem_of(sources, self.in_channels, self.groups)
            count = len(sources)
            shapes = (count, 1, *self.kernel_size), (self.out_channels, count // self.groups, 1, 1)
            if problem is None and (kernels.shape, combination.shape) == shapes:
                if count != len(self.source):
                    self.kernels.data = self.kernels.data.new_empty(kernels.shape)
                    self.combination.data = self.combination.data.new_empty(combination.shape)
                    self.source = self.source.new_empty(count)
                super()._load_from_state_dict(state_dict, prefix, *args)
                self._arrange(sources)
                return
        # What does not fit is reported by PyTorch itself; the sources stay those of the kernels that stay.
        if source is not None:
            state_dict = {**state_dict, prefix + "source": self.source}
        super()._load_from_state_dict(state_dict, prefix, *args)
        if problem is not None:
            args[-1].append(f"{prefix}source: {problem}")

    def extra_repr(self) -> str:
        """One line: geometry as in `Conv2d`, then kernels, branches and form."""
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        for name, plain in (("padding", (0, 0)), ("dilation", (1, 1)), ("groups", 1), ("padding_mode", "zeros")):
            if getattr(self, name) != plain:
                text += f", {name}={getattr(self, name)}"
        if self.bias is None:
            text += ", bias=False"
        branches = "+".join(map(str, self.branch_sizes))
        return f"{text}, kernels={len(self.source)} in branches {branches}, form={self._form}"


def _check_convolution(conv: object) -> None:
    if not isinstance(conv, nn.Conv2d | DKConv2d):
        raise InputError(f"conv is of type {type(conv).__name__}; expected a torch.nn.Conv2d")


def arguments_of(conv: nn.Conv2d | DKConv2d) -> dict[str, Any]:
    """What makes another convolution of the same geometry: all arguments but bias, device and dtype."""
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return {name: getattr(conv, name) for name in names}


def padding_of(conv: nn.Conv2d | DKConv2d) -> list[int]:
    """What the input is padded with: left, right, top, bottom, as `F.pad` takes it.

    By the layer's present attributes: libraries of segmentation change padding and dilation after the layer was made.
    """
    if conv.padding_mode != "zeros":  # then PyTorch too pads by what it worked out when the layer was made
        return list(conv._reversed_padding_repeated_twice)
    padding: Any = conv.padding
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
    sides = (0, 0) if isinstance(padding, str) else padding
    return [int(side) for side in reversed(sides) for _ in range(2)]


def set_form(model: nn.Module, form: str) -> None:
    """Choose the exact form of every DK layer in `model` (see `FORMS`)."""
    for module in model.modules():
        if isinstance(module, DKConv2d):
            module.form = form


def _sources(counts: int | Iterable[int], channels: int, groups: int) -> list[int]:
    """Counts per channel -> input channel of every kernel, sorted by branch."""
    per_channel = [int(counts)] * channels if isinstance(counts, int | Integral) else [int(count) for count in counts]
    if len(per_channel) != channels:
        raise InputError(f"counts has {len(per_channel)} numbers; expected one, or {channels}: one per input channel")
    if min(per_channel) < 0:
        raise InputError(f"counts holds {min(per_channel)}; expected numbers of kernels, 0 or more")
    source = [
        channel for branch in range(max(per_channel)) for channel in range(channels) if per_channel[channel] > branch
    ]
    problem = _problem_of(source, channels, groups)
    if problem is not None:
        raise InputError(f"counts are of no use: {problem}")
    return source


def _problem_of(source: list[int], channels: int, groups: int) -> str | None:
    """What is wrong with sources, or None."""
    if not source or min(source) < 0 or max(source) >= channels:
        return f"expected at least one kernel per group, each with a source channel from 0 to {channels - 1}"
    width = channels // groups
    per_group = {sum(channel // width == group for channel in source) for group in range(groups)}
    if len(per_group) > 1:
        return f"the groups have {sorted(per_group)} kernels; expected the same number in every group"
    if sum(_branch_sizes(source)) != len(source):
        return "the sources are not sorted by branch and, inside a branch, by channel"
    return None


def _branch_sizes(source: list[int]) -> list[int]:
    """Kernels per branch: each branch ascends, and holds only channels that the one before it holds."""
    sizes: list[int] = []
    previous: set[int] | None = None
    start = 0
    while start < len(source):
        stop = start + 1
        while stop < len(source) and source[stop] > source[stop - 1]:
            stop += 1
        branch = set(source[start:stop])
        if previous is not None and not branch <= previous:
            break
        sizes.append(stop - start)
        previous, start = branch, stop
    return sizes


def set_fast_form(model: nn.Module, device: torch.device, half: bool = False) -> None:
    """Give every DK layer in `model` the form that PyTorch computes fastest, with its gradients too, in single
    precision or in `half`.

    On a CPU, a layer whose two convolutions are faster than the folded one; measured by the part ``forms`` of
    `benchmarks/steps.py`. A rule and not a measurement at hand, so that two runs on a machine round alike.
    """
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    for module in model.modules():
        if not isinstance(module, DKConv2d):
            continue
        outputs, kernels = module.out_channels // module.groups, len(module.source)
        taps = math.prod(module.kernel_size)
        dense = module.in_channels * taps * outputs
        module.form = "folded"
        full = all(size == module.in_channels for size in module.branch_sizes)
        cost = _DEPTHWISE_WIDE if wide and (half or not full) else _DEPTHWISE
        slow = half and max(module.stride) > 1  # PyTorch has no fast depthwise convolution for it
        if device.type == "cpu" and not slow and kernels * (outputs + cost * taps) < dense:
            module.form = "branches" if full else "gathered"


def _gathered(x: Tensor, channels: Tensor) -> Tensor:
    """Channels of ``x (B, C, H, W)`` in the memory format that x has: `index_select` leaves channels last."""
    known = not isinstance(x, Proxy)
    last = known and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    found: Tensor = _GatherLast.apply(x, channels) if last else x.index_select(1, channels)
    return found


class _GatherLast(torch.autograd.Function):
    """`index_select` of channels where they lie last; the gradient is added up as rows too."""

    @staticmethod
    def forward(context: Any, x: Tensor, channels: Tensor) -> Tensor:
        context.save_for_backward(channels)
        context.channels = x.shape[1]
        batch, count, height, width = x.shape
        rows = x.permute(0, 2, 3, 1).reshape(-1, count)
        found = torch.gather(rows, 1, channels.expand(len(rows), -1))
        return found.view(batch, height, width, -1).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (channels,) = context.saved_tensors
        batch, count, height, width = gradients[0].shape
        rows = gradients[0].permute(0, 2, 3, 1).reshape(-1, count)
        found = rows.new_zeros(len(rows), context.channels).index_add_(1, channels, rows)
        return found.view(batch, height, width, -1).permute(0, 3, 1, 2), None
