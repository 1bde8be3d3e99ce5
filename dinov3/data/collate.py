"""Turn samples of the multi-crop augmentation into the batch of one training step, with its iBOT masks.

Notable:
- Crops are crop-major: crop 0 of all images, then crop 1 of all images, and so on.
- Mask ratios are stratified over the batch, not drawn, and the masks are then shuffled among the crops; the two global
  crops of an image are masked independently.
- All random draws come from the global generators of `random` and NumPy, so that the caller can seed them.
- Crops may be uint8, a quarter of the bytes; they become floats here, once per batch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov3.data.masking import MaskingGenerator

N_GLOBAL_CROPS = 2


def collate_data_and_cast(
    samples_list: Sequence[tuple[dict[str, Any], Any]],
    mask_ratio_tuple: tuple[float, float],
    mask_probability: float,
    dtype: torch.dtype,
    n_tokens: int | None = None,
    mask_generator: MaskingGenerator | None = None,
    random_circular_shift: bool = False,
    local_batch_size: int | None = None,
    *,
    normalize: tuple[Sequence[float], Sequence[float]] | None = None,
) -> dict[str, Any]:
    """Stack the crops of B samples, cast them, and draw the masks of the global crops.

    Args:
        samples_list: B pairs (dictionary, target). The dictionary has lists of tensors [3, height, width]:
            `global_crops` (G), `local_crops` (L), optionally `gram_teacher_crops` (G); every sample has the same
            entries as the first. Targets are dropped.
        mask_ratio_tuple: lowest and highest share of masked patches in a masked crop.
        mask_probability: share of the global crops that are masked.
        dtype: of the crops in the batch.
        n_tokens: P, patches of a global crop. Default: the size of the generator's grid.
        mask_generator: draws the masks.
        random_circular_shift: roll each mask by a random offset, which makes border patches as likely as others.
        local_batch_size: number of images for which masks are drawn. Default: B. It differs in multi-distillation,
            where a student sees the images of several processes.
        normalize: mean and standard deviation per channel, for uint8 crops scaled to [0, 1]. Floating-point crops are
            taken as they are.

    Returns:
        `collated_global_crops` [G * B, 3, S, S], `collated_local_crops` [L * B, 3, s, s] and, if present,
        `collated_gram_teacher_crops`, all in `dtype`; `collated_masks` bool [N, P] with N = G * B;
        `mask_indices_list` int64 [M], positions in the flattened masks; `masks_weight` float32 [M], 1 / number of
        masked patches of the crop; `n_masked_patches` int64 [1], M; `upperbound` int, M.

    Raises:
        ValueError: no samples, no mask generator, or uint8 crops without `normalize`.
    """
    if not samples_list:
        raise ValueError("cannot collate an empty list of samples: the batch size must be at least 1")
    if mask_generator is None:
        raise ValueError("collate_data_and_cast needs a mask_generator, e.g. MaskingGenerator(input_size=(14, 14))")
    crops = [sample[0] for sample in samples_list]
    batch = {}
    for key in ("global_crops", "local_crops", "gram_teacher_crops"):
        if key in crops[0]:
            stacked = torch.stack([sample[key][i] for i in range(len(crops[0][key])) for sample in crops])
            batch[f"collated_{key}"] = _to_dtype(stacked, dtype, normalize)
    n_masks = len(crops[0]["global_crops"]) * (local_batch_size or len(crops))
    n_tokens = mask_generator.num_patches if n_tokens is None else n_tokens
    # In float32, because its products sometimes truncate to other integers than those of float64.
    shares = torch.linspace(*mask_ratio_tuple, int(n_masks * mask_probability) + 1, dtype=torch.float32)[1:]
    counts: list[int] = (n_tokens * shares).long().tolist()
    masks = []
    for count in counts:
        mask = mask_generator(count)
        if random_circular_shift:
            shift = [random.randint(0, side - 1) for side in mask.shape]
            mask = np.roll(mask, shift, axis=(0, 1))
        masks.append(mask)
    # Empty masks are drawn, too: that advances NumPy's generator, as published.
    masks += [mask_generator(0) for _ in range(n_masks - len(counts))]
    random.shuffle(masks)
    return batch | _describe_masks(torch.from_numpy(np.stack(masks)).flatten(1)) | {"upperbound": sum(counts)}


def get_batch_subset(batch: dict[str, Any], divide_by: int) -> dict[str, Any]:
    """Return the first part of a batch of `collate_data_and_cast` with two global crops.

    Args:
        batch: the batch, of B images; Gram-teacher crops are dropped.
        divide_by: ceil(B / divide_by) images stay, and floor(masks per crop / divide_by) masks of each global crop. If
            no patch is masked in these, the masks of the batch are shuffled until one is.

    Returns:
        A batch of the same form; `upperbound` is that of the whole batch, `global_batch_size`, where present, divided.

    Raises:
        ValueError: no patch of the batch is masked, or no mask would be left.
    """
    n_images = len(batch["collated_global_crops"]) // N_GLOBAL_CROPS
    n_kept = -(-n_images // divide_by)
    subset = {
        key: batch[key].unflatten(0, (-1, n_images))[:, :n_kept].flatten(0, 1)
        for key in ("collated_global_crops", "collated_local_crops")
    }
    subset |= _describe_masks(_some_masks(batch["collated_masks"], divide_by))
    subset["upperbound"] = batch["upperbound"]
    if "global_batch_size" in batch:
        subset["global_batch_size"] = batch["global_batch_size"] // divide_by
    return subset


def _to_dtype(crops: Tensor, dtype: torch.dtype, normalize: tuple[Sequence[float], Sequence[float]] | None) -> Tensor:
    if crops.dtype != torch.uint8:
        return crops.to(dtype)
    if normalize is None:
        raise ValueError("the crops are uint8: pass normalize=(mean, std) to convert them to floats")
    mean, std = (torch.tensor(tuple(values), dtype=torch.float32).view(-1, 1, 1) for values in normalize)
    return crops.float().div_(255).sub_(mean).div_(std).to(dtype)


def _describe_masks(masks: Tensor) -> dict[str, Tensor]:
    counts = masks.sum(-1, keepdim=True).clamp(min=1)  # [N, 1]
    indices = masks.flatten().nonzero().flatten()
    return {
        "collated_masks": masks,
        "mask_indices_list": indices,
        "masks_weight": counts.float().reciprocal().expand_as(masks)[masks],
        "n_masked_patches": torch.tensor([len(indices)]),
    }


def _some_masks(masks: Tensor, divide_by: int) -> Tensor:
    per_crop = len(masks) // N_GLOBAL_CROPS
    n_kept = per_crop // divide_by
    if n_kept == 0 or not masks.any():
        raise ValueError(
            f"no masked patch to keep: {int(masks.sum())} patches are masked in {len(masks)} crops, divided by "
            f"{divide_by}; raise ibot.mask_sample_probability or the batch size, or lower divide_by"
        )
    rows = list(masks)
    # Ends, because some row has a masked patch, and a shuffle brings it to the front sooner or later.
    while True:
        kept = torch.stack([row for crop in range(N_GLOBAL_CROPS) for row in rows[crop * per_crop :][:n_kept]])
        if kept.any():
            return kept
        random.shuffle(rows)
