"""The model of an evaluation: from a training run, from weights in any format, or from the hub by name.

Notable: only a training run needs a configuration, and its own is found; the structure of released weights, including
those of Hugging Face and timm, follows from their entries.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from dinov3.configs import DinoV3SetupArgs, get_cfg_from_args, resolve_config_path
from dinov3.configs.settings import key
from dinov3.distributed import runtime
from dinov3.hub import backbones
from dinov3.hub.backbones import Weights
from dinov3.hub.command_line import ENTRIES, ModelChoice, find_normalization, saved_normalization
from dinov3.hub.from_checkpoint import build_backbone
from dinov3.hub.run_directory import find_checkpoint, find_run_config
from dinov3.hub.runs import build_model_for_eval
from dinov3.hub.sources import read_weights, without_secrets
from dinov3.hub.weights import read_state_dict
from dinov3.utils import as_torch_dtype
from dinov3.utils.messages import did_you_mean

logger = logging.getLogger("dinov3")

RANDOM_WEIGHTS = "random initialisation"
RANDOM_SEED = 0


@dataclass
class ModelConfig:
    """Which backbone is evaluated: `pretrained_weights`, with or without `config_file`, or `dino_hub`."""

    config_file: str | None = key(None, "configuration of a training run; null: that of the run in pretrained_weights")
    pretrained_weights: str | None = key(
        None,
        "a run directory, a .pth or .safetensors file, a checkpoint directory, or a model directory of Hugging Face or "
        "timm; null: random initialisation",
    )
    dino_hub: str | None = key(None, "instead of these two: a hub model, such as dinov3_vits16")
    weights: str | None = key(None, "file or directory with the weights of dino_hub; null: the published ones")

    def __post_init__(self) -> None:
        if self.dino_hub and (self.config_file or self.pretrained_weights):
            raise ValueError("give either model.dino_hub, or model.config_file and model.pretrained_weights, not both")
        if self.weights and not self.dino_hub:
            raise ValueError(
                "model.weights goes with model.dino_hub; with model.config_file use model.pretrained_weights"
            )

    def check(self) -> None:
        """Refuse settings that do not name a model, before anything is loaded.

        Raises:
            ValueError: neither weights nor a configuration nor a hub name is given, or the hub name is unknown.
            FileNotFoundError: a path does not exist.
        """
        if not (self.dino_hub or self.config_file or self.pretrained_weights):
            raise ValueError(
                "no model: give model.pretrained_weights=RUN (the directory of a training run, or one of Hugging Face "
                "or timm), or model.dino_hub=dinov3_vits16 model.weights=FILE"
            )
        if self.dino_hub:
            names = [name for name in vars(backbones) if name in ENTRIES]
            if self.dino_hub not in names:
                raise ValueError(
                    f"model.dino_hub={self.dino_hub}: no such model{did_you_mean(self.dino_hub, names)}; the hub has "
                    f"{', '.join(names)}"
                )
        if self.config_file:
            resolve_config_path(self.config_file)
        for name, path in (("pretrained_weights", self.pretrained_weights), ("weights", self.weights)):
            if path and "://" not in path and path not in Weights.__members__ and not Path(path).expanduser().exists():
                hint = did_you_mean(path, Weights.__members__) if name == "weights" else ""
                raise FileNotFoundError(f"model.{name}={path}{hint}: there is no such file or directory")

    def describe(self) -> str:
        """Name the weights, for reports; links are followed, so that `teacher_checkpoint.pth` shows its iteration."""
        if self.dino_hub:
            return f"{self.dino_hub} with {without_secrets(self.weights or 'published weights')}"
        if not self.pretrained_weights:
            return f"{RANDOM_WEIGHTS} of {self.config_file}"
        path = Path(self.pretrained_weights).expanduser()
        if not path.exists():
            return without_secrets(self.pretrained_weights)
        return os.path.realpath(find_checkpoint(path))

    def find_config_file(self) -> str | None:
        """Return `config_file`, or that of the training run in which `pretrained_weights` lies; None without a run."""
        if self.config_file or not self.pretrained_weights:
            return self.config_file
        found = find_run_config(Path(self.pretrained_weights))
        return None if found is None else str(found)


@dataclass(frozen=True)
class FrozenBackbone:
    """The model that is evaluated, and what an evaluation has to know about it.

    Attributes:
        model: in evaluation mode, on its device; most give the class token [B, D] for images [B, 3, H, W].
        autocast_dtype: the precision that it runs in; float32 means without autocast.
        description: the weights, for reports and results files.
        normalization: mean and standard deviation, by channel, of the images that it was trained on. Default: unknown.
    """

    model: nn.Module
    autocast_dtype: torch.dtype = torch.float32
    description: str = ""
    normalization: Sequence[Sequence[float]] | None = None

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        tensor = next(self.model.parameters(), next(self.model.buffers(), None))
        return runtime.device() if tensor is None else tensor.device

    def autocast(self) -> torch.autocast:
        """Return the context in which the model is to be run."""
        is_enabled = self.autocast_dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=is_enabled)


def load_model(config: ModelConfig) -> FrozenBackbone:
    """Load the backbone that `config` names, in evaluation mode, on this process's device.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: no model is named, its name is unknown, or the weights do not fit it.
    """
    config.check()
    config_file = config.find_config_file()
    dtype = torch.float32
    if config.dino_hub:
        entry = getattr(backbones, config.dino_hub)
        model: nn.Module = entry(weights=config.weights) if config.weights else entry()
        model = model.to(runtime.device()).eval()
    elif config_file is not None:
        cfg = get_cfg_from_args(DinoV3SetupArgs(config_file=config_file))
        if not config.pretrained_weights:
            logger.warning("model.pretrained_weights is not given: the model is a %s, a baseline", RANDOM_WEIGHTS)
        with torch.random.fork_rng():
            torch.manual_seed(RANDOM_SEED)  # the same random initialisation in every process
            model = build_model_for_eval(cfg, config.pretrained_weights)
        if as_torch_dtype(cfg.compute_precision.param_dtype) == torch.bfloat16:
            dtype = torch.bfloat16
        if not config.config_file:
            logger.info("model: configuration found in %s", config_file)
    else:
        assert config.pretrained_weights is not None
        state, source = read_weights(config.pretrained_weights, read_state_dict)
        model = build_backbone(state, source=source)
        model = model.to(runtime.device()).eval()
    description = config.describe()
    logger.info("model: %s, run in %s on %s", description, dtype, runtime.device())
    return FrozenBackbone(model, dtype, description, find_trained_normalization(config, model))


def find_trained_normalization(config: ModelConfig, model: nn.Module) -> Sequence[Sequence[float]] | None:
    """Return mean and standard deviation, by channel, of the images that `model` was trained on; None if unknown."""
    if config.dino_hub:
        return find_normalization(ModelChoice(config.dino_hub, config.weights), model)[1]
    if config_file := config.find_config_file():
        cfg: Any = OmegaConf.load(resolve_config_path(config_file))
        crops = cfg.get("crops", {})
        return (crops.rgb_mean, crops.rgb_std) if "rgb_mean" in crops and "rgb_std" in crops else None
    return saved_normalization(Path(str(config.pretrained_weights)).expanduser())
