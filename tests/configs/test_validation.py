"""What cannot be trained is refused with a sentence that names the key, before anything is built."""

from __future__ import annotations

import pytest

from dinov3.configs import ConfigError, DinoV3SetupArgs, get_cfg_from_args, get_default_config, validate
from dinov3.configs.notes import find_notes

from .helpers import config, refused

GRAM = ["gram.use_loss=true", "gram.ckpt=teacher.pth", "crops.gram_teacher_crops_size=448"]
SCHEDULES = {
    "lr": {"start": 0, "peak": 1e-3, "end": 1e-5, "warmup_epochs": 10, "freeze_last_layer_epochs": 1},
    "weight_decay": {"start": 0.04, "peak": 0.04, "end": 0.4, "warmup_epochs": 0},
    "momentum": {"start": 0.99, "peak": 0.99, "end": 1, "warmup_epochs": 0},
    "teacher_temp": {"start": 0.04, "peak": 0.07, "end": 0.07, "warmup_epochs": 30},
}


@pytest.mark.parametrize(
    "option",
    [
        "crops.local_crops_number=0",
        "train.batch_size_per_gpu=0",
        "train.OFFICIAL_EPOCH_LENGTH=0",
        "train.num_workers=-1",
        "train.max_nonfinite_steps=-1",
        "train.print_freq=0",
        "optim.epochs=0",
        "optim.adamw_beta2=1.0",
        "optim.layerwise_decay=0.0",
        "optim.clip_grad=-1",
        "optim.lr=-1",
        "dino.koleo_loss_weight=-0.1",
        "ibot.mask_sample_probability=1.5",
        "student.drop_path_rate=1.0",
        "student.ffn_ratio=0",
        "student.depth=0",
        "student.pos_embed_rope_rescale_coords=0.5",
        "teacher.momentum_teacher=1.1",
        "checkpointing.period=0",
        "checkpointing.max_to_keep=0",
        "crops.global_crops_scale=[0.3,1.2]",
        "crops.rgb_std=[0,1,1]",
        "crops.rgb_mean=[0.5]",
        "crops.blur_probabilities=[0.1,0.2]",
        "crops.blur_probabilities=[0,0,2]",
        "crops.global_local_crop_pairs_ratios=0",
    ],
)
def test_value_out_of_range_is_named(option: str) -> None:
    refused(option.split("=")[0], config(option))


def test_several_problems_are_listed_together() -> None:
    with pytest.raises(ConfigError) as error:
        validate(config("ibot.separate_head=false", "dino.koleo_topk=2", "train.dataset_path=null"))
    for key in ("3 problems", "ibot.separate_head", "dino.koleo_topk", "train.dataset_path"):
        assert key in str(error.value)


def test_unknown_keys_wrong_types_and_missing_keys_are_found_in_a_finished_configuration() -> None:
    refused("unknown key 'train.batchsize'", config(train={"batchsize": 3}))
    refused("optim.lr=fast: expected number", config(optim={"lr": "fast"}))
    refused("missing .*merge over get_default_config", {"train": {"seed": 1}})


class TestCrops:
    def test_global_crops_are_whole_patches(self) -> None:
        refused(
            r"crops\.global_crops_size=230: must be a multiple.*use 224 or 240", config("crops.global_crops_size=230")
        )
        refused(r"crops\.global_crops_size=8: .*use at least 16", config("crops.global_crops_size=8"))
        validate(config("student.patch_size=14", "crops.global_crops_size=518", "crops.local_crops_size=98"))

    def test_local_crops_hold_a_patch_and_may_lose_a_rest(self) -> None:
        refused(r"crops\.local_crops_size=15: smaller than one patch", config("crops.local_crops_size=15"))
        cfg = config("crops.local_crops_size=[96,168]", "crops.global_crops_size=[224,448]")
        cfg.crops.global_local_crop_pairs_ratios = [0.5, 0.5]
        validate(cfg)
        assert any("168 pixels the last 8 rows" in note for note in find_notes(cfg))

    def test_lists_have_one_length(self) -> None:
        sizes = ["crops.global_crops_size=[224,448]", "crops.local_crops_size=[96,96]"]
        refused("global_local_crop_pairs_ratios has 1", config(*sizes))
        validate(config(*sizes, "crops.global_local_crop_pairs_ratios=[1,2]"))
        refused("local_crops_size has 1", config(sizes[0], "crops.global_local_crop_pairs_ratios=[1,2]"))
        refused("gram_teacher_crops_size has 1", config(*sizes, "crops.global_local_crop_pairs_ratios=[1,2]", *GRAM))

    def test_subset_crops_fit_into_global_ones(self) -> None:
        sizes = ["crops.local_crops_size=256", "crops.localcrops_subset_of_globalcrops=true"]
        refused("cannot be cut out", config(*sizes))
        validate(config("crops.local_crops_size=224", sizes[1]))

    def test_scales_are_in_order(self) -> None:
        refused("local_crops_scale", config("crops.local_crops_scale=[0.4,0.3]"))

    def test_images_are_rgb(self) -> None:
        refused("student.in_chans=4", config("student.in_chans=4"))


class TestMasks:
    @pytest.mark.parametrize("ratios", ["[0.5,0.5]", "[0.1,1.1]", "[-0.1,0.5]"])
    def test_ratios_rise_between_0_and_1(self, ratios: str) -> None:
        refused("ibot.mask_ratio_min_max", config(f"ibot.mask_ratio_min_max={ratios}"))
        validate(config("ibot.mask_ratio_min_max=[0,1]"))

    def test_grid_of_masks_is_that_of_the_patches(self) -> None:
        scale = "crops.teacher_to_student_resolution_scale"
        refused(f"{scale}=2.0: .*7 x 7 patches, but vit_large has 14 x 14; set it to 1", config(f"{scale}=2.0"))
        refused(
            f"{scale}=1.0: .*14 x 14 patches, but convnext_tiny has 7 x 7; set it to 2",
            config("student.arch=convnext_tiny"),
        )
        validate(config("student.arch=convnext_tiny", f"{scale}=2.0"))
        refused(f"{scale}=0.01: too small", config(f"{scale}=0.01"))


class TestRope:
    def test_base_and_periods_exclude_each_other(self) -> None:
        low, high = "student.pos_embed_rope_min_period=1", "student.pos_embed_rope_max_period=100"
        no_base = "student.pos_embed_rope_base=null"
        for options in ([low], [low, high], [no_base], [no_base, low]):
            refused("only pos_embed_rope_base", config(*options))
        validate(config(no_base, low, high))
        refused("must be less than", config(no_base, low.replace("1", "200"), high))


class TestData:
    @pytest.mark.parametrize("path", ["null", "''", "<TRAIN/DATASET>"])
    def test_dataset_is_given(self, path: str) -> None:
        refused("train.dataset_path", config(f"train.dataset_path={path}"))

    def test_placeholders_of_recipes_are_replaced(self) -> None:
        refused("placeholder", config("student.resume_from_teacher_chkpt=<PATH/TO/HRFT/TEACHER>"))


class TestBatch:
    def test_one_image_per_process_has_no_neighbour(self) -> None:
        refused("KoLeo", config("train.batch_size_per_gpu=1"), world_size=4)
        validate(config("train.batch_size_per_gpu=1", "dino.koleo_loss_weight=0"), world_size=4)
        validate(config("train.batch_size_per_gpu=1", "dino.koleo_loss_distributed=true"), world_size=4)

    def test_one_image_in_all_cannot_be_balanced(self) -> None:
        refused("Sinkhorn", config("train.batch_size_per_gpu=1", "dino.koleo_loss_weight=0"), world_size=1)

    def test_several_neighbours_need_distributed_koleo(self) -> None:
        refused("dino.koleo_topk=2", config("dino.koleo_topk=2"))
        validate(config("dino.koleo_topk=2", "dino.koleo_loss_distributed=true"))

    def test_groups_hold_whole_processes_and_divide_the_batch(self) -> None:
        options = ["train.batch_size_per_gpu=8", "dino.koleo_loss_distributed=true"]
        group = "dino.koleo_distributed_loss_group_size"
        validate(config(*options, f"{group}=16"), world_size=4)
        refused(group, config(*options, f"{group}=12"), world_size=6)
        refused(group, config(*options, f"{group}=16"), world_size=3)
        refused(group, config(*options, f"{group}=16"), world_size=1)
        refused("koleo_topk=8", config(*options, "dino.koleo_topk=8"), world_size=1)
        validate(config(*options, "dino.koleo_topk=8"), world_size=2)

    def test_replicas_are_retired(self) -> None:
        refused("replicas", config("dino.koleo_loss_distributed=true", "dino.koleo_distributed_replicas=2"))


class TestSchedules:
    def test_warmup_fits_into_the_run(self) -> None:
        refused("optim.warmup_epochs=10: longer than the run of optim.epochs=5", config("optim.epochs=5"))
        validate(config("optim.epochs=5", "optim.warmup_epochs=5"))

    def test_settings_of_v1_are_complete_without_schedules(self) -> None:
        refused("not set: optim.lr, teacher.teacher_temp", config("optim.lr=null", "teacher.teacher_temp=null"))
        validate(config("optim.lr=null", "teacher.teacher_temp=null", schedules=SCHEDULES))

    def test_temperatures_are_positive(self) -> None:
        refused("teacher.warmup_teacher_temp=0", config("teacher.warmup_teacher_temp=0"))
        refused(
            "schedules.teacher_temp.end=0",
            config(
                "schedules.teacher_temp.end=0",
                schedules=SCHEDULES | {"teacher_temp": SCHEDULES["teacher_temp"] | {"end": 0}},
            ),
        )

    def test_every_schedule_is_there_and_complete(self) -> None:
        validate(config(schedules=SCHEDULES))
        refused("schedules.momentum is missing", config(schedules={**SCHEDULES, "momentum": None}))
        lr = {key: value for key, value in SCHEDULES["lr"].items() if key != "peak"}
        refused("schedules.lr lacks peak", config(schedules={**SCHEDULES, "lr": lr}))

    def test_warmup_and_cosine_fit_into_the_run(self) -> None:
        lr = SCHEDULES["lr"] | {"cosine_epochs": 90}
        validate(config(schedules={**SCHEDULES, "lr": lr}))
        lr["cosine_epochs"] = 90.1
        refused("schedules.lr: 10 epochs of warm-up and 90.1 of cosine", config(schedules={**SCHEDULES, "lr": lr}))
        refused("schedules.teacher_temp: 30 epochs of warm-up", config("optim.epochs=20", schedules=SCHEDULES))

    def test_momentum_and_rates_stay_in_range(self) -> None:
        momentum = SCHEDULES["momentum"] | {"end": 1.5}
        refused("schedules.momentum.end=1.5", config(schedules={**SCHEDULES, "momentum": momentum}))
        lr = SCHEDULES["lr"] | {"start": -1}
        refused("schedules.lr.start=-1", config(schedules={**SCHEDULES, "lr": lr}))

    def test_weight_schedules_are_checked_when_used(self) -> None:
        long = {"local_loss_weight_schedule": {"warmup_epochs": 200}}
        validate(config(dino=long))
        refused("dino.local_loss_weight_schedule: 200 epochs", config(dino={**long, "reweight_dino_local_loss": True}))
        schedule = {"start": 0, "peak": 0, "end": 1, "warmup_epochs": 100, "cosine_epochs": 1}
        refused("gram.loss_weight_schedule: 100 epochs", config(*GRAM, gram={"loss_weight_schedule": schedule}))

    def test_frozen_last_layers_are_remarked(self) -> None:
        cfg = config("optim.epochs=1", "optim.warmup_epochs=0")
        validate(cfg)
        assert any("freeze_last_layer_epochs=1" in note for note in find_notes(cfg))


@pytest.mark.parametrize(("switch", "needed"), [("checkpointing_full", "checkpointing"), ("cudagraphs", "compile")])
def test_switches_without_what_they_refine_are_remarked(switch: str, needed: str) -> None:
    cfg = config(f"train.{switch}=true", f"train.{needed}=false")
    validate(cfg)
    assert f"train.{switch} has no effect with train.{needed}=false" in find_notes(cfg)
    cfg.train[needed] = True
    assert list(find_notes(cfg)) == []


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ("train.fsdp=never compute_precision.param_dtype=bf16", "train.fsdp=never: it computes in float32"),
        ("optim.epochs=0.0001 optim.warmup_epochs=0", "optim.epochs=0.0001: less than one iteration"),
        (
            "crops.localcrops_subset_of_globalcrops=true crops.local_crops_size=100",
            "crops.local_crops_size=100: .*on the grid of patches; use 96",
        ),
    ],
)
def test_what_the_trainer_would_refuse_later_is_refused_at_once(options: str, key: str) -> None:
    refused(key, config(*options.split()))


def test_processes_of_their_own_have_no_common_gradient() -> None:
    cfg = config("train.fsdp=never", "compute_precision.param_dtype=fp32")
    validate(cfg, world_size=1)
    refused("train.fsdp=never: 2 processes", cfg, world_size=2)


RECIPES = {
    "vitl_im1k_lin834.yaml": ([], 32),
    "dinov3_vit7b16_pretrain.yaml": (["train.dataset_path=ImageFolder:root=X"], 256),
    "dinov3_vit7b16_gram_anchor.yaml": (["train.dataset_path=ImageFolder:root=X", "gram.ckpt=F"], 256),
    "dinov3_vit7b16_high_res_adapt.yaml": (["train.dataset_path=ImageFolder:root=X", "gram.ckpt=F"], 256),
    "multidist_tests/vits_p16.yaml": ([], 4),
    "multidist_tests/vitb_p16.yaml": ([], 4),
    "multi_distillation_test.yaml": ([], 8),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_can_be_trained_once_their_files_are_given(recipe: str) -> None:
    options, world_size = RECIPES[recipe]
    cfg = get_cfg_from_args(DinoV3SetupArgs(f"dinov3/configs/train/{recipe}", output_dir=None, opts=options))
    validate(cfg, world_size)


def test_gram_recipe_asks_for_its_teacher() -> None:
    args = DinoV3SetupArgs(
        "dinov3/configs/train/dinov3_vit7b16_gram_anchor.yaml", opts=["train.dataset_path=ImageFolder:root=X"]
    )
    refused("gram.ckpt=ignore.*gram.ckpt=FILE", get_cfg_from_args(args))


def test_validate_leaves_the_configuration_alone() -> None:
    cfg = get_default_config()
    validate(cfg)
    assert cfg == get_default_config()
