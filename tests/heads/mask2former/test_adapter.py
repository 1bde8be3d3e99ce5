from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinov3.heads.mask2former.adapter import DINOv3_Adapter
from dinov3.models.convnext import ConvNeXt
from tests.heads.tiny import images, randomise_, tiny_backbone


def adapter(backbone: nn.Module | None = None, **kwargs: Any) -> DINOv3_Adapter:
    torch.manual_seed(0)
    model = DINOv3_Adapter(backbone or tiny_backbone(), [1, 3, 5, 7], **{"conv_inplane": 4, **kwargs})
    randomise_(model)
    return model.eval()


def test_maps_have_their_strides() -> None:
    maps = adapter()(images(64, 96, batch=2))
    shapes = {level: list(x.shape) for level, x in maps.items()}
    assert shapes == {"1": [2, 32, 16, 24], "2": [2, 32, 8, 12], "3": [2, 32, 4, 6], "4": [2, 32, 2, 3]}


@pytest.mark.parametrize(
    ("height", "width", "patch_size", "multiple"),
    [(48, 64, 16, 32), (64, 80, 16, 32), (8, 8, 16, 32), (0, 32, 16, 32), (96, 112, 14, 224)],
)
def test_other_sizes_are_refused_at_the_door(height: int, width: int, patch_size: int, multiple: int) -> None:
    model = adapter(tiny_backbone(patch_size=patch_size))
    with pytest.raises(
        ValueError, match=f"images of {height} x {width} pixels: both sides must be multiples of {multiple};"
    ):
        model(torch.zeros(1, 3, height, width))


def test_patches_of_14_pixels() -> None:
    maps = adapter(tiny_backbone(patch_size=14))(images(224, 224))
    assert maps["4"].shape == (1, 32, 7, 7) and maps["1"].isfinite().all()


def test_only_the_adapter_learns_and_the_backbone_stays_in_evaluation_mode() -> None:
    model = adapter().train()
    assert model.spm.training and not any(module.training for module in model.backbone.modules())
    loss = sum(x.square().mean() for x in model(images(batch=2)).values())
    assert isinstance(loss, Tensor)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith("backbone."), name
    assert int(model.get_submodule("norm1").num_batches_tracked) == 1  # type: ignore[arg-type]


def test_no_graph_is_made_of_the_backbone() -> None:
    model, seen = adapter(), []
    model.backbone.blocks[0].register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    assert model(images().requires_grad_())["4"].requires_grad and seen == [False]


def test_two_forwards_in_training_mode_see_the_same_features() -> None:
    # Training mode would rescale the positions of the backbone at random.
    model, seen = adapter(drop_path_rate=0.0).train(), []
    hook = model.interactions[0].extractor.feat_norm.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    with torch.no_grad():
        model(images()), model(images())
    hook.remove()
    assert torch.equal(*seen)


def test_checkpointed_extractors_have_the_same_gradients() -> None:
    gradients = []
    for with_cp in (True, False):
        model = adapter(with_cp=with_cp)
        model(images())["2"].square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*gradients)


def test_training_drops_the_branches_of_some_samples() -> None:
    extractor = adapter(drop_path_rate=0.5, with_cp=False).interactions[0].extractor
    grids = [(8, 8), (4, 4), (2, 2)]
    tokens, block, references = torch.randn(64, 84, 32), torch.randn(64, 16, 32), torch.rand(1, 84, 1, 2)
    with torch.no_grad():
        without = tokens + extractor.attn(
            extractor.query_norm(tokens), references, extractor.feat_norm(block), [(4, 4)]
        )
        whole = extractor(tokens, references, block, (4, 4), grids)
        dropped = extractor.train()(tokens, references, block, (4, 4), grids)
    is_dropped = ((dropped - without).abs().amax((1, 2)) < 1e-5).nonzero().flatten().tolist()
    assert 16 <= len(is_dropped) <= 48
    kept = [i for i in range(64) if i not in is_dropped]
    # Those that stay weigh 1 / (1 - 0.5).
    torch.testing.assert_close(dropped[kept], (2 * whole - without)[kept], rtol=1e-4, atol=1e-4)


def test_initial_values() -> None:
    torch.manual_seed(0)
    model = DINOv3_Adapter(tiny_backbone(), [1, 3, 5, 7])
    extractor = model.interactions[0].extractor
    assert extractor.ffn.fc2.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert model.spm.conv3[0].weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 256)), rel=0.05)
    assert extractor.ffn.dwconv.dwconv.weight.std().item() == pytest.approx(math.sqrt(2 / 9), rel=0.3)
    assert model.level_embed.std().item() == pytest.approx(1, rel=0.3)
    # The directions of deformable attentions are set last.
    assert not extractor.attn.sampling_offsets.weight.any()
    assert extractor.attn.sampling_offsets.bias.abs().max() == 4
    biases = (p for name, p in model.spm.named_parameters() if name.endswith("bias"))
    assert not any(bias.any() for bias in biases)


def test_other_blocks_and_backbones_are_refused() -> None:
    with pytest.raises(ValueError, match=r"interaction_indexes=\[7\]: a ViT-Adapter reads 4 blocks; choose FOUR_EVEN"):
        DINOv3_Adapter(tiny_backbone(), [7])
    convnext = ConvNeXt(depths=[1, 1, 2, 1], dims=[8, 12, 16, 20], patch_size=16)
    with pytest.raises(ValueError, match=r"needs a ViT: blocks of this backbone have \[8, 12, 16, 20\] channels"):
        DINOv3_Adapter(convnext, [0, 1, 2, 3])
