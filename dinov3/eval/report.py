"""Results of several evaluations in one table and one chart.

    python -m dinov3.eval.report DIR... [--output-dir OUT]

Each DIR, with all below it, is searched for the result files of k-NN, logistic regression and linear probing. The
results of a model become a row of `report.md`; `report.png` shows the same as bars. Rows and columns come in the order
of the directories given; the best value of a column is bold.

Notable: a column is an evaluation on a dataset, few-shot apart, so figures that do not compare do not stand below each
other. Results in one directory, or in neighbouring ones, such as RUN/knn and RUN/linear, are one row if they are of the
same model. A further result in the same column, such as RUN/linear-2, is a row of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dinov3.eval.classification import knn_config, linear_config, log_regression_config
from dinov3.eval.classification.knn_config import Feature
from dinov3.eval.classification.metrics import ClassificationMetricType
from dinov3.eval.command import results
from dinov3.eval.command.results import write_atomically
from dinov3.utils.command_line import run_command_line

TABLE_FILE, CHART_FILE = "report.md", "report.png"
#: Title and main metrics, by results file.
EVALUATIONS: dict[str, tuple[str, list[str]]] = {
    knn_config.RESULTS_FILENAME: ("k-NN", knn_config.MAIN_METRICS),
    log_regression_config.RESULTS_FILENAME: ("logistic regression", log_regression_config.MAIN_METRICS),
    linear_config.RESULTS_FILENAME: ("linear", linear_config.MAIN_METRICS),
}
DEFAULT_METRIC = ClassificationMetricType.MEAN_ACCURACY
LOWER_IS_BETTER = {metric.value for metric in ClassificationMetricType if metric.is_lower_better}
_NEIGHBOURS = re.compile(r"(?P<k>[0-9]+) Top 1")
_DATASET_METRIC = re.compile(r"(?P<dataset>.*?)_accuracy(_mean)?")
_TEACHER = re.compile(r"(?:.*/)?(?P<run>[^/]+)/(eval/training_|ckpt/)(?P<iteration>[0-9]+)(/[^/]+)?")
BAR_HEIGHT, WIDTH, MARGIN, LEGEND_LINE = 0.2, 9.0, 0.8, 0.2  # inches
COLOURS = "tab10", "tab20"
DPI = 120


@dataclass(frozen=True)
class Column:
    """What is compared.

    Attributes:
        dataset: the test images, in short; empty if they are not known.
        evaluation: how they are classified.
        metric: what is measured; empty for the share of images that are classified right.
        setting: what is unusual about it: how few images it is trained on, or the feature.
    """

    dataset: str
    evaluation: str
    metric: str = ""
    setting: str = ""

    @property
    def is_lower_better(self) -> bool:
        """Whether the smallest value is the best."""
        return self.metric in LOWER_IS_BETTER

    def __str__(self) -> str:
        return ", ".join(part for part in (self.dataset, self.title) if part)

    @property
    def title(self) -> str:
        """All but the dataset."""
        return ", ".join(part for part in (self.evaluation, self.setting, self.metric) if part)


@dataclass
class Row:
    """The results of a model.

    Attributes:
        name: of the directory, below the one that all rows have in common; of several in one, with the model.
        source: what was evaluated; empty if it is not known.
        values: main metrics in percent, by column.
        spreads: standard deviations over tries, by column.
    """

    name: str
    source: str
    values: dict[Column, float]
    spreads: dict[Column, float]

    @property
    def model(self) -> str:
        """`source`, in short."""
        return _short_model(self.source)

    def add(self, other: Row) -> None:
        """Take the values of another one."""
        self.values |= other.values
        self.spreads |= other.spreads


def collect(directories: Sequence[str | os.PathLike[str]]) -> list[Row]:
    """The results in some directories and below them.

    Args:
        directories: searched in this order.

    Returns:
        One row per model and directory, see the module.

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
    joined: list[tuple[Path, Row]] = []
    for directory in found:
        for row in _read_rows(directory):
            neighbour = _find_neighbour(joined, directory, row)
            if neighbour is None:
                joined.append((directory, row))
            else:
                _, other = joined[neighbour]
                other.add(row)
                joined[neighbour] = directory.parent, other  # under the name that they have in common
    names = _short_names([path for path, _ in joined])
    for (_, row), name in zip(joined, names, strict=True):
        row.name = name if names.count(name) == 1 else f"{name} ({row.model or 'unknown model'})"
    return [row for _, row in joined]


def format_table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    columns = _columns(rows)
    lines = [["run", "model", *map(str, columns)], ["---", "---", *["---:"] * len(columns)]]
    best = {column: _best(rows, column) for column in columns}
    for row in rows:
        lines.append([row.name, row.model or "-", *(_format_value(row, column, best[column]) for column in columns)])
    return "".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |\n" for line in lines)


def draw_chart(rows: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """Write a PNG with one group of horizontal bars per column, one bar per row that has it."""
    columns = _columns(rows)
    n_places = sum(1 + sum(column in row.values for row in rows) for column in columns)
    height = MARGIN + BAR_HEIGHT * n_places + LEGEND_LINE * len(rows)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = _colours(len(rows))
    bars: dict[int, Any] = {}
    place, ticks = 0, []
    for column in columns:
        having = [(number, row) for number, row in enumerate(rows) if column in row.values]
        ticks.append(place + (len(having) - 1) / 2)
        for number, row in having:
            spread = row.spreads.get(column)
            bar = axes.barh(place, row.values[column], height=0.9, xerr=spread, color=colours[number])
            axes.bar_label(bar, fmt="%.1f", padding=2, fontsize=7)
            bars.setdefault(number, bar)
            place += 1
        place += 1
    axes.set_yticks(ticks, [_tick(column) for column in columns], fontsize=8)
    axes.set_ylim(place - 1, -1)
    axes.set_xlabel("%")
    axes.margins(x=0.1)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    names = [rows[number].name for number in sorted(bars)]
    figure.legend([bars[number] for number in sorted(bars)], names, loc="outside upper left", fontsize=8, frameon=False)
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


def _find_neighbour(joined: Sequence[tuple[Path, Row]], directory: Path, row: Row) -> int | None:
    # The row that this directory goes on: of the same model, in a directory beside this one.
    for number, (path, other) in enumerate(joined):
        is_beside = path == directory.parent or path.parent == directory.parent
        if is_beside and row.source and row.source == other.source:
            return None if row.values.keys() & other.values.keys() else number
    return None


def _read_rows(directory: Path) -> list[Row]:
    # One for each model; what is of an unknown one goes to the only other.
    rows: dict[str, Row] = {}
    for filename, (title, patterns) in EVALUATIONS.items():
        path = directory / filename
        if not path.is_file():
            continue
        origin = _read_origin(path.with_suffix(".json"))
        values = _read_results(path)
        source = str(origin.get("model", ""))
        row = rows.setdefault(source, Row("", source, {}, {}))
        for key, value in values.items():
            if not any(re.fullmatch(pattern, key) for pattern in patterns) or not isinstance(value, int | float):
                continue
            column = _column(title, key, origin)
            row.values[column] = float(value)
            spread = values.get(_spread_key(key))
            if isinstance(spread, int | float) and _spread_key(key) != key:
                row.spreads[column] = float(spread)
    if len(rows) == 2 and "" in rows:
        unknown = rows.pop("")
        next(iter(rows.values())).add(unknown)
    return list(rows.values())


def _read_results(path: Path) -> dict[str, Any]:
    try:
        rows = results.load(path).rows()
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if len(rows) != 1:
        raise ValueError(f"{path} has {len(rows)} rows of results, expected one")
    return rows[0]


def _read_origin(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return content if isinstance(content, dict) else {}


def _column(title: str, key: str, origin: Mapping[str, Any]) -> Column:
    config = origin.get("config", {})
    setting = _setting(config)
    if match := _DATASET_METRIC.fullmatch(key):
        dataset, metric = _of_linear(match["dataset"], origin)
        return Column(_short_dataset(dataset), title, _short_metric(metric), setting)
    metric = config.get("eval", {}).get("test_metric_type") or config.get("train", {}).get("val_metric_type")
    dataset = _short_dataset(str(config.get("eval", {}).get("test_dataset", "")))
    match = _NEIGHBOURS.fullmatch(key)
    evaluation = f"{match['k']}-NN" if match else title
    return Column(dataset, evaluation, _short_metric(str(metric or DEFAULT_METRIC.name)), setting)


def _setting(config: Mapping[str, Any]) -> str:
    feature = config.get("eval", {}).get("feature", Feature.CLS.name)
    few_shot, parts = config.get("few_shot", {}), []
    if feature != Feature.CLS.name:
        parts.append(Feature[feature].value)
    if few_shot.get("enable"):
        number = few_shot["k_or_percent"]
        parts.append(f"{int(number)} per class" if number >= 1 else f"{100 * number:g}% per class")
    return ", ".join(parts)


def _of_linear(name: str, origin: Mapping[str, Any]) -> tuple[str, str]:
    # The dataset's string and the name of its metric, which is a part of the name of a second one on the same dataset.
    config = origin.get("config", {})
    train, test = config.get("train", {}), config.get("eval", {})
    default = str(train.get("val_metric_type", DEFAULT_METRIC.name))
    datasets, metrics = list(test.get("test_datasets", [])), list(test.get("test_metric_types", [])) or [default]
    metrics *= len(datasets) if len(metrics) == 1 else 1
    for dataset, metric in [(train.get("val_dataset"), default), *zip(datasets, metrics, strict=False)]:
        if name in (dataset, f"{dataset}_{ClassificationMetricType[metric].value}"):
            return str(dataset), metric
    return name, DEFAULT_METRIC.name


def _short_metric(name: str) -> str:
    return "" if name == DEFAULT_METRIC.name else ClassificationMetricType[name].value


def _short_dataset(text: str) -> str:
    # The kind and split of a dataset; of folders, the end of their path.
    kind, *settings = text.split(":")
    given = dict(setting.partition("=")[::2] for setting in settings)
    if kind == "ImageFolder":
        return "/".join([*Path(given.get("root", "")).parts[-2:], *([given["split"]] if "split" in given else [])])
    return f"{kind} {given['split']}" if "split" in given else kind


def _short_model(text: str) -> str:
    if match := _TEACHER.fullmatch(text):
        return f"{match['run']}, iteration {match['iteration']}"
    return "/".join(Path(text).parts[-2:]) if text.startswith("/") else text


def _spread_key(key: str) -> str:
    return f"{key.removesuffix('_mean')}_std" if key.endswith("_mean") else f"{key} std"


def _short_names(paths: Sequence[Path]) -> list[str]:
    common = os.path.commonpath([path.parent for path in paths])
    return [os.path.relpath(path, common) for path in paths]


def _columns(rows: Sequence[Row]) -> list[Column]:
    # Datasets and evaluations in the order of their first appearance, numbers of neighbours ascending.
    found = list(dict.fromkeys(column for row in rows for column in row.values))
    datasets = list(dict.fromkeys(column.dataset for column in found))
    settings = list(dict.fromkeys(column.setting for column in found))

    def place(column: Column) -> tuple[Any, ...]:
        rank = _rank(column.evaluation)
        return datasets.index(column.dataset), column.metric, rank, settings.index(column.setting)

    return sorted(found, key=place)


def _rank(evaluation: str) -> tuple[int, int]:
    count = evaluation.removesuffix("-NN")
    return (0, int(count)) if count.isdecimal() else (1, [title for title, _ in EVALUATIONS.values()].index(evaluation))


def _best(rows: Sequence[Row], column: Column) -> float:
    values = [row.values[column] for row in rows if column in row.values]
    return min(values) if column.is_lower_better else max(values)


def _format_value(row: Row, column: Column, best: float) -> str:
    if column not in row.values:
        return "-"
    text = f"{row.values[column]:.2f}"
    text = f"**{text}**" if row.values[column] == best else text
    return f"{text} ± {row.spreads[column]:.2f}" if column in row.spreads else text


def _tick(column: Column) -> str:
    return f"{column.dataset}\n{column.title}" if column.dataset else column.title


def _colours(count: int) -> list[Any]:
    from matplotlib import colormaps

    palette = colormaps[COLOURS[count > 10]].colors  # type: ignore[attr-defined]
    return [palette[number % len(palette)] for number in range(count)]


if __name__ == "__main__":
    run_command_line(main)
