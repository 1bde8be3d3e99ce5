"""What can be checked before a model is built: the data opens, one image decodes, two checkpoints fit on the disk."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from dinov3.train.data_loading import build_train_dataset, crop_resolutions

logger = logging.getLogger("dinov3")

FLOAT32_BYTES = 4
ADAMW_MOMENTS = 2  # beside each weight that is trained
CHECKPOINTS_AT_ONCE = 2


def check_dataset(cfg: Any) -> None:
    """Open the training data and decode one sample.

    Raises:
        ValueError: malformed dataset string, or less than one batch of images.
        FileNotFoundError: the data is not there.
        RuntimeError: the first image does not decode (unless `train.on_bad_image=skip`).
    """
    dataset = build_train_dataset(cfg, crop_resolutions(cfg)[0])
    if cfg.train.on_bad_image == "raise":
        dataset[0]
    logger.info("training data: %s, %d images", cfg.train.dataset_path, len(dataset))


def check_disk(model: nn.Module, output_dir: Path) -> None:
    """Refuse to start when the disk cannot hold the checkpoints that exist at the same time.

    Raises:
        RuntimeError: not enough free space; says how much is needed.
    """
    copies = ((1 + ADAMW_MOMENTS if parameter.requires_grad else 1, parameter) for parameter in model.parameters())
    needed = sum(count * parameter.numel() for count, parameter in copies) * FLOAT32_BYTES * CHECKPOINTS_AT_ONCE
    free = shutil.disk_usage(output_dir).free
    if free < needed:
        raise RuntimeError(
            f"{output_dir} has {free / 2**30:.1f} GiB free, but {CHECKPOINTS_AT_ONCE} checkpoints need about "
            f"{needed / 2**30:.1f} GiB: free some space or choose another --output-dir"
        )
