"""Training a linear segmentation head on a frozen backbone (arXiv 2508.10104, section 6.1).

Notable:
- The backbone stays in evaluation mode throughout; an evaluation in between puts only the head into it.
- The schedule does not move after the first step, so that steps 0 and 1 have one rate, as published.
- `best.pth` holds the head that is best by `metric_to_save`, whose metrics are returned; `model_final.pth` the last.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov3.distributed import runtime
from dinov3.eval.command.config import training_settings
from dinov3.eval.segmentation.config import SegmentationConfig
from dinov3.eval.segmentation.data import Batch, make_segmentation_dataset, make_segmentation_train_loader
from dinov3.eval.segmentation.eval import evaluate_segmentation_with_config
from dinov3.eval.segmentation.loss import MultiSegmentationLoss
from dinov3.eval.segmentation.schedulers import build_scheduler
from dinov3.eval.training.loop import HeadTraining, Metrics, TrainingResult, apply_gradients, train_head
from dinov3.heads.segmentation import FeatureDecoder, build_segmentation_decoder
from dinov3.heads.weights import head_entries, load_head_
from dinov3.layers.resizing import resize_bilinear

logger = logging.getLogger("dinov3")

HEAD_PREFIX = "segmentation_model.1."
WITHOUT_EFFECT_ON_TRAINING = (
    "n_gpus",
    "eval.eval_interval",
    "num_workers",
    "load_from",
    "output_dir",
    "save_predictions",
    "datasets.root",
    "eval.use_tta",
    "eval.max_windows_per_batch",
    "transforms.eval.tta_ratios",
)


def train_segmentation(backbone: nn.Module, config: SegmentationConfig) -> dict[str, float]:
    """Train the head that `config` describes, from the newest checkpoint of its output directory on.

    Returns:
        The metrics of the best validation, in percent.

    Raises:
        ValueError: a checkpoint is of another training, labels are out of range, or images of one batch differ in size.
        RuntimeError: the loss is not finite.
    """
    return train_segmentation_head(backbone, config)[1].best_metrics


def train_segmentation_head(backbone: nn.Module, config: SegmentationConfig) -> tuple[FeatureDecoder, TrainingResult]:
    """As `train_segmentation`; gives the model with the last head, and what was measured when."""
    train_set, val_set = (make_segmentation_dataset(config, split) for split in ("train", "val"))
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)  # the same first weights in every process
        model = build_model(backbone, config)
    head = model.segmentation_model[1]
    device = runtime.device()
    criterion = MultiSegmentationLoss(
        diceloss_weight=config.train.diceloss_weight, celoss_weight=config.train.celoss_weight
    )
    optimizer = torch.optim.AdamW(
        head.parameters(),
        lr=config.optimizer.lr,
        betas=(config.optimizer.beta1, config.optimizer.beta2),
        weight_decay=config.optimizer.weight_decay,
    )
    scheduler = build_scheduler(
        config.scheduler.type,
        optimizer,
        config.optimizer.lr,
        config.scheduler.total_iter,
        config.scheduler.constructor_kwargs,
    )

    def step(batch: Batch, iteration: int) -> Tensor:
        try:
            return train_step(
                model,
                batch,
                device,
                None,
                optimizer,
                config.optimizer.gradient_clip,
                scheduler,
                criterion,
                config.model_dtype.autocast_dtype,
                iteration,
            )
        except ValueError as error:
            names = ", ".join(train_set.get_image_relpath(index) for index in batch[1][0].tolist())
            raise ValueError(f"step {iteration}, images {names}: {error}") from error

    def is_better(metrics: Metrics, others: Metrics) -> bool:
        return (
            math.isnan(others[config.metric_to_save]) or metrics[config.metric_to_save] > others[config.metric_to_save]
        )

    task = HeadTraining(
        head=head,
        optimizer=optimizer,
        scheduler=scheduler,
        make_batches=lambda first: make_segmentation_train_loader(train_set, config, first),
        step=step,
        validate=lambda: evaluate_segmentation_with_config(config, model, device, dataset=val_set),
        is_better=is_better,
        to_entries=lambda: {HEAD_PREFIX + name: tensor for name, tensor in head.state_dict().items()},
        from_entries=lambda entries: _restore(head, entries),
        settings=training_settings(config, ignored=WITHOUT_EFFECT_ON_TRAINING),
    )
    result = train_head(
        task,
        total_iter=config.scheduler.total_iter,
        eval_interval=config.eval.eval_interval,
        output_dir=Path(config.output_dir or "."),
        seed=config.seed,
    )
    return model.eval(), result


def build_model(backbone: nn.Module, config: SegmentationConfig) -> FeatureDecoder:
    """The model of a run with a new head, on this process's device."""
    head = config.decoder_head
    model = build_segmentation_decoder(
        backbone,
        head.backbone_out_layers,
        head.type,
        hidden_dim=head.hidden_dim,
        num_classes=head.num_classes,
        dropout=head.dropout,
        autocast_dtype=config.model_dtype.autocast_dtype,
        use_batchnorm=head.use_batchnorm,
        use_cls_token=head.use_cls_token,
        use_backbone_norm=head.use_backbone_norm,
    )
    return model.to(runtime.device())


def load_segmentation_head_(model: FeatureDecoder, entries: Mapping[str, Any], *, source: str) -> FeatureDecoder:
    """Put the entries of a head, with or without their prefix in the whole model, into a model, strictly.

    Raises:
        WeightsError: they are those of another head.
    """
    head = model.segmentation_model[1]
    load_head_(head, head_entries(entries, HEAD_PREFIX), source=source, target="this segmentation head")
    return model


def train_step(
    segmentation_model: FeatureDecoder,
    batch: Batch,
    device: torch.device | str,
    scaler: torch.amp.GradScaler | None,
    optimizer: torch.optim.Optimizer,
    optimizer_gradient_clip: float,
    scheduler: Any,
    criterion: nn.Module,
    model_dtype: torch.dtype,
    global_step: int,
) -> Tensor:
    """One step of the head.

    Args:
        segmentation_model: its head in training mode.
        batch: images [b, 3, H, W], normalised, and (index, labels [b, 1, h, w]).
        device: where the model is.
        scaler: of the loss, for float16; None: none, which float32 and bfloat16 need.
        optimizer: of the head.
        optimizer_gradient_clip: largest norm of the gradient; inf: any.
        scheduler: stepped after it, except after step 0.
        criterion: of (logits float32 [b, K, h, w], labels int64 [b, h, w]).
        model_dtype: what the model runs in; float32 means no autocast.
        global_step: number of the step.

    Returns:
        The mean loss of the processes, before the step.
    """
    images, (_, labels) = batch
    images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
    labels = labels.squeeze(1).long()  # [b, h, w]
    with torch.autocast(images.device.type, dtype=model_dtype, enabled=model_dtype != torch.float32):
        logits = segmentation_model(images)
    loss = criterion(resize_bilinear(logits.float(), labels.shape[-2:]), labels)
    mean_loss = apply_gradients(loss, optimizer, clip=optimizer_gradient_clip, iteration=global_step, scaler=scaler)
    if global_step > 0:
        scheduler.step()
    return mean_loss


def _restore(head: nn.Module, entries: Mapping[str, Any]) -> None:
    # In place: the optimizer holds these very parameters.
    head.load_state_dict(head_entries(entries, HEAD_PREFIX))
