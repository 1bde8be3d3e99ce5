"""The sweep over C of a logistic regression as a table and as a picture."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinov3.eval.classification.log_regression_module import Sweep
from dinov3.eval.command import results
from dinov3.utils.files import atomic_write

STEM = "sweep-log-regression"


def sweep_table(sweeps: Mapping[int, Sweep]) -> dict[str, list[Any]]:
    """Return the columns of a table with a row for each try and value of C; metrics in percent."""
    columns: dict[str, list[Any]] = {}
    for name, sweep in sweeps.items():
        for index, C in enumerate(sweep.Cs):
            row = {"try": name, "C": C}
            row |= {f"val {metric}": 100 * value for metric, value in sweep.metrics[index].items()}
            row |= {"iterations": sweep.n_iterations[index], "chosen": int(index == sweep.best)}
            for column, value in row.items():
                columns.setdefault(column, []).append(value)
    return columns


def write_sweeps(sweeps: Mapping[int, Sweep], output_dir: str | os.PathLike[str]) -> list[Path]:
    """Write `sweep-log-regression.csv` and `.png` of the sweeps by try, and return their paths."""
    paths = [Path(output_dir) / f"{STEM}{ending}" for ending in (".csv", ".png")]
    results.save_from_dict(sweep_table(sweeps), paths[0])
    _plot(sweeps, paths[1])
    return paths


def _plot(sweeps: Mapping[int, Sweep], path: Path) -> None:
    # Imported here because matplotlib is slow to import; pyplot, with its global state, is not needed.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, sweep in sweeps.items():
        scores = [100 * metrics["top-1"] for metrics in sweep.metrics]
        best_C, best_score = sweep.Cs[sweep.best], scores[sweep.best]
        label = f"C = {best_C:.3g}: {best_score:.2f} %" if len(sweeps) == 1 else f"try {name}: C = {best_C:.3g}"
        (line,) = axes.plot(sweep.Cs, scores, marker=".", label=label)
        axes.plot(best_C, best_score, marker="o", markersize=9, fillstyle="none", color=line.get_color())
    axes.set(xscale="log", xlabel="C, inverse weight of the L2 penalty", ylabel="validation top-1, %")
    axes.set_title("Logistic regression on frozen features")
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize="small")
    with atomic_write(path) as file:
        figure.savefig(file, dpi=150, format="png")


def format_sweep(sweep: Sweep) -> str:
    """Format a sweep as a text table that marks the chosen value."""
    lines = [f"{'C':>10}{'val top-1':>11}{'iterations':>12}"]
    for index, C in enumerate(sweep.Cs):
        mark = "  <- chosen" if index == sweep.best else ""
        lines.append(f"{C:>10.3g}{100 * sweep.metrics[index]['top-1']:>11.2f}{sweep.n_iterations[index]:>12}{mark}")
    return "\n".join(lines)
