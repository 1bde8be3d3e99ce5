"""Pretraining from the command line: one CPU process, one GPU, or many under torchrun or Slurm, the same command.

    python dinov3/train/train.py --config-file CONFIG.yaml --output-dir DIR [key=value ...]
    torchrun --nproc-per-node 8 dinov3/train/train.py --config-file ...

A run that is started again with the same output directory continues where its newest checkpoint is.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # run by path: this file's directory would hide the standard library's names
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import logging
import tempfile
import time
from contextlib import nullcontext
from typing import Any

import torch

from dinov3 import distributed
from dinov3.checkpointer import RunLock, latest_valid_checkpoint, remove_stale_temporaries
from dinov3.configs import ConfigError, DinoV3SetupArgs, setup_config, setup_multidistillation
from dinov3.distributed import runtime
from dinov3.hub.run_directory import CHECKPOINT_DIRECTORY, EVALUATION_DIRECTORY, TEACHER_FILE
from dinov3.models.summary import summarize
from dinov3.run.init import job_context
from dinov3.train.data_loading import crop_resolutions
from dinov3.train.loop import Trainer, do_train
from dinov3.train.multidist_meta_arch import MultiDistillationMetaArch
from dinov3.train.plot import METRICS_FILE
from dinov3.train.preemption import Preemption
from dinov3.train.preflight import benchmark, check_dataset, check_disk, dry_run, step_profiler
from dinov3.train.rank_failure import ending_together
from dinov3.train.schedules import apply_optim_scheduler, build_schedulers
from dinov3.train.ssl_meta_arch import SSLMetaArch
from dinov3.utils import fix_random_seeds
from dinov3.utils.command_line import ArgumentParser, run_command_line

__all__ = ["apply_optim_scheduler", "build_schedulers", "do_train", "get_args_parser", "main"]

logger = logging.getLogger("dinov3")

RETIRED_FLAGS = (
    "eval",
    "eval_pretrained_weights",
    "test_ibot",
    "dump_fsdp_weights",
    "record_ref_losses",
    "ref_losses_path",
)
META_ARCHITECTURES = {"SSLMetaArch": SSLMetaArch, "MultiDistillationMetaArch": MultiDistillationMetaArch}


def get_args_parser() -> ArgumentParser:
    """Return the parser of a training's flags, and of `key=value` options that override the configuration file."""
    parser = ArgumentParser(
        prog="train.py",
        description="Train a DINOv3 backbone. Runs on one CPU process, on one GPU, or under torchrun.",
        epilog="Example: train.py --config-file dinov3/configs/train/demo_cpu.yaml --output-dir outputs/run "
        "train.dataset_path=ImageFolder:root=photos optim.epochs=10. `python -m dinov3.configs --help` lists all keys.",
    )
    parser.add_argument("--config-file", default="", metavar="FILE", help="recipe, merged over the defaults")
    parser.add_argument("--output-dir", default="./local_dino", type=str, metavar="DIR", help="where the run writes")
    parser.add_argument("--device", metavar="NAME", help="auto, cpu, cuda, cuda:1, ...; wins over DINOV3_DEVICE")
    parser.add_argument("--no-resume", action="store_true", help="start over instead of from the newest checkpoint")
    parser.add_argument("--eval-only", action="store_true", help="only export the teacher of the newest checkpoint")
    parser.add_argument("--seed", default=0, type=int, metavar="N", help="the same as train.seed=N")
    parser.add_argument("--multi-distillation", action="store_true", help="several students of one teacher")
    parser.add_argument("--profiling", action="store_true", help="record a few steps into DIR/profile")
    parser.add_argument("--benchmark-codebase", action="store_true", help="only time 20 steps on synthetic images")
    parser.add_argument("--dry-run", action="store_true", help="build everything, take one step, write nothing")
    for flag in ("--eval", "--eval_pretrained_weights", "--ref_losses_path"):
        parser.add_argument(flag, default="", type=str, help=argparse.SUPPRESS)
    for flag in ("--test-ibot", "--dump-fsdp-weights", "--record_ref_losses"):
        parser.add_argument(flag, action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "opts", default=None, nargs=argparse.REMAINDER, metavar="key=value", help="options such as optim.epochs=10"
    )
    return parser


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Parse flags and `key=value` options in any order.

    Raises:
        SystemExit: unknown flags or bare words; argparse prints the usage.
    """
    parser = get_args_parser()
    takes_value = {flag for action in parser._actions if action.nargs is None for flag in action.option_strings}
    flags: list[str] = []
    options: list[str] = []
    # Before anything else, because a word after an unknown flag is its value.
    parser.refuse_unknown_flags(argv)
    tokens = iter(argv)
    for token in tokens:
        if token in takes_value:
            flags += [token, *([value] if (value := next(tokens, None)) is not None else [])]
        elif "=" in token and not token.startswith("-"):
            options.append(token)
        elif token.startswith("-"):
            flags.append(token)
        else:
            parser.error(f"{token!r} is neither a flag nor a key=value option")
    args = parser.parse_args(flags)
    args.opts = options
    if any(token == "--seed" or token.startswith("--seed=") for token in flags):
        args.opts.append(f"train.seed={args.seed}")
    return args


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run a training.

    Args:
        argv: the arguments after the program's name. Default: those of the command line.

    Returns:
        The global average of every metric (empty if there was nothing left to do).
    """
    args = parse_args(sys.argv[1:] if argv is None else argv)
    if args.dry_run or args.benchmark_codebase:
        with tempfile.TemporaryDirectory() as scratch:
            args.output_dir = scratch
            return _main(args)
    return _main(args)


def _main(args: argparse.Namespace) -> dict[str, float]:
    output_dir = Path(args.output_dir)
    setup = DinoV3SetupArgs(config_file=args.config_file, output_dir=args.output_dir, opts=args.opts)
    with (
        runtime.preferring(args.device),
        job_context(output_dir=args.output_dir),
        RunLock(output_dir),
        ending_together(output_dir),
        # Without training there is nothing to save, so that a signal may end it at once.
        nullcontext() if args.eval_only or args.dry_run or args.benchmark_codebase else Preemption() as preemption,
    ):
        for flag in RETIRED_FLAGS:
            if getattr(args, flag):
                logger.warning("--%s has no effect and is ignored", flag)
        cfg = setup_multidistillation(setup) if args.multi_distillation else setup_config(setup)
        if cfg.multidistillation.enabled and not args.multi_distillation:
            raise ConfigError("multidistillation.enabled=true: several students are trained with --multi-distillation")
        fix_random_seeds(cfg.train.seed + distributed.get_rank())
        return _run(cfg, args, preemption)


def _run(cfg: Any, args: argparse.Namespace, preemption: Preemption | None) -> dict[str, float]:
    if args.benchmark_codebase:
        return benchmark(cfg, build_model(cfg))
    checkpoint_root = Path(cfg.train.output_dir) / CHECKPOINT_DIRECTORY
    checkpoint_root.mkdir(parents=True, exist_ok=True)
    if distributed.is_subgroup_main_process():
        for directory in (checkpoint_root, *Path(cfg.train.output_dir).glob(f"{EVALUATION_DIRECTORY}/training_*")):
            remove_stale_temporaries(directory)
    distributed.barrier()
    check_dataset(cfg)
    model = build_model(cfg)
    if args.dry_run:
        return dry_run(cfg, model)
    check_disk(model, Path(cfg.train.output_dir))
    if args.no_resume:
        _set_old_run_aside(Path(cfg.train.output_dir))
    if args.eval_only:
        return _export_newest(cfg, model, checkpoint_root)
    with step_profiler(Path(cfg.train.output_dir)) if args.profiling else nullcontext() as profiler:
        return do_train(cfg, model, resume=not args.no_resume, preemption=preemption, profiler=profiler)


def build_model(cfg: Any) -> SSLMetaArch:
    """Build the meta-architecture of `cfg`, sharded and on the runtime device, its weights not yet initialised.

    Raises:
        ValueError: unknown `MODEL.META_ARCHITECTURE`.
    """
    name = cfg.MODEL.META_ARCHITECTURE
    if name not in META_ARCHITECTURES:
        raise ValueError(f"unknown MODEL.META_ARCHITECTURE {name!r}; expected one of {', '.join(META_ARCHITECTURES)}")
    with torch.device("meta"):
        model = META_ARCHITECTURES[name](cfg)
    size = max(resolution.global_size for resolution in crop_resolutions(cfg))
    logger.info("student's backbone: %s", summarize(model.student["backbone"], size, cfg.student.in_chans))
    model.prepare_for_distributed_training()
    return model


def _export_newest(cfg: Any, model: SSLMetaArch, checkpoint_root: Path) -> dict[str, float]:
    directory = latest_valid_checkpoint(checkpoint_root, verify=cfg.checkpointing.verify)
    if directory is None:
        raise FileNotFoundError(f"--eval-only: no checkpoint in {checkpoint_root}; train first")
    model.init_weights()
    trainer = Trainer(cfg, model)
    trainer.export(trainer.load(directory))
    return {}


def _set_old_run_aside(output_dir: Path) -> None:
    # A new run among an old one's files would later resume from, or be taken for, the old one.
    if distributed.is_subgroup_main_process():
        now = time.strftime("%Y%m%d-%H%M%S")
        for name in (CHECKPOINT_DIRECTORY, EVALUATION_DIRECTORY, METRICS_FILE):
            path = output_dir / name
            if path.is_file() or (path.is_dir() and any(path.iterdir())):
                path.rename(output_dir / f"{name}.before-{now}")
                logger.info("--no-resume: the old %s is now %s.before-%s", path, name, now)
        (output_dir / TEACHER_FILE).unlink(missing_ok=True)
        (output_dir / CHECKPOINT_DIRECTORY).mkdir(exist_ok=True)
    distributed.barrier()


if __name__ == "__main__":
    run_command_line(main)
