"""Peak memory against --memory, for five networks: what is kept is bounded, and what a network needs itself is said.

    python benchmarks/memory.py --images FOLDER [--resnet50 WEIGHTS] [--only NAME ...] [--memory 1 4]

dense      a PyTorch network whose answers are large maps (21 x 224 x 224), 400 images of 64 x 64
detector   RetinaNet's trunk and pyramid at 640 x 640, 5 maps
1-D        a graph with wide kernels (512 and 64 places) on sounds
resnet50   an ImageNet classifier on the folder's images at 224 x 224
720p       a super-resolution graph on frames of 1280 x 720

Weights are random but for resnet50's, if its file is given: memory does not depend on them. Each run has a process of
its own and two threads; the closed form with the reconstruction, untuned but for 20 steps of resnet50. Reported are GiB
above what the process had after its imports, and what the run said beforehand. Rows that are already in the JSON are
not made again. Writes benchmarks/results/memory.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from common import Rows, plain_parser
from dk2pnet import compress

_GIB = 2**30


# -- the networks ------------------------------------------------------------------------------------------------------


class Noise:
    """`count` images of noise, the same in every pass, made when they are wanted."""

    def __init__(self, count: int, size: int, batch: int) -> None:
        self.count, self.size, self.batch = count, size, batch

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, self.count, self.batch):
            generator = torch.Generator().manual_seed(start)
            yield torch.randn(self.batch, 3, self.size, self.size, generator=generator)


def dense(options: argparse.Namespace, place: Path) -> tuple[Any, Any, dict[str, Any]]:
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 21, 1)]
    return nn.Sequential(*layers, nn.Upsample(scale_factor=3.5)), Noise(400, 64, 10), {"calibration_images": 400}


def detector(options: argparse.Namespace, place: Path) -> tuple[Any, Any, dict[str, Any]]:
    from torchvision.models.detection import retinanet_resnet50_fpn

    trunk = retinanet_resnet50_fpn(weights=None, weights_backbone=None).backbone
    return trunk, Noise(16, 640, 2), {"calibration_images": 16}


def graph_of(place: Path, shape: tuple[int, ...], layers: list[tuple[int, tuple[int, int], tuple[int, int]]]) -> str:
    """A chain of convolutions with ReLUs, each of so many channels, kernel and stride, padded to the same size."""
    random, channels, nodes, weights, name = np.random.default_rng(0), shape[1], [], [], "x"
    for number, (outputs, kernel, stride) in enumerate(layers):
        weight = random.standard_normal((outputs, channels, *kernel)) * (2 / channels / np.prod(kernel)) ** 0.5
        weights.append(numpy_helper.from_array(weight.astype(np.float32), f"w{number}"))
        settings = {"kernel_shape": kernel, "strides": stride, "auto_pad": "SAME_UPPER"}
        nodes.append(helper.make_node("Conv", [name, f"w{number}"], [f"c{number}"], **settings))
        nodes.append(helper.make_node("Relu", [f"c{number}"], [f"r{number}"]))
        channels, name = outputs, f"r{number}"
    takes = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", *shape[1:]])
    gives = helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", channels, "H", "W"])
    graph = helper.make_graph(nodes, "chain", [takes], [gives], weights)
    path = place / "chain.onnx"
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    )
    np.savez(place / "inputs.npz", x=random.standard_normal(shape).astype(np.float32))
    return str(path)


def one_dimensional(options: argparse.Namespace, place: Path) -> tuple[Any, Any, dict[str, Any]]:
    widths = [(64, (512, 1), (4, 1)), *[(64, (64, 1), (1, 1))] * 3]
    return graph_of(place, (100, 1, 1024, 1), widths), str(place / "inputs.npz"), {}


def resnet50(options: argparse.Namespace, place: Path) -> tuple[Any, Any, dict[str, Any]]:
    if options.resnet50 is None:
        raise SystemExit("resnet50 needs --resnet50 WEIGHTS")
    further = {"weights": options.resnet50, "calibration_images": 400, "input_size": 224, "normalize": "imagenet"}
    return "torchvision/resnet50", None, further | {"tune": 20, "classes": 1000, "calibration_data": options.images}


def video(options: argparse.Namespace, place: Path) -> tuple[Any, Any, dict[str, Any]]:
    layers = [(32, (5, 5), (1, 1)), *[(32, (3, 3), (1, 1))] * 4, (12, (3, 3), (1, 1))]
    return graph_of(place, (20, 3, 720, 1280), layers), str(place / "inputs.npz"), {}


NETWORKS: dict[str, Callable[[argparse.Namespace, Path], tuple[Any, Any, dict[str, Any]]]] = {
    "dense": dense,
    "detector": detector,
    "1-D": one_dimensional,
    "resnet50": resnet50,
    "720p": video,
}


# -- the runs ----------------------------------------------------------------------------------------------------------


def one(name: str, memory: float, options: argparse.Namespace) -> dict[str, Any]:
    """In this process."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
    process, peak, over = psutil.Process(), [0], threading.Event()
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("dk2pnet").addHandler(handler)
    logging.getLogger("dk2pnet").setLevel(logging.INFO)
    with tempfile.TemporaryDirectory() as place:
        model, data, further = NETWORKS[name](options, Path(place))
        start = process.memory_info().rss

        def watch() -> None:
            while not over.wait(0.01):
                peak[0] = max(peak[0], process.memory_info().rss)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        begin = time.perf_counter()
        found = compress(
            model, data, "macs=0.7", criterion="response", memory=memory, threads=2, **{"tune": 0} | further
        )
        over.set()
        watcher.join()
    return {
        "network": name,
        "memory": memory,
        "peak_gib": round((peak[0] - start) / _GIB, 2),
        "seconds": round(time.perf_counter() - begin),
        "own_gib": found.metrics["run"]["memory"]["own_gib"],
        "said": [line for line in said if "GiB" in line],
        "notes": found.metrics["notes"],
    }


def main() -> None:
    parser = plain_parser(__doc__)
    parser.add_argument("--images", help="a folder of images, for resnet50")
    parser.add_argument("--resnet50", help="its weights")
    parser.add_argument("--only", nargs="+", choices=tuple(NETWORKS), default=tuple(NETWORKS))
    parser.add_argument("--memory", nargs="+", type=float, default=[1.0, 4.0])
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(json.dumps(one(options.only[0], options.memory[0], options)))
        return
    rows = Rows("memory", lambda row: (row["network"], row["memory"]))
    for name in options.only:
        for memory in options.memory:
            if any(row["network"] == name and row["memory"] == memory for row in rows.read()):
                continue
            given = ["--images", str(options.images), *(["--resnet50", options.resnet50] if options.resnet50 else [])]
            command = [sys.executable, __file__, "--here", "--only", name, "--memory", str(memory), *given]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{name} at --memory {memory} failed: {done.stderr[-2000:]}")
            row = json.loads(done.stdout.splitlines()[-1])
            print(row, flush=True)
            rows.add(row, {})


if __name__ == "__main__":
    main()
