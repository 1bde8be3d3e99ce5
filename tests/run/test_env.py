from __future__ import annotations

import os
from pathlib import Path

import pytest

from dinov3.env import clean_env, set_triton_cache_dir


def test_job_launched_from_a_job_does_not_see_the_variables_of_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    of_the_job = {
        "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "8", "SUBMITIT_EXECUTOR": "slurm",
        "TORCHELASTIC_RUN_ID": "x", "RANK": "3", "MASTER_PORT": "1234", "TRITON_CACHE_DIR": "/node/cache",
    }  # fmt: skip
    of_the_user = {"SLURM_CONF": "/etc/slurm.conf", "SBATCH_ACCOUNT": "mine", "SUBMITIT_PREEMPT_SIGNAL": "USR1"}
    for name, value in (of_the_job | of_the_user).items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    with pytest.raises(KeyError), clean_env():
        assert not set(of_the_job) & set(os.environ)
        assert of_the_user.items() <= os.environ.items()
        os.environ["NEW"] = "1"
        raise KeyError
    assert dict(os.environ) == before


def test_outside_of_a_job_port_and_caches_are_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "1234")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/my/cache")
    monkeypatch.setenv("SLURM_JOB_ID", "7")  # a shell in an allocation
    with clean_env():
        assert (os.environ["MASTER_PORT"], os.environ["TRITON_CACHE_DIR"]) == ("1234", "/my/cache")
        assert "SLURM_JOB_ID" not in os.environ


def test_triton_cache_stays_where_it_was_set_and_is_local_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "mine"))
    set_triton_cache_dir()
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "mine") and (tmp_path / "mine").is_dir()
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "local"))
    set_triton_cache_dir()
    assert os.environ["TRITON_CACHE_DIR"].startswith(str(tmp_path / "local"))
