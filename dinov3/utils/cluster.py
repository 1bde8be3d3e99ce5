"""What a user's cluster needs to be told, once: settings from a file and from the environment.

`~/.config/dinov3/cluster.yaml` holds options of `dinov3.run.submit` by name, such as

    slurm_partition: gpu
    cpus_per_task: 12
    slurm_setup: [module load cuda]

and the environment variable `DINOV3_SLURM_PARTITION` beats the key `slurm_partition`. Nothing else is built in about
any site: what is not set is not passed to Slurm.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dinov3.utils.messages import did_you_mean

CLUSTERS = ("auto", "slurm", "local", "debug")
#: The settings that a user can fix for all jobs, and their types.
SETTINGS: Mapping[str, type] = {
    "cluster": str,
    "ngpus": int,
    "nodes": int,
    "timeout": int,
    "gpus_per_node": int,
    "tasks_per_node": int,
    "cpus_per_task": int,
    "mem_gb": float,
    "slurm_account": str,
    "slurm_partition": str,
    "slurm_qos": str,
    "slurm_constraint": str,
    "slurm_array_parallelism": int,
    "slurm_nice": int,
    "slurm_setup": list,
    "comment": str,
    "exclude": str,
}
PING_TIMEOUT_S = 15


def settings_file() -> Path:
    """Where the user's settings are: `dinov3/cluster.yaml` in `$XDG_CONFIG_HOME`, by default `~/.config`."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "dinov3" / "cluster.yaml"


def cluster_settings() -> dict[str, Any]:
    """The settings that the user's file and environment make, by the names of `SETTINGS`; the environment wins.

    Raises:
        ValueError: a key of the file is unknown, or a value has the wrong type; names where it stands.
    """
    settings = _read_file(settings_file())
    for name in SETTINGS:
        variable = f"DINOV3_{name.upper()}"
        if os.environ.get(variable):
            settings[name] = _converted(name, os.environ[variable], variable)
    return settings


def slurm_answers() -> bool:
    """Whether there is a Slurm to submit to: `scontrol ping` reaches a controller."""
    try:
        done = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, timeout=PING_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and " UP" in done.stdout


def get_slurm_account() -> str | None:
    """The account that the user's settings name; None if they leave it to Slurm."""
    return cluster_settings().get("slurm_account")


def get_slurm_partition() -> str | None:
    """The partition that the user's settings name; None if they leave it to Slurm."""
    return cluster_settings().get("slurm_partition")


def get_slurm_qos() -> str | None:
    """The quality of service that the user's settings name; None if they leave it to Slurm."""
    return cluster_settings().get("slurm_qos")


def get_slurm_executor_parameters(nodes: int, num_gpus_per_node: int, **overrides: Any) -> dict[str, Any]:
    """Parameters of submitit's `AutoExecutor`: one task per GPU, all memory of the nodes.

    Args:
        nodes: number of nodes.
        num_gpus_per_node: GPUs and tasks per node; with 0 there is one task and no request for GPUs.
        **overrides: further or other parameters; None takes one away, so that Slurm's default holds.
    """
    parameters = {
        "mem_gb": 0,  # Slurm's way to say: all of it
        "gpus_per_node": num_gpus_per_node or None,
        "tasks_per_node": max(num_gpus_per_node, 1),
        "nodes": nodes,
        **overrides,
    }
    return {name: value for name, value in parameters.items() if value is not None}


def _read_file(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected lines such as 'slurm_partition: NAME', not a {type(content).__name__}")
    unknown = [str(name) for name in content if name not in SETTINGS]
    if unknown:
        named = ", ".join(f"{name!r}{did_you_mean(name, SETTINGS)}" for name in unknown)
        raise ValueError(f"{path}: unknown settings {named}; it takes {', '.join(SETTINGS)}")
    return {name: _converted(name, value, f"{path}: {name}") for name, value in content.items() if value is not None}


def _converted(name: str, value: Any, origin: str) -> Any:
    kind = SETTINGS[name]
    if kind is list:
        lines = value if isinstance(value, list) else [value]
        if not all(isinstance(line, str) for line in lines):
            raise ValueError(f"{origin}: expected shell lines, not {value!r}")
        return lines
    if isinstance(value, bool | list | dict) or (kind is int and isinstance(value, float)):
        raise ValueError(f"{origin}: expected {_described(kind)}, not {value!r}")
    try:
        converted = kind(value)
    except ValueError:
        raise ValueError(f"{origin}: expected {_described(kind)}, not {value!r}") from None
    if name == "cluster" and converted not in CLUSTERS:
        raise ValueError(
            f"{origin}: expected one of {', '.join(CLUSTERS)}, not {value!r}{did_you_mean(value, CLUSTERS)}"
        )
    return converted


def _described(kind: type) -> str:
    return {int: "a whole number", float: "a number", str: "text"}[kind]
