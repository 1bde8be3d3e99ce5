from __future__ import annotations

import math

import pytest
import torch

from dinov3.layers.position_encodings import grid_sine_encoding, sine_encoding


def test_features_are_sines_and_cosines_of_falling_frequency() -> None:
    got = sine_encoding(torch.tensor([0.7]), 4, temperature=100.0)[0]
    want = [math.sin(0.7), math.cos(0.7), math.sin(0.07), math.cos(0.07)]
    assert got.tolist() == pytest.approx(want)


@pytest.mark.parametrize(("offset", "normalize"), [(0.0, True), (0.5, True), (0.5, False)])
def test_cells_are_counted_without_the_padding(offset: float, normalize: bool) -> None:
    valid = torch.tensor([[True, True, True, False], [True, True, True, False]])[None]
    got = grid_sine_encoding(valid, 2, offset=offset, normalize=normalize)
    assert got.shape == (1, 4, 2, 4) and got.dtype == torch.float32
    row, column = 2 - offset, 3 - offset
    angles = (
        (row / 2 * 2 * math.pi, column / 3 * 2 * math.pi) if normalize else (row * 2 * math.pi, column * 2 * math.pi)
    )
    want = [f(angle) for angle in angles for f in (math.sin, math.cos)]
    assert got[0, :, 1, 2].tolist() == pytest.approx(want, abs=1e-5)
    # The padding repeats the last cell, because it is not counted.
    assert torch.equal(got[0, 2:, 1, 3], got[0, 2:, 1, 2])


def test_an_empty_grid_is_finite() -> None:
    assert grid_sine_encoding(torch.zeros(1, 2, 2, dtype=torch.bool), 2, offset=0.5).isfinite().all()
