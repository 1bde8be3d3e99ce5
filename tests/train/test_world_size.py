"""FSDP2 on two gloo processes trains like one process on the same global batch, in every kind of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from dinov3 import distributed
from dinov3.configs import get_default_config
from dinov3.fsdp import full_state_dict
from dinov3.train.schedules import StepSettings
from dinov3.train.ssl_meta_arch import SSLMetaArch
from dinov3.train.step import train_step
from dinov3.train.train import build_model
from tests.multiprocess import run_ranks

from . import tiny

N_IMAGES, N_STEPS = 8, 6

#: What depends on the process count by definition is off: KoLeo inside a rank, random drop path and RoPE.
COMMON = {
    "dino": {"koleo_loss_distributed": True},
    # With the usual layer scale of 1e-5 the first class tokens all but coincide, and KoLeo's distances are noise.
    "student": {"drop_path_rate": 0.0, "pos_embed_rope_rescale_coords": None, "layerscale": 1.0},
}
WIDER = {
    "student": {"n_storage_tokens": 0, "depth": 3},
    "dino": {"head_hidden_dim": 64, "head_bottleneck_dim": 24},
    "ibot": {"head_hidden_dim": 64, "head_bottleneck_dim": 24},
}
GRAM = {
    "gram": {
        "use_loss": True,
        "ckpt": "gram.pth",
        "img_level": True,
        "loss_weight": 2.0,
        "it_first_update": 3,
        "update_frequency": 4,
        "max_updates": 1,
    },
    "crops": {"gram_teacher_crops_size": 64},
}
DISTILLATION = {"distillation": {"enabled": True, "full_cfg_path": "teacher.yaml", "checkpoint_path": "teacher.pth"}}
MULTI = DISTILLATION | {
    "MODEL": {"META_ARCHITECTURE": "MultiDistillationMetaArch"},
    "multidistillation": {"enabled": True, "global_batch_size": N_IMAGES},
}
KINDS: dict[str, dict[str, Any]] = {"plain": {}, "gram": GRAM, "distillation": DISTILLATION, "multidistillation": MULTI}


def config(*changes: dict[str, Any]) -> Any:
    return OmegaConf.merge(get_default_config(), tiny.CONFIG, COMMON, *changes)


def write_weights(directory: Path) -> None:
    """The start of all students, a Gram teacher, and a teacher to distil, as files."""
    OmegaConf.save(config(WIDER), directory / "teacher.yaml")
    for name, changes in (("start", {}), ("gram", {}), ("teacher", WIDER)):
        arch = SSLMetaArch(config(changes))
        arch.init_weights()
        torch.save({"teacher": arch.student.state_dict()}, directory / f"{name}.pth")


def make_batch(images: range, with_masks_for: range) -> dict[str, Any]:
    """Some images out of a fixed global batch, with fixed masks for some."""
    generator = torch.Generator().manual_seed(0)

    def crops(count: int, size: int) -> torch.Tensor:
        whole = torch.randn(count, N_IMAGES, 3, size, size, generator=generator)
        return whole[:, images.start : images.stop].flatten(0, 1)

    global_crops, local_crops, gram_crops = crops(2, 32), crops(2, 16), crops(2, 64)
    masks = torch.rand(2, N_IMAGES, 16, generator=generator) < 0.3
    masks = masks[:, with_masks_for.start : with_masks_for.stop].flatten(0, 1)
    weights = (1 / masks.sum(1).clamp(min=1.0)).unsqueeze(1).expand_as(masks)[masks]
    return {
        "collated_global_crops": global_crops,
        "collated_local_crops": local_crops,
        "collated_gram_teacher_crops": gram_crops,
        "collated_masks": masks,
        "mask_indices_list": masks.flatten().nonzero().flatten(),
        "masks_weight": weights,
        "upperbound": int(masks.sum()),
        "n_masked_patches": masks.sum().reshape(1),
        "global_batch_size": N_IMAGES,
    }


def train(
    rank: int, world_size: int, kind: str, directory: Path, subgroups: list[list[int]] | None = None
) -> dict[str, Any]:
    if subgroups is not None:
        distributed.new_subgroups(subgroups)
    cfg = config(KINDS[kind], {"student": {"resume_from_teacher_chkpt": str(directory / "start.pth")}})
    cfg.gram.ckpt = cfg.gram.ckpt and str(directory / cfg.gram.ckpt)
    for key in ("full_cfg_path", "checkpoint_path"):
        cfg.distillation[key] = cfg.distillation[key] and str(directory / cfg.distillation[key])
    model = build_model(cfg).train()
    model.init_weights()

    own = split(rank, world_size)
    of_student = split(distributed.get_subgroup_rank(), distributed.get_subgroup_size())
    batch = make_batch(own, with_masks_for=of_student)
    optimizer = torch.optim.AdamW(model.get_params_groups())
    losses = []
    for iteration in range(N_STEPS):
        settings = StepSettings(lr=1e-3, weight_decay=0.04, momentum=0.9, teacher_temp=0.07, last_layer_lr=1e-3)
        result = train_step(model, optimizer, batch, settings, iteration=iteration, clip_grad=1.0)
        losses.append(float(result.metrics["total_loss"]))
    is_sharded = any(hasattr(parameter, "to_local") for parameter in model.student.parameters())
    return {"losses": losses, "teacher": full_state_dict(model.model_ema), "is_sharded": is_sharded}


def split(index: int, count: int) -> range:
    share = N_IMAGES // count
    return range(index * share, (index + 1) * share)


def assert_trained_alike(got: dict[str, Any], want: dict[str, Any]) -> None:
    assert got["losses"] == pytest.approx(want["losses"], rel=1e-5)
    for name, tensor in want["teacher"].items():
        torch.testing.assert_close(
            got["teacher"][name], tensor, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_give_the_losses_of_one(kind: str, tmp_path: Path) -> None:
    assert not distributed.is_enabled()
    write_weights(tmp_path)
    one = train(0, 1, kind, tmp_path)
    first, second = run_ranks(train, 2, kind, tmp_path)

    assert first["is_sharded"] and not one["is_sharded"]
    assert first["losses"] == second["losses"]
    assert_trained_alike(first, one)
    assert one["losses"][-1] < one["losses"][0]


@pytest.mark.distributed
@pytest.mark.slow
def test_each_of_two_students_is_trained_as_if_it_were_alone(tmp_path: Path) -> None:
    write_weights(tmp_path)
    alone = train(0, 1, "multidistillation", tmp_path)
    first, second = run_ranks(train, 2, "multidistillation", tmp_path, [[0], [1]])
    assert_trained_alike(first, alone)
    assert_trained_alike(second, alone)
