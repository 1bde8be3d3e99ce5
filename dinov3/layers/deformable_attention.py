"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, section 4.1 and equation 3).

Each query looks at a few points of every level of a pyramid. The points and their weights are linear in the query; the
value at a point is the bilinear mix of the four cells around it.

Notable:
- No compiled extension: each query and head is a *bag* of (levels x points x 4 cells) rows of the table of values, and
  `embedding_bag` sums them with their weights in one pass. Sampled values, which would take levels x points times the
  memory of the result, never exist.
- Cells outside the map count as zero, which is what `grid_sample` calls `padding_mode="zeros"`.
- Shapes are Python numbers, so nothing waits for the device and the module compiles without a graph break.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shapes = Sequence[tuple[int, int]]

#: The four cells around a point, as steps in x and y from the one at its top left.
CORNERS = ((0, 0), (1, 0), (0, 1), (1, 1))


def ms_deform_attn(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Sum weighted samples of maps of several levels.

    Args:
        value: [N, S, M, D] of M heads; the S cells are those of all levels, level after level, row by row.
        shapes: (height, width) of each of the L levels.
        locations: [N, Q, M, L, P, 2], as (x, y); 0 and 1 are the borders of the map, points outside it count as zero.
        weights: [N, Q, M, L, P].

    Returns:
        [N, Q, M * D], float32 also of half-precision values, and under autocast. Differentiable in all three tensors.
    """
    n, s, m, d = value.shape
    dtype = torch.promote_types(value.dtype, torch.float32)
    # None of these operators is one that autocast would run in half precision.
    cells, shares = _cells_around(locations.to(dtype), weights.to(dtype), shapes)  # [N, Q, M, L P 4]
    # The table has a row for each (image, cell, head): a view of the values, not a copy.
    image = torch.arange(n, dtype=torch.int32, device=value.device)[:, None, None, None]
    head = torch.arange(m, dtype=torch.int32, device=value.device)[:, None]
    rows = cells.add_(image * s).mul_(m).add_(head)
    out = F.embedding_bag(
        rows.flatten(0, 2),
        value.to(dtype).reshape(n * s * m, d),
        mode="sum",
        per_sample_weights=shares.flatten(0, 2),
    )
    return out.view(n, locations.shape[1], m * d)


def _cells_around(locations: Tensor, weights: Tensor, shapes: Shapes) -> tuple[Tensor, Tensor]:
    # The cells of the concatenated levels around each point, and their shares of its weight: both [N, Q, M, L P 4].
    sizes = _sizes(shapes, locations)
    width, height = sizes.unbind(-1)  # [L, 1]
    starts = (width * height).cumsum(0) - width * height
    # The centre of the first cell lies at half a cell from the border.
    points = locations * sizes - 0.5  # [N, Q, M, L, P, 2]
    top_left = points.detach().floor()
    x_share, y_share = (points - top_left).unbind(-1)
    x, y = top_left.unbind(-1)
    cells, shares = [], []
    for right, below in CORNERS:
        column, row = x + right, y + below
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        share = (x_share if right else 1 - x_share) * (y_share if below else 1 - y_share)
        shares.append(weights * share * inside)
        # Cells outside weigh nothing, but must be rows of the table, too.
        cells.append(torch.where(inside, starts + row * width + column, 0).int())
    return torch.stack(cells, dim=-1).flatten(-3), torch.stack(shares, dim=-1).flatten(-3)


def _sizes(shapes: Shapes, like: Tensor) -> Tensor:
    # [L, 1, 2] as (width, height); filled on the device, because copying numbers to it would wait for it.
    return torch.stack([like.new_full((1,), side) for shape in shapes for side in reversed(shape)]).view(-1, 1, 2)


class MSDeformAttn(nn.Module):
    """Attend to a few points of a pyramid of maps.

    Args:
        d_model: width of queries, inputs and outputs.
        n_levels: L, the maps of the pyramid.
        n_heads: M.
        n_points: P, of each head on each level.
        ratio: width of the values, as a share of `d_model`.

    Raises:
        ValueError: `d_model`, or the width of the values, is not a multiple of `n_heads`.
    """

    def __init__(
        self, d_model: int = 256, n_levels: int = 4, n_heads: int = 8, n_points: int = 4, ratio: float = 1.0
    ) -> None:
        super().__init__()
        d_value = int(d_model * ratio)
        for name, width in {"d_model": d_model, "d_model * ratio": d_value}.items():
            if width % n_heads or not width:
                raise ValueError(f"{name}={width}: expected a multiple of n_heads={n_heads}")
        self.n_levels, self.n_heads, self.n_points = n_levels, n_heads, n_points
        self.sampling_offsets = nn.Linear(d_model, n_heads * n_levels * n_points * 2)
        self.attention_weights = nn.Linear(d_model, n_heads * n_levels * n_points)
        self.value_proj = nn.Linear(d_model, d_value)
        self.output_proj = nn.Linear(d_value, d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Let head m look in the direction of the m-th spoke of a wheel, at p + 1 cells, with equal weights."""
        if self.value_proj.weight.is_meta:
            return
        angles = torch.arange(self.n_heads, dtype=torch.float32) * (2 * math.pi / self.n_heads)
        spokes = torch.stack([angles.cos(), angles.sin()], dim=-1)
        spokes = spokes / spokes.abs().amax(dim=-1, keepdim=True)  # [M, 2], on a square
        distances = torch.arange(1, self.n_points + 1)[:, None]
        offsets = (spokes[:, None, None] * distances).expand(-1, self.n_levels, -1, -1)  # [M, L, P, 2]
        nn.init.zeros_(self.sampling_offsets.weight)
        self.sampling_offsets.bias.copy_(offsets.flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        inputs: Tensor,
        shapes: Shapes,
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend from each query to points around its reference.

        Args:
            query: [N, Q, d_model].
            reference_points: [N or 1, Q, L or 1, 2], (x, y) from 0 to 1: offsets count in cells; or [..., 4], boxes
                (centre x, centre y, width, height): offsets count in halves of the box, divided by P.
            inputs: [N, S, d_model], the cells of all levels, level after level, row by row.
            shapes: (height, width) of each level.
            padding_mask: bool [N, S], True where `inputs` are padding, which counts as zero.

        Returns:
            [N, Q, d_model].

        Raises:
            ValueError: `shapes` do not fit the levels or the cells, or a reference has neither 2 nor 4 numbers.
        """
        n, n_queries, _ = query.shape
        s = inputs.shape[1]
        if len(shapes) != self.n_levels or sum(height * width for height, width in shapes) != s:
            raise ValueError(f"shapes={list(shapes)}: expected {self.n_levels} levels with {s} cells in all")
        value = self.value_proj(inputs)
        if padding_mask is not None:
            # After the projection, so that its bias does not make something of the padding.
            value = value.masked_fill(padding_mask[..., None], 0.0)
        grid = (n, n_queries, self.n_heads, self.n_levels, self.n_points)
        offsets = self.sampling_offsets(query).view(*grid, 2)
        # The softmax is over the points of all levels together.
        weights = self.attention_weights(query).view(*grid[:3], -1).softmax(dim=-1).view(grid)
        locations = self._locations(reference_points[:, :, None, :, None], offsets, shapes)
        out = ms_deform_attn(value.view(n, s, self.n_heads, -1), shapes, locations, weights)
        return self.output_proj(out.to(value.dtype))

    def _locations(self, reference: Tensor, offsets: Tensor, shapes: Shapes) -> Tensor:
        # reference: [N, Q, 1, L, 1, 2 or 4]
        if reference.shape[-1] == 2:
            return reference + offsets / _sizes(shapes, reference)
        if reference.shape[-1] == 4:
            return reference[..., :2] + offsets / self.n_points * reference[..., 2:] * 0.5
        raise ValueError(f"reference_points have {reference.shape[-1]} numbers: expected 2 (points) or 4 (boxes)")


def cell_centres(shapes: Shapes, device: torch.device | None = None) -> Tensor:
    """Return the centres (x, y), from 0 to 1, of the cells of all levels as reference points: float32 [1, S, 1, 2]."""
    centres = []
    for height, width in shapes:
        y = (torch.arange(height, dtype=torch.float32, device=device) + 0.5) / height
        x = (torch.arange(width, dtype=torch.float32, device=device) + 0.5) / width
        centres.append(torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).view(-1, 2))
    return torch.cat(centres)[None, :, None]
