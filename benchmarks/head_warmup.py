"""What happens to a released backbone, whose heads are not released, when a training starts from it.

    make demo
    python benchmarks/head_warmup.py [--demo outputs/demo] [--steps 200] [--output-dir outputs/head_warmup]

Takes the demo's trained backbone without its heads, and trains it on with `student.pretrained_weights`: once with the
backbone frozen for the first half (`optim.freeze_backbone_epochs`), while fresh heads learn, and once without. Prints a
Markdown table of the k-NN accuracy of the teacher's backbone on the demo's held-out digits.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path

import torch

from dinov3.demo.run import NEIGHBOURS, RECIPE
from dinov3.eval import knn
from dinov3.eval.classification.knn_config import RESULTS_FILENAME, KnnEvalConfig
from dinov3.eval.command.command_line import run_evaluation
from dinov3.eval.command.config import args_dict_to_dataclass
from dinov3.hub.weights import read_state_dict
from dinov3.run.init import job_context
from dinov3.train import train

TASK = "digits"
N_EVALUATIONS = 4
FEATURES = ("CLS", "PATCH_MEAN")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("outputs/demo"), help="a finished demo")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/head_warmup"))
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    backbone = args.output_dir / "backbone.pth"
    torch.save(dict(read_state_dict(args.demo / "run" / "teacher_checkpoint.pth")), backbone)

    start = accuracies(args.demo, backbone, args.output_dir / "knn" / "start")
    iterations = [args.steps * (i + 1) // N_EVALUATIONS for i in range(N_EVALUATIONS)]
    print(f"| only heads trained | feature | start | {' | '.join(f'after {n}' for n in iterations)} |")
    print(f"| --- | --- | {'| '.join(['---: '] * (1 + N_EVALUATIONS))}|")
    for epochs, name in ((0.5, f"{args.steps // 2} steps"), (0.0, "never")):
        run = args.output_dir / f"frozen{epochs}"
        train_on(args.demo, backbone, run, args.steps, epochs)
        columns = [
            accuracies(args.demo, run / "eval" / f"training_{n - 1}" / "teacher_checkpoint.pth", run / f"knn{n}")
            for n in iterations
        ]
        for index, feature in enumerate(FEATURES):
            cells = [f"{column[index]:.1f}" for column in (start, *columns)]
            print(f"| {name} | {feature} | {' | '.join(cells)} |", flush=True)


def train_on(demo: Path, backbone: Path, run: Path, steps: int, freeze_epochs: float) -> None:
    """A training of one epoch of `steps` from the backbone, with exports of its teacher."""
    options = {
        "train.dataset_path": f"ImageFolder:root={(demo / 'images' / 'train').resolve()}",
        "student.pretrained_weights": str(backbone),
        "optim.freeze_backbone_epochs": freeze_epochs,
        "train.OFFICIAL_EPOCH_LENGTH": steps,
        "evaluation.eval_period_iterations": steps // N_EVALUATIONS,
    }
    with silent():
        settings = [f"{key}={value}" for key, value in options.items()]
        train.main(["--config-file", str(RECIPE), "--output-dir", str(run), *settings])


def accuracies(demo: Path, weights: Path, output_dir: Path) -> list[float]:
    """Top-1 accuracy of k-NN on held-out digits in percent, by feature."""
    images = (demo / "images").resolve()
    found = []
    for feature in FEATURES:
        settings = {
            "model": {"config_file": str(demo / "run" / "config.yaml"), "pretrained_weights": str(weights)},
            "train": {"dataset": f"ImageFolder:root={images / 'train' / TASK}", "num_workers": 0, "ks": [NEIGHBOURS]},
            "eval": {
                "test_dataset": f"ImageFolder:root={images / 'test' / TASK}",
                "num_workers": 0,
                "feature": feature,
            },
            "transform": {"resize_size": 16, "crop_size": 16},
            "output_dir": str(output_dir / feature.lower()),
        }
        config, _ = args_dict_to_dataclass(settings, KnnEvalConfig, save_config=False)
        with silent(), job_context(output_dir=output_dir):
            figures = run_evaluation(config, evaluate=knn.evaluate_knn, results_file=RESULTS_FILENAME)
        found.append(figures[f"{NEIGHBOURS} Top 1"])
    return found


@contextlib.contextmanager
def silent():  # type: ignore[no-untyped-def]
    """Leave standard output to the table; everything is in the logs."""
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):
        yield


if __name__ == "__main__":
    sys.exit(main())
