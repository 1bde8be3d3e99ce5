"""Axial rotary position embedding over a patch grid (RoFormer, arXiv 2104.09864; DINOv3, 2508.10104, section 3.2).

Notable:
- Positions are patch centres, normalised to [-1, 1], so that one model serves every image size.
- A quarter of a head's channels turns with the row, a quarter with the column, and the two halves of the channels are
  the two components of the rotated pairs: channel blocks of d / 4 are row, column, row, column.
- `periods` is a buffer in state dicts; loaded values count and are never computed again.
- In training the coordinates may be shifted, jittered and rescaled at random ("RoPE-box jittering") at each call.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

NORMALIZATIONS = ("separate", "max", "min")


class RopePositionEmbedding(nn.Module):
    """Makes the sines and cosines that rotate queries and keys of a grid of patches.

    The frequencies come either from `base` or from `min_period` and `max_period`.

    Args:
        embed_dim: D, the channels of all heads together; a multiple of 4 * num_heads.
        num_heads: number of heads; d = D / num_heads.
        base: the longest period is about `base`, the shortest 1, in units of the normalised coordinates.
        min_period: shortest period.
        max_period: longest period.
        normalize_coords: what spans [-1, 1]: `separate` each axis, `max` the longer one, `min` the shorter one.
        shift_coords: training shifts each axis by a value in +-shift_coords. Default: no shift.
        jitter_coords: training scales each axis by a factor in [1 / jitter_coords, jitter_coords], log-uniform.
        rescale_coords: the same with one factor for both axes.
        dtype: of every step of the computation. Default: PyTorch's.

    Raises:
        ValueError: an argument is out of its range, or the frequencies are given in no way or in both.
    """

    periods: Tensor  # [d / 4]

    def __init__(
        self,
        embed_dim: int,
        *,
        num_heads: int,
        base: float | None = 100.0,
        min_period: float | None = None,
        max_period: float | None = None,
        normalize_coords: str = "separate",
        shift_coords: float | None = None,
        jitter_coords: float | None = None,
        rescale_coords: float | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if embed_dim % (4 * num_heads) != 0:
            raise ValueError(f"embed_dim must be a multiple of 4 * num_heads, got {embed_dim} and {num_heads} heads")
        if [base is None, min_period is None, max_period is None] not in ([False, True, True], [True, False, False]):
            raise ValueError(
                "the RoPE periods need either base, or both min_period and max_period with base=None; "
                f"got {base=}, {min_period=}, {max_period=}"
            )
        if normalize_coords not in NORMALIZATIONS:
            raise ValueError(f"normalize_coords must be one of {NORMALIZATIONS}, got {normalize_coords!r}")
        if shift_coords is not None and shift_coords < 0:
            raise ValueError(f"shift_coords must be >= 0, got {shift_coords}")
        for name, factor in (("jitter_coords", jitter_coords), ("rescale_coords", rescale_coords)):
            if factor is not None and factor < 1:
                raise ValueError(f"{name} must be >= 1, got {factor}")
        self.base = base
        self.min_period = min_period
        self.max_period = max_period
        self.D_head = embed_dim // num_heads
        self.normalize_coords = normalize_coords
        self.shift_coords = shift_coords
        self.jitter_coords = jitter_coords
        self.rescale_coords = rescale_coords
        self.dtype = dtype
        self.register_buffer("periods", torch.empty(self.D_head // 4, device=device, dtype=dtype), persistent=True)
        self._init_weights()

    @property
    def is_random(self) -> bool:
        """Whether two calls differ: in training mode, with a shift, jitter or rescaling."""
        options = (self.shift_coords, self.jitter_coords, self.rescale_coords)
        return self.training and any(option is not None for option in options)

    def forward(self, *, H: int, W: int) -> tuple[Tensor, Tensor]:
        """Return the rotation of every patch, in row-major order.

        Args:
            H: rows of the grid, in patches.
            W: columns of the grid, in patches.

        Returns:
            (sin, cos), each [H * W, d].
        """
        return self.rotations(self.coordinates(H, W))

    def coordinates(self, H: int, W: int) -> Tensor:
        """Return the normalised (row, column) of the patch centres [H * W, 2], not augmented."""
        # Not max(H, W) and min(H, W), of which a trace would keep the one that its example has.
        longer = (H + W + abs(H - W)) // 2
        height, width = {"separate": (H, W), "max": (longer,) * 2, "min": (H + W - longer,) * 2}[self.normalize_coords]
        rows = torch.arange(0.5, H, device=self.periods.device, dtype=self.dtype) / height
        columns = torch.arange(0.5, W, device=self.periods.device, dtype=self.dtype) / width
        grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)  # [H, W, 2]
        return 2.0 * grid.flatten(0, 1) - 1.0

    def rotations(self, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        """Return (sin, cos), each [P, d], of the `coordinates` [P, 2], which training augments first."""
        if self.is_random:
            # Seeded runs depend on the order, the shapes and the kind of these draws.
            if self.shift_coords is not None:
                coordinates = coordinates + self._draw(2, self.shift_coords)
            if self.jitter_coords is not None:
                coordinates = coordinates * self._draw(2, math.log(self.jitter_coords)).exp()
            if self.rescale_coords is not None:
                coordinates = coordinates * self._draw(1, math.log(self.rescale_coords)).exp()
        angles = 2 * math.pi * coordinates[:, :, None] / self.periods  # [P, 2, d / 4]
        angles = angles.flatten(1, 2)  # [P, d / 2]
        return angles.sin().tile(2), angles.cos().tile(2)

    def _draw(self, n: int, bound: float) -> Tensor:
        return torch.empty(n, device=self.periods.device, dtype=self.dtype).uniform_(-bound, bound)

    def compute_periods(self, device: torch.device | str) -> Tensor:
        """Compute the periods [d / 4] that follow from the arguments, on a device."""
        n_periods = self.D_head // 4
        if self.base is not None:
            exponents = 2 * torch.arange(n_periods, device=device, dtype=self.dtype) / (self.D_head // 2)
            return self.base**exponents
        assert self.min_period is not None and self.max_period is not None
        ratio = self.max_period / self.min_period
        exponents = torch.linspace(0, 1, n_periods, device=device, dtype=self.dtype)
        return ratio**exponents / ratio * self.max_period

    @torch.no_grad()
    def _init_weights(self) -> None:
        if self.periods.is_meta:
            return  # there are no values to set, and arithmetic on meta tensors would load PyTorch's compiler
        self.periods.copy_(self.compute_periods(self.periods.device))
