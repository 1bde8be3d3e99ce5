"""Image to patch tokens: one linear map of each patch (ViT, arXiv 2010.11929, equation 1)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """A convolution whose kernel and stride are the patch.

    Rows and columns at the bottom and right that do not fill a patch are not seen.

    Args:
        img_size: side, or (height, width), in pixels; informative, any size can be embedded.
        patch_size: side, or (height, width), of a patch in pixels.
        in_chans: C, channels of the image.
        embed_dim: D, channels of a token.
        norm_layer: makes the norm of the tokens from D; None: no norm.
        flatten_embedding: return a sequence of patches instead of a map.
        device: of the parameters.
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
        self.img_size = _pair(img_size)
        self.patch_size = _pair(patch_size)
        self.patches_resolution = (
            self.img_size[0] // self.patch_size[0],
            self.img_size[1] // self.patch_size[1],
        )
        self.num_patches = self.patches_resolution[0] * self.patches_resolution[1]
        self.in_chans = in_chans
        self.embed_dim = embed_dim
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

    def flops(self) -> float:
        """Multiply-adds for one image of `img_size`."""
        flops = self.num_patches * self.embed_dim * self.in_chans * self.patch_size[0] * self.patch_size[1]
        return flops + (0 if isinstance(self.norm, nn.Identity) else self.num_patches * self.embed_dim)

    def reset_parameters(self) -> None:
        """Uniform weight and bias in +-1 / sqrt(values of a patch)."""
        bound = 1 / math.sqrt(self.in_chans * self.patch_size[0] * self.patch_size[1])
        nn.init.uniform_(self.proj.weight, -bound, bound)
        if self.proj.bias is not None:
            nn.init.uniform_(self.proj.bias, -bound, bound)


def convolve_images(convolution: nn.Module, images: Tensor) -> Tensor:
    """The first convolution of a model, with an error for its users if images and weights have different dtypes.

    Args:
        convolution: a convolution, or what stands for one.
        images: [B, C, H, W], floating point.

    Returns:
        What `convolution` makes of them.

    Raises:
        ValueError: the dtypes differ, and nothing casts one to the other.
    """
    try:
        return convolution(images)
    except RuntimeError as error:
        # Looked at only now: autocast, sharding in mixed precision and quantised layers cast on the way in.
        weight: Tensor = convolution.weight  # type: ignore[assignment]
        if images.dtype == weight.dtype:
            raise
        text = f"the images are {images.dtype}, the weights of the model {weight.dtype}: "
        text += f"cast the images, images.to({weight.dtype})"
        low, high = sorted((images.dtype, weight.dtype), key=lambda dtype: dtype.itemsize)
        if low.itemsize == 2 and high == torch.float32:  # Autocast leaves other dtypes alone.
            text += f", or call the model under torch.autocast({images.device.type!r}, {low})"
        raise ValueError(text) from error


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
