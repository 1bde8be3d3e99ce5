"""The loop that trains heads, on a head of one number."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinov3.data.fingerprint import DataFingerprint
from dinov3.eval.training.checkpoints import Checkpoints, load_checkpoint, save_checkpoint
from dinov3.eval.training.loop import (
    METRICS_FILENAME,
    HeadTraining,
    TrainingResult,
    apply_gradients,
    better_by,
    train_head,
)
from dinov3.utils.weight_files import WeightsError

N_STEPS = 6


class Task:
    """Least squares with noise that is drawn in each step.

    Args:
        bad_step: whose loss is NaN.
    """

    def __init__(self, *, lr: float = 0.1, bad_step: int = -1, data: DataFingerprint | None = None) -> None:
        self.head = nn.Linear(1, 1)
        nn.init.constant_(self.head.weight, 3.0)
        nn.init.zeros_(self.head.bias)
        self.optimizer = torch.optim.AdamW(self.head.parameters(), lr=lr)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 3, 0.5)
        self.bad_step = bad_step
        self.lr = lr
        self.data = data
        self.n_calls = 0
        self.first = 0
        self.modes: list[bool] = []

    def batches(self, first: int) -> Iterator[Tensor]:
        number = first
        while True:
            yield torch.full((1, 1), float(number + 1))
            number += 1

    def step(self, batch: Tensor, iteration: int) -> Tensor:
        self.n_calls += 1
        self.modes.append(self.head.training)
        loss = (self.head(batch) + torch.randn(())).square().mean()
        if iteration == self.bad_step:
            loss = loss * float("nan")
        loss = apply_gradients(loss, self.optimizer, clip=float("inf"), iteration=iteration)
        self.scheduler.step()
        return loss

    def evaluate(self, n_steps: int) -> dict[str, float]:
        assert n_steps == len(self.modes) + self.first
        assert not self.head.training
        return {"weight": self.head.weight.item()}

    def start(self, first: int) -> None:
        self.first = first

    def run(self, directory: Path, total_iter: int = N_STEPS, **options: Any) -> TrainingResult:
        training = HeadTraining(
            head=self.head,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            checkpoints=Checkpoints(directory),
            settings={"lr": self.lr},
            make_batches=self.batches,
            step=self.step,
            evaluate=self.evaluate,
            is_better=lambda one, other: one["weight"] < other["weight"],
            prefix="head.",
            more_state={"calls": (lambda: self.n_calls, lambda value: setattr(self, "n_calls", value))},
            on_start=self.start,
            metrics_file=directory / METRICS_FILENAME,
            data=self.data,
        )
        options = {"eval_interval": 2, "seed": 0} | options
        return train_head(training, total_iter=total_iter, **options)


def weights(directory: Path, name: str = "model_final.pth") -> dict[str, Tensor]:
    return load_checkpoint(directory / name)[0]["model"]


def test_validations_come_with_checkpoints_and_at_the_end(tmp_path: Path) -> None:
    task = Task()
    result = task.run(tmp_path, 5)
    assert {path.name for path in tmp_path.glob("*.pth")} == {
        "model_00000002.pth",
        "model_00000004.pth",
        "model_00000005.pth",
        "model_final.pth",
        "best.pth",
    }
    assert (result.iteration, result.best_iteration) == (5, 5)
    assert all(task.modes)


@pytest.mark.parametrize("killed_after", [2, 4])
def test_a_resumed_training_is_the_undisturbed_one(killed_after: int, tmp_path: Path) -> None:
    task = Task()
    want = task.run(tmp_path / "whole")
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir(exist_ok=True)
    source = tmp_path / "whole" / f"model_{killed_after:08d}.pth"
    (tmp_path / "killed" / source.name).write_bytes(source.read_bytes())
    # What was recorded after the checkpoint is dropped, and a line that the kill cut short.
    record = (tmp_path / "whole" / "training_metrics.json").read_text()
    (tmp_path / "killed" / "training_metrics.json").write_text(record + '{"iterat')
    resumed = Task()
    assert resumed.run(tmp_path / "killed") == want
    assert all(torch.equal(weights(tmp_path / "killed")[n], entry) for n, entry in weights(tmp_path / "whole").items())
    assert resumed.n_calls == task.n_calls == N_STEPS
    assert (tmp_path / "killed" / "training_metrics.json").read_text() == record


def test_another_seed_draws_another_training(tmp_path: Path) -> None:
    for seed in (0, 1):
        Task().run(tmp_path / str(seed), seed=seed)
    assert not torch.equal(weights(tmp_path / "0")["head.weight"], weights(tmp_path / "1")["head.weight"])


def test_a_loss_that_is_not_finite_is_never_applied(tmp_path: Path) -> None:
    task = Task(bad_step=3)
    with pytest.raises(RuntimeError, match="the loss of step 3 is nan"):
        task.run(tmp_path)
    assert all(bool(entry.isfinite().all()) for entry in task.head.state_dict().values())
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == ["best.pth", "model_00000002.pth"]


def test_a_finished_training_is_left_alone(tmp_path: Path) -> None:
    want = Task().run(tmp_path)
    task = Task()
    assert task.run(tmp_path) == want
    assert not task.modes
    assert torch.equal(task.head.weight.detach(), weights(tmp_path)["head.weight"])


def test_a_training_with_other_settings_is_not_continued(tmp_path: Path) -> None:
    Task().run(tmp_path, 2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"other settings \(lr: 0.1, now 0.2\)"):
        Task(lr=0.2).run(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_training_on_data_that_changed_is_continued_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Task(data=DataFingerprint(12, "a")).run(tmp_path, 2)
    Task(data=DataFingerprint(12, "a")).run(tmp_path, 3)
    assert "before" not in caplog.text
    (tmp_path / "model_final.pth").unlink()
    assert Task(data=DataFingerprint(13, "b")).run(tmp_path, 4).iteration == 4
    assert "12 training images before, 13 now" in caplog.text


def test_a_training_of_more_steps_is_not_continued(tmp_path: Path) -> None:
    task = Task()
    task.step(torch.ones(1, 1), 0)
    save_checkpoint(tmp_path, 3, task.head, task.optimizer)
    with pytest.raises(ValueError, match="has 3 steps, more than the 2 asked for: choose another output_dir"):
        task.run(tmp_path, 2)


def test_a_checkpoint_of_another_head_is_not_continued(tmp_path: Path) -> None:
    other = nn.Linear(1, 2)
    save_checkpoint(tmp_path, 3, other, torch.optim.AdamW(other.parameters()))
    with pytest.raises(WeightsError, match=r"model_00000003\.pth does not fit the head: .*size mismatch"):
        Task().run(tmp_path)


def test_files_without_a_schedule_are_continued_at_their_place_in_it(tmp_path: Path) -> None:
    earlier = Task()
    for _ in range(3):
        earlier.step(torch.ones(1, 1), 0)
    save_checkpoint(tmp_path, 3, earlier.head, earlier.optimizer)
    task = Task()
    assert task.run(tmp_path, 4).iteration == 4
    assert len(task.modes) == 1
    assert task.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5)  # halved every third step


def test_a_task_may_save_more_often_than_it_evaluates_and_leave_out_the_end(tmp_path: Path) -> None:
    result = Task().run(tmp_path, 6, eval_interval=3, save_interval=2, evaluate_at_end=False)
    numbered = sorted(path.name for path in tmp_path.glob("model_0*.pth"))
    assert numbered == [f"model_{n:08d}.pth" for n in (2, 3, 4, 6)]
    assert load_checkpoint(tmp_path / "best.pth")[1] == result.best_iteration == 3


def test_everything_beats_nan_and_equal_metrics_do_not_beat_each_other() -> None:
    nan, low, high = {"m": float("nan")}, {"m": 1.0}, {"m": 2.0}
    higher, lower = better_by("m"), better_by("m", lower_is_better=True)
    assert higher(high, low) and lower(low, high) and higher(low, nan) and lower(high, nan)
    assert not (higher(low, high) or lower(high, low) or higher(low, low) or lower(low, low) or higher(nan, low))


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    Task().run(tmp_path, 2)
    path = tmp_path / "model_final.pth"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(WeightsError, match=r"model_final\.pth is truncated"):
        Task().run(tmp_path)


def test_the_record_holds_losses_rates_and_validations(tmp_path: Path) -> None:
    Task().run(tmp_path, 4)
    lines = [json.loads(line) for line in (tmp_path / "training_metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [2, 4, 4]
    assert [set(line) - {"iteration"} for line in lines] == [{"validation"}, {"loss", "lr"}, {"validation"}]


def test_gradients_are_clipped() -> None:
    head = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0)
    before = torch.cat([parameter.detach().flatten() for parameter in head.parameters()])
    apply_gradients(1000 * head(torch.ones(1, 1)).sum(), optimizer, clip=0.5, iteration=0)
    after = torch.cat([parameter.detach().flatten() for parameter in head.parameters()])
    assert (after - before).norm().item() == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("options", [{"total_iter": 0}, {"eval_interval": 0}, {"save_interval": 0}])
def test_lengths_of_nothing_are_refused(options: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        Task().run(tmp_path, **options)
