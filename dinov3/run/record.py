"""What is written down about a job when it is submitted: command, working directory, and the state of the code."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dinov3.utils import get_sha

GIT_TIMEOUT_S = 60


class LaunchRecord:
    """The state of things when a job is submitted; take it before, write it when the job has its id.

    Args:
        script: the Python file of the job; its checkout is the one that is recorded.
        command: the launcher's arguments.
        details: what else to record.
    """

    def __init__(self, script: Path, command: Sequence[str], details: Mapping[str, Any]) -> None:
        self.patch = _git(script.parent, "diff", "HEAD") or ""
        self.content = {
            "submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "host": socket.gethostname(),
            "python": sys.executable,
            "working_directory": os.getcwd(),
            "command": shlex.join(["python", "-m", "dinov3.run.submit", *command]),
            "git": _git_state(script.parent),
            "dinov3": get_sha(),
            **details,
        }

    def write(self, folder: Path, job_id: str) -> Path:
        """Write `<job id>_launch.json`, and what was not committed to `<job id>_uncommitted.patch`.

        Returns:
            The path of the first.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{job_id}_launch.json"
        path.write_text(json.dumps({"job_id": job_id, **self.content}, indent=2) + "\n", encoding="utf-8")
        if self.patch:
            (folder / f"{job_id}_uncommitted.patch").write_text(self.patch, encoding="utf-8")
        return path


def _git_state(directory: Path) -> dict[str, Any] | None:
    head = _git(directory, "rev-parse", "HEAD", "--show-toplevel")
    if head is None:
        return None
    commit, checkout = head.splitlines()
    return {
        "checkout": checkout,
        "commit": commit,
        "branch": (_git(directory, "rev-parse", "--abbrev-ref", "HEAD") or "").strip(),
        "status": (_git(directory, "status", "--porcelain") or "").splitlines(),
    }


def _git(directory: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(directory), *arguments]
    try:
        done = subprocess.run(command, check=True, capture_output=True, timeout=GIT_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace")
