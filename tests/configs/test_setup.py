"""Set-up of a job: directory, configuration file, seeds, log, process group, and back."""

from __future__ import annotations

import logging
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from dinov3 import configs, distributed
from dinov3.configs import ConfigError, DinoV3SetupArgs, exit_job, setup_config, setup_job, write_config
from dinov3.run.init import job_context
from tests.multiprocess import run_ranks


@pytest.fixture(autouse=True)
def restored_generators() -> object:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


def args(output_dir: Path, *opts: str) -> DinoV3SetupArgs:
    return DinoV3SetupArgs("", output_dir=output_dir, opts=list(opts))


def test_file_holds_the_settings_before_scaling_and_starts_the_same_run(tmp_path: Path) -> None:
    cfg = setup_config(args(tmp_path / "run", "optim.lr=1e-3", "train.batch_size_per_gpu=16"))
    assert cfg.optim.lr == pytest.approx(1e-3 * 4 * (16 / 1024) ** 0.5)
    file = tmp_path / "run" / "config.yaml"
    assert OmegaConf.load(file).optim.lr == 1e-3
    assert OmegaConf.load(file).train.output_dir == str((tmp_path / "run").resolve())
    again = setup_config(DinoV3SetupArgs(file, output_dir=tmp_path / "run"))
    assert again == cfg
    assert os.listdir(tmp_path / "run") == ["config.yaml"]


def test_run_that_cannot_be_trained_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dino.koleo_topk"):
        setup_config(args(tmp_path / "run", "dino.koleo_topk=2"))
    assert not (tmp_path / "run").exists()


def test_unknown_keys_warn_if_not_strict_but_cannot_be_trained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="option 'optim.learning_rate=1'"):
        setup_config(args(tmp_path, "optim.learning_rate=1"))


def test_remarks_and_settings_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        setup_config(args(tmp_path, "crops.local_crops_size=100"))
    assert "of 100 pixels the last 4 rows" in caplog.text
    assert "head_n_prototypes: 65536" in caplog.text
    assert "learning rate 0.001 = 0.001 x 1 (sqrt_wrt_1024)" in caplog.text


def test_written_file_is_complete_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_config(OmegaConf.create({"a": 1}), tmp_path, name="mine.yaml")
    assert path == str(tmp_path / "mine.yaml")
    assert Path(path).read_text() == "a: 1\n"
    assert Path(path).stat().st_mode & 0o044 == 0o044 & ~_umask()

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RuntimeError, match=r"cannot write .*mine.yaml: No space left on device for .* has .* GiB free"):
        write_config(OmegaConf.create({"a": 2}), tmp_path, name="mine.yaml")
    assert os.listdir(tmp_path) == ["mine.yaml"]
    assert Path(path).read_text() == "a: 1\n"


def test_directory_that_is_a_file_or_inside_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RuntimeError, match="is a file: give another"):
        setup_job(output_dir=tmp_path / "file")
    with pytest.raises(RuntimeError, match="cannot be made"):
        setup_job(output_dir=tmp_path / "file" / "run")
    assert not distributed.is_enabled()


def test_directory_that_cannot_be_written_is_refused_before_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(dir: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(configs.setup.tempfile, "TemporaryFile", refuse)
    with pytest.raises(RuntimeError, match=r"cannot be written \(Permission denied\): give another"):
        setup_job(output_dir=tmp_path)
    assert not distributed.is_enabled()


def test_job_has_a_group_a_log_and_seeds_and_leaves_nothing(tmp_path: Path) -> None:
    log = logging.getLogger("dinov3")
    with job_context(output_dir=tmp_path / "a" / "b", seed=7):
        assert distributed.is_enabled() and distributed.get_world_size() == 1
        assert torch.initial_seed() == 7
        expected = random.Random(7).random()
        assert random.random() == expected
        log.info("a line of the job")
    assert not distributed.is_enabled()
    text = (tmp_path / "a" / "b" / "logs" / "log.txt").read_text()
    assert "a line of the job" in text and "sha: " in text and "sys.path" in text
    log.info("a line after the job")
    assert (tmp_path / "a" / "b" / "logs" / "log.txt").read_text() == text


def test_job_without_group_log_and_seed_touches_none_of_them() -> None:
    torch.manual_seed(99)
    setup_job(distributed_enabled=False, logging_enabled=False, seed=None)
    assert not distributed.is_enabled()
    assert torch.initial_seed() == 99
    exit_job(distributed_enabled=False, logging_enabled=False)


def test_failure_leaves_its_traceback_and_is_raised(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="on purpose"), job_context(output_dir=tmp_path):
        raise ValueError("on purpose")
    assert "ValueError: on purpose" in (tmp_path / "logs" / "error.rank0.txt").read_text()
    assert not distributed.is_enabled()


def test_success_leaves_no_traceback(tmp_path: Path) -> None:
    with job_context(output_dir=tmp_path):
        pass
    assert os.listdir(tmp_path / "logs") == ["log.txt"]


def _set_up_rank(rank: int, world_size: int, directory: str) -> tuple[float, int, str]:
    with job_context(output_dir=directory, seed=5):
        cfg = setup_config(args(Path(directory), "optim.scaling_rule=linear_wrt_256", "train.batch_size_per_gpu=64"))
        seed = torch.initial_seed()
    assert distributed.is_enabled(), "a group that somebody else made is not ours to end"
    return cfg.optim.lr, seed, cfg.train.output_dir


@pytest.mark.distributed
def test_two_processes_share_one_file_and_have_their_own_seeds(tmp_path: Path) -> None:
    results = run_ranks(_set_up_rank, 2, str(tmp_path))
    assert results == [(0.001 * 128 / 256, 5 + rank, str(tmp_path.resolve())) for rank in range(2)]
    assert sorted(os.listdir(tmp_path)) == ["config.yaml", "logs"]
    assert sorted(os.listdir(tmp_path / "logs")) == ["log.txt", "log.txt.rank1"]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
