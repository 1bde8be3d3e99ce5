"""ConvNeXt (arXiv 2201.03545) with the interface of the ViT, as distilled in DINOv3 (arXiv 2508.10104, section 6).

Notable:
- A convolutional network has no class token: the mean of the last map, taken before the norm, replaces it, and the
  final norm is applied to [mean, patches] as if they were tokens.
- "Blocks" of `get_intermediate_layers` are the four stages, at strides 4, 8, 16, 32; with `patch_size` their maps are
  resized to the grid that a ViT of that patch size would give.
- `norms[3]` is `norm` itself: state dicts hold it under both names, and the last one that is loaded wins.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.layers.patch_embed import convolve_images
from dinov3.models.backbone import Backbone
from dinov3.utils import refuse_unknown_arguments

convnext_sizes: dict[str, dict[str, Any]] = {
    "tiny": {"depths": [3, 3, 9, 3], "dims": [96, 192, 384, 768]},
    "small": {"depths": [3, 3, 27, 3], "dims": [96, 192, 384, 768]},
    "base": {"depths": [3, 3, 27, 3], "dims": [128, 256, 512, 1024]},
    "large": {"depths": [3, 3, 27, 3], "dims": [192, 384, 768, 1536]},
}

N_STAGES = 4
STEM_STRIDE = 4


def drop_path(x: Tensor, drop_prob: float = 0.0, training: bool = False) -> Tensor:
    """Zero whole samples of a residual branch at random and scale the others up (arXiv 1603.09382).

    Args:
        x: [B, ...].
        drop_prob: probability for each sample, in [0, 1).
        training: if False, return x.

    Returns:
        A tensor of the shape of x.
    """
    if drop_prob == 0.0 or not training:
        return x
    keep_prob = 1 - drop_prob
    is_kept = torch.rand((len(x),) + (1,) * (x.ndim - 1), dtype=x.dtype, device=x.device).add_(keep_prob).floor_()
    return x * (is_kept / keep_prob)


class DropPath(nn.Module):
    """Apply `drop_path` in training.

    Args:
        drop_prob: probability of each sample to lose the branch, in [0, 1).

    Raises:
        ValueError: `drop_prob` is out of range.
    """

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        if not 0 <= drop_prob < 1:
            raise ValueError(f"drop_prob must be in [0, 1), got {drop_prob}")
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape of x, [B, ...]."""
        return drop_path(x, self.drop_prob, self.training)


class LayerNorm(nn.LayerNorm):
    """Layer norm over the channels, which are last or first.

    Args:
        normalized_shape: C, number of channels.
        eps: added to the variance.
        data_format: `channels_last` for [..., C], or `channels_first` for [B, C, ...].

    Raises:
        NotImplementedError: another data format.
    """

    def __init__(self, normalized_shape: int, eps: float = 1e-6, data_format: str = "channels_last") -> None:
        super().__init__(normalized_shape, eps)
        if data_format not in ("channels_last", "channels_first"):
            raise NotImplementedError(f"data_format must be channels_last or channels_first, got {data_format!r}")
        self.data_format = data_format

    def forward(self, input: Tensor) -> Tensor:
        """Return a tensor of the shape of the input."""
        if self.data_format == "channels_last":
            return super().forward(input)
        last = input.ndim - 1  # not -1, from which PyTorch's older ONNX exporter makes an invalid permutation
        return super().forward(input.movedim(1, last)).movedim(last, 1)


class Block(nn.Module):
    """A residual block: x + drop_path(gamma * pwconv2(gelu(pwconv1(norm(dwconv(x)))))).

    Args:
        dim: C, channels.
        drop_path: probability of each sample to lose the branch in training, in [0, 1).
        layer_scale_init_value: initial value of `gamma`; with 0 there is no `gamma`.
    """

    def __init__(self, dim: int, drop_path: float = 0.0, layer_scale_init_value: float = 1e-6) -> None:
        super().__init__()
        self.layer_scale_init_value = layer_scale_init_value
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), layer_scale_init_value)) if layer_scale_init_value > 0 else None
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, C, H, W]."""
        branch = self.dwconv(x).permute(0, 2, 3, 1)  # [B, H, W, C]
        branch = self.pwconv2(self.act(self.pwconv1(self.norm(branch))))
        if self.gamma is not None:
            is_dropped = self.training and self.drop_path.drop_prob > 0
            if not is_dropped and not torch.compiler.is_compiling():
                # One pass over memory instead of two. An export would take its strides for conditions on the size of
                # the image, and a compiler joins the two itself.
                return torch.addcmul(x.permute(0, 2, 3, 1), branch, self.gamma).permute(0, 3, 1, 2)
            branch = self.gamma * branch
        return x + self.drop_path(branch.permute(0, 3, 1, 2))


class ConvNeXt(Backbone):
    """ConvNeXt whose outputs are named and shaped like those of `DinoVisionTransformer`.

    D = dims[3] channels; h = H // 32 rows and w = W // 32 columns of the last map, N = h * w patches.

    Args:
        in_chans: channels of the image.
        depths: blocks of each of the four stages.
        dims: channels of each of the four stages.
        drop_path_rate: probability of the last block to lose its branch in training; it grows linearly from 0 at the
            first.
        layer_scale_init_value: initial value of the layer scales; with 0 there are none.
        patch_size: resize the maps of `get_intermediate_layers` to (H // patch_size, W // patch_size). Default: keep
            their sizes.
        **unknown: refused.

    Raises:
        TypeError: an unknown argument.
        ValueError: not four stages, or `patch_size` is not positive.
    """

    def __init__(
        self,
        in_chans: int = 3,
        depths: Sequence[int] = convnext_sizes["tiny"]["depths"],
        dims: Sequence[int] = convnext_sizes["tiny"]["dims"],
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 1e-6,
        patch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        refuse_unknown_arguments(type(self), unknown)
        if len(depths) != N_STAGES or len(dims) != N_STAGES:
            raise ValueError(f"depths and dims need one entry for each of the 4 stages, got {depths} and {dims}")
        if patch_size is not None and patch_size <= 0:
            raise ValueError(f"patch_size must be positive, or None for the maps as they are, got {patch_size}")

        self.embed_dim = dims[-1]
        self.embed_dims = list(dims)
        self.n_blocks = N_STAGES
        self.n_storage_tokens = 0
        self.chunked_blocks = False
        self.in_chans = in_chans
        self.patch_size = patch_size
        self.input_pad_size = STEM_STRIDE

        stem = nn.Conv2d(in_chans, dims[0], kernel_size=STEM_STRIDE, stride=STEM_STRIDE)
        between = [
            nn.Sequential(LayerNorm(a, data_format="channels_first"), nn.Conv2d(a, b, kernel_size=2, stride=2))
            for a, b in itertools.pairwise(dims)
        ]
        self.downsample_layers = nn.ModuleList(
            [_Stem(stem, LayerNorm(dims[0], data_format="channels_first")), *between]
        )
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").split(list(depths))
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(dim, rate, layer_scale_init_value) for rate in stage_rates.tolist()))
            for dim, stage_rates in zip(dims, rates, strict=True)
        )
        self.norm = nn.LayerNorm(self.embed_dim, eps=1e-6)
        self.norms = nn.ModuleList([nn.Identity(), nn.Identity(), nn.Identity(), self.norm])
        self.head = nn.Identity()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise convolutions and linears (truncated normal, 0.02), biases (zero), norms and layer scales."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, Block) and module.gamma is not None:
                nn.init.constant_(module.gamma, module.layer_scale_init_value)

    def forward_features(
        self, x: Tensor | list[Tensor], masks: Tensor | list[Tensor | None] | None = None
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """Compute the normed features of the last stage; `patch_size` plays no role here.

        Args:
            x: images [B, C, H, W], floating point, sides of at least 32 pixels; or a list of such, of any sizes.
            masks: returned with the features and otherwise ignored; for a list, a list of the same length, or None.

        Returns:
            A dict (for a list: a list of dicts) of `x_norm_clstoken` [B, D], `x_storage_tokens` [B, 0, D],
            `x_norm_patchtokens` [B, N, D], `x_prenorm` [B, N, D] (the patches before the norm) and `masks`.

        Raises:
            ValueError: the images are not as described, or there are not as many masks as inputs.
        """
        if isinstance(x, Tensor):
            return self._compute_features(x, masks)
        assert not isinstance(masks, Tensor), "a list of tensors takes a list of masks"
        return self.forward_features_list(x, masks)

    def forward_features_list(
        self, x_list: list[Tensor], masks_list: list[Tensor | None] | None = None
    ) -> list[dict[str, Any]]:
        """Compute `forward_features` of a list."""
        return [self._compute_features(images, mask) for images, mask in self._pair_masks(x_list, masks_list)]

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
        *,
        return_extra_tokens: bool = False,
    ) -> tuple[Tensor | tuple[Tensor, ...], ...]:
        """Compute the maps of chosen stages, in the order of the stages.

        A stage's map has stride 4, 8, 16 or 32, or with `patch_size` (H // patch_size, W // patch_size) positions.

        Args:
            x: images [B, C, H, W], floating point.
            n: the last n stages, or the indices (0 to 3, in any order) of the stages.
            reshape: return maps [B, C', h, w] instead of sequences [B, h * w, C'].
            return_class_token: also return the mean [B, C'] of the stage's map.
            norm: apply the final norm to stage 3; the others have none.
            return_extra_tokens: also return the storage tokens [B, 0, C'], of which there are none.

        Returns:
            For each stage the patches, or a tuple (patches, class token if asked for, storage tokens if asked for).

        Raises:
            ValueError: the images or the stages are not as described.
        """
        wanted = self._layer_indices(n)
        self._check_images(x, self._smallest_side(wanted[-1]))
        outputs: list[Tensor | tuple[Tensor, ...]] = []
        feature_map = _in_fastest_layout(x)
        for stage in range(wanted[-1] + 1):
            feature_map = self.stages[stage](self.downsample_layers[stage](feature_map))  # [B, C', h, w]
            if stage not in wanted:
                continue
            norm_of_stage = self.norms[stage] if norm else nn.Identity()
            patches = norm_of_stage(self._resize(feature_map, x).permute(0, 2, 3, 1))  # [B, h, w, C']
            patches = patches.permute(0, 3, 1, 2).contiguous() if reshape else patches.flatten(1, 2)
            extra: tuple[Tensor, ...] = ()
            if return_class_token:
                extra += (norm_of_stage(feature_map.mean((-2, -1))),)  # [B, C']
            if return_extra_tokens:
                extra += (feature_map.new_empty(len(x), 0, feature_map.shape[1]),)
            outputs.append((patches, *extra) if extra else patches)
        return tuple(outputs)

    def _compute_features(self, x: Tensor, mask: Any) -> dict[str, Any]:
        self._check_images(x, self._smallest_side(N_STAGES - 1))
        feature_map = _in_fastest_layout(x)
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            feature_map = stage(downsample(feature_map))
        patches = feature_map.flatten(2).transpose(1, 2)  # [B, N, D]
        pooled = feature_map.mean((-2, -1))  # [B, D]
        normed = self.norm(torch.cat([pooled.unsqueeze(1), patches], dim=1))  # [B, 1 + N, D]
        # PyTorch 2.7 exports normed[:, :1] only if the batch has an upper bound.
        cls_token, storage_tokens, patch_tokens = normed.tensor_split((1, 1), dim=1)
        return {
            "x_norm_clstoken": cls_token.squeeze(1),
            "x_storage_tokens": storage_tokens,
            "x_norm_patchtokens": patch_tokens,
            "x_prenorm": patches,
            "masks": mask,
        }

    def _resize(self, feature_map: Tensor, images: Tensor) -> Tensor:
        if self.patch_size is None:
            return feature_map
        size = (images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size)
        # The antialiasing kernels do not exist in half precision on every device.
        wide = feature_map.to(torch.promote_types(feature_map.dtype, torch.float32))
        return F.interpolate(wide, size=size, mode="bilinear", antialias=True).to(feature_map.dtype)

    def _smallest_side(self, last_stage: int) -> int:
        return max(STEM_STRIDE * 2**last_stage, self.patch_size or 0)


def _in_fastest_layout(images: Tensor) -> Tensor:
    # Norms and linears need the channels last in memory, and convolutions are as fast that way on CPUs (though not on
    # some GPUs). What follows keeps the layout of the images and copies nothing. Compilers choose layouts themselves.
    if images.device.type != "cpu" or torch.compiler.is_compiling():
        return images
    return images.contiguous(memory_format=torch.channels_last)


def get_convnext_arch(arch_name: str) -> Callable[..., ConvNeXt]:
    """Return the constructor of an architecture, with its depths and dims filled in.

    Args:
        arch_name: `convnext_tiny`, `convnext_small`, `convnext_base` or `convnext_large`.

    Raises:
        NotImplementedError: another name.
    """
    size = arch_name.partition("_")[2]
    if size not in convnext_sizes:
        known = ", ".join(f"convnext_{known_size}" for known_size in convnext_sizes)
        raise NotImplementedError(f"there is no ConvNeXt {arch_name!r}, only {known}")
    return functools.partial(ConvNeXt, **convnext_sizes[size])


class _Stem(nn.Sequential):
    def forward(self, images: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, dims[0], H // 4, W // 4]."""
        convolution, norm = self
        return norm(convolve_images(convolution, images))
