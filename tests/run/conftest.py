"""Launching in tests: without the settings of whoever runs them, and without the cluster that they may sit on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dinov3.env import JOB_PREFIXES, RANK_VARIABLES
from dinov3.run.arguments import get_submitit_parser


@pytest.fixture(autouse=True)
def settings_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the user's settings would be; there are none yet."""
    for name in list(os.environ):
        if name.startswith(JOB_PREFIXES) or name in RANK_VARIABLES:
            monkeypatch.delenv(name)
    for option in get_submitit_parser()._actions:
        monkeypatch.delenv(f"DINOV3_{option.dest.upper()}", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr("dinov3.run.arguments.slurm_answers", lambda: False)
    path = tmp_path / "config" / "dinov3" / "cluster.yaml"
    path.parent.mkdir(parents=True)
    return path
