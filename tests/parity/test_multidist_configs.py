"""Golden cases of the configuration that each process of a multi-distillation gets."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from dinov3 import distributed
from dinov3.configs import DinoV3SetupArgs, get_default_config, setup, setup_multidistillation
from dinov3.configs.settings import flatten
from dinov3.logging import cleanup_logging

from . import golden

BASE = "dinov3/configs/train/multi_distillation_test.yaml"
SHARED = golden.case("ssl", "multidist_config/test")


class Job:
    """One process of many, of which the others are not there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int) -> None:
        self.subgroups: list[list[int]] = []
        self.seed: int | None = None
        monkeypatch.setattr(distributed, "get_rank", lambda: rank)
        monkeypatch.setattr(distributed, "get_world_size", lambda: world_size)
        monkeypatch.setattr(distributed, "new_subgroups", self.divide)
        monkeypatch.setattr(setup, "fix_random_seeds", lambda seed: setattr(self, "seed", seed))

    def divide(self, subgroups: Any) -> None:
        self.subgroups = [list(ranks) for ranks in subgroups]


@pytest.fixture(autouse=True)
def close_logs() -> Any:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    cleanup_logging()
    assert random.getstate() == states[0]


@pytest.mark.parametrize("rank", SHARED["ranks"])
def test_students_file_lies_below_the_shared_one(rank: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    want = SHARED["expected"]["ranks"][str(rank)]
    job = Job(monkeypatch, rank, SHARED["world_size"])
    opts = [*SHARED["opts"], f"train.seed={SHARED['seed']}"]
    cfg = setup_multidistillation(DinoV3SetupArgs(SHARED["yaml"], output_dir=tmp_path, opts=opts))

    assert (job.subgroups, job.seed) == (want["subgroups"], want["seed"])
    assert cfg.train.output_dir == want["output_dir_is"].replace("<--output-dir>", str(tmp_path))
    default = dict(flatten(OmegaConf.to_container(get_default_config())))
    changed = {key: value for key, value in flatten(OmegaConf.to_container(cfg)) if default.get(key, ...) != value}
    assert changed.pop("train.seed") == SHARED["seed"]
    assert changed.pop("train.output_dir") == cfg.train.output_dir
    assert changed == want["different_from_default"]


@pytest.mark.parametrize("case", golden.cases("trainer", "multidistillation-"), ids=lambda case: case["id"])
def test_each_process_sets_up_its_student(
    case: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job = Job(monkeypatch, case["rank"], case["world_size"])
    base = OmegaConf.load(BASE)
    base.multidistillation.students = case["students"]
    base.multidistillation.global_batch_size = case["global_batch_size"]
    OmegaConf.save(base, tmp_path / "base.yaml")
    args = DinoV3SetupArgs(tmp_path / "base.yaml", output_dir=tmp_path / "out", opts=case["opts"])
    cfg = setup_multidistillation(args)

    want = case["expect"]
    assert cfg.train.output_dir == want["output_dir"].replace("OUTPUT_DIR", str(tmp_path / "out"))
    assert cfg.train.batch_size_per_gpu == want["batch_size_per_gpu"]
    assert (cfg.student.arch, cfg.student.drop_path_rate) == (want["arch"], want["drop_path_rate"])
    assert cfg.optim.lr == pytest.approx(want["lr_after_scaling"], rel=1e-12)
    assert want["meta_architecture"] == cfg.MODEL.META_ARCHITECTURE
    assert job.subgroups == want["subgroups"]
    assert sorted(path.name for path in Path(cfg.train.output_dir).iterdir()) == sorted(want["files"])
