"""One process of a training dies: the other ends within a minute and says why."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from dinov3 import distributed
from dinov3.run.init import job_context
from dinov3.train import main, rank_failure
from dinov3.utils.command_line import run_command_line
from tests.multiprocess import start, torchrun_variables

KINDS = ("raises", "killed", "raises, and the other hangs")


def work(kind: str, output: Path) -> None:
    """Work together until rank 1 fails, as a training does."""
    rank_failure.GRACE_SECONDS = 2.0

    def run() -> None:
        with job_context(output_dir=str(output)), rank_failure.ending_together(output):
            distributed.all_reduce(torch.ones(1))
            if distributed.get_rank() == 1:
                if kind == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise ArithmeticError("the wheel is broken")
            if kind == "raises, and the other hangs":
                time.sleep(100)
            distributed.all_reduce(torch.ones(1))

    run_command_line(run)


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[int | None]]]:
    """The directories of all cases, and the exit codes of both ranks."""
    root = tmp_path_factory.mktemp("rank-failure")
    ranks = {
        kind: [
            start(work, kind, root / kind, output=root / f"{kind}.{rank}.txt", variables=variables)
            for rank, variables in enumerate(torchrun_variables(2))
        ]
        for kind in KINDS
    }
    for process in (process for of_kind in ranks.values() for process in of_kind):
        process.join(90)
    codes = {kind: [process.exitcode for process in of_kind] for kind, of_kind in ranks.items()}
    for process in (process for of_kind in ranks.values() for process in of_kind):
        process.kill()
    return root, codes


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_other_rank_ends_with_the_error_of_the_one_that_died(
    ends: tuple[Path, dict[str, list[int | None]]], kind: str
) -> None:
    root, codes = ends
    assert codes[kind] == [1, -9 if kind == "killed" else 1]
    logs = root / kind / "logs"
    said = (root / f"{kind}.0.txt").read_text() + (logs / "log.txt").read_text()
    if kind == "killed":
        assert "Another process of this training is gone without an error message" in said
        assert not (logs / "error.rank1.txt").exists()
        return
    assert "rank 1 failed: ArithmeticError: the wheel is broken" in said
    assert "the wheel is broken" in (logs / "error.rank1.txt").read_text()
    assert "Traceback" in (logs / "log.txt.rank1").read_text()


def test_trainings_end_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class EnteredError(Exception):
        pass

    @contextmanager
    def enter(output_dir: Path) -> Iterator[None]:
        raise EnteredError(output_dir)
        yield

    monkeypatch.setattr("dinov3.train.train.ending_together", enter)
    with pytest.raises(EnteredError, match=str(tmp_path)):
        main(["--output-dir", str(tmp_path)])


def test_first_error_that_is_not_the_loss_of_another_counts(tmp_path: Path) -> None:
    (tmp_path / "error.rank0.txt").write_text("Traceback\ndinov3.train.rank_failure.LostRankError: rank 2 failed\n")
    (tmp_path / "error.rank2.txt").write_text("Traceback\nValueError: bad crop\n")
    assert "rank 2 failed: ValueError: bad crop" in rank_failure._explain(tmp_path)


def test_old_errors_go_when_a_run_starts(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "error.rank0.txt").touch()
    with rank_failure.ending_together(tmp_path):
        assert list((tmp_path / "logs").iterdir()) == []
