"""Files and options become one configuration, and every mistake in them is named."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dinov3.configs import ConfigError, DinoV3SetupArgs, get_cfg_from_args, merging, resolve_config_path
from dinov3.configs.merging import PACKAGE

L_RECIPE = "dinov3/configs/train/vitl_im1k_lin834.yaml"


def merge(*opts: str, yaml: str = "", tmp_path: Path | None = None, strict: bool = True) -> OmegaConf:
    recipe = ""
    if tmp_path is not None:
        recipe = str(tmp_path / "recipe.yaml")
        Path(recipe).write_text(yaml)
    return get_cfg_from_args(DinoV3SetupArgs(recipe, output_dir=None, opts=list(opts)), strict=strict)


@pytest.mark.parametrize(
    ("option", "nearest"),
    [
        ("train.batch_size_per_gpuu=3", "train.batch_size_per_gpu"),
        ("batch_size_per_gpu=3", "train.batch_size_per_gpu"),
        ("lr=3", "optim.lr"),
        ("stdent.arch=vit_small", "student.arch"),
        ("ibto.loss_weight=1", "ibot.loss_weight"),
        ("schedules.lr.paek=1", "schedules.lr.peak"),
        ("gram.loss_weight_schedule.stop=1", "gram.loss_weight_schedule.start"),
    ],
)
def test_unknown_option_names_itself_and_the_nearest_key(option: str, nearest: str) -> None:
    with pytest.raises(ConfigError) as error:
        merge(option)
    assert f"option {option!r}" in str(error.value)
    assert f"did you mean {nearest!r}" in str(error.value)


def test_unknown_key_in_a_file_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"recipe\.yaml: unknown key 'optim\.learning_rate'"):
        merge(yaml="optim:\n  learning_rate: 1\n", tmp_path=tmp_path)


def test_all_problems_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        merge("lr=3", yaml="optm:\n  lr: 1\n", tmp_path=tmp_path)
    assert "optm.lr" in str(error.value) and "lr=3" in str(error.value)


def test_section_as_a_value_and_value_as_a_section_are_errors_even_if_not_strict() -> None:
    for strict in (True, False):
        with pytest.raises(ConfigError, match="'train' is a section.*holds"):
            merge("train=3", strict=strict)
        with pytest.raises(ConfigError, match=r"'optim\.lr' is a single value"):
            merge("optim.lr.x.y=4", strict=strict)


def test_not_strict_warns_of_unknown_keys_and_keeps_them(caplog: pytest.LogCaptureFixture) -> None:
    cfg = merge("train.batch_size_per_gpuu=3", strict=False)
    assert cfg.train.batch_size_per_gpuu == 3
    assert "did you mean 'train.batch_size_per_gpu'" in caplog.text


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("train.batch_size_per_gpu=3.5", "expected integer"),
        ("train.batch_size_per_gpu=true", "expected integer"),
        ("train.batch_size_per_gpu=null", "expected integer"),
        ("optim.lr=fast", "expected number or null"),
        ("optim.lr=.inf", "expected a finite number"),
        ("optim.clip_grad=[1]", "expected number or null"),
        ("dino.global_ignore_diagonal=1", "expected true or false"),
        ("train.dataset_path=[a]", "expected text or null"),
        ("student.ffn_ratio=big", "expected number or null"),
        ("ibot.mask_ratio_min_max=0.5", "expected list of numbers"),
        ("crops.global_crops_size=[224,x]", "expected integer or list of integers"),
        ("crops.global_crops_size=[]", "expected integer or list of integers"),
        ("crops.gram_teacher_crops_size=1.5", "expected integer or list of integers or null"),
        ("schedules=7", "expected section or null"),
        ("schedules.lr.peak=high", "expected number"),
        ("multidistillation.students=vits", "expected list"),
        ("train.compile=1", "expected one of true, false, auto"),
        ("train.fsdp=true", "expected one of auto, always, never"),
        ("train.on_bad_image=ignore", "expected one of raise, skip"),
        ("train.centering=softmax", "expected sinkhorn_knopp"),
        ("compute_precision.param_dtype=bfloat16", "did you mean 'bf16'"),
        ("compute_precision.sharding_strategy=FULL_SHARD", "expected SHARD_GRAD_OP"),
        ("student.arch=vit_smal", "did you mean 'vit_small'"),
        ("student.norm_layer=batchnorm", "expected one of layernorm"),
        ("student.ffn_layer=gelu", "expected one of mlp"),
        ("optim.scaling_rule=linear", "did you mean 'linear_wrt_256'"),
        ("MODEL.META_ARCHITECTURE=SSLArch", "did you mean 'SSLMetaArch'"),
        ("checkpointing.verify=yes please", "expected one of true, false, auto"),
    ],
)
def test_wrong_value_names_key_value_and_what_was_expected(option: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        merge(option)
    assert option.split("=")[0] in str(error.value)
    assert expected in str(error.value)


def test_wrong_value_in_a_file_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"recipe\.yaml: optim\.lr=fast: expected number"):
        merge(yaml="optim: {lr: fast}", tmp_path=tmp_path)


@pytest.mark.parametrize(
    "option",
    [
        "optim.lr=1",
        "optim.epochs=0.5",
        "optim.clip_grad=null",
        "optim.scaling_rule=null",
        "optim.scaling_rule=none",
        "train.compile=auto",
        "train.progress=false",
        "student.pos_embed_type=ropenew",
        "crops.global_crops_size=[512,768]",
        "crops.gram_teacher_crops_size=null",
        "gram.loss_weight_schedule={start: 0, peak: 1, end: 2, warmup_epochs: 3, cosine_epochs: 4}",
        "dino.local_loss_weight_schedule.cosine_epochs=2",
        "schedules=null",
        "checkpointing.max_to_keep=null",
        "multidistillation.global_batch_size=64",
    ],
)
def test_values_of_every_published_kind_are_accepted(option: str) -> None:
    merge(option)


@pytest.mark.parametrize("token", ["optim.lr", "=3", "a..b=1", ".lr=1", "--lr=1", "optim.lr =1", "train.seed=[1"])
def test_malformed_option_is_named(token: str) -> None:
    with pytest.raises(ConfigError) as error:
        merge(token)
    assert f"option {token!r}" in str(error.value)


def test_options_must_be_a_list() -> None:
    with pytest.raises(ConfigError, match="list of 'key=value'"):
        merging.parse_options("optim.lr=1")


def test_file_that_is_no_yaml_is_named_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"recipe\.yaml, line 3, column \d+: not valid YAML"):
        merge(yaml="optim:\n  lr: 1\n  min_lr: a: b\n", tmp_path=tmp_path)


def test_repeated_key_in_a_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"line 3.*duplicate key"):
        merge(yaml="optim:\n  lr: 1\n  lr: 2\n", tmp_path=tmp_path)


@pytest.mark.parametrize(("yaml", "found"), [("- a\n- b\n", "a list"), ("just text\n", "recipe.yaml")])
def test_file_without_keys_is_an_error(yaml: str, found: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=found):
        merge(yaml=yaml, tmp_path=tmp_path)


def test_binary_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ConfigError, match=r"recipe\.yaml"):
        get_cfg_from_args(DinoV3SetupArgs(tmp_path / "recipe.yaml"))


def test_empty_file_and_empty_sections_change_nothing(tmp_path: Path) -> None:
    assert merge(yaml="", tmp_path=tmp_path) == merge()
    assert merge(yaml="optim:\ntrain: {}\n", tmp_path=tmp_path) == merge()


def test_missing_file_names_the_places_and_the_nearest_recipe() -> None:
    with pytest.raises(FileNotFoundError) as error:
        resolve_config_path("configs/vitl_im1k_lin384.yaml")
    assert "'configs/vitl_im1k_lin384.yaml'" in str(error.value)
    assert os.getcwd() in str(error.value)
    assert "did you mean dinov3/configs/train/vitl_im1k_lin834.yaml" in str(error.value)


def test_files_are_found_here_then_in_the_repository_then_in_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = PACKAGE / "configs" / "train" / "vitl_im1k_lin834.yaml"
    monkeypatch.chdir(tmp_path)
    assert resolve_config_path(L_RECIPE) == shipped
    assert resolve_config_path("train/vitl_im1k_lin834.yaml") == shipped
    mine = tmp_path / L_RECIPE
    mine.parent.mkdir(parents=True)
    mine.touch()
    assert resolve_config_path(L_RECIPE) == mine.resolve()
    assert resolve_config_path(str(shipped)) == shipped


def test_later_options_win_and_lists_are_replaced(tmp_path: Path) -> None:
    cfg = merge(
        "optim.lr=2e-3", "optim.lr=3e-3", yaml="optim: {lr: 1}\ncrops: {rgb_mean: [0, 0, 0]}\n", tmp_path=tmp_path
    )
    assert cfg.optim.lr == 3e-3
    assert cfg.crops.rgb_mean == [0, 0, 0]


def test_interpolations_are_checked_by_what_they_stand_for() -> None:
    assert merge("train.num_workers=${train.seed}").train.num_workers == 0
    with pytest.raises(ConfigError, match=r"optim\.lr=vit_large: expected number"):
        merge("optim.lr=${student.arch}")
    with pytest.raises(ConfigError, match="no.such"):
        merge("optim.lr=${no.such}")


def test_output_dir_is_made_absolute_only_if_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["train.output_dir=from/option"]
    assert get_cfg_from_args(DinoV3SetupArgs("", output_dir="x/../y", opts=options)).train.output_dir == str(
        tmp_path.resolve() / "y"
    )
    for nothing in ("", None):
        cfg = get_cfg_from_args(DinoV3SetupArgs("", output_dir=nothing, opts=options))
        assert cfg.train.output_dir == "from/option"


def test_result_refuses_new_keys_and_answers_for_absent_sections() -> None:
    cfg = merge()
    assert cfg.get("schedules") is None
    with pytest.raises(AttributeError):
        cfg.train.batchsize = 3


def test_shared_file_of_several_students_holds_only_its_own_keys() -> None:
    args = DinoV3SetupArgs("dinov3/configs/train/multi_distillation_test.yaml", output_dir=None, opts=["optim.lr=1"])
    cfg = get_cfg_from_args(args, multidistillation=True)
    assert [student.name for student in cfg.multidistillation.students] == ["vits", "vitb"]
    assert cfg.optim == {"lr": 1}
    assert "student" not in cfg


def test_retired_keys_are_dropped_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        cfg = get_cfg_from_args(DinoV3SetupArgs("dinov3/configs/train/dinov3_vitl16_lvd1689m_distilled.yaml"))
    assert len(caplog.records) == 1
    assert "student.fourier_embeddings" in caplog.text and "coding_rate_loss.epsilon" in caplog.text
    assert "coding_rate_loss" not in cfg and "fourier_embeddings" not in cfg.student


def test_keys_without_effect_warn_only_when_changed(caplog: pytest.LogCaptureFixture) -> None:
    merge("train.saveckp_freq=20", "MODEL.DEVICE=cuda")
    assert caplog.text == ""
    merge("train.saveckp_freq=10")
    assert "no effect" in caplog.text and "train.saveckp_freq" in caplog.text


def test_option_that_schedules_replace_warns(caplog: pytest.LogCaptureFixture) -> None:
    merge("optim.lr=1")
    assert caplog.text == ""
    recipe = "dinov3/configs/train/distillation_convnext/convnext_tiny_p16.yaml"
    get_cfg_from_args(DinoV3SetupArgs(recipe, opts=["optim.lr=1"]))
    assert "optim.lr: no effect" in caplog.text and "schedules" in caplog.text


def test_setup_args_take_an_omegaconf_list() -> None:
    args = DinoV3SetupArgs("", opts=OmegaConf.create(["optim.lr=1"]))
    assert type(args.opts) is list and args.opts == ["optim.lr=1"]
    assert DinoV3SetupArgs("", opts=None).opts == []
