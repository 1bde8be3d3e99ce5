"""Command lines and configuration files of evaluations, and the files that they write."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dinov3.configs.settings import format_keys
from dinov3.eval.classification.knn_config import Feature, KnnEvalConfig
from dinov3.eval.classification.metrics import ClassificationMetricType
from dinov3.eval.command.config import args_dict_to_dataclass, cli_parser
from dinov3.eval.dense.config import Dtype
from dinov3.eval.depth.config import DepthConfig

NEEDED = ["model.dino_hub=dinov3_vits16", "train.dataset=A", "eval.test_dataset=B"]


def parse(*tokens: str) -> KnnEvalConfig:
    return args_dict_to_dataclass(cli_parser([*NEEDED, *tokens]), KnnEvalConfig, save_config=False)[0]


@pytest.mark.parametrize(
    "argv, output_dir",
    [
        (["output_dir=/a"], "/a"),
        (["--output-dir", "/a"], "/a"),
        (["--output-dir=/a", "output_dir=/b"], "/b"),
        (["output_dir=/b", "--output-dir", "/a"], "/a"),
        (["output_dir=2024"], "2024"),
        (["output_dir="], "."),
    ],
)
def test_all_spellings_of_the_output_directory(argv: list[str], output_dir: str) -> None:
    assert cli_parser(argv) == {"output_dir": output_dir}


@pytest.mark.parametrize("token", ["word", "--flag", "--output_dir=/a", "-v", "=1", "a=[1"])
def test_tokens_that_are_no_settings_are_refused(token: str) -> None:
    with pytest.raises(ValueError, match=token.replace("[", r"\[").split("=")[0] or "="):
        cli_parser([token])


def test_output_dir_needs_a_directory() -> None:
    with pytest.raises(ValueError, match="--output-dir"):
        cli_parser(["--output-dir"])


def test_later_settings_win() -> None:
    assert cli_parser(["train.ks=[1]", "train.batch_size=2", "train.ks=[3]"])["train"] == {"ks": [3], "batch_size": 2}


def test_unknown_key_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown key 'train\.batchsize' .*did you mean 'train\.batch_size"):
        parse("train.batchsize=3")


def test_unknown_key_in_a_file_names_the_file(tmp_path: Path) -> None:
    OmegaConf.save({"train": {"k": [3]}}, tmp_path / "knn.yaml")
    with pytest.raises(ValueError, match=r"unknown key 'train\.k' .*'train\.ks'.* in .*knn\.yaml"):
        parse(f"config_file={tmp_path}/knn.yaml")


def test_arguments_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    OmegaConf.save({"train": {"ks": [3], "temperature": 0.5}, "output_dir": "/from/file"}, tmp_path / "knn.yaml")
    config = parse(f"config_file={tmp_path}/knn.yaml", "train.ks=[7]")
    assert (config.train.ks, config.train.temperature, config.train.batch_size) == ([7], 0.5, 256)
    assert config.output_dir == "/from/file"
    assert parse(f"config_file={tmp_path}/knn.yaml", "output_dir=/given").output_dir == "/given"


def test_missing_configuration_file_is_named() -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.yaml"):
        parse("config_file=nowhere.yaml")


@pytest.mark.parametrize("text", ["MEAN_PER_CLASS_ACCURACY", "mean_per_class_accuracy"])
def test_enumerations_by_name_and_by_value(text: str) -> None:
    config = parse(f"eval.test_metric_type={text}", "eval.feature=patch_mean")
    assert config.eval.test_metric_type is ClassificationMetricType.MEAN_PER_CLASS_ACCURACY
    assert config.eval.feature is Feature.PATCH_MEAN


def test_unknown_member_lists_the_members() -> None:
    with pytest.raises(ValueError, match=r"eval\.feature=register.*CLS, PATCH_MEAN"):
        parse("eval.feature=register")


@pytest.mark.parametrize(
    "argv, missing", [([], "eval.test_dataset, model, train.dataset"), (NEEDED[:1], "eval.test_dataset, train.dataset")]
)
def test_all_missing_keys_are_named_at_once(argv: list[str], missing: str) -> None:
    with pytest.raises(ValueError, match=missing):
        args_dict_to_dataclass(cli_parser(argv), KnnEvalConfig, save_config=False)


@pytest.mark.parametrize(
    "tokens, message",
    [
        (["train.ks=[]"], r"train\.ks"),
        (["train.ks=[0,5]"], r"train\.ks"),
        (["train.temperature=0"], r"train\.temperature=0"),
        (["train.batch_size=0"], r"train\.batch_size"),
        (["train.similarity_dtype=float16"], r"similarity_dtype=float16.*bfloat16"),
        (["few_shot.enable=true"], r"few_shot\.k_or_percent"),
        (["few_shot.k_or_percent=3"], r"few_shot\.enable=true"),
        (["few_shot.n_tries=2"], r"few_shot\.enable=true"),
        (["few_shot.enable=true", "few_shot.k_or_percent=2", "few_shot.n_tries=0"], r"few_shot\.n_tries=0"),
        (["model.config_file=a.yaml"], r"model\.dino_hub.*not both"),
    ],
)
def test_values_that_make_no_sense_are_refused(tokens: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(*tokens)


def test_resolved_configuration_is_saved_and_can_be_given_again(tmp_path: Path) -> None:
    argv = [*NEEDED, "train.ks=[3]", "eval.feature=patch_mean", f"output_dir={tmp_path}/out"]
    config, output_dir = args_dict_to_dataclass(cli_parser(argv), KnnEvalConfig)
    assert output_dir == f"{tmp_path}/out"
    again, _ = args_dict_to_dataclass(cli_parser([f"config_file={output_dir}/eval_config.yaml"]), KnnEvalConfig, False)
    assert again == config


def test_every_key_is_listed_with_its_default_and_meaning() -> None:
    lines = {line.split()[0]: line.split()[1:] for line in format_keys(KnnEvalConfig).splitlines()}
    assert lines["train.dataset"][0] == "needed"
    assert lines["eval.batch_size"][0] == "null" and lines["eval.feature"][0] == "CLS"
    assert "model.pretrained_weights" in lines and "output_dir" in lines
    assert all(len(words) > 2 for words in lines.values())


def parse_depth(*tokens: str) -> DepthConfig:
    return args_dict_to_dataclass(cli_parser(["datasets.root=A", *tokens]), DepthConfig, save_config=False)[0]


def test_sections_that_may_be_missing_are_made_by_their_keys(tmp_path: Path) -> None:
    OmegaConf.save({"model": None, "transforms": {"train": None}}, tmp_path / "empty.yaml")
    empty = parse_depth(f"config_file={tmp_path / 'empty.yaml'}")
    assert empty.model is None and empty.transforms.train is None
    given = parse_depth("model.dino_hub=dinov3_vits16", "transforms.train.random_crop=[4,6]", "model_dtype=bfloat16")
    assert given.model is not None and given.model.dino_hub == "dinov3_vits16"
    assert given.transforms.train is not None and given.transforms.train.random_crop == [4, 6]
    assert given.model_dtype is Dtype.BFLOAT16
    with pytest.raises(ValueError, match=r"did you mean 'transforms\.train\.random_crop"):
        parse_depth("transforms.train.random_corp=[4,6]")
    assert "transforms.train.rotation_angle" in format_keys(DepthConfig)
