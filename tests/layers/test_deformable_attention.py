from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3.layers import MSDeformAttn, ms_deform_attn
from dinov3.layers.deformable_attention import cell_centres

SHAPES = [(3, 5), (2, 1)]


def inputs(n: int = 2, m: int = 2, d: int = 3, q: int = 4, p: int = 2, dtype: torch.dtype = torch.float64) -> Any:
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(n, 17, m, d, generator=generator, dtype=dtype)
    locations = torch.rand(n, q, m, len(SHAPES), p, 2, generator=generator, dtype=dtype) * 1.4 - 0.2
    weights = torch.rand(n, q, m, len(SHAPES), p, generator=generator, dtype=dtype)
    return value, locations, weights


def by_grid_sample(value: Tensor, shapes: Any, locations: Tensor, weights: Tensor) -> Tensor:
    """The definition, level by level."""
    n, _, m, d = value.shape
    out = value.new_zeros(n, locations.shape[1], m, d)
    for level, maps in enumerate(value.split([h * w for h, w in shapes], dim=1)):
        maps = maps.permute(0, 2, 3, 1).reshape(n * m, d, *shapes[level])
        grid = 2 * locations[:, :, :, level].transpose(1, 2).flatten(0, 1) - 1  # [N M, Q, P, 2]
        samples = F.grid_sample(maps, grid, padding_mode="zeros", align_corners=False)  # [N M, D, Q, P]
        samples = samples.view(n, m, d, *samples.shape[2:]).permute(0, 3, 1, 4, 2)  # [N, Q, M, P, D]
        out += (weights[:, :, :, level, :, None] * samples).sum(3)
    return out.flatten(2)


def test_samples_are_those_of_grid_sample() -> None:
    value, locations, weights = inputs()
    got = ms_deform_attn(value, SHAPES, locations, weights)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, by_grid_sample(value, SHAPES, locations, weights))


def test_gradients_are_those_of_the_definition() -> None:
    leaves = tuple(x.requires_grad_() for x in inputs())
    cotangent = torch.randn(2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad((ms_deform_attn(leaves[0], SHAPES, *leaves[1:]) * cotangent).sum(), leaves)
    want = torch.autograd.grad((by_grid_sample(leaves[0], SHAPES, *leaves[1:]) * cotangent).sum(), leaves)
    torch.testing.assert_close(got, want)


def test_result_is_float32_under_autocast() -> None:
    value, locations, weights = inputs(dtype=torch.float32)
    want = ms_deform_attn(value.bfloat16().float(), SHAPES, locations, weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ms_deform_attn(value.bfloat16(), SHAPES, locations, weights)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want)


def test_points_that_are_nowhere_read_no_memory_and_show() -> None:
    value, locations, weights = inputs()
    locations[0, 0], locations[0, 1] = float("nan"), float("inf")
    got = ms_deform_attn(value, SHAPES, locations, weights)
    assert got[0, :2].isnan().all() and got[0, 2:].isfinite().all() and got[1].isfinite().all()


def test_far_points_count_as_zero() -> None:
    value, locations, weights = inputs()
    assert not ms_deform_attn(value, SHAPES, locations + 1e6, weights).any()


def test_padding_counts_as_zero() -> None:
    torch.manual_seed(0)
    module = MSDeformAttn(8, n_levels=2, n_heads=2, n_points=2)
    torch.nn.init.normal_(module.value_proj.bias)
    torch.nn.init.normal_(module.sampling_offsets.weight)
    query, x, mask = torch.randn(1, 17, 8), torch.randn(1, 17, 8), torch.zeros(1, 17, dtype=torch.bool)
    mask[:, 15:] = True  # the second level
    references = cell_centres(SHAPES)
    value = module.value_proj(x)
    value[:, 15:] = 0
    n_samples = (1, 17, 2, 2, 2)
    offsets = module.sampling_offsets(query).view(*n_samples, 2)
    weights = module.attention_weights(query).view(1, 17, 2, 4).softmax(-1).view(n_samples)
    locations = references[:, :, None, :, None] + offsets / torch.tensor([[5.0, 3.0], [1.0, 2.0]])[:, None]
    want = module.output_proj(ms_deform_attn(value.view(1, 17, 2, 4), SHAPES, locations, weights))
    torch.testing.assert_close(module(query, references, x, SHAPES, mask), want)
    assert (module(query, references, x, SHAPES) - want).abs().max() > 1e-3


def test_cell_centres() -> None:
    got = cell_centres([(2, 2), (1, 1)])
    assert got.shape == (1, 5, 1, 2)
    assert got[0, :, 0].tolist() == [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75], [0.5, 0.5]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 30, "n_heads": 4}, "d_model=30: expected a multiple of n_heads=4"),
        ({"d_model": 32, "n_heads": 8, "ratio": 0.4}, r"d_model \* ratio=12: expected a multiple of n_heads=8"),
    ],
)
def test_widths_that_heads_cannot_share_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MSDeformAttn(**options)


def test_other_shapes_and_references_are_refused() -> None:
    module, x, references = MSDeformAttn(8, 2, 2, 2), torch.zeros(1, 17, 8), cell_centres(SHAPES)
    with pytest.raises(ValueError, match=r"shapes=\[\(3, 5\)\]: expected 2 levels with 17 cells in all"):
        module(x, references, x, SHAPES[:1])
    with pytest.raises(ValueError, match="expected 2 levels with 17 cells"):
        module(x, references, x, [(3, 5), (2, 2)])
    with pytest.raises(ValueError, match="have 3 numbers: expected 2"):
        module(x, torch.cat([references, references[..., :1]], dim=-1), x, SHAPES)


def test_the_module_runs_in_half_precision() -> None:
    module, x = MSDeformAttn(8, 2, 2, 2), torch.randn(1, 17, 8)
    want = module(x, cell_centres(SHAPES), x, SHAPES)
    got = module.bfloat16()(x.bfloat16(), cell_centres(SHAPES), x.bfloat16(), SHAPES)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=0.1, atol=0.05)


def test_initial_values_are_left_out_on_the_meta_device() -> None:
    with torch.device("meta"):
        assert all(entry.is_meta for entry in MSDeformAttn().state_dict().values())
