"""The command line: parses, calls, prints."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dk2pnet.errors import InputError
from dk2pnet.plan import Plan
from dk2pnet.processes import is_main

__all__ = ["app", "main"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Make trained convolutional networks fast to run: dominant kernels, knowledge pre-regression, proof.",
)
console = Console()
stderr = Console(stderr=True)


def _read_recipe(context: typer.Context, value: Path | None) -> Path | None:
    """Take the options of a recipe as defaults, so that those on the command line win."""
    if value is None:
        return None
    try:
        options = yaml.safe_load(value.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"recipe {value} cannot be read ({str(error).splitlines()[0]}); give a recipe.yaml") from error
    if not isinstance(options, dict):
        raise InputError(f"recipe {value} holds no options; expected a recipe.yaml that dk2pnet wrote")
    known = {parameter.name for parameter in context.command.params}
    unknown = sorted(str(key) for key in set(options) - known)
    if unknown:
        raise InputError(
            f"recipe {value} has the option {unknown[0]!r}, which {context.info_name} does not know; remove it"
        )
    given = {key: option for key, option in options.items() if option is not None}
    context.default_map = {**(context.default_map or {}), **given}
    return value


Model = Annotated[
    str,
    typer.Option(
        help="resnet20 ... resnet110, vgg8, lenet, dk2pnet-20x32 (depth x width), torchvision/NAME, timm/NAME, "
        "FILE.py:FUNCTION, an OUT folder, or (compress) an .onnx file."
    ),
]
Data = Annotated[str | None, typer.Option(help="digits, cifar10, a hub name, a parquet folder or an image folder.")]
DataDir = Annotated[str | None, typer.Option(help="Folder with local copies of data sets (or DK2PNET_DATA).")]
Weights = Annotated[str | None, typer.Option(help="A .safetensors, .pt, .pth, .th or .bin file, or 'pretrained'.")]
Normalize = Annotated[str | None, typer.Option(help="imagenet, cifar10, ... or MEAN,.../STD,... of pixels in [0, 1].")]
InputSize = Annotated[int | None, typer.Option(help="Side of the images in pixels.")]
Classes = Annotated[int | None, typer.Option(help="Number of classes, where the data does not say it.")]
BatchSize = Annotated[int, typer.Option(help="Images per training step.")]
Precision = Annotated[
    str, typer.Option(help="fp32 or bf16, for training; auto: bf16 where the processor or GPU has units for it.")
]
Method = Annotated[
    str | None,
    typer.Option(
        help="What the teacher teaches with: kd (softened logits), and beside them kp-channel (KP, the default), "
        "kp-position, kp-unit, kp-class, euclidean or at (hints); or fitnets (two stages). labels: no teacher."
    ),
]
Hints = Annotated[
    list[str] | None,
    typer.Option("--hint", help="TEACHER.LAYER=STUDENT.LAYER in place of the hint pairs that are found. Repeatable."),
]
Holdout = Annotated[
    str | None, typer.Option(help="Folder of images that decide on a budget in points.", metavar="FOLDER")
]
HoldoutSplit = Annotated[
    str | None, typer.Option(help="Part of a split that decides, such as 'test[:50%]'; the rest reports.")
]
Criterion = Annotated[
    str | None, typer.Option(help="loss (the default), response (that of .onnx models) or weight (needs no images).")
]
Keep = Annotated[
    list[str] | None,
    typer.Option(
        help="Convolutions that stay dense: a name, a module that holds them (layer1), or a pattern. Repeatable."
    ),
]
First = Annotated[bool, typer.Option("--first", help="Decompose the first convolution too.")]
CalibrationImages = Annotated[int, typer.Option(help="Training images, labels unused; a fifth only decides.")]
CalibrationData = Annotated[
    str | None,
    typer.Option(help="Other images to calibrate and tune on, as --data: a name or a folder. Labels are not used."),
]
Memory = Annotated[float, typer.Option(help="GiB for statistics of the layers.")]
Rebuild = Annotated[
    bool,
    typer.Option(
        help="Try the layer-by-layer reconstruction where no tuning follows or is kept (slow for large images)."
    ),
]
Tune = Annotated[
    str | None,
    typer.Option(
        help="Distillation on the calibration images after the decomposition, without labels: steps (150), a time (2m) "
        "or 0. Without it: 150 steps, unless the network is large or --epochs trains it."
    ),
]
Augment = Annotated[
    str | None, typer.Option(help="Of the images: natural (shift, mirror), digits (shift) or none; without: by --data.")
]
Compile = Annotated[bool, typer.Option("--compile", help="Train with torch.compile (needs a C++ compiler on a CPU).")]
CheckpointEvery = Annotated[float, typer.Option(help="Seconds between two checkpoints of the training.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Threads = Annotated[int | None, typer.Option(help="CPU threads of PyTorch and ONNX Runtime.")]
Out = Annotated[Path, typer.Option(help="Folder to write; must not exist.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an OUT folder of an earlier run.")]
Recipe = Annotated[
    Path | None,
    typer.Option(help="recipe.yaml of an earlier run; options given here win.", is_eager=True, callback=_read_recipe),
]


@app.command()
def compress(
    context: typer.Context,
    model: Model,
    out: Out,
    data: Annotated[
        str | None,
        typer.Option(
            help="digits, cifar10, a hub name, a parquet folder or an image folder; for an .onnx model also an .npz "
            "file with one array per input, samples along the first axis."
        ),
    ] = None,
    weights: Weights = None,
    normalize: Normalize = None,
    budget: Annotated[
        str,
        typer.Option(
            help="macs=F, params=F or measured latency=F (fraction of the network's), kernels=K per input channel; or "
            "the smallest network that loses at most drop=0.5 points, disagree=2 % of answers or error=0.02 of outputs."
        ),
    ] = "macs=0.44",
    target: Annotated[
        str | None,
        typer.Option(
            help="Where it runs and is timed: onnxruntime (the default), onnxruntime-int8, openvino, pytorch, "
            "pytorch-compile, cuda. With a budget in points, given, smallest means fastest there."
        ),
    ] = None,
    holdout: Holdout = None,
    holdout_split: HoldoutSplit = None,
    int8: Annotated[bool, typer.Option("--int8", help="Also write model.int8.onnx, and compare it.")] = False,
    pt2: Annotated[bool, typer.Option("--pt2", help="Also write model.pt2 (torch.export).")] = False,
    criterion: Criterion = None,
    keep: Keep = None,
    first: First = False,
    calibration_images: CalibrationImages = 2000,
    calibration_data: CalibrationData = None,
    memory: Memory = 2.0,
    rebuild: Rebuild = True,
    tune: Tune = None,
    augment: Augment = None,
    epochs: Annotated[
        int, typer.Option(help="Epochs of training (KP, distillation, labels) after the decomposition.")
    ] = 0,
    batch_size: BatchSize = 128,
    learning_rate: Annotated[float, typer.Option("--lr", help="Learning rate of the training.")] = 0.02,
    method: Method = None,
    hints: Hints = None,
    precision: Precision = "auto",
    compile: Compile = False,
    checkpoint_every: CheckpointEvery = 60.0,
    data_dir: DataDir = None,
    input_size: InputSize = None,
    classes: Classes = None,
    seed: Seed = 0,
    device: Device = "auto",
    threads: Threads = None,
    overwrite: Overwrite = False,
    recipe: Recipe = None,
) -> None:
    """Compress a trained CNN: a smaller network as safetensors and ONNX, with a report of what was gained and lost."""
    if model.lower().endswith(".onnx"):
        _compress_onnx(context, overwrite)
        return
    from dk2pnet.commands.compress import compress as run

    with _progress() as progress:
        result = run(
            model,
            budget,
            criterion or "loss",
            data,
            weights=weights,
            normalize=normalize,
            data_dir=data_dir,
            input_size=input_size,
            classes=classes,
            keep=keep or [],
            first=first,
            calibration_images=calibration_images,
            calibration_data=calibration_data,
            memory=memory,
            rebuild=rebuild,
            tune=tune,
            augment=augment,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            method=method,
            hints=hints or [],
            precision=precision,
            compile=compile,
            checkpoint_every=checkpoint_every,
            seed=seed,
            device=device,
            threads=threads,
            target=target,
            holdout=holdout,
            holdout_split=holdout_split,
            int8=int8,
            pt2=pt2,
            out=out,
            overwrite=overwrite,
            command=_command(),
            progress=progress,
        )
    if not is_main():
        return
    _print_result(result.plan, result.metrics)
    written = ["model.safetensors", "plan.json", "model.onnx"]
    written += ["model.int8.onnx"] * ("int8" in result.metrics) + ["model.pt2"] * pt2
    _say(f"Written to {out}: {', '.join(written)}, report.html, metrics.json, recipe.yaml")


@app.command()
def explore(
    context: typer.Context,
    model: Model,
    out: Out,
    data: Data = None,
    budgets: Annotated[
        list[str] | None,
        typer.Option("--budget", help="macs=F, params=F, latency=F or kernels=K. Repeatable. Without: eight shares."),
    ] = None,
    points: Annotated[int, typer.Option(help="How many budgets, where none are given.")] = 8,
    weights: Weights = None,
    normalize: Normalize = None,
    criterion: Criterion = None,
    target: Annotated[str, typer.Option(help="Where it runs and is timed, as for compress.")] = "onnxruntime",
    holdout: Holdout = None,
    holdout_split: HoldoutSplit = None,
    keep: Keep = None,
    first: First = False,
    calibration_images: CalibrationImages = 2000,
    calibration_data: CalibrationData = None,
    memory: Memory = 2.0,
    rebuild: Rebuild = True,
    tune: Tune = None,
    augment: Augment = None,
    precision: Precision = "auto",
    checkpoint_every: CheckpointEvery = 60.0,
    data_dir: DataDir = None,
    input_size: InputSize = None,
    classes: Classes = None,
    seed: Seed = 0,
    device: Device = "auto",
    threads: Threads = None,
    overwrite: Overwrite = False,
    recipe: Recipe = None,
) -> None:
    """Show the curve before the choice: accuracy against MACs, parameters and latency at about eight budgets."""
    from dk2pnet.commands.explore import explore as run
    from dk2pnet.report.curve import CURVE_HEADER, curve_rows, knee_sentence
    from dk2pnet.report.tables import rich_table

    options = {name: value for name, value in context.params.items() if name not in ("recipe", "criterion")}
    options |= {"criterion": criterion or "loss", "keep": keep or [], "budgets": budgets or []}
    with _progress() as progress:
        metrics = run(**options, command=_command(), progress=progress)
    if not is_main():
        return
    console.print(rich_table(metrics["measure"], CURVE_HEADER, curve_rows(metrics)))
    for line in (knee_sentence(metrics), *metrics["notes"]):
        _say(line)
    _say(f"Written to {out}: report.html, metrics.json, recipe.yaml")


def _compress_onnx(context: typer.Context, overwrite: bool) -> None:
    """`compress` for an ONNX file, which takes some of the options only."""
    from dk2pnet.commands.compress_onnx import compress_onnx

    given = context.params
    taken = set(signature(compress_onnx).parameters)
    for parameter in context.command.params:
        name = parameter.name or ""
        default = parameter.default  # of the command: the context's may come from a recipe
        if name not in ("recipe", *taken) and (given[name] or default) and given[name] != default:
            raise InputError(
                f"{parameter.opts[0]} does not go with an .onnx model, which can be decomposed and tuned, not trained; "
                "leave it away"
            )
    options = {name: value for name, value in given.items() if name in taken}
    options |= {"criterion": given["criterion"] or "response", "keep": given["keep"] or []}
    options |= {"target": given["target"] or "onnxruntime"}
    with _progress() as progress:
        result = compress_onnx(**{**options, "command": _command(), "progress": progress})
    _print_result(result.plan, result.metrics)
    _say(f"Written to {given['out']}: model.onnx, plan.json, report.html, metrics.json, recipe.yaml")


def _print_result(plan: Plan, metrics: Mapping[str, Any]) -> None:
    from dk2pnet.report.tables import (
        INT8_HEADER,
        PROBES_HEADER,
        comparison_rows,
        decided_sentence,
        int8_rows,
        probe_rows,
        rich_table,
    )

    _say(plan.summary())
    console.print(rich_table("", ("", "teacher", "student", "change"), comparison_rows(metrics)))
    if metrics.get("int8"):
        console.print(rich_table("", INT8_HEADER, int8_rows(metrics)))
    if metrics.get("decided"):
        console.print(rich_table("", PROBES_HEADER, probe_rows(metrics)))
        _say(decided_sentence(metrics["decided"]))
    for decision in metrics["decisions"]:
        after = "-" if decision["after"] is None else f"{decision['after']:.4g}"
        kept = "kept" if decision["kept"] else "not kept"
        _say(f"{decision['what']}: {decision['measure']} {decision['before']:.4g} -> {after}, {kept}")
    for note in metrics.get("notes", ()):
        _say(note)


@app.command()
def train(
    context: typer.Context,
    model: Model,
    data: Annotated[str, typer.Option(help="digits, cifar10, a hub name, a parquet folder or an image folder.")],
    out: Out,
    images: Annotated[int | None, typer.Option(help="So many of the training images. Without: all.")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training images.")] = 20,
    augment: Augment = None,
    batch_size: BatchSize = 128,
    learning_rate: Annotated[float, typer.Option("--lr", help="Highest learning rate.")] = 0.1,
    weight_decay: Annotated[float, typer.Option(help="Weight decay of weights (not of biases and norms).")] = 5e-4,
    teacher: Annotated[
        str | None, typer.Option(help="Network that teaches, as --model: a name or an OUT folder.")
    ] = None,
    teacher_weights: Annotated[str | None, typer.Option(help="Weights of the teacher, as --weights.")] = None,
    method: Method = None,
    hints: Hints = None,
    alpha: Annotated[float, typer.Option(help="Weight of the softened logits; the labels have the rest.")] = 0.9,
    tau: Annotated[float, typer.Option(help="Temperature of the softened logits.")] = 4.0,
    beta: Annotated[float | None, typer.Option(help="Weight of each hint; each method has its own.")] = None,
    beta_end: Annotated[float, typer.Option(help="What is left of that weight at the end, to which it falls.")] = 1.0,
    kp_tau: Annotated[float, typer.Option(help="Temperature of KP.")] = 1.0,
    pre_regressor: Annotated[
        bool, typer.Option("--pre-regressor", help="A pre-regressor at every hint, also where channels agree.")
    ] = False,
    precision: Precision = "auto",
    compile: Compile = False,
    checkpoint_every: CheckpointEvery = 60.0,
    weights: Weights = None,
    normalize: Normalize = None,
    data_dir: DataDir = None,
    input_size: InputSize = None,
    classes: Classes = None,
    seed: Seed = 0,
    device: Device = "auto",
    threads: Threads = None,
    overwrite: Overwrite = False,
    recipe: Recipe = None,
) -> None:
    """Train a network on labelled images, or beside a teacher. Killed, the same command goes on where it was."""
    from dk2pnet.commands.train import train_network
    from dk2pnet.training.trainer import TrainingOptions

    options = TrainingOptions(
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        method=method,
        hints=tuple(hints or ()),
        alpha=alpha,
        tau=tau,
        beta=beta,
        beta_end=beta_end,
        kp_tau=kp_tau,
        pre_regressor=pre_regressor,
        precision=precision,
        compile=compile,
        seed=seed,
        checkpoint_every=checkpoint_every,
    )
    recipe_options = {
        key: value
        for key, value in context.params.items()
        if key not in ("out", "overwrite", "recipe") and _is_plain(value)
    }
    with _progress() as progress:
        metrics = train_network(
            model,
            data,
            out,
            teacher=teacher,
            teacher_weights=teacher_weights,
            weights=weights,
            normalize=normalize,
            data_dir=data_dir,
            input_size=input_size,
            classes=classes,
            options=options,
            images=images,
            augment=augment,
            device=device,
            threads=threads,
            overwrite=overwrite,
            command=_command(),
            recipe=recipe_options,
            progress=progress,
        )
    if not is_main():
        return
    figures = metrics["network"]
    test, validation = figures["accuracy"], figures["validation_accuracy"]
    said = ["no labelled test split" if test is None else f"test accuracy {test:.2f} %"]
    said += [f"validation accuracy {validation:.2f} %"] if validation is not None else []
    _say(", ".join(said))
    _say(f"Written to {out}")


@app.command()
def reproduce(
    context: typer.Context,
    data: Annotated[str, typer.Argument(help="mnist, cifar10, cifar100, svhn, svhn_10k, digits, or as --data.")],
    out: Annotated[Path, typer.Option(help="Folder of the runs; a second call adds to it.")],
    student: Annotated[
        str | None, typer.Option(help="A network by name, such as dk2pnet-20x32 (depth x width).")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="An OUT folder or a name with its weights; a name alone is trained first.")
    ] = None,
    teacher_weights: Annotated[str | None, typer.Option(help="Weights of that teacher, as --weights.")] = None,
    normalize: Normalize = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            help="labels, kd, fitnets, euclidean+kd, at, kp, kp+kd, kp-falling+kd. Repeatable. Without: all.",
        ),
    ] = None,
    seeds: Annotated[list[int] | None, typer.Option("--seed", help="Repeatable. Without: 0, 1 and 2.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Of every student.")] = None,
    teacher_epochs: Annotated[int | None, typer.Option(help="Of a teacher that is trained first.")] = None,
    learning_rate: Annotated[float | None, typer.Option("--lr", help="Highest learning rate.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="The same path in a minute or two, on small networks.")
    ] = False,
    precision: Precision = "auto",
    checkpoint_every: CheckpointEvery = 60.0,
    data_dir: DataDir = None,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Repeat the paper's experiment on a data set: teacher, student, every method; a table that grows over days."""
    from dk2pnet.commands.reproduce import reproduce as run
    from dk2pnet.report.reproduction import REPRODUCTION_HEADER, reproduction_rows
    from dk2pnet.report.tables import rich_table

    options = {**context.params, "methods": methods or (), "seeds": seeds or (0, 1, 2)}
    with _progress() as progress:
        results = run(**options, command=_command(), progress=progress)
    if not is_main():
        return
    console.print(rich_table(data, REPRODUCTION_HEADER, reproduction_rows(results)))
    where = ["--out", str(out), *(["--data-dir", data_dir] if data_dir else [])]
    for command in results["continue"]:
        command = command.replace("--out OUT", shlex.join(where), 1)  # results.json names no folder
        _say(f"Not run yet: {command}")
    _say(f"Written to {out}: results.md, results.json, figure.svg")


@app.command()
def evaluate(
    model: Annotated[str, typer.Option(help="A network by name (with --weights), an OUT folder, or an .onnx file.")],
    data: Annotated[str, typer.Option(help="digits, cifar10, a hub name, a parquet folder or an image folder.")],
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "test",
    weights: Weights = None,
    normalize: Normalize = None,
    data_dir: DataDir = None,
    input_size: InputSize = None,
    classes: Classes = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per forward pass.")] = None,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Measure the accuracy of a network, of an OUT folder, or of an ONNX file in ONNX Runtime."""
    from dk2pnet.commands.evaluate import evaluate as run
    from dk2pnet.report.tables import format_count

    with _progress() as progress:
        figures = run(
            model,
            data,
            split=split,
            weights=weights,
            normalize=normalize,
            data_dir=data_dir,
            input_size=input_size,
            classes=classes,
            batch_size=batch_size,
            device=device,
            threads=threads,
            progress=progress,
        )
    text = f"accuracy {figures['accuracy']:.2f} % of {figures['images']} images"
    for name in ("parameters", "macs", "bytes"):
        if name in figures:
            text += f", {'MACs' if name == 'macs' else name} {format_count(figures[name])}"
    _say(text)


_INTERRUPTED = 130  # what typer ends with after Ctrl-C


def main() -> None:
    """Entry point: input errors are one sentence and exit code 2."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # our own sentence says what is wrong
    warnings.filterwarnings("ignore")
    messages = logging.getLogger("dk2pnet")
    messages.handlers = [_Messages()]
    messages.setLevel(logging.INFO)
    messages.propagate = False
    try:
        app()
    except InputError as error:
        stderr.print(f"[bold red]Error:[/] {_escaped(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:
            stderr.print("Stopped. No OUT was written; from an OUT.unfinished the same command goes on.")
        raise


class _Messages(logging.Handler):
    """Shows what the package says, above the progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        if is_main():
            stderr.print(_escaped(record.getMessage()), highlight=False, soft_wrap=True)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _say(text: str) -> None:
    """Print as it is: brackets in a name are no markup, and long lines are left to the terminal."""
    console.print(text, highlight=False, soft_wrap=True, markup=False)


def _command() -> str:
    return shlex.join(["dk2pnet", *sys.argv[1:]])


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool | list)


@contextmanager
def _progress() -> Iterator[Any]:
    """Bars with the time left; one per step, finished ones stay."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[count]}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=stderr, disable=not is_main()) as bars:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            step = what.split(",")[0] if what.startswith(("training", "tuning")) else what
            if step not in tasks or (tasks[step][1] > done and done > 0):
                tasks[step] = [bars.add_task(what, total=total or None, count=""), done]
            count = f"{done}/{total}" if total else ""
            bars.update(tasks[step][0], completed=done, total=total or None, description=what, count=count)
            tasks[step][1] = done

        yield show


if __name__ == "__main__":
    main()
