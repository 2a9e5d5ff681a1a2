"""Every option, once: its default, one line of help, its check, and which networks know it.

The command line, the Python functions, recipe.yaml (written and read) and docs/options.md are made from these classes.

    compress(model, data, "macs=0.44", CompressOptions(tune=500))     # or flat: compress(model, data, tune=500)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from difflib import get_close_matches
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

from dk2pnet.errors import InputError

__all__ = [
    "CompressOptions",
    "EvaluateOptions",
    "ExploreOptions",
    "Options",
    "ReproduceOptions",
    "TrainOptions",
    "flag_of",
    "plain_value",
    "read_recipe",
    "recipe_of",
    "table_of",
]

TASKS = ("classify", "multilabel", "dense", "embed", "regress")
CRITERIA = ("weight", "response", "loss")
AUGMENTATIONS = ("none", "digits", "natural")
PRECISIONS = ("auto", "fp32", "bf16")

_NUMBERS = {int: (Integral, "a whole number"), float: (Real, "a number")}

_Check = Callable[[Any], bool]


def option(
    default: Any,
    help: str,
    kind: type | None = str,
    *,
    flag: str | None = None,
    expected: str = "",
    check: _Check | None = None,
    torch_only: str = "",
    metavar: str | None = None,
) -> Any:
    """A field that says all there is to know of an option.

    Parameters
    ----------
    kind : type of one value on the command line; None where only Python can give it
    flag : its name there, where that is not the field's
    expected, check : what is said of a value (not of None) that the check refuses
    torch_only : why it does not go with an .onnx model
    """
    more = {"help": help, "kind": kind, "flag": flag, "expected": expected, "check": check}
    return field(default=default, metadata=more | {"torch_only": torch_only, "metavar": metavar})


def one_of(default: Any, names: Sequence[str], help: str, **more: Any) -> Any:
    """An option whose value is one of some names."""
    return option(default, help, expected=f"one of {', '.join(names)}", check=lambda value: value in names, **more)


def at_least(least: float, default: Any, help: str, kind: type = int, **more: Any) -> Any:
    """An option whose value is a number from `least` on."""
    return option(default, help, kind, expected=f"{least:g} or more", check=lambda value: value >= least, **more)


def above(least: float, default: Any, help: str, **more: Any) -> Any:
    """An option whose value is a number above `least`."""
    return option(default, help, float, expected=f"more than {least:g}", check=lambda value: value > least, **more)


_TRAINING = "which can be decomposed and tuned, not trained"
_T = TypeVar("_T", bound="Options")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What all verbs share: how an option is checked, given flat, and written down."""

    def __post_init__(self) -> None:
        for each in fields(self):
            value, check = getattr(self, each.name), each.metadata["check"]
            if isinstance(each.default, tuple):
                value = (value,) if isinstance(value, str) or not hasattr(value, "__iter__") else tuple(value)
                object.__setattr__(self, each.name, value)
            if value is None:
                continue
            kind, expected = _NUMBERS.get(each.metadata["kind"], (object, ""))
            values = getattr(self, each.name) if isinstance(each.default, tuple) else (value,)
            if not all(isinstance(one, kind) for one in values) or (check is not None and not check(value)):
                raise InputError(f"{said(each.name)} is {value!r}; expected {each.metadata['expected'] or expected}")

    @classmethod
    def of(cls: type[_T], options: Options | None, flat: Mapping[str, Any]) -> _T:
        """`options` (or the defaults) with those in `flat` in their place; a wrong name is answered with near ones."""
        known = {each.name for each in fields(cls)}
        for name in flat:
            if name not in known:
                near = get_close_matches(name, known, 3, 0.5)
                hint = (
                    f"; did you mean {' or '.join(near)}?" if near else f"; expected some of {', '.join(sorted(known))}"
                )
                raise InputError(f"there is no option {name!r}{hint}")
        if options is not None and not isinstance(options, cls):
            raise InputError(f"options is a {type(options).__name__}; expected {cls.__name__}(...), or options by name")
        return replace(options, **flat) if options is not None else cls(**flat)

    def changed(self) -> list[Field]:
        """The options that are not at their defaults."""
        # What is compared with None may be anything, and say anything to being compared.
        given = ((each, getattr(self, each.name)) for each in fields(self))
        return [each for each, v in given if (v is not None if each.default is None else v != each.default)]

    def check_for_onnx(self) -> None:
        """`InputError` for what does not go with an .onnx model."""
        for each in self.changed():
            if reason := each.metadata["torch_only"]:
                raise InputError(f"{flag_of(each)} does not go with an .onnx model, {reason}; leave it away")

    def plain(self) -> dict[str, Any]:
        """As YAML can hold them; Python objects cannot be repeated from a recipe and become None."""
        return {each.name: plain_value(getattr(self, each.name)) for each in fields(self)}


@dataclass(frozen=True, kw_only=True)
class _Data(Options):
    normalize: Any = option(None, "imagenet, cifar10, ... or MEAN,.../STD,... of pixels in [0, 1].")
    data_dir: str | None = option(None, "Folder with local copies of data sets (or DK2PNET_DATA).")


@dataclass(frozen=True, kw_only=True)
class _Named(_Data):
    weights: str | None = option(
        None,
        "A .safetensors, .pt, .pth, .th or .bin file, 'pretrained', or the OUT folder of a FILE.py:FUNCTION.",
        torch_only="which holds its weights",
    )
    input_size: int | None = at_least(1, None, "Side of the images in pixels.")
    classes: int | None = at_least(
        1, None, "Number of classes, where the data does not say it.", torch_only="whose outputs are what they are"
    )


@dataclass(frozen=True, kw_only=True)
class _Device(Options):
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    threads: int | None = at_least(1, None, "CPU threads of PyTorch and ONNX Runtime.")


@dataclass(frozen=True, kw_only=True)
class _Once(_Device):
    seed: int = option(0, "Seed of everything random.", int)
    overwrite: bool = option(False, "Replace an OUT folder of an earlier run.", bool)


@dataclass(frozen=True, kw_only=True)
class _Long(Options):
    precision: str = one_of(
        "auto",
        PRECISIONS,
        "fp32 or bf16, for training; auto: bf16 where the processor or GPU has units for it.",
        torch_only="which is tuned in fp32",
    )
    checkpoint_every: float = at_least(0, 60.0, "Seconds between two checkpoints of the training.", float)


@dataclass(frozen=True, kw_only=True)
class _Augmented(Options):
    augment: str | None = one_of(
        None,
        AUGMENTATIONS,
        "Of the images: natural (shift, mirror), digits (shift) or none; without: by --data.",
    )


@dataclass(frozen=True, kw_only=True)
class _Trained(Options):
    batch_size: int = at_least(1, 128, "Images per training step.", torch_only=_TRAINING)
    method: str | None = option(
        None,
        "What the teacher teaches with: kd (softened logits), and beside them kp-channel (KP, the default), "
        "kp-position, kp-unit, kp-class, euclidean or at (hints); or fitnets (two stages). labels: no teacher.",
        torch_only=_TRAINING,
    )
    hints: Sequence[str] = option(
        (),
        "TEACHER.LAYER=STUDENT.LAYER in place of the hint pairs that are found. Repeatable.",
        flag="--hint",
        torch_only=_TRAINING,
    )
    compile: bool = option(
        False, "Train with torch.compile (needs a C++ compiler on a CPU).", bool, torch_only=_TRAINING
    )


@dataclass(frozen=True, kw_only=True)
class _Decompose(_Augmented, _Named):
    target: str | None = option(
        None,
        "Where it runs and is timed: onnxruntime (the default), onnxruntime-int8, openvino, pytorch, pytorch-compile, "
        "cuda. With a budget in points, given, smallest means fastest there.",
    )
    holdout: Any = option(
        None,
        "Folder of images that decide on a budget in points; .npz beside --data X.npz: of an .onnx model what is held "
        "out in place of the last fifth.",
        metavar="FOLDER",
    )
    holdout_split: str | None = option(None, "Part of a split that decides, such as 'test[:50%]'; the rest reports.")
    criterion: str | None = one_of(
        None, CRITERIA, "loss (the default), response (that of .onnx models) or weight (needs no images)."
    )
    task: str | None = one_of(
        None,
        TASKS,
        "What the outputs are for: classify (rows of class scores), multilabel, dense (class scores at positions), "
        "embed (directions) or regress (numbers); without: by their values. It decides how students are judged.",
    )
    keep: Sequence[str] = option(
        (), "Convolutions that stay dense: a name, a module that holds them (layer1), or a pattern. Repeatable."
    )
    first: bool = option(
        False, "With --budget kernels=N: the first convolution too. Other budgets spend on it as on any other.", bool
    )
    calibration_images: int = at_least(2, 2000, "Training images, labels unused; a fifth only decides.")
    calibration_data: str | None = option(
        None, "Other images to calibrate and tune on, as --data: a name or a folder. Labels are not used."
    )
    memory: float = above(
        0,
        4.0,
        "GiB for all that is kept: statistics of the layers, images, maps in the reconstruction. The networks "
        "themselves, one batch and tuning come on top. A layer that asks for more than half of it stays dense.",
    )
    rebuild: bool = option(
        True,
        "Try the layer-by-layer reconstruction where no tuning follows or is kept (minutes for large images).",
        bool,
    )
    tune: Any = option(
        None,
        "Distillation on the calibration images after the decomposition, without labels: steps (150), a time (2m) "
        "or 0. Without it: 150 steps, 8 minutes for large networks, none where --epochs trains it.",
    )


@dataclass(frozen=True, kw_only=True)
class _Compress(_Trained):
    int8: bool = option(False, "Also write model.int8.onnx, and compare it.", bool)
    pt2: bool = option(False, "Also write model.pt2 (torch.export).", bool, torch_only="which torch.export cannot take")
    epochs: int = at_least(
        0, 0, "Epochs of training (KP, distillation, labels) after the decomposition.", torch_only=_TRAINING
    )
    learning_rate: float = above(0, 0.02, "Learning rate of the training.", flag="--lr", torch_only=_TRAINING)
    test_data: Any = option(None, "Labelled batches for the report, where the data are batches.", None)
    example_input: Any = option(
        None,
        "One normalised image (1, C, H, W); enough for criterion weight without training.",
        None,
        torch_only="which says what it takes",
    )


@dataclass(frozen=True, kw_only=True)
class CompressOptions(_Once, _Long, _Compress, _Decompose):
    """How `compress` works; see docs/options.md."""


@dataclass(frozen=True, kw_only=True)
class _Explore(Options):
    budgets: Sequence[Any] = option(
        (), "macs=F, params=F, latency=F or kernels=K. Repeatable. Without: eight shares.", flag="--budget"
    )
    points: int = at_least(2, 8, "How many budgets, where none are given.")


@dataclass(frozen=True, kw_only=True)
class ExploreOptions(_Once, _Long, _Explore, _Decompose):
    """How `explore` works; see docs/options.md."""


@dataclass(frozen=True, kw_only=True)
class _Train(_Augmented, _Named, _Trained):
    images: int | None = option(None, "So many of the training images. Without: all.", int)
    epochs: int = at_least(1, 20, "Passes over the training images.")
    learning_rate: float = above(0, 0.1, "Highest learning rate.", flag="--lr")
    weight_decay: float = at_least(0, 5e-4, "Weight decay of weights (not of biases and norms).", float)
    teacher: str | None = option(None, "Network that teaches, as --model: a name or an OUT folder.")
    teacher_weights: str | None = option(None, "Weights of the teacher, as --weights.")
    alpha: float = option(0.9, "Weight of the softened logits; the labels have the rest.", float)
    tau: float = above(0, 4.0, "Temperature of the softened logits.")
    beta: float | None = at_least(0, None, "Weight of each hint; each method has its own.", float)
    beta_end: float = option(1.0, "What is left of that weight at the end, to which it falls.", float)
    kp_tau: float = above(0, 1.0, "Temperature of KP.")
    pre_regressor: bool = option(False, "A pre-regressor at every hint, also where channels agree.", bool)


@dataclass(frozen=True, kw_only=True)
class TrainOptions(_Once, _Long, _Train):
    """How `train` works; see docs/options.md."""


@dataclass(frozen=True, kw_only=True)
class _Evaluate(Options):
    split: str = option("test", "Split of the data set.")
    batch_size: int | None = at_least(1, None, "Images per forward pass.")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(_Device, _Evaluate, _Named):
    """How `evaluate` works; see docs/options.md."""


@dataclass(frozen=True, kw_only=True)
class _Reproduce(Options):
    student: str | None = option(None, "A network by name, such as dk2pnet-20x32 (depth x width).")
    teacher: str | None = option(None, "An OUT folder or a name with its weights; a name alone is trained first.")
    teacher_weights: str | None = option(None, "Weights of that teacher, as --weights.")
    methods: Sequence[str] = option(
        (),
        "labels, kd, fitnets, euclidean+kd, at, kp, kp+kd, kp-falling+kd. Repeatable. Without: all.",
        flag="--method",
    )
    seeds: Sequence[int] = option((0, 1, 2), "Repeatable. Without: 0, 1 and 2.", int, flag="--seed")
    epochs: int | None = option(None, "Of every student.", int)
    teacher_epochs: int | None = option(None, "Of a teacher that is trained first.", int)
    learning_rate: float | None = option(None, "Highest learning rate.", float, flag="--lr")
    quick: bool = option(False, "The same path in a minute or two, on small networks.", bool)


@dataclass(frozen=True, kw_only=True)
class ReproduceOptions(_Device, _Long, _Reproduce, _Data):
    """How `reproduce` works; see docs/options.md."""


# -- what a verb is given beside its options --------------------------------------------------------------------------

REQUIRED = object()


@dataclass(frozen=True)
class Argument:
    """Something that a verb works on: `default` is `REQUIRED` where it has to be given."""

    name: str
    help: str
    default: Any = REQUIRED
    kind: type = str
    positional: bool = False


_DATA = "digits, cifar10, a hub name, a parquet folder or an image folder"
_MODEL = (
    "resnet20 ... resnet110, vgg8, lenet, dk2pnet-20x32 (depth x width), torchvision/NAME, timm/NAME, "
    "FILE.py:FUNCTION, an OUT folder"
)
_ONNX_DATA = (
    f"{_DATA}; or an .npz file, samples along the first axis: of an .onnx model one array per input, else images as "
    "the network takes them."
)
_OUT = Argument("out", "Folder to write; must not exist.", kind=Path)


@dataclass(frozen=True)
class Verb:
    """A command: what it does, what it is given, and its options."""

    help: str
    arguments: tuple[Argument, ...]
    options: type[Options]


VERBS = {
    "compress": Verb(
        "Compress a trained CNN: a smaller network as safetensors and ONNX, with a report of what was gained and lost.",
        (
            Argument("model", f"{_MODEL}, or an .onnx file."),
            _OUT,
            Argument("data", _ONNX_DATA, None),
            Argument(
                "budget",
                "macs=F, params=F or measured latency=F (fraction of the network's), kernels=K per input channel; or "
                "the smallest network that loses at most drop=0.5 points, disagree=2 % of answers or error=0.02 of "
                "outputs.",
                "macs=0.44",
            ),
        ),
        CompressOptions,
    ),
    "explore": Verb(
        "Show the curve before the choice: accuracy against MACs, parameters and latency at about eight budgets.",
        (Argument("model", f"{_MODEL}, or an .onnx file."), _OUT, Argument("data", _ONNX_DATA, None)),
        ExploreOptions,
    ),
    "train": Verb(
        "Train a network on labelled images, or beside a teacher. Killed, the same command goes on where it was.",
        (Argument("model", f"{_MODEL}."), Argument("data", f"{_DATA}."), _OUT),
        TrainOptions,
    ),
    "reproduce": Verb(
        "Repeat the paper's experiment on a data set: teacher, student, every method; a table that grows over days.",
        (
            Argument("data", "mnist, cifar10, cifar100, svhn, svhn_10k, digits, or as --data.", positional=True),
            Argument("out", "Folder of the runs; a second call adds to it.", kind=Path),
        ),
        ReproduceOptions,
    ),
    "evaluate": Verb(
        "Measure the accuracy of a network, of an OUT folder, or of an ONNX file in ONNX Runtime.",
        (
            Argument("model", "A network by name (with --weights), an OUT folder, or an .onnx file."),
            Argument("data", f"{_DATA}."),
        ),
        EvaluateOptions,
    ),
}


# -- written and read --------------------------------------------------------------------------------------------------


def flag_of(each: Field) -> str:
    """The option's name on the command line."""
    return each.metadata["flag"] or "--" + each.name.replace("_", "-")


def said(name: str) -> str:
    """The name in a sentence."""
    return name.replace("_", " ")


def recipe_of(arguments: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """What repeats a run: the arguments and all options, as YAML can hold them."""
    kept = {name: value for name, value in options.plain().items() if name not in _NOT_IN_RECIPES}
    return {name: plain_value(value) for name, value in arguments.items()} | kept


_NOT_IN_RECIPES = ("overwrite", "test_data", "example_input")


def read_recipe(path: str | Path, verb: str) -> dict[str, Any]:
    """The options in a recipe.yaml that a run of `verb` wrote, those that are None left out.

    Raises
    ------
    InputError
        When the file cannot be read, or holds what the verb does not know.
    """
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"recipe {path} cannot be read ({str(error).splitlines()[0]}); give a recipe.yaml") from error
    if not isinstance(found, dict):
        raise InputError(f"recipe {path} holds no options; expected a recipe.yaml that dk2pnet wrote")
    known = {each.name for each in fields(VERBS[verb].options)} | {each.name for each in VERBS[verb].arguments}
    unknown = sorted(str(key) for key in set(found) - known)
    if unknown:
        raise InputError(f"recipe {path} has the option {unknown[0]!r}, which {verb} does not know; remove it")
    return {key: value for key, value in found.items() if value is not None}


def table_of(verb: str) -> str:
    """The options of a verb as a Markdown table, for docs/options.md."""
    rows = ["| option | default | what it does |", "|---|---|---|"]
    for each in fields(VERBS[verb].options):
        name = f"`{flag_of(each)}`" if each.metadata["kind"] else f"`{each.name}` (Python)"
        default = "" if each.default in (None, (), False) else f"`{each.default}`"
        torch = " *Not for .onnx models.*" if each.metadata["torch_only"] else ""
        rows.append(f"| {name} | {default} | {each.metadata['help'].replace('|', chr(92) + '|')}{torch} |")
    return "\n".join(rows)


def plain_value(value: Any) -> Any:
    """A value as YAML can hold it; None for what it cannot."""
    if isinstance(value, list | tuple):
        found = [plain_value(item) for item in value]
        return None if any(item is None for item in found) else found
    if value is None or isinstance(value, str | int | float | bool):
        return value
    # A budget or a normalisation is its text; a model, batches or a tensor cannot be written down.
    return str(value) if isinstance(value, Path) or hasattr(type(value), "parse") else None
