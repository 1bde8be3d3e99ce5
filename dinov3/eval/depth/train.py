"""Training a depth head on a frozen backbone (arXiv 2508.10104, section 6)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov3 import distributed
from dinov3.data.fingerprint import fingerprint
from dinov3.distributed import runtime
from dinov3.eval.dense.data import collate_pairs
from dinov3.eval.depth.config import DepthConfig
from dinov3.eval.depth.eval import evaluate_depther_with_config
from dinov3.eval.depth.loss import MultiLoss
from dinov3.eval.depth.metrics import DEPTH_METRICS, make_valid_mask
from dinov3.eval.training.checkpoints import Checkpoints
from dinov3.eval.training.config import training_settings
from dinov3.eval.training.loader import make_train_loader
from dinov3.eval.training.loop import METRICS_FILENAME, HeadTraining, Metrics, apply_gradients, better_by, train_head
from dinov3.eval.training.schedulers import build_adamw
from dinov3.heads.depth.depther import Depther, make_depther_from_config
from dinov3.layers.resizing import resize_bilinear

logger = logging.getLogger("dinov3")

WITHOUT_EFFECT_ON_TRAINING = (
    "n_gpus",
    "eval.eval_interval",
    "num_workers",
    "result_config",
    "load_from",
    "output_dir",
    "datasets.root",
    "datasets.test",
    "eval.use_tta",
    "metrics",
)


def train_model_with_backbone(
    config: DepthConfig, backbone: nn.Module, autocast_dtype: torch.dtype, train_set: Any, val_set: Any
) -> Depther:
    """Train the head that `config` describes, starting from the newest checkpoint of its output directory.

    Args:
        config: of the run.
        backbone: frozen.
        autocast_dtype: what both run in.
        train_set: from `make_depth_dataset`.
        val_set: from `make_depth_dataset`.

    Returns:
        The model with the head after the last step, in evaluation mode, on this process's device.

    Raises:
        ValueError: a checkpoint belongs to another training, or the images of one batch differ in size.
        RuntimeError: the loss is not finite.
    """
    if not config.losses:
        raise ValueError("training needs losses, e.g. losses.SIGLOSS=1.0")
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)  # the same first weights in every process
        depther = make_depther_from_config(backbone, config.decoder_head, autocast_dtype=autocast_dtype)
    depther = depther.to(runtime.device())
    criterion = MultiLoss(config.losses)
    optimizer, scheduler = build_adamw(depther.decoder.parameters(), config.optimizer, config.scheduler)
    metric = next(metric for metric in DEPTH_METRICS if metric.name == config.metrics[0])

    def evaluate(_: int) -> Metrics:
        results = evaluate_depther_with_config(config, depther, runtime.device(), split="val", dataset=val_set)[0]
        return {name: float(value) for name, value in results.items()}

    task = HeadTraining(
        # Not the backbone: in training mode its positions are rescaled at random.
        head=depther.decoder,
        optimizer=optimizer,
        scheduler=scheduler,
        checkpoints=Checkpoints(config.output_dir),
        settings=training_settings(config, ignored=WITHOUT_EFFECT_ON_TRAINING),
        data=fingerprint(train_set),
        make_batches=lambda first: make_train_loader(
            train_set, config.bs, config.num_workers, first, seed=config.seed, collate_fn=collate_pairs
        ),
        step=lambda batch, iteration: train_step(depther, batch, criterion, optimizer, scheduler, config, iteration),
        evaluate=evaluate,
        is_better=better_by(metric.name, lower_is_better=metric.is_lower_better),
        more_state={"loss": (criterion.loss_state, criterion.load_loss_state)},
        metrics_file=Path(config.output_dir) / METRICS_FILENAME,
    )
    total_iter, eval_interval = config.scheduler.total_iter, config.eval.eval_interval
    train_head(task, total_iter=total_iter, eval_interval=eval_interval, seed=config.seed)
    return depther.eval()


def train_step(
    depther: Depther,
    batch: tuple[Tensor, Tensor],
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    config: DepthConfig,
    iteration: int,
) -> Tensor:
    """Do one step of the head.

    Args:
        depther: its decoder in training mode.
        batch: images [b, 3, H, W], normalised, and depth [b, 1, h, w] in metres.
        criterion: takes (prediction, depth, valid pixels).
        optimizer: of the decoder.
        scheduler: stepped after it.
        config: `optimizer.gradient_clip`, the valid pixels, and `global_loss`.
        iteration: number of the step.

    Returns:
        The mean loss of the processes, before the step.
    """
    images, depth = (tensor.to(runtime.device(), non_blocking=True) for tensor in batch)
    mask_type = config.transforms.train.eval_mask if config.transforms.train else "FULL"
    valid = make_valid_mask(depth, mask_type, config.eval.ignored_value)
    if not valid.any():
        logger.warning("step %d: no pixel of this process's %d depth maps is valid", iteration, len(depth))
    depth = depth.masked_fill(~valid, config.eval.ignored_value)
    prediction = resize_bilinear(depther(images), depth.shape[-2:])
    if config.global_loss:
        # One loss of all images, so that the number of processes plays no role; as published each process has its own.
        prediction = distributed.all_gather_with_grad(prediction)
        depth, valid = (torch.cat(distributed.gather_all_tensors(tensor)) for tensor in (depth, valid))
    loss = criterion(prediction, depth, valid)
    mean_loss = apply_gradients(loss, optimizer, clip=config.optimizer.gradient_clip, iteration=iteration)
    scheduler.step()
    return mean_loss
