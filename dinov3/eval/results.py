"""Result tables as files: CSV, JSON lines and YAML, with the standard library and PyYAML.

A column holds `Int64` (integers, and floats that are all whole), `Float64` or `string`; booleans become strings, and
NaN and None are missing values, empty in CSV. Files are written under a temporary name and renamed.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

MAX_NAME_LENGTH = 150


class FileFormat(Enum):
    """The file formats, by their file name ending."""

    CSV = ".csv"
    JSONL = ".jsonl"
    YAML = ".yaml"


@dataclass(frozen=True)
class Table:
    """A table of results.

    Args:
        columns: values by column name, all of the same length; integers, floats or strings, None where missing.
    """

    columns: dict[str, list[Any]]

    @property
    def dtypes(self) -> dict[str, str]:
        """`Int64`, `Float64` or `string`, by column name."""
        return {name: _dtype(values) for name, values in self.columns.items()}

    def rows(self) -> list[dict[str, Any]]:
        """The rows, as dictionaries."""
        return [dict(zip(self.columns, row, strict=True)) for row in zip(*self.columns.values(), strict=True)]


def make(results: Mapping[str, Any]) -> Table:
    """A table of one row, or of one row per element if all values are sequences (of equal length)."""
    values = list(results.values())
    if values and all(isinstance(value, Sequence) and not isinstance(value, str) for value in values):
        return Table({name: _column(list(value)) for name, value in results.items()})
    return Table({name: _column([value]) for name, value in results.items()})


def save(results: Table, path: str | os.PathLike[str] | io.TextIOBase, file_format: FileFormat | None = None) -> None:
    """Write a table.

    Args:
        results: the table.
        path: a file name, whose ending gives the format, or an open text file.
        file_format: the format; necessary for open files.

    Raises:
        ValueError: no format is given, and the ending is not one of `FileFormat`.
    """
    text = _WRITERS[file_format or _format_of(path)](results)
    if isinstance(path, io.TextIOBase):
        path.write(text)
    else:
        write_atomically(path, text)


def save_from_dict(
    results: Mapping[str, Any], path: str | os.PathLike[str] | io.TextIOBase, file_format: FileFormat | None = None
) -> None:
    """`save(make(results), path, file_format)`."""
    save(make(results), path, file_format)


def load(path: str | os.PathLike[str] | io.TextIOBase, file_format: FileFormat | None = None) -> Table:
    """Read a table that `save` wrote; arguments and errors as there."""
    read = _READERS[file_format or _format_of(path)]
    rows = read(path.read() if isinstance(path, io.TextIOBase) else Path(path).read_text(encoding="utf-8"))
    return Table({name: _column([row[name] for row in rows]) for name in (rows[0] if rows else {})})


def write_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file under a temporary name, then rename it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def as_file_name(text: str) -> str:
    """A text as part of a file name; where characters must be replaced, with a digest of the text."""
    safe = re.sub(r"[^A-Za-z0-9._=-]", "_", text)
    if safe == text and len(text) <= MAX_NAME_LENGTH:
        return text
    return f"{safe[-MAX_NAME_LENGTH:]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def without_nan(value: Any) -> Any:
    """Nested values with None for numbers that are not finite, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _format_of(path: Any) -> FileFormat:
    endings = ", ".join(member.value for member in FileFormat)
    if isinstance(path, io.TextIOBase):
        raise ValueError(f"the format of an open file is not known: give file_format (one of {endings})")
    try:
        return FileFormat(Path(path).suffix)
    except ValueError:
        raise ValueError(f"{os.fspath(path)!r}: the ending must be one of {endings}") from None


def _column(values: list[Any]) -> list[Any]:
    values = [None if isinstance(value, float) and math.isnan(value) else value for value in values]
    if all(value is None or (isinstance(value, int | float) and not isinstance(value, bool)) for value in values):
        whole = all(value is None or float(value).is_integer() for value in values)
        return [None if value is None else int(value) if whole else float(value) for value in values]
    return [None if value is None else str(value) for value in values]


def _dtype(values: list[Any]) -> str:
    if any(isinstance(value, str) for value in values):
        return "string"
    return "Float64" if any(isinstance(value, float) for value in values) else "Int64"


def _to_csv(table: Table) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows(zip(*table.columns.values(), strict=True))
    return buffer.getvalue()


def _from_csv(text: str) -> list[dict[str, Any]]:
    return [{name: _parse(value) for name, value in row.items()} for row in csv.DictReader(io.StringIO(text))]


def _parse(text: str) -> Any:
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text or None


def _to_jsonl(table: Table) -> str:
    return "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in table.rows())


def _from_jsonl(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def _to_yaml(table: Table) -> str:
    return yaml.safe_dump(dict(enumerate(table.rows())))


def _from_yaml(text: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load(text).values())


_WRITERS = {FileFormat.CSV: _to_csv, FileFormat.JSONL: _to_jsonl, FileFormat.YAML: _to_yaml}
_READERS = {FileFormat.CSV: _from_csv, FileFormat.JSONL: _from_jsonl, FileFormat.YAML: _from_yaml}
