"""The kill test in short; `python -m tests.train.kill_test` is the long one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.multiprocess import launch

from . import kill_test


@pytest.mark.slow
@pytest.mark.distributed
def test_run_that_is_killed_again_and_again_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    # In a process of its own, because it forks.
    options = ["checkpointing.async_save=true", "train.grad_accumulation_steps=2"]
    output = tmp_path / "said.txt"
    launch(kill_test.main, 1, ["--kills", "2", "--terms", "1", *options], output=output)
    assert "2 kills" in output.read_text() and "bit for bit the undisturbed run" in output.read_text()
