"""Settings declared as dataclasses: each field carries its default and its meaning, for training and evaluations alike.

Notable: unknown keys are found before anything is merged, in files too; members of enumerations may be given by name or
by value; help texts are made of the dataclass, so that a key is described once, where its default is.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import typing
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from types import NoneType, UnionType
from typing import Any

from omegaconf import MISSING

from dinov3.configs.schema import ConfigError


def key(default: Any, description: str) -> Any:
    """A dataclass field with a default (lists are copied) and the description that `--help` shows."""
    metadata = {"help": description}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


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


def check_settings(settings: Any, config_dataclass: type[Any], origin: str) -> dict[str, Any]:
    """Return the nested settings with enumeration members by name; `ConfigError` for a key that does not exist."""
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


def ask_for(config_dataclass: type[Any], missing: Sequence[str]) -> str:
    """Ask for missing settings, each with its meaning."""
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
