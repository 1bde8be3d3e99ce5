from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dinov3.heads.mask2former import semantic
from dinov3.heads.mask2former.semantic import semantic_scores


def predictions(h: int = 9, w: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 6, 5, generator=generator), 4 * torch.randn(2, 6, h, w, generator=generator)


@pytest.mark.parametrize("size", [None, (9, 7), (36, 28), (9, 20), (31, 7), (4, 3), (1, 1)])
@pytest.mark.parametrize("band_height", [1, 4, 1000])
def test_scores_are_sums_over_queries(size: tuple[int, int] | None, band_height: int) -> None:
    logits, masks = predictions()
    resized = masks if size is None else F.interpolate(masks, size, mode="bilinear", align_corners=False)
    want = torch.einsum("bqk,bqhw->bkhw", logits.softmax(-1)[..., :-1], resized.sigmoid())
    got = semantic_scores(logits, masks, size, band_height=band_height)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)


def test_masks_of_the_size_of_the_result_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    resized_rows = semantic._resized_rows

    def record(*args: object) -> torch.Tensor:
        band = resized_rows(*args)  # type: ignore[arg-type]
        seen.append(band.shape[-2])
        return band

    monkeypatch.setattr(semantic, "_resized_rows", record)
    semantic_scores(*predictions(), (100, 28))
    assert seen == [32, 32, 32, 4]


def test_scores_are_float32_also_of_half_precision() -> None:
    logits, masks = (x.bfloat16() for x in predictions())
    want = semantic_scores(logits.float(), masks.float(), (20, 20))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = semantic_scores(logits, masks, (20, 20))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want)


def test_scores_have_gradients() -> None:
    logits, masks = (x.requires_grad_() for x in predictions())
    semantic_scores(logits, masks, (20, 20), band_height=8).square().sum().backward()
    got = logits.grad, masks.grad
    logits, masks = (x.requires_grad_() for x in predictions())
    resized = F.interpolate(masks, (20, 20), mode="bilinear")
    torch.einsum("bqk,bqhw->bkhw", logits.softmax(-1)[..., :-1], resized.sigmoid()).square().sum().backward()
    torch.testing.assert_close(got, (logits.grad, masks.grad), rtol=1e-4, atol=1e-4)
