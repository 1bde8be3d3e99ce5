"""The images and label maps of a run: datasets by split, loaders that train and that evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dinov3 import distributed
from dinov3.data import DatasetWithEnumeratedTargets, make_dataset
from dinov3.data.datasets.pairs import PairedImageDataset
from dinov3.data.datasets.strings import DATASETS, parse_dataset_string
from dinov3.eval.command.results import write_atomically
from dinov3.eval.dense.batches import collate_pairs
from dinov3.eval.features.extraction import make_enumerated_loader
from dinov3.eval.segmentation.config import SegmentationConfig
from dinov3.eval.segmentation.transforms import make_segmentation_eval_transforms, make_segmentation_train_transforms
from dinov3.eval.training.loader import make_train_loader

CLASSES_FILENAME = "classes.txt"

Batch = tuple[Tensor, tuple[Tensor, Tensor]]


def make_segmentation_dataset(config: SegmentationConfig, split: str, *, use_tta: bool = False) -> Any:
    """The dataset of a split with its transforms.

    Args:
        config: of the run.
        split: `train` or `val`.
        use_tta: of `val`, several sizes and flips of each image.

    Raises:
        ValueError: the dataset string means nothing, its labels or classes are not those of the configuration, or it
            names no image.
        FileNotFoundError: what it names does not exist.
    """
    text = getattr(config.datasets, split)
    _check_datasets(text, split, config.eval.reduce_zero_label)
    transforms = make_train_transforms(config) if split == "train" else make_eval_transforms(config, use_tta=use_tta)
    dataset = make_dataset(dataset_str=text, transforms=transforms, root=config.datasets.root)
    if len(dataset) == 0:
        raise ValueError(f"datasets.{split}={text}: there are no images")
    names = class_names_of(dataset)
    if names is not None and len(names) != config.decoder_head.num_classes:
        listing = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise ValueError(
            f"datasets.{split}={text} has {len(names)} classes ({listing}): "
            f"give decoder_head.num_classes={len(names)}, not {config.decoder_head.num_classes}"
        )
    return dataset


def class_names_of(dataset: Any) -> list[str] | None:
    """The names of a dataset's classes, where it knows them."""
    names = getattr(dataset, "class_names", None)
    return None if names is None else list(names)


def write_class_names(dataset: Any, output_dir: str | Path) -> None:
    """Write the names of a dataset's classes, if it knows them, to `<output_dir>/classes.txt`, in the main process."""
    names = class_names_of(dataset)
    if names is not None and distributed.is_main_process():
        write_atomically(Path(output_dir) / CLASSES_FILENAME, "".join(f"{name}\n" for name in names))


def make_train_transforms(config: SegmentationConfig) -> Any:
    """The transforms of (image, label map) for training."""
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
    """The transforms of (image, label map) for evaluation; label maps keep their size."""
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
    """Endless batches `(images [b, 3, H, W], (index [b], labels [b, 1, H, W]))` of this process."""
    return make_train_loader(
        DatasetWithEnumeratedTargets(dataset),
        config.bs,
        config.num_workers,
        first_iteration,
        seed=config.seed,
        collate_fn=collate_enumerated_pairs,
    )


def make_segmentation_eval_loader(dataset: Any, num_workers: int) -> Any:
    """Of this process's share, one image at a time: `(images, (index, labels [1, 1, h, w]))`, padding with index -1.

    `images` is a list of [1, 3, H, W]: the sizes, then the same flipped.
    """
    return make_enumerated_loader(dataset, batch_size=1, num_workers=num_workers)


def collate_enumerated_pairs(samples: Sequence[tuple[Tensor, tuple[int, Tensor]]]) -> Batch:
    """`collate_pairs` of samples (image, (index, label map))."""
    images, labels = collate_pairs([(image, label) for image, (_, label) in samples])
    return images, (labels.new_tensor([index for _, (index, _) in samples], dtype=int), labels)  # type: ignore[arg-type]


def _check_datasets(dataset_str: str, split: str, reduce_zero_label: bool) -> None:
    for one in parse_dataset_string(dataset_str):
        dataset_class = DATASETS[one.name][0]
        if not issubclass(dataset_class, PairedImageDataset):
            raise ValueError(
                f"datasets.{split}={dataset_str}: an {one.name} has no label maps; ADE20K and SegmentationFolder do"
            )
        if reduce_zero_label and getattr(dataset_class, "counts_classes_from_zero", False):
            raise ValueError(
                f"datasets.{split}={dataset_str}: label 0 of a {one.name} is its first class, which "
                "eval.reduce_zero_label=true would ignore: give eval.reduce_zero_label=false"
            )
