"""From the command line of a dense task to its configuration, and what every run leaves behind.

python dinov3/eval/depth/run.py config=FILE key=value ... output_dir=DIR
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import torch
from omegaconf import OmegaConf

from dinov3 import distributed
from dinov3.configs import write_config
from dinov3.configs.merging import resolve_config_path
from dinov3.distributed import runtime
from dinov3.eval.command.config import args_dict_to_dataclass, cli_parser
from dinov3.utils import get_sha

logger = logging.getLogger("dinov3")

Config = TypeVar("Config")


def parse_arguments(argv: Sequence[str], config_class: type[Config]) -> Config:
    """The configuration of a run: defaults < the file of `config=` (or `config_file=`) < the other arguments.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, or a missing one; names the key.
        FileNotFoundError: there is no such file.
    """
    settings = cli_parser(argv)
    if file := settings.pop("config", None):
        settings["config_file"] = file
    config, output_dir = args_dict_to_dataclass(settings, config_class, save_config=False)
    config.output_dir = output_dir  # type: ignore[attr-defined]
    return config


def read_config(path: Path, config_class: type[Config]) -> Config:
    """The configuration that a run wrote.

    Raises:
        ConfigError, FileNotFoundError: as of `parse_arguments`.
    """
    return args_dict_to_dataclass({"config_file": str(resolve_config_path(path))}, config_class, save_config=False)[0]


def save_config(config: Any, name: str) -> None:
    """Write the resolved configuration to `<output_dir>/<name>`; the main process does it."""
    write_config(OmegaConf.structured(config), config.output_dir, name)


def provenance(
    config: Any, model: str, datasets: Mapping[str, Any], dtype: torch.dtype, seconds: float
) -> dict[str, Any]:
    """What a results file says about where its figures come from."""
    return {
        "config": plain(asdict(config)),
        "model": model,
        "datasets": dict(datasets),
        "processes": distributed.get_world_size(),
        "device": str(runtime.device()),
        "autocast_dtype": str(dtype),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "code": get_sha()},
        "seconds": round(seconds, 2),
    }


def training_settings(config: Any, *, ignored: Sequence[str]) -> dict[str, Any]:
    """The settings that a training depends on, by dotted key, and the images per step of all processes.

    Args:
        config: of the run.
        ignored: keys and sections that change nothing about it.
    """
    flat = {name: value for name, value in _flatten(plain(asdict(config))) if not _is_below(name, ignored)}
    return {**flat, "bs x processes": config.bs * distributed.get_world_size()}


def plain(value: Any) -> Any:
    """Nested values with enumerations by name, and all sequences lists."""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Mapping):
        return {key.name if isinstance(key, Enum) else key: plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def _flatten(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, entry in value.items():
        rows += _flatten(entry, f"{prefix}{key}.") if isinstance(entry, Mapping) else [(f"{prefix}{key}", entry)]
    return rows


def _is_below(name: str, sections: Sequence[str]) -> bool:
    return any(name == section or name.startswith(section + ".") for section in sections)
