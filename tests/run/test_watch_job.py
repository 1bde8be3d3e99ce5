from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from dinov3.run import watch_job


class Task:
    """As much of a submitit job as is looked at."""

    def __init__(self, directory: Path, job_id: str = "7", index: int = 0) -> None:
        self.job_id, self.task_id, self.num_tasks, self.directory = job_id, index, 2, directory
        self.paths = self
        self.stdout, self.stderr = directory / f"{index}.out", directory / f"{index}.err"
        self.result_pickle = directory / f"{index}.pkl"

    def task(self, index: int) -> Task:
        return Task(self.directory, self.job_id, index)

    def finish(self, *outcome: Any) -> None:
        self.result_pickle.write_bytes(pickle.dumps(outcome))


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    monkeypatch.setattr(watch_job, "POLL_S", 0.01)
    return Task(tmp_path)


def answer_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *answers: str) -> None:
    """A `scontrol` that gives these answers in turn, the last one for ever."""
    for index, answer in enumerate(answers):
        (tmp_path / f"answer{index}").write_text(answer)
    (tmp_path / "count").write_text("0")
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        f"#!/bin/sh\ncd {tmp_path}\nn=$(cat count)\ncat answer$n\n"
        f"test $n -lt {len(answers) - 1} && echo $((n + 1)) > count\nexit 0\n"
    )
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")


def test_requeued_job_is_waited_for(
    job: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    states = ("PENDING Reason=Resources", "RUNNING Reason=None", "PENDING Reason=BeginTime", "COMPLETED Reason=None")
    answer_with(tmp_path, monkeypatch, *(f"JobId=7 JobState={state} ExitCode=0:0" for state in states))
    job.stdout.write_text("a line\n")
    job.stderr.write_text("a warning\n")
    for index in range(2):
        job.task(index).finish("success", None)
    assert watch_job.watch_job(job, "slurm") == 0
    captured = capsys.readouterr()
    assert captured.out == "a line\n"
    assert captured.err == (
        "a warning\njob 7: PENDING (Resources)\njob 7: RUNNING\njob 7: PENDING (BeginTime)\njob 7: COMPLETED\n"
    )


@pytest.mark.parametrize(
    "state, exit_code, expected",
    [("FAILED", "3:0", 3), ("CANCELLED", "0:15", 143), ("TIMEOUT", "0:0", 1), ("COMPLETED", "0:0", 0)],
)
def test_exit_status_is_that_of_the_job(
    state: str, exit_code: str, expected: int, job: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_with(tmp_path, monkeypatch, f"JobId=7 JobState={state} Reason=None ExitCode={exit_code}")
    assert watch_job.watch_job(job, "slurm") == expected


def test_failed_tasks_are_named_with_their_error(
    job: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer_with(tmp_path, monkeypatch, "JobId=7 JobState=FAILED Reason=NonZeroExitCode ExitCode=1:0")
    job.task(1).finish("error", "Traceback ...\nValueError: the reason\n")
    assert watch_job.watch_job(job, "slurm") == 1
    said = capsys.readouterr().err
    assert f"task 1 failed: ValueError: the reason (see {tmp_path}/1.err)" in said
    assert "task 0 was killed" in said


def test_job_that_slurm_has_forgotten_is_judged_by_its_results(
    job: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_with(tmp_path, monkeypatch, "")
    (tmp_path / "scontrol").write_text(
        "#!/bin/sh\necho 'slurm_load_jobs error: Invalid job id specified' >&2\nexit 1\n"
    )
    job.task(0).finish("success", None)
    assert watch_job.watch_job(job, "slurm") == 1
    job.task(1).finish("success", None)
    assert watch_job.watch_job(job, "slurm") == 0
