"""Does an exponential moving average of the weights pay? A student trained once, both weights evaluated.

    python benchmarks/ema.py --student OUT --weights resnet32.th --data-dir DATA [--model resnet32] [--epochs 4]

Decays 0.99 and 0.999 beside the trained weights, after every epoch, on the validation split. Writes
benchmarks/results/ema.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dk2pnet.data import split_training
from dk2pnet.layer import set_form
from dk2pnet.measure import accuracy, predict
from dk2pnet.pipelines.fit import fit
from dk2pnet.pipelines.inputs import environment, load_data, open_network, pick_device
from dk2pnet.training.trainer import TrainingOptions

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", required=True)
    parser.add_argument("--model", default="resnet32")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--data-dir", default=None)
    parser.add_argument("--normalize", default="imagenet")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    device = pick_device("cpu", options.threads)
    training = load_data(options.data, "train", options.student, data_dir=options.data_dir)
    kept, validation = split_training(training)
    network = open_network(options.student)
    teacher = open_network(options.model, weights=options.weights, normalize=options.normalize, data=training)
    student, norm = network.model, network.normalization
    set_form(student, "folded")
    averages = {
        decay: AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
        for decay in (0.99, 0.999)
    }
    steps = len(kept.batches(128, norm))
    rows = []

    def after(what: str, step: int, total: int) -> None:
        for average in averages.values():
            average.update_parameters(student)
        if step % steps:
            return
        row = {"epoch": step // steps, "trained": accuracy(predict(student, validation.batches(128, norm), device))}
        for decay, average in averages.items():
            row[str(decay)] = accuracy(predict(average.module, validation.batches(128, norm), device))
        rows.append(row)
        print(row, flush=True)

    fit(
        student,
        kept,
        TrainingOptions(epochs=options.epochs, learning_rate=0.05),
        example=norm.apply(training.subset([0]).images),
        teacher=teacher.model,
        name=options.data,
        normalization=norm,
        device=device,
        progress=after,
    )
    RESULTS.mkdir(exist_ok=True)
    result = {"student": Path(options.student).name, "epochs": options.epochs, "rows": rows, **environment(device)}
    (RESULTS / "ema.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
