"""The dense prediction head DPT (arXiv 2103.13413, section 3), as DINOv3 uses it for depth (2508.10104, section 6.3).

Read it from top to bottom: four levels of a backbone become a pyramid (`reassemble_blocks`), get a common number of
channels (`convs`), are fused from the deepest to the shallowest (`fusion_blocks`, `project`), and become outputs at 8
times the deepest level's resolution and more (`conv_depth`).

Notable:
- A level is resized to the running map, never the other way round. So outputs have 32 ceil(h / 2) x 32 ceil(w / 2)
  pixels for h x w patches: if h or w is odd, 16 more than the image, over the whole of which they stretch.
- The 1x1 convolution of a fusion block runs before its upsampling, on a quarter of the pixels. Both orders are equal,
  because bilinear weights sum to 1.
- The readout "project" multiplies maps and class tokens by their own halves of its weights and adds the products: the
  concatenation of a map and its repeated token never exists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.heads.precision import autocast_to
from dinov3.layers.resizing import resize_bilinear
from dinov3.utils.messages import check_choice

N_LEVELS = 4
READOUTS = ("ignore", "add", "project")
#: Numbers in a band of rows: 4 MiB of float32, which stay in the caches of most CPUs.
BAND_SIZE = 2**20

Levels = Sequence[Sequence[Tensor]]


class DPTHead(nn.Module):
    """Compute outputs per pixel from the maps and class tokens of four blocks.

    Batch norms are plain; a training of several processes converts them (`distributed.batch_norm`).

    Args:
        in_channels: C of each level, shallow to deep.
        channels: D, of the fused maps.
        post_process_channels: P of each level, of the pyramid.
        readout_type: what becomes of the class token: `ignore`, `add` (to every position) or `project` (both through
            a linear layer and a GELU).
        n_output_channels: K, outputs per pixel.
        n_hidden_channels: channels before the last convolution.
        use_batchnorm: normalise each level's channels after the readout.
        use_bias: biases of the convolutions in residual units.
        projection_after_fusion: add one more 3x3 convolution and ReLU.

    Raises:
        ValueError: not four levels, or an unknown readout.
    """

    def __init__(
        self,
        in_channels: Sequence[int] = (1024, 1024, 1024, 1024),
        channels: int = 256,
        post_process_channels: Sequence[int] = (128, 256, 512, 1024),
        readout_type: str = "project",
        n_output_channels: int = 256,
        n_hidden_channels: int = 32,
        use_batchnorm: bool = False,
        use_bias: bool = False,
        projection_after_fusion: bool = True,
    ) -> None:
        super().__init__()
        for option, widths in {"in_channels": in_channels, "post_process_channels": post_process_channels}.items():
            if len(widths) != N_LEVELS:
                raise ValueError(f"{option}={list(widths)}: a DPT head has {N_LEVELS} levels, got {len(widths)}")
        check_choice("readout_type", readout_type, READOUTS)
        self.reassemble_blocks = _Reassembly(in_channels, post_process_channels, readout_type, use_batchnorm)
        self.convs = nn.ModuleList(_Convolution(width, channels, 3, bias=False) for width in post_process_channels)
        self.fusion_blocks = nn.ModuleList(_Fusion(channels, use_bias, has_skip=i > 0) for i in range(N_LEVELS))
        self.project = _Convolution(channels, channels, 3) if projection_after_fusion else None
        self.conv_depth = _OutputConvolutions(channels, n_hidden_channels, n_output_channels)

    def forward(self, x: Levels, mapping: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Map (map [B, C, h, w], class token [B, C]) of each level to [B, K, 32 ceil(h / 2), 32 ceil(w / 2)].

        Args:
            x: the levels, shallow to deep; h and w are those of the deepest one.
            mapping: from outputs [B, K, rows, W] to what is made of them, e.g. depths [B, 1, rows, W]. It is applied
                to bands of rows, so that all outputs, which may take gigabytes, never exist at once.

        Raises:
            ValueError: not four levels, or a class token is missing.
        """
        return self.conv_depth(self.forward_features(x), mapping)

    def forward_features(self, x: Levels) -> Tensor:
        """Return the fused map [B, D, 16 ceil(h / 2), 16 ceil(w / 2)]."""
        pyramid = [_in_fastest_layout(conv(y)) for conv, y in zip(self.convs, self.reassemble_blocks(x), strict=True)]
        fused = self.fusion_blocks[0](pyramid[-1])
        for block, skip in zip(self.fusion_blocks[1:], pyramid[-2::-1], strict=True):
            fused = block(fused, skip)
        return fused if self.project is None else F.relu(self.project(fused))


class _Convolution(nn.Module):
    """A convolution that keeps the size; one level down in the state dict, as published."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)
        if not self.conv.weight.is_meta:  # On the meta device torch would import its compiler to do nothing.
            nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class _Reassembly(nn.Module):
    """Map four levels to maps [B, P_i, ...] of 4, 2, 1 and 1/2 times their resolutions."""

    def __init__(
        self, in_channels: Sequence[int], out_channels: Sequence[int], readout_type: str, use_batchnorm: bool
    ) -> None:
        super().__init__()
        self.readout_type = readout_type
        self.projects = nn.ModuleList(
            _Convolution(*widths, 1) for widths in zip(in_channels, out_channels, strict=True)
        )
        first, second, _, last = out_channels
        self.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(first, first, kernel_size=4, stride=4),
                nn.ConvTranspose2d(second, second, kernel_size=2, stride=2),
                nn.Identity(),
                nn.Conv2d(last, last, kernel_size=3, stride=2, padding=1),
            ]
        )
        if readout_type == "project":
            self.readout_projects = nn.ModuleList(
                nn.Sequential(nn.Linear(2 * width, width), nn.GELU()) for width in in_channels
            )
        if use_batchnorm:
            self.batchnorm_layers = nn.ModuleList(nn.BatchNorm2d(width) for width in in_channels)
        self.use_batchnorm = use_batchnorm

    def forward(self, levels: Levels) -> list[Tensor]:
        if len(levels) != N_LEVELS:
            raise ValueError(f"a DPT head takes {N_LEVELS} levels of (map, class token), but was given {len(levels)}")
        return [self._reassemble(i, *level) for i, level in enumerate(levels)]

    def _reassemble(self, i: int, patches: Tensor, class_token: Tensor | None = None) -> Tensor:
        x = self._read_out(i, patches, class_token)
        if self.use_batchnorm:
            x = self.batchnorm_layers[i](x)
        return self.resize_layers[i](self.projects[i](x))

    def _read_out(self, i: int, patches: Tensor, class_token: Tensor | None) -> Tensor:
        if self.readout_type == "ignore":
            return patches
        if class_token is None:
            raise ValueError(
                f"readout_type={self.readout_type!r} needs the class token of level {i}, but it is missing"
            )
        if self.readout_type == "add":
            return patches + class_token[:, :, None, None]
        linear = cast(Any, self.readout_projects[i])[0]
        of_patches, of_token = linear.weight.chunk(2, dim=1)  # [C, C] each
        from_token = F.linear(class_token, of_token, linear.bias)  # [B, C]
        return F.gelu(F.conv2d(patches, of_patches[:, :, None, None]) + from_token[:, :, None, None])


class _Fusion(nn.Module):
    """Add a level to the running map, and double its resolution."""

    def __init__(self, channels: int, use_bias: bool, *, has_skip: bool) -> None:
        super().__init__()
        if has_skip:
            self.res_conv_unit1 = _ResidualUnit(channels, use_bias)
        self.res_conv_unit2 = _ResidualUnit(channels, use_bias)
        self.project = _Convolution(channels, channels, 1)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if skip is not None:
            x = x + self.res_conv_unit1(resize_bilinear(skip, x.shape[-2:]))
        x = _without_autocast(self.project.conv, self.res_conv_unit2(x))
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


class _ResidualUnit(nn.Module):
    """x + conv2(relu(conv1(relu(x))))."""

    def __init__(self, channels: int, use_bias: bool) -> None:
        super().__init__()
        self.conv1 = _Convolution(channels, channels, 3, bias=use_bias)
        self.conv2 = _Convolution(channels, channels, 3, bias=use_bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu_(self.conv1(F.relu(x))))


class _OutputConvolutions(nn.Module):
    def __init__(self, channels: int, n_hidden_channels: int, n_output_channels: int) -> None:
        super().__init__()
        self.head = nn.Sequential(
            nn.Conv2d(channels, channels // 2, kernel_size=3, padding=1),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
            nn.Conv2d(channels // 2, n_hidden_channels, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(n_hidden_channels, n_output_channels, kernel_size=1),
        )

    def forward(self, x: Tensor, mapping: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        last: Any = self.head[-1]
        hidden = self.head[:-1](x)  # [B, hidden, H, W]
        if mapping is None:
            return _without_autocast(last, hidden)  # [B, K, H, W]
        if torch.compiler.is_compiling():
            return mapping(_without_autocast(last, hidden))
        n_rows = max(1, BAND_SIZE // max(1, len(hidden) * last.out_channels * hidden.shape[-1]))
        return torch.cat([mapping(_without_autocast(last, rows)) for rows in hidden.split(n_rows, dim=2)], dim=2)


def _without_autocast(convolution: nn.Module, x: Tensor) -> Tensor:
    # These convolutions are cheap, and nothing averages their rounding afterwards.
    with autocast_to(x.device.type, torch.float32):
        return convolution(x.to(convolution.weight.dtype))  # type: ignore[arg-type]


def _in_fastest_layout(maps: Tensor) -> Tensor:
    # On CPUs, upsampling is 2 to 6 times as fast with the channels last in memory. The convolutions of the pyramid are
    # slower that way, because they have more channels than positions.
    if maps.device.type != "cpu" or torch.compiler.is_compiling():
        return maps
    return maps.contiguous(memory_format=torch.channels_last)
