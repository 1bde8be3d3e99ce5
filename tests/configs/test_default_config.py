"""The default configuration documents itself, and the schema speaks of keys that exist."""

from __future__ import annotations

import re

import pytest
from omegaconf import OmegaConf

from dinov3.configs import get_default_config, rules_training, schema, validate, validation
from dinov3.models import convnext, vision_transformer


def test_every_key_has_a_comment() -> None:
    lines = schema.DEFAULT_CONFIG_PATH.read_text().splitlines()
    settings = [line for line in lines if re.match(r"\s+\w+: ", line)]
    assert len(settings) == len(schema.default_values())
    assert [line for line in settings if "  # " not in line] == []


def test_keys_marked_as_without_effect_are_the_ones_that_warn() -> None:
    lines = schema.DEFAULT_CONFIG_PATH.read_text().splitlines()
    marked = [line.split(":")[0].strip() for line in lines if "# no effect" in line]
    assert sorted(marked) == sorted(key.rpartition(".")[2] for key in schema.WITHOUT_EFFECT)


def test_default_configuration_is_valid_and_fresh() -> None:
    cfg = get_default_config()
    validate(cfg)
    cfg.optim.lr = 7.0
    assert get_default_config().optim.lr == 0.001


@pytest.mark.parametrize("table", [schema.TYPES, schema.CHOICES, validation.LENGTHS])
def test_tables_hold_known_keys(table: dict[str, object]) -> None:
    assert set(table) <= set(schema.known_types())


def test_lists_of_keys_hold_known_keys() -> None:
    keys = [*schema.WITHOUT_EFFECT, *rules_training.REPLACED_BY_SCHEDULES]
    keys += [key for _, _, in_range in validation.RANGES for key in in_range]
    assert set(keys) <= set(schema.known_types())
    assert not set(schema.RETIRED) & set(schema.known_types())


def test_default_values_fit_their_own_types() -> None:
    wrong = [schema.value_problem(key, value) for key, value in schema.default_values().items()]
    assert [problem for problem in wrong if problem] == []


def test_architectures_are_those_that_can_be_built() -> None:
    for name in schema.VIT_ARCHITECTURES:
        assert callable(getattr(vision_transformer, name))
    for name in schema.CONVNEXT_ARCHITECTURES:
        assert callable(convnext.get_convnext_arch(name))


def test_every_recipe_of_the_package_parses() -> None:
    recipes = sorted((schema.DEFAULT_CONFIG_PATH.parent / "train").rglob("*.yaml"))
    assert len(recipes) >= 14
    for recipe in recipes:
        for key, value in schema.flatten(OmegaConf.to_container(OmegaConf.load(recipe))):
            assert schema.key_problem(key, value) is None, (recipe.name, key)
            assert schema.value_problem(key, value) is None, (recipe.name, key)
