"""Results of several evaluations in one table and one chart.

    python -m dinov3.eval.report DIR... [--output-dir OUT]

Each DIR, with all below it, is searched for the result files of k-NN, logistic regression and linear probing. A
directory that has some is a row of `report.md`; `report.png` shows the same as bars. Rows and columns come in the order
of the directories given; the best value of a column is bold.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dinov3.eval import knn, linear, log_regression, results
from dinov3.eval.results import write_atomically
from dinov3.utils.command_line import run_command_line

TABLE_FILE, CHART_FILE = "report.md", "report.png"
#: Title and main metrics, by results file.
EVALUATIONS: dict[str, tuple[str, list[str]]] = {
    knn.RESULTS_FILENAME: ("k-NN", knn.MAIN_METRICS),
    log_regression.RESULTS_FILENAME: ("logistic regression", log_regression.MAIN_METRICS),
    linear.RESULTS_FILENAME: ("linear", linear.MAIN_METRICS),
}
_DATASET_METRIC = re.compile(r"(?P<dataset>.*)_accuracy(?P<rest>_mean)?")
BAR_HEIGHT, PANEL_WIDTH, MARGIN = 0.22, 7.0, 1.2  # inches
DPI = 120


@dataclass
class Row:
    """The results in one directory.

    Attributes:
        name: of the directory, as short as is unique among the rows.
        model: what was evaluated, if it is known.
        values: main metrics in percent, by column.
        spreads: standard deviations over tries, by column.
    """

    name: str
    model: str
    values: dict[str, float]
    spreads: dict[str, float]


def collect(directories: Sequence[str | os.PathLike[str]]) -> list[Row]:
    """The results in some directories and below them.

    Args:
        directories: searched in this order.

    Returns:
        One row per directory that holds result files.

    Raises:
        FileNotFoundError: a directory is not there, or has no result file.
        ValueError: a result file cannot be read.
    """
    found: dict[Path, None] = {}
    for directory in map(Path, directories):
        if not directory.is_dir():
            raise FileNotFoundError(f"{directory}: there is no such directory")
        holders = sorted({path.parent for name in EVALUATIONS for path in directory.rglob(name)})
        if not holders:
            raise FileNotFoundError(f"{directory}: no {', '.join(EVALUATIONS)} in it or below it")
        found |= dict.fromkeys(path.resolve() for path in holders)
    names = _short_names(list(found))
    return [_read_row(path, name) for path, name in zip(found, names, strict=True)]


def format_table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    columns = _columns(rows)
    lines = [["run", "model", *columns], ["---", "---", *["---:"] * len(columns)]]
    best = {column: max(row.values[column] for row in rows if column in row.values) for column in columns}
    for row in rows:
        lines.append([row.name, row.model or "-", *(_format_value(row, column, best[column]) for column in columns)])
    return "".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |\n" for line in lines)


def draw_chart(rows: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """Write a PNG with one group of horizontal bars per column, one bar per row."""
    columns = _columns(rows)
    height = MARGIN + BAR_HEIGHT * (len(rows) + 1) * len(columns)
    figure = Figure(figsize=(PANEL_WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, row in enumerate(rows):
        places = [place * (len(rows) + 1) + number for place, column in enumerate(columns) if column in row.values]
        values = [row.values[column] for column in columns if column in row.values]
        spreads = [row.spreads.get(column, 0) for column in columns if column in row.values]
        bars = axes.barh(places, values, height=0.9, xerr=spreads if any(spreads) else None, label=row.name)
        axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=7)
    axes.set_yticks([place * (len(rows) + 1) + (len(rows) - 1) / 2 for place in range(len(columns))], columns)
    axes.invert_yaxis()
    axes.set_xlabel("%")
    axes.margins(x=0.1)
    figure.legend(loc="outside upper left", fontsize=8)
    target = Path(path)
    temporary = target.with_name(f".tmp-{os.getpid()}-{target.name}")
    figure.savefig(temporary, dpi=DPI, format="png")
    temporary.replace(target)


def main(argv: Sequence[str] | None = None) -> int:
    """Collect, write and print; see the module. `argv` of None is the command line. Returns 0."""
    parser = argparse.ArgumentParser(
        prog="python -m dinov3.eval.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directories", nargs="+", metavar="DIR", type=Path)
    parser.add_argument("--output-dir", type=Path, default=Path("."), help="where the report goes; default: here")
    args = parser.parse_args(argv)
    rows = collect(args.directories)
    table = format_table(rows)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(args.output_dir / TABLE_FILE, table)
    draw_chart(rows, args.output_dir / CHART_FILE)
    print(table + f"\nwritten to {args.output_dir / TABLE_FILE} and {args.output_dir / CHART_FILE}")
    return 0


def _read_row(directory: Path, name: str) -> Row:
    row = Row(name, "", {}, {})
    for filename, (title, patterns) in EVALUATIONS.items():
        path = directory / filename
        if not path.is_file():
            continue
        for key, value in _read_results(path).items():
            if not any(re.fullmatch(pattern, key) for pattern in patterns) or not isinstance(value, int | float):
                continue
            column = f"{title}, {_short_metric(key)}"
            row.values[column] = float(value)
            spread = _read_results(path).get(_spread_key(key))
            if isinstance(spread, int | float) and _spread_key(key) != key:
                row.spreads[column] = float(spread)
        row.model = row.model or _read_model(path.with_suffix(".json"))
    return row


def _read_results(path: Path) -> dict[str, Any]:
    try:
        rows = results.load(path).rows()
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if len(rows) != 1:
        raise ValueError(f"{path} has {len(rows)} rows of results, expected one")
    return rows[0]


def _read_model(path: Path) -> str:
    if not path.is_file():
        return ""
    try:
        return str(json.loads(path.read_text(encoding="utf-8")).get("model", ""))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _spread_key(key: str) -> str:
    return f"{key.removesuffix('_mean')}_std" if key.endswith("_mean") else f"{key} std"


def _short_metric(key: str) -> str:
    # A dataset's string without its directories.
    match = _DATASET_METRIC.fullmatch(key)
    if match is None:
        return key.removesuffix("_mean")
    return re.sub(r"=[^:+]*/([^:+/]+)/*", r"=\1", match["dataset"])


def _short_names(paths: Sequence[Path]) -> list[str]:
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _columns(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(column for row in rows for column in row.values))


def _format_value(row: Row, column: str, best: float) -> str:
    if column not in row.values:
        return "-"
    text = f"{row.values[column]:.2f}"
    text = f"**{text}**" if row.values[column] == best else text
    return f"{text} ± {row.spreads[column]:.2f}" if column in row.spreads else text


if __name__ == "__main__":
    run_command_line(main)
