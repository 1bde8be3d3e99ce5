"""Teachers that contradict their settings, or do not fit their students, are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from dinov3.configs import validate
from dinov3.configs.notes import find_notes

from .helpers import config, refused

GRAM = ["gram.use_loss=true", "gram.ckpt=teacher.pth", "crops.gram_teacher_crops_size=448"]


class TestGram:
    def test_file_and_crops_are_enough(self) -> None:
        validate(config(*GRAM))

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            (["gram.ckpt=null"], "no origin"),
            (["gram.ckpt=ignore"], "gram.ckpt=FILE"),
            (["gram.ckpt=''"], "gram.ckpt=FILE"),
            (["gram.ckpt=<FILE>"], "gram.ckpt=FILE"),
            (["crops.gram_teacher_crops_size=null"], "crops.gram_teacher_crops_size is null"),
            (["crops.gram_teacher_crops_size=440"], "crops.gram_teacher_crops_size=440: must be a multiple"),
            (["gram.tokens_used=masked", "gram.img_level=true"], "gram.tokens_used=masked"),
            (["gram.remove_neg=true", "gram.remove_only_teacher_neg=true"], "choose one"),
            (["gram.ema_teacher=true"], "gram.ckpt=teacher.pth: not used"),
            (["gram.ema_teacher=true"], "gram.rep_update=true"),
            (["gram.ema_teacher=true"], "crops.gram_teacher_crops_size=448: must be null"),
        ],
    )
    def test_contradictions(self, options: list[str], match: str) -> None:
        refused(match, config(*GRAM, *options))

    def test_nothing_is_checked_when_it_is_off(self) -> None:
        validate(config("gram.tokens_used=masked", "gram.img_level=true", "gram.ckpt=ignore"))

    def test_present_ema_as_teacher_needs_nothing_else(self) -> None:
        validate(config("gram.use_loss=true", "gram.ema_teacher=true", "gram.rep_update=false"))

    @pytest.mark.parametrize(
        ("iteration", "schedule", "is_accepted"),
        [
            (0, None, True),
            (1, None, False),
            (2500, {"start": 0, "peak": 0, "end": 1, "warmup_epochs": 2}, True),
            (2501, {"start": 0, "peak": 0, "end": 1, "warmup_epochs": 2}, True),
            (2502, {"start": 0, "peak": 0, "end": 1, "warmup_epochs": 2}, False),
            (2501, {"start": 0, "peak": 0, "end": 1, "warmup_epochs": 2, "cosine_epochs": 0}, False),
            (9999, {"start": 0, "peak": 0, "end": 0, "warmup_epochs": 2}, True),
            (1, {"start": 0, "peak": 1, "end": 1, "warmup_epochs": 2}, True),
            (2, {"start": 0, "peak": 1, "end": 1, "warmup_epochs": 2}, False),
            (1, {"start": 0, "peak": 1, "end": 1, "warmup_epochs": 0}, False),
            (1, {"start": 1, "peak": 0, "end": 0, "warmup_epochs": 2}, False),
        ],
    )
    def test_loss_counts_only_when_there_is_a_teacher(
        self, iteration: int, schedule: dict[str, float] | None, is_accepted: bool
    ) -> None:
        cfg = config(*GRAM, "gram.ckpt=null", f"gram.it_load_ema_teacher={iteration}")
        cfg.gram.loss_weight_schedule = schedule
        if is_accepted:
            validate(cfg)
        else:
            refused("gram.it_load_ema_teacher", cfg)

    def test_not_with_several_students(self) -> None:
        refused("not available with", config(*GRAM, "MODEL.META_ARCHITECTURE=MultiDistillationMetaArch"))

    def test_crops_that_nobody_sees_are_remarked(self) -> None:
        cfg = config("crops.gram_teacher_crops_size=448")
        validate(cfg)
        assert any("gram_teacher_crops_size has no effect" in note for note in find_notes(cfg))


class TestDistillation:
    def teacher(self, tmp_path: Path, **sections: Any) -> list[str]:
        OmegaConf.save(OmegaConf.merge({"student": {"arch": "vit_large"}}, sections), tmp_path / "teacher.yaml")
        path = f"distillation.full_cfg_path={tmp_path / 'teacher.yaml'}"
        return ["distillation.enabled=true", "distillation.checkpoint_path=ignore", path]

    def test_fitting_teacher(self, tmp_path: Path) -> None:
        validate(config("student.arch=vit_small", *self.teacher(tmp_path)))

    def test_coarser_student_is_taught_by_a_teacher_that_sees_smaller_images(self, tmp_path: Path) -> None:
        student = ["student.arch=convnext_tiny", *self.teacher(tmp_path)]
        validate(config(*student, "crops.teacher_to_student_resolution_scale=2"))
        refused("convnext_tiny has 7 x 7 patches, the teacher vit_large 14 x 14", config(*student))

    def test_teacher_of_another_version_may_hold_other_keys(self, tmp_path: Path) -> None:
        validate(config(*self.teacher(tmp_path, student={"some_later_key": 1})))

    @pytest.mark.parametrize(
        ("sections", "match"),
        [
            ({"ibot": {"separate_head": False}}, "separate_head"),
            ({"dino": {"head_n_prototypes": 7}}, "dino.head_n_prototypes=65536: the teacher.*has 7"),
            ({"ibot": {"head_n_prototypes": 7}}, "ibot.head_n_prototypes=65536"),
            ({"student": {"patch_size": 8}}, "student.patch_size=16"),
            ({"student": {"arch": "convnext_base"}}, "vit_large has 14 x 14 patches, the teacher convnext_base 7 x 7"),
            ({"student": {"arch": "vit_huge"}}, "full_cfg_path.*vit_huge"),
        ],
    )
    def test_teacher_that_does_not_fit(self, sections: dict[str, Any], match: str, tmp_path: Path) -> None:
        refused(match, config(*self.teacher(tmp_path, **sections)))

    def test_paths_are_given(self, tmp_path: Path) -> None:
        options = self.teacher(tmp_path)
        for nothing in ("''", "null", "<PATH>"):
            refused("checkpoint_path", config(*options, f"distillation.checkpoint_path={nothing}"))
            refused("full_cfg_path", config(*options, f"distillation.full_cfg_path={nothing}"))
        refused("full_cfg_path: no configuration file", config(*options, "distillation.full_cfg_path=no/such.yaml"))

    def test_hrft_is_retired(self) -> None:
        refused("student.resume_from_teacher_chkpt", config("hrft.enabled=true"))


class TestMultidistillation:
    def students(self, *ranges: tuple[int, int]) -> list[dict[str, Any]]:
        return [{"name": f"s{i}", "config_path": "s.yaml", "ranks_range": list(r)} for i, r in enumerate(ranges)]

    def config(self, students: Any, *opts: str, batch: int = 32) -> Any:
        return config(
            "MODEL.META_ARCHITECTURE=MultiDistillationMetaArch",
            "distillation.enabled=true",
            "distillation.checkpoint_path=ignore",
            "distillation.full_cfg_path=dinov3/configs/train/vitl_im1k_lin834.yaml",
            *opts,
            multidistillation={"enabled": True, "global_batch_size": batch, "students": students},
        )

    def test_students_share_the_processes(self) -> None:
        validate(self.config(self.students((0, 2), (2, 4))))

    @pytest.mark.parametrize(
        ("ranges", "batch", "match"),
        [
            ([(0, 2), (3, 4)], 32, "s1 has processes from 3, expected from 2"),
            ([(0, 2), (1, 4)], 32, "s1 has processes from 1, expected from 2"),
            ([(0, 3), (3, 4)], 32, "not divisible by the 3 processes of s0"),
            ([(0, 2), (2, 4)], 2, "fewer images than the 4 processes"),
            ([(0, 2), (2, 4)], 1, "Sinkhorn"),
            ([(0, 2), (2, 34)], 32, "KoLeo"),
            ([(2, 2)], 32, "first process, process after the last"),
        ],
    )
    def test_ranges_and_batch(self, ranges: list[tuple[int, int]], batch: int, match: str) -> None:
        refused(match, self.config(self.students(*ranges), batch=batch))

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"config_pth": "s.yaml"}, "did you mean 'config_path'"),
            ({"name": 3}, r"students\[0\].name=3"),
            ({"config_path": None}, r"students\[0\].config_path"),
            ({"config_path": "<PATH>"}, "placeholder <PATH>"),
            ({"ranks_range": [0]}, r"students\[0\].ranks_range"),
            ({"ranks_range": [0, "2"]}, r"students\[0\].ranks_range"),
        ],
    )
    def test_entries(self, change: dict[str, Any], match: str) -> None:
        students = self.students((0, 2), (2, 4))
        refused(match, self.config([students[0] | change, students[1]]))

    def test_names_differ_and_entries_are_sections(self) -> None:
        students = self.students((0, 2), (2, 4))
        refused("not all different", self.config([students[0], students[1] | {"name": "s0"}]))
        refused(r"students\[0\]: expected name", self.config(["vits"]))

    def test_what_belongs_together(self) -> None:
        students = self.students((0, 2))
        refused("needs distillation.enabled", self.config(students, "distillation.enabled=false"))
        refused("needs MODEL.META_ARCHITECTURE", self.config(students, "MODEL.META_ARCHITECTURE=SSLMetaArch"))
        refused("students is not set", self.config([]))
        refused("needs distillation.enabled", config("MODEL.META_ARCHITECTURE=MultiDistillationMetaArch"))
        refused("global_batch_size is not set", config(multidistillation={"enabled": True, "students": students}))
