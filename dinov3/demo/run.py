"""The demo from beginning to end: images, k-NN before, training, k-NN after, figures, summary.

Everything goes through the entry points that any other run uses. The training logs to `run/logs/log.txt`; the terminal
shows progress bars and results.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

from dinov3.configs import DinoV3SetupArgs, get_cfg_from_args, write_config
from dinov3.demo import figures
from dinov3.demo.images import Images, prepare_images
from dinov3.demo.trees import read_json
from dinov3.distributed import runtime
from dinov3.eval import knn
from dinov3.eval.classification.knn_config import RESULTS_FILENAME, KnnEvalConfig
from dinov3.eval.command.command_line import run_evaluation
from dinov3.eval.command.config import args_dict_to_dataclass
from dinov3.hub.runs import build_model_for_eval, dinov3_from_run
from dinov3.run.init import job_context
from dinov3.train import train
from dinov3.train.plot import FIGURE_FILE

RECIPE = Path(__file__).resolve().parents[1] / "configs" / "train" / "demo_cpu.yaml"
STATE_FILE = "demo.json"  # in the run directory: the settings with which it was started
RESULTS_FILE = "results.json"
NEIGHBOURS = 10
FEATURES = {"CLS": "class token", "PATCH_MEAN": "mean patch token"}
RANDOM, TRAINED = "random initialisation", "trained teacher"


@dataclass(frozen=True)
class DemoOptions:
    """The options of the demo.

    Attributes:
        output_dir: where everything is written.
        images: folder of the user's own images. Default: those inside installed packages.
        seed: of the training and of the random initialisation.
        iterations: training steps. Default: those of the recipe.
        overrides: `key=value` settings of the training.
    """

    output_dir: Path = Path("outputs/demo")
    images: Path | None = None
    seed: int = 0
    iterations: int | None = None
    overrides: tuple[str, ...] = ()


@dataclass
class DemoResults:
    """The measurements of the demo.

    Attributes:
        accuracy: top-1 accuracy of k-NN in percent, by task, then feature, then model (`RANDOM`, `TRAINED`).
        train_seconds: time of this call's training; about 0 if there was nothing left to train.
        total_seconds: time of everything.
        peak_memory_mib: of this process.
        files: paths of what was written, by description.
    """

    accuracy: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    train_seconds: float = 0.0
    total_seconds: float = 0.0
    peak_memory_mib: float = 0.0
    files: dict[str, str] = field(default_factory=dict)


def run_demo(options: DemoOptions) -> DemoResults:
    """Run the demo, print its results and write `<output_dir>/results.json`.

    Raises:
        FileNotFoundError: `options.images` is not a directory, or holds no images.
        ValueError: a setting or an image cannot be used; the message says which.
        RuntimeError: the output directory is in use or cannot be written, or an image cannot be decoded.
    """
    started = time.perf_counter()
    results = DemoResults()
    output_dir = options.output_dir.expanduser().resolve()
    run_dir = output_dir / "run"

    _print_heading("1/5 images")
    output_dir.mkdir(parents=True, exist_ok=True)
    images, was_there = prepare_images(output_dir / "images", options.images)
    held_out = "".join(f", {n_test} held-out {task}" for task, (_, n_test) in images.task_sizes.items())
    verb = "using again" if was_there else "wrote"
    _print_line(f"{verb} {images.n_train} training images{held_out}: {images.root}")

    settings = [f"train.dataset_path={images.dataset('train')}", f"train.seed={options.seed}"]
    if options.iterations is not None:
        settings += [f"train.OFFICIAL_EPOCH_LENGTH={options.iterations}", "optim.epochs=1"]
    settings += ["train.progress=true", *options.overrides]  # the user's own last, so that they win
    cfg = _open_run(run_dir, settings)
    with _quiet_job(output_dir, options.seed):
        random_model = build_model_for_eval(cfg, None)
    n_parameters = sum(parameter.numel() for parameter in random_model.parameters())
    _print_line(
        f"{cfg.student.arch}, {random_model.n_blocks} blocks, patches of {cfg.student.patch_size} pixels, "
        f"{n_parameters / 1e6:.1f} M parameters"
    )

    _print_heading("2/5 k-NN of the random initialisation")
    _evaluate(results, RANDOM, images, cfg, output_dir, options.seed)

    n_iterations = round(cfg.optim.epochs * cfg.train.OFFICIAL_EPOCH_LENGTH)
    _print_heading(f"3/5 training: {n_iterations} steps of {cfg.train.batch_size_per_gpu} images")
    training_started = time.perf_counter()
    with _quiet():
        metrics = train.main(["--config-file", str(RECIPE), "--output-dir", str(run_dir), *settings])
    if not metrics:
        _print_line("nothing left to train: using the teacher of the earlier run")
    results.train_seconds = time.perf_counter() - training_started

    _print_heading("4/5 k-NN of the trained teacher")
    _evaluate(results, TRAINED, images, cfg, output_dir, options.seed)

    _print_heading("5/5 figures")
    _draw(results, images, {RANDOM: random_model, TRAINED: dinov3_from_run(run_dir)}, output_dir, n_iterations)

    results.files |= {"loss curves": str(run_dir / FIGURE_FILE), "trained run": str(run_dir)}
    results.files["results"] = str(output_dir / RESULTS_FILE)
    results.total_seconds = time.perf_counter() - started
    results.peak_memory_mib = runtime.max_memory_mib()
    record = {"seed": options.seed, "iterations": n_iterations, "images": images.source, **asdict(results)}
    (output_dir / RESULTS_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print("\n" + format_summary(results, images, n_iterations), flush=True)
    return results


def format_summary(results: DemoResults, images: Images, n_iterations: int) -> str:
    """Format the results as text: a table of k-NN accuracies, times, and where the files are."""
    lines = [f"{n_iterations} training steps on {images.n_train} images ({images.source})"]
    for task, by_feature in results.accuracy.items():
        n_train, n_test = images.task_sizes[task]
        n_neighbours = min(NEIGHBOURS, n_train)
        lines += ["", f"{n_neighbours}-NN accuracy on {n_test} held-out images ({task}), by {n_train} training images"]
        lines.append(f"  {'':<18}{RANDOM:>24}{TRAINED:>18}")
        for feature, by_model in by_feature.items():
            lines.append(f"  {feature:<18}{by_model[RANDOM]:>22.1f} %{by_model[TRAINED]:>16.1f} %")
    if not results.accuracy:
        lines += ["", "no k-NN: the images have no class folders"]
    lines += ["", f"training {results.train_seconds:.0f} s, in all {results.total_seconds:.0f} s"]
    lines[-1] += f", at most {results.peak_memory_mib / 1024:.1f} GiB of memory"
    width = max(map(len, results.files))
    return "\n".join(lines + [f"{name:<{width}}  {path}" for name, path in results.files.items()])


def _open_run(run_dir: Path, arguments: list[str]) -> Any:
    # A run that was started with other settings is put aside, because it cannot be continued.
    cfg = get_cfg_from_args(DinoV3SetupArgs(config_file=RECIPE, output_dir=run_dir, opts=arguments))
    wanted = {"recipe": RECIPE.read_text(encoding="utf-8"), "options": arguments}
    state_file = run_dir / STATE_FILE
    if run_dir.is_dir() and any(run_dir.iterdir()):
        if read_json(state_file) == wanted:
            return cfg
        aside = run_dir.with_name(f"run.before-{time.strftime('%Y%m%d-%H%M%S')}")
        run_dir.rename(aside)
        _print_line(f"the earlier run had other settings: it is now {aside}, and training starts afresh")
    run_dir.mkdir(parents=True, exist_ok=True)
    write_config(cfg, run_dir)
    state_file.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
    return cfg


def _evaluate(results: DemoResults, model: str, images: Images, cfg: Any, output_dir: Path, seed: int) -> None:
    side = cfg.crops.global_crops_size
    run_dir = output_dir / "run"
    for task in images.tasks:
        for feature, title in FEATURES.items():
            name = f"{task}-{feature.lower()}-{'random' if model == RANDOM else 'trained'}"
            settings = {
                "model": {
                    "config_file": str(run_dir / "config.yaml"),
                    "pretrained_weights": None if model == RANDOM else str(run_dir),
                },
                "train": {"dataset": images.dataset("train", task), "num_workers": 0, "ks": [NEIGHBOURS]},
                "eval": {"test_dataset": images.dataset("test", task), "num_workers": 0, "feature": feature},
                "transform": {"resize_size": side, "crop_size": side},
                "output_dir": str(output_dir / "knn" / name),
            }
            config, _ = args_dict_to_dataclass(settings, KnnEvalConfig, save_config=False)
            with _quiet_job(output_dir, seed):
                table = run_evaluation(config, evaluate=knn.evaluate_knn, results_file=RESULTS_FILENAME)
            accuracy = table[f"{min(NEIGHBOURS, images.task_sizes[task][0])} Top 1"]
            results.accuracy.setdefault(task, {}).setdefault(title, {})[model] = accuracy
            _print_line(f"{task}, {title}: {accuracy:.1f} %")


def _draw(
    results: DemoResults, images: Images, models: dict[str, nn.Module], output_dir: Path, n_iterations: int
) -> None:
    photos = [
        figures.Photo(
            f"{photo.name}{' (not trained on)' if photo.is_held_out else ''}",
            Image.open(images.root / photo.file).convert("RGB"),
            photo.mark,
        )
        for photo in images.photos
    ]
    trained = f"after {n_iterations} training steps"
    pca, similarity = output_dir / "pca.png", output_dir / "similarity.png"
    figures.draw_pca(photos, models, pca, title=f"Principal components 1 to 3 of patch features, {trained}")
    results.files["principal components"] = str(pca)
    figures.draw_similarity(photos, models, similarity, title=f"Cosine similarity to the marked patch, {trained}")
    results.files["similarity"] = str(similarity)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # What is printed and logged is in files, too; progress bars use standard error.
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):
        yield


@contextlib.contextmanager
def _quiet_job(output_dir: Path, seed: int) -> Iterator[None]:
    # Logs to knn/logs/log.txt.
    with _quiet(), job_context(output_dir=output_dir / "knn", seed=seed):
        yield


def _print_heading(text: str) -> None:
    print(f"\n{text}", flush=True)


def _print_line(text: str) -> None:
    print(f"    {text}", flush=True)
