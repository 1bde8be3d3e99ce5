"""Training a Mask2Former head, with the adapter that it reads through, on a frozen ViT (arXiv 2112.01527).

Label maps hold classes, and where the dataset has objects also which of them a pixel belongs to, see `object_maps`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.data.datasets.object_maps import objects_of, valid_pixels
from dinov3.eval.segmentation.data import Batch
from dinov3.eval.segmentation.metrics import IGNORE_INDEX
from dinov3.eval.training.loop import apply_gradients
from dinov3.heads.segmentation import FeatureDecoder
from dinov3.heads.weights import set_aside


class AdapterAndHead(nn.ModuleList):
    """The parts of a Mask2Former model; the frozen backbone inside is left out of the state dict.

    Args:
        parts: [adapter, head].
    """

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the entries of adapter and head."""
        with set_aside(self, self._backbone):
            return super().state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Take the entries of adapter and head."""
        with set_aside(self, self._backbone):
            return super().load_state_dict(state_dict, *args, **kwargs)

    @property
    def _backbone(self) -> nn.Module:
        adapter: Any = self[0]
        return adapter.backbone


def train_mask_step(
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
    *,
    seed: int = 0,
) -> Tensor:
    """Do one step of adapter and head; see `train_step` for what is not listed.

    Args:
        batch: images [b, 3, H, W], normalised, of any size, and (index, object maps [b, 1, H, W]).
        criterion: a `MaskClassificationLoss`.
        seed: of the points at which masks are compared. They depend on it, the step and the image, so that several
            processes train as one does.

    Returns:
        The mean loss of the processes, before the step.
    """
    images, (indices, labels) = batch
    images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
    adapter: Any = segmentation_model.segmentation_model[0]
    images, labels = pad_to_multiple(images, labels, adapter.multiple)
    classes, masks = zip(*map(objects_of, labels[:, 0]), strict=True)
    words = [np.random.SeedSequence([seed, global_step, int(index)]).generate_state(1)[0] for index in indices]
    generators = [torch.Generator(images.device).manual_seed(int(word)) for word in words]
    with torch.autocast(images.device.type, dtype=model_dtype, enabled=model_dtype != torch.float32):
        outputs = segmentation_model(images)
    loss = criterion(outputs, classes, masks, valid=valid_pixels(labels[:, 0]), generators=generators)
    mean_loss = apply_gradients(loss, optimizer, clip=optimizer_gradient_clip, iteration=global_step, scaler=scaler)
    if global_step > 0:  # as linear heads do
        scheduler.step()
    return mean_loss


def pad_to_multiple(images: Tensor, labels: Tensor, multiple: int) -> tuple[Tensor, Tensor]:
    """Pad images [b, 3, H, W] and their maps [b, 1, H, W], below and on the right, with pixels that do not count."""
    height, width = images.shape[-2:]
    margins = (0, -width % multiple, 0, -height % multiple)
    return F.pad(images, margins), F.pad(labels, margins, value=IGNORE_INDEX)
