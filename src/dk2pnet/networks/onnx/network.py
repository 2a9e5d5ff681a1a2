"""An ONNX graph as compression sees it: DK layers take the place of its convolutions, all else stays as it was."""

from __future__ import annotations

import copy
import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import ModelProto
from safetensors.torch import load_file, save_file
from torch import Tensor

from dk2pnet.answers import Predictions
from dk2pnet.data import Normalization
from dk2pnet.data.arrays import Arrays, Feed, Input, example_feed, read_arrays
from dk2pnet.data.samples import AT_ONCE, Batches, Batching, Samples
from dk2pnet.decompose.moments import Moments
from dk2pnet.decompose.solve import Factors
from dk2pnet.deploy.latency import is_onnx
from dk2pnet.deploy.quantize import quantize_onnx
from dk2pnet.digest import digest_of
from dk2pnet.errors import InputError, first_line
from dk2pnet.layer import DKConv2d
from dk2pnet.networks.network import Corrections, Settings, Solution
from dk2pnet.networks.onnx.gather import gather_onnx
from dk2pnet.networks.onnx.graph import OnnxGraph
from dk2pnet.networks.onnx.learner import OnnxLearner
from dk2pnet.networks.onnx.probe import probe
from dk2pnet.networks.onnx.proof import check_repeats, comparable, proven
from dk2pnet.networks.onnx.read import read_onnx
from dk2pnet.networks.onnx.rewrite import rewrite
from dk2pnet.networks.onnx.runner import shapes_of, tensors_of
from dk2pnet.networks.onnx.sites import OnnxSite, apply_keep
from dk2pnet.networks.onnx.walk import Unsuitable, layer_of, reconstruct_onnx, with_bias
from dk2pnet.plan import Plan
from dk2pnet.run.run import Run

__all__ = ["OnnxNetwork", "count_macs"]

_LAYERS = "layers.safetensors"


@dataclass
class OnnxNetwork:
    """A graph of somebody else's; `layers`: its DK layers by site. Source of the protocol: `networks.network`."""

    path: str
    graph: OnnxGraph
    normalization: Normalization | None = None
    layers: dict[str, DKConv2d] = field(default_factory=dict)
    batching: Batching = Batching(AT_ONCE)
    example: Feed = field(default_factory=lambda: Feed({}))
    task: str | None = None
    names: list[str] = field(default_factory=list)  # of the tensors that are compared
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    found: dict[str, OnnxSite] = field(default_factory=dict)

    default_criterion = "response"
    reconstructs_first = True  # its tuning starts from there: batch norm is folded away, which would make up for much
    spec: dict[str, Any] | None = None
    plan: Plan | None = None

    @classmethod
    def read(cls, path: str | Path) -> OnnxNetwork:
        """Read and check the file."""
        graph = read_onnx(path, first=True)  # `sites` says whether the first one stays dense
        sizes = {value.dims[0] for value in graph.takes if value.dims} - {None}
        fixed = (sizes.pop() if len(sizes) == 1 else 1) if sizes else None
        return cls(str(path), graph, batching=Batching(fixed, True) if fixed else Batching(AT_ONCE))

    # -- before any work ---------------------------------------------------------------------------------------------

    def prepare(self, example: Tensor | Feed | None, input_size: int | None, run: Run) -> None:
        """The file is proven to run in a process of its own before anything else is done with it."""
        content = self.graph.proto.SerializeToString()
        if example is None:
            # What ONNX and its runtime say against the file itself counts more than that it does not say its sizes.
            probe(content, None, self.path)
            self.example = example_feed(self.graph.takes, input_size)
            probe(content, self.example, self.path)
        else:
            feed = self.feed(example)
            with run.clock("probe"):
                probe(content, feed, self.path)
            self.example = feed if self.batching.fixed else feed[:1]
        check_repeats(self.graph, self.example, self.path, run.threads)
        self.names = comparable(self.graph, self.example, run.threads)
        counted = [name for node in self.graph.counted() for name in (*node.input, *node.output)]
        read = [site.x for site in self.graph.sites if not site.reason]
        self.shapes = shapes_of(self.graph, self.example, [*counted, *read], run.threads)

    def one_at_a_time(self) -> bool:
        """Take one sample at a time from now on; False where that is so already. A first axis that is left open need
        not be free."""
        if self.batching.fixed:
            return False
        self.batching = Batching(1, True)
        return True

    def fit(self, memory: int) -> bool:
        """Take no more samples at once than have their maps in `memory` bytes, at least one."""
        maps = sum(self._bytes_read(site.x) for site in self.graph.sites if not site.reason)
        fitting = max(memory // max(maps, 1), 1)
        if self.batching.fixed or fitting >= self._at_once:
            return False
        self.batching = Batching(fitting)
        return True

    @property
    def _at_once(self) -> int:
        return self.batching.size or AT_ONCE

    def _bytes_read(self, name: str) -> int:
        """Of a tensor, for one sample; 0 where nothing is known of it."""
        shape = self.shapes.get(name)
        return 0 if shape is None else 4 * math.prod(shape) // self.example.samples

    def feed(self, x: Tensor | Feed) -> Feed:
        """A batch as the graph takes it: images are its one input."""
        if isinstance(x, Feed):
            return x
        value = self.only_input()
        return Feed({value.name: x.detach().cpu().numpy().astype(value.dtype, copy=False)}, len(x))

    def arrays(self, path: str) -> Arrays:
        """One for each input of the graph, by its name."""
        found = read_arrays(path, self.graph.takes)
        if found.stacked:  # then the first axis of an input is not that of samples
            self.batching = Batching(1, True)
        return found

    def image_size(self, side: int | None) -> tuple[Any, int | None]:
        """Height and width (None for one that is open), or one side, or None where both are open, and channels of the
        images; `side` as given."""
        value = self.image_input()
        height, width = value.dims[2:]
        chosen = side if side is not None else height if height is not None else width
        if chosen is not None and side is None:  # one that is left open follows from the images
            return (height, width), value.dims[1]
        if {height, width} - {None, chosen}:
            raise InputError(
                f"the input {value.name!r} is {value}, which square images of {chosen} do not fit; "
                "leave --input-size away, or give another"
            )
        return chosen, value.dims[1]

    def only_input(self) -> Input:
        """The graph's one input, of floating-point numbers; `InputError` where it takes something else."""
        if len(self.graph.takes) != 1:
            names = ", ".join(value.name for value in self.graph.takes)
            raise InputError(f"the graph has the inputs {names}; images can feed only one: give --data INPUTS.npz")
        value = self.graph.takes[0]
        if value.dtype.kind != "f":
            raise InputError(
                f"the input {value.name!r} is {value}, which batches of images cannot feed; give --data INPUTS.npz"
            )
        return value

    def image_input(self) -> Input:
        """The same, ``(B, C, H, W)`` of grey or coloured images."""
        value = self.only_input()
        if len(value.dims) != 4 or value.dims[1] not in (None, 1, 3) or value.dtype != np.float32:
            raise InputError(
                f"the input {value.name!r} is {value}, not float (batch, 1 or 3 channels, height, width); "
                "give --data INPUTS.npz"
            )
        return value

    def sites(self, keep: Sequence[str] = (), first: bool = False) -> list[OnnxSite]:
        """With sizes and positions, per sample; those that never run stay dense, as nothing is known of them."""
        sites = [replace(site) for site in self.graph.sites]
        apply_keep(sites, keep, first, Path(self.path))
        for site in sites:
            read = self.shapes.get(site.x, ())
            if not site.reason and (len(read) != 4 or 0 in read):
                site.reason = f"its input has the shape {self.shapes.get(site.x)}"
            given = self.shapes.get(site.node.output[0]) if site.node is not None else None
            if site.node is None or site.node.op_type != "Conv" or not read or not given:
                continue
            samples = self.example.samples
            site.calls = 1
            site.positions = math.prod(given[2:]) * given[0] // samples
            site.activation = (math.prod(read) + math.prod(given)) // samples
            if not site.reason:
                site.place(read[2], read[3])
        self.found = {site.name: site for site in sites}
        return sites

    @property
    def macs(self) -> int:
        """Of one sample, DK layers by their kernels."""
        total = self.graph.macs(self.shapes) // self.example.samples
        changed = (self._numbers(name) - self.found[name].size for name in self.layers)
        return total + sum(
            change * self.found[name].positions for name, change in zip(self.layers, changed, strict=True)
        )

    @property
    def parameters(self) -> int:
        """Biases that were added are left out, as a plan does."""
        return self.graph.parameters + sum(self._numbers(name) - self.found[name].size for name in self.layers)

    @property
    def facts(self) -> dict[str, Any]:
        """How many layers were given a bias that they had not."""
        return {
            "biases_added": sum(
                layer.bias is not None and self.found[name].conv.bias is None for name, layer in self.layers.items()
            )
        }

    @property
    def caveats(self) -> list[str]:
        """Of what its multiply-adds do not hold."""
        number = self.graph.uncounted
        if not number:
            return []
        return [
            f"{number} node(s) that multiply lie in subgraphs (If, Loop, Scan), which run as often as the data ask "
            "for: their multiply-adds are not counted, and a share of the others is less of the whole"
        ]

    def _numbers(self, name: str) -> int:
        return self.layers[name].kernels.numel() + self.layers[name].combination.numel()

    def digests(self) -> dict[str, str]:
        """Of the file."""
        content = np.frombuffer(self.graph.proto.SerializeToString(deterministic=True), np.uint8)
        return {"digest_of_weights": digest_of({"file": torch.from_numpy(content.copy())})}

    # -- what it answers ---------------------------------------------------------------------------------------------

    def proto(self, forms: Mapping[str, str] | None = None) -> ModelProto:
        """The graph with its DK layers, in emitted `forms`, or (None) with their folded weights."""
        if not self.layers:
            return self.graph.proto
        return rewrite(self.graph, self.layers, dict.fromkeys(self.layers, "folded") if forms is None else forms)

    def predict(self, batches: Batches, run: Run, what: str = "", total: int = 0) -> Predictions:
        """In ONNX Runtime. Where the graph takes a fixed number of samples, a batch that is not full is filled up."""
        proto, runner = self.proto(), None
        found: Predictions | None = None
        for x, y in batches:
            feed = self.feed(x)
            missing = (self.batching.size or 0) - len(feed) if self.batching.fixed else 0
            if missing > 0:
                pad = {name: np.concatenate([a, *[a[:1]] * missing]) for name, a in feed.arrays.items()}
                feed = Feed(pad, len(feed) + missing)
            try:
                if runner is None:
                    self.names = self.names or comparable(self.graph, feed, run.threads)
                    runner = tensors_of(proto, self.names, run.threads)
                answers = runner(feed)
            except InputError:
                raise
            except Exception as error:  # whatever ONNX Runtime says against the inputs
                raise InputError(
                    f"{self.path} cannot run inputs of shape {tuple(feed.shape[1:])} ({first_line(error)}); "
                    "give some that fit (--input-size)"
                ) from error
            row = [answers[name] for name in self.names]
            found = found or Predictions(names=self.names, task=self.task)
            row = [a[: len(x)] if missing > 0 and isinstance(a, np.ndarray) else a for a in row]
            given = [a[: len(x)] for a in map(np.asarray, feed.arrays.values()) if a.ndim and a.dtype.kind == "f"]
            found.add(row, len(x), y, given)
            if what:
                run.progress(what, len(found), total)
        if found is None:
            raise InputError("there are no samples to evaluate on")
        return found

    # -- students ----------------------------------------------------------------------------------------------------

    def moments(
        self, sites: Mapping[str, OnnxSite], samples: Samples, gradients: bool, memory: int, run: Run
    ) -> Iterator[dict[str, Moments]]:
        """In ONNX Runtime; with gradients in PyTorch, where the graph can be converted and is a classifier."""
        count = samples.counts["calibration"]
        if gradients:
            yield from self.learner(samples, sites, run).moments(samples, memory, run)
            return
        yield from gather_onnx(
            self.graph,
            sites,
            _Feeds(self, samples.gather),
            samples=count,
            maps={name: self._at_once * self._bytes_read(site.x) for name, site in sites.items()},
            memory=memory,
            seed=run.seed,
            threads=run.threads,
            progress=lambda what, done: run.progress(f"moments, {what}", done, count),
        )

    def with_layers(self, layers: dict[str, DKConv2d]) -> OnnxNetwork:
        """The graph with these layers in place of others."""
        student = copy.copy(self)
        student.layers = layers
        return student

    def with_kernels(self, counts: Mapping[str, Tensor], factors: Mapping[str, Factors] | None = None) -> OnnxNetwork:
        """Without factors solved roughly, not random: time may depend on values (denormal numbers, shapes)."""
        if factors is not None:
            return self.with_layers({name: layer_of(self.found[name], factors[name]) for name in counts})
        return self.with_layers(
            {name: DKConv2d.from_dense(self.found[name].conv, count.tolist()) for name, count in counts.items()}
        )

    def corrections(
        self, student: OnnxNetwork, solution: Solution, samples: Samples, how: Settings, run: Run
    ) -> Corrections:
        """The layer-by-layer reconstruction, which corrects biases too; else biases alone."""
        for what, counts in (("layer-by-layer reconstruction", solution.counts), ("bias correction", None)):
            if counts is not None and not how.reconstruct:
                continue
            with run.clock("correct" if counts is None else "reconstruct"):
                try:
                    layers = reconstruct_onnx(
                        self.graph,
                        student.layers,
                        counts,
                        _Feeds(self, samples.gather),
                        memory=how.memory,
                        seed=run.seed,
                        threads=run.threads,
                        progress=run.says(what, len(student.layers)),
                    )
                except Unsuitable as reason:
                    yield f"{what}: not possible, {reason}", None
                    return
            if (yield what, self.with_layers(layers)):
                return

    def after_tuning(self, student: OnnxNetwork, batches: Batches, run: Run) -> Corrections:
        """Nothing: batch norms are folded into a graph's weights."""
        yield from ()

    def learner(self, samples: Samples, sites: Mapping[str, OnnxSite], run: Run) -> OnnxLearner:
        """Through onnx2fx, proven against ONNX Runtime on the first samples."""
        feed = self.feed(samples.first)
        expected = tensors_of(self.graph.proto, self.names, run.threads)(feed)
        tensors = {name: expected[name] for name in self.names}
        # What it takes at once by itself is for ONNX Runtime; fewer are those whose maps fit into memory.
        at_once = None if self.batching == Batching(AT_ONCE) else self.batching.size
        return OnnxLearner(self.graph, list(sites.values()), tensors, feed, self.normalization, at_once)

    # -- on the way out ----------------------------------------------------------------------------------------------

    def deployable(self, target: str, forms: Mapping[str, str]) -> bytes:
        """Content of a file; quantised on the example alone where only its time is asked."""
        if not is_onnx(target):
            raise InputError(
                f"target is {target!r}; expected one that reads ONNX files for an .onnx model: onnxruntime, ..."
            )
        content = self.onnx(forms)
        return quantize_onnx(content, [self.example]) if target == "onnxruntime-int8" else content

    def onnx(self, forms: Mapping[str, str]) -> bytes:
        """The graph with its DK layers in these forms."""
        return self.proto(forms).SerializeToString()

    def final(self, forms: Mapping[str, str]) -> ModelProto:
        """`proto`, and its normalisation in the metadata; what the file says already stays."""
        proto = ModelProto()
        proto.CopyFrom(self.proto(forms))
        if self.normalization is not None:
            said = next((entry for entry in proto.metadata_props if entry.key == "normalization"), None)
            if said is None:
                said = proto.metadata_props.add(key="normalization", value="null")
            if said.value == "null":
                said.value = json.dumps(self.normalization.to_dict())
        return proto

    def save(self, folder: Path, plan: Plan, samples: Samples | None, run: Run) -> float | None:
        """model.onnx, proven to compute what it should, and plan.json. One sample is enough: both are graphs."""
        content, difference = self._proven(self.final(plan.forms), run.threads)
        (folder / "model.onnx").write_bytes(content)
        (folder / "plan.json").write_text(plan.to_json(), encoding="utf-8")
        return difference

    def save_unfinished(self, folder: Path, plan: Plan) -> None:
        """The numbers of the layers, and the plan."""
        numbers = {
            f"{name}/{key}": value.contiguous()
            for name, layer in self.layers.items()
            for key, value in layer.named_parameters()
        }
        save_file(numbers, str(folder / _LAYERS))
        (folder / "plan.json").write_text(plan.to_json(), encoding="utf-8")

    def load_unfinished(self, folder: Path) -> tuple[OnnxNetwork, Plan]:
        """Layers of the sites of this network."""
        plan = Plan.load(folder / "plan.json")
        numbers = load_file(str(folder / _LAYERS))
        layers = {}
        for entry in plan.layers:
            if entry.counts is None:
                continue
            layer = DKConv2d.like(self.found[entry.name].conv, entry.counts)
            bias = numbers.get(f"{entry.name}/bias")
            layer = with_bias(layer, bias) if bias is not None else layer
            layer.load_state_dict({k: numbers[f"{entry.name}/{k}"] for k, _ in layer.named_parameters()}, strict=False)
            layers[entry.name] = layer.requires_grad_(False).eval()
        return self.with_layers(layers), plan

    def result(self, plan: Plan) -> ModelProto:
        """The new graph, proven."""
        final = self.final(plan.forms)
        self._proven(final, None)
        return final

    def _proven(self, final: ModelProto, threads: int | None) -> tuple[bytes, float]:
        return proven(final, self.proto(), self.graph, self.layers, self.names, self.shapes, self.example, threads)


def count_macs(content: bytes, example: Tensor | Feed, threads: int | None) -> int | None:
    """Multiply-adds of one sample of a file that was written, counted anew; None where it cannot be read back."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "model.onnx"
        path.write_bytes(content)
        try:
            network = OnnxNetwork.read(path)
            feed = network.feed(example)
            names = [name for node in network.graph.counted() for name in (*node.input, *node.output)]
            return network.graph.macs(shapes_of(network.graph, feed, names, threads)) // feed.samples
        except Exception:  # it was proven to run; what is missing is a figure
            return None


@dataclass(frozen=True)
class _Feeds:
    """Batches as the graph takes them, in every pass anew."""

    network: OnnxNetwork
    batches: Batches

    def __iter__(self) -> Iterator[Feed]:
        return (self.network.feed(x) for x, _ in self.batches)
