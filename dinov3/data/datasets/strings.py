"""Dataset strings: `NAME:key=value:key=value`, several joined by `+`.

    ImageFolder:root=/data/photos
    ImageNet:split=TRAIN:root=/data/imagenet:extra=/data/imagenet-extra
    WebDataset:urls=/data/shard-{000000..000127}.tar
    ImageFolder:root=/data/a+ImageFolder:root=/data/b

Every dataset also takes `READING_KEYS`, which say how its images are read (`dinov3.data.images.ImageReading`).

A `:` separates only where `key=` follows, and a key ends at its first `=`, so values may hold both
(`root=s3://bucket/x`). A `+` separates only where the name of a dataset and `:` or the end follow. To add a dataset of
your own, add its line to `DATASETS`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from dinov3.data.datasets import (
    ade20k,
    coco_captions,
    coco_instances,
    depth_folder,
    hf_dataset,
    image_folder,
    image_net,
    image_net_22k,
    image_net_variants,
    nyu,
    segmentation_folder,
    web_dataset,
)
from dinov3.data.datasets.extended import ON_BAD_IMAGE, ExtendedVisionDataset
from dinov3.data.images import ALPHA, EXIF
from dinov3.utils import did_you_mean

READING_KEYS = ("alpha", "exif", "max_image_pixels")
COMMON_KEYS = ("skip", *READING_KEYS)

_NUMBER = re.compile(r"(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_BEFORE_KEY = re.compile(r":(?=[A-Za-z_]\w*=)")


class DatasetStringError(ValueError):
    """A dataset string that cannot be parsed; the message quotes it, names the wrong part and says what is allowed."""


@dataclass(frozen=True)
class DatasetGrammar:
    """The keys that may follow a dataset's name, besides `COMMON_KEYS`, which all take.

    Attributes:
        required: keys that must be given.
        optional: keys that may be given.
        splits: the members that `split` names, ignoring case. Default: any text.
        choices: allowed values of other keys.
        integers: keys whose values are whole numbers.
        numbers: keys whose values are positive numbers.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    splits: type[Enum] | None = None
    choices: dict[str, tuple[str, ...]] = field(default_factory=dict)
    integers: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        return (*self.required, *self.optional, *COMMON_KEYS)


DATASETS: dict[str, tuple[type[ExtendedVisionDataset], DatasetGrammar]] = {
    "ADE20K": (ade20k.ADE20K, DatasetGrammar(required=("split", "root"), splits=ade20k.ADE20KSplit)),
    "CocoCaptions": (
        coco_captions.CocoCaptions,
        DatasetGrammar(required=("split", "root"), splits=coco_captions.CocoCaptionsSplit),
    ),
    "CocoInstances": (coco_instances.CocoInstances, DatasetGrammar(required=("images", "annotations"))),
    "DepthFolder": (
        depth_folder.DepthFolder,
        DatasetGrammar(required=("root",), optional=("split", "images", "depth", "scale"), numbers=("scale",)),
    ),
    "HFDataset": (hf_dataset.HFDataset, DatasetGrammar(required=("path",), optional=("split", "image", "label"))),
    "ImageFolder": (
        image_folder.ImageFolder,
        DatasetGrammar(
            required=("root",), optional=("split", "labels", "extra"), choices={"labels": image_folder.LABELS}
        ),
    ),
    "ImageNet": (
        image_net.ImageNet,
        DatasetGrammar(required=("split", "root", "extra"), splits=image_net.ImageNetSplit),
    ),
    "ImageNet22k": (image_net_22k.ImageNet22k, DatasetGrammar(required=("root", "extra"))),
    "ImageNetC": (image_net_variants.ImageNetC, DatasetGrammar(required=("root",))),
    "ImageNetReaL": (image_net_variants.ImageNetReaL, DatasetGrammar(required=("root", "labels"))),
    "NYU": (nyu.NYU, DatasetGrammar(required=("split", "root"), splits=nyu.NYUSplit)),
    "SegmentationFolder": (
        segmentation_folder.SegmentationFolder,
        DatasetGrammar(required=("root",), optional=("split", "images", "labels", "instances")),
    ),
    "WebDataset": (
        web_dataset.WebDataset,
        DatasetGrammar(
            required=("urls",),
            optional=("image", "label", "extra", "mode", "buffer", "on_bad_image"),
            choices={"mode": web_dataset.MODES, "on_bad_image": ON_BAD_IMAGE},
            integers=("buffer",),
        ),
    ),
}


@dataclass(frozen=True)
class ParsedDataset:
    """One dataset of a string: its name, and the arguments of its class."""

    name: str
    kwargs: dict[str, Any]


def parse_dataset_string(dataset_str: str) -> list[ParsedDataset]:
    """Parse a dataset string without opening anything; missing keys are left to `check_required_keys`.

    Args:
        dataset_str: see the module's docstring. The last value of a repeated key counts.

    Returns:
        One entry per dataset; the value of `split` is a member of the dataset's splits, if it has them.

    Raises:
        DatasetStringError: unknown dataset, key, split or choice, or a token that is not `key=value`.
    """
    # Without the `:` or end after a name, a path such as /data/old+ImageNet-v2 would be torn apart.
    joint = re.compile(rf"\+(?=(?:{'|'.join(map(re.escape, DATASETS))})(?::|\+|$))")
    datasets = []
    for part in joint.split(dataset_str):
        name, colon, rest = part.partition(":")
        if name not in DATASETS:
            raise DatasetStringError(
                f"dataset string {dataset_str!r}: unknown dataset {name!r}{did_you_mean(name, DATASETS)}; "
                f"known are {', '.join(sorted(DATASETS))}, e.g. 'ImageFolder:root=/data/photos'"
            )
        tokens = _BEFORE_KEY.split(rest) if colon else []
        datasets.append(ParsedDataset(name, dict(_parse_token(name, token, dataset_str) for token in tokens)))
    return datasets


def check_required_keys(datasets: Iterable[ParsedDataset], dataset_str: str) -> None:
    """Raise a DatasetStringError if a dataset lacks a key that it needs, or has an empty value for it."""
    for dataset in datasets:
        grammar = DATASETS[dataset.name][1]
        missing = [key for key in grammar.required if not dataset.kwargs.get(key)]
        if missing:
            raise DatasetStringError(
                f"dataset string {dataset_str!r}: {dataset.name} needs {', '.join(missing)} as well; "
                + _describe(dataset.name)
            )


def _parse_token(name: str, token: str, whole: str) -> tuple[str, Any]:
    grammar = DATASETS[name][1]
    key, equals, value = token.partition("=")
    if not equals:
        raise DatasetStringError(f"dataset string {whole!r}: {token!r} is not key=value; {_describe(name)}")
    if key not in grammar.keys:
        raise DatasetStringError(
            f"dataset string {whole!r}: unknown key {key!r}{did_you_mean(key, grammar.keys)}; {_describe(name)}"
        )
    if key == "split" and grammar.splits is not None:
        members = grammar.splits.__members__
        if value.upper() not in members:
            raise DatasetStringError(
                f"dataset string {whole!r}: unknown split {value!r}{did_you_mean(value, members)}; "
                f"{name} has {', '.join(members)}"
            )
        return key, members[value.upper()]
    choices = grammar.choices | {"alpha": ALPHA, "exif": EXIF}
    if key in choices and value not in choices[key]:
        allowed = choices[key]
        raise DatasetStringError(
            f"dataset string {whole!r}: {key}={value!r}{did_you_mean(value, allowed)}; "
            f"{name} takes {', '.join(allowed)}"
        )
    # Patterns rather than int() and float(), which also accept " 1_000", "nan" and the like.
    if key in grammar.integers or key == "max_image_pixels":
        if not re.fullmatch(r"[1-9]\d*", value):
            raise DatasetStringError(f"dataset string {whole!r}: {key}={value!r} must be a whole number of at least 1")
        return key, int(value)
    if key in grammar.numbers:
        if not (_NUMBER.fullmatch(value) and 0 < float(value) < math.inf):
            raise DatasetStringError(f"dataset string {whole!r}: {key}={value!r} must be a positive number")
        return key, float(value)
    return key, value


def _describe(name: str) -> str:
    grammar = DATASETS[name][1]
    needs = f"{name} needs {', '.join(grammar.required)}"
    return f"{needs} and takes {', '.join((*grammar.optional, *COMMON_KEYS))}"
