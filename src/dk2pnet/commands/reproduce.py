"""The paper's experiment on one data set: a teacher, and a student of dominant kernels by every method and seed.

Runs are OUT folders of `train` inside one folder, skipped once they are there, so that the table grows over
days and over several processes; the results are read from the folders, never kept beside them.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from scipy.stats import t as student_t

from dk2pnet.commands.train import train
from dk2pnet.errors import InputError
from dk2pnet.networks.named import make_network
from dk2pnet.options import ReproduceOptions, TrainOptions
from dk2pnet.processes import is_main, wait
from dk2pnet.report.reproduction import write_reproduction
from dk2pnet.run.out_folder import write_json
from dk2pnet.run.run import Run
from dk2pnet.training.losses import DEFAULT_METHOD
from dk2pnet.training.trainer import TrainingOptions

__all__ = ["METHODS", "OTHER", "SETUPS", "Setup", "reproduce"]


@dataclass(frozen=True)
class Setup:
    """What is trained on a data set, and how long; both networks by name."""

    student: str
    teacher: str
    epochs: int
    teacher_epochs: int
    learning_rate: float = 0.1


# Sizes and schedules are ours. The students stay below FitNets' parameters for the same data set.
SETUPS = {
    "mnist": Setup("dk2pnet-14x12", "resnet20", 30, 20),
    "cifar10": Setup("dk2pnet-32x32", "resnet20x4", 200, 100),
    "cifar100": Setup("dk2pnet-32x32", "resnet20x4", 200, 100),
    "svhn": Setup("dk2pnet-20x32", "resnet20x4", 60, 40),
    "svhn_10k": Setup("dk2pnet-14x16", "resnet20", 60, 60),
    "digits": Setup("dk2pnet-8x8", "lenet", 20, 20, 0.05),
}
OTHER = Setup("dk2pnet-20x32", "resnet20x4", 100, 100)
_QUICK = Setup("dk2pnet-8x8", "lenet", 2, 2, 0.05)
_QUICK_IMAGES = 3000  # of the training split

# Name in the tables -> what `train` is told. Without `alpha` the softened logits are beside the hints, at its default.
METHODS: dict[str, dict[str, Any]] = {
    "labels": {"method": "labels"},
    "kd": {"method": "kd"},
    "fitnets": {"method": "fitnets"},
    "euclidean+kd": {"method": "euclidean"},
    "at": {"method": "at", "alpha": 0.0},
    "kp": {"method": DEFAULT_METHOD, "alpha": 0.0},
    "kp+kd": {"method": DEFAULT_METHOD},
    "kp-falling+kd": {"method": DEFAULT_METHOD, "beta_end": 0.0},
}


def reproduce(
    data: str,
    options: ReproduceOptions | None = None,
    *,
    out: str | Path,
    run: Run | None = None,
    **flat: Any,
) -> dict[str, Any]:
    """Train the teacher, then the student under each method and seed; returns and writes the results so far.

    None stands for what suits the data set (`SETUPS`). A `teacher` that is an OUT folder, or a name with
    `teacher_weights`, is there already; another is a name, and trained first. `quick`: small networks, 3,000 images,
    two epochs, one seed: the same path in a minute or two.
    `out` gets ``teacher/``, ``METHOD-SEED/`` (OUT folders), ``results.json``, ``results.md`` and ``figure.svg``; a call
    with other methods or seeds adds to it, one with another setup is refused. `options`, `flat`: a `ReproduceOptions`,
    or its fields by name; docs/options.md lists them.
    """
    chosen, around = ReproduceOptions.of(options, flat), run or Run()
    methods, seeds = list(chosen.methods) or list(METHODS), chosen.seeds
    for name in methods:
        if name not in METHODS:
            raise InputError(f"method is {name!r}; expected some of {', '.join(METHODS)}")
    if not seeds or min(seeds) < 0:
        raise InputError(f"seeds are {', '.join(map(str, seeds)) or 'none'}; expected one or more, each 0 or more")
    settings, trained = _settings(data, chosen)
    for name in (settings["student"], *(() if trained else (settings["teacher"],))):
        make_network(name)  # a wrong name is refused here, and not after hours of the teacher
    folder = Path(out)
    _check(folder, settings)
    common = {key: getattr(chosen, key) for key in ("precision", "checkpoint_every", "normalize", "data_dir")}
    common |= {"device": chosen.device, "threads": chosen.threads, "images": settings["images"]}
    common |= {"learning_rate": settings["learning_rate"]}

    def options_for(**more: Any) -> TrainOptions:
        return TrainOptions(**{**common, **more})

    def train_into(name: str, model: str, options: TrainOptions) -> None:
        if (folder / name).exists():
            return

        def shown(what: str, done: int, total: int) -> None:
            around.progress(what.replace("training", f"training {name}", 1), done, total)

        train(model, data, options, out=folder / name, run=replace(around, progress=shown))
        wait()  # until the main process has written the folder

    taught = {"teacher": chosen.teacher, "teacher_weights": chosen.teacher_weights}
    if not trained:
        taught = {"teacher": str(folder / "teacher")}
        first = options_for(epochs=settings["teacher_epochs"], method="labels")
    asked = {
        f"{name}-{seed}": options_for(
            epochs=settings["epochs"], seed=seed, **METHODS[name], **(taught if name != "labels" else {})
        )
        for seed in (seeds[:1] if chosen.quick else seeds)
        for name in methods
    }
    results: dict[str, Any] = {}
    try:
        if not trained:
            train_into("teacher", settings["teacher"], first)
            _write(folder, settings)  # so that another call does not take this teacher for its own
        for name, options_of_run in asked.items():
            train_into(name, settings["student"], options_of_run)
            results = _write(folder, settings)
    except InputError:
        if is_main() and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        raise
    return results


def _settings(data: str, chosen: ReproduceOptions) -> tuple[dict[str, Any], bool]:
    """What every call that adds to the folder has to share, and whether the teacher is trained already."""
    setup = _QUICK if chosen.quick else SETUPS.get(data, OTHER)
    teacher, weights = chosen.teacher, chosen.teacher_weights
    if teacher is None and weights is not None:
        raise InputError(f"teacher weights {weights} were given without a teacher; name the network too")
    trained = teacher is not None and (weights is not None or Path(teacher).is_dir())
    if trained and chosen.teacher_epochs is not None:
        raise InputError(
            f"teacher epochs {chosen.teacher_epochs} were given with a teacher that is trained; leave them out"
        )
    settings: dict[str, Any] = {
        "data": data,
        "student": chosen.student or setup.student,
        "teacher": teacher or setup.teacher,
        "teacher_weights": weights,
        "normalize": chosen.normalize,
        "epochs": setup.epochs if chosen.epochs is None else chosen.epochs,
        "teacher_epochs": None if trained else chosen.teacher_epochs or setup.teacher_epochs,
        "learning_rate": setup.learning_rate if chosen.learning_rate is None else chosen.learning_rate,
        "images": _QUICK_IMAGES if chosen.quick else None,
        "quick": chosen.quick,
    }
    return settings, trained


def _check(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse a folder of something else, or of runs with other settings."""
    path = folder / "results.json"
    if not path.is_file():
        runs = folder.is_dir() and all(
            each.name.startswith(".") or each.name.endswith(".unfinished") or _is_run(each) for each in folder.iterdir()
        )
        if folder.exists() and not runs:
            raise InputError(f"{folder} is not a folder that dk2pnet reproduce wrote; give another --out")
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["settings"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} is not a file that dk2pnet reproduce wrote; give another --out") from None
    for key, value in settings.items():
        if found.get(key) != value:
            raise InputError(
                f"{folder} holds runs with {key.replace('_', '-')} {found.get(key)}, this call has {value}; "
                "give the same, or another --out"
            )


def _is_run(folder: Path) -> bool:
    return (folder / "metrics.json").is_file()


def _write(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Read every run that is done, and write JSON, Markdown and figure; each appears whole."""
    results = _collected(folder, settings)
    if is_main():
        write_json(folder / "results.json", results)
        write_reproduction(results, folder)
    return results


def _collected(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    runs, teacher, network, environment = [], None, None, {}
    for path in sorted(folder.glob("[!.]*/metrics.json")):  # others are being written
        metrics = json.loads(path.read_text(encoding="utf-8"))
        name, _, seed = path.parent.name.rpartition("-")
        environment = {key: metrics["run"][key] for key in ("versions", "hardware")}
        if path.parent.name == "teacher":
            teacher = metrics["network"]
        elif name in METHODS and seed.isdigit():
            network = metrics["network"]
            teacher = teacher or metrics.get("teacher")
            figures = {key: network[key] for key in ("accuracy", "validation_accuracy")}
            runs.append({"method": name, "seed": int(seed), **figures, **_time_of(path.parent)})
    runs.sort(key=lambda run: (list(METHODS).index(run["method"]), run["seed"]))
    sizes = ("parameters", "macs")
    return {
        "settings": dict(settings),
        "teacher": teacher and {key: teacher[key] for key in ("accuracy", *sizes)},
        "student": network and {key: network[key] for key in sizes},
        "runs": runs,
        "rows": [row for name in METHODS if (row := _row(name, runs)) is not None],
        "continue": _continuing(settings, runs),
        **environment,
    }


def _time_of(folder: Path) -> dict[str, float]:
    """Minutes of training by the median speed of the log, as a run may have been stopped for a while."""
    path = folder / "log.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    speeds = sorted(line["images_per_second"] for line in lines if line.get("images_per_second"))
    if not speeds:
        return {}
    return {"minutes": lines[-1]["step"] * TrainingOptions.batch_size / speeds[len(speeds) // 2] / 60}


def _row(name: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """A method's mean and standard deviation over its seeds, of the last epoch's test accuracy, and it beside KD."""
    found = [run["accuracy"] for run in runs if run["method"] == name and run["accuracy"] is not None]
    if not found:
        return None
    spread = stdev(found) if len(found) > 1 else None
    row = {"method": name, "accuracy": mean(found), "spread": spread, "seeds": len(found)}
    return row | {"against_kd": None if name == "kd" else _paired(runs, name, "kd")}


def _paired(runs: Sequence[Mapping[str, Any]], first: str, second: str) -> dict[str, Any] | None:
    """Mean difference in points over the seeds that both have, with Student's 95 % interval; None below two."""
    by_seed = {(run["method"], run["seed"]): run["accuracy"] for run in runs if run["accuracy"] is not None}
    seeds = sorted(seed for name, seed in by_seed if name == first and (second, seed) in by_seed)
    if len(seeds) < 2:
        return None
    differences = [by_seed[first, seed] - by_seed[second, seed] for seed in seeds]
    middle = mean(differences)
    reach = float(student_t.ppf(0.975, len(seeds) - 1)) * stdev(differences) / len(seeds) ** 0.5
    return {"difference": middle, "low": middle - reach, "high": middle + reach, "seeds": seeds}


def _continuing(settings: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The commands that make what is missing of all methods and three seeds."""
    done = {(run["method"], run["seed"]) for run in runs}
    missing: dict[tuple[str, ...], list[int]] = {}
    for seed in range(1 if settings["quick"] else 3):
        names = tuple(name for name in METHODS if (name, seed) not in done)
        if names:
            missing.setdefault(names, []).append(seed)
    command = ["dk2pnet", "reproduce", settings["data"], "--out", "OUT"]
    for key in ("student", "teacher", "teacher_weights", "normalize", "epochs", "teacher_epochs", "learning_rate"):
        if settings[key] is not None:
            # A file is named without its folder, which is another one on every machine.
            value = Path(settings[key]).name if key == "teacher_weights" else str(settings[key])
            command += ["--lr" if key == "learning_rate" else f"--{key.replace('_', '-')}", value]
    command += ["--quick"] * settings["quick"]
    return [
        shlex.join(
            [*command, *(part for name in names for part in ("--method", name))]
            + [part for seed in seeds for part in ("--seed", str(seed))]
        )
        for names, seeds in missing.items()
    ]
