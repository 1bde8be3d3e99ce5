"""From a command line to the configuration dataclass of an evaluation."""

from __future__ import annotations

import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dinov3.configs import ConfigError, resolve_config_path, write_config
from dinov3.configs.merging import load_yaml, parse_options
from dinov3.configs.settings import ask_for, check_settings
from dinov3.utils.command_line import suggest_flag

Config = TypeVar("Config")

IMPLIED_OUTPUT_DIR = "."
NO_CACHE_FLAG = "--no-cache"


def cli_parser(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse `key=value` tokens, whose values are YAML, into nested dictionaries.

    Args:
        argv: the arguments after the program's name. Default: those of the command line. The output directory may be
            given as `output_dir=DIR`, `--output-dir=DIR` or `--output-dir DIR`; the last one wins. `--no-cache` stands
            for `features.cache=false`.

    Returns:
        The settings by section, and `output_dir` ("." if it is not given).

    Raises:
        ConfigError: another flag, a bare word, or a value that is not YAML.
    """
    output_dir = ""
    options = []
    tokens = iter(sys.argv[1:] if argv is None else argv)
    for token in tokens:
        name, equals, value = token.partition("=")
        if name == "--output-dir" and not equals:
            value = next(tokens, "")
            if not value:
                raise ConfigError("--output-dir: expected a directory after it")
        if name in ("output_dir", "--output-dir"):
            output_dir = value
        elif token == NO_CACHE_FLAG:
            options.append("features.cache=false")
        elif token.startswith("-"):
            key = name.lstrip("-").replace("-", "_")
            hint = suggest_flag(token, ()) or f": settings are given as key=value, here {key}={value or '...'}"
            raise ConfigError(f"unknown flag {token!r}{hint}; --help lists the keys")
        else:
            options.append(token)
    settings = OmegaConf.merge(*(layer.config for layer in parse_options(options)), {})
    return {
        **typing.cast(dict[str, Any], OmegaConf.to_container(settings)),
        "output_dir": output_dir or IMPLIED_OUTPUT_DIR,
    }


def args_dict_to_dataclass(
    eval_args: Mapping[str, Any], config_dataclass: type[Config], save_config: bool = True
) -> tuple[Config, str]:
    """Build the configuration of an evaluation: defaults < the file that `config_file` names < the other arguments.

    Args:
        eval_args: nested settings, as returned by `cli_parser`. An `output_dir` of "." gives way to that of the file.
        config_dataclass: the dataclass of the settings.
        save_config: let the main process write `<output_dir>/eval_config.yaml`.

    Returns:
        The configuration and its output directory.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, or a missing one; names the key.
        FileNotFoundError: the file does not exist.
        ValueError: values that contradict each other.
    """
    settings = dict(eval_args)
    layers = []
    if file := settings.pop("config_file", None):
        path = resolve_config_path(file)
        layers.append(check_settings(OmegaConf.to_container(load_yaml(path)), config_dataclass, f"in {path}"))
        if layers[0].get("output_dir") and settings.get("output_dir") == IMPLIED_OUTPUT_DIR:
            del settings["output_dir"]
    layers.append(check_settings(settings, config_dataclass, "among the arguments"))
    try:
        cfg = OmegaConf.merge(OmegaConf.structured(config_dataclass), *layers)
        missing = sorted(OmegaConf.missing_keys(cfg))
        if missing:
            raise ConfigError(f"missing: {', '.join(missing)}. " + ask_for(config_dataclass, missing))
        config = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    output_dir = config.output_dir  # type: ignore[union-attr]
    if save_config:
        write_config(cfg, output_dir, "eval_config.yaml")
    return typing.cast(Config, config), output_dir


def parse_arguments(argv: Sequence[str], config_class: type[Config]) -> Config:
    """Read the settings of a command: defaults < the file of `config=` (or `config_file=`) < the other arguments.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, or a missing one; names the key.
        FileNotFoundError: the file does not exist.
    """
    settings = cli_parser(argv)
    if file := settings.pop("config", None):
        settings["config_file"] = file
    return args_dict_to_dataclass(settings, config_class, save_config=False)[0]


def read_config(path: Path, config_class: type[Config]) -> Config:
    """Read the settings that a run wrote; raises as `parse_arguments` does."""
    return args_dict_to_dataclass({"config_file": str(resolve_config_path(path))}, config_class, save_config=False)[0]
