"""Images of the golden data cases, and the comparison of normalised uint8 pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from . import deterministic, golden

IMAGENET_STD = (0.229, 0.224, 0.225)
SHARE_OF_OTHER_LEVELS = 0.02


def make_image(spec: dict[str, Any]) -> Image.Image:
    """The RGB image that a case describes under `input`: noise, smooth, or a ramp along each side."""
    size = (spec["height"], spec["width"])
    if "ramp" in spec:
        rows = (255 * torch.arange(size[0]) / (size[0] - 1)).round()[:, None].expand(size)
        columns = (255 * torch.arange(size[1]) / (size[1] - 1)).round()[None].expand(size)
        pixels = torch.stack([columns, rows, torch.zeros(size)], dim=-1)
    elif spec["make"] == "smooth":
        coarse = deterministic.uniform(spec["name"], (6, 6, 3), spec["seed"]).permute(2, 0, 1)[None]
        smooth = F.interpolate(coarse, size=size, mode="bilinear", align_corners=True)[0]
        pixels = (smooth.permute(1, 2, 0) * 256).clamp(max=255.999)
    else:
        pixels = deterministic.uniform(spec["name"], (*size, 3), spec["seed"]) * 256
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def assert_same_pixels(got: Tensor, output: dict[str, Any], std: Sequence[float] | None = None) -> None:
    """At most one uint8 level of difference in at most 2 percent of the values, all others within 1e-5."""
    assert list(got.shape) == output["shape"]
    assert str(got.dtype) == f"torch.{output['dtype']}"
    if "stored_slice" in output:
        got = got[parse_slices(output["stored_slice"])]
    difference = (got - golden.tensors("data")[output["key"]]).abs()
    level = 1 / 255 / torch.tensor(std or IMAGENET_STD).view(3, 1, 1)
    assert (difference <= level + 1e-5).all(), f"largest difference {difference.max():.3g}"
    share = (difference > 1e-5).float().mean().item()
    assert share <= SHARE_OF_OTHER_LEVELS, f"{share:.1%} of the values differ"


def parse_slices(text: str) -> tuple[slice, ...]:
    """The slices of e.g. ":, ::8, 2:4"."""
    parts = [part.strip().split(":") for part in text.split(",")]
    return tuple(slice(*(int(number) if number else None for number in part)) for part in parts)
