"""The training data of a configuration: dataset, augmentation, masks and loaders, resumable to the batch.

Everything random about a batch depends only on (`train.seed`, loader, batch number, rank), so a run that is resumed at
iteration n sees the batches that an uninterrupted one sees, whatever the number of workers.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

from dinov3 import distributed
from dinov3.configs.settings import as_list
from dinov3.data import (
    CombinedDataLoader,
    DataAugmentationDINO,
    MaskingGenerator,
    collate_data_and_cast,
    make_dataset,
)
from dinov3.data.images import ImageReading
from dinov3.data.loaders import SamplerType, make_train_data_loader
from dinov3.data.meta_loaders import count_draws
from dinov3.utils import as_torch_dtype

COMBINED_SEED = 65537
SAMPLER_SEED_OFFSET = 2


@dataclass(frozen=True)
class Resolution:
    """The crop sizes of one loader and how often it is drawn."""

    global_size: int
    local_size: int
    gram_size: int | None
    ratio: float


def build_train_loader(cfg: Any, *, start_iteration: int = 0) -> Any:
    """Build an endless loader of training batches, from the batch of `start_iteration` on.

    Args:
        cfg: the training configuration; with lists of crop sizes there is one loader per entry, drawn by
            `crops.global_local_crop_pairs_ratios`.
        start_iteration: number of batches that the run consumed before.

    Returns:
        An iterable of batches as `collate_data_and_cast` makes them.
    """
    resolutions = crop_resolutions(cfg)
    if len(resolutions) == 1:
        return _build_loader(cfg, resolutions[0], 0, start_iteration)
    delivered = count_draws([resolution.ratio for resolution in resolutions], COMBINED_SEED, start_iteration)
    loaders = [
        _build_loader(cfg, resolution, index, first_batch)
        for index, (resolution, first_batch) in enumerate(zip(resolutions, delivered, strict=True))
    ]
    return CombinedDataLoader(
        loaders_with_ratios=[(loader, r.ratio) for loader, r in zip(loaders, resolutions, strict=True)],
        batch_size=images_per_process(cfg),
        combining_mode=CombinedDataLoader.GLOBAL_HOMOGENEOUS,
        seed=COMBINED_SEED,
        name="MultiResDL",
        advance=start_iteration,
    )


def dataset_of(loader: Any) -> Any:
    """Return the dataset that a loader of `build_train_loader` reads."""
    first = loader.loaders[0] if isinstance(loader, CombinedDataLoader) else loader
    return first.loader.dataset.dataset


def crop_resolutions(cfg: Any) -> list[Resolution]:
    """Return one entry per crop resolution; a scalar setting counts as a list of one."""
    crops = cfg.crops
    global_sizes, local_sizes = as_list(crops.global_crops_size), as_list(crops.local_crops_size)
    has_gram_crops = cfg.gram.use_loss and not cfg.gram.ema_teacher
    gram_sizes = as_list(crops.gram_teacher_crops_size) if has_gram_crops else [None] * len(global_sizes)
    ratios = as_list(crops.global_local_crop_pairs_ratios)
    return [Resolution(*entry) for entry in zip(global_sizes, local_sizes, gram_sizes, ratios, strict=True)]


def build_train_dataset(cfg: Any, resolution: Resolution) -> Any:
    """Build the dataset of `train.dataset_path` with the multi-crop augmentation; targets are dropped."""
    return make_dataset(
        dataset_str=cfg.train.dataset_path,
        transform=build_augmentation(cfg, resolution),
        target_transform=_no_target,
        on_bad_image=cfg.train.on_bad_image,
        reading=ImageReading(
            alpha=cfg.train.alpha,
            exif=cfg.train.exif,
            max_image_pixels=cfg.train.max_image_pixels,
            as_array=True,
        ),
    )


def build_augmentation(cfg: Any, resolution: Resolution) -> DataAugmentationDINO:
    """Build the multi-crop augmentation of one loader; its crops are uint8."""
    crops = cfg.crops
    return DataAugmentationDINO(
        global_crops_scale=tuple(crops.global_crops_scale),
        local_crops_scale=tuple(crops.local_crops_scale),
        local_crops_number=crops.local_crops_number,
        global_crops_size=resolution.global_size,
        local_crops_size=resolution.local_size,
        gram_teacher_crops_size=resolution.gram_size,
        gram_teacher_no_distortions=crops.gram_teacher_no_distortions,
        local_crops_subset_of_global_crops=crops.localcrops_subset_of_globalcrops,
        patch_size=cfg.student.patch_size,
        share_color_jitter=crops.share_color_jitter,
        horizontal_flips=crops.horizontal_flips,
        blur_probabilities=tuple(crops.blur_probabilities),
        mean=tuple(crops.rgb_mean),
        std=tuple(crops.rgb_std),
        output_uint8=True,
    )


def _build_loader(cfg: Any, resolution: Resolution, index: int, first_batch: int) -> Any:
    return make_train_data_loader(
        dataset=build_train_dataset(cfg, resolution),
        batch_size=images_per_process(cfg),
        num_workers=cfg.train.num_workers,
        sampler_type=SamplerType.SHARDED_INFINITE if cfg.train.cache_dataset else SamplerType.INFINITE,
        sampler_seed=cfg.train.seed + index + SAMPLER_SEED_OFFSET,
        collate_fn=build_collate(cfg, resolution),
        seed_key=(cfg.train.seed, index, distributed.get_rank()),
        first_batch=first_batch,
        on_bad_image=cfg.train.on_bad_image,
    )


def build_collate(cfg: Any, resolution: Resolution) -> functools.partial[dict[str, Any]]:
    """Build the collate function of one loader: it stacks crops, draws the iBOT masks, normalises and casts."""
    patch_size = int(cfg.student.patch_size * cfg.crops.teacher_to_student_resolution_scale)
    side = resolution.global_size // patch_size
    # The published expression, floor by floor: at most half of the patches may be masked by one block.
    max_block = 0.5 * resolution.global_size // patch_size * resolution.global_size // patch_size
    local_batch_size = None
    if cfg.multidistillation.enabled:
        # Each student sees all images, with its own masks, on its own processes.
        local_batch_size = int(cfg.multidistillation.global_batch_size) // distributed.get_subgroup_size()
    return functools.partial(
        collate_data_and_cast,
        mask_ratio_tuple=tuple(cfg.ibot.mask_ratio_min_max),
        mask_probability=cfg.ibot.mask_sample_probability,
        dtype=as_torch_dtype(cfg.compute_precision.param_dtype),
        n_tokens=side**2,
        mask_generator=MaskingGenerator(input_size=(side, side), max_num_patches=max_block),
        random_circular_shift=cfg.ibot.mask_random_circular_shift,
        local_batch_size=local_batch_size,
        normalize=(tuple(cfg.crops.rgb_mean), tuple(cfg.crops.rgb_std)),
    )


def images_per_process(cfg: Any) -> int:
    """Return how many images each process decodes for a batch; with several students the last may be too many."""
    if not cfg.multidistillation.enabled:
        return int(cfg.train.batch_size_per_gpu)
    return math.ceil(cfg.multidistillation.global_batch_size / distributed.get_world_size())


def global_batch_size(cfg: Any) -> int:
    """Images per batch of all processes together."""
    if not cfg.multidistillation.enabled:
        return int(cfg.train.batch_size_per_gpu) * distributed.get_world_size()
    return int(cfg.multidistillation.global_batch_size)


def _no_target(_target: Any) -> tuple[()]:
    return ()
