"""The networks of a meta-architecture, built from its configuration, and how they get memory."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from dinov3.configs import load_teacher_config
from dinov3.distributed import runtime
from dinov3.layers.dino_head import DINOHead
from dinov3.models import build_model_from_cfg


def student_and_ema(cfg: Any) -> tuple[nn.ModuleDict, nn.ModuleDict, int]:
    """Two equal networks of `backbone`, `dino_head` and `ibot_head`, and D; only the first drops paths, or trains."""
    student_backbone, ema_backbone, embed_dim = build_model_from_cfg(cfg)
    student = _with_heads(student_backbone, embed_dim, cfg)
    return student, _with_heads(ema_backbone, embed_dim, cfg).requires_grad_(False), embed_dim


def distillation_teacher(cfg: Any) -> nn.ModuleDict:
    """The frozen network that `distillation.full_cfg_path` describes; its heads may be wider than the student's."""
    teacher_cfg = load_teacher_config(cfg.distillation.full_cfg_path)
    backbone, embed_dim = build_model_from_cfg(teacher_cfg, only_teacher=True)
    return _with_heads(backbone, embed_dim, teacher_cfg).requires_grad_(False)


def gram_teacher(cfg: Any) -> nn.ModuleDict:
    """A frozen network of `backbone` alone, of the student's architecture."""
    backbone, _ = build_model_from_cfg(cfg, only_teacher=True)
    return nn.ModuleDict({"backbone": backbone}).requires_grad_(False)


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


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a sharded tensor; a plain tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@torch.no_grad()
def lerp_(target: nn.Module, source: nn.Module, weight: float) -> None:
    """Move every parameter of `target` by `weight` of the way to that of the same name in `source`; buffers stay.

    Both are sharded alike, so that no communication is needed.
    """
    own, other = dict(target.named_parameters()), dict(source.named_parameters())
    assert own.keys() == other.keys(), own.keys() ^ other.keys()
    torch._foreach_lerp_(
        [local_part(parameter) for parameter in own.values()], [local_part(other[name]) for name in own], weight
    )


@torch.no_grad()
def copy_(target: nn.Module, source: nn.Module) -> None:
    """Copy every parameter and buffer of `source`, sharded alike."""
    own, other = target.state_dict(), source.state_dict()
    assert own.keys() == other.keys(), own.keys() ^ other.keys()
    for name, entry in own.items():
        local_part(entry).copy_(local_part(other[name]))


def _with_heads(backbone: nn.Module, embed_dim: int, cfg: Any) -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "backbone": backbone,
            "dino_head": _projection_head(embed_dim, cfg.dino),
            "ibot_head": _projection_head(embed_dim, cfg.ibot),
        }
    )


def _projection_head(embed_dim: int, cfg: Any) -> DINOHead:
    return DINOHead(
        in_dim=embed_dim,
        out_dim=cfg.head_n_prototypes,
        hidden_dim=cfg.head_hidden_dim,
        bottleneck_dim=cfg.head_bottleneck_dim,
        nlayers=cfg.head_nlayers,
    )
