"""Configurations made from options, and the expectation that one is refused."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import OmegaConf

from dinov3.configs import ConfigError, DinoV3SetupArgs, get_cfg_from_args, validate


def config(*opts: str, **sections: Any) -> Any:
    """The default configuration with `key=value` options and whole sections merged over it."""
    cfg = get_cfg_from_args(DinoV3SetupArgs("", output_dir=None, opts=list(opts)))
    OmegaConf.set_struct(cfg, False)
    return OmegaConf.merge(cfg, sections)


def refused(match: str, cfg: Any, **kwargs: Any) -> None:
    """Expect that `validate` refuses `cfg` with a message that matches."""
    with pytest.raises(ConfigError, match=match):
        validate(cfg, **kwargs)
