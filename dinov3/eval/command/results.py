"""The result of an evaluation, where it comes from, and tables of results as files.

Tables are CSV, JSON lines, YAML or (with openpyxl) Excel files. A column holds `Int64` (integers, and floats that are
all whole), `Float64` or `string`; booleans become strings, and NaN and None are missing values, empty in CSV and Excel.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import importlib.metadata
import io
import json
import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import yaml

from dinov3 import distributed
from dinov3.distributed import runtime
from dinov3.utils import get_sha
from dinov3.utils.files import atomic_write

#: Installed packages whose version may change a figure.
PACKAGES = ("numpy", "pillow", "scikit-learn")
MAX_NAME_LENGTH = 150
OpenFile = io.TextIOBase | io.BufferedIOBase | io.RawIOBase


class FileFormat(Enum):
    """The file formats, by their file name ending."""

    CSV = ".csv"
    JSONL = ".jsonl"
    YAML = ".yaml"
    EXCEL = ".excel"
    XLSX = ".xlsx"

    @property
    def is_binary(self) -> bool:
        """Whether it is not text but a workbook, of one sheet, whose numbers have 16 digits."""
        return self in (FileFormat.EXCEL, FileFormat.XLSX)


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
    """Make a table of one row, or of one row per element if all values are sequences (of equal length)."""
    values = list(results.values())
    if values and all(isinstance(value, Sequence) and not isinstance(value, str) for value in values):
        return Table({name: _column(list(value)) for name, value in results.items()})
    return Table({name: _column([value]) for name, value in results.items()})


def vstack(*results: Table) -> Table:
    """Join the rows of several tables, with the columns of all, in order; values are missing where a table has none."""
    return _from_rows([row for table in results for row in table.rows()])


def save(results: Table, path: str | os.PathLike[str] | OpenFile, file_format: FileFormat | None = None) -> None:
    """Write a table.

    Args:
        results: the table.
        path: a file name, whose ending gives the format, or an open file, which must be binary for Excel.
        file_format: necessary for open files.

    Raises:
        ValueError: no format is given, and the ending is not one of `FileFormat`; or a text file is given for Excel.
        ModuleNotFoundError: Excel files need openpyxl.
    """
    file_format = _resolve_format(path, file_format)
    content = _encode(results, file_format)
    if not isinstance(path, OpenFile):
        with atomic_write(path) as file:
            file.write(content)
    elif isinstance(path, io.TextIOBase):
        path.write(content.decode())
    else:
        path.write(content)


def save_from_dict(
    results: Mapping[str, Any], path: str | os.PathLike[str] | OpenFile, file_format: FileFormat | None = None
) -> None:
    """Do `save(make(results), path, file_format)`."""
    save(make(results), path, file_format)


def load(path: str | os.PathLike[str] | OpenFile, file_format: FileFormat | None = None) -> Table:
    """Read a table that `save` wrote; arguments and errors are the same."""
    file_format = _resolve_format(path, file_format)
    content: Any = path.read() if isinstance(path, OpenFile) else Path(path).read_bytes()
    return _from_rows(_decode(content, file_format))


def save_collection(
    results: Mapping[str, Table], directory: str | os.PathLike[str], file_format: FileFormat = FileFormat.CSV
) -> None:
    """Write tables by name into a directory, each as `<name><ending of the format>`; other files there stay.

    Raises:
        ValueError: a name is empty, begins with a dot or names another directory; nothing is written.
        ModuleNotFoundError: Excel files need openpyxl.
    """
    for name in results:
        if not name or name.startswith(".") or Path(name).name != name:
            raise ValueError(
                f"{name!r} names a table, but it cannot be a file: it is empty, begins with a dot or has a /"
            )
    for name, table in results.items():
        save(table, Path(directory) / f"{name}{file_format.value}", file_format)


def load_collection(directory: str | os.PathLike[str], file_format: FileFormat = FileFormat.CSV) -> dict[str, Table]:
    """Read all tables of one format in a directory, such as the results of several evaluations.

    Returns:
        Tables by file name without its ending, in alphabetical order.

    Raises:
        FileNotFoundError: the directory does not exist.
        ModuleNotFoundError: Excel files need openpyxl.
    """
    paths = (path for path in Path(directory).iterdir() if path.suffix == file_format.value)
    return {path.stem: load(path) for path in sorted(paths) if not path.name.startswith(".")}


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation found out; `run_command` writes and prints it.

    Attributes:
        metrics: the row of the results file, by column.
        datasets: names and sizes of the datasets, by their role.
        model: what was evaluated.
        autocast_dtype: the precision that the model ran in.
        report: text for the terminal.
        details: further entries of the JSON file.
        files: further files that were written, to be named on the terminal.
    """

    metrics: dict[str, Any]
    datasets: dict[str, Any]
    model: str
    autocast_dtype: torch.dtype
    report: str
    details: dict[str, Any] = field(default_factory=dict)
    files: Sequence[Path] = ()


def provenance(config: Any, result: EvaluationResult, seconds: float) -> dict[str, Any]:
    """Describe where the figures of a result come from, in plain values as JSON has them.

    Args:
        config: the settings, a dataclass.
        result: of the evaluation.
        seconds: how long it took.
    """
    versions = {"code": get_sha(), "python": platform.python_version(), "torch": torch.__version__}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "config": plain(asdict(config)),
        "model": result.model,
        "datasets": result.datasets,
        "processes": distributed.get_world_size(),
        "device": str(runtime.device()),
        "autocast_dtype": str(result.autocast_dtype),
        "versions": versions,
        "seconds": round(seconds, 2),
    }


def plain(value: Any) -> Any:
    """Return nested values with enumeration members by name, as they can be given again, and sequences as lists."""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Mapping):
        return {plain(key): plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def write_results(
    results: Mapping[str, Any],
    output_dir: str | os.PathLike[str],
    filename: str,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write a table of results, and where it comes from; only the main process writes.

    Args:
        results: one row, by column.
        output_dir: created if needed.
        filename: its ending is one of `FileFormat`.
        provenance: written, with the results, to `<stem of filename>.json`.
    """
    if not distributed.is_main_process():
        return
    path = Path(output_dir) / filename
    save_from_dict(results, path)
    if provenance is not None:
        with atomic_write(path.with_suffix(".json"), "w") as file:
            file.write(json.dumps({"results": without_nan(results), **provenance}, indent=2, default=str) + "\n")


def as_file_name(text: str) -> str:
    """Turn a text into part of a file name; where characters must be replaced, with a digest of the text."""
    safe = re.sub(r"[^A-Za-z0-9._=-]", "_", text)
    if safe == text and len(text) <= MAX_NAME_LENGTH:
        return text
    return f"{safe[-MAX_NAME_LENGTH:]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def without_nan(value: Any) -> Any:
    """Return nested values as JSON has them, with None for numbers that are not finite, which JSON lacks."""
    return json.loads(json.dumps(value, default=str), parse_constant=lambda _: None)


def _resolve_format(path: Any, file_format: FileFormat | None) -> FileFormat:
    if file_format is None:
        endings = ", ".join(member.value for member in FileFormat)
        if isinstance(path, OpenFile):
            raise ValueError(f"the format of an open file is unknown: give file_format (one of {endings})")
        try:
            file_format = FileFormat(Path(path).suffix)
        except ValueError:
            raise ValueError(f"{os.fspath(path)!r}: the ending must be one of {endings}") from None
    if file_format.is_binary and isinstance(path, io.TextIOBase):
        raise ValueError(f"{file_format.value} is binary: open the file in binary mode")
    return file_format


def _from_rows(rows: Sequence[Mapping[str, Any]]) -> Table:
    names = dict.fromkeys(name for row in rows for name in row)
    return Table({name: _column([row.get(name) for row in rows]) for name in names})


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


def _encode(table: Table, file_format: FileFormat) -> bytes:
    if file_format.is_binary:
        return _to_workbook(table)
    if file_format is FileFormat.JSONL:
        return "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in table.rows()).encode()
    if file_format is FileFormat.YAML:
        return yaml.safe_dump(dict(enumerate(table.rows()))).encode()
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows(zip(*table.columns.values(), strict=True))
    return buffer.getvalue().encode(errors="backslashreplace")


def _decode(content: Any, file_format: FileFormat) -> list[dict[str, Any]]:
    if file_format.is_binary:
        return _from_workbook(content)
    text = content if isinstance(content, str) else content.decode()
    if file_format is FileFormat.JSONL:
        return [json.loads(line) for line in text.splitlines()]
    if file_format is FileFormat.YAML:
        return list(yaml.safe_load(text).values())
    return [{name: _parse(value) for name, value in row.items()} for row in csv.DictReader(io.StringIO(text))]


def _parse(text: str) -> Any:
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text or None


def _to_workbook(table: Table) -> bytes:
    openpyxl = _import_openpyxl()
    workbook = openpyxl.Workbook(write_only=True)
    sheet = workbook.create_sheet("results")
    for row in (table.columns, *zip(*table.columns.values(), strict=True)):
        sheet.append([_to_cell(openpyxl, sheet, value) for value in row])
    buffer = io.BytesIO()
    workbook.save(buffer)
    return buffer.getvalue()


def _to_cell(openpyxl: Any, sheet: Any, value: Any) -> Any:
    # Excel has no infinity. Text must stay text even if it begins with "=", as formulas do.
    is_infinite = isinstance(value, float) and math.isinf(value)
    cell = openpyxl.cell.WriteOnlyCell(sheet, str(value) if is_infinite else value)
    if isinstance(cell.value, str):
        cell.data_type = "s"
    return cell


def _from_workbook(content: bytes) -> list[dict[str, Any]]:
    workbook = _import_openpyxl().load_workbook(io.BytesIO(content), read_only=True, data_only=True)
    names, *rows = list(workbook.active.iter_rows(values_only=True)) or [()]
    # The file omits missing values at the end of a row.
    padded = (row + (None,) * (len(names) - len(row)) for row in rows)
    return [{name: _INFINITIES.get(value, value) for name, value in zip(names, row, strict=True)} for row in padded]


def _import_openpyxl() -> Any:
    try:
        import openpyxl
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Excel files need openpyxl: pip install openpyxl, or choose .csv", name="openpyxl"
        ) from error
    return openpyxl


_INFINITIES = {"inf": math.inf, "-inf": -math.inf}
