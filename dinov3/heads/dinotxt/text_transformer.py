"""The text encoder of dino.txt: a transformer on the tokens of CLIP (arXiv 2103.00020, section 2.4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dinov3.layers import CausalSelfAttentionBlock

TOKEN_STD = 0.02
POSITION_STD = 0.01


class TextTransformer(nn.Module):
    """Token ids to the states of all positions.

    Padding is not masked: its id, 0, is an ordinary token. With causal attention, tokens before it do not see it.

    Args:
        context_length: largest number of tokens N.
        vocab_size: ids are below it.
        dim: D, channels of the tokens.
        num_heads: attention heads of each block.
        num_layers: number of blocks.
        ffn_ratio: hidden channels of the FFNs are int(dim * ffn_ratio).
        is_causal: tokens do not see those after them.
        ls_init_value: of LayerScale; None or 0 for no LayerScale.
        act_layer: activation of the FFNs.
        norm_layer: makes a norm from `dim`.
        dropout_prob: of the embeddings, the attention weights and the outputs of each branch.
    """

    blocks: Any
    ln_final: Any

    def __init__(
        self,
        context_length: int,
        vocab_size: int,
        dim: int,
        num_heads: int,
        num_layers: int,
        ffn_ratio: float,
        is_causal: bool,
        ls_init_value: float | None = None,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        dropout_prob: float = 0.0,
    ) -> None:
        super().__init__()
        self.context_length, self.vocab_size, self.embed_dim = context_length, vocab_size, dim
        self.num_heads, self.num_layers, self.is_causal = num_heads, num_layers, is_causal
        self.token_embedding = nn.Embedding(vocab_size, dim)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, dim))
        self.dropout = nn.Dropout(dropout_prob)
        self.blocks = nn.ModuleList(
            CausalSelfAttentionBlock(
                dim, num_heads, ffn_ratio, ls_init_value, is_causal, act_layer, norm_layer, dropout_prob
            )
            for _ in range(num_layers)
        )
        self.ln_final = norm_layer(dim)
        nn.init.normal_(self.positional_embedding, std=POSITION_STD)

    def init_weights(self) -> None:
        """Draw normal weights; those of the residual branches' outputs shrink with the depth."""
        nn.init.normal_(self.token_embedding.weight, std=TOKEN_STD)
        nn.init.normal_(self.positional_embedding, std=POSITION_STD)
        attention_std = self.embed_dim**-0.5
        for block in self.blocks:
            block.init_weights(attention_std, attention_std * (2 * self.num_layers) ** -0.5)
        self.ln_final.reset_parameters()

    def forward(self, text: Tensor) -> Tensor:
        """Encode token ids.

        Args:
            text: [T, N], int64, N at most `context_length`.

        Returns:
            [T, N, D], normed.

        Raises:
            ValueError: too many tokens, or (where looking costs nothing, on the CPU) an id outside the vocabulary.
        """
        if text.ndim != 2 or text.shape[1] > self.context_length:
            raise ValueError(
                f"expected token ids [texts, at most {self.context_length} positions], got {list(text.shape)}: "
                f"tokenize with context_length={self.context_length}"
            )
        if text.device.type == "cpu" and text.numel() and not 0 <= text.min() <= text.max() < self.vocab_size:
            raise ValueError(
                f"token ids go from {text.min()} to {text.max()}, but the vocabulary has {self.vocab_size} entries: "
                "text and model belong to different tokenizers"
            )
        x = self.dropout(self.token_embedding(text) + self.positional_embedding[: text.shape[1]])  # [T, N, D]
        for block in self.blocks:
            x = block(x)
        return self.ln_final(x)
