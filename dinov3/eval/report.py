"""Results of several evaluations in one table and one chart.

    python -m dinov3.eval.report DIR... [--output-dir OUT]

Each DIR and everything below it is searched for the results files of k-NN, logistic regression, linear probing,
zero-shot classification and retrieval, and open-vocabulary segmentation. The results of a model become a row of
`report.md`; `report.png` shows the same as bars. Rows and columns come in the order of the directories given; the best
value of a column is bold.

Notable: a column is one evaluation on one dataset with one metric and setting (few-shot, feature), so all figures in it
are comparable. Results in one directory, or in neighbouring ones such as RUN/knn and RUN/linear, share a row if they
are of the same model. A second result in the same column, such as RUN/linear-2, is a row of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from dinov3.eval.classification import knn_config, linear_config, log_regression_config
from dinov3.eval.classification.knn_config import Feature
from dinov3.eval.classification.metrics import ClassificationMetricType
from dinov3.eval.command import results
from dinov3.eval.text import config as text_config
from dinov3.utils.command_line import ArgumentParser, run_command_line
from dinov3.utils.files import atomic_write

TABLE_FILE, CHART_FILE = "report.md", "report.png"
#: Title and main metrics, by results file.
EVALUATIONS: dict[str, tuple[str, list[str]]] = {
    knn_config.RESULTS_FILENAME: ("k-NN", knn_config.MAIN_METRICS),
    log_regression_config.RESULTS_FILENAME: ("logistic regression", log_regression_config.MAIN_METRICS),
    linear_config.RESULTS_FILENAME: ("linear", linear_config.MAIN_METRICS),
    text_config.ZERO_SHOT_RESULTS_FILENAME: ("zero-shot", text_config.ZERO_SHOT_MAIN_METRICS),
    text_config.OPEN_VOCABULARY_RESULTS_FILENAME: ("open vocabulary", text_config.OPEN_VOCABULARY_MAIN_METRICS),
}
#: Metrics that columns name as the results file does, for evaluations that have no setting for it.
NAMED_METRICS = [text_config.ZERO_SHOT_MAIN_METRICS[1], *text_config.OPEN_VOCABULARY_MAIN_METRICS]
DEFAULT_METRIC = ClassificationMetricType.MEAN_ACCURACY.name
LOWER_IS_BETTER = {metric.value for metric in ClassificationMetricType if metric.is_lower_better}
_NEIGHBOURS = re.compile(r"(?P<k>[0-9]+) Top 1")
_DATASET_METRIC = re.compile(r"(?P<dataset>.*?)_accuracy(_mean)?")
_TEACHER = re.compile(r"(?:.*/)?(?P<run>[^/]+)/(eval/training_|ckpt/)(?P<iteration>[0-9]+)(/[^/]+)?")
BAR_HEIGHT, WIDTH, MARGIN, LEGEND_LINE = 0.2, 9.0, 0.8, 0.2  # inches
DPI = 120


@dataclass(frozen=True)
class Column:
    """What is compared.

    Attributes:
        dataset: short name of the test images; empty if unknown.
        evaluation: how they are classified.
        metric: what is measured; empty for the accuracy over all images.
        setting: what differs from the usual setting: few-shot, or the feature.
    """

    dataset: str
    evaluation: str
    metric: str = ""
    setting: str = ""

    def __str__(self) -> str:
        return ", ".join(part for part in (self.dataset, self.title) if part)

    @property
    def title(self) -> str:
        """Everything except for the dataset."""
        return ", ".join(part for part in (self.evaluation, self.setting, self.metric) if part)


@dataclass
class Row:
    """The results of a model.

    Attributes:
        source: what was evaluated; empty if unknown.
        values: main metrics in percent, by column.
        spreads: standard deviations over tries, by column.
        name: the directory, relative to the one that all rows have in common; with the model if several share it.
    """

    source: str
    values: dict[Column, float] = field(default_factory=dict)
    spreads: dict[Column, float] = field(default_factory=dict)
    name: str = ""

    @property
    def model(self) -> str:
        """A short name for `source`."""
        if match := _TEACHER.fullmatch(self.source):
            return f"{match['run']}, iteration {match['iteration']}"
        return "/".join(Path(self.source).parts[-2:]) if self.source.startswith("/") else self.source

    def add(self, other: Row) -> None:
        """Take over the values of another row."""
        self.values |= other.values
        self.spreads |= other.spreads


def collect(directories: Sequence[str | os.PathLike[str]]) -> list[Row]:
    """Read the results in some directories and below them.

    Args:
        directories: searched in this order.

    Returns:
        One row per model and directory, see the module.

    Raises:
        FileNotFoundError: a directory does not exist or has no results file.
        ValueError: a results file cannot be read.
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
            # A row of the same model, in a directory beside this one, without values in the same columns.
            candidates = (
                place
                for place, (path, other) in enumerate(joined)
                if directory.parent in (path, path.parent) and row.source and row.source == other.source
            )
            place = next(candidates, None)
            if place is None or row.values.keys() & joined[place][1].values.keys():
                joined.append((directory, row))
            else:
                _, other = joined[place]
                other.add(row)
                joined[place] = directory.parent, other  # its name is that of the parent from now on
    common = os.path.commonpath([path.parent for path, _ in joined])
    names = [os.path.relpath(path, common) for path, _ in joined]
    for (_, row), name in zip(joined, names, strict=True):
        row.name = name if names.count(name) == 1 else f"{name} ({row.model or 'unknown model'})"
    return [row for _, row in joined]


def format_table(rows: Sequence[Row]) -> str:
    """Format the rows as a Markdown table."""
    columns = _columns(rows)
    lines = [["run", "model", *map(str, columns)], ["---", "---", *["---:"] * len(columns)]]
    best = {}
    for column in columns:
        values = [row.values[column] for row in rows if column in row.values]
        best[column] = min(values) if column.metric in LOWER_IS_BETTER else max(values)
    for row in rows:
        lines.append([row.name, row.model or "-"])
        for column in columns:
            cell = f"{row.values[column]:.2f}" if column in row.values else "-"
            cell = f"**{cell}**" if row.values.get(column) == best[column] else cell
            lines[-1].append(f"{cell} ± {row.spreads[column]:.2f}" if column in row.spreads else cell)
    return "".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |\n" for line in lines)


def draw_chart(rows: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """Write a PNG with one group of horizontal bars per column, one bar per row that has a value in it."""
    columns = _columns(rows)
    n_places = sum(1 + sum(column in row.values for row in rows) for column in columns)
    height = MARGIN + BAR_HEIGHT * n_places + LEGEND_LINE * len(rows)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    palette = colormaps["tab10" if len(rows) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    colours = [palette[number % len(palette)] for number in range(len(rows))]
    place, ticks = 0, []
    for column in columns:
        first = place
        for row, colour in zip(rows, colours, strict=True):
            if column in row.values:
                spread = row.spreads.get(column)
                bar = axes.barh(place, row.values[column], height=0.9, xerr=spread, color=colour)
                axes.bar_label(bar, fmt="%.1f", padding=2, fontsize=7)
                place += 1
        ticks.append((first + place - 1) / 2)
        place += 1  # a gap between the groups
    labels = [f"{column.dataset}\n{column.title}" if column.dataset else column.title for column in columns]
    axes.set_yticks(ticks, labels, fontsize=8)
    axes.set_ylim(place - 1, -1)
    axes.set_xlabel("%")
    axes.margins(x=0.1)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    handles = [Patch(color=colour, label=row.name) for row, colour in zip(rows, colours, strict=True) if row.values]
    figure.legend(handles=handles, loc="outside upper left", fontsize=8, frameon=False)
    with atomic_write(path) as file:
        figure.savefig(file, dpi=DPI, format="png")


def main(argv: Sequence[str] | None = None) -> int:
    """Collect, write and print; see the module."""
    parser = ArgumentParser(
        prog="python -m dinov3.eval.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directories", nargs="+", metavar="DIR", type=Path)
    parser.add_argument("--output-dir", type=Path, default=Path("."), help="where the report goes (default: here)")
    args = parser.parse_args(argv)
    rows = collect(args.directories)
    table = format_table(rows)
    with atomic_write(args.output_dir / TABLE_FILE, "w") as file:
        file.write(table)
    draw_chart(rows, args.output_dir / CHART_FILE)
    print(table + f"\nwritten to {args.output_dir / TABLE_FILE} and {args.output_dir / CHART_FILE}")
    return 0


def _read_rows(directory: Path) -> list[Row]:
    # One row for each model; results of an unknown model go to the only other one.
    rows: dict[str, Row] = {}
    for filename, (title, patterns) in EVALUATIONS.items():
        path = directory / filename
        if not path.is_file():
            continue
        values, origin = _read_results(path), _read_origin(path.with_suffix(".json"))
        source = str(origin.get("model", ""))
        row = rows.setdefault(source, Row(source))
        for key, value in values.items():
            if not any(re.fullmatch(pattern, key) for pattern in patterns) or not isinstance(value, int | float):
                continue
            column = _column(title, key, origin)
            row.values[column] = float(value)
            spread = values.get(f"{key.removesuffix('_mean')}_std" if key.endswith("_mean") else f"{key} std")
            if isinstance(spread, int | float):
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
    test = config.get("eval", {})
    if match := _DATASET_METRIC.fullmatch(key):
        dataset, metric = _find_dataset_and_metric(match["dataset"], config)
    else:
        dataset = str(test.get("test_dataset", ""))
        metric = str(test.get("test_metric_type") or config.get("train", {}).get("val_metric_type") or DEFAULT_METRIC)
    neighbours = _NEIGHBOURS.fullmatch(key)
    feature = test.get("feature", Feature.CLS.name)
    few_shot, setting = config.get("few_shot", {}), []
    if feature != Feature.CLS.name:
        setting.append(Feature[feature].value)
    if few_shot.get("enable"):
        number = few_shot["k_or_percent"]
        setting.append(f"{int(number)} per class" if number >= 1 else f"{100 * number:g}% per class")
    return Column(
        dataset=_short_dataset(dataset),
        evaluation=f"{neighbours['k']}-NN" if neighbours else title,
        metric=_metric_title(key, metric),
        setting=", ".join(setting),
    )


def _metric_title(key: str, metric: str) -> str:
    if any(re.fullmatch(pattern, key) for pattern in NAMED_METRICS):
        return key
    return "" if metric == DEFAULT_METRIC else ClassificationMetricType[metric].value


def _find_dataset_and_metric(name: str, config: Mapping[str, Any]) -> tuple[str, str]:
    # Of linear probing, whose columns are named by the dataset; a second metric on one dataset is part of the name.
    train, test = config.get("train", {}), config.get("eval", {})
    default = str(train.get("val_metric_type", DEFAULT_METRIC))
    datasets, metrics = list(test.get("test_datasets", [])), list(test.get("test_metric_types", [])) or [default]
    metrics *= len(datasets) if len(metrics) == 1 else 1
    for dataset, metric in [(train.get("val_dataset"), default), *zip(datasets, metrics, strict=False)]:
        if name in (dataset, f"{dataset}_{ClassificationMetricType[metric].value}"):
            return str(dataset), metric
    return name, DEFAULT_METRIC


def _short_dataset(text: str) -> str:
    # The kind and split of a dataset; of folders, the end of their path.
    kind, *settings = text.split(":")
    given = dict(setting.partition("=")[::2] for setting in settings)
    if kind == "ImageFolder":
        return "/".join([*Path(given.get("root", "")).parts[-2:], *([given["split"]] if "split" in given else [])])
    return f"{kind} {given['split']}" if "split" in given else kind


def _columns(rows: Sequence[Row]) -> list[Column]:
    # Datasets and evaluations in the order of their first appearance, numbers of neighbours ascending.
    found = list(dict.fromkeys(column for row in rows for column in row.values))
    datasets = list(dict.fromkeys(column.dataset for column in found))
    settings = list(dict.fromkeys(column.setting for column in found))
    titles = [title for title, _ in EVALUATIONS.values()]

    def rank(column: Column) -> tuple[Any, ...]:
        k = column.evaluation.removesuffix("-NN")
        evaluation = (0, int(k)) if k.isdecimal() else (1, titles.index(column.evaluation))
        return datasets.index(column.dataset), column.metric, evaluation, settings.index(column.setting)

    return sorted(found, key=rank)


if __name__ == "__main__":
    run_command_line(main)
