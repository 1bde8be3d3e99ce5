"""The vision transformer of DINOv3 (arXiv 2508.10104, section 3.2; ViT: 2010.11929).

Notable:
- The sequence is [class token, storage tokens (registers, arXiv 2309.16588), patches]. Positions enter only through
  the rotation of queries and keys in each block, so images may have any size.
- Several crops of different sizes go through each block together, each with its own grid and positions.
- In training with RoPE augmentation every block and crop draws its own; otherwise the rotation is computed once.
- `local_cls_norm` is only used for the second entry of a list (the local crops), and only in training.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dinov3.layers import (
    LayerScale,
    LinearKMaskedBias,
    Mlp,
    PatchEmbed,
    RMSNorm,
    RopePositionEmbedding,
    SelfAttentionBlock,
    SwiGLUFFN,
)
from dinov3.layers.attention import Rope, rope_with_prefix
from dinov3.models.backbone import Backbone
from dinov3.utils import named_apply, refuse_unknown_arguments
from dinov3.utils.messages import check_choice

Grid = tuple[int, int]
Features = dict[str, Any]

INIT_STD = 0.02

ffn_layer_dict: dict[str, Callable[..., nn.Module]] = {
    "mlp": Mlp,
    "swiglu": SwiGLUFFN,
    "swiglu32": functools.partial(SwiGLUFFN, align_to=32),
    "swiglu64": functools.partial(SwiGLUFFN, align_to=64),
    "swiglu128": functools.partial(SwiGLUFFN, align_to=128),
}
norm_layer_dict: dict[str, Callable[..., nn.Module]] = {
    "layernorm": functools.partial(nn.LayerNorm, eps=1e-6),
    "layernormbf16": functools.partial(nn.LayerNorm, eps=1e-5),
    "rmsnorm": RMSNorm,
}
dtype_dict: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def init_weights_vit(module: nn.Module, name: str = "") -> None:
    """Initialise one module by its kind; made for `named_apply`.

    Linears get truncated normal weights (0.02) and zero biases, the keys' part of a masked bias is switched off, and
    norms, layer scales and patch embeddings reset themselves. Other kinds are not touched.

    Args:
        module: initialised in place; its children are not.
        name: its dotted name, not used.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=INIT_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
            if isinstance(module, LinearKMaskedBias):
                queries, keys, values = module.bias_mask.chunk(3)
                queries.fill_(1)
                keys.fill_(0)
                values.fill_(1)
    elif isinstance(module, nn.LayerNorm | LayerScale | PatchEmbed | RMSNorm):
        module.reset_parameters()


class DinoVisionTransformer(Backbone):
    """A ViT with rotary positions, storage tokens and the outputs of the DINO family.

    B images, h x w patches, N = h * w, R storage tokens, T = 1 + R + N tokens of D channels.

    Args:
        img_size: side of the usual image; informative, any size can be given.
        patch_size: side of a patch, in pixels.
        in_chans: C, channels of the image.
        pos_embed_rope_base: see `RopePositionEmbedding`; None if both periods are given.
        pos_embed_rope_min_period: shortest period.
        pos_embed_rope_max_period: longest period.
        pos_embed_rope_normalize_coords: `separate`, `max` or `min`.
        pos_embed_rope_shift_coords: augmentation in training.
        pos_embed_rope_jitter_coords: augmentation in training.
        pos_embed_rope_rescale_coords: augmentation in training.
        pos_embed_rope_dtype: `fp32`, `fp16` or `bf16`; the published models use `fp32`.
        embed_dim: D.
        depth: number of blocks.
        num_heads: attention heads.
        ffn_ratio: hidden channels of an MLP over D (a SwiGLU keeps two thirds of them).
        qkv_bias: bias of queries, keys and values.
        drop_path_rate: share of the samples that each branch of each block leaves out in training.
        layerscale_init: what layer scales start from; None or 0: no layer scales.
        norm_layer: `layernorm` (eps 1e-6), `layernormbf16` (eps 1e-5) or `rmsnorm`.
        ffn_layer: `mlp`, `swiglu`, `swiglu32`, `swiglu64` or `swiglu128`.
        ffn_bias: biases of the FFNs.
        proj_bias: bias of the attention's output.
        n_storage_tokens: R.
        mask_k_bias: silence the keys' part of the bias.
        untie_cls_and_patch_norms: class and storage tokens have a final norm of their own.
        untie_global_and_local_cls_norm: those of local crops have another one, in training.
        device: of all parameters and buffers.
        **unknown: refused.

    Raises:
        TypeError: an unknown argument.
        ValueError: an argument has no such choice, or sizes do not fit.
    """

    def __init__(
        self,
        *,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        pos_embed_rope_base: float | None = 100.0,
        pos_embed_rope_min_period: float | None = None,
        pos_embed_rope_max_period: float | None = None,
        pos_embed_rope_normalize_coords: str = "separate",
        pos_embed_rope_shift_coords: float | None = None,
        pos_embed_rope_jitter_coords: float | None = None,
        pos_embed_rope_rescale_coords: float | None = None,
        pos_embed_rope_dtype: str = "bf16",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        ffn_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        layerscale_init: float | None = None,
        norm_layer: str = "layernorm",
        ffn_layer: str = "mlp",
        ffn_bias: bool = True,
        proj_bias: bool = True,
        n_storage_tokens: int = 0,
        mask_k_bias: bool = False,
        untie_cls_and_patch_norms: bool = False,
        untie_global_and_local_cls_norm: bool = False,
        device: torch.device | str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        refuse_unknown_arguments(type(self), unknown)
        self.num_features = self.embed_dim = embed_dim
        self.n_blocks, self.num_heads, self.n_storage_tokens = depth, num_heads, n_storage_tokens
        self.patch_size, self.in_chans = patch_size, in_chans
        self.chunked_blocks = False
        self.untie_cls_and_patch_norms = untie_cls_and_patch_norms
        self.untie_global_and_local_cls_norm = untie_global_and_local_cls_norm
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim, flatten_embedding=False, device=device)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, device=device))
        if n_storage_tokens > 0:
            self.storage_tokens = nn.Parameter(torch.empty(1, n_storage_tokens, embed_dim, device=device))
        # The embedding has the same arguments without the prefix.
        rope = {k.removeprefix("pos_embed_rope_"): v for k, v in locals().items() if k.startswith("pos_embed_rope_")}
        rope["dtype"] = dtype_dict[check_choice("pos_embed_rope_dtype", pos_embed_rope_dtype, dtype_dict)]
        self.rope_embed = RopePositionEmbedding(embed_dim, num_heads=num_heads, device=device, **rope)
        make_norm = norm_layer_dict[check_choice("norm_layer", norm_layer, norm_layer_dict)]
        make_ffn = ffn_layer_dict[check_choice("ffn_layer", ffn_layer, ffn_layer_dict)]
        layers = {"norm_layer": make_norm, "ffn_layer": make_ffn, "ffn_ratio": ffn_ratio}
        residual = {"init_values": layerscale_init, "drop_path": drop_path_rate}
        biases = {"qkv_bias": qkv_bias, "proj_bias": proj_bias, "ffn_bias": ffn_bias, "mask_k_bias": mask_k_bias}
        block_options: dict[str, Any] = {**layers, **residual, **biases, "device": device}
        self.blocks = nn.ModuleList(SelfAttentionBlock(embed_dim, num_heads, **block_options) for _ in range(depth))
        self.norm = make_norm(embed_dim, device=device)
        self.cls_norm = make_norm(embed_dim, device=device) if untie_cls_and_patch_norms else None
        self.local_cls_norm = make_norm(embed_dim, device=device) if untie_global_and_local_cls_norm else None
        self.head = nn.Identity()
        self.mask_token = nn.Parameter(torch.empty(1, embed_dim, device=device))

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise everything: tokens normal (0.02), the mask token zero, the rest by `init_weights_vit`."""
        self.rope_embed._init_weights()
        nn.init.normal_(self.cls_token, std=INIT_STD)
        if self.n_storage_tokens > 0:
            nn.init.normal_(self.storage_tokens, std=INIT_STD)
        nn.init.zeros_(self.mask_token)
        named_apply(init_weights_vit, self)

    def forward_features(
        self, x: Tensor | list[Tensor], masks: Tensor | list[Tensor | None] | None = None
    ) -> Features | list[Features]:
        """Compute the normed tokens after the last block.

        Args:
            x: images [B, C, H, W], floating point; rows and columns that do not fill a patch are ignored. Or a list of
                such, of any sizes.
            masks: [B, N], bool; True replaces the patch by the mask token. For a list, a list of the same length.

        Returns:
            A dict (for a list: a list of dicts) of `x_norm_clstoken` [B, D], `x_storage_tokens` [B, R, D],
            `x_norm_patchtokens` [B, N, D], `x_prenorm` [B, T, D] (all tokens before the norm) and `masks`.

        Raises:
            ValueError: images or masks are not as described.
        """
        if isinstance(x, Tensor):
            assert not isinstance(masks, list), "one tensor takes one mask"
            return self.forward_features_list([x], [masks])[0]
        assert not isinstance(masks, Tensor), "a list of tensors takes a list of masks"
        return self.forward_features_list(x, masks)

    def forward_features_list(
        self, x_list: list[Tensor], masks_list: list[Tensor | None] | None = None
    ) -> list[Features]:
        """Compute `forward_features` of a list, whose entries go through each block together."""
        pairs = self._pair_masks(x_list, masks_list)
        prepared = [self.prepare_tokens_with_masks(x, mask) for x, mask in pairs]
        tokens = [entry[0] for entry in prepared]
        ropes = self._ropes([grid for _, grid in prepared])
        for block in self.blocks:
            tokens = block(tokens, next(ropes))
        outputs: list[Features] = []
        for index, (x, (_, mask)) in enumerate(zip(tokens, pairs, strict=True)):
            is_local = index == 1 and self.training and self.local_cls_norm is not None
            prefix, patches = self._norm(x, self.local_cls_norm if is_local else self.cls_norm)
            outputs.append(
                {
                    "x_norm_clstoken": prefix.select(1, 0),
                    "x_storage_tokens": prefix.narrow(1, 1, self.n_storage_tokens),
                    "x_norm_patchtokens": patches,
                    "x_prenorm": x,
                    "masks": mask,
                }
            )
        return outputs

    def get_intermediate_layers(
        self,
        x: Tensor,
        *,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        return_extra_tokens: bool = False,
        norm: bool = True,
    ) -> tuple[Tensor | tuple[Tensor, ...], ...]:
        """Compute the tokens after chosen blocks, in the order of the blocks.

        Args:
            x: images [B, C, H, W], floating point.
            n: the last n blocks, or the indices (from 0, in any order) of the blocks.
            reshape: return maps [B, D, h, w] instead of sequences [B, N, D].
            return_class_token: also return the class token [B, D].
            return_extra_tokens: also return the storage tokens [B, R, D].
            norm: apply the final norm (class and storage tokens have their own if it is untied).

        Returns:
            For each block the patches, or a tuple (patches, class token if asked for, storage tokens if asked for).

        Raises:
            ValueError: the images or the blocks are not as described.
        """
        wanted = self._layer_indices(n)
        tokens, (h, w) = self.prepare_tokens_with_masks(x)
        outputs: list[Tensor | tuple[Tensor, ...]] = []
        ropes = self._ropes([(h, w)])
        for index in range(wanted[-1] + 1):
            tokens = self.blocks[index](tokens, next(ropes)[0])
            if index not in wanted:
                continue
            prefix, patches = self._norm(tokens, self.cls_norm) if norm else self._split(tokens)
            if reshape:
                patches = patches.transpose(1, 2).unflatten(2, (h, w)).contiguous()  # [B, D, h, w]
            extra: tuple[Tensor, ...] = ()
            if return_class_token:
                extra += (prefix.select(1, 0),)
            if return_extra_tokens:
                extra += (prefix.narrow(1, 1, self.n_storage_tokens),)
            outputs.append((patches, *extra) if extra else patches)
        return tuple(outputs)

    def prepare_tokens_with_masks(self, x: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Grid]:
        """Turn images into the tokens that enter the first block.

        Args:
            x: [B, C, H, W], floating point.
            masks: [B, N], bool, or None.

        Returns:
            The tokens [B, T, D], and the grid (h, w).

        Raises:
            ValueError: images or masks are not as described.
        """
        self._check_images(x, self.patch_size)
        patches = self.patch_embed(x)  # [B, h, w, D]
        b, h, w, _ = patches.shape
        patches = patches.flatten(1, 2)  # [B, N, D]
        cls_token: Tensor = self.cls_token
        if masks is None:
            # Adds nothing, even if the mask token is NaN, but gives it a gradient (of zeros), which sharding needs.
            cls_token = cls_token + self.mask_token[:, :0].sum()
        else:
            if masks.dtype != torch.bool or masks.shape != (b, h * w):
                raise ValueError(
                    f"expected bool masks of shape {[b, h * w]} (images, patches), "
                    f"got {masks.dtype} of {list(masks.shape)}"
                )
            patches = torch.where(masks[..., None], self.mask_token.to(patches.dtype), patches)
        prefix = [cls_token.expand(b, -1, -1)]
        if self.n_storage_tokens > 0:
            prefix.append(self.storage_tokens.expand(b, -1, -1))
        return torch.cat([*prefix, patches], dim=1), (h, w)  # [B, T, D]

    def _ropes(self, grids: list[Grid]) -> Iterator[list[Rope]]:
        """Yield the rotations of all entries for one block after the other, without end."""
        if self.rope_embed.is_random:  # Every block draws its own.
            coordinates = [self.rope_embed.coordinates(h, w) for h, w in grids]
            while True:
                yield [self.rope_embed.rotations(c) for c in coordinates]
        n_prefix = 1 + self.n_storage_tokens
        ropes: list[Rope] = []
        for index, (h, w) in enumerate(grids):
            # Not a dictionary: the symbolic sizes of an export cannot be hashed.
            same = [ropes[i] for i in range(index) if grids[i] == (h, w)]
            ropes.append(same[0] if same else rope_with_prefix(self.rope_embed(H=h, W=w), n_prefix))
        while True:
            yield ropes

    def _norm(self, x: Tensor, prefix_norm: nn.Module | None) -> tuple[Tensor, Tensor]:
        """Return the normed (class and storage tokens, patches)."""
        if prefix_norm is None:
            return self._split(self.norm(x))
        prefix, patches = self._split(x)
        return prefix_norm(prefix), self.norm(patches)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # PyTorch 2.7 exports x[:, :n] only if the batch has an upper bound.
        prefix, patches = x.tensor_split((1 + self.n_storage_tokens,), dim=1)
        return prefix, patches


def vit_tiny(patch_size: int = 16, **kwargs: Any) -> DinoVisionTransformer:
    """D = 192, 12 blocks of 3 heads. Not among the published models: for tests, demonstrations and small machines."""
    return DinoVisionTransformer(**{"patch_size": patch_size, "embed_dim": 192, "depth": 12, "num_heads": 3} | kwargs)


def vit_small(patch_size: int = 16, **kwargs: Any) -> DinoVisionTransformer:
    """D = 384, 12 blocks of 6 heads. All arguments of `DinoVisionTransformer` can be given."""
    return DinoVisionTransformer(**{"patch_size": patch_size, "embed_dim": 384, "depth": 12, "num_heads": 6} | kwargs)


def vit_base(patch_size: int = 16, **kwargs: Any) -> DinoVisionTransformer:
    """D = 768, 12 blocks of 12 heads."""
    return DinoVisionTransformer(**{"patch_size": patch_size, "embed_dim": 768, "depth": 12, "num_heads": 12} | kwargs)


def vit_large(patch_size: int = 16, **kwargs: Any) -> DinoVisionTransformer:
    """D = 1024, 24 blocks of 16 heads."""
    return DinoVisionTransformer(**{"patch_size": patch_size, "embed_dim": 1024, "depth": 24, "num_heads": 16} | kwargs)


def vit_so400m(patch_size: int = 16, **kwargs: Any) -> DinoVisionTransformer:
    """D = 1152, 27 blocks of 18 heads, about 400 million parameters with its FFNs of 3.777778 D."""
    sizes = {"patch_size": patch_size, "embed_dim": 1152, "depth": 27, "num_heads": 18, "ffn_ratio": 3.777777778}
    return DinoVisionTransformer(**sizes | kwargs)


def vit_huge2(patch_size: int = 16, **kwargs: Any) -> DinoVisionTransformer:
    """D = 1280, 32 blocks of 20 heads."""
    return DinoVisionTransformer(**{"patch_size": patch_size, "embed_dim": 1280, "depth": 32, "num_heads": 20} | kwargs)


def vit_giant2(patch_size: int = 16, **kwargs: Any) -> DinoVisionTransformer:
    """D = 1536, 40 blocks of 24 heads."""
    return DinoVisionTransformer(**{"patch_size": patch_size, "embed_dim": 1536, "depth": 40, "num_heads": 24} | kwargs)


def vit_7b(patch_size: int = 16, **kwargs: Any) -> DinoVisionTransformer:
    """D = 4096, 40 blocks of 32 heads, FFNs of 3 D."""
    sizes = {"patch_size": patch_size, "embed_dim": 4096, "depth": 40, "num_heads": 32, "ffn_ratio": 3}
    return DinoVisionTransformer(**sizes | kwargs)
