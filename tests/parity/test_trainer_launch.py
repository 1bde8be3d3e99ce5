"""Golden cases of launching: the command line of the launcher, and what it asks of Slurm."""

from __future__ import annotations

import argparse
from typing import Any

from dinov3.run.submit import get_run_parser
from dinov3.utils.cluster import get_slurm_executor_parameters

from . import golden

NOT_REQUIRED = "site-specific (not required)"


def describe(action: argparse.Action) -> dict[str, Any]:
    return {
        "flags": list(action.option_strings),
        "default": action.default,
        "type": getattr(action.type, "__name__", None),
        "nargs": action.nargs,
        "store_true": isinstance(action, argparse._StoreTrueAction),
    }


def test_launcher_has_the_published_options() -> None:
    actions = {action.dest: describe(action) for action in get_run_parser()._actions}
    for name, expected in golden.case("trainer", "submit-cli")["expect"].items():
        default = None if expected["default"] == NOT_REQUIRED else expected["default"]
        assert actions[name] == expected | {"default": default}


def test_slurm_is_asked_for_what_the_published_launcher_asks_for() -> None:
    case = golden.case("trainer", "slurm-parameters")
    parameters = get_slurm_executor_parameters(
        nodes=4, num_gpus_per_node=8, timeout_min=2800, slurm_signal_delay_s=120, slurm_partition="p"
    )
    assert parameters == {name: value for name, value in case["expect"].items() if value != NOT_REQUIRED}
