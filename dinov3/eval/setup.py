"""The model of an evaluation: from a training run, from a configuration and weights, or from the hub by name."""

from __future__ import annotations

import difflib
import inspect
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dinov3.configs import DinoV3SetupArgs, get_cfg_from_args
from dinov3.distributed import runtime
from dinov3.eval.helpers import key
from dinov3.hub import backbones
from dinov3.hub.runs import CONFIG_FILE, build_model_for_eval
from dinov3.utils import as_torch_dtype

logger = logging.getLogger("dinov3")

RANDOM_WEIGHTS = "random initialisation"
RANDOM_SEED = 0


@dataclass
class ModelConfig:
    """Which backbone is evaluated: `config_file` and `pretrained_weights`, or `dino_hub`."""

    config_file: str | None = key(None, "configuration of a training; default: that of the run in pretrained_weights")
    pretrained_weights: str | None = key(
        None, "a .pth file, a checkpoint directory or a run directory; null: random initialisation"
    )
    dino_hub: str | None = key(None, "instead of these two: a model of the hub, such as dinov3_vits16")
    weights: str | None = key(None, "file with the weights of dino_hub; null: the published ones")

    def __post_init__(self) -> None:
        if self.dino_hub and (self.config_file or self.pretrained_weights):
            raise ValueError("give either model.dino_hub, or model.config_file and model.pretrained_weights, not both")
        if self.weights and not self.dino_hub:
            raise ValueError(
                "model.weights goes with model.dino_hub; with model.config_file use model.pretrained_weights"
            )

    def check(self) -> None:
        """Refuse a configuration that names no model.

        Raises:
            ValueError: neither a configuration nor a hub name is given.
        """
        if not self.dino_hub and not self._find_config_file():
            raise ValueError(
                "no model: give model.config_file=RUN/config.yaml model.pretrained_weights=RUN/teacher_checkpoint.pth, "
                "or model.dino_hub=dinov3_vits16 model.weights=FILE"
            )

    def describe(self) -> str:
        """The weights, in a few words; links are followed, so that `teacher_checkpoint.pth` tells its iteration."""
        if self.dino_hub:
            return f"{self.dino_hub} with {self.weights or 'published weights'}"
        if not self.pretrained_weights:
            return f"{RANDOM_WEIGHTS} of {self.config_file}"
        return (
            os.path.realpath(self.pretrained_weights)
            if os.path.exists(self.pretrained_weights)
            else self.pretrained_weights
        )

    def _find_config_file(self) -> str | None:
        if self.config_file:
            return self.config_file
        beside = Path(self.pretrained_weights or "") / CONFIG_FILE
        return str(beside) if self.pretrained_weights and beside.is_file() else None


def load_model_and_context(
    model_config: ModelConfig, output_dir: str | os.PathLike[str] = ""
) -> tuple[nn.Module, dict[str, Any]]:
    """The backbone on this process's device, in evaluation mode.

    Args:
        model_config: which one.
        output_dir: becomes `train.output_dir` of the model's configuration; nothing is written.

    Returns:
        The model, and `{"autocast_dtype": dtype}` that it is to be run in.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: no model is named, its name is unknown, or the weights are not its.
    """
    model_config.check()
    if model_config.dino_hub:
        model, dtype = _load_from_hub(model_config.dino_hub, model_config.weights), torch.float32
    else:
        config_file = model_config._find_config_file()
        assert config_file is not None
        model, dtype = setup_and_build_model(config_file, model_config.pretrained_weights, output_dir=output_dir)
    logger.info("model: %s, run in %s on %s", model_config.describe(), dtype, runtime.device())
    return model, {"autocast_dtype": dtype}


def setup_and_build_model(
    config_file: str | os.PathLike[str],
    pretrained_weights: str | None = None,
    shard_unsharded_model: bool = False,
    output_dir: str | os.PathLike[str] = "",
    opts: Sequence[str] | None = None,
) -> tuple[nn.Module, torch.dtype]:
    """The backbone that a training configuration describes; writes no file.

    Args:
        config_file: a configuration, e.g. the `config.yaml` of a run.
        pretrained_weights: see `ModelConfig`.
        shard_unsharded_model: shard the model over the processes.
        output_dir: becomes `train.output_dir` of the configuration.
        opts: `key=value` options of the configuration.

    Returns:
        The model in evaluation mode, and its autocast dtype: bfloat16 if it was trained so, else float32.
    """
    cfg = get_cfg_from_args(DinoV3SetupArgs(config_file=config_file, output_dir=output_dir, opts=list(opts or [])))
    if not pretrained_weights:
        logger.warning("model.pretrained_weights is empty: the model is a %s, results are a baseline", RANDOM_WEIGHTS)
    with torch.random.fork_rng():
        torch.manual_seed(RANDOM_SEED)  # the same random initialisation in every process
        model = build_model_for_eval(cfg, pretrained_weights, shard_unsharded_model)
    is_bfloat16 = as_torch_dtype(cfg.compute_precision.param_dtype) == torch.bfloat16
    return model, torch.bfloat16 if is_bfloat16 else torch.float32


def _load_from_hub(name: str, weights: str | None) -> nn.Module:
    names = [
        entry for entry in vars(backbones) if entry.startswith("dinov3_") and inspect.isfunction(vars(backbones)[entry])
    ]
    if name not in names:
        nearest = difflib.get_close_matches(name, names, n=1, cutoff=0)
        raise ValueError(
            f"model.dino_hub={name}: no such model; did you mean {nearest[0]}? There are {', '.join(names)}"
        )
    entry = getattr(backbones, name)
    model = entry(weights=weights) if weights else entry()
    return model.to(runtime.device()).eval()
