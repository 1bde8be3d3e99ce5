"""The losses of DINOv3's self-supervised training: modules that take tensors and return a 0-dim float32 tensor."""

from __future__ import annotations

from dinov3.loss.dino_clstoken_loss import DINOLoss
from dinov3.loss.gram_loss import GramLoss
from dinov3.loss.ibot_patch_loss import iBOTPatchLoss
from dinov3.loss.koleo_loss import KoLeoLoss, KoLeoLossDistributed

__all__ = ["DINOLoss", "GramLoss", "KoLeoLoss", "KoLeoLossDistributed", "iBOTPatchLoss"]
