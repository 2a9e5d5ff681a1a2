"""Puts the tables of README.md and docs/*.md in place, made from the JSON in benchmarks/results.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end of table -->``. With ``--check`` nothing is written, and
the exit code is 1 where a table is not the one that its JSON makes.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median, stdev

from common import RESULTS
from common import read_results as read
from demo import HEADER as demo_header
from demo import table_rows as demo_rows
from dk2pnet.commands.reproduce import OTHER, SETUPS
from dk2pnet.measure import parameters
from dk2pnet.networks.named import make_network
from dk2pnet.report.curve import CURVE_HEADER, curve_rows
from dk2pnet.report.reproduction import (
    REPRODUCTION_HEADER,
    reproduction_rows,
    write_figure,
)
from dk2pnet.report.tables import format_count, markdown_table
from house import HEADER as house_header
from house import table_rows as house_rows

ROOT = Path(__file__).resolve().parent.parent
PLACE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end of table -->)", re.S)


def demo() -> str:
    return markdown_table(demo_header, demo_rows(read("demo")["rows"]))


def house() -> str:
    return markdown_table(house_header, house_rows(read("house")))


def criteria(model: str) -> Callable[[], str]:
    def table() -> str:
        data = read(f"criteria-{model}")["rows"]
        names = list(dict.fromkeys(row["criterion"] for row in data))
        names.sort(key=["weight", "response", "loss"].index)
        budgets = sorted({row["budget"] for row in data}, key=lambda b: (b[0] != "m", -float(b.split("=")[1])))
        rows = []
        for budget in budgets:
            cells = [budget]
            for name in names:
                found = [row for row in data if (row["budget"], row["criterion"]) == (budget, name)]
                cells.append(", ".join(f"{r['accuracy']:.2f} (x{r['macs_kept']:.3f})" for r in found) or "–")
            rows.append(tuple(cells))
        return markdown_table(("budget", *[f"{name}: % (MACs kept)" for name in names]), rows)

    return table


def corrections(model: str) -> Callable[[], str]:
    def table() -> str:
        rows = [
            (
                row["budget"],
                row["step"],
                f"{row['accuracy']:.2f}",
                f"{row['kl']:.4f}",
                f"{row['accuracy_bn']:.2f}",
                f"{row['kl_bn']:.4f}",
            )
            for row in read(f"corrections-{model}")["rows"]
        ]
        header = ("budget", "step", "accuracy %", "held-out KL", "with batch norm re-estimated %", "KL")
        return markdown_table(header, rows)

    return table


def export() -> str:
    rows = [
        (
            row["model"],
            str(row["decomposed"]) if row["decomposed"] else "0 (" + row.get("said", "").split(":")[0] + ")",
            f"{row['difference_batch_1']:.1e}",
            f"{row['difference_batch_7']:.1e}",
            str(row["multiplier_convolutions"]),
        )
        for row in read("export")["rows"]
    ]
    header = ("network", "DK layers", "difference, batch 1", "batch 7", "multiplier convolutions")
    return markdown_table(header, rows)


def memory() -> str:
    header = ("network", "--memory", "the network's own, as said", "peak")
    rows = [
        (
            row["network"],
            f"{row['memory']:g} GiB",
            f"{row['own_gib']:.1f} GiB",
            f"{row['peak_gib']:.1f} GiB",
        )
        for row in read("memory")["rows"]
    ]
    return markdown_table(header, rows)


def large_layers() -> str:
    rows = [
        (
            row["model"],
            f"{row['layers']}",
            f"{row['images']}",
            f"{row['forward_seconds']:.0f} s",
            f"{row['seconds']['moments']:.0f} s ({row['statistics_over_forward']:.1f}x)",
            f"{row['seconds']['solve']:.0f} s",
            f"{row['peak_gib']:.1f} GiB",
        )
        for row in read("large_layers")["rows"]
    ]
    header = ("network", "DK layers", "images", "forward", "statistics", "solver", "peak memory")
    return markdown_table(header, rows)


def training(model: str) -> Callable[[], str]:
    def table() -> str:
        rows = []
        found = read(f"training-{model}")["rows"]
        for row in sorted(
            found, key=lambda r: (-r["macs_kept"], -r["epochs"], r["method"] != "kp-channel", r["method"])
        ):
            done = "accuracy" in row
            epochs = f"{row['epochs']}" if done else f"{row['epochs_done']} of {row['epochs']}"
            rows.append(
                (
                    f"{1 / row['macs_kept']:.1f}x",
                    row["method"],
                    epochs,
                    f"{row['minutes']:.0f}" if row["minutes"] is not None else "–",
                    f"{row['closed_form']:.2f}",
                    f"{row['accuracy']:.2f}" if done else "–",
                    f"{row['accuracy'] - row['teacher_accuracy']:+.2f}" if done else "–",
                )
            )
        header = ("fewer MACs", "method", "epochs", "minutes", "closed form %", "trained %", "points from the teacher")
        return markdown_table(header, rows)

    return table


def methods() -> str:
    peak = {row["name"]: row["bytes"] for row in read("steps")["memory"]["rows"]}
    rows = [
        (row["name"], f"{row['ratio']:.2f}x", f"{peak[row['name']] / 2**20:.0f} MiB")
        for row in read("steps")["methods"]["rows"]
    ]
    return markdown_table((f"method ({machine('methods')})", "time of a step", "peak memory"), rows)


def machine(part: str) -> str:
    """Where a part of steps.json was measured."""
    hardware = read("steps")[part]["hardware"]
    return f"{hardware['processor']}, {hardware['threads']} threads"


def recipes() -> str:
    rows = read("steps")["recipes"]["rows"]
    names = list(dict.fromkeys(row["name"] for row in rows))
    networks = list(dict.fromkeys(row["network"] for row in rows))
    cells = {(row["network"], row["name"]): row for row in rows}
    table = []
    for network in networks:
        found = [cells[network, name] for name in names]
        table.append((network, *[f"{1 / row['ratio']:.2f}x ({row['images_per_second']:.0f}/s)" for row in found]))
    return markdown_table((f"network ({machine('recipes')})", *names), table)


def forms() -> str:
    rows = read("steps")["forms"]["rows"]
    names = list(dict.fromkeys(row["name"] for row in rows))
    cells = {(row["network"], row["precision"], row["name"]): row for row in rows}
    table = []
    for network, precision in dict.fromkeys((row["network"], row["precision"]) for row in rows):
        found = [cells[network, precision, name] for name in names]
        speeds = [f"{1 / row['ratio']:.2f}x ({row['images_per_second']:.0f}/s)" for row in found]
        table.append((network, precision, *speeds))
    return markdown_table((f"network ({machine('forms')})", "precision", *names), table)


def processes() -> str:
    data = read("processes")
    rows = [
        (
            f"{row['processes']}",
            f"{row['mean']:.2f} ± {row['spread']:.2f}",
            f"{len(row['accuracies'])}",
            f"{data['moments']['difference']:.1e}" if row["processes"] == data["moments"]["processes"] else "–",
        )
        for row in data["training"]
    ]
    return markdown_table(("processes", "accuracy %", "seeds", "moments: difference to one process"), rows)


def kills() -> str:
    data = read("kills")
    steps = ", ".join(str(kill["step"]) for kill in data["kills"])
    rows = [
        ("kills", f"{len(data['kills'])}, {sum(kill['while_writing'] for kill in data['kills'])} while writing"),
        ("newest checkpoint's step at each", steps),
        ("weights identical to the undisturbed run's", "yes" if data["killed"] == data["undisturbed"] else "NO"),
    ]
    for damage in ("cut", "changed"):
        same = "yes" if data[damage]["weights"] == data["undisturbed"] else "NO"
        rows.append((f"… after the newest checkpoint was {damage}", same))
    return markdown_table(("what", "result"), rows)


def scratch() -> str:
    data = read("scratch")
    threads = data["hardware"]["threads"]
    rows = [
        (row["model"], f"{row['epochs']}", f"{row['accuracy']:.2f}", f"{row['images_per_second']:.0f} ({threads})")
        for row in data["rows"]
    ]
    return markdown_table(("network", "epochs", "accuracy %", "images/s (CPU threads)"), rows)


def layers() -> str:
    """Medians over the grid of measured over promised speed-up, best form of each layer."""
    rows = []
    found = read("layers")["rows"]
    for target in dict.fromkeys(row["target"] for row in found):
        for threads in sorted({row["threads"] for row in found}):
            for batch in sorted({row["batch"] for row in found}):
                grid = [r for r in found if (r["target"], r["threads"], r["batch"]) == (target, threads, batch)]
                if grid:
                    rows.append((target, str(threads), str(batch), *_shares(grid)))
        grid = [row for row in found if row["target"] == target]
        rows.append((target, "all", "all", *_shares(grid)))
    header = ("target", "threads", "batch", "1 kernel", "2 kernels", "3 kernels", "all", "multiplier form", "layers")
    return markdown_table(header, rows)


def _shares(grid: list[dict]) -> list[str]:
    forms = ("branches", "concat", "gathered")
    by_kernels: dict[str, list[float]] = {"1": [], "2": [], "3": []}
    multiplier = []
    for row in grid:
        for kernels, times in row["kernels"].items():
            by_kernels[kernels].append(max(times[form] for form in forms if form in times) / times["promised"])
            multiplier.append(times["multiplier"] / times["promised"])
    every = [share for shares in by_kernels.values() for share in shares]
    return [*(f"{median(each):.2f}" for each in (*by_kernels.values(), every, multiplier)), str(len(grid))]


def layers_by_shape() -> str:
    """One thread, batch 1, ONNX Runtime: measured speed-up of the best form, promised in brackets."""
    rows = []
    for row in read("layers")["rows"]:
        if (row["target"], row["threads"], row["batch"]) == ("onnxruntime", 1, 1):
            cells = []
            for times in row["kernels"].values():
                form = max(("branches", "concat", "gathered"), key=lambda form: times.get(form, 0))
                cells.append(f"{times[form]:.1f}x ({times['promised']:.1f}x)")
            wide = row["channels"]
            rows.append((f"{wide} at {row['size']} x {row['size']}", f"{row['dense_ms']:.3f}", *cells))
    return markdown_table(("channels", "dense ms", "1 kernel", "2 kernels", "3 kernels"), rows)


def networks() -> str:
    rows = []
    for row in read("networks")["rows"]:
        budget = f"{row['budget']:g}"
        if "refused" in row:
            rows.append((row["model"], str(row["threads"]), budget, row["refused"], *["–"] * 5))
            continue
        rows.append(
            (
                row["model"],
                str(row["threads"]),
                budget,
                f"{row['latency']:.3f}",
                f"{row['teacher_ms']:.1f} -> {row['student_ms']:.1f}",
                f"{1 / row['latency']:.2f}x",
                f"{1 / row['macs_kept']:.2f}x",
                f"{row['decomposed']} of {row['decomposed'] + row['dense']}",
                f"{row['seconds']:.0f} s",
            )
        )
    header = ("network", "threads", "budget", "measured", "ms", "time cut", "MACs cut", "DK layers", "whole run")
    return markdown_table(header, rows)


def latency_budget(model: str) -> Callable[[], str]:
    def table() -> str:
        rows = []
        for row in sorted(
            read(f"latency_budget-{model}")["rows"], key=lambda r: (-r["fraction"], r["seed"], r["kind"])
        ):
            rows.append(
                (
                    row["budget"],
                    str(row["threads"]),
                    str(row["seed"]),
                    f"{row['latency']:.3f}",
                    f"{row['macs_kept']:.3f}",
                    f"{row['accuracy']:.2f}",
                    f"{row['accuracy'] - row['teacher_accuracy']:+.2f}",
                )
            )
        header = ("budget", "threads", "seed", "measured latency", "MACs kept", "accuracy %", "points from the teacher")
        return markdown_table(header, rows)

    return table


def int8(model: str) -> Callable[[], str]:
    def table() -> str:
        rows = []
        data = read(f"int8-{model}")["networks"]
        for found in data:
            if "refused" in found:
                rows.append((f"{found['budget']} for {found['target']}", "refused: " + found["refused"], *["–"] * 3))
                continue
            dense = next(row for row in found["rows"] if (row["network"], row["numbers"]) == ("teacher", "fp32"))
            for row in found["rows"]:
                if row["network"] == "teacher" and found is not data[0]:
                    continue
                what = "dense" if row["network"] == "teacher" else f"DK, {found['budget']} for {found['target']}"
                rows.append(
                    (
                        what,
                        row["numbers"],
                        f"{row['accuracy']:.2f}",
                        f"{row['bytes'] / 1024:.0f} KiB",
                        f"{row['latency_ms'] / dense['latency_ms']:.3f}",
                    )
                )
        return markdown_table(("network", "numbers", "accuracy %", "file", "time (dense fp32 = 1)"), rows)

    return table


def int8_layers(model: str) -> Callable[[], str]:
    def table() -> str:
        rows = []
        for row in read(f"int8-{model}")["layers"]:
            cells = [f"{row[t][k]:.2f}" for t in ("onnxruntime", "onnxruntime-int8") for k in ("1", "2", "3")]
            rows.append((f"{row['channels']} at {row['size']} x {row['size']}", *cells))
        header = [f"{numbers}: {k} kernel{'s' * (k > 1)}" for numbers in ("fp32", "int8") for k in (1, 2, 3)]
        return markdown_table(("channels", *header), rows)

    return table


def peers(model: str) -> Callable[[], str]:
    def table() -> str:
        data = read(f"peers-{model}")["rows"]
        rows = []
        for row in sorted(data, key=lambda r: (-r["budget"], -r["after"])):
            rows.append(
                (
                    f"{row['budget']:g}",
                    row["method"],
                    f"{row['macs_kept']:.3f}",
                    f"{row['parameters']:,}",
                    f"{row['latency']:.2f}",
                    f"{row['before']:.2f}",
                    f"{row['after']:.2f}",
                )
            )
        header = ("budget", "method", "MACs kept", "parameters", "time", "before training %", "fine-tuned %")
        return markdown_table(header, rows)

    return table


def third_party() -> str:
    rows = []
    for row in read("third-party")["rows"]:
        if row.get("tune", "0") != "0":
            continue
        name = f"{row['package']}: {row['what']}"
        if "refused" in row:
            rows.append((name, row["budget"], *["–"] * 6, row["refused"]))
            continue
        teacher, student = row["teacher"], row["student"]
        alike = "–" if row["in_common"] is None else f"{100 * row['in_common']:.0f} % of {row['measure']}"
        rows.append(
            (
                name,
                row["budget"],
                f"{100 * row['decomposable']:.0f} %",
                f"{teacher['latency_ms']:.1f} -> {student['latency_ms']:.1f}",
                f"{teacher['latency_ms'] / student['latency_ms']:.2f}x",
                f"{teacher['macs'] / student['macs']:.2f}x",
                f"{teacher['onnx_bytes'] / 1e6:.1f} -> {student['onnx_bytes'] / 1e6:.1f}",
                f"{student['relative_error']:.2f} %",
                alike,
            )
        )
    header = (
        "model",
        "budget",
        "dense k×k",
        "ms",
        "time cut",
        "MACs cut",
        "MB",
        "error of the outputs",
        "in the package",
    )
    return markdown_table(header, rows)


def third_party_tuned() -> str:
    """The same network before and after tuning."""
    rows = []
    for row in read("third-party")["rows"]:
        if row.get("tune", "0") == "0" or "refused" in row:
            continue
        errors = {stage["name"]: stage["relative_error"] for stage in row["stages"] if "relative_error" in stage}
        teacher, student = row["teacher"], row["student"]
        rows.append(
            (
                f"{row['package']}: {row['what']}",
                row["budget"],
                f"{student['latency_ms'] / teacher['latency_ms']:.3f}",
                f"{errors['closed form']:.2f} %",
                f"{errors['tuned']:.2f} %" if "tuned" in errors else "not kept",
                f"{row['tuning_steps']:,}",
                f"{row['seconds'].get('tune', 0.0) / 60:.1f}",
                f"{100 * row['in_common']:.0f} % of {row['measure']}",
            )
        )
    header = ("model", "budget", "time", "error, closed form", "tuned", "steps", "minutes", "in the package, tuned")
    return markdown_table(header, sorted(rows))


def peers_tuned(model: str) -> Callable[[], str]:
    """Each method at its own best of learning rate and batch norm, by validation agreement."""

    def table() -> str:
        data = read(f"peers_tuned-{model}")
        found: dict[tuple, list[dict]] = {}
        for row in data["rows"]:
            found.setdefault((row["budget"], row["method"]), []).append(row)
        rows = []
        for (budget, method), group in found.items():
            seeds = over_seeds([row for row in group if row["lr"]])
            if not seeds:
                continue
            starts = [row["accuracy"] for row in group if not row["lr"]]
            best, agreement = seeds[0], [row["validation_agreement"] for row in seeds]
            rows.append(
                (
                    (-budget, -mean(agreement)),
                    f"{budget:g}",
                    method,
                    f"{best['macs_kept']:.3f}",
                    f"{best['parameters']:,}",
                    f"{mean(starts):.2f}",
                    f"{best['lr']:g}",
                    best["bn"],
                    mean_and_spread(agreement),
                    mean_and_spread([row["accuracy"] for row in seeds]),
                )
            )
        header = (
            "budget",
            "method",
            "MACs kept",
            "parameters",
            "before %",
            "rate",
            "batch norm",
            "validation agreement %",
            "tuned %",
        )
        return markdown_table(header, [row[1:] for row in sorted(rows)])

    return table


def hostile() -> str:
    data = read("hostile-onnx")
    said = Counter(row["outcome"] for row in data["rows"])
    rows = [
        ("refused with one sentence, nothing written", str(said["refused"])),
        ("a correct result, checked", str(said["correct"])),
        ("anything else", str(said["defect"])),
    ]
    return markdown_table((f"outcome of {len(data['rows'])} changed files", "files"), rows)


def mean_and_spread(values: list[float]) -> str:
    """One value as it is; several as mean and standard deviation."""
    if len(values) == 1:
        return f"{values[0]:.2f} (1 seed)"
    return f"{mean(values):.2f} ± {stdev(values):.2f} ({len(values)} seeds)"


def tuning(model: str) -> Callable[[], str]:
    def table() -> str:
        data = read(f"tuning-budgets-{model}")
        cells: dict[tuple[str, int], list[dict]] = {}
        for row in data["rows"]:
            if row["lr"] is None:  # the rate that `compress` chooses
                cells.setdefault((row["budget"], row["steps"]), []).append(row)
        rows = []
        for (budget, steps), found in sorted(cells.items(), key=lambda each: (-float(each[0][0][5:]), each[0][1])):
            seconds = [row["seconds"] if steps else row["closed_form_seconds"] for row in found]
            rows.append(
                (
                    budget,
                    f"{steps} steps" if steps else "closed form",
                    mean_and_spread([row["accuracy"] for row in found]),
                    f"{mean(row['accuracy'] for row in found) - data['teacher_accuracy']:+.2f}",
                    f"{median(seconds):.0f} s",
                )
            )
        return markdown_table(("budget", "tuning", "accuracy %", "points from the teacher", "on one core"), rows)

    return table


def tuning_rates() -> str:
    """The rate that the start decides beside the one before it, over the seeds that have both."""
    rows = []
    for model in ("resnet32", "resnet44"):
        found = [row for row in read(f"tuning-budgets-{model}")["rows"] if row["steps"]]
        for budget, steps in sorted({(row["budget"], row["steps"]) for row in found if row["lr"] is not None}):
            alike = [row for row in found if (row["budget"], row["steps"]) == (budget, steps)]
            by_rate = [{row["seed"]: row for row in alike if (row["lr"] is None) == chosen} for chosen in (False, True)]
            for of_seed in by_rate:
                same = [of_seed[seed] for seed in of_seed if seed in by_rate[0] and seed in by_rate[1]]
                if same:
                    agreement, accuracy = (
                        mean_and_spread([row[key] for row in same]) for key in ("validation_agreement", "accuracy")
                    )
                    rate = same[0]["lr"] or same[0]["rate"]
                    rows.append((model, budget, f"{steps}", f"{rate:g}", agreement, accuracy))
    return markdown_table(("network", "budget", "steps", "rate", "validation agreement %", "accuracy %"), rows)


def tuning_losses() -> str:
    """What teaches: the methods whose search is over, each where it agreed most with the teacher, over seeds."""
    best: list[tuple[str, str, float, tuple]] = []
    for model in ("resnet32", "resnet44"):
        methods: dict[tuple[str, str], list[dict]] = {}
        for row in read(f"tuning-losses-{model}")["rows"]:
            methods.setdefault((row["budget"], row["name"]), []).append(row)
        for (budget, name), rows in methods.items():
            seeds = over_seeds(rows)
            if not seeds:
                continue
            chosen = seeds[0]
            agreement = [row["validation_agreement"] for row in seeds]
            cells = (
                f"{chosen['lr']:g}" if chosen["steps"] else "–",
                chosen["bn"] or "–",
                f"{mean(row['validation_kl'] for row in seeds):.3f}",
                mean_and_spread(agreement),
                mean_and_spread([row["accuracy"] for row in seeds]),
            )
            best.append((model, budget, -mean(agreement), (model, budget, name, *cells)))
    return markdown_table(("network", *_LOSSES_HEADER), [row for *_, row in sorted(best)])


def over_seeds(rows: list[dict]) -> list[dict]:
    """Of a method's rows (`common.searched` at the first seed) those of its best rate and mode; none before its end."""
    first = [row for row in rows if row["seed"] == min(row["seed"] for row in rows)]
    if len(first) > 1 and not any(row["bn"] == "frozen" for row in first):
        return []

    def alike(best: dict) -> list[dict]:
        return [row for row in rows if (row["lr"], row["bn"]) == (best["lr"], best["bn"])]

    # Of two that agree equally it is the one that was made again.
    return alike(max(first, key=lambda row: (row["validation_agreement"], len(alike(row)))))


def tuning_images() -> str:
    """How many images, and whose."""
    found: dict[tuple, list[dict]] = {}
    for row in read("tuning-images-resnet32")["rows"]:
        found.setdefault((row["budget"], row["steps"], row["whose"], row["images"]), []).append(row)
    rows = []
    for (budget, steps, whose, images), seeds in sorted(found.items()):
        agreement = mean_and_spread([row["validation_agreement"] for row in seeds])
        accuracy = mean_and_spread([row["accuracy"] for row in seeds])
        source = f"{images:,} of {whose.upper().replace('CIFAR', 'CIFAR-')}"
        rows.append((budget, f"{steps}", source, agreement, accuracy))
    return markdown_table(("budget", "steps", "images", "validation agreement %", "accuracy %"), rows)


_LOSSES_HEADER = (
    "budget",
    "taught by",
    "rate",
    "batch norm",
    "validation KL",
    "validation agreement %",
    "accuracy %",
)


def points(model: str) -> Callable[[], str]:
    def loss(found: dict) -> str:
        return f"{found['value']:.2f} ({found['low']:.2f} to {found['high']:.2f})"

    def table() -> str:
        rows = [
            (
                f"drop={row['drop']:g}",
                row["decided_by"],
                f"{row['macs_kept']:.2f}" if "estimate" in row else row["said"],
                loss(row["estimate"]) if "estimate" in row else "–",
                loss(row["reported"]) if "estimate" in row else "–",
                f"{len(row['probes'])}",
                f"{row['minutes']:.0f}",
            )
            for row in read(f"points-{model}")["rows"]
        ]
        header = ("budget", "decided on", "MACs kept", "estimate", "drop on test[50%:]", "networks made", "minutes")
        return markdown_table(header, rows)

    return table


def imagenet(model: str) -> Callable[[], str]:
    def table() -> str:
        result = read(f"imagenet-{model}")
        rows = [
            (
                row["budget"],
                f"{row['minutes']:g}",
                str(row["seed"]),
                str(row.get("steps", "–")),
                f"{row['seconds'] / 60:.0f}",
                f"{row['accuracy']:.1f}",
                f"{row['accuracy'] - result['teacher_accuracy']:.1f}",
                f"{row['agreement']:.1f}",
                f"{row['held_kl']:.3f}",
                f"{row['peak_gib']:.1f}",
            )
            for row in result["rows"]
            if not row.get("without")
        ]
        took = "minutes it took"
        header = ("budget", "tuned, minutes", "seed", "steps", took, "accuracy %", "points from the teacher")
        return markdown_table((*header, "agreement %", "held-out KL", "peak GiB"), rows)

    return table


def large_tuning() -> str:
    rows = [
        (
            row["model"],
            row["images"],
            f"{row['batch']}",
            f"{row['images_per_second']:.1f}",
            f"{row['ratio']:.2f}",
        )
        for row in read("large_tuning")["rows"]
    ]
    return markdown_table(("network", "crops", "images in a step", "images per second", "ratio"), rows)


def explored(model: str) -> Callable[[], str]:
    return lambda: markdown_table(CURVE_HEADER, curve_rows(read(f"explore-{model}")))


def explored_times(model: str) -> Callable[[], str]:
    def table() -> str:
        found = read(f"explore-{model}")["closed_form_seconds"]
        parts = [part for part in found["explore"] if found["compress"][part] or found["explore"][part]]
        rows = [(part, f"{found['compress'][part]:.1f} s", f"{found['explore'][part]:.1f} s") for part in parts]
        rows.append(("together", f"{found['compress_total']:.1f} s", f"{found['explore_total']:.1f} s"))
        rows.append(("ratio", "1.00", f"{found['ratio']:.2f}"))
        rows.append(("ratio, less the reconstruction", "1.00", f"{found['ratio_without_reconstruction']:.2f}"))
        return markdown_table(("closed form", "one compress", "explore"), rows)

    return table


def setups() -> str:
    """Not from JSON but from the settings that the command itself uses."""
    rows = []
    for data, setup in {**SETUPS, "any other (here 10 classes)": OTHER}.items():
        shape = {"num_classes": 100 if data == "cifar100" else 10, "in_channels": 1 if data in GREY else 3}
        cells = [
            f"`{name}` ({format_count(parameters(make_network(name, **shape)))})"
            for name in (setup.student, setup.teacher)
        ]
        rows.append((data, *cells, f"{setup.epochs}, {setup.teacher_epochs}", f"{setup.learning_rate:g}"))
    header = ("data set", "student (parameters)", "teacher", "epochs of student, teacher", "learning rate")
    return markdown_table(header, rows)


def reproduction(name: str) -> Callable[[], str]:
    """The table, and the commands for what is missing."""

    def table() -> str:
        found = read(f"reproduce-{name}")
        parts = [markdown_table(REPRODUCTION_HEADER, reproduction_rows(found))]
        if found["continue"]:
            parts += ["Not run yet:", "\n".join(f"    {command}" for command in found["continue"])]
        return "\n\n".join(parts)

    return table


def ablation(data: str) -> Callable[[], str]:
    def table() -> str:
        rows = sorted(read(f"ablation-{data}")["rows"], key=lambda row: -row["mean"])
        spread = [f" ± {row['spread']:.2f}" if row["spread"] is not None else "" for row in rows]
        cells = [
            (row["name"], str(len(row["validation"])), f"{row['mean']:.2f}{each}")
            for row, each in zip(rows, spread, strict=True)
        ]
        return markdown_table(("taught by", "seeds", "validation accuracy %"), cells)

    return table


def reproduction_figures() -> None:
    """docs/reproduce.svg, a panel for each data set that has results."""
    several = [read(f"reproduce-{name}") for name in REPRODUCED if (RESULTS / f"reproduce-{name}.json").exists()]
    if several:
        write_figure(several, ROOT / "docs" / "reproduce.svg")


GREY = ("mnist", "digits")
REPRODUCED = ("mnist", "mnist_full", "cifar10", "cifar10_long", "cifar100", "cifar100_long", "svhn_10k")
TABLES: dict[str, Callable[[], str]] = {
    "third-party": third_party,
    "third-party-tuned": third_party_tuned,
    "peers_tuned-resnet32": peers_tuned("resnet32"),
    "hostile-onnx": hostile,
    "demo": demo,
    "house": house,
    "criteria-resnet32": criteria("resnet32"),
    "corrections-resnet32": corrections("resnet32"),
    "export": export,
    "large-layers": large_layers,
    "memory": memory,
    "training-resnet32": training("resnet32"),
    "training-resnet44": training("resnet44"),
    "methods": methods,
    "recipes": recipes,
    "forms": forms,
    "processes": processes,
    "kills": kills,
    "scratch": scratch,
    "layers": layers,
    "layers-by-shape": layers_by_shape,
    "networks": networks,
    "latency_budget-resnet32": latency_budget("resnet32"),
    "int8-resnet32": int8("resnet32"),
    "peers-resnet32": peers("resnet32"),
    "int8-layers": int8_layers("resnet32"),
    "tuning-resnet32": tuning("resnet32"),
    "tuning-resnet44": tuning("resnet44"),
    "tuning-resnet32-before": tuning("resnet32-before"),
    "tuning-resnet44-before": tuning("resnet44-before"),
    "tuning-rates": tuning_rates,
    "tuning-losses": tuning_losses,
    "tuning-images": tuning_images,
    "large-tuning": large_tuning,
    "imagenet-resnet18": imagenet("resnet18"),
    "points-resnet32": points("resnet32"),
    "explore-resnet32": explored("resnet32"),
    "explore-times-resnet32": explored_times("resnet32"),
    "ablation-svhn_10k": ablation("svhn_10k"),
    "setups": setups,
    "ablation-mnist": ablation("mnist"),
    **{f"reproduce-{name}": reproduction(name) for name in REPRODUCED},
}


def main() -> int:
    stale = 0
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = path.read_text(encoding="utf-8")
        made = PLACE.sub(lambda match: f"{match[1]}{TABLES[match[2]]().rstrip()}\n{match[3]}", text)
        if made != text:
            stale += 1
            print(
                f"{path.relative_to(ROOT)}: tables {'differ from' if '--check' in sys.argv else 'made from'} the JSON"
            )
            if "--check" not in sys.argv:
                path.write_text(made, encoding="utf-8")
    if "--check" not in sys.argv:
        reproduction_figures()
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
