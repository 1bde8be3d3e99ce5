"""Progress on terminals and in logs."""

from __future__ import annotations

import io
import os
from typing import Any

import pytest
import torch

from dinov3 import distributed
from dinov3.eval.classification.log_regression_config import Solver, TrainConfig
from dinov3.eval.classification.log_regression_module import sweep_C_values
from dinov3.eval.classification.metrics import ClassificationMetricType, build_classification_metric
from dinov3.eval.command import progress
from dinov3.eval.command.progress import Progress, track

from .. import linear_toy, toy


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def use_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal in place of standard error. To be called in the test: pytest sets its own before."""
    shown = Terminal()
    monkeypatch.setattr("sys.stderr", shown)
    return shown


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in its only element."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_terminal_shows_a_bar_with_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = use_terminal(monkeypatch)
    assert list(track(range(3), "features")) == [0, 1, 2]
    last = terminal.getvalue().split("\r")[-1]
    assert last.startswith("features: 100%") and "3/3" in last and "<00:00" in last


def test_log_tells_the_time_left_every_half_minute(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="dinov3"), Progress("search", 10, unit="C") as bar:
        for seconds in (10.0, 29.0, 31.0, 40.0, 62.0):
            clock[0] = seconds
            bar.advance(note=f"iteration {seconds:.0f}")
    assert [record.getMessage() for record in caplog.records] == [
        "search: C 3 of 10, iteration 31, about 0:01:12 left",
        "search: C 5 of 10, iteration 62, about 0:01:02 left",
    ]


def test_what_was_done_before_does_not_count_for_the_time_left(clock: list[float]) -> None:
    bar = Progress("training", 100, unit="step", initial=80)
    assert str(bar) == "training: step 80 of 100"
    clock[0] = 10.0
    bar.advance(10)
    assert str(bar) == "training: step 90 of 100, about 0:00:10 left"


def test_end_that_is_not_known_has_no_time_left(clock: list[float]) -> None:
    bar = Progress("images", None)
    clock[0] = 10.0
    bar.advance(3)
    assert str(bar) == "images: batch 3"


def test_other_processes_show_nothing(
    clock: list[float], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = use_terminal(monkeypatch)
    monkeypatch.setattr(distributed, "is_main_process", lambda: False)
    with caplog.at_level("INFO", logger="dinov3"), Progress("search", 2) as bar:
        clock[0] = 100.0
        bar.advance()
    assert terminal.getvalue() == "" and not caplog.records


def test_bar_ends_when_the_work_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = use_terminal(monkeypatch)

    def work() -> None:
        for _ in track(range(3), "features"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert terminal.getvalue().endswith("\n")


def sweep(solver: Solver) -> Any:
    dataset = toy.Vectors("train", 60)
    labels = torch.as_tensor(dataset.labels)
    return sweep_C_values(
        train_features=dataset.samples,
        train_labels=labels,
        val_features=dataset.samples,
        val_labels=labels,
        val_metric=build_classification_metric(ClassificationMetricType.MEAN_ACCURACY, num_classes=6),
        train_config=TrainConfig(dataset="", solver=solver, max_train_iters=30),
    )


@pytest.mark.parametrize("solver", [Solver.TORCH, Solver.SKLEARN])
def test_sweep_counts_the_values_of_C(solver: Solver, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = use_terminal(monkeypatch)
    assert len(sweep(solver).Cs) == 45
    last = terminal.getvalue().split("\r")[-1]
    assert last.startswith("sweep of C: 100%") and "45/45" in last
    assert ("iteration" in last) is (solver is Solver.TORCH)


def test_every_part_of_an_evaluation_shows_progress(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = use_terminal(monkeypatch)
    toy.use_vectors(monkeypatch)
    toy.run(toy.make_config(tmp_path / "knn"))
    linear_toy.use_images(monkeypatch)
    linear_toy.run(linear_toy.make_config(tmp_path / "kept", train__augment=False))
    linear_toy.run(linear_toy.make_config(tmp_path / "streamed", train__memory_budget_mb=1e-6))
    shown = terminal.getvalue()
    for part in (
        "training features",
        "test features",
        "nearest neighbours",
        "training:",
        "evaluation features",
        "evaluation:",
    ):
        assert f"{part.rstrip(':')}: 100%" in shown, part
    assert "of the first classifier" in shown


def test_terminal_without_a_size_shows_the_bar_too(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = use_terminal(monkeypatch)
    monkeypatch.setattr(terminal, "fileno", lambda: 2, raising=False)
    monkeypatch.setattr(os, "get_terminal_size", lambda file: os.terminal_size((0, 0)))
    assert len(list(track(range(3), "features"))) == 3
    assert "3/3" in terminal.getvalue()
