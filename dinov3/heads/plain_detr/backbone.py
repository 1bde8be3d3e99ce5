"""A frozen ViT read for detection: in windows, and as a whole that is scaled down to the size of one (section 6.3.1).

Each window is near the resolution that the ViT knows, and the scaled image gives the context.

Notable:
- Maps of all blocks that are read, of windows and of the scaled image are concatenated: 32768 channels for the 7B. The
  detector projects them to its width at once. Given the weight of that projection, the readers apply their part of it
  to each map before maps are resized and joined, so that the wide map never exists. It is linear: the result is equal.
- Windows of equal size run through the ViT together, the scaled image with the first.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.heads.backbone_layers import backbone_widths
from dinov3.heads.plain_detr.config import PositionEncoding
from dinov3.heads.plain_detr.nested import NestedTensor, resize_mask
from dinov3.layers.embedding import make_embedding
from dinov3.layers.position_encodings import grid_sine_encoding
from dinov3.layers.resizing import resize_antialiased

#: Rows and columns of a learned encoding.
N_LEARNED = 50


class ChannelNorm(nn.Module):
    """A layer norm over the channels of maps [B, C, H, W].

    Args:
        n_channels: C.
    """

    def __init__(self, n_channels: int) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(n_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each cell."""
        return self.ln(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ViTReader(nn.Module):
    """Read some blocks of a frozen ViT as one map.

    Args:
        backbone: put into evaluation mode, its parameters frozen.
        layers: indices of blocks, or how many of the last.
        use_layernorm: normalise each block's map once more.
    """

    def __init__(self, backbone: Any, layers: int | Sequence[int], *, use_layernorm: bool = False) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(False).eval()
        # The ViT checks the indices, and says what it has.
        self.layers: list[int] = backbone._layer_indices(layers)
        self.widths = backbone_widths(backbone, self.layers)
        self.layer_norms = nn.ModuleList(ChannelNorm(width) for width in self.widths) if use_layernorm else None

    @property
    def n_channels(self) -> int:
        """Channels of the map."""
        return sum(self.widths)

    def train(self, mode: bool = True) -> Self:
        """Keep the backbone in evaluation mode, because it is not trained."""
        super().train(mode)
        if self.backbone is not None:  # It is set aside while weights of the head are loaded.
            self.backbone.eval()
        return self

    def forward(self, images: Tensor, weight: Tensor | None = None) -> Tensor:
        """Read images [B, 3, H, W].

        Args:
            images: normalised.
            weight: [E, n_channels], of a projection of the map.

        Returns:
            [B, n_channels, h, w], or projected, [B, E, h, w].
        """
        return self.combine(self.read(images), weight)

    def read(self, images: Tensor) -> list[Tensor]:
        """Read the map of each block, [B, C, h, w], from images [B, 3, H, W]."""
        with torch.no_grad():
            maps = list(self.backbone.get_intermediate_layers(images, n=self.layers, reshape=True))
        if self.layer_norms is not None:
            maps = [norm(x) for norm, x in zip(self.layer_norms, maps, strict=True)]
        return maps

    def combine(self, maps: Sequence[Tensor], weight: Tensor | None) -> Tensor:
        """Concatenate the maps of all blocks, or sum their projections, see `forward`."""
        if weight is None:
            return torch.cat(list(maps), dim=1)
        parts = zip(maps, weight.split(self.widths, dim=1), strict=True)
        first, *others = (F.conv2d(x, part[:, :, None, None]) for x, part in parts)
        return sum(others, start=first)


class WindowedReader(nn.Module):
    """Read windows of an image, and the whole image at the size of one.

    Args:
        reader: of one window.
        n_windows: along each side.
        patch_size: sides of windows are multiples of it, except for the last.
    """

    def __init__(self, reader: ViTReader, n_windows: int, patch_size: int) -> None:
        super().__init__()
        self._backbone = reader
        self.n_windows = n_windows
        self.patch_size = patch_size

    @property
    def n_channels(self) -> int:
        """Channels of the map."""
        return 2 * self._backbone.n_channels

    def forward(self, images: Tensor, weight: Tensor | None = None) -> Tensor:
        """Read images [B, 3, H, W], as `ViTReader.forward`; the channels of the whole image come first."""
        cut = [window_sides(side, self.n_windows, self.patch_size) for side in images.shape[-2:]]
        if (least := min(min(sides) for sides in cut)) < self.patch_size:
            raise ValueError(
                f"images of {list(images.shape[-2:])} pixels cannot be read in {self.n_windows} windows along each "
                f"side: the last has {max(least, 0)} pixels, and needs {self.patch_size}; pad the images"
            )
        size = (cut[0][0], cut[1][0])
        windows = [w for row in images.split(cut[0], dim=2) for w in row.split(cut[1], dim=3)]
        whole = resize_antialiased(images, size)
        weights = [None, None] if weight is None else list(weight.chunk(2, dim=1))
        first, *maps = self._read([whole, *windows], weights)
        n = self.n_windows
        joined = torch.cat([torch.cat(maps[i * n : (i + 1) * n], dim=3) for i in range(n)], dim=2)
        context = resize_antialiased(first, joined.shape[-2:])  # [B, C or E, h, w]
        return torch.cat([context, joined], dim=1) if weight is None else context + joined

    def _read(self, parts: list[Tensor], weights: Sequence[Tensor | None]) -> list[Tensor]:
        by_size: dict[torch.Size, list[int]] = defaultdict(list)
        for i, part in enumerate(parts):
            by_size[part.shape].append(i)
        joined: list[Tensor] = [parts[0]] * len(parts)
        for members in by_size.values():
            maps = self._backbone.read(torch.cat([parts[i] for i in members]))
            of_members = zip(*(x.chunk(len(members)) for x in maps), strict=True)
            for i, of_member in zip(members, of_members, strict=True):
                # The scaled image is the first part, and has its own half of the projection.
                joined[i] = self._backbone.combine(of_member, weights[min(i, 1)])
        return joined


def window_sides(side: int, n_windows: int, patch_size: int) -> list[int]:
    """Cut a side into windows: equal multiples of the patch, the last takes what is left (nothing, if negative)."""
    window = math.ceil((side // n_windows) / patch_size) * patch_size
    return [*[window] * (n_windows - 1), side - (n_windows - 1) * window]


def padded_side(side: int, patch_size: int, *, n_windows: int = 0, least: int = 1) -> int:
    """Return the side of a canvas on which no pixel is lost and no window empty.

    Args:
        side: of the image, in pixels.
        patch_size: the result is a multiple of it.
        n_windows: along each side; 0: no windows.
        least: the result is not smaller.
    """
    padded = math.ceil(max(side, least) / patch_size) * patch_size
    while n_windows and window_sides(padded, n_windows, patch_size)[-1] < patch_size:
        padded += patch_size
    return padded


class LearnedEncoding(nn.Module):
    """Learned encodings of columns and rows.

    Args:
        n_features: of each.
    """

    def __init__(self, n_features: int) -> None:
        super().__init__()
        self.row_embed = make_embedding(N_LEARNED, n_features)
        self.col_embed = make_embedding(N_LEARNED, n_features)
        if not self.row_embed.weight.is_meta:
            nn.init.uniform_(self.row_embed.weight)
            nn.init.uniform_(self.col_embed.weight)

    def forward(self, mask: Tensor) -> Tensor:
        """Encode the cells of masks [B, h, w] as [B, 2 F, h, w], columns first."""
        b, h, w = mask.shape
        if max(h, w) > N_LEARNED:
            raise ValueError(
                f"a grid of {h} x {w} cells: position_embedding='learned' has {N_LEARNED} rows and columns; use "
                "smaller images or 'sine'"
            )
        columns = self.col_embed.weight[:w].expand(h, w, -1)
        rows = self.row_embed.weight[:h, None].expand(h, w, -1)
        return torch.cat([columns, rows], dim=-1).permute(2, 0, 1).expand(b, -1, h, w)


class SineEncoding(nn.Module):
    """Sines of the centres of cells.

    Args:
        n_features: of rows and of columns.
        normalize: divide positions by the last one.
    """

    def __init__(self, n_features: int, *, normalize: bool) -> None:
        super().__init__()
        self.n_features = n_features
        self.normalize = normalize

    def forward(self, mask: Tensor) -> Tensor:
        """Encode the cells of masks [B, h, w] as float32 [B, 2 F, h, w], rows first."""
        return grid_sine_encoding(~mask, self.n_features, normalize=self.normalize, offset=0.5)


def build_position_encoding(kind: PositionEncoding | str, n_features: int) -> LearnedEncoding | SineEncoding:
    """Build an encoding of `n_features` features for rows and as many for columns."""
    kind = PositionEncoding(kind)
    if kind is PositionEncoding.LEARNED:
        return LearnedEncoding(n_features)
    return SineEncoding(n_features, normalize=kind is PositionEncoding.SINE)


class DetectionBackbone(nn.Sequential):
    """A reader and a position encoding.

    Args:
        reader: `ViTReader` or `WindowedReader`.
        encoding: of the cells.
    """

    def __init__(self, reader: ViTReader | WindowedReader, encoding: nn.Module) -> None:
        super().__init__(reader, nn.ModuleList([encoding]))

    def forward(self, images: NestedTensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Read a batch.

        Args:
            images: [B, 3, H, W] with their mask.
            weight: see `ViTReader.forward`.

        Returns:
            The map, the mask of its cells [B, h, w], and their positions in the dtype of the map.
        """
        encoding = self.get_submodule("1.0")
        maps = self[0](images.tensors, weight)
        mask = resize_mask(images.mask, maps.shape[-2:])
        return maps, mask, encoding(mask).to(maps.dtype)
