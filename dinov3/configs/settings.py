"""How settings are declared: dataclasses whose fields carry default, meaning, choices and range.

Training (`training_config.py`) and every evaluation declare theirs with `key`, so a setting is described once, where
its default is: help texts, checks and suggestions for misspelt keys all come from there.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import operator
import types
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any

from omegaconf import MISSING

from dinov3.utils.messages import did_you_mean, list_names

#: A dataclass; not `type[Any]`, which the type checker takes for unhashable, but the functions below are cached.
DataclassType = Any

#: The default of a key that a configuration may have, but that is absent unless somebody gives it.
UNSET: Any = type("Unset", (), {"__repr__": lambda _: "UNSET"})()

_LIMITS = {
    "at least": operator.ge,
    "more than": operator.gt,
    "at most": operator.le,
    "less than": operator.lt,
}
_TYPE_NAMES = {
    bool: "true or false",
    int: "integer",
    float: "number",
    str: "text",
    list: "list",
    types.NoneType: "null",
}


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says which key or token, what was expected and what to do."""


def key(
    default: Any,
    meaning: str,
    *,
    choices: Sequence[Any] = (),
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    length: int | None = None,
    unused: bool = False,
) -> Any:
    """Declare a setting as a field of a dataclass.

    Args:
        default: `omegaconf.MISSING` for a key that must be given, `UNSET` for one that may be absent.
        meaning: shown by `--help`, which adds choices and range.
        choices: the only values allowed.
        minimum, above, maximum, below: range of a number, or of each number of a list; "above" and "below" exclude the
            bound itself.
        length: the number of entries of a list.
        unused: accepted so that published files load, but nothing reads it.
    """
    bounds = dict(zip(_LIMITS, (minimum, above, maximum, below), strict=True))
    metadata = {
        "help": meaning,
        "choices": tuple(choices),
        "limits": {words: bound for words, bound in bounds.items() if bound is not None},
        "length": length,
        "unused": unused,
    }
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Setting:
    """A declared key.

    Attributes:
        name: dotted, e.g. `optim.lr`.
        type: its annotation.
        default: may be `UNSET` or `omegaconf.MISSING`.
        help: its meaning.
        choices, limits, length, unused: see `key`; limits by their words, e.g. {"at least": 1}.
    """

    name: str
    type: Any
    default: Any
    help: str = ""
    choices: tuple[Any, ...] = ()
    limits: Mapping[str, float] = dataclasses.field(default_factory=dict)
    length: int | None = None
    unused: bool = False

    @property
    def description(self) -> str:
        """The meaning, with choices before and range after it."""
        choices = ", ".join(as_text(choice) for choice in self.choices)
        return f"{choices}: " * bool(choices) + self.help + f"; {self._range}" * bool(self.limits)

    @property
    def default_text(self) -> str:
        """The default, as a configuration file would spell it."""
        if self.default is UNSET:
            return "unset"
        if self.default == MISSING:
            return "needed"
        if isinstance(self.default, bool | list):
            return json.dumps(self.default)
        return self.default.name if isinstance(self.default, Enum) else as_text(self.default)

    def value_problem(self, value: Any) -> str | None:
        """Return what is wrong with the type of a value or with a choice, or None."""
        given = f"{self.name}={as_text(value)}"
        if self.choices:
            # `1 == True`, but 1 is not a choice where True is one.
            if any(type(value) is type(choice) and value == choice for choice in self.choices):
                return None
            names = [as_text(choice) for choice in self.choices]
            expected = f"one of {', '.join(names)}" if len(names) > 1 else names[0]
            return f"{given}: expected {expected}{did_you_mean(str(value), names)}"
        if isinstance(value, float) and not math.isfinite(value):
            return f"{given}: expected a finite number"
        if _fits(value, self.type):
            return None
        expected = _type_name(self.type)
        hint = ""
        if isinstance(value, str) and ("number" in expected or "integer" in expected):
            hint = " (this is text)"
        elif "text" in expected:
            hint = f" (quote it: {str(value)!r})"
        return f"{given}: expected {expected}{hint}"

    def range_problem(self, value: Any) -> str | None:
        """Return what is wrong with the size of a value of the right type, or None; null is always fine."""
        entries = value if isinstance(value, list) else [value]
        if self.length is not None and len(entries) != self.length:
            return f"{self.name}={as_text(value)}: must have {self.length} entries"
        for words, bound in self.limits.items():
            if not all(entry is None or _LIMITS[words](entry, bound) for entry in entries):
                return f"{self.name}={as_text(value)}: must be {self._range}"
        return None

    @property
    def _range(self) -> str:
        return " and ".join(f"{words} {bound:g}" for words, bound in self.limits.items())


@functools.cache
def settings_of(config_class: DataclassType, prefix: str = "") -> dict[str, Setting]:
    """Return every setting of a configuration by its dotted name, in the order of declaration.

    A section that may be null, e.g. `schedules: Schedules | None`, is a setting itself, and so are its members.
    """
    settings: dict[str, Setting] = {}
    for field, hint, section in _fields(config_class):
        name = f"{prefix}{field.name}"
        if section is not hint:
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            settings[name] = Setting(name, hint, default, **field.metadata)
        if section is not None:
            settings |= settings_of(section, f"{name}.")
    return settings


@functools.cache
def sections_of(config_class: DataclassType, prefix: str = "") -> dict[str, str]:
    """Return the meaning of every key that holds other keys, by its dotted name."""
    sections: dict[str, str] = {}
    for field, _, section in _fields(config_class):
        if section is not None:
            name = f"{prefix}{field.name}"
            sections |= {name: field.metadata.get("help", "")} | sections_of(section, f"{name}.")
    return sections


def _fields(config_class: DataclassType) -> Iterator[tuple[dataclasses.Field[Any], Any, Any]]:
    # (field, its type, the dataclass of the section that it holds or may hold).
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        alternatives = _alternatives(hints[field.name])
        section = next((one for one in alternatives if dataclasses.is_dataclass(one)), None)
        yield field, hints[field.name], section


def is_empty_section(config_class: DataclassType, name: str, value: Any) -> bool:
    """Return whether a file opens the section `name` but leaves it empty, which changes nothing."""
    is_section = name in sections_of(config_class) and name not in settings_of(config_class)
    return is_section and (value is None or value == {})


def structure_problem(config_class: DataclassType, name: str, value: Any) -> str | None:
    """Return a sentence if a section is used as a value, or a value as a section."""
    settings, sections = settings_of(config_class), sections_of(config_class)
    if name in settings:
        if isinstance(value, Mapping) and name not in sections and not _fits(value, settings[name].type):
            return f"{name!r} is a single value and holds no other keys"
    elif name in sections and not is_empty_section(config_class, name, value):
        members = {setting[len(name) + 1 :]: None for setting in settings if setting.startswith(f"{name}.")}
        return f"{name!r} is a section, not a value: it holds {list_names(members)}"
    return None


def key_problem(config_class: DataclassType, name: str, value: Any) -> str | None:
    """Return what is wrong with a dotted key, given its value as `flatten` yields it; None if it is fine."""
    settings = settings_of(config_class)
    if problem := structure_problem(config_class, name, value):
        return problem
    if name in settings or name in sections_of(config_class):
        return None
    # People forget or mix up sections more often than they misspell: `lr` is `optim.lr`.
    same_leaf = [known for known in settings if known.rpartition(".")[2] == name.rpartition(".")[2]]
    hint = did_you_mean(name, same_leaf or settings)
    if same_leaf and not hint:
        hint = f" (did you mean {' or '.join(map(repr, same_leaf[:3]))}?)"
    return f"unknown key {name!r}{hint}"


def flatten(values: Mapping[str, Any], prefix: str = "", whole: Collection[str] = ()) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested mappings as (dotted key, value).

    Lists and empty mappings are leaves, and so are the keys in `whole`.
    """
    for name, value in values.items():
        if isinstance(value, Mapping) and value and f"{prefix}{name}" not in whole:
            yield from flatten(value, f"{prefix}{name}.", whole)
        else:
            yield f"{prefix}{name}", value


def leaves_of(config_class: DataclassType, values: Any) -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of nested settings; a mapping given for a single value is not taken apart."""
    yield from flatten(values or {}, whole=settings_of(config_class).keys() - sections_of(config_class).keys())


def check_settings(settings: Any, config_class: DataclassType, origin: str) -> dict[str, Any]:
    """Return the nested settings of an evaluation, members of enumerations by name.

    Args:
        settings: nested mappings; members of enumerations by name or by value.
        config_class: the dataclass that declares them.
        origin: where they come from, for the error, e.g. "in FILE".

    Raises:
        ConfigError: an unknown key, or no member of an enumeration.
    """
    known = settings_of(config_class)
    checked: dict[str, Any] = {}
    for name, value in leaves_of(config_class, settings):
        if problem := key_problem(config_class, name, value):
            raise ConfigError(f"{problem} {origin}; --help lists the keys")
        if value is None and name in sections_of(config_class) or is_empty_section(config_class, name, value):
            continue
        section = checked
        *parents, leaf = name.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
        section[leaf] = _enum_name(name, value, known[name].type)
    return checked


def _enum_name(name: str, value: Any, value_type: Any) -> Any:
    for one in _alternatives(value_type):
        if typing.get_origin(one) is list and isinstance(value, list):
            return [_enum_name(name, entry, typing.get_args(one)[0]) for entry in value]
        if isinstance(one, type) and issubclass(one, Enum) and isinstance(value, str) and value != MISSING:
            for member in one:
                if value in (member.name, member.value):
                    return member.name
            raise ConfigError(f"{name}={value}: expected one of {', '.join(member.name for member in one)}")
    return value


def ask_for(config_class: DataclassType, missing: Sequence[str]) -> str:
    """Ask for missing settings, each with its meaning."""
    meanings = sections_of(config_class) | {
        name: setting.description for name, setting in settings_of(config_class).items()
    }
    return "Give " + ", ".join(f"{name}=... ({meanings[name]})" for name in missing)


def format_keys(config_class: DataclassType) -> str:
    """Return a table of all keys with their defaults and meanings, one line each, for `--help`."""
    rows = [
        (name, setting.default_text, setting.description)
        for name, setting in settings_of(config_class).items()
        if setting.help or name not in sections_of(config_class)
    ]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"  {name:<{widths[0]}}  {default:<{widths[1]}}  {text}".rstrip() for name, default, text in rows)


def as_list(value: Any) -> list[Any]:
    """Return a scalar as a list of one, anything else as a list."""
    return [value] if isinstance(value, int | float) or value is None else list(value)


def as_text(value: Any) -> str:
    """Return a value as a configuration file or a `key=value` option would spell it."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(as_text(entry) for entry in value)}]"
    return str(value) if value != "" else "''"


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def _type_name(hint: Any) -> str:
    names = []
    for one in _alternatives(hint):
        entry = next(iter(typing.get_args(one)), Any)
        names.append(_TYPE_NAMES.get(typing.get_origin(one) or one, "section"))
        if entry is not Any:
            names[-1] += f" of {_type_name(entry)}s"
    return " or ".join(names)


def _fits(value: Any, hint: Any) -> bool:
    alternatives = _alternatives(hint)
    if len(alternatives) > 1:
        return any(_fits(value, one) for one in alternatives)
    kind = typing.get_origin(hint) or hint
    if kind is list and isinstance(value, list):
        entry = next(iter(typing.get_args(hint)), Any)
        return entry is Any or (len(value) > 0 and all(_fits(one, entry) for one in value))
    if dataclasses.is_dataclass(kind):
        return bool(value == {})
    if kind is int or kind is float:
        # True is an int of Python's, but not of a configuration; whole numbers are given for numbers.
        return type(value) is int or (kind is float and isinstance(value, float) and math.isfinite(value))
    return kind is Any or isinstance(value, kind)
