"""Several students in one job: checkpoints in common, refusals, and a run that is stopped and continued."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from dinov3 import distributed
from dinov3.checkpointer import CheckpointError, save_checkpoint
from dinov3.configs import ConfigError, DinoV3SetupArgs, get_default_config, setup_multidistillation
from dinov3.train import main
from dinov3.train.multidist_meta_arch import MultiDistillationMetaArch
from dinov3.train.resuming import newest_common_checkpoint, report_changes
from tests.multiprocess import launch, run_ranks

from . import tiny


def newest(rank: int, world_size: int, root: Path, saved: list[list[int]]) -> str:
    distributed.new_subgroups([[r] for r in range(world_size)])
    for iteration in saved[rank]:
        save_checkpoint(root / str(rank) / str(iteration), iteration=iteration, model=nn.Linear(1, 1))
    try:
        return str(newest_common_checkpoint(root / str(rank), verify="auto", period=10))
    except CheckpointError as error:
        return str(error)


@pytest.mark.distributed
def test_students_continue_from_the_newest_iteration_that_all_have(tmp_path: Path) -> None:
    found = run_ranks(newest, 2, tmp_path, [[9, 19, 29], [9, 19]])
    assert found == [str(tmp_path / "0" / "19"), str(tmp_path / "1" / "19")]


@pytest.mark.distributed
def test_a_job_that_was_killed_in_its_first_save_starts_over(tmp_path: Path) -> None:
    assert run_ranks(newest, 2, tmp_path, [[9], []]) == ["None", "None"]


@pytest.mark.distributed
def test_a_student_without_checkpoints_does_not_discard_the_others(tmp_path: Path) -> None:
    for message in run_ranks(newest, 2, tmp_path, [[9, 19], []]):
        assert "newest iterations are [-1, 19]" in message and "--no-resume" in message


def resume_as_before(rank: int, world_size: int, root: Path) -> list[str]:
    distributed.new_subgroups([[r] for r in range(world_size)])
    save_checkpoint(root / str(rank) / "9", iteration=9, model=nn.Linear(1, 1))
    return report_changes(root / str(rank) / "9", OmegaConf.create())


@pytest.mark.distributed
def test_as_many_processes_of_a_student_as_before_are_no_change(tmp_path: Path) -> None:
    assert run_ranks(resume_as_before, 2, tmp_path) == [[], []]


def test_architecture_refuses_what_it_cannot_train() -> None:
    plain = OmegaConf.merge(get_default_config(), tiny.CONFIG)
    with torch.device("meta"), pytest.raises(ValueError, match="needs distillation.enabled=true"):
        MultiDistillationMetaArch(plain)


@pytest.mark.parametrize("batches_per_step", [1, 2])
def test_a_batch_is_cut_to_its_share_of_the_step(batches_per_step: int, tmp_path: Path) -> None:
    OmegaConf.save(OmegaConf.create(tiny.CONFIG), tmp_path / "teacher.yaml")
    teacher = {"enabled": True, "full_cfg_path": str(tmp_path / "teacher.yaml"), "checkpoint_path": "ignore"}
    changes = {"distillation": teacher, "train": {"grad_accumulation_steps": batches_per_step}}
    arch = MultiDistillationMetaArch(OmegaConf.merge(get_default_config(), tiny.CONFIG, changes))
    arch.init_weights()
    masks = torch.zeros(4, 16, dtype=torch.bool)
    masks[:, 3] = True
    data = {
        "collated_global_crops": torch.randn(6, 3, 32, 32),  # of 3 images, the last of which is one too many
        "collated_local_crops": torch.randn(6, 3, 16, 16),
        "collated_masks": masks,
        "mask_indices_list": masks.flatten().nonzero().flatten(),
        "masks_weight": torch.ones(4),
        "upperbound": 4,
        "n_masked_patches": torch.tensor([4]),
        "global_batch_size": 2 * batches_per_step,
    }
    terms = arch.forward_backward(data, teacher_temp=0.07)[1]
    assert (terms["batch_size"], terms["local_batch_size"]) == (3, 2)


def arguments(directory: Path, images: Path, *options: str) -> DinoV3SetupArgs:
    """Two students of a teacher with random weights, one for each of two processes."""
    teacher = OmegaConf.merge(tiny.CONFIG, {"student": {"depth": 3}})
    OmegaConf.save(teacher, directory / "teacher.yaml")
    for name, depth in (("small", 1), ("large", 2)):
        OmegaConf.save({"student": {"depth": depth}}, directory / f"{name}.yaml")
    config: dict[str, Any] = OmegaConf.to_container(OmegaConf.create(tiny.CONFIG))  # type: ignore[assignment]
    del config["student"]["depth"]
    config["train"]["dataset_path"] = f"ImageFolder:root={images}"
    config["MODEL"] = {"META_ARCHITECTURE": "MultiDistillationMetaArch"}
    config["distillation"] = {
        "enabled": True,
        "full_cfg_path": str(directory / "teacher.yaml"),
        "checkpoint_path": "ignore",
    }
    config["multidistillation"] = {
        "enabled": True,
        "global_batch_size": 6,
        "students": [
            {"name": name, "config_path": str(directory / f"{name}.yaml"), "ranks_range": [rank, rank + 1]}
            for rank, name in enumerate(("small", "large"))
        ],
    }
    OmegaConf.save(config, directory / "shared.yaml")
    return DinoV3SetupArgs(directory / "shared.yaml", output_dir=directory / "run", opts=list(options))


def test_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="name 2 processes, but this job has 1: start it with 2"):
        setup_multidistillation(arguments(tmp_path, tmp_path))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"optim": {"epochs": 3}}, r"optim\.epochs=100 for small, 3 for large: .* give it in the shared file"),
        (
            {"crops": {"rgb_std": [1, 1, 1]}},
            r"crops\.rgb_std=\[0\.229, 0\.224, 0\.225\] for small, \[1, 1, 1\] for large",
        ),
        ({"train": {"seed": 1}}, r"train\.seed=0 for small, 1 for large"),
    ],
)
def test_students_that_would_not_keep_step_are_refused(
    setting: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = arguments(tmp_path, tmp_path)
    shared = OmegaConf.load(args.config_file)
    del shared.optim.epochs
    OmegaConf.save(shared, args.config_file)
    OmegaConf.save(OmegaConf.merge({"student": {"depth": 3}}, setting), tmp_path / "large.yaml")
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    with pytest.raises(ConfigError, match=message):
        setup_multidistillation(args)
    assert not (tmp_path / "run").exists()


def test_a_file_without_students_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="multidistillation.enabled=true"):
        setup_multidistillation(DinoV3SetupArgs("", output_dir=tmp_path))


@pytest.mark.distributed
@pytest.mark.slow
def test_students_stopped_half_way_end_as_if_they_had_not_been(tmp_path: Path) -> None:
    args = arguments(tmp_path, tiny.write_images(tmp_path / "images"))
    options = ["--multi-distillation", f"--config-file={args.config_file}", "train.OFFICIAL_EPOCH_LENGTH=2"]
    whole, halves, students = tmp_path / "whole", tmp_path / "halves", ("large", "small")
    for run in (whole, halves):
        if run is halves:
            for student in students:
                tiny.copy_as_killed(whole / student, halves / student, after=1)
        launch(main, 2, [*options, f"--output-dir={run}", "checkpointing.period=2"], output=tmp_path / "said.txt")
        assert sorted(path.name for path in run.iterdir() if path.is_dir()) == ["large", "logs", "small"]
    assert "resumed from" in (halves / "small" / "logs" / "log.txt").read_text()
    for student in students:
        assert sorted(tiny.read_losses(halves / student)) == [0, 1, 2, 3]
        tiny.assert_same_weights(tiny.read_teacher(halves / student), tiny.read_teacher(whole / student))
