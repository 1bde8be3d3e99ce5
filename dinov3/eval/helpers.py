"""From a command line to the configuration dataclass of an evaluation, and from its results to files.

Notable: unknown keys are found before anything is merged, in files too; members of enumerations may be given by name or
by value; the help text is made of the dataclass, so that a key is described once, where its default is.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dinov3 import distributed
from dinov3.configs import ConfigError, resolve_config_path, write_config
from dinov3.configs.merging import load_yaml, parse_options
from dinov3.eval import results as results_files

Config = TypeVar("Config")

IMPLIED_OUTPUT_DIR = "."
NO_CACHE_FLAG = "--no-cache"


def key(default: Any, description: str) -> Any:
    """A dataclass field with a default (lists are copied) and the description that `--help` shows."""
    metadata = {"help": description}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def cli_parser(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse `key=value` tokens, whose values are YAML, into nested dictionaries.

    Args:
        argv: the arguments after the program's name; None takes them from the command line. The output directory may
            be given as `output_dir=DIR`, `--output-dir=DIR` or `--output-dir DIR`; the last one wins. `--no-cache`
            stands for `features.cache=false`.

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
            raise ConfigError(f"unknown flag {token!r}: settings are given as key=value; --help lists the keys")
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
    """The configuration of an evaluation: defaults < the file that `config_file` names < the other arguments.

    Args:
        eval_args: nested settings, as of `cli_parser`. An `output_dir` of "." gives way to that of the file.
        config_dataclass: the configuration's dataclass.
        save_config: write `<output_dir>/eval_config.yaml`; the main process does it.

    Returns:
        The configuration and its output directory.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, or a missing one; names the key.
        FileNotFoundError: there is no such file.
        ValueError: values that contradict each other.
    """
    settings = dict(eval_args)
    layers = []
    if file := settings.pop("config_file", None):
        path = resolve_config_path(file)
        layers.append(_checked(OmegaConf.to_container(load_yaml(path)), config_dataclass, f"in {path}"))
        if layers[0].get("output_dir") and settings.get("output_dir") == IMPLIED_OUTPUT_DIR:
            del settings["output_dir"]
    layers.append(_checked(settings, config_dataclass, "among the arguments"))
    try:
        cfg = OmegaConf.merge(OmegaConf.structured(config_dataclass), *layers)
        missing = sorted(OmegaConf.missing_keys(cfg))
        if missing:
            raise ConfigError(f"missing: {', '.join(missing)}. " + _advice(config_dataclass, missing))
        config = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    output_dir = config.output_dir  # type: ignore[union-attr]
    if save_config:
        write_config(cfg, output_dir, "eval_config.yaml")
    return typing.cast(Config, config), output_dir


def write_results(
    results: Mapping[str, Any],
    output_dir: str | os.PathLike[str],
    filename: str,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write a table of results, and where it comes from; the main process does it.

    Args:
        results: one row, by column.
        output_dir: created if needed.
        filename: its ending is one of `results.FileFormat`.
        provenance: what goes, with the results, into `<stem of filename>.json`.
    """
    if not distributed.is_main_process():
        return
    path = Path(output_dir) / filename
    path.parent.mkdir(parents=True, exist_ok=True)
    results_files.save_from_dict(results, path)
    if provenance is not None:
        content = json.dumps({"results": results_files.without_nan(results), **provenance}, indent=2, default=str)
        results_files.write_atomically(path.with_suffix(".json"), content + "\n")


def format_keys(config_dataclass: type[Any]) -> str:
    """The keys of a configuration with their defaults and descriptions, one per line."""
    rows = [
        (name, _default_text(entry), entry.metadata.get("help", "")) for name, entry, _ in _leaves(config_dataclass)
    ]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"  {name:<{widths[0]}}  {default:<{widths[1]}}  {text}".rstrip() for name, default, text in rows)


def _leaves(config_dataclass: type[Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    # (dotted key, dataclass field, type) of every key.
    for name, entry, value_type in _entries(config_dataclass):
        if dataclasses.is_dataclass(value_type):
            yield from _leaves(typing.cast(type[Any], value_type), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", entry, value_type


def _sections(config_dataclass: type[Any], prefix: str = "") -> Iterator[str]:
    # The dotted names of sections, which a file may leave empty (`model: null`).
    for name, _, value_type in _entries(config_dataclass):
        if dataclasses.is_dataclass(value_type):
            yield f"{prefix}{name}"
            yield from _sections(typing.cast(type[Any], value_type), f"{prefix}{name}.")


def _entries(config_dataclass: type[Any]) -> Iterator[tuple[str, Any, Any]]:
    # (name, dataclass field, type without `| None`) of each field.
    types = typing.get_type_hints(config_dataclass)
    for entry in dataclasses.fields(config_dataclass):
        value_type = types[entry.name]
        if isinstance(value_type, UnionType) and len(typing.get_args(value_type)) == 2:
            value_type = next((one for one in typing.get_args(value_type) if one is not NoneType), value_type)
        yield entry.name, entry, value_type


def _checked(settings: Any, config_dataclass: type[Any], origin: str) -> dict[str, Any]:
    # The nested settings, with members of enumerations by name; refuses keys that are not there.
    known = {name: value_type for name, _, value_type in _leaves(config_dataclass)}
    sections = set(_sections(config_dataclass))
    checked: dict[str, Any] = {}
    for name, value in _flatten(settings, known):
        if name in sections and value is None:
            continue
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
            raise ConfigError(f"unknown key {name} {origin}; did you mean {nearest}? --help lists the keys")
        section = checked
        *parents, leaf = name.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
        section[leaf] = _enum_name(name, value, known[name])
    return checked


def _flatten(settings: Mapping[str, Any], known: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping) and f"{prefix}{name}" not in known:
            yield from _flatten(value, known, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _enum_name(name: str, value: Any, value_type: Any) -> Any:
    if typing.get_origin(value_type) is list and isinstance(value, list):
        return [_enum_name(name, entry, typing.get_args(value_type)[0]) for entry in value]
    if (
        not (isinstance(value_type, type) and issubclass(value_type, Enum) and isinstance(value, str))
        or value == MISSING
    ):
        return value
    for member in value_type:
        if value in (member.name, member.value):
            return member.name
    raise ConfigError(f"{name}={value}: expected one of {', '.join(member.name for member in value_type)}")


def _advice(config_dataclass: type[Any], missing: Sequence[str]) -> str:
    texts = {entry.name: entry.metadata.get("help", "") for entry in dataclasses.fields(config_dataclass)}
    texts |= {name: entry.metadata.get("help", "") for name, entry, _ in _leaves(config_dataclass)}
    return "Give " + ", ".join(f"{name}=... ({texts[name]})" for name in missing)


def _default_text(entry: Any) -> str:
    default = entry.default_factory() if entry.default is dataclasses.MISSING else entry.default
    if default == MISSING:
        return "needed"
    if isinstance(default, Enum):
        return default.name
    return "null" if default is None else json.dumps(default) if isinstance(default, bool | list) else str(default)
