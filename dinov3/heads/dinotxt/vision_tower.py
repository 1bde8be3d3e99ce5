"""The image side of dino.txt: a vision backbone, and a head of a few blocks on all its tokens (arXiv 2412.16334)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dinov3.layers import SelfAttentionBlock, SwiGLUFFN
from dinov3.models.vision_transformer import init_weights_vit
from dinov3.utils import named_apply
from dinov3.utils.messages import check_choice

POOLERS = ("mean", "max")
LAYER_SCALE = 1e-5


class VisionHead(nn.Module):
    """Blocks without positions, a norm and a projection, for each token.

    Without blocks there is no norm either; without `use_linear_projection`, a projection only if the widths differ.

    Args:
        input_dim: D, channels of the backbone.
        embed_dim: E, channels of an image's whole vector: half of it for each of class token and pool if both are used.
        num_heads: attention heads of the blocks.
        num_blocks: number of blocks.
        blocks_drop_path: share of the samples that training leaves out of each residual branch.
        use_class_token: the class token is part of the vector.
        use_patch_tokens: the pooled patch tokens are part of the vector.
        use_linear_projection: project even if the width fits.

    Raises:
        ValueError: neither token is used, or E is odd where both are.
    """

    def __init__(
        self,
        input_dim: int,
        embed_dim: int,
        num_heads: int,
        num_blocks: int,
        blocks_drop_path: float,
        use_class_token: bool,
        use_patch_tokens: bool,
        use_linear_projection: bool,
    ) -> None:
        super().__init__()
        n_parts = use_class_token + use_patch_tokens
        if n_parts == 0:
            raise ValueError("an image needs a vector: set use_class_token, use_patch_tokens, or both")
        if embed_dim % n_parts:
            raise ValueError(f"embed_dim={embed_dim} cannot be shared by class token and patch tokens: it is odd")
        self.blocks = nn.ModuleList(
            SelfAttentionBlock(
                input_dim,
                num_heads,
                init_values=LAYER_SCALE,
                drop_path=blocks_drop_path,
                ffn_layer=partial(SwiGLUFFN, align_to=64),
            )
            for _ in range(num_blocks)
        )
        self.ln_final = nn.LayerNorm(input_dim) if num_blocks else nn.Identity()
        self.embed_dim = embed_dim // n_parts
        needs_projection = use_linear_projection or self.embed_dim != input_dim
        self.linear_projection = nn.Linear(input_dim, self.embed_dim, bias=False) if needs_projection else nn.Identity()

    def init_weights(self) -> None:
        """Initialise the blocks as those of the ViT, and the projection with normal weights."""
        named_apply(init_weights_vit, self)
        if isinstance(self.linear_projection, nn.Linear):
            nn.init.normal_(self.linear_projection.weight, std=self.linear_projection.in_features**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T, D] to [B, T, E] or [B, T, E / 2]."""
        for block in self.blocks:
            tokens = block(tokens)
        return self.linear_projection(self.ln_final(tokens))


class VisionTower(nn.Module):
    """Images to vectors in the space that they share with texts.

    Args:
        backbone: a ViT of this library.
        freeze_backbone: the backbone stays in evaluation mode while the tower trains. Its parameters are for the
            trainer to freeze.
        embed_dim: E, channels of an image's vector.
        num_head_blocks: blocks of the head.
        head_blocks_block_drop_path: share of the samples that training leaves out of each residual branch of the head.
        use_class_token: the class token is part of the vector, its first half if there are two.
        use_patch_tokens: the pooled patch tokens are part of the vector.
        patch_token_layer: the layer that patch tokens and registers come from: 1 for the last, 2 for the one before.
            The class token is always the last layer's.
        patch_tokens_pooler_type: `mean` or `max`.
        use_linear_projection: project the head's tokens even if the width fits.

    Raises:
        ValueError: an impossible combination, or a backbone without attention heads.
    """

    backbone: Any

    def __init__(
        self,
        backbone: Any,
        freeze_backbone: bool,
        embed_dim: int,
        num_head_blocks: int,
        head_blocks_block_drop_path: float,
        use_class_token: bool,
        use_patch_tokens: bool,
        patch_token_layer: int,
        patch_tokens_pooler_type: str,
        use_linear_projection: bool,
    ) -> None:
        super().__init__()
        check_choice("patch_tokens_pooler_type", patch_tokens_pooler_type, POOLERS)
        num_heads = getattr(backbone, "num_heads", None)
        if num_head_blocks and num_heads is None:
            raise ValueError(
                f"the blocks of the vision head need the backbone's number of attention heads, which a "
                f"{type(backbone).__name__} does not have: use a ViT, or 0 head blocks"
            )
        self.backbone = backbone
        self.freeze_backbone = freeze_backbone
        self.use_class_token, self.use_patch_tokens = use_class_token, use_patch_tokens
        self.patch_token_layer = patch_token_layer
        self.patch_tokens_pooler_type = patch_tokens_pooler_type
        self.head = VisionHead(
            backbone.embed_dim,
            embed_dim,
            num_heads or 0,
            num_head_blocks,
            head_blocks_block_drop_path,
            use_class_token,
            use_patch_tokens,
            use_linear_projection,
        )

    def init_weights(self) -> None:
        """Initialise backbone and head."""
        self.backbone.init_weights()
        self.head.init_weights()

    def train(self, mode: bool = True) -> VisionTower:
        """Set the mode of the head, and of a backbone that is not frozen."""
        super().train(mode)
        if self.freeze_backbone:
            self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encode images.

        Args:
            images: [B, 3, H, W], floating point, normalised.

        Returns:
            The vectors [B, E], the head's patch tokens [B, P, E or E / 2] and the backbone's [B, P, D].
        """
        class_token, patch_tokens, backbone_patch_tokens = self.get_class_and_patch_tokens(images)
        parts = [class_token] if self.use_class_token else []
        if self.use_patch_tokens:
            is_mean = self.patch_tokens_pooler_type == "mean"
            parts.append(patch_tokens.mean(dim=1) if is_mean else patch_tokens.amax(dim=1))
        return torch.cat(parts, dim=-1), patch_tokens, backbone_patch_tokens

    def get_class_and_patch_tokens(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the head's class token [B, E or E / 2] and patch tokens [B, P, same], and the backbone's [B, P, D]."""
        class_token, backbone_patch_tokens, registers = self.get_backbone_features(images)
        tokens = torch.cat([class_token.unsqueeze(1), registers, backbone_patch_tokens], dim=1)  # [B, 1 + R + P, D]
        tokens = self.head(tokens)
        return tokens[:, 0], tokens[:, 1 + registers.shape[1] :], backbone_patch_tokens

    def get_backbone_features(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the backbone's class token [B, D], patch tokens [B, P, D] and registers [B, R, D], all normed."""
        layers = self.backbone.get_intermediate_layers(
            images, n=self.patch_token_layer, return_class_token=True, return_extra_tokens=True
        )
        patch_tokens, _, registers = layers[0]
        return layers[-1][1], patch_tokens, registers
