from __future__ import annotations

import pytest
import torch

from dinov3.models.summary import count_flops, summarize
from dinov3.models.vision_transformer import DinoVisionTransformer, vit_7b


def test_operations_of_a_block_by_hand() -> None:
    def build(depth: int) -> DinoVisionTransformer:
        return DinoVisionTransformer(patch_size=4, embed_dim=32, depth=depth, num_heads=2, device="meta")

    tokens, dim = 1 + 2 * 3, 32
    linears = 2 * tokens * (3 * dim * dim + dim * dim + 8 * dim * dim)
    attention = 2 * 2 * tokens * tokens * dim
    one, two = (count_flops(build(depth), (8, 12)) for depth in (1, 2))
    assert two - one == linears + attention
    assert one - (two - one) == 2 * 6 * dim * 3 * 4 * 4  # the patch embedding


def test_summary_of_a_model_that_would_not_fit_in_memory() -> None:
    text = summarize(vit_7b(device="meta", n_storage_tokens=4), 224)
    assert "DinoVisionTransformer: 6716.0 M parameters" in text
    assert "GFLOP for one image of 224 x 224 pixels" in text and "blocks" in text


@pytest.mark.parametrize("mode", [True, False])
def test_the_model_is_left_as_it_is(mode: bool) -> None:
    model = DinoVisionTransformer(patch_size=4, embed_dim=32, depth=1, num_heads=2).train(mode)
    summarize(model, 8)
    assert all(module.training is mode for module in model.modules())
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    assert all(isinstance(parameter, torch.nn.Parameter) for parameter in model.parameters())
