"""Rules about pixels: crop sizes, patches, masks, position encoding. Each yields one sentence per problem."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

CONVNEXT_STRIDE = 32


def stride(student: Any) -> int:
    """Pixels per side of a feature of the network: a ViT's patch, or a ConvNeXt's 32."""
    return CONVNEXT_STRIDE if student.arch.startswith("convnext") else student.patch_size


def as_list(value: Any) -> list[Any]:
    """A scalar as a list of one, anything else as a list."""
    return [value] if isinstance(value, int | float) or value is None else list(value)


def crop_sizes(cfg: Any, world_size: int) -> Iterator[str]:
    """Lists agree in length, crops hold a patch, and global crops are whole patches."""
    crops, patch = cfg.crops, stride(cfg.student)
    keys = ["global_crops_size", "local_crops_size", "global_local_crop_pairs_ratios"]
    if crops.gram_teacher_crops_size is not None:
        keys.append("gram_teacher_crops_size")
    lengths = {key: len(as_list(crops[key])) for key in keys}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"crops.{key} has {length}" for key, length in lengths.items())
        yield f"lists of crop sizes must have equally many entries (a single value counts as 1): {found}"
    for key in ("global_crops_size", "gram_teacher_crops_size"):
        if key == "gram_teacher_crops_size" and not cfg.gram.use_loss:
            continue
        for size in as_list(crops[key]):
            if size is not None and size % patch:
                yield f"crops.{key}={size}: must be a multiple of the patch size {patch}; {_nearest(size, patch)}"
    for size in as_list(crops.local_crops_size):
        if size < patch:
            yield f"crops.local_crops_size={size}: smaller than one patch of {patch} pixels"
    if crops.localcrops_subset_of_globalcrops:
        for whole, part in zip(as_list(crops.global_crops_size), as_list(crops.local_crops_size), strict=False):
            if part > whole:
                yield (
                    f"crops.localcrops_subset_of_globalcrops: a local crop of {part} pixels cannot be cut out of a "
                    f"global crop of {whole}"
                )


def mask_grid(cfg: Any, world_size: int) -> Iterator[str]:
    """Masks are drawn on the grid of the student's patches."""
    student, patch = cfg.student, stride(cfg.student)
    key = f"crops.teacher_to_student_resolution_scale={cfg.crops.teacher_to_student_resolution_scale}"
    mask_patch = int(student.patch_size * cfg.crops.teacher_to_student_resolution_scale)
    if mask_patch < 1:
        yield f"{key}: too small for patches of {student.patch_size} pixels"
        return
    for size in as_list(cfg.crops.global_crops_size):
        mask_side, side = size // mask_patch, size // patch
        if size % patch == 0 and mask_side != side:
            yield (
                f"{key}: for global crops of {size} pixels masks would have {mask_side} x {mask_side} patches, but "
                f"{student.arch} has {side} x {side}; set it to {patch / student.patch_size:g}"
            )


def mask_ratios(cfg: Any, world_size: int) -> Iterator[str]:
    """0 <= smallest < largest <= 1."""
    low, high = cfg.ibot.mask_ratio_min_max
    if not 0 <= low < high <= 1:
        yield f"ibot.mask_ratio_min_max=[{low}, {high}]: expected 0 <= smallest < largest <= 1"


def crop_scales(cfg: Any, world_size: int) -> Iterator[str]:
    """The smallest share of the image comes first."""
    for key in ("global_crops_scale", "local_crops_scale"):
        low, high = cfg.crops[key]
        if low > high:
            yield f"crops.{key}=[{low}, {high}]: the smaller share of the image comes first"
    if cfg.student.in_chans != len(cfg.crops.rgb_mean):
        yield f"student.in_chans={cfg.student.in_chans}: training images have {len(cfg.crops.rgb_mean)} channels"


def rope(cfg: Any, world_size: int) -> Iterator[str]:
    """Either the base, or both periods."""
    student = cfg.student
    base = student.pos_embed_rope_base
    shortest, longest = student.pos_embed_rope_min_period, student.pos_embed_rope_max_period
    n_periods = (shortest is not None) + (longest is not None)
    if n_periods != (2 if base is None else 0):
        yield (
            f"student.pos_embed_rope_base={base}, min_period={shortest}, max_period={longest}: give either "
            "pos_embed_rope_base alone, or pos_embed_rope_min_period and pos_embed_rope_max_period with base null"
        )
    elif base is None and shortest >= longest:
        yield f"student.pos_embed_rope_min_period={shortest}: must be less than pos_embed_rope_max_period={longest}"


def notes(cfg: Any) -> Iterator[str]:
    """Local crops that are no whole number of patches."""
    patch = stride(cfg.student)
    for size in sorted(set(as_list(cfg.crops.local_crops_size))):
        if size % patch:
            yield (
                f"crops.local_crops_size: of {size} pixels the last {size % patch} rows and columns are not seen "
                f"(patches of {patch})"
            )


def _nearest(size: int, patch: int) -> str:
    below = size // patch * patch
    return f"use {below} or {below + patch}" if below else f"use at least {patch}"
