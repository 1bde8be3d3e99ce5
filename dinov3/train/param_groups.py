"""Optimizer parameter groups: layer-wise learning rates (BEiT, arXiv 2106.08254) and what is not decayed.

The groups carry multipliers, `lr_multiplier` and `wd_multiplier`, for the scheduled values, and `is_last_layer` for the
prototypes, whose learning rate may be frozen at the start.

Notable:
- Names are those within one network (backbone or head), cleaned of the infixes that wrappers leave.
- Tokens (`cls_token`, `storage_tokens`, `mask_token`) *are* decayed, biases, norms and layer scales are not.
- A backbone without `blocks` (ConvNeXt) has no layer-wise decay.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

_WRAPPER_INFIXES = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "parametrizations.")
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")
_BEFORE_THE_BLOCKS = ("pos_embed", "patch_embed", "mask_token", "cls_token", "storage_tokens")
_UNDECAYED = ("norm", "gamma", "fourier_w")


def params_groups_of_networks(networks: nn.ModuleDict, optim: Any) -> list[dict[str, Any]]:
    """Return the optimizer's groups for a student's backbone and heads, as the section `optim` says."""
    groups: list[dict[str, Any]] = []
    for name, network in networks.items():
        of_network = get_params_groups_with_decay_fsdp(
            network,
            lr_decay_rate=optim.layerwise_decay,
            patch_embed_lr_mult=optim.patch_embed_lr_mult,
            dino_head_wd_multiplier=optim.dino_head_wd_multiplier,
            is_dino_head=name == "dino_head",
        )
        groups += fuse_params_groups(of_network) if optim.multi_tensor_optim else of_network
    if not optim.multi_tensor_optim:
        return groups
    return [group | {"foreach": True, "fused": True} for group in groups]


def get_params_groups_with_decay_fsdp(
    model: nn.Module,
    lr_decay_rate: float = 1.0,
    patch_embed_lr_mult: float = 1.0,
    dino_head_wd_multiplier: float = 1.0,
    *,
    is_dino_head: bool = False,
    norms_by_type: bool = False,
) -> list[dict[str, Any]]:
    """Return one group per trainable parameter of one network, wrapped or not.

    Args:
        model: a backbone or a head.
        lr_decay_rate: factor of the learning rate per block, counted from the output; 1 is none.
        patch_embed_lr_mult: additional factor of the patch embedding's learning rate.
        dino_head_wd_multiplier: weight-decay multiplier of the decayed parameters when `is_dino_head`.
        is_dino_head: `model` is the DINO head.
        norms_by_type: also spare norm layers without "norm" in their names, as ConvNeXt has in `downsample_layers`; the
            published training decays them.

    Returns:
        Dictionaries `name`, `params` (the parameter), `is_last_layer`, `lr_multiplier`, `wd_multiplier`, in the order
        of `named_parameters()`.
    """
    blocks = getattr(model, "blocks", None)
    n_blocks = len(blocks) if isinstance(blocks, nn.ModuleList) else 0
    in_norm_layers = {
        f"{path}.{name}".removeprefix(".")
        for path, module in model.named_modules()
        if norms_by_type and "norm" in type(module).__name__.lower()
        for name, _ in module.named_parameters(recurse=False)
    }
    groups = []
    for raw_name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        name = remove_fsdp_compile_names(raw_name)
        lr_multiplier = get_vit_lr_decay_rate(name, lr_decay_rate, n_blocks, force_is_backbone=n_blocks > 0)
        if "patch_embed" in name:
            lr_multiplier *= patch_embed_lr_mult
        if name.endswith("bias") or any(part in name for part in _UNDECAYED) or raw_name in in_norm_layers:
            wd_multiplier = 0.0
        else:
            wd_multiplier = dino_head_wd_multiplier if is_dino_head else 1.0
        groups.append(
            {
                "name": name,
                "params": parameter,
                "is_last_layer": "last_layer" in name,
                "lr_multiplier": lr_multiplier,
                "wd_multiplier": wd_multiplier,
            }
        )
    return groups


def get_vit_lr_decay_rate(
    name: str,
    lr_decay_rate: float = 1.0,
    num_layers: int = 12,
    force_is_backbone: bool = False,
    chunked_blocks: bool = False,
) -> float:
    """Return the learning-rate multiplier of a parameter under layer-wise decay.

    Args:
        name: its name; in a backbone if it starts with `backbone` or with `force_is_backbone`, else the result is 1.
        lr_decay_rate: factor per block.
        num_layers: number of blocks, n.
        force_is_backbone: `name` is relative to a backbone.
        chunked_blocks: names are `blocks.<chunk>.<block>.`, not `blocks.<block>.`.

    Returns:
        `lr_decay_rate` to the power of n + 1 for embeddings and tokens, n - i for block i, 0 for what follows.
    """
    layer = num_layers + 1
    if force_is_backbone or name.startswith("backbone"):
        if any(part in name for part in _BEFORE_THE_BLOCKS):
            layer = 0
        elif "blocks." in name:
            indices = name[name.index("blocks.") :].split(".")[1:]
            layer = int(indices[1 if chunked_blocks else 0]) + 1
    return lr_decay_rate ** (num_layers + 1 - layer)


def remove_fsdp_compile_names(name: str) -> str:
    """Return a parameter's name without what FSDP, activation checkpointing, parametrisation or compile put into it."""
    for infix in _WRAPPER_INFIXES:
        name = name.replace(infix, "")
    name = name.removesuffix(".original")
    for prefix in _WRAPPER_PREFIXES:
        name = name.replace(prefix, "")
    return name


def fuse_params_groups(
    groups: Iterable[dict[str, Any]], keys: Sequence[str] = ("lr_multiplier", "wd_multiplier", "is_last_layer")
) -> list[dict[str, Any]]:
    """Merge the groups that agree in `keys`, so that the optimizer handles few large groups.

    Args:
        groups: from `get_params_groups_with_decay_fsdp`, perhaps of several networks.
        keys: what has to agree; everything else but the parameters is dropped.

    Returns:
        Groups with `keys` and `params` (a list), in order of first appearance.
    """
    fused: dict[tuple[Any, ...], dict[str, Any]] = {}
    for group in groups:
        values = tuple(group[key] for key in keys)
        merged = fused.setdefault(values, {"params": []} | dict(zip(keys, values, strict=True)))
        merged["params"].append(group["params"])
    return list(fused.values())
