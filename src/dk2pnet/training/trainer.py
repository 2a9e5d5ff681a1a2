"""The training loop, on Hugging Face Accelerate: trains teachers, and students beside their teacher."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dk2pnet.data import Batches
from dk2pnet.decompose.whiten import Whitening
from dk2pnet.digest import digest_of
from dk2pnet.errors import InputError
from dk2pnet.layer import set_fast_form
from dk2pnet.measure import evaluation, in_layout, is_classifier, kept_modes, layout_of, outputs_of, use_form
from dk2pnet.options import PRECISIONS, Options, TrainOptions
from dk2pnet.processes import is_alone
from dk2pnet.run.seed import random_state, set_random_state
from dk2pnet.training.checkpoint import Checkpoints
from dk2pnet.training.hints import HintPair, Tap, find_pairs, parse_hints
from dk2pnet.training.log import TrainingLog
from dk2pnet.training.losses import DEFAULT_METHOD, Method, distillation, labels, method_named
from dk2pnet.training.teaching import fit_probes, guided, hinting, taps_of
from dk2pnet.training.whitened import whitened

__all__ = [
    "BATCH_NORMS",
    "OPTIMIZERS",
    "PRECISIONS",
    "TUNING",
    "NotFinite",
    "TrainingOptions",
    "choose_precision",
    "train",
]

OPTIMIZERS = ("sgd", "adam")
BATCH_NORMS = ("training", "frozen")
_LOG_STEPS = 50  # between two lines of the log
_CLIP = 5.0  # largest norm of all gradients together
_log = logging.getLogger(__name__)

_Batch = tuple[Tensor, Tensor | None]
_Shown = Callable[[Tensor], tuple[list[Tensor], list[Tensor]]]  # what a `WithMaps` does, compiled or not


class NotFinite(InputError):
    """The loss or its gradient became infinite or no number."""


@dataclass(frozen=True)
class TrainingOptions:
    """How to train. Defaults suit training from scratch; `compress` lowers the learning rate.

    ``steps``: so many in place of the epochs; ``batch_size``: images per step, all processes together; ``optimizer``:
    ``sgd`` (Nesterov) or ``adam`` (without decay); ``warmup``: steps (at most a third of the run), None for one epoch
    (at most a tenth); ``batch_norm``: ``training``, or ``frozen`` to keep the running statistics; ``as_evaluated``:
    everything but batch norm as in evaluation, without dropout, and with what the network does only there;
    ``method``: one of `losses.METHODS`, None for KP with a teacher and ``labels`` without; ``hints``:
    ``TEACHER.LAYER=STUDENT.LAYER`` each, in place of those found; ``alpha``, ``tau``: weight and temperature of
    distillation against the labels' cross-entropy; ``distill``: weight of the outputs' distillation beside the hints
    where images have no labels; ``beta``, ``kp_tau``: weight of each hint (None: the method's own) and its
    temperature; ``beta_end``: what is left of that weight at the end, to which it falls linearly; ``pre_regressor``:
    one at every hint, also where channels agree; ``task``: what the outputs are for, as in `tasks` (None: by their
    shape); those of ``classify`` are distilled by softened logits; ``precision``: ``fp32``, ``bf16`` (autocast) or
    ``auto`` (`choose_precision`); ``compile``: by `torch.compile`; ``checkpoint_every``: seconds.
    """

    epochs: int = TrainOptions.epochs
    steps: int | None = None
    batch_size: int = TrainOptions.batch_size
    optimizer: str = "sgd"
    learning_rate: float = TrainOptions.learning_rate
    warmup: int | None = None
    weight_decay: float = TrainOptions.weight_decay
    batch_norm: str = "training"
    as_evaluated: bool = False
    method: str | None = TrainOptions.method
    hints: Sequence[str] = TrainOptions.hints
    alpha: float = TrainOptions.alpha
    tau: float = TrainOptions.tau
    distill: float = 1.0
    beta: float | None = TrainOptions.beta
    kp_tau: float = TrainOptions.kp_tau
    beta_end: float = TrainOptions.beta_end
    pre_regressor: bool = TrainOptions.pre_regressor
    task: str | None = None
    precision: str = TrainOptions.precision
    compile: bool = TrainOptions.compile
    seed: int = 0
    checkpoint_every: float = TrainOptions.checkpoint_every

    @classmethod
    def of(cls, options: Options) -> TrainingOptions:
        """What the options of a verb say of training; the rest at its default."""
        known = {each.name for each in fields(cls)} & {each.name for each in fields(options)}
        return cls(**{name: getattr(options, name) for name in known})

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or (self.steps is not None and self.steps < 1):
            what = f"{self.epochs} epochs" if self.steps is None else f"{self.steps} steps"
            raise InputError(
                f"training was asked for {what} of batches of {self.batch_size}; expected 1 or more of each"
            )
        if not (
            0 < self.learning_rate < math.inf
            and self.weight_decay >= 0
            and self.tau > 0
            and self.kp_tau > 0
            and 0 <= self.alpha <= 1
            and self.distill >= 0
            and (self.warmup is None or self.warmup >= 0)
            and (self.beta is None or self.beta >= 0)
            and 0 <= self.beta_end <= 1
        ):
            raise InputError(
                f"learning rate {self.learning_rate}, weight decay {self.weight_decay}, alpha {self.alpha}, "
                f"tau {self.tau}, distill {self.distill}, beta {self.beta}, beta at the end {self.beta_end}, "
                f"KP tau {self.kp_tau}, warm-up {self.warmup}; expected rates and temperatures above 0, alpha and beta "
                "at the end between 0 and 1, weight decay, distill, beta and warm-up 0 or more"
            )
        for name, known in (("precision", PRECISIONS), ("optimizer", OPTIMIZERS), ("batch_norm", BATCH_NORMS)):
            if getattr(self, name) not in known:
                raise InputError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(known)}")
        if self.method is not None:
            method_named(self.method)
        parse_hints(self.hints)


# Of tuning. Hints and rates are chosen by agreement on unused training images (docs/results.md); the form is the
# prototype's.
TUNING = TrainingOptions(
    optimizer="adam",
    learning_rate=1e-2,
    warmup=10,
    method="euclidean",
    distill=0.0,
    batch_norm="training",
    as_evaluated=True,
)


def choose_precision(device: torch.device) -> str:
    """``bf16`` where the device has units for it (such a GPU, AMX or AVX512-BF16 on a CPU), else ``fp32``."""
    if device.type == "cuda":
        # Older GPUs are said to support it, but emulate it.
        has_units = torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] >= 8
        return "bf16" if has_units else "fp32"
    units = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    has_units = any(getattr(torch.cpu, name, bool)() for name in units)  # older versions of PyTorch lack some
    return "bf16" if device.type == "cpu" and has_units else "fp32"


class _Stage(NamedTuple):
    """Steps ``start`` to ``stop`` of a run, with a warm-up and a cosine of their own."""

    start: int
    stop: int
    hints_only: bool = False


def train(
    model: nn.Module,
    epoch_of: Callable[[int], Iterable[_Batch]],
    options: TrainingOptions,
    *,
    example: Tensor,
    steps_per_epoch: int,
    teacher: nn.Module | None = None,
    whitenings: Mapping[str, Whitening] | None = None,
    device: torch.device | str = "cpu",
    folder: Path | None = None,
    validate: Callable[[], Mapping[str, float]] | None = None,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
    watch: Callable[[nn.Module, int, int], bool] | None = None,
) -> dict[str, float]:
    """Train `model` in place; returns the mean loss terms of the last epoch.

    SGD with Nesterov momentum or Adam, a warm-up and a cosine to 0, gradients clipped. The loss is the labels'
    cross-entropy, and with a `teacher` ``(1 - alpha) CE + alpha tau^2 KL(teacher || student) + beta sum hints``, the
    hints those of the method; data without labels leaves CE out. DK layers are trained in the form that is fastest,
    and all give the same gradients. Under `accelerate launch` or `torchrun` each process takes its part of every batch.

    Parameters
    ----------
    epoch_of : the batches of an epoch by its number, on every process all of them, the same in every call
    example : one normalised image ``(1, C, H, W)``
    whitenings : by DK layer, the form in which it is trained (`training.whitened`); the others are trained as they are
    folder : for ``checkpoints/``, ``log.jsonl`` and ``tensorboard/``. A run that was killed goes on from the newest
        good checkpoint there, and ends (one process, CPU, equal threads, not compiled) with the weights of one that was
        not. None: nothing is written
    validate : called after every epoch, its figures go to the log
    progress : called after every step with (steps done, steps in all, mean loss terms of the epoch so far)
    watch : called after every step with (the model, steps done, steps in all), in the form in which it is trained; it
        may put other weights in, and ends the training where it answers False

    Raises
    ------
    InputError
        When labels are missing or do not fit, a hint layer cannot be used, a checkpoint belongs to another run, or the
        loss or its gradient is not finite: the step, the terms and the last good checkpoint are named.
    """
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    set_seed(options.seed)
    name, method = _method(options, teacher)
    # Precision by autocast rather than by the accelerator, which fixes it once for the whole process.
    # Alone it is not told to stay on the CPU either: it refuses that where the process has used a GPU before.
    cpu = torch.device(device).type == "cpu" and not is_alone()
    accelerator = Accelerator(cpu=cpu, device_placement=False)
    rank, world = accelerator.process_index, accelerator.num_processes
    # Alone, the device that was asked for: the accelerator would take the first GPU for any of them.
    device = accelerator.device if world > 1 else torch.device(device)
    precision = choose_precision(device) if options.precision == "auto" else options.precision
    total = options.epochs * steps_per_epoch if options.steps is None else options.steps
    stages = _stages(method, total, steps_per_epoch)
    warmup = (steps_per_epoch, 10) if options.warmup is None else (options.warmup, 3)
    model.to(device)
    example = example.to(device)
    checkpoints = None
    if folder is not None:
        asked = {key: value for key, value in asdict(options).items() if key != "checkpoint_every"}
        asked |= {"method": name, "student": digest_of(model.state_dict())}
        asked |= {"teacher": digest_of(teacher.state_dict() if teacher is not None else {})}
        asked |= {"precision": precision, "steps_per_epoch": steps_per_epoch, "processes": world}
        asked |= {"whitened": sorted(whitenings or ())}
        # Chosen for each device: a run that goes on elsewhere may be given another.
        free = ("precision",) if options.precision == "auto" else ()
        checkpoints = Checkpoints(folder / "checkpoints", asked, options.checkpoint_every, free)

    with ExitStack() as stack:
        stack.enter_context(kept_modes(model))
        stack.enter_context(use_form(model, "folded"))
        set_fast_form(model, device, half=precision == "bf16")
        teacher = teacher.to(device) if teacher is not None and method.teacher else None
        half = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
        with half:
            layout = stack.enter_context(_fast_layout(example, [model] if teacher is None else [model, teacher]))
        stack.enter_context(whitened(model, whitenings or {}))
        teaching = None
        taps: list[tuple[Tap, int]] = []
        hints: list[tuple[Tap, int]] = []
        classes = 0
        if teacher is not None:
            if method.hint is not None:
                pairs = _pairs(model, teacher, method, options, example)
                taps, hints = taps_of(model, teacher, pairs, method, example)
            teaching = stack.enter_context(hinting(teacher, hints))
            if method.regress == "probe":
                classes = _classes(teacher, example)
        student = stack.enter_context(guided(model, taps, hints, method, classes))
        optimizer = _optimizer(student, options)
        state = checkpoints.load() if checkpoints is not None else None
        step, sums = 0, {}
        if method.regress == "probe" and teaching is not None:
            channels = [count for _, count in hints]
            fit_probes(teaching, channels, classes, () if state else _moved(epoch_of(0), device, layout))
        if checkpoints is not None and state is not None:
            step, sums = state["step"], state["sums"]
            student.load_state_dict(state["student"])
            _load_optimizer(optimizer, state["optimizer"])
            if teaching is not None:
                teaching.heads.load_state_dict(state["probes"])
            _log.info("going on from %s, step %d of %d", checkpoints.last, step, total)
        forward, optimizer = accelerator.prepare(student, optimizer)
        teach: _Shown | None = teaching
        if options.compile:
            forward = torch.compile(forward)
            teach = torch.compile(teach) if teach is not None else None
        log = TrainingLog(folder if accelerator.is_main_process else None, step)
        stack.callback(log.close)

        @cache
        def classifies() -> bool:
            with evaluation(model):
                return is_classifier(outputs_of(model(example)))

        student.train()
        _set_modes(model, options, device)
        while step < total:
            epoch, first = divmod(step, steps_per_epoch)
            if state is not None:
                # A data loader may draw the order of an epoch from the global generators when it begins.
                set_random_state(state["epoch_random" if first else "random"])
            epoch_random = random_state()
            batches = _from(epoch_of(epoch), first, rank, world)
            if state is not None and first:
                set_random_state(state["random"])
            state = None
            if first == 0:
                sums = {}
            until = min((epoch + 1) * steps_per_epoch, total)
            for x, y in islice(batches, until - step):
                x, y = x.to(device, memory_format=layout), None if y is None else y.to(device)
                stage = next(each for each in stages if step < each.stop)
                with half, _one_image():
                    terms, loss = _loss(forward, teach, x, y, stage, method, options, step / total, classifies)
                names = ["loss", *terms]
                values = dict(zip(names, torch.stack([loss, *terms.values()]).detach().tolist(), strict=True))
                if not math.isfinite(values["loss"]):
                    _stop("loss", step + 1, total, values, checkpoints, options)
                accelerator.backward(loss)
                if stage.hints_only:
                    _forget_zero_gradients(model)
                norm = accelerator.clip_grad_norm_(student.parameters(), _CLIP)
                if not math.isfinite(norm):
                    _stop("gradient", step + 1, total, values, checkpoints, options)
                rate = options.learning_rate * _rate(step, stage, *warmup)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                log.add(values, len(x) * world)
                done = (step - 1) % steps_per_epoch + 1
                for name, value in values.items():
                    sums[name] = sums.get(name, 0.0) + value
                means = {name: value / done for name, value in sums.items()}
                if progress is not None:
                    progress(step, total, means)
                if step == until:
                    figures = validate() if validate is not None and accelerator.is_main_process else {}
                    log.write(step, epoch + 1, rate, figures)
                elif step % _LOG_STEPS == 0:
                    log.write(step, epoch + 1, rate)
                if checkpoints is not None and accelerator.is_main_process and (step == total or checkpoints.due()):
                    checkpoints.save(
                        step,
                        {
                            "step": step,
                            "sums": sums,
                            "student": student.state_dict(),
                            "optimizer": optimizer.state_dict(),
                            "probes": teaching.heads.state_dict() if teaching is not None else {},
                            "random": random_state(),
                            "epoch_random": epoch_random,
                        },
                    )
                if watch is not None and not watch(model, step, total):
                    total = until = step
                    break
            if step != until:
                raise InputError(
                    f"the data gave {step - epoch * steps_per_epoch} batches in epoch {epoch + 1}; expected "
                    f"{steps_per_epoch}, as many as before: give batches whose number does not change"
                )
        accelerator.wait_for_everyone()
        last = {name: value / ((total - 1) % steps_per_epoch + 1) for name, value in sums.items()}
    model.eval()
    return last


# -- data ---------------------------------------------------------------------------------------------------------


def _from(batches: Iterable[_Batch], first: int, rank: int, world: int) -> Iterator[_Batch]:
    """The batches from number `first` on; of each, the part of this process."""
    if isinstance(batches, Batches):
        return iter(batches.part(first, rank, world))
    rest = iter(batches)
    for _ in range(first):
        next(rest, None)
    return ((x[rank::world], None if y is None else y[rank::world]) for x, y in rest)


def _moved(batches: Iterable[_Batch], device: torch.device, layout: torch.memory_format) -> Iterator[_Batch]:
    for x, y in batches:
        yield x.to(device, memory_format=layout), y


@contextmanager
def _fast_layout(example: Tensor, models: Sequence[nn.Module]) -> Iterator[torch.memory_format]:
    """Weights in the layout that convolutions run faster in, if all models can, inside the block; then as is usual."""
    try:
        for model in models:
            in_layout(model, torch.channels_last)
        layout = layout_of(torch.cat([example, example]), *models)  # the strides of one image say too little
        for model in models:
            in_layout(model, layout)
        yield layout
    finally:
        for model in models:
            in_layout(model, torch.contiguous_format)


@contextmanager
def _one_image() -> Iterator[None]:
    """PyTorch's error about a batch norm that is given one value, as a sentence."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise InputError(
            "a batch of one image has no statistics for a batch norm; give larger batches (drop_last=True leaves out "
            "what is left at the end)"
        ) from error


def _set_modes(model: nn.Module, options: TrainingOptions, device: torch.device) -> None:
    """Training mode for what is to be in it, evaluation for the rest."""
    model.train(not options.as_evaluated)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.train(options.batch_norm == "training")
        elif isinstance(module, nn.RNNBase) and device.type == "cuda":
            module.train()  # cuDNN has no gradient otherwise


def _method(options: TrainingOptions, teacher: nn.Module | None) -> tuple[str, Method]:
    """The method by its name; KP, or labels without a teacher, where none was asked for."""
    name = options.method or (DEFAULT_METHOD if teacher is not None else "labels")
    method = method_named(name)
    if method.teacher and teacher is None:
        raise InputError(f"method {name!r} needs a teacher; give one with --teacher, or use --method labels")
    if options.pre_regressor and method.regress == "where channels differ":
        method = replace(method, regress="always")
    return name, method


# -- hints --------------------------------------------------------------------------------------------------------


def _pairs(
    model: nn.Module, teacher: nn.Module, method: Method, options: TrainingOptions, example: Tensor
) -> list[HintPair]:
    """The hint pairs of the run, told before it starts."""
    pairs = parse_hints(options.hints) or find_pairs(model, teacher, example, activations=method.before_activation)
    if not pairs:
        raise InputError(
            "no feature maps of teacher and student belong together, which hints need; "
            "give some with --hint TEACHER.LAYER=STUDENT.LAYER, or use --method kd"
        )
    if method.two_stage and not options.hints:
        pairs = pairs[len(pairs) // 2 : len(pairs) // 2 + 1]  # FitNets: the middle layer
    _log.info("hints (teacher = student): %s", ", ".join(f"{pair.teacher} = {pair.student}" for pair in pairs))
    return pairs


def _classes(teacher: nn.Module, example: Tensor) -> int:
    with evaluation(teacher):
        outputs = outputs_of(teacher(example))
    if not is_classifier(outputs):
        raise InputError("method 'kp-class' needs a classifier as teacher; use another --method")
    return outputs[0].shape[1]


# -- the schedule -------------------------------------------------------------------------------------------------


def _stages(method: Method, total: int, steps_per_epoch: int) -> list[_Stage]:
    """One stage, or a quarter of the epochs with the hint alone before the rest."""
    if not method.two_stage:
        return [_Stage(0, total)]
    epochs = total // steps_per_epoch
    if epochs < 2:
        raise InputError("method 'fitnets' trains in two stages and needs at least 2 epochs; give --epochs 2 or more")
    first = max(1, epochs // 4) * steps_per_epoch
    return [_Stage(0, first, hints_only=True), _Stage(first, total)]


def _rate(step: int, stage: _Stage, warmup: int, part: int) -> float:
    """Linear warm-up over so many steps (but one `part` of the stage), then a cosine to 0."""
    step, total = step - stage.start, stage.stop - stage.start
    warmup = max(1, min(warmup, total // part))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def _optimizer(student: nn.Module, options: TrainingOptions) -> torch.optim.Optimizer:
    """No decay for biases and norms, and none at all with Adam."""
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    if not parameters:
        raise InputError("all weights of the network are frozen (requires_grad is False), so nothing can be trained")
    if options.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=options.learning_rate)
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=options.learning_rate, momentum=0.9, nesterov=True)


def _load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """The state, its tensors laid out in memory like the parameters: another layout may round differently."""
    optimizer.load_state_dict(state)
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter).copy_(value)


def _forget_zero_gradients(model: nn.Module) -> None:
    """Layers that the hint does not reach stay as they are: no weight decay either."""
    for parameter in model.parameters():
        if parameter.grad is not None and not parameter.grad.any():
            parameter.grad = None


# -- the loss -----------------------------------------------------------------------------------------------------


def _loss(
    forward: _Shown,
    teaching: _Shown | None,
    x: Tensor,
    y: Tensor | None,
    stage: _Stage,
    method: Method,
    options: TrainingOptions,
    done: float,
    classifies: Callable[[], bool],
) -> tuple[dict[str, Tensor], Tensor]:
    """The terms of the loss, without their weights, and their weighted sum; `done` of the run, 0 to 1.

    `classifies`: whether the student is a classifier in evaluation mode, so that further outputs are auxiliary heads.
    """
    if y is None and teaching is None:
        raise InputError("the images have no labels, which training without a teacher needs; give labelled images")
    outputs, maps = forward(x)
    unused = []  # several processes expect a gradient for every parameter, if only zero
    if len(outputs) > 1 and classifies():
        outputs, unused = outputs[:1], outputs[1:]
    with torch.no_grad():
        wanted, hints = teaching(x) if teaching is not None else ([], [])
    terms: dict[str, Tensor] = {}
    weights: dict[str, float] = {}
    if method.hint is not None and (stage.hints_only or not method.two_stage):
        losses = [method.hint(a, b, options.kp_tau) for a, b in zip(maps, hints, strict=True)]
        terms["hints"] = torch.stack(losses).sum()
        weights["hints"] = method.beta if options.beta is None else options.beta
        weights["hints"] *= 1 - (1 - options.beta_end) * done
    if stage.hints_only:
        return terms, weights["hints"] * terms["hints"] + _nothing(outputs + unused)
    if y is not None:
        terms["labels"], weights["labels"] = _labels_loss(outputs, y), 1.0
    if teaching is not None:
        if y is not None:
            weights |= {"labels": 1 - options.alpha, "kd": options.alpha}
        else:
            weights["kd"] = options.distill
        if weights["kd"] or _comparable(outputs, wanted):
            terms["kd"] = _output_loss(outputs, wanted, options)
        else:
            unused = unused + outputs
    loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
    if "hints" not in terms:
        unused = unused + maps
    return terms, loss + _nothing(unused) if unused else loss


def _nothing(tensors: list[Tensor]) -> Tensor:
    """Zero that hangs on all of these."""
    return torch.stack([tensor.float().sum() for tensor in tensors]).sum() * 0.0


def _labels_loss(outputs: list[Tensor], y: Tensor) -> Tensor:
    if not is_classifier(outputs):
        raise InputError(
            "training with labels needs a classifier (one row of class scores per image); give images without labels"
        )
    return labels(outputs[0], y)


def _comparable(outputs: list[Tensor], wanted: list[Tensor]) -> bool:
    """Whether the student's outputs can be held against the teacher's: a classifier's first, of others all."""
    compared = outputs[:1] if is_classifier(wanted) else outputs
    return [output.shape for output in compared] == [output.shape for output in wanted]


def _output_loss(outputs: list[Tensor], wanted: list[Tensor], options: TrainingOptions) -> Tensor:
    """Softened logits for a classifier, else the squared error over the teacher's energy, the mean over outputs."""
    if options.task in (None, "classify") and is_classifier(wanted):
        if not _comparable(outputs, wanted):
            raise InputError(
                f"the teacher gives {wanted[0].shape[1]} class scores and the student tensors of shape "
                f"{tuple(outputs[0].shape)}; give a teacher of the same classes, or use its hints alone (--alpha 0)"
            )
        return distillation(outputs[0], wanted[0], options.tau)
    if not _comparable(outputs, wanted):
        raise InputError(
            f"the network gives {len(outputs)} outputs while it trains and the teacher {len(wanted)}, or they differ "
            "in shape, so it cannot teach them; use hints alone (no labels, tuning), or --tune 0"
        )
    pairs = [(a.float(), b.float()) for a, b in zip(outputs, wanted, strict=True)]
    return torch.stack([(a - b).square().sum() / b.square().sum().clamp_min(1e-12) for a, b in pairs]).mean()


def _stop(
    what: str,
    step: int,
    total: int,
    values: Mapping[str, float],
    checkpoints: Checkpoints | None,
    options: TrainingOptions,
) -> None:
    parts = ", ".join(f"{name} {value:g}" for name, value in values.items() if name != "loss")
    good = f"; the last good checkpoint is {checkpoints.last}" if checkpoints is not None and checkpoints.last else ""
    raise NotFinite(
        f"the {what} is not finite at step {step} of {total} ({parts}){good}; "
        f"lower the learning rate ({options.learning_rate:g}) with --lr, and drop this run with --overwrite"
    )
