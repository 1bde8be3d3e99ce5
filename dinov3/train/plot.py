"""Curves of a training run, drawn from its metrics and evaluations: `python -m dinov3.train.plot OUTPUT_DIR`.

One small panel per quantity: the total loss, its terms, the gradient norms and the schedules that drove them; and one
per evaluation of the exported teachers whose results lie beside them (`eval/training_<iteration>/.../results-*.csv`,
which `output_dir=RUN/eval/training_<iteration>/NAME` of an evaluation gives). Nothing here touches matplotlib's global
state, so it is safe inside a training process and a notebook.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dinov3.eval.command import results
from dinov3.hub.run_directory import EVALUATION_DIRECTORY

METRICS_FILE = "training_metrics.json"
FIGURE_FILE = "loss_curves.png"
N_COLUMNS = 5
# Inches: of a panel with its title and the numbers on its axes, and what these take of it.
PANEL_WIDTH, PANEL_HEIGHT = 2.8, 2.3
MARGIN_LEFT, MARGIN_RIGHT, MARGIN_TICKS, MARGIN_TITLE = 0.6, 0.15, 0.3, 0.35
MARGIN_BELOW = 0.25

#: Value by evaluation, column and iteration.
Evaluations = dict[str, dict[str, dict[int, float]]]
#: Iterations, and the values there.
Curve = tuple[list[int], list[float]]


class Panel(NamedTuple):
    """One small plot: its title, the metrics it shows with their legends, and whether its axis is logarithmic."""

    title: str
    curves: dict[str, str]
    is_log: bool = False


PANELS = (
    Panel("total loss", {"total_loss": ""}),
    Panel("DINO, local crops", {"dino_local_crops_loss": ""}),
    Panel("DINO, global crops", {"dino_global_crops_loss": ""}),
    Panel("iBOT, masked patches", {"ibot_loss": ""}),
    Panel("KoLeo", {"koleo_loss": ""}),
    Panel(
        "Gram",
        {
            "gram_loss": "in the loss",
            "stats_only/masked_gram_loss": "masked patches",
            "stats_only/unmasked_gram_loss": "other patches",
        },
    ),
    Panel(
        "gradient norm",
        {"backbone_grad_norm": "backbone", "dino_head_grad_norm": "DINO head", "ibot_head_grad_norm": "iBOT head"},
        is_log=True,
    ),
    Panel("learning rate", {"lr": "all layers", "last_layer_lr": "last layer of the heads"}),
    Panel("weights of losses", {"dino_local_loss_weight": "DINO, local crops", "gram_loss_weight": "Gram"}),
    Panel("EMA momentum", {"mom": ""}),
    Panel("teacher temperature", {"teacher_temp": ""}),
    Panel("weight decay", {"wd": ""}),
)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read a metrics file: one JSON object per line, each with an `iteration`.

    A last line that was cut off, as a killed run leaves it, is ignored.

    Args:
        path: a `training_metrics.json`.

    Returns:
        The records in file order; metrics that were not finite are None.

    Raises:
        FileNotFoundError: no such file.
        ValueError: nothing in it, or a line that is not JSON.
    """
    path = Path(path)
    if not path.is_file():
        students = sorted(str(found.parent) for found in path.parent.glob(f"*/{METRICS_FILE}"))
        hint = f"; give the directory of a student: {', '.join(students)}" if students else ""
        raise FileNotFoundError(f"{path} not found: it is written by a training run after its first iterations{hint}")
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines) > 1:
                break
            raise ValueError(f"{path}, line {number}: not a JSON object ({error})") from error
        if not isinstance(record, dict) or "iteration" not in record:
            raise ValueError(f"{path}, line {number}: expected a JSON object with an `iteration`, got {line[:60]!r}")
        records.append(record)
    if not records:
        raise ValueError(f"{path} is empty: nothing to plot yet")
    return records


def read_evaluations(output_dir: str | Path) -> Evaluations:
    """Read what evaluations of a run's exported teachers have written beside them.

    Args:
        output_dir: the directory of a training run.

    Returns:
        Value by evaluation, column and iteration, the latter ascending; columns that hold no number are left out.

    Raises:
        ValueError: a table of results is malformed.
    """
    evaluations: Evaluations = {}
    for directory in sorted(Path(output_dir, EVALUATION_DIRECTORY).glob("training_*"), key=_iteration):
        for path in sorted(directory.rglob("results-*.csv")) if _iteration(directory) >= 0 else ():
            # `knn/results-knn.csv` is "knn", `digits/results-knn.csv` is "digits knn".
            places = (*path.relative_to(directory).parent.parts, path.stem.removeprefix("results-"))
            title = " ".join(dict.fromkeys(places))
            for column, value in _read_row(path).items():
                evaluations.setdefault(title, {}).setdefault(column, {})[_iteration(directory)] = value
    return evaluations


def plot_losses(output_dir: str | Path) -> Path:
    """Draw `<output_dir>/loss_curves.png` from `<output_dir>/training_metrics.json` and the evaluations of the run.

    Quantities that the run did not record have no panel; values that were not finite leave a gap.

    Args:
        output_dir: the directory of a training run.

    Returns:
        The path of the figure.

    Raises:
        FileNotFoundError, ValueError: the metrics file is missing, empty or malformed; or an evaluation's is malformed.
    """
    output_dir = Path(output_dir)
    figure = draw_metrics(read_metrics(output_dir / METRICS_FILE), read_evaluations(output_dir))
    path = output_dir / FIGURE_FILE
    figure.savefig(path, dpi=150)
    return path


def draw_metrics(records: list[dict[str, Any]], evaluations: Evaluations | None = None) -> Figure:
    """Draw the figure of `plot_losses` on its own Agg canvas.

    Args:
        records: from `read_metrics`, at least one.
        evaluations: from `read_evaluations`.

    Returns:
        A figure with one axes per quantity for which there is a finite value, and one per evaluation.
    """
    iterations = [record["iteration"] for record in records]
    panels: list[tuple[str, dict[str, Curve], bool]] = []
    for panel in PANELS:
        series = {label: [_number(record.get(key)) for record in records] for key, label in panel.curves.items()}
        recorded = {label: (iterations, values) for label, values in series.items() if not all(map(math.isnan, values))}
        panels.append((panel.title, recorded, panel.is_log))
    for title, columns in (evaluations or {}).items():
        panels.append((title, {name: (list(of), list(of.values())) for name, of in columns.items()}, False))
    panels = [entry for entry in panels if entry[1]]

    n_rows = max(1, math.ceil(len(panels) / N_COLUMNS))
    width, height = PANEL_WIDTH * N_COLUMNS, PANEL_HEIGHT * n_rows + MARGIN_BELOW
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    # Not Matplotlib's automatic layout, which draws everything three times.
    figure.subplots_adjust(
        left=MARGIN_LEFT / width,
        right=1 - MARGIN_RIGHT / width,
        bottom=(MARGIN_BELOW + MARGIN_TICKS) / height,
        top=1 - MARGIN_TITLE / height,
        wspace=MARGIN_LEFT / (PANEL_WIDTH - MARGIN_LEFT),
        hspace=(MARGIN_TICKS + MARGIN_TITLE) / (PANEL_HEIGHT - MARGIN_TICKS - MARGIN_TITLE),
    )
    for index, (title, curves, is_log) in enumerate(panels):
        _draw_panel(figure.add_subplot(n_rows, N_COLUMNS, index + 1), title, curves, is_log=is_log)
    figure.supxlabel("iteration", fontsize=9, y=0.05 / height, va="bottom")
    return figure


def _draw_panel(axes: Axes, title: str, curves: dict[str, Curve], *, is_log: bool) -> None:
    for label, (iterations, column) in curves.items():
        # A single point, or one between two gaps, is invisible as a line.
        marker = "o" if len(iterations) < 20 else None
        axes.plot(iterations, column, label=label or None, marker=marker, markersize=3, linewidth=1.3)
    if is_log and any(value > 0 for _, column in curves.values() for value in column):
        axes.set_yscale("log", nonpositive="mask")
    else:
        axes.ticklabel_format(axis="y", useOffset=False, scilimits=(-3, 4))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    axes.set_title(title, fontsize=10)
    axes.tick_params(labelsize=8)
    axes.yaxis.get_offset_text().set_fontsize(8)
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1:
        axes.legend(fontsize=7, frameon=False)


def _iteration(directory: Path) -> int:
    number = directory.name.removeprefix("training_")
    return int(number) if number.isdecimal() else -1


def _read_row(path: Path) -> dict[str, float]:
    try:
        rows = results.load(path).rows()
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a table of results ({error})") from error
    numbers = {name: _number(value) for name, value in (rows[0] if rows else {}).items()}
    return {name: value for name, value in numbers.items() if not math.isnan(value)}


def _number(value: Any) -> float:
    is_number = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if is_number else math.nan


def main(argv: list[str] | None = None) -> None:
    """Draw the curves of the run directory given on the command line and print where they are."""
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise ValueError("expected one argument: python -m dinov3.train.plot OUTPUT_DIR")
    print(plot_losses(arguments[0]))


if __name__ == "__main__":
    from dinov3.utils.command_line import run_command_line

    run_command_line(main)
