"""The networks of a meta-architecture: built from its configuration, given memory, filled, moved towards each other.

Notable: loading is strict, and every error names the setting that gave the checkpoint.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov3 import distributed
from dinov3.checkpointer import CheckpointError, fill_from_tensors, init_fsdp_model_from_checkpoint
from dinov3.configs import load_teacher_config
from dinov3.distributed import runtime
from dinov3.hub.run_directory import find_checkpoint
from dinov3.hub.sources import is_download, locate, without_secrets
from dinov3.hub.weights import load_backbone_, read_state_dict
from dinov3.layers.dino_head import DINOHead
from dinov3.models import build_model_from_cfg

logger = logging.getLogger("dinov3")

CENTERS = ("dino_loss.center", "ibot_patch_loss.center")
HEADS = ("dino_head", "ibot_head")
NOT_SHARDED = ("backbone.rope_embed.periods", "qkv.bias_mask")


def student_and_ema(cfg: Any) -> tuple[nn.ModuleDict, nn.ModuleDict, int]:
    """Build two equal networks of `backbone`, `dino_head` and `ibot_head`; only the first drops paths, or trains.

    Returns:
        The student, its EMA, and D.
    """
    student_backbone, ema_backbone, embed_dim = build_model_from_cfg(cfg)
    student = _with_heads(student_backbone, embed_dim, cfg)
    return student, _with_heads(ema_backbone, embed_dim, cfg).requires_grad_(False), embed_dim


def distillation_teacher(cfg: Any) -> nn.ModuleDict:
    """Build the frozen network of `distillation.full_cfg_path`; its heads may be wider than the student's."""
    teacher_cfg = load_teacher_config(cfg.distillation.full_cfg_path)
    backbone, embed_dim = build_model_from_cfg(teacher_cfg, only_teacher=True)
    return _with_heads(backbone, embed_dim, teacher_cfg).requires_grad_(False)


def gram_teacher(cfg: Any) -> nn.ModuleDict:
    """Build a frozen `backbone` of the student's architecture, without heads."""
    backbone, _ = build_model_from_cfg(cfg, only_teacher=True)
    return nn.ModuleDict({"backbone": backbone}).requires_grad_(False)


def _with_heads(backbone: nn.Module, embed_dim: int, cfg: Any) -> nn.ModuleDict:
    heads = {
        name: DINOHead(
            in_dim=embed_dim,
            out_dim=section.head_n_prototypes,
            hidden_dim=section.head_hidden_dim,
            bottleneck_dim=section.head_bottleneck_dim,
            nlayers=section.head_nlayers,
        )
        for name, section in (("dino_head", cfg.dino), ("ibot_head", cfg.ibot))
    }
    return nn.ModuleDict({"backbone": backbone, **heads})


def materialize_(module: nn.Module) -> None:
    """Give every meta tensor of `module` memory on the runtime device, filled with NaN (integers: their minimum).

    Whatever is then not initialised shows as NaN at the first step instead of training on leftovers.
    """
    device = runtime.device()
    for child in module.modules():
        entries = itertools.chain(child.parameters(recurse=False), child.buffers(recurse=False))
        if any(entry.is_meta for entry in entries):
            child.to_empty(device=device, recurse=False)
    with torch.no_grad():
        for entry in itertools.chain(module.parameters(), module.buffers()):
            local_part(entry).fill_(torch.nan if entry.is_floating_point() else torch.iinfo(entry.dtype).min)


def init_weights_(networks: nn.ModuleDict) -> None:
    """Fill every network with random weights."""
    for network in networks.values():
        network.init_weights()  # type: ignore[operator]


def load_networks(networks: nn.ModuleDict, path: str, *, setting: str) -> None:
    """Fill backbone and both heads from the teacher of a training, strictly.

    Args:
        networks: `backbone`, `dino_head`, `ibot_head`, plain or sharded.
        path: a teacher's file or directory, a training's checkpoint, or a training run (see `find_checkpoint`).
        setting: the key that gave `path`.

    Raises:
        CheckpointError: the checkpoint does not fit; a backbone without heads does not.
        FileNotFoundError: there is no such file.
    """
    with _errors_name(setting, path):
        try:
            found = _find(path)
            init_fsdp_model_from_checkpoint(networks, found, skip_load_keys=CENTERS, keys_not_sharded=NOT_SHARDED)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}\nThis needs a backbone with both heads, as trainings export them. If {path} is a bare "
                "backbone, as released ones are: start from it with student.pretrained_weights, and train heads first "
                "(optim.freeze_backbone_epochs)."
            ) from error


def load_backbone(networks: nn.ModuleDict, path: str, cfg: Any, *, setting: str) -> None:
    """Fill the backbone from any checkpoint that the hub loads; heads stay, and are not needed.

    Args:
        networks: with the key `backbone`, plain or sharded.
        path: see `dinov3.hub.weights.read_state_dict`; or an https:// URL.
        cfg: the configuration that the backbone was built from.
        setting: the key that gave `path`.

    Raises:
        CheckpointError: the checkpoint does not fit.
        WeightsError: it is unreadable, or of another model.
        FileNotFoundError: there is no such file.
    """
    with _errors_name(setting, path):
        found = _find(path)
        if (found / ".metadata").is_file():
            # Each process reads only its shards.
            init_fsdp_model_from_checkpoint(networks, found, skip_load_keys=HEADS + CENTERS)
        else:
            plain, _ = build_model_from_cfg(cfg, only_teacher=True)
            # Mapped, because each process copies only its shards, and leaves the file before this returns.
            state = read_state_dict(found, mmap=True, like=lambda: plain)
            load_backbone_(plain, state, source=str(found), target=cfg.student.arch)
            fill_from_tensors(networks["backbone"], plain.state_dict(), source=found)


def _find(path: str) -> Path:
    if is_download(path):  # Each machine may have a cache of its own.
        return locate(path, progress=distributed.is_main_process())
    # One process decides, because a run that is still training may save its next checkpoint meanwhile.
    return distributed.broadcast_object(find_checkpoint(Path(path).expanduser()))


@contextmanager
def _errors_name(setting: str, path: str) -> Iterator[None]:
    try:
        yield
    except (CheckpointError, ValueError, FileNotFoundError, ConnectionError) as error:
        # Errors about a download name the file in the cache.
        given = f"{setting}={without_secrets(path)}" if is_download(path) else setting
        raise type(error)(f"{given}: {error}") from error
    logger.info("%s: loaded from %s", setting, without_secrets(path))


def local_part(tensor: Tensor) -> Tensor:
    """Return the shard of a tensor that this process holds; a plain tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@torch.no_grad()
def lerp_(target: nn.Module, source: nn.Module, weight: float) -> None:
    """Move every parameter of `target` by `weight` of the way to that of the same name in `source`; buffers stay."""
    own, other = dict(target.named_parameters()), dict(source.named_parameters())
    assert own.keys() == other.keys(), own.keys() ^ other.keys()
    # Both are sharded alike, so that no communication is needed.
    torch._foreach_lerp_(
        [local_part(parameter) for parameter in own.values()], [local_part(other[name]) for name in own], weight
    )


@torch.no_grad()
def copy_(target: nn.Module, source: nn.Module) -> None:
    """Copy every parameter and buffer of `source`, which is sharded like `target`."""
    own, other = target.state_dict(), source.state_dict()
    assert own.keys() == other.keys(), own.keys() ^ other.keys()
    for name, entry in own.items():
        local_part(entry).copy_(local_part(other[name]))
