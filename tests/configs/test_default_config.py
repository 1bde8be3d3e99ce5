"""The published default configuration is the declared one, and the declarations speak of keys that exist."""

from __future__ import annotations

import re

from omegaconf import OmegaConf

from dinov3.configs import get_default_config, validate
from dinov3.configs.merging import PACKAGE
from dinov3.configs.training_config import (
    CONVNEXT_ARCHITECTURES,
    REPLACED_BY_SCHEDULES,
    RETIRED,
    SETTINGS,
    VIT_ARCHITECTURES,
    default_values,
)
from dinov3.models import convnext, vision_transformer

PUBLISHED = PACKAGE / "configs" / "ssl_default_config.yaml"


def test_published_file_holds_the_declared_defaults() -> None:
    # As text, so that the order counts, and 1, 1.0 and true differ.
    assert OmegaConf.to_yaml(OmegaConf.load(PUBLISHED)) == OmegaConf.to_yaml(get_default_config())


def test_comments_of_the_published_file_are_the_declared_meanings() -> None:
    comments = re.findall(r"^ +\w+: .*?  # (.*)$", PUBLISHED.read_text(), re.MULTILINE)
    assert comments == [SETTINGS[key].description for key in default_values()]


def test_every_setting_has_a_meaning() -> None:
    assert [key for key, setting in SETTINGS.items() if not setting.help] == []


def test_default_configuration_is_valid_and_fresh() -> None:
    cfg = get_default_config()
    validate(cfg)
    cfg.optim.lr = 7.0
    cfg.crops.rgb_mean[0] = 7.0
    assert get_default_config().optim.lr == 0.001
    assert get_default_config().crops.rgb_mean[0] == 0.485


def test_lists_of_keys_hold_known_keys() -> None:
    assert set(REPLACED_BY_SCHEDULES) <= set(SETTINGS)
    assert not RETIRED & set(SETTINGS)


def test_architectures_are_those_that_can_be_built() -> None:
    for name in VIT_ARCHITECTURES:
        assert callable(getattr(vision_transformer, name))
    for name in CONVNEXT_ARCHITECTURES:
        assert callable(convnext.get_convnext_arch(name))
