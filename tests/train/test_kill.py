"""The kill test in short; `python -m tests.train.kill_test` is the long one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    "options", [[], ["checkpointing.async_save=true", "train.grad_accumulation_steps=2"]], ids=["plain", "async"]
)
def test_run_that_is_killed_again_and_again_ends_like_an_undisturbed_one(options: list[str]) -> None:
    # In an interpreter of its own, because it forks.
    done = subprocess.run(
        [sys.executable, "-m", "tests.train.kill_test", "--kills", "2", "--terms", "1", *options],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    assert "2 kills" in done.stdout and "bit for bit the undisturbed run" in done.stdout
