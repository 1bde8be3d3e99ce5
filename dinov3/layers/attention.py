"""Multi-head self-attention with rotary positions, and the causal one of text models (arXiv 1706.03762).

Notable:
- The sequence is [prefix tokens, patches]; only the patches are rotated, in the precision of the sines, which may be
  lower or higher than that of queries and keys.
- A bias of the keys would not cancel in the softmax once keys are rotated; `LinearKMaskedBias` removes it.
- Token tensors of different lengths, in a list, share the projections; each attends only to itself.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.layers.packed_attention import attend_packed
from dinov3.utils import cat_keep_shapes, uncat_with_shapes

Rope = tuple[Tensor, Tensor]


def rope_rotate_half(x: Tensor) -> Tensor:
    """Turn x [..., d], whose channels have the halves (a, b), into (-b, a)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)


def rope_apply(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Rotate the pairs (channel e, channel e + d / 2) of x [..., d]; `sin` and `cos` broadcast to it."""
    # Equals x * cos + rope_rotate_half(x) * sin, bit for bit, but adding in place moves half as much memory.
    half = x.shape[-1] // 2
    rotated = x * cos
    rotated[..., :half] -= x[..., half:] * sin[..., :half]
    rotated[..., half:] += x[..., :half] * sin[..., half:]
    return rotated


def rope_with_prefix(rope: Rope, n_prefix: int) -> Rope:
    """Extend the rotations [..., N, d] by those of `n_prefix` tokens before them, which are rotated by 0.

    This is cheaper than taking queries and keys apart and joining them again.
    """
    sin, cos = rope
    return F.pad(sin, (0, 0, n_prefix, 0)), F.pad(cos, (0, 0, n_prefix, 0), value=1.0)


class LinearKMaskedBias(nn.Linear):
    """A linear layer to queries, keys and values, with the arguments of `nn.Linear`, and a mask for its bias.

    The bias is multiplied by the buffer `bias_mask`. It is NaN until `init_weights_vit` sets it (1 for queries and
    values, 0 for keys) or a state dict brings it; a loaded mask is used as it is. A state dict after which the mask
    would be NaN is refused, also with `strict=False`: all outputs would be NaN.

    Raises:
        ValueError: `out_features` is not a multiple of 3.
    """

    bias_mask: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.out_features % 3 != 0:
            raise ValueError(f"out_features must be a multiple of 3 (queries, keys, values), got {self.out_features}")
        if self.bias is not None:
            mask = torch.empty(self.bias.shape, device=self.bias.device, dtype=self.bias.dtype)
            self.register_buffer("bias_mask", mask.fill_(torch.nan))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        error_msgs: list[str] = args[-1]
        name = prefix + "bias_mask"
        if self.bias is None or self.bias_mask.is_meta or not self.bias_mask.isnan().any():
            return
        if name in state_dict:
            error_msgs.append(f"{name} is NaN: the state dict is of a model that was never initialised")
        elif f"{prefix}bias" in state_dict:
            error_msgs.append(
                f"{name} is missing, and this model has none yet: call its init_weights() before, or build the model "
                "with mask_k_bias=False if the state dict is of such a model"
            )

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        bias = None if self.bias is None else self.bias * self.bias_mask.to(self.bias.dtype)
        return F.linear(x, self.weight, bias)


class SelfAttention(nn.Module):
    """Multi-head self-attention.

    Args:
        dim: D, input and output channels.
        num_heads: number of heads; d = D / num_heads.
        qkv_bias: whether the input projection has a bias.
        proj_bias: whether the output projection has a bias.
        mask_k_bias: silence the key part of the bias.

    Raises:
        ValueError: `dim` is not a multiple of `num_heads`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        mask_k_bias: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        _check_heads(dim, num_heads)
        self.num_heads = num_heads
        linear_class = LinearKMaskedBias if mask_k_bias else nn.Linear
        self.qkv = linear_class(dim, 3 * dim, bias=qkv_bias, device=device)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, device=device)
        #: See `dinov3.layers.packed_attention.set_attention_backend`.
        self.attention_backend = "sdpa"

    def forward(self, x: Tensor, rope: Rope | None = None) -> Tensor:
        """Attend within each sequence.

        Args:
            x: [B, T, D].
            rope: (sin, cos), each [N, d], [heads, N, d] or [B, 1 or heads, N, d], for the last N <= T tokens.

        Returns:
            [B, T, D].
        """
        return self.proj(self._attend(self.qkv(x), rope))

    def forward_list(self, x_list: list[Tensor], rope_list: list[Rope | None] | None = None) -> list[Tensor]:
        """Apply `forward` to several tensors [B_i, T_i, D], with the projections computed on all of them at once.

        Args:
            x_list: the tensors.
            rope_list: a rope, or None, for each tensor. Default: no ropes.
        """
        flat, shapes, num_tokens = cat_keep_shapes(x_list)
        rope_list = [None] * len(x_list) if rope_list is None else rope_list
        return uncat_with_shapes(self.forward_flat(flat, shapes, num_tokens, rope_list), shapes, num_tokens)

    def forward_flat(
        self, flat: Tensor, shapes: list[torch.Size], num_tokens: list[int], rope_list: list[Rope | None]
    ) -> Tensor:
        """Do what `forward_list` does with the result of `cat_keep_shapes`, [sum of B_i * T_i, D], in the same form."""
        assert len(shapes) == len(rope_list), f"{len(shapes)} tensors, but {len(rope_list)} ropes"
        qkv_list = uncat_with_shapes(self.qkv(flat), shapes, num_tokens)
        if self.attention_backend == "xformers":
            heads = [self._rotate_heads(qkv, rope) for qkv, rope in zip(qkv_list, rope_list, strict=True)]
            return self.proj(attend_packed(heads))
        attended = [self._attend(qkv, rope) for qkv, rope in zip(qkv_list, rope_list, strict=True)]
        return self.proj(cat_keep_shapes(attended)[0])

    def apply_rope(self, q: Tensor, k: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Rotate the last N of the T tokens of q and k.

        All tokens, including the T - N of the prefix, are converted to the precision of the sines and back.

        Args:
            q: [B, heads, T, d].
            k: [B, heads, T, d].
            rope: (sin, cos), each [N, d], [heads, N, d] or [B, 1 or heads, N, d].

        Returns:
            q and k, rotated, in their own dtypes.
        """
        sin, cos = rope
        n_prefix = q.shape[-2] - sin.shape[-2]
        assert n_prefix >= 0, f"{sin.shape[-2]} rotations for {q.shape[-2]} tokens"
        if n_prefix > 0:
            sin, cos = rope_with_prefix(rope, n_prefix)
        rotated_q = rope_apply(q.to(sin.dtype), sin, cos)
        rotated_k = rope_apply(k.to(sin.dtype), sin, cos)
        return rotated_q.to(q.dtype), rotated_k.to(k.dtype)

    def _attend(self, qkv: Tensor, rope: Rope | None) -> Tensor:
        x = F.scaled_dot_product_attention(*self._rotate_heads(qkv, rope))
        return x.transpose(1, 2).flatten(2)  # [B, T, D]

    def _rotate_heads(self, qkv: Tensor, rope: Rope | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = _split_heads(qkv, self.num_heads)  # each [B, heads, T, d]
        if rope is not None:
            q, k = self.apply_rope(q, k, rope)
        return q, k, v


class CausalSelfAttention(nn.Module):
    """Multi-head self-attention of text models, without positions of its own.

    Args:
        dim: D, input and output channels.
        num_heads: number of heads.
        qkv_bias: whether the input projection has a bias.
        proj_bias: whether the output projection has a bias.
        attn_drop: dropout of the attention weights.
        proj_drop: dropout of the output.

    Raises:
        ValueError: `dim` is not a multiple of `num_heads`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        _check_heads(dim, num_heads)
        self.dim = dim
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = attn_drop
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)

    def init_weights(
        self, init_attn_std: float | None = None, init_proj_std: float | None = None, factor: float = 1.0
    ) -> None:
        """Draw normal weights and set zero biases.

        Args:
            init_attn_std: of the input projection. Default: dim ** -0.5.
            init_proj_std: of the output projection. Default: that of the input times `factor`.
            factor: see `init_proj_std`.
        """
        attn_std = self.dim**-0.5 if init_attn_std is None else init_attn_std
        proj_std = attn_std * factor if init_proj_std is None else init_proj_std
        for linear, std in ((self.qkv, attn_std), (self.proj, proj_std)):
            nn.init.normal_(linear.weight, std=std)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, is_causal: bool = True) -> Tensor:
        """Attend within each sequence [B, T, D]; if `is_causal`, each token only to itself and those before it."""
        q, k, v = _split_heads(self.qkv(x), self.num_heads)
        dropout = self.attn_drop if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=is_causal)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


def _split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    parts = qkv.unflatten(-1, (3, num_heads, -1)).unbind(2)  # three of [B, T, heads, d]
    return tuple(part.transpose(1, 2) for part in parts)


def _check_heads(dim: int, num_heads: int) -> None:
    if dim % num_heads != 0:
        raise ValueError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}")
