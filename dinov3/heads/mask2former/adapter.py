"""ViT-Adapter: a pyramid of feature maps from a plain ViT (arXiv 2205.08534, section 3), as DINOv3 uses it.

Read it from top to bottom: a small CNN sees what patches blur (`SpatialPriorModule`); its maps of strides 8, 16 and 32
become tokens, which gather from four blocks of the ViT by deformable attention (`Extractor`); the tokens become maps
again, and the ViT's own maps are added.

Notable:
- The ViT is frozen and sees nothing of the adapter: the paper's injectors are left out (DINOv3, arXiv 2508.10104). So
  it runs once, without gradients, before the interactions, and in evaluation mode even if `train()` is called: its
  training mode makes features random.
- On CUDA the ViT always runs in bfloat16, as the published head was trained; elsewhere in what the caller's autocast
  says.
- Batch norms are plain; a training of several processes converts them (`distributed.batch_norm`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dinov3.heads.backbone_layers import backbone_widths
from dinov3.layers.deformable_attention import MSDeformAttn, Shapes, cell_centres
from dinov3.layers.resizing import resize_bilinear

N_LEVELS = 4
#: Pixels per cell of the coarsest map.
COARSEST_STRIDE = 32
INIT_STD = 0.02


class DINOv3_Adapter(nn.Module):  # noqa: N801, the published name
    """Turn the patch tokens of a frozen ViT into maps of strides 4, 8, 16 and 32.

    Args:
        backbone: a ViT with `embed_dim` C, `patch_size` and `get_intermediate_layers`; frozen.
        interaction_indexes: the four blocks whose outputs are read, shallow to deep.
        conv_inplane: channels of the CNN's first stage.
        n_points: of the deformable attentions, for each head.
        deform_num_heads: of the deformable attentions.
        drop_path_rate: share of the samples whose feed-forward branches training drops.
        with_cffn: extractors have a convolutional feed-forward network.
        cffn_ratio: its hidden width, as a share of C.
        deform_ratio: width of the values of deformable attentions, as a share of C.
        add_vit_feature: add the ViT's maps to the result.
        use_extra_extractor: let two more extractors read the deepest block.
        with_cp: compute the activations of extractors again in the backward pass instead of keeping them.
        pretrain_size: without effect; published code passes it.
        init_values: without effect; published code passes it.

    Raises:
        ValueError: not four blocks, or the backbone's blocks have several widths, as those of a ConvNeXt.
    """

    backbone: Any

    def __init__(
        self,
        backbone: nn.Module,
        interaction_indexes: Sequence[int] = (9, 19, 29, 39),
        pretrain_size: int = 512,
        conv_inplane: int = 64,
        n_points: int = 4,
        deform_num_heads: int = 16,
        drop_path_rate: float = 0.3,
        init_values: float = 0.0,
        with_cffn: bool = True,
        cffn_ratio: float = 0.25,
        deform_ratio: float = 0.5,
        add_vit_feature: bool = True,
        use_extra_extractor: bool = True,
        with_cp: bool = True,
    ) -> None:
        super().__init__()
        indexes = list(interaction_indexes)
        if len(indexes) != N_LEVELS:
            raise ValueError(
                f"interaction_indexes={indexes}: a ViT-Adapter reads {N_LEVELS} blocks; choose FOUR_EVEN_INTERVALS, "
                "FOUR_LAST or four indices"
            )
        widths = set(backbone_widths(backbone, indexes))
        if len(widths) != 1:
            raise ValueError(f"a ViT-Adapter needs a ViT: blocks of this backbone have {sorted(widths)} channels")
        channels = widths.pop()
        self.backbone = backbone.requires_grad_(False).eval()
        self.interaction_indexes = indexes
        self.add_vit_feature = add_vit_feature
        self.patch_size = int(self.backbone.patch_size)
        #: Both sides of an image must be multiples of this many pixels.
        self.multiple = math.lcm(COARSEST_STRIDE, self.patch_size)
        self.level_embed = nn.Parameter(torch.zeros(3, channels))
        self.spm = SpatialPriorModule(conv_inplane, channels)
        make_extractor = functools.partial(
            Extractor,
            channels,
            n_heads=deform_num_heads,
            n_points=n_points,
            ratio=deform_ratio,
            ffn_ratio=cffn_ratio if with_cffn else None,
            drop_path_rate=drop_path_rate,
            with_cp=with_cp,
        )
        n_extra = 2 if use_extra_extractor else 0
        self.interactions = nn.ModuleList(
            Interaction(make_extractor, n_extra if i == N_LEVELS - 1 else 0) for i in range(N_LEVELS)
        )
        self.up = nn.ConvTranspose2d(channels, channels, 2, 2)
        for level in range(1, N_LEVELS + 1):
            self.add_module(f"norm{level}", nn.BatchNorm2d(channels))
        for part in (self.spm, self.interactions, self.up):
            part.apply(_init_)
        if not self.level_embed.is_meta:
            nn.init.normal_(self.level_embed)

    def train(self, mode: bool = True) -> Self:
        """Keep the backbone in evaluation mode, because it is not trained."""
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Compute the pyramid of normalised images.

        Args:
            x: [B, 3, H, W]; H and W are multiples of `multiple`.

        Returns:
            `{"1": [B, C, H/4, W/4], "2": [B, C, H/8, W/8], "3": [B, C, H/16, W/16], "4": [B, C, H/32, W/32]}`.

        Raises:
            ValueError: an image of another size.
        """
        height, width = x.shape[-2:]
        if height % self.multiple or width % self.multiple or not height or not width:
            raise ValueError(
                f"images of {height} x {width} pixels: both sides must be multiples of {self.multiple}; "
                "`FeatureDecoder.predict` and `make_inference` pad images and cut their results"
            )
        blocks = self._read_backbone(x)  # four times [B, H/p W/p, C]
        c1, *c234 = self.spm(x)
        grids = [(height // stride, width // stride) for stride in (8, 16, 32)]
        patches = (height // self.patch_size, width // self.patch_size)
        tokens = torch.cat([c + embed for c, embed in zip(c234, self.level_embed, strict=True)], dim=1)
        references = cell_centres(grids, device=x.device)
        for interaction, block in zip(self.interactions, blocks, strict=True):
            tokens = interaction(tokens, references, block, patches, grids)
        c2, c3, c4 = split_levels(tokens, grids)
        maps = [self.up(c2) + c1, c2, c3, c4]
        if self.add_vit_feature:
            vit_maps = [_to_map(block, patches) for block in blocks]
            maps = [c + resize_bilinear(x, c.shape[-2:]) for c, x in zip(maps, vit_maps, strict=True)]
        return {str(level): self.get_submodule(f"norm{level}")(c) for level, c in enumerate(maps, start=1)}

    @torch.no_grad()
    def _read_backbone(self, x: Tensor) -> tuple[Tensor, ...]:
        context: AbstractContextManager[Any] = nullcontext()
        if x.device.type == "cuda":
            context = torch.autocast("cuda", dtype=torch.bfloat16)
        with context:
            return self.backbone.get_intermediate_layers(x, n=self.interaction_indexes)


class SpatialPriorModule(nn.Module):
    """A strided CNN: maps of strides 4, 8, 16 and 32 of an image, of which the last three become tokens.

    Args:
        inplanes: I, channels of the first stage; the others have 2 I, 4 I and 4 I.
        channels: C, of all results.
    """

    def __init__(self, inplanes: int, channels: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            *_convolution(3, inplanes, stride=2),
            *_convolution(inplanes, inplanes),
            *_convolution(inplanes, inplanes),
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
        )
        self.conv2 = nn.Sequential(*_convolution(inplanes, 2 * inplanes, stride=2))
        self.conv3 = nn.Sequential(*_convolution(2 * inplanes, 4 * inplanes, stride=2))
        self.conv4 = nn.Sequential(*_convolution(4 * inplanes, 4 * inplanes, stride=2))
        self.fc1 = nn.Conv2d(inplanes, channels, kernel_size=1)
        self.fc2 = nn.Conv2d(2 * inplanes, channels, kernel_size=1)
        self.fc3 = nn.Conv2d(4 * inplanes, channels, kernel_size=1)
        self.fc4 = nn.Conv2d(4 * inplanes, channels, kernel_size=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Map [B, 3, H, W] to [B, C, H/4, W/4] and to the tokens [B, N, C] of strides 8, 16 and 32, row by row."""
        c1 = self.stem(x)
        c2 = self.conv2(c1)
        c3 = self.conv3(c2)
        c4 = self.conv4(c3)
        return self.fc1(c1), *(fc(c).flatten(2).mT for fc, c in ((self.fc2, c2), (self.fc3, c3), (self.fc4, c4)))


class Interaction(nn.Module):
    """The extractors that read one block of the ViT, one after the other."""

    extra_extractors: nn.ModuleList | None

    def __init__(self, make_extractor: functools.partial[Extractor], n_extra: int) -> None:
        super().__init__()
        self.extractor = make_extractor()
        self.extra_extractors = nn.ModuleList(make_extractor() for _ in range(n_extra)) if n_extra else None

    def forward(
        self, tokens: Tensor, references: Tensor, block: Tensor, patches: tuple[int, int], grids: Shapes
    ) -> Tensor:
        """Let the tokens gather from a block, see `Extractor.forward`."""
        for extractor in (self.extractor, *(self.extra_extractors or ())):
            tokens = extractor(tokens, references, block, patches, grids)
        return tokens


class Extractor(nn.Module):
    """Gather from the patch tokens of a block by deformable attention, then mix neighbouring tokens.

    Args:
        channels: C.
        n_heads: of the attention.
        n_points: of the attention.
        ratio: width of the attention's values, as a share of C.
        ffn_ratio: hidden width of the feed-forward network, as a share of C; None: there is none.
        drop_path_rate: share of the samples whose feed-forward branch training drops.
        with_cp: see `DINOv3_Adapter`.
    """

    def __init__(
        self,
        channels: int,
        *,
        n_heads: int,
        n_points: int,
        ratio: float,
        ffn_ratio: float | None,
        drop_path_rate: float,
        with_cp: bool,
    ) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(channels, eps=1e-6)
        self.feat_norm = nn.LayerNorm(channels, eps=1e-6)
        self.attn = MSDeformAttn(channels, n_levels=1, n_heads=n_heads, n_points=n_points, ratio=ratio)
        if ffn_ratio is not None:
            self.ffn = ConvFFN(channels, int(channels * ffn_ratio))
            self.ffn_norm = nn.LayerNorm(channels, eps=1e-6)
        self.has_ffn = ffn_ratio is not None
        self.drop_path_rate = drop_path_rate
        self.with_cp = with_cp

    def forward(
        self, tokens: Tensor, references: Tensor, block: Tensor, patches: tuple[int, int], grids: Shapes
    ) -> Tensor:
        """Update the tokens of the pyramid.

        Args:
            tokens: [B, N, C], of all `grids`, row by row.
            references: where each looks, [1, N, 1, 2].
            block: patch tokens [B, h w, C].
            patches: (h, w).
            grids: (height, width) of the maps of strides 8, 16 and 32.

        Returns:
            [B, N, C].
        """
        arguments = (tokens, references, block, patches, grids)
        if self.with_cp and torch.is_grad_enabled():
            return checkpoint(self._extract, *arguments, use_reentrant=False)
        return self._extract(*arguments)

    def _extract(
        self, tokens: Tensor, references: Tensor, block: Tensor, patches: tuple[int, int], grids: Shapes
    ) -> Tensor:
        tokens = tokens + self.attn(self.query_norm(tokens), references, self.feat_norm(block), [patches])
        if not self.has_ffn:
            return tokens
        branch = self.ffn(self.ffn_norm(tokens), grids)
        # One number per sample: 0, or 1 / (1 - rate).
        kept = F.dropout(branch.new_ones(len(branch), 1, 1), self.drop_path_rate, self.training)
        return tokens + branch * kept


class ConvFFN(nn.Module):
    """A feed-forward network with a depth-wise 3x3 convolution, the same on each level, before its activation."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.dwconv = nn.Module()
        self.dwconv.dwconv = nn.Conv2d(hidden, hidden, kernel_size=3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, tokens: Tensor, grids: Shapes) -> Tensor:
        """Map tokens [B, N, C] of all levels to [B, N, C]."""
        convolution: Any = self.dwconv.dwconv
        levels = [convolution(level).flatten(2).mT for level in split_levels(self.fc1(tokens), grids)]
        return self.fc2(F.gelu(torch.cat(levels, dim=1)))


def split_levels(tokens: Tensor, grids: Shapes) -> list[Tensor]:
    """Split tokens [B, N, C] of all levels into a map [B, C, height, width] of each."""
    levels = tokens.split([height * width for height, width in grids], dim=1)
    return [_to_map(level, grid) for level, grid in zip(levels, grids, strict=True)]


def _to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    return tokens.mT.unflatten(2, grid)


def _convolution(in_channels: int, out_channels: int, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(out_channels), nn.ReLU()]


def _init_(module: nn.Module) -> None:
    if isinstance(module, MSDeformAttn):
        module.reset_parameters()  # after its linear layers, which `apply` visits first
    elif isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d) and not module.weight.is_meta:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=INIT_STD)
        else:
            fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
