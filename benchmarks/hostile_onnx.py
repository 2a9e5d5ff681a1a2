"""Damaged and hostile ONNX files: a clear sentence or a correct result, never a broken file, never half a folder.

    python benchmarks/hostile_onnx.py [--count 200] [--first 0]

Two small networks are changed by what the seed says: bytes overturned, cut out, doubled or cut off; weights missing,
mislabelled, not finite, of another type, in files elsewhere; attributes, names, shapes, types, operator sets and
operators changed. Each file goes through `compress` in a process of its own. Outcomes:

refused    `InputError`, nothing written
correct    a folder whose model.onnx the checker accepts, that runs as the original does, with outputs of the same
           shapes, and whose error is the one that metrics.json says. The networks' weights have one kernel per channel,
           so where the change left the weights alone the outputs must be equal
defect     anything else: another exception, a crash, more than two minutes, files left behind

Figures already in the JSON are not made again. Writes benchmarks/results/hostile-onnx.json.
"""

from __future__ import annotations

import functools
import json
import math
import multiprocessing
import os
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import ModelProto, TensorProto, helper, numpy_helper

from common import plain_parser, read_results, write_results
from dk2pnet.commands.compress import compress
from dk2pnet.data.arrays import Feed
from dk2pnet.data.samples import array_samples
from dk2pnet.errors import InputError
from dk2pnet.networks.onnx import network

SECONDS = 120


# -- the networks ------------------------------------------------------------------------------------------------------


def rank_one(random: np.random.Generator, outputs: int, inputs: int) -> np.ndarray:
    """A 3 x 3 weight in which every input channel has one kernel."""
    return np.einsum("nc,cij->ncij", random.standard_normal((outputs, inputs)), random.standard_normal((inputs, 3, 3)))


def small_network(number: int) -> ModelProto:
    """0: a plain one with a batch norm and weights in initialisers; 1: residual, a subgraph, weights in Constants."""
    random = np.random.default_rng(number)
    values = {
        "w1": random.standard_normal((8, 3, 3, 3)) / 3,
        "w2": rank_one(random, 8, 8) / 8,
        "b2": random.standard_normal(8),
        "w3": rank_one(random, 16, 8) / 8,
        "gamma": random.uniform(0.5, 1.5, 16),
        "beta": random.standard_normal(16),
        "mean": random.standard_normal(16),
        "variance": random.uniform(0.5, 1.5, 16),
        "w4": random.standard_normal((16, 5)),
    }
    tensors = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in values.items()]
    node = helper.make_node
    pads = {"pads": [1, 1, 1, 1]}
    nodes = [
        node("Conv", ["x", "w1"], ["c1"], name="first", **pads),
        node("Relu", ["c1"], ["r1"]),
        node("Conv", ["r1", "w2", "b2"], ["c2"], name="second", kernel_shape=[3, 3], **pads),
        node("Add", ["c2", "r1"], ["s2"]),
        node("Relu", ["s2"], ["r2"]),
        node("Conv", ["r2", "w3"], ["c3"], name="third", auto_pad="SAME_UPPER", strides=[2, 2]),
        node("BatchNormalization", ["c3", "gamma", "beta", "mean", "variance"], ["n3"]),
        node("Relu", ["n3"], ["r3"]),
        node("GlobalAveragePool", ["r3"], ["p3"]),
        node("Flatten", ["p3"], ["f3"]),
        node("MatMul", ["f3", "w4"], ["y"], name="last"),
    ]
    if number == 1:
        constants = [node("Constant", [], [tensor.name], value=tensor) for tensor in tensors]
        tensors = [numpy_helper.from_array(np.array(True), "yes")]
        kind = onnx.TensorProto.FLOAT
        then, other = (
            helper.make_graph([node(op, ["r3"], [op])], op, [], [helper.make_tensor_value_info(op, kind, None)])
            for op in ("Tanh", "Sigmoid")
        )
        for branch in (then, other):
            branch.output[0].CopyFrom(helper.make_tensor_value_info(branch.name, kind, ["n", 16, "a", "b"]))
        nodes[8].input[0] = "chosen"
        nodes = [
            *constants,
            *nodes[:8],
            node("If", ["yes"], ["chosen"], then_branch=then, else_branch=other),
            *nodes[8:],
        ]
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, "h", "w"] if number else ["n", 3, 12, 10])
    scores = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5])
    graph = helper.make_graph(nodes, "net", [image], [scores], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


# -- changes -----------------------------------------------------------------------------------------------------------


def bytes_changed(random: np.random.Generator, content: bytes) -> tuple[str, bytes]:
    kind = random.choice(["cut off", "overturned", "cut out", "doubled"])
    at, length = int(random.integers(len(content))), int(random.integers(1, 200))
    if kind == "cut off":
        return kind, content[:at]
    if kind == "cut out":
        return kind, content[:at] + content[at + length :]
    if kind == "doubled":
        return kind, content[: at + length] + content[at:]
    changed = bytearray(content)
    # Half of them in the last tenth or the first kilobyte, where names and structure are; else mostly weights are hit.
    limit = len(content) if random.random() < 0.5 else min(1000, len(content))
    for place in random.integers(limit, size=int(random.integers(1, 8))):
        changed[place] ^= 1 << int(random.integers(8))
    return kind, bytes(changed)


def tensors_of(model: ModelProto) -> list[TensorProto]:
    held = [attribute.t for node in model.graph.node for attribute in node.attribute if attribute.name == "value"]
    return [*model.graph.initializer, *held]


def structure_changed(random: np.random.Generator, model: ModelProto) -> str:
    graph = model.graph
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    conv = convolutions[random.integers(len(convolutions))]
    node = graph.node[random.integers(len(graph.node))]
    tensors = [tensor for tensor in tensors_of(model) if tensor.dims]
    tensor = tensors[random.integers(len(tensors))]
    strange = [0, -1, 1, 2, 3, 7, 2**31, 2**62, -(2**40)]

    def number() -> int:
        return strange[random.integers(len(strange))]

    def attribute(name: str, value: Any) -> None:
        kept = [each for each in conv.attribute if each.name != name]
        del conv.attribute[:]
        conv.attribute.extend([*kept, helper.make_attribute(name, value)])

    kind = str(
        random.choice(
            [
                "tensor removed",
                "dims",
                "dims and data",
                "data",
                "type",
                "not finite",
                "external",
                "attribute",
                "attribute type",
                "input renamed",
                "output renamed",
                "node removed",
                "node doubled",
                "nodes swapped",
                "operator",
                "operator set",
                "IR version",
                "input shape",
                "weight as input",
                "shared weight",
                "1-D or 3-D",
                "cycle",
                "domain",
                "huge tensor",
                "endless loop",
                "no names",
                "weight behind an alias",
                "output added",
                "weight of two types",
                "harmless attribute",
            ]
        )
    )
    if kind == "tensor removed":
        if tensor in list(graph.initializer):
            graph.initializer.remove(tensor)
        else:
            graph.node.remove(next(n for n in graph.node if n.attribute and n.attribute[0].t == tensor))
    elif kind == "dims":
        tensor.dims[random.integers(len(tensor.dims))] = number()
    elif kind == "dims and data":
        shape = [int(random.integers(1, 5)) for _ in range(random.integers(1, 6))]
        tensor.CopyFrom(numpy_helper.from_array(random.standard_normal(shape).astype(np.float32), tensor.name))
    elif kind == "data":
        tensor.raw_data = tensor.raw_data[: random.integers(len(tensor.raw_data))]
    elif kind == "type":
        tensor.data_type = int(random.integers(0, 25))
    elif kind == "not finite":
        values = numpy_helper.to_array(tensor).copy()
        values.flat[random.integers(values.size)] = [np.nan, np.inf, 3e38][random.integers(3)]
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    elif kind == "external":
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        places = ["../outside.bin", "/etc/hostname", "missing.bin", "model.onnx", "", "//", "a\x00b", "x/../../y"]
        tensor.external_data.add(key="location", value=places[random.integers(len(places))])
        tensor.external_data.add(key="offset", value=str(number()))
        tensor.external_data.add(key="length", value=str(number()))
    elif kind == "attribute":
        name = str(random.choice(["pads", "strides", "dilations", "group", "kernel_shape", "auto_pad"]))
        if name == "auto_pad":
            attribute(name, str(random.choice(["SAME_UPPER", "SAME_LOWER", "VALID", "NOTSET", "ODD", ""])))
        elif name == "group":
            attribute(name, number())
        else:
            attribute(name, [number() for _ in range(random.integers(1, 6))])
    elif kind == "attribute type":
        name = str(random.choice(["pads", "strides", "dilations", "group", "kernel_shape", "auto_pad"]))
        attribute(name, [1.5, "text", 3, [1.5], ["a"]][random.integers(5)])
    elif kind in ("input renamed", "cycle") and node.input:
        name = "nowhere" if kind == "input renamed" else graph.node[-1].output[0]
        node.input[random.integers(len(node.input))] = name
    elif kind == "output renamed" and node.output:
        node.output[0] = str(random.choice(["", "x", "y", "w2", "elsewhere"]))
    elif kind == "node removed":
        graph.node.remove(node)
    elif kind == "node doubled":
        graph.node.append(node)
    elif kind == "nodes swapped":
        nodes = list(graph.node)
        a, b = random.integers(len(nodes), size=2)
        nodes[a], nodes[b] = nodes[b], nodes[a]
        del graph.node[:]
        graph.node.extend(nodes)
    elif kind == "operator":
        node.op_type = str(random.choice(["Relu", "Conv", "NonZero", "Unknown", "Loop", "ConvTranspose", "Add"]))
    elif kind == "operator set":
        model.opset_import[0].version = int(random.choice([0, 1, 6, 9, 13, 22, 99, -3]))
    elif kind == "IR version":
        model.ir_version = int(random.choice([0, 2, 3, 4, 99]))
    elif kind == "input shape":
        dims = graph.input[0].type.tensor_type.shape.dim
        dims[random.integers(len(dims))].dim_value = number()
    elif kind == "weight as input":
        held = {each.name: each for each in tensors_of(model)}
        dims = list(held[conv.input[1]].dims) if conv.input[1] in held else None
        graph.input.append(helper.make_tensor_value_info(conv.input[1], TensorProto.FLOAT, dims))
    elif kind == "shared weight":
        graph.node.append(helper.make_node("Conv", ["r2", "w2"], ["shared"], name="shared"))
        graph.output.append(helper.make_tensor_value_info("shared", TensorProto.FLOAT, ["n", 8, "a", "b"]))
    elif kind == "1-D or 3-D":
        flat = random.random() < 0.5
        sizes = np.array([0, 8, -1] if flat else [0, 8, 1, 3, -1])
        weight = np.ones([4, 8, 3] if flat else [4, 8, 1, 3, 3], np.float32)
        graph.initializer.extend([numpy_helper.from_array(sizes, "sizes"), numpy_helper.from_array(weight, "other")])
        graph.node.append(helper.make_node("Reshape", ["r1", "sizes"], ["reshaped"]))
        graph.node.append(helper.make_node("Conv", ["reshaped", "other"], ["side"], name="side"))
        shape = ["n", 4, "l"] if flat else ["n", 4, "a", "b", "c"]
        graph.output.append(helper.make_tensor_value_info("side", TensorProto.FLOAT, shape))
    elif kind == "weight behind an alias":
        graph.node.insert(list(graph.node).index(conv), helper.make_node("Identity", [conv.input[1]], ["alias"]))
        conv.input[1] = "alias"
    elif kind == "output added":
        graph.output.append(helper.make_tensor_value_info(conv.output[0], TensorProto.FLOAT, ["n", "c", "a", "b"]))
    elif kind == "weight of two types":
        halves = numpy_helper.from_array(np.ones((4, 8, 3, 3), np.float16), "half")
        graph.initializer.append(halves)
        graph.node.append(helper.make_node("Cast", ["half"], ["whole"], to=1))
        graph.node.append(helper.make_node("Conv", ["r1", "whole"], ["side"], name="side"))
        graph.output.append(helper.make_tensor_value_info("side", TensorProto.FLOAT, ["n", 4, "a", "b"]))
    elif kind == "harmless attribute":
        conv = next(each for each in convolutions if each.name in ("third", ""))
        attribute("strides", [int(random.integers(1, 4)), int(random.integers(1, 4))])
        attribute("auto_pad", str(random.choice(["SAME_UPPER", "SAME_LOWER", "VALID"])))
    elif kind == "domain":
        node.domain = str(random.choice(["com.example", "ai.onnx", "com.microsoft"]))
    elif kind == "huge tensor":
        sizes = numpy_helper.from_array(np.array([2 ** int(random.integers(10, 40))] * 2), "sizes")
        graph.initializer.append(sizes)
        graph.node.insert(0, helper.make_node("ConstantOfShape", ["sizes"], ["huge"]))
        graph.output.append(helper.make_tensor_value_info("huge", TensorProto.FLOAT, ["a", "b"]))
    elif kind == "endless loop":
        count = numpy_helper.from_array(np.array(int(random.choice([3, 2**62]))), "count")
        body_in = [helper.make_tensor_value_info(n, t, []) for n, t in (("i", 7), ("go", 9))]
        body_in.append(helper.make_tensor_value_info("s", 1, []))
        body = helper.make_graph(
            [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Neg", ["s"], ["t"])],
            "body",
            body_in,
            [helper.make_tensor_value_info("on", 9, []), helper.make_tensor_value_info("t", 1, [])],
        )
        graph.initializer.extend(
            [
                count,
                numpy_helper.from_array(np.array(True), "start"),
                numpy_helper.from_array(np.array(0, np.float32), "zero"),
            ]
        )
        graph.node.append(helper.make_node("Loop", ["count", "start", "zero"], ["looped"], body=body))
        graph.output.append(helper.make_tensor_value_info("looped", 1, []))
    elif kind == "no names":
        for each in graph.node:
            each.name = ""
    return kind


CHANGES_WEIGHTS = ("overturned", "cut out", "doubled", "dims and data", "type", "not finite", "data", "1-D or 3-D")


def changed(seed: int) -> tuple[str, bytes]:
    random = np.random.default_rng(seed)
    model = small_network(seed % 2)
    if random.random() < 0.35:
        return bytes_changed(random, model.SerializeToString())
    kinds = [structure_changed(random, model) for _ in range(1 if random.random() < 0.7 else 2)]
    return ", ".join(kinds), model.SerializeToString()


# -- outcomes ----------------------------------------------------------------------------------------------------------


def tried(seed: int, place: str, report: str) -> None:
    """In a process of its own: compress, and write what came of it."""
    for room in ("deploy.costs", "students.latency_budget", "commands.deliver"):  # time is not what this is about
        module = __import__(f"dk2pnet.{room}", fromlist=["compare_latency"])
        module.compare_latency = functools.partial(module.compare_latency, seconds=0.01, rounds_min=2)
    network.probe = functools.partial(network.probe, seconds=20)
    folder = Path(place)
    kind, content = changed(seed)
    try:
        compress(folder / "model.onnx", str(folder / "inputs.npz"), "kernels=1", threads=1, out=folder / "out")
        outcome, said = "written", ""
    except InputError as error:
        outcome, said = "refused", str(error).replace(place, "")
    except BaseException:
        outcome, said = "defect", traceback.format_exc()[-1500:]
    Path(report).write_text(json.dumps({"outcome": outcome, "said": said}))


def check_written(kind: str, folder: Path) -> str:
    """What is wrong with a folder that was written, "" if nothing is."""
    expected = {"model.onnx", "plan.json", "metrics.json", "report.html", "recipe.yaml"}
    if {path.name for path in (folder / "out").iterdir()} != expected:
        return "other files than expected"
    content = (folder / "out" / "model.onnx").read_bytes()
    onnx.checker.check_model(content)
    old = onnxruntime.InferenceSession((folder / "model.onnx").read_bytes(), providers=["CPUExecutionProvider"])
    new = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    if [each.name for each in new.get_inputs()] != [each.name for each in old.get_inputs()]:
        return "other inputs"
    original = network.OnnxNetwork.read(folder / "model.onnx")
    samples = array_samples(original.arrays(str(folder / "inputs.npz")), 2000, original.batching)
    metrics = json.loads((folder / "out" / "metrics.json").read_text())
    answers: list[tuple[np.ndarray, np.ndarray]] = []
    for feed, _ in samples.held_out:
        pairs = list(zip(run(old, feed), run(new, feed), strict=True))
        if any(a.shape != b.shape or a.dtype != b.dtype for a, b in pairs):
            return "outputs of another shape"
        a, b = (np.nan_to_num(each.astype(np.float64), posinf=0, neginf=0) for each in pairs[0])
        answers.append((a, b))
    error = 100 * math.sqrt(relative_error(answers))
    said = list(metrics["student"]["relative_errors"].values())[0]
    if len(metrics["student"]["relative_errors"]) == 1 and not math.isclose(error, said, rel_tol=0.02, abs_tol=0.01):
        return f"an error of {error} %, but metrics.json says {said} %"
    if not any(name in kind for name in CHANGES_WEIGHTS) and error > 0.1:
        return f"an error of {error} %, where the weights have one kernel per channel"
    return ""


def relative_error(answers: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """As docs/method.md has it, worked out apart from the package: over the energy about the mean, or about zero where
    all samples have one answer."""
    a, b = (np.concatenate(side) for side in zip(*answers, strict=True))
    energy = np.square(a - a.mean(0)).sum() * len(a) / max(len(a) - 1, 1)
    about_zero = np.square(a).sum()
    return float(np.square(a - b).sum() / max(energy if energy > 1e-12 * about_zero else about_zero, 1e-300))


def run(session: Any, feed: Feed) -> list[np.ndarray]:
    return session.run(None, feed.arrays)


def row_of(seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "work"
        folder.mkdir()
        kind, content = changed(seed)
        (folder / "model.onnx").write_bytes(content)
        inputs = np.random.default_rng(0).standard_normal((20, 3, 12, 10)).astype(np.float32)
        np.savez(folder / "inputs.npz", x=inputs)
        report = Path(place) / "report.json"
        process = multiprocessing.get_context("fork").Process(target=tried, args=(seed, str(folder), str(report)))
        process.start()
        process.join(SECONDS)
        row = {"seed": seed, "change": kind}
        if process.is_alive():
            process.kill()
            process.join()
            return row | {"outcome": "defect", "said": f"no end within {SECONDS} s"}
        if not report.exists():
            return row | {"outcome": "defect", "said": f"the process ended with exit code {process.exitcode}"}
        row |= json.loads(report.read_text())
        left = {path.name for path in folder.iterdir()} - {"model.onnx", "inputs.npz"}
        if row["outcome"] == "refused":
            return row if not left else row | {"outcome": "defect", "said": f"{row['said']}; but left {sorted(left)}"}
        if row["outcome"] == "written":
            try:
                problem = check_written(kind, folder) if left == {"out"} else f"left {sorted(left)}"
            except Exception as error:
                problem = str(error)[:500]
            return row | {"outcome": "defect" if problem else "correct", "said": problem}
        return row


def main() -> None:
    parser = plain_parser(__doc__)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop early; the same command goes on")
    options = parser.parse_args()
    import time

    rows = read_results("hostile-onnx", {"rows": []})["rows"]
    end = time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory() as cache:
        os.environ["DK2PNET_CACHE"] = cache
        for seed in range(options.first, options.first + options.count):
            if any(row["seed"] == seed for row in rows):
                continue
            if time.monotonic() > end:
                break
            rows.append(row_of(seed))
            counts = Counter(row["outcome"] for row in rows)
            write_results("hostile-onnx", {"counts": dict(counts), "rows": rows})
            if rows[-1]["outcome"] == "defect":
                print(rows[-1], flush=True)
    print(dict(Counter(row["outcome"] for row in rows)))


if __name__ == "__main__":
    main()
