"""`python -m dinov3.configs`: what a recipe and options amount to, without starting anything."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dinov3.configs.merging import Layer, get_default_config, layers_of, merge_layers, plain, unknown_keys
from dinov3.configs.multidistillation import disagreements, merge_student, merge_students, shared_problems
from dinov3.configs.notes import find_notes
from dinov3.configs.scaling import count_iterations, learning_rate_scale
from dinov3.configs.settings import ConfigError, as_list, flatten, format_keys
from dinov3.configs.training_config import TrainingConfig, default_values
from dinov3.configs.validation import find_problems
from dinov3.data.datasets.strings import parse_dataset_string
from dinov3.layers import convert_linears_to_fp8
from dinov3.models.building import build_model_from_cfg
from dinov3.utils.command_line import ArgumentParser

EPILOG = """\
The output is YAML (the summary stands in comments), so it can be kept as a configuration file:

    python -m dinov3.configs dinov3/configs/train/vitl_im1k_lin834.yaml optim.epochs=10 > mine.yaml

FILE is looked for in the current directory, in the repository and among the package's own recipes. Without FILE the
default configuration is shown. Exit status: 0, or 1 if this configuration could not be trained.

Keys, their defaults and meanings:
"""


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of `python -m dinov3.configs`."""
    parser = ArgumentParser(
        prog="python -m dinov3.configs",
        description="Print a merged training configuration, check it, and show what follows from it.",
        epilog=EPILOG + format_keys(TrainingConfig).replace("%", "%%"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", nargs="*", metavar="FILE | key=value", help="a recipe, and options that override it")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="GPUs that train together (default: 1)")
    parser.add_argument("--changed", action="store_true", help="only settings that differ from the defaults")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Print the configuration and what is wrong with it.

    Args:
        argv: the arguments after the program's name. Default: those of the command line.

    Returns:
        0 if the configuration can be trained, 1 otherwise.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s", stream=sys.stderr)
    parser = get_args_parser()
    args = parser.parse_intermixed_args(argv)
    if args.processes < 1:
        parser.error(f"--processes {args.processes}: must be at least 1")
    files = [word for word in args.words if "=" not in word]
    if len(files) > 1:
        parser.error(f"more than one configuration file: {' '.join(files)} (options are key=value)")
    args.config_file, args.output_dir = (files or [""])[0], None
    args.opts = [word for word in args.words if "=" in word]
    try:
        layers = layers_of(args)
        cfg = merge_layers(get_default_config(), layers, strict=False)
    except (ConfigError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(OmegaConf.to_yaml(_changed(cfg) if args.changed else cfg), end="")
    # The merge above has given all warnings; merging each student would repeat them.
    logging.getLogger("dinov3").setLevel(logging.ERROR)
    if unknown_keys(layers):
        problems = ["there are unknown keys, see above"]
    elif cfg.multidistillation.enabled:
        problems = _student_problems(cfg, args.processes, layers)
    else:
        problems = find_problems(cfg, args.processes) or [*_problems_of_parts(cfg)]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        return 1
    networks, processes = {cfg.student.arch: cfg}, args.processes
    if cfg.multidistillation.enabled:
        networks, processes = merge_students(cfg, layers), cfg.multidistillation.students[-1].ranks_range[1]
        for student in networks.values():
            student.train.batch_size_per_gpu = cfg.multidistillation.global_batch_size // processes
    print("".join(f"# {line}\n" for line in summary(networks, processes)), end="")
    return 0


def summary(networks: Mapping[str, Any], processes: int) -> Iterator[str]:
    """Yield what a person wants to know before training, line by line.

    Args:
        networks: the valid configuration of each network that is trained, by its name.
        processes: number of processes of the job.
    """
    # Students agree in everything that is shown once; see `disagreements`.
    cfg = next(iter(networks.values()))
    crops, optim, batches = cfg.crops, cfg.optim, cfg.train.grad_accumulation_steps
    batch_size = cfg.train.batch_size_per_gpu * processes * batches
    of_process = str(cfg.train.batch_size_per_gpu)
    if cfg.multidistillation.enabled and cfg.multidistillation.global_batch_size % processes:
        batch_size = cfg.multidistillation.global_batch_size * batches
        of_process = f"up to {cfg.train.batch_size_per_gpu + 1}"
    steps, epoch = count_iterations(cfg, optim.epochs), cfg.train.OFFICIAL_EPOCH_LENGTH
    global_sizes, local_sizes = (
        "/".join(str(size) for size in as_list(sizes)) for sizes in (crops.global_crops_size, crops.local_crops_size)
    )
    yield f"network          {', '.join(networks)}"
    yield f"crops            2 of {global_sizes} and {crops.local_crops_number} of {local_sizes} pixels"
    yield f"data             {cfg.train.dataset_path}"
    yield (
        f"effective batch  {batch_size} images ({of_process} per process, "
        f"{processes} process{'es' if processes > 1 else ''}{f', {batches} batches per step' if batches > 1 else ''})"
    )
    for name, of in networks.items():
        lr = of.optim.lr if of.get("schedules") is None else max(of.schedules.lr.peak, of.schedules.lr.end)
        scale = learning_rate_scale(of, processes)
        shown = f"{lr * scale:.4g} ({lr:.4g} x {scale:.4g}, {of.optim.scaling_rule})"
        yield f"peak lr          {shown}{f' of {name}' if len(networks) > 1 else ''}"
    yield f"steps            {steps} ({optim.epochs} epochs of {epoch}), {steps * batch_size} images"
    yield f"checkpoints      every {cfg.checkpointing.period} steps"
    for note in find_notes(cfg):
        yield f"note: {note}"


def _student_problems(cfg: DictConfig, processes: int, layers: list[Layer]) -> list[str]:
    problems = shared_problems(cfg, processes)
    if problems:
        return problems
    students = {}
    for student in cfg.multidistillation.students:
        try:
            students[student.name] = merge_student(student, layers)
            found = find_problems(students[student.name], processes) or [*_problems_of_parts(students[student.name])]
        except (ConfigError, FileNotFoundError) as error:
            found = [str(error)]
        problems += [f"student {student.name}: {problem}" for problem in found]
    return problems + [*disagreements(students)]


def _problems_of_parts(cfg: DictConfig) -> Iterator[str]:
    """Yield what the trainer would find where it opens the data and builds the network, as far as `cfg` says."""
    try:
        parse_dataset_string(cfg.train.dataset_path)
    except ValueError as error:
        yield f"train.dataset_path: {error}"
    # Building on the meta device takes no memory; what only a device can say (8-bit products) is left to the trainer.
    try:
        student = build_model_from_cfg(cfg, fp8=False)[0]
        if cfg.student.fp8_enabled:
            convert_linears_to_fp8(student, filter=cfg.student.fp8_filter)
    except (AssertionError, NotImplementedError, RuntimeError, ValueError) as error:
        yield f"the network of the section student cannot be built: {error}"


def _changed(cfg: DictConfig) -> DictConfig:
    changed = OmegaConf.create()
    defaults = default_values()
    for key, value in flatten(plain(cfg)):
        if key not in defaults or defaults[key] != value:
            OmegaConf.update(changed, key, value)
    return changed


if __name__ == "__main__":
    sys.exit(main())
