"""Loss curves of a training run, drawn from its metrics file: `python -m dinov3.train.plot OUTPUT_DIR`.

One small panel per quantity: the total loss, its terms, the gradient norms and the schedules that drove them. Nothing
here touches matplotlib's global state, so it is safe inside a training process and a notebook.
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

METRICS_FILE = "training_metrics.json"
FIGURE_FILE = "loss_curves.png"
N_COLUMNS = 5


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
    Panel("Gram", {"gram_loss": ""}),
    Panel(
        "gradient norm",
        {"backbone_grad_norm": "backbone", "dino_head_grad_norm": "DINO head", "ibot_head_grad_norm": "iBOT head"},
        is_log=True,
    ),
    Panel("learning rate", {"lr": "all layers", "last_layer_lr": "last layer of the heads"}),
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
        raise FileNotFoundError(f"{path} not found: it is written by a training run after its first iterations")
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


def plot_losses(output_dir: str | Path) -> Path:
    """Draw `<output_dir>/loss_curves.png` from `<output_dir>/training_metrics.json`.

    Quantities that the run did not record have no panel; values that were not finite leave a gap.

    Args:
        output_dir: the directory of a training run.

    Returns:
        The path of the figure.

    Raises:
        FileNotFoundError, ValueError: the metrics file is missing, empty or malformed.
    """
    output_dir = Path(output_dir)
    figure = draw_metrics(read_metrics(output_dir / METRICS_FILE))
    path = output_dir / FIGURE_FILE
    figure.savefig(path, dpi=150)
    return path


def draw_metrics(records: list[dict[str, Any]]) -> Figure:
    """The figure of `plot_losses`, on its own Agg canvas.

    Args:
        records: from `read_metrics`, at least one.

    Returns:
        A figure with one axes per quantity for which there is a finite value.
    """
    iterations = [record["iteration"] for record in records]
    values = {key: [_number(record.get(key)) for record in records] for panel in PANELS for key in panel.curves}
    has_values = {key for key, column in values.items() if not all(map(math.isnan, column))}
    panels = [panel for panel in PANELS if has_values & panel.curves.keys()]

    n_rows = max(1, math.ceil(len(panels) / N_COLUMNS))
    figure = Figure(figsize=(2.8 * N_COLUMNS, 2.3 * n_rows), layout="constrained")
    FigureCanvasAgg(figure)
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(n_rows, N_COLUMNS, index + 1)
        curves = {label: values[key] for key, label in panel.curves.items() if key in has_values}
        _draw_panel(axes, panel, iterations, curves)
    figure.supxlabel("iteration", fontsize=9)
    return figure


def _draw_panel(axes: Axes, panel: Panel, iterations: list[int], curves: dict[str, list[float]]) -> None:
    # A single point, or one between two gaps, is invisible as a line.
    marker = "o" if len(iterations) < 20 else None
    for label, column in curves.items():
        axes.plot(iterations, column, label=label or None, marker=marker, markersize=3, linewidth=1.3)
    if panel.is_log and any(value > 0 for column in curves.values() for value in column):
        axes.set_yscale("log", nonpositive="mask")
    else:
        axes.ticklabel_format(axis="y", useOffset=False, scilimits=(-3, 4))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    axes.set_title(panel.title, fontsize=10)
    axes.tick_params(labelsize=8)
    axes.yaxis.get_offset_text().set_fontsize(8)
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1:
        axes.legend(fontsize=7, frameon=False)


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
