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
from dinov3.configs.merging import get_cfg_from_args
from dinov3.configs.scaling import apply_scaling_rules_to_cfg
from dinov3.configs.validation import find_notes, validate
from dinov3.logging import cleanup_logging, setup_logging
from dinov3.utils import fix_random_seeds, get_conda_env, get_sha

logger = logging.getLogger("dinov3")

_made_process_group = False


def setup_config(args: Any, strict_cfg: bool = True) -> DictConfig:
    """The configuration of a run: merged, checked, written to the output directory, and scaled to the batch.

    `config.yaml` holds the settings before the learning rate is scaled, so that it can be given to another run.

    Args:
        args: a `DinoV3SetupArgs`, or anything with its attributes `config_file`, `opts` and `output_dir`.
        strict_cfg: unknown keys are errors instead of warnings.

    Raises:
        FileNotFoundError: the recipe file is not there.
        ConfigError: the configuration cannot be trained; names every problem.
        RuntimeError: the output directory cannot be written.
    """
    return check_and_write(get_cfg_from_args(args, strict=strict_cfg))


def check_and_write(cfg: DictConfig) -> DictConfig:
    """What `setup_config` does with a merged configuration."""
    validate(cfg)
    for note in find_notes(cfg):
        logger.warning("%s", note)
    logger.info("configuration:\n%s", OmegaConf.to_yaml(cfg))
    write_config(cfg, cfg.train.output_dir)
    apply_scaling_rules_to_cfg(cfg)
    return cfg


def write_config(cfg: Any, output_dir: str | os.PathLike[str], name: str = "config.yaml") -> str:
    """Write a configuration to `<output_dir>/<name>`, completely or not at all.

    The main process of the subgroup does it; the others only learn the path.

    Returns:
        The path, in every process.

    Raises:
        RuntimeError: the directory cannot be made or written.
    """
    path = Path(output_dir) / name
    if distributed.is_subgroup_main_process():
        directory = make_output_dir(output_dir)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=directory)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(OmegaConf.to_yaml(cfg))
                file.flush()
                os.fsync(file.fileno())
            # mkstemp makes files that only their owner may read.
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except OSError as error:
            Path(temporary).unlink(missing_ok=True)
            raise RuntimeError(f"cannot write {path}: {error.strerror}") from error
    return str(path)


def make_output_dir(output_dir: str | os.PathLike[str]) -> Path:
    """Create a directory, and prove that files can be written into it.

    Returns:
        Its real path.

    Raises:
        RuntimeError: it cannot be created, is no directory, or cannot be written.
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
        output_dir: created if needed, and the log goes into it; None: the log goes to standard output only.
        distributed_enabled: join the job's process group (a group of one without a launcher), unless there is one.
        logging_enabled: set up the log (INFO and above).
        seed: process r seeds its random generators with `seed + r`; None leaves them alone.
        restrict_print_to_main_process: silence `print` in the other processes.
        distributed_timeout: of collectives; None: the backend's own.

    Raises:
        RuntimeError: the output directory cannot be written, or the process group cannot be made.
    """
    global _made_process_group
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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
