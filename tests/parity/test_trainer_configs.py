"""Golden cases of the default configuration, of merging, and of learning-rate scaling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from dinov3 import distributed
from dinov3.configs import (
    DinoV3SetupArgs,
    apply_scaling_rules_to_cfg,
    get_cfg_from_args,
    get_default_config,
    learning_rate_scale,
)
from dinov3.configs.settings import flatten
from dinov3.configs.training_config import RETIRED, SETTINGS, default_values

from . import golden
from .test_ssl_recipes import NEW_KEYS

DIFFERENCES = golden.case("trainer", "recipe-differences")
RECIPES = DIFFERENCES["expect"]


def test_default_configuration_is_the_published_one() -> None:
    want = dict(flatten(golden.case("trainer", "default-config")["expect"]))
    got = dict(flatten(OmegaConf.to_container(get_default_config())))
    assert got == want | {"student.ffn_ratio": None, **NEW_KEYS}


@pytest.mark.parametrize("case", golden.cases("trainer", "merge-"), ids=lambda case: case["id"])
def test_option_beats_file_and_flag_beats_option(case: dict[str, Any], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    OmegaConf.save(case["config_file"], recipe)
    cfg = get_cfg_from_args(DinoV3SetupArgs(str(recipe), output_dir=case["output_dir"], opts=case["opts"]))
    got = dict(flatten(OmegaConf.to_container(cfg)))
    assert {key: got[key] for key in case["expect"]} == case["expect"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_changes_what_the_published_one_changes(recipe: str) -> None:
    cfg = OmegaConf.to_container(get_cfg_from_args(DinoV3SetupArgs(recipe, output_dir=None)))
    defaults = default_values()
    changed = {key: value for key, value in flatten(cfg) if key not in defaults or defaults[key] != value}
    if changed.get("student.ffn_ratio") == 4.0:  # the published default
        del changed["student.ffn_ratio"]
    for key in ("train.output_dir", *DIFFERENCES["unused_default_keys"]):
        changed.pop(key, None)
    assert changed == RECIPES[recipe]


def test_retired_keys_are_exactly_those_that_published_recipes_carry_in_vain() -> None:
    assert set(RETIRED) == set(DIFFERENCES["ignored_keys"])
    # ropenew is another name of rope, and both are accepted.
    unused = {key for key, setting in SETTINGS.items() if setting.unused}
    assert unused >= set(DIFFERENCES["unused_default_keys"]) - {"student.pos_embed_type"}


@pytest.mark.parametrize("case", golden.cases("trainer", "lr-scaling-"), ids=lambda case: case["id"])
def test_learning_rate_grows_with_the_global_batch(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "get_world_size", lambda group=None: case["world_size"])
    cfg = get_default_config()
    cfg.optim.lr, cfg.optim.scaling_rule = case["lr"], case["rule"]
    cfg.train.batch_size_per_gpu = case["batch_size_per_gpu"]

    scheduled = OmegaConf.merge(cfg, {"schedules": case["schedules"]})
    apply_scaling_rules_to_cfg(scheduled)
    assert scheduled.optim.lr == case["lr"]
    assert scheduled.schedules == case["schedules"]
    peak = case["schedules"]["lr"]["peak"] * learning_rate_scale(scheduled)
    assert peak == pytest.approx(max(case["expect"]["schedules_v2_lr"]), rel=1e-12)

    apply_scaling_rules_to_cfg(cfg)
    assert cfg.optim.lr == pytest.approx(case["expect"]["optim_lr"], rel=1e-12)
