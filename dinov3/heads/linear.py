"""Linear heads for depth and segmentation: batch norm and a 1x1 convolution on maps (arXiv 2508.10104, section 6).

Notable:
- Several levels are resized to the size of the first and concatenated.
- The two published heads differ in what a level is (a map with its class token, or only the map), in the names of
  their entries and in dropout; `_LevelConcatenation` is what they share.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dinov3.layers.resizing import resize_bilinear

INIT_STD = 0.01

Level = Tensor | Sequence[Tensor]


class _LevelConcatenation(nn.Module):
    batchnorm_layer: nn.Module

    def __init__(
        self, in_channels: Sequence[int], *, use_batchnorm: bool, use_cls_token: bool, align_corners: bool = False
    ) -> None:
        super().__init__()
        self.n_levels = len(in_channels)
        self.channels = sum(in_channels) * (2 if use_cls_token else 1)
        self.use_cls_token = use_cls_token
        self.align_corners = align_corners
        self.batchnorm_layer = nn.BatchNorm2d(self.channels) if use_batchnorm else nn.Identity()

    def concatenate(self, maps: Sequence[Level]) -> Tensor:
        """Concatenate levels, each a map or (map, class token), to one map [B, C, h, w] of the first level's size."""
        if len(maps) != self.n_levels:
            raise ValueError(f"a linear head with {self.n_levels} levels was given {len(maps)}")
        levels = [self._with_class_token(level) for level in maps]
        size = levels[0].shape[-2:]
        levels = [resize_bilinear(level, size, align_corners=self.align_corners) for level in levels]
        # Even one level is copied: the features may be inference tensors, which autograd must not keep.
        return torch.cat(levels, dim=1)

    def _with_class_token(self, level: Level) -> Tensor:
        patches = level if isinstance(level, Tensor) else level[0]
        if patches.ndim == 2:
            patches = patches[:, :, None, None]  # [B, C, 1, 1]
        if not self.use_cls_token:
            return patches
        class_token = None if isinstance(level, Tensor) or len(level) < 2 else level[1]
        if class_token is None:
            raise ValueError("a linear head with use_cls_token=True was given a level without its class token")
        return torch.cat([patches, class_token[:, :, None, None].expand_as(patches)], dim=1)  # [B, 2C, h, w]


def _init_(convolution: nn.Conv2d) -> None:
    if not convolution.weight.is_meta:  # On the meta device torch would import its compiler to do nothing.
        nn.init.normal_(convolution.weight, std=INIT_STD)
    nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]


class LinearDepthHead(_LevelConcatenation):
    """Predict the logits of depth bins at patch resolution.

    Args:
        in_channels: C of each level.
        n_output_channels: K.
        input_transform: how levels become one map: only `"resize"` is known.
        align_corners: of that resize.
        use_batchnorm: normalise the concatenated channels first.
        use_cls_token: append each level's class token to its channels.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        n_output_channels: int,
        input_transform: str = "resize",
        align_corners: bool = False,
        use_batchnorm: bool = False,
        use_cls_token: bool = True,
    ) -> None:
        if input_transform != "resize":
            raise ValueError(f"input_transform={input_transform!r}: the linear depth head only knows 'resize'")
        super().__init__(
            in_channels, use_batchnorm=use_batchnorm, use_cls_token=use_cls_token, align_corners=align_corners
        )
        self.conv_depth = nn.Conv2d(self.channels, n_output_channels, kernel_size=1)
        _init_(self.conv_depth)

    def forward(self, inputs: Sequence[Sequence[Tensor]]) -> Tensor:
        """Map levels (patch map [B, C, h, w] or [B, C], class token [B, C]) to [B, K, h, w] of the first level's size.

        Raises:
            ValueError: another number of levels, or a class token is missing.
        """
        return self.conv_depth(self.batchnorm_layer(self.concatenate(inputs)))

    def predict(self, x: Sequence[Sequence[Tensor]], rescale_to: Sequence[int] = (512, 512)) -> Tensor:
        """Resize what `forward` returns to `rescale_to` (height, width)."""
        return resize_bilinear(self(x), rescale_to)


class LinearSegmentationHead(_LevelConcatenation):
    """Predict the logits of classes at patch resolution.

    Args:
        in_channels: C of each level.
        n_output_channels: K, the number of classes.
        use_batchnorm: normalise the concatenated channels first.
        use_cls_token: append each level's class token to its channels.
        dropout: share of the channels that training drops, before the normalisation.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        n_output_channels: int,
        use_batchnorm: bool = True,
        use_cls_token: bool = False,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(in_channels, use_batchnorm=use_batchnorm, use_cls_token=use_cls_token)
        self.dropout = nn.Dropout2d(dropout)
        self.conv = nn.Conv2d(self.channels, n_output_channels, kernel_size=1)
        _init_(self.conv)

    def forward(self, inputs: Sequence[Level]) -> Tensor:
        """Map the map [B, C, h, w] of each level, or with `use_cls_token` (map, class token [B, C]), to [B, K, h, w].

        Raises:
            ValueError: another number of levels, or a class token is missing.
        """
        return self.conv(self.batchnorm_layer(self.dropout(self.concatenate(inputs))))

    def predict(self, inputs: Sequence[Level], rescale_to: Sequence[int] = (512, 512)) -> Tensor:
        """Compute `forward` without dropout, resized to `rescale_to` (height, width)."""
        return resize_bilinear(self.conv(self.batchnorm_layer(self.concatenate(inputs))), rescale_to)
