"""Training a segmentation head on a frozen backbone (arXiv 2508.10104, section 6.1)."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from dinov3.data.fingerprint import fingerprint
from dinov3.distributed import runtime
from dinov3.eval.segmentation.config import SegmentationConfig
from dinov3.eval.segmentation.data import Batch, make_segmentation_train_loader
from dinov3.eval.segmentation.eval import evaluate_segmentation_with_config
from dinov3.eval.segmentation.loss import MultiSegmentationLoss
from dinov3.eval.segmentation.mask_training import AdapterAndHead, train_mask_step
from dinov3.eval.training.checkpoints import Checkpoints
from dinov3.eval.training.config import training_settings
from dinov3.eval.training.loop import (
    METRICS_FILENAME,
    HeadTraining,
    TrainingResult,
    apply_gradients,
    better_by,
    train_head,
)
from dinov3.eval.training.schedulers import build_adamw
from dinov3.heads.mask2former.adapter import DINOv3_Adapter
from dinov3.heads.segmentation import FeatureDecoder, build_segmentation_decoder
from dinov3.heads.weights import head_entries, load_head_, set_aside
from dinov3.layers.resizing import resize_bilinear
from dinov3.loss.mask_classification_loss import MaskClassificationLoss

logger = logging.getLogger("dinov3")

#: Of the entries of a head in the whole model, by its type. That of a Mask2Former head has the adapter, too.
HEAD_PREFIXES = {"linear": "segmentation_model.1.", "m2f": "segmentation_model."}
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
    "eval.tasks",
    "eval.stuff",
    "transforms.eval.tta_ratios",
)
#: Settings of one type of head, which those of another type do not depend on.
SETTINGS_OF_HEAD = {
    "linear": (
        "decoder_head.dropout",
        "decoder_head.use_batchnorm",
        "decoder_head.use_cls_token",
        "decoder_head.use_backbone_norm",
        "train.diceloss_weight",
        "train.celoss_weight",
    ),
    "m2f": (
        "decoder_head.ffn_dim",
        "decoder_head.n_queries",
        "decoder_head.n_encoder_layers",
        "decoder_head.n_decoder_layers",
        "decoder_head.drop_path",
        "train.n_points",
    ),
}


def train_segmentation_head(
    backbone: nn.Module, config: SegmentationConfig, train_set: Any, val_set: Any
) -> tuple[FeatureDecoder, TrainingResult]:
    """Train the head that `config` describes, starting from the newest checkpoint of its output directory.

    Args:
        backbone: frozen.
        config: of the run.
        train_set: from `make_segmentation_dataset`.
        val_set: from `make_segmentation_dataset`.

    Returns:
        The model with the last head, in evaluation mode, and what was measured when, in percent. `best.pth` holds the
        head that is best by `metric_to_save`.

    Raises:
        ValueError: a checkpoint belongs to another training, labels are out of range, or the images of one batch differ
            in size.
        RuntimeError: the loss is not finite.
    """
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)  # the same first weights in every process
        model = build_model(backbone, config)
    device, dtype, clip = runtime.device(), config.model_dtype.autocast_dtype, config.optimizer.gradient_clip
    head = trained_part(model)
    optimizer, scheduler = build_optimizer(model, config)
    criterion: nn.Module
    if isinstance(head, AdapterAndHead):
        criterion = MaskClassificationLoss(config.decoder_head.num_classes, n_points=config.train.n_points)
        train = functools.partial(train_mask_step, seed=config.seed)
        others = SETTINGS_OF_HEAD["linear"]
    else:
        criterion = MultiSegmentationLoss(
            diceloss_weight=config.train.diceloss_weight, celoss_weight=config.train.celoss_weight
        )
        train, others = functools.partial(train_step), SETTINGS_OF_HEAD["m2f"]

    def step(batch: Batch, iteration: int) -> Tensor:
        try:
            return train(model, batch, device, None, optimizer, clip, scheduler, criterion, dtype, iteration)
        except ValueError as error:
            names = ", ".join(train_set.get_image_relpath(index) for index in batch[1][0].tolist())
            raise ValueError(f"step {iteration}, images {names}: {error}") from error

    output_dir = Path(config.output_dir or ".")
    task = HeadTraining(
        # Not the backbone: in training mode its positions are rescaled at random.
        head=head,
        optimizer=optimizer,
        scheduler=scheduler,
        checkpoints=Checkpoints(output_dir),
        settings=training_settings(config, ignored=WITHOUT_EFFECT_ON_TRAINING + others),
        data=fingerprint(train_set),
        make_batches=lambda first: make_segmentation_train_loader(train_set, config, first),
        step=step,
        evaluate=lambda _: evaluate_segmentation_with_config(config, model, device, dataset=val_set),
        is_better=better_by(config.metric_to_save),
        prefix=HEAD_PREFIXES[config.decoder_head.type],
        metrics_file=output_dir / METRICS_FILENAME,
    )
    total_iter, eval_interval = config.scheduler.total_iter, config.eval.eval_interval
    result = train_head(task, total_iter=total_iter, eval_interval=eval_interval, seed=config.seed)
    return model.eval(), result


def build_optimizer(model: FeatureDecoder, config: SegmentationConfig) -> tuple[torch.optim.AdamW, LRScheduler]:
    """Build AdamW for the head of a model, and its schedule."""
    schedule = config.scheduler
    peak = schedule.constructor_kwargs.get("max_lr")
    if schedule.type == "WarmupOneCycleLR" and peak is not None:
        logger.warning("max_lr=%s has no effect, as published: the peak is optimizer.lr", peak)
        others = {name: value for name, value in schedule.constructor_kwargs.items() if name != "max_lr"}
        schedule = dataclasses.replace(schedule, constructor_kwargs=others)
    parameters = [parameter for parameter in trained_part(model).parameters() if parameter.requires_grad]
    return build_adamw(parameters, config.optimizer, schedule)


def trained_part(model: FeatureDecoder) -> nn.Module:
    """Return what learns: the head, and the adapter that a Mask2Former head reads through."""
    reader, head = model.segmentation_model
    return AdapterAndHead(model.segmentation_model) if isinstance(reader, DINOv3_Adapter) else head


def build_model(backbone: nn.Module, config: SegmentationConfig) -> FeatureDecoder:
    """Build the model of a run with a new head, on this process's device."""
    head = config.decoder_head
    options: dict[str, Any] = {}
    if head.type == "m2f":
        names = ("ffn_dim", "n_queries", "n_encoder_layers", "n_decoder_layers")
        options = {name: getattr(head, name) for name in names}
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
        drop_path=head.drop_path,
        **options,
    )
    return model.to(runtime.device())


def load_segmentation_head_(model: FeatureDecoder, entries: Mapping[str, Any], *, source: str) -> FeatureDecoder:
    """Load the entries of a head, with or without their prefix in the whole model, strictly.

    Those of a Mask2Former head include its adapter's; those of the backbone in it are left out.

    Raises:
        WeightsError: they belong to another head.
    """
    reader, head = model.segmentation_model
    target = "this segmentation head"
    if not isinstance(reader, DINOv3_Adapter):
        load_head_(head, head_entries(entries, HEAD_PREFIXES["linear"]), source=source, target=target)
        return model
    parts = model.segmentation_model
    with set_aside(parts, reader.backbone) as inside:
        assert inside is not None
        found = head_entries(entries, HEAD_PREFIXES["m2f"])
        own = {name: entry for name, entry in found.items() if not name.startswith(inside)}
        load_head_(parts, own, source=source, target=target)
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
    """Do one step of the head.

    Args:
        segmentation_model: its head in training mode.
        batch: images [b, 3, H, W], normalised, and (index, labels [b, 1, h, w]).
        device: where the model is.
        scaler: of the loss, for float16; None: float32 and bfloat16 need none.
        optimizer: of the head.
        optimizer_gradient_clip: largest norm of the gradient; inf: any.
        scheduler: stepped after it, except after step 0.
        criterion: takes (logits float32 [b, K, h, w], labels int64 [b, h, w]).
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
    if global_step > 0:  # as published: steps 0 and 1 have the same rate
        scheduler.step()
    return mean_loss
