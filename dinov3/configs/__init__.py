"""The training configuration: its keys, recipes, merging and checks, and the set-up of a job.

Every key is declared in `training_config.py`, with its default, meaning and range; `python -m dinov3.configs --help`
prints them. A run's configuration is the defaults < recipe file < `key=value` options < output directory. Unknown keys,
wrong types and contradictions are errors before anything is built (`validate`). To see the result:

    python -m dinov3.configs dinov3/configs/train/vitl_im1k_lin834.yaml optim.epochs=10
"""

from __future__ import annotations

from dinov3.configs.merging import (
    DinoV3SetupArgs,
    get_cfg_from_args,
    get_default_config,
    load_teacher_config,
    resolve_config_path,
)
from dinov3.configs.scaling import apply_scaling_rules_to_cfg, learning_rate_scale
from dinov3.configs.settings import ConfigError
from dinov3.configs.setup import (
    exit_job,
    setup_config,
    setup_job,
    setup_multidistillation,
    write_config,
)
from dinov3.configs.validation import find_problems, validate

__all__ = [
    "ConfigError",
    "DinoV3SetupArgs",
    "apply_scaling_rules_to_cfg",
    "exit_job",
    "find_problems",
    "get_cfg_from_args",
    "get_default_config",
    "learning_rate_scale",
    "load_teacher_config",
    "resolve_config_path",
    "setup_config",
    "setup_job",
    "setup_multidistillation",
    "validate",
    "write_config",
]
