"""Images and label maps of a run: datasets by split, and batches to train on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov3 import distributed
from dinov3.data import DatasetWithEnumeratedTargets
from dinov3.data.datasets.pairs import PairedImageDataset
from dinov3.data.datasets.segmentation_folder import IGNORED_LABEL
from dinov3.data.datasets.strings import DATASETS, parse_dataset_string
from dinov3.eval.dense.data import collate_pairs, make_paired_dataset
from dinov3.eval.segmentation.config import SegmentationConfig
from dinov3.eval.segmentation.transforms import make_segmentation_eval_transforms, make_segmentation_train_transforms
from dinov3.eval.training.loader import make_train_loader
from dinov3.utils.files import atomic_write
from dinov3.utils.messages import list_names

logger = logging.getLogger("dinov3")

CLASSES_FILENAME = "classes.txt"

Batch = tuple[Tensor, tuple[Tensor, Tensor]]


def make_segmentation_dataset(config: SegmentationConfig, split: str, *, use_tta: bool = False) -> Any:
    """Make the dataset of a split with its transforms.

    Args:
        config: of the run.
        split: `train` or `val`.
        use_tta: several sizes and flips of each image of `val`.

    Raises:
        ValueError: the dataset string is wrong, its labels or classes are not those of the configuration, or it names
            no images.
        FileNotFoundError: what it names does not exist.
    """
    text = getattr(config.datasets, split)
    require_label_maps(text, f"datasets.{split}", config.eval.reduce_zero_label)
    transforms = make_train_transforms(config) if split == "train" else make_eval_transforms(config, use_tta=use_tta)
    dataset = make_paired_dataset(config.datasets, split, transforms)
    names, expected = class_names_of(dataset), config.decoder_head.num_classes
    if expected == 1:
        logger.warning(
            "decoder_head.num_classes=1: a head of one class has nothing to learn. Pixels of %d are ignored, so masks "
            "of 0 and %d have one class only: save the second class as 1, and give decoder_head.num_classes=2",
            IGNORED_LABEL,
            IGNORED_LABEL,
        )
    has_objects = getattr(dataset, "has_objects", False)
    if split == "val" and len(config.eval.tasks) > 1 and not has_objects:
        raise ValueError(
            f"datasets.val={text} does not tell objects apart, which eval.tasks={config.eval.tasks} need: "
            "CocoInstances and SegmentationFolder:instances=instances do"
        )
    if has_objects and config.decoder_head.type != "m2f":
        raise ValueError(f"datasets.{split}={text} tells objects apart, which needs decoder_head.type=m2f")
    if names is not None and len(names) != expected:
        raise ValueError(
            f"datasets.{split}={text} has {len(names)} classes ({list_names(names)}): "
            f"give decoder_head.num_classes={len(names)}, not {expected}"
        )
    return dataset


def require_label_maps(text: str, name: str, reduce_zero_label: bool | None) -> bool:
    """Check a dataset string, and return whether label 0 is ignored and the classes begin at 1.

    Args:
        text: the dataset string.
        name: of the setting, for messages.
        reduce_zero_label: the setting. Default: as the datasets have it.

    Raises:
        ValueError: a dataset has no label maps, or its label 0 is a class that would be ignored.
    """
    counts_from_zero = []
    for one in parse_dataset_string(text):
        dataset_class = DATASETS[one.name][0]
        if not issubclass(dataset_class, PairedImageDataset):
            raise ValueError(f"{name}={text}: {one.name} has no label maps; ADE20K and SegmentationFolder have")
        counts_from_zero.append(getattr(dataset_class, "counts_classes_from_zero", False))
        if reduce_zero_label and counts_from_zero[-1]:
            raise ValueError(
                f"{name}={text}: label 0 of {one.name} is its first class, which eval.reduce_zero_label=true "
                "would ignore: give eval.reduce_zero_label=false"
            )
    if reduce_zero_label is None and len(set(counts_from_zero)) > 1:
        raise ValueError(
            f"{name}={text}: label 0 is a class of some of the datasets only: give eval.reduce_zero_label=false"
        )
    return not counts_from_zero[0] if reduce_zero_label is None else reduce_zero_label


def class_names_of(dataset: Any) -> list[str] | None:
    """Return the names of a dataset's classes, or None if it does not know them."""
    names = getattr(dataset, "class_names", None)
    return None if names is None else list(names)


def write_class_names(dataset: Any, output_dir: str | Path) -> None:
    """Write the names of a dataset's classes, if it knows them, to `<output_dir>/classes.txt`, in the main process."""
    names = class_names_of(dataset)
    if names is not None and distributed.is_main_process():
        with atomic_write(Path(output_dir) / CLASSES_FILENAME, "w") as file:
            file.writelines(f"{name}\n" for name in names)


def make_train_transforms(config: SegmentationConfig) -> Any:
    """Make the transforms of (image, label map) for training."""
    train = config.transforms.train
    return make_segmentation_train_transforms(
        img_size=train.img_size,
        random_img_size_ratio_range=train.random_img_size_ratio_range,
        crop_size=train.crop_size,
        flip_prob=train.flip_prob,
        reduce_zero_label=config.eval.reduce_zero_label,
        mean=config.transforms.mean,
        std=config.transforms.std,
    )


def make_eval_transforms(config: SegmentationConfig, *, use_tta: bool) -> Any:
    """Make the transforms of (image, label map) for evaluation; label maps keep their size."""
    evaluation = config.transforms.eval
    return make_segmentation_eval_transforms(
        img_size=config.eval.crop_size if evaluation.img_size is None else evaluation.img_size,
        inference_mode="slide",
        use_tta=use_tta,
        tta_ratios=evaluation.tta_ratios,
        mean=config.transforms.mean,
        std=config.transforms.std,
    )


def make_segmentation_train_loader(dataset: Any, config: SegmentationConfig, first_iteration: int) -> Any:
    """Make an endless loader of this process's batches `(images [b, 3, H, W], (index [b], labels [b, 1, H, W]))`."""
    return make_train_loader(
        DatasetWithEnumeratedTargets(dataset),
        config.bs,
        config.num_workers,
        first_iteration,
        seed=config.seed,
        collate_fn=collate_enumerated_pairs,
    )


def collate_enumerated_pairs(samples: Sequence[tuple[Tensor, tuple[int, Tensor]]]) -> Batch:
    """Stack samples (image, (index, label map)) as `collate_pairs` does."""
    images, labels = collate_pairs([(image, label) for image, (_, label) in samples])
    return images, (torch.tensor([index for _, (index, _) in samples]), labels)
