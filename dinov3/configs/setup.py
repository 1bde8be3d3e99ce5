"""What happens before the first line of a job: its directory, its configuration, log, processes and seeds."""

from __future__ import annotations

import datetime
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dinov3 import distributed
from dinov3.configs.merging import Layer, get_cfg_from_args, get_default_config, joined, layers_of, merge_layers
from dinov3.configs.multidistillation import disagreements, merge_student, merge_students, shared_problems
from dinov3.configs.notes import find_notes
from dinov3.configs.scaling import apply_scaling_rules_to_cfg
from dinov3.configs.settings import ConfigError
from dinov3.configs.validation import validate
from dinov3.logging import cleanup_logging, setup_logging
from dinov3.utils import fix_random_seeds, get_conda_env, get_sha
from dinov3.utils.files import atomic_write
from dinov3.utils.memory import keep_freed_memory

logger = logging.getLogger("dinov3")

_made_process_group = False


def setup_config(args: Any, strict_cfg: bool = True) -> DictConfig:
    """Merge the configuration of a run, check it, write it to the output directory, and scale it to the batch.

    `config.yaml` holds the settings before the learning rate is scaled, so that it can be given to another run.

    Args:
        args: a `DinoV3SetupArgs`, or anything with its attributes `config_file`, `opts` and `output_dir`.
        strict_cfg: unknown keys are errors instead of warnings.

    Raises:
        FileNotFoundError: the recipe file is not there.
        ConfigError: the configuration cannot be trained; names every problem.
        RuntimeError: the output directory cannot be written.
    """
    return _check_and_write(get_cfg_from_args(args, strict=strict_cfg))


def setup_multidistillation(args: Any, strict_cfg: bool = True) -> DictConfig:
    """Divide the processes among the students, and set up the student of this process.

    Its log, configuration and results go to `<output directory>/<name of the student>`. The process is seeded with
    `train.seed` plus its rank.

    Args:
        args: a `DinoV3SetupArgs` whose file has the sections `multidistillation` and `distillation`, and an output
            directory.
        strict_cfg: unknown keys are errors instead of warnings.

    Returns:
        The configuration of this process's student, its learning rate scaled.

    Raises:
        FileNotFoundError: the shared file or a student's is not there.
        ConfigError: the file describes no students, they need another number of processes, or a student's configuration
            cannot be trained.
        RuntimeError: the output directory cannot be written.
    """
    layers = layers_of(args)
    shared = merge_layers(get_default_config(), layers, strict=strict_cfg)
    section, world_size = shared.multidistillation, distributed.get_world_size()
    if not section.enabled:
        raise ConfigError("--multi-distillation needs a configuration with multidistillation.enabled=true")
    if problems := shared_problems(shared, world_size):
        raise ConfigError(joined(problems))
    n_needed = section.students[-1].ranks_range[1]
    if n_needed != world_size:
        raise ConfigError(
            f"multidistillation.students: their ranks_range name {n_needed} processes, but this job has {world_size}: "
            f"start it with {n_needed}, or change the ranges"
        )
    if problems := [*disagreements(merge_students(shared, layers, strict=strict_cfg))]:
        raise ConfigError(joined(problems))
    distributed.new_subgroups([range(*student.ranks_range) for student in section.students])
    rank = distributed.get_rank()
    student = next(student for student in section.students if rank in range(*student.ranks_range))

    output_dir = str(Path(shared.train.output_dir) / student.name)
    batch_size = section.global_batch_size // world_size
    follows = OmegaConf.create({"train": {"output_dir": output_dir, "batch_size_per_gpu": batch_size}})
    cfg = merge_student(student, [*layers, Layer("the students", follows)], strict=strict_cfg)
    cleanup_logging()
    setup_logging(output=output_dir, level=logging.INFO)
    fix_random_seeds(cfg.train.seed + rank)
    first, end = student.ranks_range
    logger.info("student %s: processes %d to %d, %s", student.name, first, end - 1, output_dir)
    return _check_and_write(cfg)


def _check_and_write(cfg: DictConfig) -> DictConfig:
    validate(cfg)
    for note in find_notes(cfg):
        logger.warning("%s", note)
    logger.info("configuration:\n%s", OmegaConf.to_yaml(cfg))
    write_config(cfg, cfg.train.output_dir)
    apply_scaling_rules_to_cfg(cfg)
    return cfg


def write_config(cfg: Any, output_dir: str | os.PathLike[str], name: str = "config.yaml") -> str:
    """Write a configuration to `<output_dir>/<name>`, completely or not at all.

    Only the main process of the subgroup writes.

    Returns:
        The path, in every process.

    Raises:
        RuntimeError: the directory cannot be made or written.
    """
    path = Path(output_dir) / name
    if distributed.is_subgroup_main_process():
        make_output_dir(output_dir)
        try:
            with atomic_write(path, "w") as file:
                file.write(OmegaConf.to_yaml(cfg))
        except OSError as error:
            raise RuntimeError(f"cannot write {path}: {error.strerror}") from error
    return str(path)


def make_output_dir(output_dir: str | os.PathLike[str]) -> Path:
    """Create a directory, and prove that files can be written into it.

    Returns:
        Its real path.

    Raises:
        RuntimeError: it cannot be created, is not a directory, or cannot be written.
    """
    directory = Path(os.path.realpath(os.path.expanduser(output_dir)))
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise RuntimeError(f"output directory {directory} is a file: give another") from None
    except OSError as error:
        raise RuntimeError(f"output directory {directory} cannot be made ({error.strerror}): give another") from error
    try:
        with tempfile.TemporaryFile(dir=directory) as probe:
            probe.write(b"\0")
    except OSError as error:
        raise RuntimeError(
            f"output directory {directory} cannot be written ({error.strerror}): give another"
        ) from error
    return directory


def setup_job(
    output_dir: str | os.PathLike[str] | None = None,
    distributed_enabled: bool = True,
    logging_enabled: bool = True,
    seed: int | None = 0,
    restrict_print_to_main_process: bool = True,
    distributed_timeout: datetime.timedelta | None = None,
) -> None:
    """Prepare a process: output directory, process group, log, seeds. `exit_job` undoes it.

    Args:
        output_dir: created if needed, and the log goes into it. Default: the log goes only to standard output.
        distributed_enabled: join the job's process group (a group of one without a launcher), unless there is one.
        logging_enabled: set up the log (INFO and above).
        seed: process r seeds its random generators with `seed + r`; None leaves them as they are.
        restrict_print_to_main_process: silence `print` in the other processes.
        distributed_timeout: limit for collectives. Default: the backend's own.

    Raises:
        RuntimeError: the output directory cannot be written, or the process group cannot be made.
    """
    global _made_process_group
    keep_freed_memory()  # also in jobs that no command line of ours started
    directory = None if output_dir is None else make_output_dir(output_dir)
    # Before the log, whose file name and handlers depend on the rank.
    if distributed_enabled and not distributed.is_enabled():
        _made_process_group = True
        distributed.enable(
            overwrite=True,
            nccl_async_error_handling=True,
            restrict_print_to_main_process=restrict_print_to_main_process,
            timeout=distributed_timeout,
        )
    if logging_enabled:
        setup_logging(output=None if directory is None else str(directory), level=logging.INFO)
    rank = distributed.get_rank()
    if seed is not None:
        fix_random_seeds(seed + rank)
    logger.info(
        "rank %d of %d, seed %s", rank, distributed.get_world_size(), "as it was" if seed is None else seed + rank
    )
    logger.info("git: %s", get_sha())
    conda_name, conda_prefix = get_conda_env()
    if conda_name:
        logger.info("conda environment: %s (%s)", conda_name, conda_prefix)
    logger.info("sys.path: %s", sys.path)


def exit_job(distributed_enabled: bool = True, logging_enabled: bool = True) -> None:
    """Undo `setup_job`: leave the process group if `setup_job` made it, close the log."""
    global _made_process_group
    if distributed_enabled and _made_process_group and distributed.is_enabled():
        distributed.disable()
    _made_process_group = False
    if logging_enabled:
        cleanup_logging()
