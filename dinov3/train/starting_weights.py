"""Weights from earlier trainings, of which a training starts or learns.

Notable: everything is strict, and every error names the setting that gave the checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from dinov3.checkpointer import CheckpointError, fill_from_tensors, init_fsdp_model_from_checkpoint
from dinov3.hub.weights import load_backbone_, read_state_dict
from dinov3.models import build_model_from_cfg

logger = logging.getLogger("dinov3")

CENTERS = ("dino_loss.center", "ibot_patch_loss.center")
HEADS = ("dino_head", "ibot_head")
NOT_SHARDED = ("backbone.rope_embed.periods", "qkv.bias_mask")


def load_networks(networks: nn.ModuleDict, path: str, *, setting: str) -> None:
    """Fill backbone and both heads from the teacher of a training, strictly.

    Args:
        networks: `backbone`, `dino_head`, `ibot_head`, plain or sharded.
        path: a teacher's file or directory, or a training's checkpoint.
        setting: the key that gave `path`.

    Raises:
        CheckpointError: the checkpoint does not fit; a backbone without heads does not.
        FileNotFoundError: there is no such file.
    """
    with _named(setting, path):
        try:
            init_fsdp_model_from_checkpoint(networks, path, skip_load_keys=CENTERS, keys_not_sharded=NOT_SHARDED)
        except CheckpointError as error:
            raise CheckpointError(f"{error}\n{_advice(path)}") from error


def load_backbone(networks: nn.ModuleDict, path: str, cfg: Any, *, setting: str) -> None:
    """Fill the backbone from any checkpoint that the hub loads; heads stay, and are not needed.

    Args:
        networks: with the key `backbone`, plain or sharded.
        path: see `dinov3.hub.weights.read_state_dict`.
        cfg: the configuration that the backbone was built from.
        setting: the key that gave `path`.

    Raises:
        CheckpointError: the checkpoint does not fit.
        WeightsError: it is unreadable, or of another model.
        FileNotFoundError: there is no such file.
    """
    with _named(setting, path):
        if (Path(path) / ".metadata").is_file():
            # Each process reads its shards alone.
            init_fsdp_model_from_checkpoint(networks, path, skip_load_keys=HEADS + CENTERS)
        else:
            plain, _ = build_model_from_cfg(cfg, only_teacher=True)
            load_backbone_(plain, read_state_dict(path), source=path, target=cfg.student.arch)
            fill_from_tensors(networks["backbone"], plain.state_dict(), source=path)


@contextmanager
def _named(setting: str, path: str) -> Iterator[None]:
    try:
        yield
    except (CheckpointError, ValueError, FileNotFoundError) as error:
        raise type(error)(f"{setting}: {error}") from error
    logger.info("%s: loaded from %s", setting, path)


def _advice(path: str) -> str:
    return (
        f"This needs a backbone with both heads, as trainings export them. If {path} is a bare backbone, as released "
        "ones are: start from it with student.pretrained_weights, and train heads first (optim.freeze_backbone_epochs)."
    )
