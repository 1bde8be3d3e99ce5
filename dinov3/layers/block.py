"""Pre-norm transformer blocks (ViT, arXiv 2010.11929, equations 2 and 3) for images and for text.

Notable:
- A block takes one token tensor or a list of them (crops of several sizes): norms, projections and FFN run once on the
  tokens of all entries, attention runs on each entry.
- Stochastic depth drops whole samples before the branch instead of zeroing them after it (DINOv2, arXiv 2304.07193,
  "efficient stochastic depth"), so that the dropped ones cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dinov3.layers.attention import CausalSelfAttention, Rope, SelfAttention
from dinov3.layers.ffn_layers import Mlp
from dinov3.layers.layer_scale import LayerScale, add_scaled
from dinov3.layers.rms_norm import RMSNorm
from dinov3.utils import cat_keep_shapes, uncat_with_shapes


class SelfAttentionBlock(nn.Module):
    """x + ls1(attn(norm1(x))), then x + ls2(mlp(norm2(x))).

    Args:
        dim: D, channels of the tokens.
        num_heads: attention heads.
        ffn_ratio: hidden channels of the FFN are int(dim * ffn_ratio).
        qkv_bias: whether the attention's input projection has a bias.
        proj_bias: whether its output projection has a bias.
        ffn_bias: whether the FFN has biases.
        init_values: of LayerScale; None or 0 for no LayerScale.
        drop_path: p, the share of samples that training leaves out of each branch.
        norm_layer: makes a norm; called with (dim, device=device).
        ffn_layer: makes the FFN, such as `Mlp` or `SwiGLUFFN`.
        mask_k_bias: silence the key part of the qkv bias.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        ffn_ratio: float = 4.0,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        ffn_bias: bool = True,
        init_values: float | None = None,
        drop_path: float = 0.0,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        ffn_layer: Callable[..., nn.Module] = Mlp,
        mask_k_bias: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim, device=device)
        self.attn = SelfAttention(dim, num_heads, qkv_bias, proj_bias, mask_k_bias, device)
        self.ls1 = LayerScale(dim, init_values=init_values, device=device) if init_values else nn.Identity()
        self.norm2 = norm_layer(dim, device=device)
        self.mlp = ffn_layer(dim, hidden_features=int(dim * ffn_ratio), bias=ffn_bias, device=device)
        self.ls2 = LayerScale(dim, init_values=init_values, device=device) if init_values else nn.Identity()
        self.sample_drop_ratio = drop_path

    def forward(
        self, x_or_list: Tensor | list[Tensor], rope_or_list: Rope | list[Rope | None] | None = None
    ) -> Tensor | list[Tensor]:
        """Transform one token tensor, or several together.

        Args:
            x_or_list: [B, T, D], or a list of such tensors, each with its own B and T.
            rope_or_list: (sin, cos), see `SelfAttention.forward`, or None; for a list, a list of these.

        Returns:
            A tensor or a list, with the shapes of the input.
        """
        if isinstance(x_or_list, Tensor):
            assert not isinstance(rope_or_list, list), "one tensor takes one rope"
            return self._forward_list([x_or_list], [rope_or_list])[0]
        assert isinstance(x_or_list, list), f"expected a tensor or a list of tensors, got {type(x_or_list).__name__}"
        if rope_or_list is None:
            rope_or_list = [None] * len(x_or_list)
        assert isinstance(rope_or_list, list), "a list of tensors takes a list of ropes"
        assert len(x_or_list) == len(rope_or_list), f"{len(x_or_list)} tensors, but {len(rope_or_list)} ropes"
        return self._forward_list(x_or_list, rope_or_list)

    def _forward_list(self, x_list: list[Tensor], ropes: list[Rope | None]) -> list[Tensor]:
        for branch, scale in ((self._attention_branch, self.ls1), (self._ffn_branch, self.ls2)):
            if self.training and self.sample_drop_ratio > 0:
                x_list = self._add_to_subsets(x_list, ropes, branch, scale)
            else:
                x_list = [add_scaled(x, out, scale) for x, out in zip(x_list, branch(x_list, ropes), strict=True)]
        return x_list

    def _add_to_subsets(
        self,
        x_list: list[Tensor],
        ropes: list[Rope | None],
        branch: Callable[[list[Tensor], list[Rope | None]], list[Tensor]],
        scale: nn.Module,
    ) -> list[Tensor]:
        sizes = [max(int(len(x) * (1 - self.sample_drop_ratio)), 1) for x in x_list]
        subsets = [torch.randperm(len(x), device=x.device)[:n] for x, n in zip(x_list, sizes, strict=True)]
        x_of_subsets = [x[subset] for x, subset in zip(x_list, subsets, strict=True)]
        ropes_of_subsets = [_select_rope(rope, subset) for rope, subset in zip(ropes, subsets, strict=True)]
        outs = branch(x_of_subsets, ropes_of_subsets)
        return [
            # Scaled, so that the expected sum over the samples is the same as without dropping.
            torch.index_add(x, 0, subset, scale(out).to(x.dtype), alpha=len(x) / n)
            for x, subset, out, n in zip(x_list, subsets, outs, sizes, strict=True)
        ]

    def _attention_branch(self, x_list: list[Tensor], ropes: list[Rope | None]) -> list[Tensor]:
        if len(x_list) == 1:
            return [self.attn(self.norm1(x_list[0]), rope=ropes[0])]
        flat, shapes, num_tokens = cat_keep_shapes(x_list)
        out = self.attn.forward_flat(self.norm1(flat), shapes, num_tokens, ropes)
        return uncat_with_shapes(out, shapes, num_tokens)

    def _ffn_branch(self, x_list: list[Tensor], ropes: list[Rope | None]) -> list[Tensor]:
        if len(x_list) == 1:
            return [self.mlp(self.norm2(x_list[0]))]
        flat, shapes, num_tokens = cat_keep_shapes(x_list)
        return uncat_with_shapes(self.mlp(self.norm2(flat)), shapes, num_tokens)


class CausalSelfAttentionBlock(nn.Module):
    """x + ls1(attention(attention_norm(x))), then x + ls2(feed_forward(ffn_norm(x))), for text.

    Args:
        dim: D, channels of the tokens.
        num_heads: attention heads.
        ffn_ratio: hidden channels of the FFN are int(dim * ffn_ratio).
        ls_init_value: of LayerScale; None or 0 for no LayerScale.
        is_causal: tokens do not see those after them.
        act_layer: activation of the FFN.
        norm_layer: makes a norm from `dim`.
        dropout_prob: of the attention weights and of the outputs.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        ffn_ratio: float = 4.0,
        ls_init_value: float | None = None,
        is_causal: bool = True,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        dropout_prob: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.is_causal = is_causal
        self.ls1 = LayerScale(dim, init_values=ls_init_value) if ls_init_value else nn.Identity()
        self.attention_norm = norm_layer(dim)
        self.attention = CausalSelfAttention(dim, num_heads, attn_drop=dropout_prob, proj_drop=dropout_prob)
        self.ffn_norm = norm_layer(dim)
        self.feed_forward = Mlp(
            in_features=dim, hidden_features=int(dim * ffn_ratio), act_layer=act_layer, drop=dropout_prob
        )
        self.ls2 = LayerScale(dim, init_values=ls_init_value) if ls_init_value else nn.Identity()

    def init_weights(
        self,
        init_attn_std: float | None = None,
        init_proj_std: float | None = None,
        init_fc_std: float | None = None,
        factor: float = 1.0,
    ) -> None:
        """Draw normal weights, set zero biases, and reset norms and layer scales.

        Args:
            init_attn_std: of the attention's input projection. Default: dim ** -0.5.
            init_proj_std: of the outputs of attention and FFN. Default: `init_attn_std` times `factor`.
            init_fc_std: of the FFN's first linear. Default: (2 * dim) ** -0.5.
            factor: see `init_proj_std`.
        """
        attn_std = self.dim**-0.5 if init_attn_std is None else init_attn_std
        proj_std = attn_std * factor if init_proj_std is None else init_proj_std
        fc_std = (2 * self.dim) ** -0.5 if init_fc_std is None else init_fc_std
        self.attention.init_weights(attn_std, proj_std)
        for module in (self.attention_norm, self.ffn_norm, self.ls1, self.ls2):
            if isinstance(module, nn.LayerNorm | RMSNorm | LayerScale):
                module.reset_parameters()
        for linear, std in ((self.feed_forward.fc1, fc_std), (self.feed_forward.fc2, proj_std)):
            nn.init.normal_(linear.weight, std=std)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        x = add_scaled(x, self.attention(self.attention_norm(x), self.is_causal), self.ls1)
        return add_scaled(x, self.feed_forward(self.ffn_norm(x)), self.ls2)


def _select_rope(rope: Rope | None, samples: Tensor) -> Rope | None:
    # Only a 4-D rope has a batch dimension; the others are shared by all samples.
    if rope is None or rope[0].ndim < 4:
        return rope
    sin, cos = rope
    return sin[samples], cos[samples]
