"""Image to patch tokens: one linear map of each patch (ViT, arXiv 2010.11929, equation 1)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dinov3.utils.integers import as_pair


class PatchEmbed(nn.Module):
    """A convolution whose kernel and stride are the patch.

    Rows and columns at the bottom and right that do not fill a patch are not seen.

    Args:
        img_size: side, or (height, width), in pixels; for information only, any size can be embedded.
        patch_size: side, or (height, width), of a patch in pixels.
        in_chans: C, channels of the image.
        embed_dim: D, channels of a token.
        norm_layer: makes the norm of the tokens from D. Default: no norm.
        flatten_embedding: return a sequence of patches instead of a map.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: Callable[..., nn.Module] | None = None,
        flatten_embedding: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.img_size = as_pair(img_size)
        self.patch_size = as_pair(patch_size)
        self.flatten_embedding = flatten_embedding
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, stride=self.patch_size, device=device)
        self.norm = norm_layer(embed_dim, device=device) if norm_layer else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Embed the patches.

        Args:
            x: [B, C, H, W] with h = H // patch height, w = W // patch width.

        Returns:
            [B, h * w, D] in row-major order, or [B, h, w, D] without `flatten_embedding`.
        """
        x = convolve_images(self.proj, x).permute(0, 2, 3, 1)  # [B, h, w, D]
        return self.norm(x.flatten(1, 2) if self.flatten_embedding else x)

    def reset_parameters(self) -> None:
        """Draw weight and bias uniformly from +-1 / sqrt(values of a patch)."""
        bound = 1 / math.sqrt(self.proj.weight.shape[1:].numel())
        nn.init.uniform_(self.proj.weight, -bound, bound)
        if self.proj.bias is not None:
            nn.init.uniform_(self.proj.bias, -bound, bound)


def convolve_images(convolution: nn.Module, images: Tensor) -> Tensor:
    """Apply the first convolution of a model to images [B, C, H, W].

    Raises:
        ValueError: images and weights have different dtypes, and nothing casts one to the other; the message says how.
    """
    try:
        return convolution(images)
    except RuntimeError as error:
        # Checked only after the failure: autocast, sharding in mixed precision and quantised layers cast on the way in.
        weight: Tensor = convolution.weight  # type: ignore[assignment]
        if images.dtype == weight.dtype:
            raise
        text = f"the images are {images.dtype}, the weights of the model {weight.dtype}: "
        text += f"cast the images, images.to({weight.dtype})"
        low, high = sorted((images.dtype, weight.dtype), key=lambda dtype: dtype.itemsize)
        if low.itemsize == 2 and high == torch.float32:  # autocast leaves other dtypes alone
            text += f", or call the model under torch.autocast({images.device.type!r}, {low})"
        raise ValueError(text) from error
