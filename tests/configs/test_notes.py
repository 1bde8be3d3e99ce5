"""Settings without effect are remarked with the name of the key; others are not."""

from __future__ import annotations

import pytest

from dinov3.configs import validate
from dinov3.configs.notes import find_notes

from .helpers import config

ZERO = "dino.loss_weight=0 dino.koleo_loss_weight=0 ibot.loss_weight=0"
GRAM = "gram.use_loss=true gram.ckpt=F crops.gram_teacher_crops_size=448"
IDLE_SCHEDULE = 'gram.loss_weight_schedule={"start":0,"peak":0,"end":0,"warmup_epochs":0}'
SCHEDULES = (
    "schedules={"
    + ",".join(
        f'"{name}":{{"start":{value},"peak":{value},"end":{value},"warmup_epochs":0}}'
        for name, value in {"lr": 0, "weight_decay": 0, "momentum": 1, "teacher_temp": 0.1}.items()
    )
    + "}"
)


@pytest.mark.parametrize(
    ("options", "note"),
    [
        (ZERO, "dino.loss_weight, dino.koleo_loss_weight, ibot.loss_weight are all 0: nothing is learned"),
        ("optim.lr=0", "optim.lr is 0 during the whole run: nothing is learned"),
        (SCHEDULES, "schedules.lr is 0 during the whole run: nothing is learned"),
        ("ibot.mask_sample_probability=0", "ibot.mask_sample_probability=0: none of the 128 global crops"),
        (
            "ibot.mask_sample_probability=0.2 train.batch_size_per_gpu=2",
            "ibot.mask_sample_probability=0.2: none of the 4 global crops",
        ),
        ("ibot.mask_ratio_min_max=[0.0,0.005]", "ibot.mask_ratio_min_max=[0.0, 0.005]: less than one of the 196"),
        (
            "optim.epochs=29 optim.freeze_backbone_epochs=29",
            "optim.freeze_backbone_epochs=29: the backbone never learns",
        ),
        (
            "optim.epochs=29",
            "teacher.warmup_teacher_temp_epochs=30: longer than the run of optim.epochs=29, so "
            "teacher.teacher_temp=0.07 is never reached",
        ),
        (
            "gram.loss_weight=2 gram.ckpt=F crops.gram_teacher_no_distortions=true",
            "gram.loss_weight, gram.ckpt, crops.gram_teacher_no_distortions has no effect with gram.use_loss=false",
        ),
        (
            "dino.local_loss_weight_schedule.end=1",
            "dino.local_loss_weight_schedule.end has no effect with dino.reweight_dino_local_loss=false",
        ),
        (
            "dino.koleo_loss_weight=0 dino.koleo_loss_distributed=true",
            "dino.koleo_loss_distributed has no effect with dino.koleo_loss_weight=0",
        ),
        (
            "dino.koleo_distributed_loss_group_size=16",
            "dino.koleo_distributed_loss_group_size has no effect with dino.koleo_loss_distributed=false",
        ),
        (
            "distillation.checkpoint_path=F",
            "distillation.checkpoint_path has no effect with distillation.enabled=false",
        ),
        ("student.fp8_filter=mlp", "student.fp8_filter has no effect with student.fp8_enabled=false"),
        (
            "student.arch=convnext_tiny student.n_storage_tokens=4 crops.teacher_to_student_resolution_scale=2 "
            "student.drop_path_rate=0",
            "student.n_storage_tokens has no effect with student.arch=convnext_tiny",
        ),
        (f"{GRAM} {IDLE_SCHEDULE}", "gram.use_loss=true has no effect: gram.loss_weight_schedule is 0"),
        (f"{GRAM} {IDLE_SCHEDULE} gram.loss_weight=2", "gram.loss_weight has no effect with gram.loss_weight_schedule"),
        (f"{GRAM} gram.it_load_ema_teacher=125000", "gram.it_load_ema_teacher=125000: the run has only 125000 iter"),
        (f"{GRAM} gram.it_first_update=125001", "gram.rep_update=true has no effect: with gram.it_first_update=125001"),
        (f"{GRAM} gram.max_updates=0", "gram.rep_update=true has no effect"),
    ],
)
def test_settings_without_effect_are_named(options: str, note: str) -> None:
    cfg = config(*options.split())
    validate(cfg)
    assert [found for found in find_notes(cfg) if found.startswith(note)], list(find_notes(cfg))


@pytest.mark.parametrize(
    "options",
    [
        "",
        "optim.epochs=30",
        "optim.epochs=29 teacher.warmup_teacher_temp=0.07",
        "ibot.mask_sample_probability=0 ibot.loss_weight=0",
        "ibot.mask_sample_probability=0.25 train.batch_size_per_gpu=2",
        "ibot.mask_ratio_min_max=[0.0,0.0052]",
        "dino.loss_weight=0 dino.koleo_loss_weight=0",
        f"{ZERO} {GRAM}",
        f"{GRAM} gram.it_first_update=99999",
        "dino.reweight_dino_local_loss=true dino.local_loss_weight_schedule.end=1",
        "student.arch=convnext_tiny crops.teacher_to_student_resolution_scale=2 student.drop_path_rate=0",
    ],
)
def test_settings_with_an_effect_are_not_named(options: str) -> None:
    cfg = config(*options.split())
    validate(cfg)
    assert list(find_notes(cfg)) == []
