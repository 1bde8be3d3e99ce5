from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dinov3.models.convnext import ConvNeXt
from dinov3.models.summary import (
    Tokens,
    count_flops,
    count_tokens,
    estimate_memory,
    flops_by_module,
    module_table,
    summarize,
)
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


def test_operations_by_module_add_up() -> None:
    model = DinoVisionTransformer(patch_size=4, embed_dim=32, depth=2, num_heads=2, device="meta")
    flops = flops_by_module(model, (8, 12))
    assert flops[""] == count_flops(model, (8, 12)) == flops["patch_embed"] + flops["blocks.0"] + flops["blocks.1"]
    assert flops["blocks.0.mlp"] == 2 * 7 * 2 * 4 * 32 * 32


def test_equal_blocks_share_a_row() -> None:
    model = DinoVisionTransformer(patch_size=4, embed_dim=32, depth=3, num_heads=2, device="meta")
    lines = module_table(model, flops_by_module(model, 8), max_depth=3).splitlines()
    (blocks,) = [line for line in lines if line.strip().startswith("0 to 2, each")]
    assert f"{12 * 32 * 32 + (9 + 4) * 32:,}" in blocks
    assert [line.split()[0] for line in lines if "Linear" in line or "Mlp" in line] == ["mlp"]


def test_different_stages_have_rows_of_their_own() -> None:
    with torch.device("meta"):
        model = ConvNeXt(depths=[1, 1, 2, 1], dims=[4, 8, 16, 32])
    table = module_table(model, flops_by_module(model, 64), max_depth=3)
    assert table.count("each") == 1 and "0 to 1, each" in table
    assert f"{sum(p.numel() for p in model.parameters()):,}" in table.splitlines()[2]


def test_tokens_of_both_families() -> None:
    vit = DinoVisionTransformer(patch_size=4, embed_dim=32, depth=1, num_heads=2, n_storage_tokens=3, device="meta")
    assert count_tokens(vit, (9, 16)) == Tokens(1, 3, (2, 4), 32)
    assert count_tokens(vit, (9, 16)).total == 12
    with torch.device("meta"):
        convnext = ConvNeXt(depths=[1, 1, 1, 1], dims=[4, 8, 16, 32])
    assert count_tokens(convnext, (64, 100)) == Tokens(1, 0, (2, 3), 32)
    with pytest.raises(ValueError, match="31 x 64 pixels is smaller than a patch: ConvNeXt needs .* 32 pixels"):
        count_tokens(convnext, (31, 64))


class Wide(nn.Module):
    """Images to 8 channels, to 16, to 1, one pixel at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Sigmoid(), nn.Conv2d(8, 16, 1), nn.Conv2d(16, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_memory_by_hand(dtype: torch.dtype, size: int) -> None:
    memory = estimate_memory(Wide(), (5, 6), batch_size=2, dtype=dtype)
    pixels = 2 * 5 * 6 * size
    assert memory.weights == (3 * 8 + 8 + 8 * 16 + 16 + 16 + 1) * size
    assert memory.forward == pixels * (3 + 8 + 16)  # images, the input of the widest layer, and its output
    assert memory.backward == pixels * (3 + 8 + 16)  # images, of the sigmoid the output, the input of the last layer


def test_buffers_keep_their_precision() -> None:
    model = DinoVisionTransformer(embed_dim=32, depth=1, num_heads=2, pos_embed_rope_dtype="fp32", device="meta")
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert estimate_memory(model, 32, dtype=torch.bfloat16).weights == 2 * n_parameters + 4 * 4
