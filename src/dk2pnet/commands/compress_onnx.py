"""ONNX in, ONNX out: `compress` for users who have no training code, only the file and some inputs."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from onnx import ModelProto
from torch import Tensor, nn

from dk2pnet.commands.compress import layer_figures, notes_of_file
from dk2pnet.data import Normalization
from dk2pnet.data.arrays import Feed, Feeds, array_feeds, example_feed, image_feeds
from dk2pnet.deploy.costs import LatencyTable, fastest_forms
from dk2pnet.deploy.latency import check_target, compare_latency, conditions, latency_figures
from dk2pnet.errors import InputError
from dk2pnet.layer import DKConv2d
from dk2pnet.networks.onnx.gather import gather_onnx
from dk2pnet.networks.onnx.graph import OnnxGraph
from dk2pnet.networks.onnx.judge import Judge, check_repeats, folded, proven
from dk2pnet.networks.onnx.probe import probe
from dk2pnet.networks.onnx.read import read_onnx
from dk2pnet.networks.onnx.rewrite import rewrite
from dk2pnet.networks.onnx.runner import shapes_of
from dk2pnet.networks.onnx.sites import OnnxSite
from dk2pnet.networks.onnx.tune import Tuned, tune_onnx
from dk2pnet.networks.onnx.walk import Unsuitable, layer_of, reconstruct_onnx
from dk2pnet.networks.open import Network, onnx_normalization
from dk2pnet.plan import Budget, Plan
from dk2pnet.report.page import write_page
from dk2pnet.run.clock import Clock
from dk2pnet.run.device import environment, pick_device
from dk2pnet.run.out_folder import check_out, new_folder, write_json, write_recipe
from dk2pnet.run.progress import Progress, silent
from dk2pnet.run.seed import left_as_found
from dk2pnet.students.allocate import CRITERIA, energies_of, make_plan, solve_layers, spend
from dk2pnet.students.latency_budget import Spent, spend_latency
from dk2pnet.students.moments_store import MomentStore
from dk2pnet.students.tuning import tuning_of
from dk2pnet.training.whitened import whitening_of

__all__ = ["OnnxResult", "compress_onnx"]


@dataclass
class OnnxResult:
    """What `compress_onnx` returns: the content of the new ONNX file, the plan that made it, and every figure."""

    content: bytes
    plan: Plan
    metrics: dict[str, Any] = field(default_factory=dict)


@left_as_found()
def compress_onnx(
    model: str | Path,
    budget: str | Budget = "macs=0.44",
    criterion: str = "response",
    data: str | None = None,
    *,
    normalize: str | None = None,
    data_dir: str | None = None,
    input_size: int | None = None,
    keep: Sequence[str] = (),
    first: bool = False,
    calibration_images: int = 2000,
    memory: float = 2.0,
    rebuild: bool = True,
    tune: str | int | None = None,
    seed: int = 0,
    threads: int | None = None,
    target: str = "onnxruntime",
    out: str | Path | None = None,
    overwrite: bool = False,
    command: str | None = None,
    progress: Progress = silent,
) -> OnnxResult:
    """Put dominant kernels into an ONNX file; everything else in the file stays as it is.

    Example::

        dk2pnet compress --model model.onnx --data inputs.npz --budget latency=0.6 --out small

    Parameters
    ----------
    model : an ONNX file; 2-D convolutions with constant float weights can be decomposed
    budget, keep, first, memory, rebuild, target, out : as in `compress`
    criterion : ``response``, or ``weight``, which needs no data
    data : an ``.npz`` file with one array per graph input, samples along the first axis; or a data set or a folder of
        images, for a graph whose one input is ``(B, C, H, W)``
    normalize, input_size : of images; the size where the graph leaves it open
    calibration_images : samples to use at most; a fifth of them only decides
    tune : as in `compress`; needs the extra ``onnx-tuning`` and a graph with one input ``(B, C, H, W)``, else there is
        only the closed form, and a sentence says so

    Raises
    ------
    InputError
        One sentence that says what was given, what was expected and what to do.
    """
    asked = {
        "model": str(model),
        "data": data,
        "budget": str(budget),
        "target": target,
        "criterion": criterion,
        "keep": [keep] if isinstance(keep, str) else list(keep),
        "first": first,
        "calibration_images": calibration_images,
        "memory": memory,
        "rebuild": rebuild,
        "tune": tune,
        "normalize": normalize,
        "data_dir": data_dir,
        "input_size": input_size,
        "seed": seed,
        "threads": threads,
    }
    wanted = Budget.parse(budget)
    if wanted.in_points:
        raise InputError(
            f"budget {wanted} looks for a network by what it loses, which does not go with an .onnx model yet; "
            "give latency=0.6, macs=0.5 or kernels=2"
        )
    _check_options(criterion, data, calibration_images, memory, target)
    check_out(out, overwrite)
    pick_device("cpu", threads)
    clock = Clock()
    network = read_onnx(model, keep, first)
    open_sites = {site.name: site for site in network.sites if not site.reason}
    if not open_sites:
        raise InputError(f"{model} has no convolution that can be decomposed: {_reasons(network.sites)}")
    feeds, single = _feeds(network, str(model), data, normalize, data_dir, input_size, calibration_images, clock)
    check_repeats(network, single, str(model), threads)
    _keep_what_runs(network, single, threads)
    open_sites = {name: site for name, site in open_sites.items() if not site.reason}
    if not open_sites:
        raise InputError(f"{model} has no convolution that can be decomposed: {_reasons(network.sites)}")
    shapes = _shapes(network, single, threads)
    samples = single.samples
    _measure_sites(network, shapes, samples)
    total_macs, total_parameters = network.macs(shapes) // samples, network.parameters
    tuning = tuning_of(tune, epochs=0, images=feeds, macs=total_macs)
    judge = None if feeds is None else Judge(network, feeds, threads)
    original: dict[str, Any] = {"name": "teacher", "accuracy": None, "agreement": None}
    if judge is not None:  # labels that do not fit are noticed now, and not after all the work
        original = judge.stage(network.proto, "teacher", network.proto)

    with MomentStore() as store:
        energies = {}
        if CRITERIA[criterion][0]:
            assert feeds is not None
            count = feeds.counts["calibration"]
            groups = gather_onnx(
                network,
                open_sites,
                feeds.gather,
                samples=count,
                memory=int(memory * 2**30),
                seed=seed,
                threads=threads,
                progress=lambda what, done: progress(f"moments, {what}", done, count),
            )
            while (group := clock.time("moments", lambda: next(groups, None))) is not None:
                store.add_group(group)
                with clock("spectra"):
                    energies |= {name: energies_of(open_sites[name], store, criterion) for name in group}
        else:
            with clock("spectra"):
                energies = {name: energies_of(site, None, criterion) for name, site in open_sites.items()}
        search: list[dict[str, float]] = []
        forms: dict[str, str] = {}
        if wanted.kind == "latency":
            with clock("latency search"):
                spent = _spend_time(wanted.value, network, open_sites, energies, single, target, threads, progress)
            counts, forms, search = spent.counts, spent.forms, spent.attempts
        else:
            counts = spend(wanted, open_sites, energies, total_macs, total_parameters)
        replaced = {name: count for name, count in counts.items() if count is not None}
        plan = make_plan(
            network.sites,
            counts,
            energies,
            Network(nn.Identity(), None, feeds.normalization if feeds is not None else None),
            torch.empty(single.shape),
            criterion,
            wanted,
            total_macs,
            total_parameters,
        )
        progress("solving", 0, len(replaced))
        with clock("solve"):
            factors = solve_layers(replaced, open_sites, store, criterion, progress)
        layers = {name: layer_of(open_sites[name], found) for name, found in factors.items()}
        decisions: list[dict[str, Any]] = []
        if judge is not None and layers:
            assert feeds is not None
            layers = _corrected(
                network,
                layers,
                replaced,
                feeds,
                judge,
                rebuild,
                int(memory * 2**30),
                seed,
                threads,
                decisions,
                clock,
                progress,
            )
        stages: list[dict[str, Any]] = []
        tuned = Tuned(said=tuning.said)
        if layers and tuning.wanted:
            assert judge is not None
            assert feeds is not None
            with clock("tune"):
                tuned = tune_onnx(
                    network,
                    layers,
                    plan,
                    {name: whitening_of(layer, _inputs(store, name, criterion)) for name, layer in layers.items()},
                    feeds,
                    judge.of_example(),
                    tuning,
                    judge.error(folded(network, layers)),
                    seed=seed,
                    decisions=decisions,
                    progress=progress,
                )
            if tuned.steps:
                asked["tune"] = tuned.steps
            if tuned.layers is not None:
                stages = [judge.stage(folded(network, layers), "closed form", network.proto)]
                layers = tuned.layers
    if not forms:
        with clock("choosing forms"):
            table = LatencyTable(target, threads, progress=lambda done, of: progress("timing layers", done, of))
            forms = fastest_forms({name: (layer, open_sites[name].input_size) for name, layer in layers.items()}, table)
    for entry in plan.layers:
        entry.form = forms.get(entry.name)
    with clock("rewrite"):
        result = rewrite(network, layers, forms)
        if isinstance(feeds, Feeds) and feeds.normalization is not None:
            _say_normalization(result, feeds.normalization)
        content, difference = proven(result, network, layers, single, threads)
    metrics = _metrics(network, result, plan, judge, layers, decisions, search, [original, *stages], tuned)
    metrics["student"]["onnx_difference"] = difference
    metrics["run"] = {
        "command": command or "dk2pnet.pipelines.compress_onnx.compress_onnx(...)",
        "seed": seed,
        "criterion": criterion,
        "budget": str(wanted),
        "images": feeds.counts if feeds is not None else {},
        "seconds": clock.seconds,
        **environment(torch.device("cpu")),
    }
    progress("measuring latency", 0, 0)
    with clock("latency"):
        original = network.proto.SerializeToString()
        pair = {"teacher": original, "student": content}
        timed = latency_figures(compare_latency(pair, single, target=target, threads=threads))
    for side, size in (("teacher", len(original)), ("student", len(content))):
        metrics[side]["onnx_bytes"] = size
        metrics[side] |= timed[side]
    metrics["notes"] += notes_of_file(plan, timed)
    metrics["run"]["latency"] = conditions(target, single, threads)  # type: ignore[arg-type]
    if out is not None:
        with new_folder(out, overwrite) as folder:
            (folder / "model.onnx").write_bytes(content)
            (folder / "plan.json").write_text(plan.to_json(), encoding="utf-8")
            write_json(folder / "metrics.json", metrics)
            write_recipe(folder / "recipe.yaml", "compress", asked)
            write_page(metrics, folder / "report.html")
    return OnnxResult(content, plan, metrics)


# -- the steps, in order ----------------------------------------------------------------------------------------------


def _check_options(criterion: str, data: str | None, count: int, memory: float, target: str) -> None:
    if criterion not in CRITERIA:
        raise InputError(f"criterion is {criterion!r}; expected response or weight for an ONNX file")
    if CRITERIA[criterion][1]:
        raise InputError(
            f"criterion {criterion!r} needs gradients, which an ONNX file does not give; use --criterion response"
        )
    if CRITERIA[criterion][0] and data is None:
        raise InputError(
            f"criterion {criterion!r} needs inputs and none were given; give --data (images, or an .npz file with an "
            "array per input), or use --criterion weight"
        )
    if count < 2 or memory <= 0:
        raise InputError(
            f"calibration images {count}, memory {memory:g} GiB; expected at least 2 images and memory above 0"
        )
    check_target(target)
    if target not in ("onnxruntime", "openvino"):
        raise InputError(f"target is {target!r}; expected onnxruntime or openvino for an ONNX file")


def _feeds(
    network: OnnxGraph,
    model: str,
    data: str | None,
    normalize: str | None,
    data_dir: str | None,
    input_size: int | None,
    count: int,
    clock: Clock,
) -> tuple[Feeds | None, Feed]:
    """The calibration inputs and one single feed; the file is proven to run on them before anything else is done."""
    inputs = network.inputs
    content = network.proto.SerializeToString()
    if data is None:
        # What ONNX and its runtime say against the file itself counts more than that it does not say its sizes.
        probe(content, None, model)
        single = example_feed(inputs, input_size)
        probe(content, single, model)
        return None, single
    if data.endswith(".npz"):
        for name, value in (("normalize", normalize), ("input-size", input_size), ("data-dir", data_dir)):
            if value is not None:
                raise InputError(f"--{name} is for images; the arrays in {data} are fed as they are: leave it away")
        feeds = array_feeds(data, inputs, count)
    else:
        norm = onnx_normalization(model, normalize)
        feeds = image_feeds(data, inputs, count, normalization=norm, data_dir=data_dir, input_size=input_size)
    with clock("probe"):
        try:
            probe(content, feeds.example, model)
        except InputError:
            if feeds.one_by_one is None:
                raise
            # A first axis that is left open need not be free: the graph may only take one sample at a time.
            feeds = feeds.one_by_one
            probe(content, feeds.example, model)
    return feeds, (feeds.one_by_one or feeds).example


def _shapes(network: OnnxGraph, single: Feed, threads: int | None) -> dict[str, tuple[int, ...]]:
    names = [name for node in network.counted() for name in (*node.input, *node.output)]
    return shapes_of(network, single, names, threads)


def _keep_what_runs(network: OnnxGraph, single: Feed, threads: int | None) -> None:
    """Convolutions that are never reached with these shapes stay dense: nothing is known about them."""
    open_sites = [site for site in network.sites if not site.reason]
    found = shapes_of(network, single, [site.x for site in open_sites], threads)
    for site in open_sites:
        if len(found.get(site.x, ())) != 4 or 0 in found[site.x]:
            site.reason = f"its input has the shape {found.get(site.x)}"


def _measure_sites(network: OnnxGraph, shapes: Mapping[str, Sequence[int]], samples: int) -> None:
    """Note sizes and positions, per sample, at every convolution."""
    for site in network.sites:
        if site.node is None or site.node.op_type != "Conv":
            continue
        read, given = shapes.get(site.x), shapes.get(site.node.output[0])
        if not read or not given:
            continue
        site.calls = 1
        site.positions = math.prod(given[2:]) * given[0] // samples
        site.activation = (math.prod(read) + math.prod(given)) // samples
        if not site.reason:
            site.place(read[2], read[3])


def _spend_time(
    fraction: float,
    network: OnnxGraph,
    sites: Mapping[str, OnnxSite],
    energies: Mapping[str, Tensor],
    single: Feed,
    target: str,
    threads: int | None,
    progress: Progress,
) -> Spent:
    table = LatencyTable(target, threads)

    def build(counts: Mapping[str, Tensor | None]) -> tuple[bytes, dict[str, str]]:
        # Solved roughly, not random: time may depend on values (denormal numbers, data-dependent shapes).
        layers = {
            name: DKConv2d.from_dense(_conv(sites[name]), count.tolist())
            for name, count in counts.items()
            if count is not None
        }
        forms = fastest_forms({name: (layer, sites[name].input_size) for name, layer in layers.items()}, table)
        return rewrite(network, layers, forms).SerializeToString(), forms

    dense = network.proto.SerializeToString()
    return spend_latency(fraction, sites, energies, table, dense, build, single, progress=progress)


def _corrected(
    network: OnnxGraph,
    layers: dict[str, DKConv2d],
    counts: Mapping[str, Tensor],
    feeds: Feeds,
    judge: Judge,
    rebuild: bool,
    memory: int,
    seed: int,
    threads: int | None,
    decisions: list[dict[str, Any]],
    clock: Clock,
    progress: Progress,
) -> dict[str, DKConv2d]:
    """The layers of the reconstruction, else those with corrected biases, else as they were: what comes closest."""
    before = judge.error(folded(network, layers))
    for what, of in (("layer-by-layer reconstruction", counts), ("bias correction", None)):
        if of is not None and not rebuild:
            continue
        with clock("reconstruct" if of is not None else "correct"):
            try:
                better = reconstruct_onnx(
                    network,
                    layers,
                    of,
                    feeds.gather,
                    memory=memory,
                    seed=seed,
                    threads=threads,
                    progress=lambda done, what=what: progress(what, done, len(layers)),
                )
            except Unsuitable as reason:
                decisions.append(
                    {"what": f"{what}: not possible, {reason}", "before": before, "after": None, "kept": False}
                    | {"measure": "relative squared error"}
                )
                break
            after = judge.error(folded(network, better))
        decisions.append(
            {
                "what": what,
                "before": before,
                "after": after,
                "kept": after < before,
                "measure": "relative squared error",
            }
        )
        if after < before:  # the reconstruction corrects biases too
            return better
    return layers


def _say_normalization(proto: ModelProto, normalization: Normalization) -> None:
    """Write it to the metadata, as in the files that we export; what a file says already stays."""
    said = next((entry for entry in proto.metadata_props if entry.key == "normalization"), None)
    if said is None:
        said = proto.metadata_props.add(key="normalization", value="null")
    if said.value == "null":
        said.value = json.dumps(normalization.to_dict())


def _metrics(
    network: OnnxGraph,
    result: ModelProto,
    plan: Plan,
    judge: Judge | None,
    layers: Mapping[str, DKConv2d],
    decisions: list[dict[str, Any]],
    search: list[dict[str, float]],
    before: Sequence[dict[str, Any]],
    tuned: Tuned,
) -> dict[str, Any]:
    """`before`: the stages but for the last one, the teacher's first."""
    name = "closed form" if tuned.layers is None else "tuned"
    teacher, *_ = before
    student = {"name": name, "accuracy": None, "agreement": None}
    if judge is not None:
        student = judge.stage(result, name, network.proto)
    biases = sum(layer.bias is not None and _conv_of(network, name).bias is None for name, layer in layers.items())
    metrics: dict[str, Any] = {
        "teacher": {**teacher, "parameters": plan.parameters_dense, "macs": plan.macs_dense},
        "student": {**student, "parameters": plan.parameters, "macs": plan.macs},
        "stages": [*before, student],
        "layers": [layer_figures(layer) | {"form": layer.form} for layer in plan.layers],
        "decisions": decisions,
        "latency_search": search,
        "tuning_steps": tuned.steps,
        "notes": [tuned.said] * bool(tuned.said),
        "biases_added": biases,
    }
    for side in ("teacher", "student"):
        del metrics[side]["name"]
    return metrics


def _inputs(store: MomentStore, name: str, criterion: str) -> Tensor | None:
    """Second moments of a layer's input patches, where they were gathered."""
    return store[name].A() if CRITERIA[criterion][0] else None


def _conv(site: OnnxSite) -> nn.Conv2d:
    assert isinstance(site.module, nn.Conv2d)
    return site.module


def _conv_of(network: OnnxGraph, name: str) -> nn.Conv2d:
    return _conv(next(site for site in network.sites if site.name == name))


def _reasons(sites: Iterable[OnnxSite]) -> str:
    """Why the convolutions stay dense, the most frequent reason first."""
    counted = Counter(site.reason for site in sites)
    told = [f"{reason}: {count}" for reason, count in counted.most_common(4)]
    return ", ".join(told) if told else "it has none at all"
