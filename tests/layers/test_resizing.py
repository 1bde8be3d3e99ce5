"""Resizing of maps and images."""

from __future__ import annotations

import torch

from dinov3.layers.resizing import resize_antialiased


def test_antialiasing_averages_and_keeps_the_dtype() -> None:
    stripes = torch.tensor([0.0, 1.0]).repeat(16).expand(1, 1, 32, 32)
    for dtype in (torch.float32, torch.bfloat16):
        small = resize_antialiased(stripes.to(dtype), (4, 4))
        assert small.shape == (1, 1, 4, 4) and small.dtype == dtype
        torch.testing.assert_close(small, torch.full_like(small, 0.5), rtol=0, atol=0.05)
