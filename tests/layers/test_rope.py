from __future__ import annotations

import pytest
import torch

from dinov3.layers import RopePositionEmbedding
from dinov3.layers.attention import rope_apply, rope_rotate_half


def test_rotations_depend_only_on_relative_position() -> None:
    """Products of rotated queries and keys are equal for pairs of patches at equal distance (RoFormer, section 3)."""
    torch.manual_seed(0)
    sin, cos = RopePositionEmbedding(16, num_heads=1, dtype=torch.float64)(H=3, W=4)
    q, k = torch.randn(2, 16, dtype=torch.float64)
    rotated_q, rotated_k = rope_apply(q, sin, cos), rope_apply(k, sin, cos)
    products = rotated_q @ rotated_k.T  # [12, 12]
    torch.testing.assert_close(products[0, 5], products[6, 11])  # one row down, one column right
    assert (products[0, 5] - products[5, 0]).abs() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotations_round_as_their_formula_does(dtype: torch.dtype) -> None:
    """Low precision shows in which order products are rounded and added."""
    x, sin, cos = torch.randn(3, 2, 4, 5, 16).to(dtype).unbind()
    assert torch.equal(rope_apply(x, sin, cos), x * cos + rope_rotate_half(x) * sin)


def test_each_call_draws_again_in_training_and_never_in_evaluation() -> None:
    rope = RopePositionEmbedding(16, num_heads=1, rescale_coords=2)
    assert not torch.equal(rope(H=2, W=2)[0], rope(H=2, W=2)[0])
    rope.eval()
    assert torch.equal(rope(H=2, W=2)[0], rope(H=2, W=2)[0])


@pytest.mark.parametrize("coords", ["separate", "max", "min"])
def test_coordinates_of_one_long_row(coords: str) -> None:
    rope = RopePositionEmbedding(16, num_heads=1, normalize_coords=coords)
    rows, columns = rope.coordinates(1, 4).unbind(1)
    span = {"separate": 0.75, "max": 0.75, "min": 6.0}[coords]
    assert columns.max() == span and rows.unique().tolist() == [{"max": -0.75}.get(coords, 0.0)]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"embed_dim": 10}, r"multiple of 4 \* num_heads, got 10 and 2 heads"),
        ({"base": None}, "need either base, or both"),
        ({"min_period": 1.0}, "need either base, or both"),
        ({"min_period": 1.0, "max_period": 2.0}, "need either base, or both"),
        ({"normalize_coords": "mean"}, "normalize_coords must be one of"),
        ({"shift_coords": -1.0}, "shift_coords must be >= 0"),
        ({"jitter_coords": 0.5}, "jitter_coords must be >= 1"),
        ({"rescale_coords": 0.5}, "rescale_coords must be >= 1"),
    ],
)
def test_wrong_arguments(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RopePositionEmbedding(**{"embed_dim": 16, "num_heads": 2} | kwargs)


def test_meta_device_and_reinitialisation() -> None:
    rope = RopePositionEmbedding(16, num_heads=1, device="meta", dtype=torch.float32)
    assert rope.periods.is_meta
    rope.to_empty(device="cpu")
    rope._init_weights()
    assert torch.equal(rope.periods, RopePositionEmbedding(16, num_heads=1, dtype=torch.float32).periods)
