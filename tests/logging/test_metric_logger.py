from __future__ import annotations

import io
import itertools
import json
import logging
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dinov3.logging import MetricLogger, SmoothedValue, truncate_metrics_file
from tests.multiprocess import run_ranks


def read_lines(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_empty_series_is_nan() -> None:
    meter = SmoothedValue()
    assert all(math.isnan(v) for v in (meter.median, meter.avg, meter.max, meter.value, meter.global_avg))


def test_weights_count_in_the_global_average_only() -> None:
    meter = SmoothedValue(window_size=2)
    for value, num in ((1.0, 1), (2.0, 3), (6.0, 1)):
        meter.update(value, num)
    assert meter.global_avg == pytest.approx(13 / 5) and meter.avg == 4 and meter.median == 2 and meter.max == 6


def test_nan_in_the_window_shows_in_its_statistics() -> None:
    meter = SmoothedValue()
    for value in (1.0, math.nan, 3.0):
        meter.update(value)
    assert math.isnan(meter.median) and math.isnan(meter.avg) and math.isnan(meter.max) and meter.value == 3


def test_update_takes_numbers_of_all_kinds() -> None:
    metrics = MetricLogger()
    metrics.update(a=np.float32(0.5), b=np.int64(3), c=np.bool_(True), d=True, e=2, f=torch.tensor([[4]]))
    metrics.update(a=torch.tensor(1.5, dtype=torch.bfloat16, requires_grad=True), b=np.array([5]))
    assert (metrics.a.value, metrics.b.value, metrics.c.value, metrics.d.value) == (1.5, 5, 1, 1)
    assert (metrics.e.value, metrics.f.value, metrics.a.median) == (2, 4, 0.5)
    for wrong in ("0.5", None, torch.ones(2), [1.0]):
        with pytest.raises(TypeError, match="'x'"):
            metrics.update(x=wrong)
    with pytest.raises(AttributeError, match="no_such_meter"):
        _ = metrics.no_such_meter


def test_update_does_not_wait_for_the_device_but_remembers_the_value_of_the_moment() -> None:
    metrics = MetricLogger()
    loss = torch.tensor(1.0)
    waits: list[str] = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "local_scalar" in str(func) or "_to_copy" in str(func):
                waits.append(str(func))
            return func(*args, **(kwargs or {}))

    with Spy():
        for _ in range(30):
            metrics.update(loss=loss)
            loss += 1
    assert waits == []
    assert metrics.loss.value == 30 and metrics.loss.global_avg == 15.5


def test_unread_series_does_not_grow_without_end() -> None:
    meter = SmoothedValue()
    for i in range(2500):
        meter.update(i)
    assert len(meter._pending) < 1001
    assert meter.global_avg == pytest.approx(2499 / 2)


def test_lines_come_at_multiples_and_at_the_last_iteration(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    metrics = MetricLogger(delimiter="  ", output_file=tmp_path / "sub" / "metrics.json")
    with caplog.at_level(logging.INFO, logger="dinov3"):
        for i in metrics.log_every(range(100), 10, header="Training", n_iterations=26, start_iteration=3):
            metrics.update(loss=i)
    lines = read_lines(tmp_path / "sub" / "metrics.json")
    assert [line["iteration"] for line in lines] == [10, 20, 25]
    assert list(lines[0]) == ["iteration", "iter_time", "data_time", "loss"]
    assert metrics.latest == lines[-1]
    assert "nonfinite" not in lines[0]
    assert metrics.loss.global_avg == 11  # 0..22: items are counted from the iterable, not from the iteration
    assert re.match(
        r"Training  \[10/26\]  eta: 0:00:00  loss: 3\.0000 \(3\.5000\)  time: 0\.\d{4}  data: 0\.\d{4}  max mem: \d+$",
        caplog.messages[0],
    )


def test_no_batch_is_fetched_after_the_last() -> None:
    fetched: list[int] = []

    def batches() -> Iterator[int]:
        for i in itertools.count():
            fetched.append(i)
            yield i

    assert list(MetricLogger().log_every(batches(), 10, n_iterations=5, start_iteration=2)) == [0, 1, 2]
    assert fetched == [0, 1, 2]
    assert list(MetricLogger().log_every(batches(), 10, n_iterations=2, start_iteration=2)) == []
    assert len(fetched) == 3


def test_iterable_of_known_and_of_unknown_length_ends(tmp_path: Path) -> None:
    for items, last in (([5, 6, 7], [0, 2]), (iter([5, 6, 7]), [0])):
        path = tmp_path / f"{len(last)}.json"
        assert list(MetricLogger(output_file=path).log_every(items, 10)) == [5, 6, 7]
        assert [line["iteration"] for line in read_lines(path)] == last


def test_numbers_that_are_not_finite_are_null_and_named(tmp_path: Path) -> None:
    metrics = MetricLogger(output_file=tmp_path / "m.json")
    for i in metrics.log_every(range(2), 1):
        metrics.update(good=1, bad=torch.tensor(math.nan) if i else 0.0, worse=-math.inf)
    first, second = read_lines(tmp_path / "m.json")
    assert first["nonfinite"] == ["worse"] and first["bad"] == 0
    assert second["nonfinite"] == ["bad", "worse"] and second["bad"] is None and second["good"] == 1


def test_resumed_series_continue_exactly(tmp_path: Path) -> None:
    values = torch.rand(50, generator=torch.Generator().manual_seed(0))
    whole, first, second = (MetricLogger() for _ in range(3))
    for i, value in enumerate(values):
        whole.update(loss=value, lr=i)
        (first if i < 30 else second).update(loss=value, lr=i)
        if i == 29:
            second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.state_dict() == whole.state_dict()
    assert str(second) == str(whole)


def test_truncated_file_keeps_earlier_lines_only(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    truncate_metrics_file(path, 3)
    assert not path.exists()
    path.write_text(
        "".join(json.dumps({"iteration": i, "loss": i / 3}) + "\n" for i in range(6)) + '{"iteration": 2, "lo'
    )
    truncate_metrics_file(path, 4)
    assert read_lines(path) == [{"iteration": i, "loss": i / 3} for i in range(4)]
    truncate_metrics_file(path, 0)
    assert path.read_text() == ""
    assert list(tmp_path.iterdir()) == [path]


def test_tensorboard_has_the_same_numbers_at_the_same_iterations(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = MetricLogger(output_file=tmp_path / "m.json", tensorboard_dir=tmp_path / "tb")
    for i in metrics.log_every(range(7), 3, start_iteration=1):
        metrics.update(total_loss=1 / (i + 1))
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    lines = read_lines(tmp_path / "m.json")
    assert [line["iteration"] for line in lines] == [3, 6, 7]
    for name in ("total_loss", "iter_time", "data_time"):
        scalars = events.Scalars(name)
        assert [s.step for s in scalars] == [3, 6, 7]
        assert [s.value for s in scalars] == pytest.approx([line[name] for line in lines], rel=1e-6)


def test_no_bar_is_drawn_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    list(MetricLogger().log_every(range(3), 1))
    assert capsys.readouterr().err == ""
    list(MetricLogger().log_every(range(3), 1, progress=True))
    assert "3/3" in capsys.readouterr().err


def log_and_synchronize(rank: int, world_size: int, directory: str) -> dict[str, float]:
    sys.stderr = io.StringIO()
    metrics = MetricLogger(output_file=f"{directory}/metrics.json", tensorboard_dir=f"{directory}/tb")
    for i in metrics.log_every(range(2 + rank), 1, progress=True):
        metrics.update(loss=10 * rank + i)
    metrics.synchronize_between_processes()
    has_bar = "it/s" in sys.stderr.getvalue()
    return {"global": metrics.loss.global_avg, "window": metrics.loss.avg, "has_bar": has_bar}


@pytest.mark.distributed
def test_two_processes_average_together_and_write_once(tmp_path: Path) -> None:
    first, second = run_ranks(log_and_synchronize, 2, str(tmp_path))
    expected = (0 + 1 + 10 + 11 + 12) / 5
    assert first["global"] == second["global"] == pytest.approx(expected)
    assert (first["window"], second["window"]) == (0.5, 11)
    assert first["has_bar"] and not second["has_bar"]
    assert [line["loss"] for line in read_lines(tmp_path / "metrics.json")] == [0, 0]
    assert len(list((tmp_path / "tb").iterdir())) == 1
