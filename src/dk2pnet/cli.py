"""The command line: made from the options, calls the verbs, prints."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from importlib import import_module
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dk2pnet.errors import InputError
from dk2pnet.options import REQUIRED, VERBS, flag_of, read_recipe
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


# -- commands made from the options ------------------------------------------------------------------------------------


def _read_recipe(context: typer.Context, value: Path | None) -> Path | None:
    """Take the options of a recipe as defaults, so that those on the command line win."""
    if value is not None:
        found = read_recipe(value, context.info_name or "")
        context.default_map = {**(context.default_map or {}), **found}
    return value


_RECIPE = Annotated[
    Path | None,
    typer.Option(help="recipe.yaml of an earlier run; options given here win.", is_eager=True, callback=_read_recipe),
]


def _parameter(name: str, default: Any, annotation: Any) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _parameters(verb: str) -> list[Parameter]:
    """What typer is to read from the command line."""
    found = []
    for argument in VERBS[verb].arguments:
        default: Any = Parameter.empty if argument.default is REQUIRED else argument.default
        kind: Any = argument.kind if argument.default is not None else argument.kind | None
        told: Any = typer.Argument(help=argument.help) if argument.positional else typer.Option(help=argument.help)
        found.append(
            Parameter(argument.name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, told])
        )
    for each in fields(VERBS[verb].options):
        kind, default, names = each.metadata["kind"], each.default, [flag_of(each)]
        if kind is None:
            continue
        if kind is bool:
            names = [f"{names[0]}/{names[0].replace('--', '--no-', 1)}"] if default else names
        elif isinstance(default, tuple):
            kind, default = list[kind] | None, None
        elif default is None:
            kind = kind | None
        told = typer.Option(*names, help=each.metadata["help"], metavar=each.metadata["metavar"])
        found.append(_parameter(each.name, default, Annotated[kind, told]))
    if verb in ("compress", "explore", "train"):
        found.append(_parameter("recipe", None, _RECIPE))
    return sorted(found, key=lambda each: each.default is not Parameter.empty)


def _register(verb: str, show: Callable[[Any, Mapping[str, Any]], None]) -> None:
    """Make the command of a verb: it calls the function of that name in commands/, and prints what comes of it."""
    arguments, options = [each.name for each in VERBS[verb].arguments], VERBS[verb].options

    def command(**given: Any) -> None:
        # Lists that were not given are None to typer, and their own defaults to the options.
        kept = {k: v for k, v in given.items() if k not in (*arguments, "recipe") and v is not None}
        chosen = options(**kept)  # refused before anything heavy is imported
        work = getattr(import_module(f"dk2pnet.commands.{verb}"), verb)
        with _progress() as run:
            result = work(**{name: given[name] for name in arguments}, options=chosen, run=run)
        if is_main():
            show(result, given)

    vars(command)["__signature__"] = Signature(_parameters(verb))
    command.__annotations__ = {each.name: each.annotation for each in _parameters(verb)}
    app.command(verb, help=VERBS[verb].help)(command)


# -- what is printed ---------------------------------------------------------------------------------------------------


def _show_compressed(result: Any, given: Mapping[str, Any]) -> None:
    from dk2pnet.report import tables

    plan, metrics = result.plan, result.metrics
    assert isinstance(plan, Plan)
    _say(plan.summary())
    console.print(tables.rich_table("", ("", "teacher", "student", "change"), tables.comparison_rows(metrics)))
    if metrics.get("int8"):
        console.print(tables.rich_table("", tables.INT8_HEADER, tables.int8_rows(metrics)))
    if metrics.get("decided"):
        console.print(tables.rich_table("", tables.PROBES_HEADER, tables.probe_rows(metrics)))
        _say(tables.decided_sentence(metrics["decided"]))
    for decision in metrics["decisions"]:
        after = "-" if decision["after"] is None else f"{decision['after']:.4g}"
        kept = "kept" if decision["kept"] else "not kept"
        _say(f"{decision['what']}: {decision['measure']} {decision['before']:.4g} -> {after}, {kept}")
    for note in metrics.get("notes", ()):
        _say(note)
    written = sorted(path.name for path in given["out"].iterdir() if path.is_file())
    first = [name for name in ("model.safetensors", "plan.json", "model.onnx") if name in written]
    rest = [name for name in ("model.int8.onnx", "model.pt2") if name in written]
    _say(f"Written to {given['out']}: {', '.join([*first, *rest])}, report.html, metrics.json, recipe.yaml")


def _show_curve(metrics: Any, given: Mapping[str, Any]) -> None:
    from dk2pnet.report.curve import CURVE_HEADER, curve_rows, knee_sentence
    from dk2pnet.report.tables import rich_table

    console.print(rich_table(metrics["measure"], CURVE_HEADER, curve_rows(metrics)))
    for line in (knee_sentence(metrics), *metrics["notes"]):
        _say(line)
    _say(f"Written to {given['out']}: report.html, metrics.json, recipe.yaml")


def _show_trained(metrics: Any, given: Mapping[str, Any]) -> None:
    figures = metrics["network"]
    test, validation = figures["accuracy"], figures["validation_accuracy"]
    said = ["no labelled test split" if test is None else f"test accuracy {test:.2f} %"]
    said += [f"validation accuracy {validation:.2f} %"] if validation is not None else []
    _say(", ".join(said))
    _say(f"Written to {given['out']}")


def _show_reproduced(results: Any, given: Mapping[str, Any]) -> None:
    from dk2pnet.report.reproduction import REPRODUCTION_HEADER, reproduction_rows
    from dk2pnet.report.tables import rich_table

    console.print(rich_table(given["data"], REPRODUCTION_HEADER, reproduction_rows(results)))
    where = ["--out", str(given["out"]), *(["--data-dir", given["data_dir"]] if given["data_dir"] else [])]
    for command in results["continue"]:
        command = command.replace("--out OUT", shlex.join(where), 1)  # results.json names no folder
        _say(f"Not run yet: {command}")
    _say(f"Written to {given['out']}: results.md, results.json, figure.svg")


def _show_evaluated(figures: Any, given: Mapping[str, Any]) -> None:
    from dk2pnet.report.tables import format_count

    text = f"accuracy {figures['accuracy']:.2f} % of {figures['images']} images"
    for name in ("parameters", "macs", "bytes"):
        if name in figures:
            text += f", {'MACs' if name == 'macs' else name} {format_count(figures[name])}"
    _say(text)


_SHOWN = {
    "compress": _show_compressed,
    "explore": _show_curve,
    "train": _show_trained,
    "reproduce": _show_reproduced,
    "evaluate": _show_evaluated,
}
for _verb, _show in _SHOWN.items():
    _register(_verb, _show)


# -- the shell around them ---------------------------------------------------------------------------------------------


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


_EVERY = 15.0  # seconds between lines about a step, where they go to a file


class _Lines:
    """A line when a step ends, and every so many seconds of one that takes longer, with the time that is left."""

    def __init__(self) -> None:
        self.step, self.done = "", 0
        self.begun = self.said = time.monotonic()

    def show(self, what: str, done: int, total: int) -> None:
        """As `Run.progress`."""
        now = time.monotonic()
        step = what.split(",")[0]
        if step != self.step or done < self.done:  # of a group of layers after another
            self.step, self.begun, self.said, self.done = step, now, now, -1
        ended = bool(total) and done >= total > self.done
        self.done = done
        if not is_main() or not (ended or now - self.said >= _EVERY):
            return
        self.said = now
        line = f"{what} {done}/{total}" if total else f"{what} {done}"
        seconds = now - self.begun
        if ended:
            line += f", {seconds:.0f} s"
        elif done and total:
            line += f", {seconds:.0f} s, about {seconds / done * (total - done):.0f} s left"
        stderr.print(line, highlight=False, soft_wrap=True, markup=False)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _say(text: str) -> None:
    """Print as it is: brackets in a name are no markup, and long lines are left to the terminal."""
    console.print(text, highlight=False, soft_wrap=True, markup=False)


@contextmanager
def _progress() -> Iterator[Any]:
    """A `Run` that shows bars with the time left; one per step, finished ones stay. In a file there are lines."""
    from dk2pnet.run.run import Run

    command = shlex.join(["dk2pnet", *sys.argv[1:]])
    if not stderr.is_terminal:
        yield Run(_Lines().show, command)
        return
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

        yield Run(show, command)


if __name__ == "__main__":
    main()
