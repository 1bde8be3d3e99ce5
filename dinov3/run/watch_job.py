"""Waiting for a job: showing its log as it grows, its changes of state, and how it ended."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple, TextIO

POLL_S = 1.0
#: States that a Slurm job does not leave. A preempted job goes back to PENDING.
FINAL_STATES = ["BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"]
UNKNOWN = "UNKNOWN"
SIGNAL_STATUS = 128


class JobStatus(NamedTuple):
    """The state of a job.

    Attributes:
        state: as Slurm calls it.
        reason: why it is in that state, if Slurm says so.
        exit_status: as a shell would report it; meaningful in a final state.
    """

    state: str
    reason: str
    exit_status: int

    @property
    def is_final(self) -> bool:
        """Whether the job has ended and will not run again."""
        return self.state in FINAL_STATES


def watch_job(job: Any, cluster: str) -> int:
    """Show the log of a job's first task and the job's changes of state until it ends.

    Args:
        job: a job of submitit.
        cluster: `"slurm"` or `"local"`.

    Returns:
        The job's exit status: 0 if all its tasks succeeded.
    """
    tails = [_Tail(job.paths.stdout, sys.stdout), _Tail(job.paths.stderr, sys.stderr)]
    shown = ""
    while True:
        if cluster == "slurm":
            status = _slurm_status(job)
        else:
            status = _status_by_results(job) if job.done() else JobStatus("RUNNING", "", 0)
        for tail in tails:
            tail.show()
        description = f"{status.state}{f' ({status.reason})' if status.reason else ''}"
        if description != shown and status.state != UNKNOWN:
            print(f"job {job.job_id}: {description}", file=sys.stderr, flush=True)
            shown = description
        if status.is_final:
            break
        time.sleep(POLL_S)
    if status.exit_status != 0:
        for task, traceback in _failed_tasks(job).items():
            why = f"failed: {traceback.strip().splitlines()[-1]}" if traceback else "was killed"
            print(f"task {task.task_id} {why} (see {task.paths.stderr})", file=sys.stderr)
    return status.exit_status


class _Tail:
    """Copies what is appended to a file."""

    def __init__(self, path: Path, stream: TextIO) -> None:
        self.path = path
        self.stream = stream
        self.position = 0

    def show(self) -> None:
        try:
            with self.path.open("rb") as file:
                file.seek(self.position)
                new = file.read()
        except OSError:
            return  # not there yet
        self.position += len(new)
        self.stream.write(new.decode(errors="replace"))
        self.stream.flush()


def _slurm_status(job: Any) -> JobStatus:
    # submitit asks sacct, but many clusters have no accounting, and then a killed job would never seem to end.
    command = ["scontrol", "show", "job", "--oneliner", job.job_id]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        return JobStatus(UNKNOWN, "", 0)  # the controller is busy; ask again
    if "Invalid job id" in done.stderr:
        return _status_by_results(job)  # Slurm forgets a job some minutes after its end
    fields = dict(field.split("=", 1) for field in done.stdout.split() if "=" in field)
    state = fields.get("JobState", UNKNOWN)
    reason = fields.get("Reason", "None")
    code, _, number = fields.get("ExitCode", "0:0").partition(":")
    exit_status = int(code) or (SIGNAL_STATUS + int(number) if int(number or 0) else 0)
    if exit_status == 0 and state != "COMPLETED":
        exit_status = 1
    return JobStatus(state, "" if reason == "None" else reason, exit_status)


def _status_by_results(job: Any) -> JobStatus:
    return JobStatus("FAILED", "", 1) if _failed_tasks(job) else JobStatus("COMPLETED", "", 0)


def _failed_tasks(job: Any) -> dict[Any, str]:
    # The tasks that failed or did not finish, and their tracebacks.
    outcomes = {task: _outcome(task) for task in (job.task(index) for index in range(job.num_tasks))}
    return {task: traceback for task, (word, traceback) in outcomes.items() if word != "success"}


def _outcome(task: Any) -> tuple[str, str]:
    # submitit leaves ("success", what the script returned) or ("error", traceback).
    try:
        word, content = pickle.loads(task.paths.result_pickle.read_bytes())
    except FileNotFoundError:
        return "ended", ""
    except Exception:
        return "success", ""  # a traceback is text, so this is an object that the script returned
    return str(word), content if word == "error" else ""
