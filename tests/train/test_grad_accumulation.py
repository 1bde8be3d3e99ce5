"""Several batches per step train like one large batch, where a loss looks at one image at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from dinov3.configs import get_default_config, learning_rate_scale
from dinov3.fsdp import full_state_dict
from dinov3.train.schedules import StepSettings
from dinov3.train.step import train_step
from dinov3.train.train import build_model
from tests.multiprocess import run_ranks

from . import tiny
from .test_world_size import make_batch

SETTINGS = StepSettings(lr=1e-3, weight_decay=0.04, momentum=0.9, teacher_temp=0.07, last_layer_lr=1e-3)


def make_config() -> Any:
    # KoLeo compares images with each other, drop path and RoPE draw at random.
    changes = {
        "dino": {"koleo_loss_weight": 0.0},
        "student": {"drop_path_rate": 0.0, "pos_embed_rope_rescale_coords": None, "layerscale": 1.0},
    }
    return OmegaConf.merge(get_default_config(), tiny.CONFIG, changes)


def make_model() -> Any:
    """The same in every process, with targets that depend on one image alone, as Sinkhorn-Knopp's do not."""
    torch.manual_seed(0)
    model = build_model(make_config()).train()
    model.init_weights()
    for loss in (model.dino_loss, model.ibot_patch_loss):
        loss.__dict__["sinkhorn_knopp_teacher"] = targets_of_single_images
    return model


def targets_of_single_images(logits: Tensor, teacher_temp: float, **_: Any) -> Tensor:
    return (logits.float() / teacher_temp).softmax(-1)


def load(model: Any, state: dict[str, Any]) -> None:
    for network in (model.student, model.model_ema):
        set_model_state_dict(network, state, options=StateDictOptions(full_state_dict=True))


def batch(first: int, count: int) -> dict[str, Any]:
    images = range(first, first + count)
    return make_batch(images, with_masks_for=images)


def step(model: Any, batches: list[Any]) -> dict[str, Any]:
    optimizer = torch.optim.AdamW(model.get_params_groups())
    result = train_step(model, optimizer, batches, SETTINGS, iteration=0, clip_grad=1.0)
    return {name: float(value) for name, value in result.metrics.items()}


def accumulate(rank: int, world_size: int, start: dict[str, Any]) -> dict[str, Any]:
    """Two images for each process and micro-batch; returns metrics, teacher, and how often gradients were summed."""
    model = make_model()
    load(model, start)
    first = 4 * rank
    metrics = step(model, [batch(first, 2), batch(first + 2, 2)])
    return {"metrics": metrics, "student": full_state_dict(model.student)}


def assert_same(got: dict[str, Any], want: dict[str, Any]) -> None:
    for name in ("total_loss", "ibot_loss", "backbone_grad_norm", "dino_head_grad_norm", "ibot_head_grad_norm"):
        assert got["metrics"][name] == pytest.approx(want["metrics"][name], rel=1e-4), name
    for name, tensor in want["student"].items():
        torch.testing.assert_close(
            got["student"][name], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def whole_batch() -> tuple[dict[str, Any], dict[str, Any]]:
    """The weights at the start, and what one step on all images at once makes of them."""
    model = make_model()
    start = full_state_dict(model.student)
    metrics = step(model, [batch(0, 8)])
    return start, {"metrics": metrics, "student": full_state_dict(model.student)}


def test_micro_batches_give_the_step_of_the_whole_batch() -> None:
    start, want = whole_batch()
    model = make_model()
    load(model, start)
    metrics = step(model, [batch(first, 2) for first in range(0, 8, 2)])
    assert_same({"metrics": metrics, "student": full_state_dict(model.student)}, want)


@pytest.mark.distributed
@pytest.mark.slow
def test_sharded_micro_batches_give_the_step_of_the_whole_batch() -> None:
    start, want = whole_batch()
    first, _ = run_ranks(accumulate, 2, start)
    assert_same(first, want)


def test_learning_rate_follows_the_images_of_a_step() -> None:
    cfg = OmegaConf.merge(get_default_config(), {"optim": {"scaling_rule": "linear_wrt_256"}})
    one = learning_rate_scale(cfg, world_size=2)
    cfg.train.grad_accumulation_steps = 3
    assert one == 0.5 and learning_rate_scale(cfg, world_size=2) == 1.5
