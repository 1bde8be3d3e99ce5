"""The text side of dino.txt: the text transformer, and a head on one of its positions (arXiv 2412.16334)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dinov3.heads.dinotxt.text_transformer import TextTransformer
from dinov3.layers import CausalSelfAttentionBlock
from dinov3.utils.messages import check_choice

POOLERS = ("first", "last", "argmax")


class TextHead(nn.Module):
    """Blocks, a norm and a projection, for each token.

    Without blocks there is no norm either; without `use_linear_projection`, a projection only if the widths differ.

    Args:
        input_dim: D, channels of the text transformer.
        embed_dim: E, channels of a text's vector.
        num_heads: attention heads of the blocks.
        num_blocks: number of blocks.
        block_drop_prob: dropout in the blocks.
        is_causal: tokens do not see those after them.
        use_linear_projection: project even if the width fits.
    """

    blocks: Any

    def __init__(
        self,
        input_dim: int,
        embed_dim: int,
        num_heads: int,
        num_blocks: int,
        block_drop_prob: float,
        is_causal: bool,
        use_linear_projection: bool,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            CausalSelfAttentionBlock(input_dim, num_heads, is_causal=is_causal, dropout_prob=block_drop_prob)
            for _ in range(num_blocks)
        )
        self.ln_final = nn.LayerNorm(input_dim) if num_blocks else nn.Identity()
        needs_projection = use_linear_projection or embed_dim != input_dim
        self.linear_projection = nn.Linear(input_dim, embed_dim, bias=False) if needs_projection else nn.Identity()

    def init_weights(self) -> None:
        """Draw normal weights."""
        for block in self.blocks:
            block.init_weights()
        if isinstance(self.ln_final, nn.LayerNorm):
            self.ln_final.reset_parameters()
        if isinstance(self.linear_projection, nn.Linear):
            nn.init.normal_(self.linear_projection.weight, std=self.linear_projection.in_features**-0.5)

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Transform the tokens of texts.

        Args:
            tokens: [T, N, D].
            positions: [T], int64, the only position of each text that is wanted. Default: all of them.

        Returns:
            [T, N, E], or [T, E] of the wanted positions.
        """
        for block in self.blocks:
            tokens = block(tokens)
        if positions is not None:  # before norm and projection, which then run on one position instead of N
            tokens = tokens[torch.arange(len(tokens), device=tokens.device), positions]
        return self.linear_projection(self.ln_final(tokens))


class TextTower(nn.Module):
    """Texts to vectors in the space that they share with images.

    Attributes:
        cuts_text: leave out the positions behind the last pooled one of the batch, where attention is causal in all
            blocks, so that they cannot change the result. It makes shapes depend on data: switch it off to export.

    Args:
        backbone: a `TextTransformer`.
        freeze_backbone: the backbone stays in evaluation mode while the tower trains. Its parameters are for the
            trainer to freeze.
        embed_dim: E, channels of a text's vector.
        num_head_blocks: blocks of the head.
        head_blocks_is_causal: tokens do not see those after them in the head's blocks.
        head_blocks_block_drop_prob: dropout in the head's blocks.
        tokens_pooler_type: the position whose state becomes the vector: `first`, `last`, or `argmax`, the first one
            with the largest id of the text, which is the end token.
        use_linear_projection: project even if the width fits.

    Raises:
        ValueError: an unknown pooler.
    """

    def __init__(
        self,
        backbone: TextTransformer,
        freeze_backbone: bool,
        embed_dim: int,
        num_head_blocks: int,
        head_blocks_is_causal: bool,
        head_blocks_block_drop_prob: float,
        tokens_pooler_type: str,
        use_linear_projection: bool,
    ) -> None:
        super().__init__()
        check_choice("tokens_pooler_type", tokens_pooler_type, POOLERS)
        self.backbone = backbone
        self.freeze_backbone = freeze_backbone
        self.tokens_pooler_type = tokens_pooler_type
        self.cuts_text = True
        self._is_causal = backbone.is_causal and (head_blocks_is_causal or num_head_blocks == 0)
        self.head = TextHead(
            backbone.embed_dim,
            embed_dim,
            backbone.num_heads,
            num_head_blocks,
            head_blocks_block_drop_prob,
            head_blocks_is_causal,
            use_linear_projection,
        )

    def init_weights(self) -> None:
        """Initialise backbone and head."""
        self.backbone.init_weights()
        self.head.init_weights()

    def train(self, mode: bool = True) -> TextTower:
        """Set the mode of the head, and of a backbone that is not frozen."""
        super().train(mode)
        if self.freeze_backbone:
            self.backbone.eval()
        return self

    def forward(self, text: Tensor) -> Tensor:
        """Encode texts.

        Args:
            text: token ids [T, N], int64.

        Returns:
            The vectors [T, E].

        Raises:
            ValueError: too many tokens, or ids outside the vocabulary.
        """
        if self.tokens_pooler_type == "argmax":
            positions = text.argmax(dim=-1) if text.numel() else text.new_zeros(len(text))  # [T]
        else:
            last = text.shape[1] - 1
            positions = torch.full_like(text[:, 0], 0 if self.tokens_pooler_type == "first" else last)
        if self.cuts_text and self._is_causal and len(text):
            text = text[:, : int(positions.max()) + 1]
        return self.head(self.backbone(text), positions)
