"""Training as a user does it: beside a teacher, killed and repeated, refused, and with two processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from command_line import FILES, LOGS, error_of, figures, here, snapshot, teach, works
from PIL import Image
from safetensors.torch import load_file

from dk2pnet.data import load

NETWORK = ["--model", "lenet", "--data", "digits", "--lr", 0.02, "--threads", 1]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a trained network, teacher/."""
    folder = tmp_path_factory.mktemp("training")
    teach(folder)
    return folder


def weights(folder):
    return {name: tensor.tolist() for name, tensor in load_file(folder / "model.safetensors").items()}


def start(*args, cwd):
    command = [sys.executable, "-m", "dk2pnet", *map(str, args)]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def checkpoints(out):
    return sorted(out.with_name(f"{out.name}.unfinished").glob("checkpoints/step-*.safetensors"))


def kill_when(process, ready):
    """SIGKILL as soon as `ready`; whether it came before the end."""
    deadline = time.monotonic() + 120
    while process.poll() is None and not ready() and time.monotonic() < deadline:
        time.sleep(0.01)
    running = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return running


# -- beside a teacher --------------------------------------------------------------------------------------------------


def test_a_teacher_teaches_on_images_without_labels(place):
    images = load("digits").images
    (place / "drawings").mkdir()
    for number in range(48):
        Image.fromarray(images[number, 0].numpy()).save(place / f"drawings/{number}.png")
    given = ["--model", "lenet", "--data", "drawings", "--teacher", "teacher", "--method", "kd", "--batch-size", 8]
    answer = works(here, "train", *given, "--epochs", 1, "--out", "unlabelled", cwd=place)
    assert "no labelled test split\nWritten to unlabelled" in answer.out
    assert figures(place / "unlabelled")["network"]["accuracy"] is None


def test_a_student_of_another_architecture_and_its_hints(place):
    hints = ["--hint", "features.1=features.5", "--hint", "features.4=features.12"]
    taught = ["--model", "vgg8", *NETWORK[2:], "--teacher", "teacher", "--epochs", 1, "--method", "kp-unit"]
    answer = works(here, "train", *taught, *hints, "--out", "pupil", cwd=place)
    assert "hints (teacher = student): features.1 = features.5, features.4 = features.12" in answer.err
    assert {path.name for path in (place / "pupil").iterdir()} == FILES - {"report.html"} | LOGS
    assert figures(place / "pupil")["teacher"]["parameters"] < figures(place / "pupil")["network"]["parameters"]
    lines = [json.loads(line) for line in (place / "pupil/log.jsonl").read_text().splitlines()]
    assert lines[-1].keys() >= {"step", "epoch", "learning_rate", "hints", "kd", "labels", "validation_accuracy"}
    assert not (place / "pupil.unfinished").exists()


def test_a_compressed_network_is_trained_on(place):
    compress = ["compress", "--model", "teacher", "--data", "digits", "--budget", "kernels=1", "--criterion", "weight"]
    works(here, *compress, "--tune", 0, "--out", "small", cwd=place)
    train = ["train", "--model", "small", *NETWORK[2:], "--teacher", "teacher", "--epochs", 3]
    works(here, *train, "--out", "tuned", cwd=place)
    assert figures(place / "tuned")["network"]["macs"] == figures(place / "small")["student"]["macs"]
    assert figures(place / "tuned")["network"]["accuracy"] > figures(place / "small")["student"]["accuracy"]
    onnx = works(here, "evaluate", "--model", "tuned/model.onnx", "--data", "digits", cwd=place)
    assert f"accuracy {figures(place / 'tuned')['network']['accuracy']:.2f} %" in onnx.out


REFUSED = {
    "a method that there is not": (["--teacher", "teacher", "--method", "magic"], ["'magic'", "kp-channel", "fitnets"]),
    "a method without its teacher": (["--method", "kd"], ["'kd'", "--teacher"]),
    "a teacher for nothing": (["--teacher", "teacher", "--method", "labels"], ["labels", "--teacher"]),
    "a teacher without weights": (["--teacher", "resnet20"], ["resnet20", "weights"]),
    "a hint layer that there is not": (["--teacher", "teacher", "--hint", "conv9=features.1"], ["'conv9'", "teacher"]),
    "half a hint": (["--teacher", "teacher", "--hint", "features.1="], ["features.1=", "TEACHER.LAYER=STUDENT.LAYER"]),
    "a hint without a map": (["--teacher", "teacher", "--hint", "classifier"], ["'classifier'", "feature map"]),
    "too few images": (["--images", 1], ["1 training images", "2 or more"]),
    "an augmentation that there is not": (["--augment", "wild"], ["'wild'", "natural"]),
    "a negative weight": (["--teacher", "teacher", "--beta", "-1"], ["beta is -1.0"]),
    "a precision that there is not": (["--precision", "int3"], ["'int3'", "bf16"]),
    "far too high a learning rate": (["--lr", "1e30"], ["not finite", "step", "labels", "--lr"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_sentence_and_nothing_is_left(case, place):
    options, words = REFUSED[case]
    before = snapshot(place)
    answer = here("train", *NETWORK, "--epochs", 1, "--out", "never", *options, cwd=place)
    for word in words:
        assert word in error_of(answer)
    assert snapshot(place) == before


def test_ctrl_c_says_that_the_run_can_go_on(place):
    command = ["train", *NETWORK, "--epochs", 400, "--checkpoint-every", 0, "--out", "stopped"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dk2pnet", *map(str, command)],
        cwd=place,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that run in the background of a shell have inherited that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    try:
        while process.poll() is None and not checkpoints(place / "stopped") and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "from an OUT.unfinished the same command goes on" in " ".join(said.split())
    assert checkpoints(place / "stopped")
    assert not (place / "stopped").exists()
    shutil.rmtree(place / "stopped.unfinished")


# -- killed and repeated -----------------------------------------------------------------------------------------------


def test_killed_and_repeated_a_training_ends_as_if_nothing_had_happened(place):
    command = ["train", *NETWORK, "--teacher", "teacher", "--epochs", 6, "--checkpoint-every", 0]
    works(here, *command, "--out", "calm", cwd=place)
    out = place / "shaken"
    for steps in (1, 25):
        process = start(*command, "--out", "shaken", cwd=place)
        assert kill_when(process, lambda: any(int(path.name[5:14]) >= steps for path in checkpoints(out)))  # noqa: B023
        assert not out.exists()
    answer = here("train", *NETWORK, "--teacher", "teacher", "--epochs", 7, "--out", "shaken", cwd=place)
    assert "epochs 6" in error_of(answer)
    answer = works(here, *command, "--out", "shaken", cwd=place)
    assert "going on from" in answer.err
    assert weights(out) == weights(place / "calm")
    assert not (place / "shaken.unfinished").exists()


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(place):
    command = ["train", *NETWORK, "--epochs", 3, "--checkpoint-every", 0]
    works(here, *command, "--out", "whole", cwd=place)
    process = start(*command, "--out", "cut", cwd=place)
    assert kill_when(process, lambda: len(checkpoints(place / "cut")) >= 2)
    newest = checkpoints(place / "cut")[-1]
    newest.write_bytes(newest.read_bytes()[:-100])
    answer = works(here, *command, "--out", "cut", cwd=place)
    assert newest.name in answer.err
    assert "damaged" in answer.err
    assert weights(place / "cut") == weights(place / "whole")


def test_a_killed_compression_does_not_solve_again(place):
    command = ["compress", "--model", "teacher", "--data", "digits", "--budget", "macs=0.5", "--epochs", 4]
    command += ["--threads", 1, "--checkpoint-every", 0]
    works(here, *command, "--out", "plain", cwd=place)
    process = start(*command, "--out", "stopped", cwd=place)
    assert kill_when(process, lambda: bool(checkpoints(place / "stopped")))
    answer = works(here, *command, "--out", "stopped", cwd=place)
    assert "solving" not in answer.err
    assert weights(place / "stopped") == weights(place / "plain")
    assert figures(place / "stopped")["decisions"] == figures(place / "plain")["decisions"]
    assert {path.name for path in (place / "stopped").iterdir()} == FILES | LOGS


# -- two processes -----------------------------------------------------------------------------------------------------


def test_two_processes_gather_the_same_and_train(place):
    command = ["compress", "--model", "teacher", "--data", "digits", "--budget", "macs=0.5", "--epochs", "3"]
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    call = [sys.executable, *launch, "-m", "dk2pnet", *command, "--out", "two"]
    done = subprocess.run(call, cwd=place, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Written to two") == 1
    works(here, *command, "--out", "one", cwd=place)
    one, two = figures(place / "one"), figures(place / "two")
    assert [layer["counts"] for layer in one["layers"]] == [layer["counts"] for layer in two["layers"]]
    assert two["decisions"][0]["after"] == pytest.approx(one["decisions"][0]["after"], rel=0.05)
    assert two["student"]["accuracy"] > two["teacher"]["accuracy"] - 3
    assert not list(place.glob("*.unfinished"))
