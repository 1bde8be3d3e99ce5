"""Depth from one image: a frozen backbone, a head, and bins in metres (arXiv 2508.10104, section 6.3).

Notable:
- `forward` returns the depth of the padded image at the head's resolution, as published; `predict` returns that of
  each pixel of the image, without the padding.
- The precision is the model's own: float32 is float32 on every device, even under a caller's autocast; choose
  `autocast_dtype=torch.bfloat16` for less. Bins always become metres in float32.
- Without gradients, the logits of a DPT head become depths in bands of rows: for 256 bins and an image of 1024 x 1024,
  all logits at once would take 1 GiB.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from dinov3.heads.backbone_layers import BackboneLayers, BackboneLayersSet
from dinov3.heads.depth.dpt import N_LEVELS, DPTHead
from dinov3.heads.depth.encoder import DinoVisionTransformerWrapper, PatchSizeAdaptationStrategy
from dinov3.heads.depth.features_to_depth import FeaturesToDepth
from dinov3.heads.linear import LinearDepthHead
from dinov3.heads.precision import autocast_to
from dinov3.heads.weights import load_head_, read_head
from dinov3.layers.patch_multiple import cut_margins
from dinov3.layers.resizing import resize_bilinear
from dinov3.utils import default_device
from dinov3.utils.integers import as_integers

__all__ = ["DecoderConfig", "Depther", "build_depther", "make_depther_from_config", "make_head"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _key(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class DecoderConfig:
    """A depth head and what it sees of its backbone."""

    min_depth: float = _key(0.001, "centre of the first bin, in metres")
    max_depth: float = _key(80.0, "centre of the last bin, in metres")
    bins_strategy: str = _key("linear", "spacing of the bins: linear, log or chmv2_mixlog")
    norm_strategy: str = _key("linear", "how logits become weights: linear, softmax, sigmoid or chmv2_mixlog")
    head_kwargs: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "of a DPT head: more arguments of DPTHead"}
    )
    backbone_out_layers: Any = _key(
        BackboneLayersSet.FOUR_EVEN_INTERVALS, "blocks: LAST, FOUR_LAST, FOUR_EVEN_INTERVALS or a list of indices"
    )
    adapt_to_patch_size: PatchSizeAdaptationStrategy = _key(
        PatchSizeAdaptationStrategy.CENTER_PADDING, "of images of other sizes: CENTER_PADDING, STRETCH, NO_ADAPTATION"
    )
    use_backbone_norm: bool = _key(True, "apply the backbone's final norm to every level")
    type: str = _key("linear", "linear, or dpt on four levels")
    n_output_channels: int = _key(256, "number of bins; 1: the depth itself")
    use_batchnorm: bool = _key(False, "normalise the levels' channels")
    use_cls_token: bool = _key(False, "let the head see the class tokens")


class Depther(nn.Module):
    """Predict the depth of normalised images, in metres.

    Args:
        encoder: images to (map, class token) of each level, e.g. a `DinoVisionTransformerWrapper`.
        decoder: the levels to bin logits [B, K, h, w].
        min_depth: centre of the first bin, in metres.
        max_depth: centre of the last bin, in metres.
        bins_strategy: see `FeaturesToDepth`.
        norm_strategy: see `FeaturesToDepth`.
        autocast_dtype: what encoder and decoder compute in, on the device of the images: float32 (no autocast, even
            inside a caller's region), bfloat16 or float16.

    Raises:
        ValueError: an unknown strategy, a range that it cannot divide, or another dtype.
    """

    encoder: Any
    decoder: nn.Module

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        min_depth: float,
        max_depth: float,
        bins_strategy: str = "linear",
        norm_strategy: str = "linear",
        autocast_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if autocast_dtype not in DTYPES:
            raise ValueError(f"autocast_dtype={autocast_dtype}: expected {', '.join(map(str, DTYPES))}")
        self.encoder = encoder
        self.decoder = decoder
        self.features_to_depth = FeaturesToDepth(min_depth, max_depth, bins_strategy, norm_strategy)
        self.autocast_dtype = autocast_dtype

    def forward(self, x: Tensor) -> Tensor:
        """Predict the depth of the padded image at the resolution of the head.

        Args:
            x: images [B, 3, H, W], normalised, floating point.

        Returns:
            [B, 1, H', W'], float32, in metres; for h x w patches of the padded image a DPT head returns
            32 ceil(h / 2) x 32 ceil(w / 2) pixels, and a linear one h x w.
        """
        with autocast_to(x.device.type, self.autocast_dtype):
            levels = self.encoder(x)
            if isinstance(self.decoder, DPTHead) and not torch.is_grad_enabled():
                return self.decoder(levels, mapping=self.features_to_depth)
            return self.features_to_depth(self.decoder(levels))

    def predict(self, x: Tensor, rescale_to: Sequence[int] | None = None) -> Tensor:
        """Predict the depth of the images themselves, pixel by pixel.

        The outputs of a head stretch over everything that the backbone saw. They are resized to that size, the padding
        is cut off, and the rest is resized to the result (bilinear).

        Args:
            x: images [B, 3, H, W], normalised, floating point.
            rescale_to: (height, width) of the result. Default: those of the images.

        Returns:
            [B, 1, *rescale_to], float32, in metres.
        """
        height, width = x.shape[-2:]
        depth = self(x)
        margins = self.encoder.margins(height, width)
        if any(margins):
            top, bottom, left, right = margins
            depth = resize_bilinear(depth, (top + height + bottom, left + width + right))
            depth = cut_margins(depth, margins)
        return resize_bilinear(depth, (height, width) if rescale_to is None else rescale_to)


def make_head(
    embed_dims: int | Sequence[int],
    n_output_channels: int,
    use_batchnorm: bool = False,
    use_cls_token: bool = False,
    head_type: str = "linear",
    **kwargs: Any,
) -> DPTHead | LinearDepthHead:
    """Build a depth head, initialised at random.

    Args:
        embed_dims: channels of each level; a number is for one level.
        n_output_channels: number of bins.
        use_batchnorm: normalise the levels' channels.
        use_cls_token: let the head see the class tokens; a DPT head has the readout `project` then, otherwise `ignore`.
        head_type: `linear`, or `dpt` on four levels.
        **kwargs: of a DPT head: more arguments of `DPTHead`.

    Raises:
        NotImplementedError: another type of head.
        TypeError: an argument that this head does not have.
        ValueError: a DPT head on another number of levels.
    """
    widths = as_integers(embed_dims)
    if head_type == "linear":
        if kwargs:
            raise TypeError(f"a linear depth head does not take {', '.join(kwargs)}: these are arguments of type 'dpt'")
        return LinearDepthHead(widths, n_output_channels, use_batchnorm=use_batchnorm, use_cls_token=use_cls_token)
    if head_type == "dpt":
        if len(widths) != N_LEVELS:
            raise ValueError(
                f"a DPT head takes {N_LEVELS} levels, but backbone_out_layers names {len(widths)}: choose FOUR_LAST, "
                "FOUR_EVEN_INTERVALS or four blocks"
            )
        return DPTHead(
            in_channels=widths,
            n_output_channels=n_output_channels,
            use_batchnorm=use_batchnorm,
            readout_type="project" if use_cls_token else "ignore",
            **kwargs,
        )
    raise NotImplementedError(f"there is no depth head of type {head_type!r}, only linear and dpt")


def build_depther(
    backbone: nn.Module,
    backbone_out_layers: BackboneLayers,
    n_output_channels: int,
    use_backbone_norm: bool = False,
    use_batchnorm: bool = False,
    use_cls_token: bool = False,
    adapt_to_patch_size: PatchSizeAdaptationStrategy | str = PatchSizeAdaptationStrategy.CENTER_PADDING,
    head_type: str = "dpt",
    autocast_dtype: torch.dtype = torch.float32,
    min_depth: float = 0.001,
    max_depth: float = 10.0,
    bins_strategy: str = "linear",
    norm_strategy: str = "linear",
    *,
    head_device: torch.device | str | None = None,
    **kwargs: Any,
) -> Depther:
    """Build a depther around a backbone, which is frozen; the head is initialised at random.

    Args:
        backbone: a ViT or ConvNeXt.
        backbone_out_layers: see `DinoVisionTransformerWrapper`.
        n_output_channels: number of bins.
        use_backbone_norm: see `DinoVisionTransformerWrapper`.
        use_batchnorm: see `make_head`.
        use_cls_token: see `make_head`.
        adapt_to_patch_size: see `DinoVisionTransformerWrapper`.
        head_type: see `make_head`.
        autocast_dtype: see `Depther`.
        min_depth: centre of the first bin, in metres.
        max_depth: centre of the last bin, in metres.
        bins_strategy: see `FeaturesToDepth`.
        norm_strategy: see `FeaturesToDepth`.
        head_device: where the head is built. Default: where the backbone is.
        **kwargs: more arguments of the head.

    Returns:
        The model in evaluation mode.

    Raises:
        NotImplementedError: another type of head.
        TypeError: an argument that this head does not have.
        ValueError: blocks, strategies, depths or a dtype that are not as described.
    """
    encoder = DinoVisionTransformerWrapper(
        backbone, backbone_out_layers, use_backbone_norm=use_backbone_norm, adapt_to_patch_size=adapt_to_patch_size
    )
    with torch.device(head_device or _device_of(backbone)):
        decoder = make_head(
            encoder.embed_dims,
            n_output_channels,
            use_batchnorm=use_batchnorm,
            use_cls_token=use_cls_token,
            head_type=head_type,
            **kwargs,
        )
    return Depther(
        encoder,
        decoder,
        min_depth=min_depth,
        max_depth=max_depth,
        bins_strategy=bins_strategy,
        norm_strategy=norm_strategy,
        autocast_dtype=autocast_dtype,
    ).eval()


def make_depther_from_config(
    backbone: nn.Module,
    config: DecoderConfig,
    checkpoint_path: str | os.PathLike[str] | None = None,
    autocast_dtype: torch.dtype = torch.float32,
    *,
    head_device: torch.device | str | None = None,
) -> Depther:
    """Build the depther that a configuration describes, around a backbone, which is frozen.

    Args:
        backbone: a ViT or ConvNeXt.
        config: the head and what it sees.
        checkpoint_path: a file of the head's weights: a published head, what a training saved, or the state dict of a
            whole depther. Default: initialise at random.
        autocast_dtype: see `Depther`.
        head_device: where a head without a checkpoint is built. Default: where the backbone is.

    Returns:
        The model in evaluation mode.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        WeightsError: the checkpoint is damaged, or not of this head.
        NotImplementedError: another type of head.
        TypeError: an argument that this head does not have.
        ValueError: blocks, strategies, depths or a dtype that are not as described.
    """
    options = {entry.name: getattr(config, entry.name) for entry in fields(DecoderConfig)}
    depther = build_depther(
        backbone,
        head_type=options.pop("type"),
        autocast_dtype=autocast_dtype,
        # On the meta device nothing is initialised that the checkpoint overwrites.
        head_device=head_device if checkpoint_path is None else "meta",
        **options.pop("head_kwargs"),
        **options,
    )
    if checkpoint_path is not None:
        target = f"the {config.type} head of the config"
        load_head_(depther.decoder, read_head(checkpoint_path), source=str(checkpoint_path), target=target)
        depther.decoder.to(_device_of(backbone))
    return depther


def _device_of(module: nn.Module) -> torch.device:
    return next((parameter.device for parameter in module.parameters()), default_device())
