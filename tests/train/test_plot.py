"""Loss curves from a metrics file: every panel that has data, gaps for nulls, clear errors, no global state."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from PIL import Image

from dinov3.train.plot import draw_metrics, main, plot_losses, read_evaluations, read_metrics

FULL = {
    "iter_time": 0.5,
    "lr": 1e-3,
    "last_layer_lr": 0.0,
    "wd": 0.04,
    "mom": 0.992,
    "teacher_temp": 0.04,
    "total_loss": 12.0,
    "dino_local_crops_loss": 7.0,
    "dino_global_crops_loss": 6.0,
    "koleo_loss": -0.5,
    "ibot_loss": 3.0,
    "backbone_grad_norm": 1.5,
    "dino_head_grad_norm": 0.3,
    "ibot_head_grad_norm": 0.02,
}


def write_metrics(directory: Path, records: list[dict[str, Any]], tail: str = "") -> Path:
    path = directory / "training_metrics.json"
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return path


def test_every_recorded_quantity_is_drawn_against_the_iteration() -> None:
    figure = draw_metrics([FULL | {"iteration": i, "total_loss": 12.0 - i} for i in (0, 10, 20)])
    panels = {axes.get_title(): axes for axes in figure.axes}
    assert list(panels) == [
        "total loss",
        "DINO, local crops",
        "DINO, global crops",
        "iBOT, masked patches",
        "KoLeo",
        "gradient norm",
        "learning rate",
        "EMA momentum",
        "teacher temperature",
        "weight decay",
    ]
    (line,) = panels["total loss"].lines
    assert list(line.get_xdata()) == [0, 10, 20]
    assert list(line.get_ydata()) == [12.0, 2.0, -8.0]
    drawn = {line.get_label(): line.get_ydata()[0] for line in panels["gradient norm"].lines}
    assert drawn == {"backbone": 1.5, "DINO head": 0.3, "iBOT head": 0.02}
    assert panels["gradient norm"].get_yscale() == "log"


def test_a_value_that_was_not_finite_leaves_a_gap() -> None:
    records = [{"iteration": i, "total_loss": value} for i, value in enumerate([3.0, None, 2.0, "?", True])]
    (line,) = draw_metrics(records).axes[0].lines
    assert [math.isnan(y) for y in line.get_ydata()] == [False, True, False, True, False]


def test_missing_and_all_null_quantities_have_no_panel(tmp_path: Path) -> None:
    write_metrics(
        tmp_path, [{"iteration": 0, "total_loss": 3.0, "koleo_loss": None}, {"iteration": 5, "ibot_loss": 1.0}]
    )
    figure = draw_metrics(read_metrics(tmp_path / "training_metrics.json"))
    assert [axes.get_title() for axes in figure.axes] == ["total loss", "iBOT, masked patches"]
    assert plot_losses(tmp_path).is_file()


@pytest.mark.parametrize(
    "record", [FULL | {"iteration": 0}, {"iteration": 0}, FULL | {"iteration": 0, "lr": 0, "backbone_grad_norm": 0}]
)
def test_one_line_is_enough(tmp_path: Path, record: dict[str, Any]) -> None:
    write_metrics(tmp_path, [record])
    path = plot_losses(tmp_path)
    assert path == tmp_path / "loss_curves.png"
    with Image.open(path) as image:
        assert image.width > 1000


def test_a_last_line_that_was_cut_off_is_ignored(tmp_path: Path) -> None:
    path = write_metrics(tmp_path, [{"iteration": 0}, {"iteration": 10}], tail='{"iteration": 20, "tot')
    assert [record["iteration"] for record in read_metrics(path)] == [0, 10]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("not json\n", "line 1"),
        ('{"iteration": 0}\n{broken\n{"iteration": 2}\n', "line 2"),
        ('{"step": 0}\n', "expected a JSON object with an `iteration`"),
        ("[1, 2]\n", "expected a JSON object"),
    ],
)
def test_a_malformed_file_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "training_metrics.json").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        plot_losses(tmp_path)
    assert "training_metrics.json" in str(caught.value)


def test_a_directory_without_metrics_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="training_metrics.json not found"):
        plot_losses(tmp_path)


def test_matplotlibs_global_state_is_left_alone(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    write_metrics(tmp_path, [FULL | {"iteration": 0}])
    plot_losses(tmp_path)
    assert dict(matplotlib.rcParams) == before


def test_the_command_prints_the_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_metrics(tmp_path, [FULL | {"iteration": 0}])
    main([str(tmp_path)])
    assert capsys.readouterr().out.strip() == str(tmp_path / "loss_curves.png")


@pytest.mark.parametrize("argv", [[], ["a", "b"], ["--help"]])
def test_the_command_wants_one_directory(argv: list[str]) -> None:
    with pytest.raises(ValueError, match="OUTPUT_DIR"):
        main(argv)


def write_results(run: Path, iteration: int, *path: str, text: str) -> None:
    file = run.joinpath("eval", f"training_{iteration}", *path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_evaluations_of_exported_teachers_are_drawn_against_their_iteration(tmp_path: Path) -> None:
    for iteration, score in ((9, 40), (100, 55.5), (19, 50)):
        write_results(tmp_path, iteration, "knn", "results-knn.csv", text=f"10 Top 1,20 Top 1\n{score},{score + 1}\n")
    write_results(tmp_path, 9, "results-depth.csv", text="rmse,split\n0.5,val\n")
    write_results(tmp_path, 9, "digits", "results-knn.csv", text="10 Top 1\n\n")
    (tmp_path / "eval" / "training_9.before-1").mkdir()
    evaluations = read_evaluations(tmp_path)
    assert evaluations == {
        "depth": {"rmse": {9: 0.5}},
        "knn": {"10 Top 1": {9: 40, 19: 50, 100: 55.5}, "20 Top 1": {9: 41, 19: 51, 100: 56.5}},
    }
    figure = draw_metrics([FULL | {"iteration": i} for i in (0, 10)], evaluations)
    panels = {axes.get_title(): axes for axes in figure.axes}
    drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in panels["knn"].lines}
    assert drawn["10 Top 1"] == ([9, 19, 100], [40, 50, 55.5])


def test_a_table_of_results_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    write_results(tmp_path, 9, "results-knn.csv", text="a,b\n1,2,3\n")
    with pytest.raises(ValueError, match=r"results-knn\.csv"):
        read_evaluations(tmp_path)


def test_scheduled_weights_of_losses_are_drawn() -> None:
    figure = draw_metrics([{"iteration": 0, "dino_local_loss_weight": 1.0, "gram_loss_weight": 2.0}])
    (axes,) = figure.axes
    assert axes.get_title() == "weights of losses"
    assert {line.get_label(): line.get_ydata()[0] for line in axes.lines} == {"DINO, local crops": 1.0, "Gram": 2.0}


def test_directory_of_several_students_names_theirs(tmp_path: Path) -> None:
    for student in ("vits16", "vitb16"):
        (tmp_path / student).mkdir()
        write_metrics(tmp_path / student, [FULL | {"iteration": 0}])
    with pytest.raises(
        FileNotFoundError, match=rf"give the directory of a student: {tmp_path}/vitb16, {tmp_path}/vits16"
    ):
        plot_losses(tmp_path)
