"""Small scenes on the disk, in the layouts of NYU, ADE20K and the folders of this project, and a backbone for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import nn

from dinov3.configs import get_default_config
from dinov3.models import build_model_from_cfg

HEIGHT, WIDTH = 48, 64


def scene(number: int, *, height: int = HEIGHT, width: int = WIDTH) -> tuple[Image.Image, np.ndarray]:
    """An RGB image, and the box in it: a bool map [height, width]."""
    generator = np.random.default_rng(number)
    inside = np.zeros((height, width), dtype=bool)
    top, left = generator.integers(4, height // 3), generator.integers(4, width // 3)
    inside[top : top + height // 2, left : left + width // 2] = True
    pixels = generator.integers(0, 60, (height, width, 3)) + 150 * inside[..., None]
    return Image.fromarray(pixels.astype(np.uint8)), inside


def metres(inside: np.ndarray) -> np.ndarray:
    """Depth of a scene: the box stands before a wall."""
    return np.where(inside, 1.5, 4.0).astype(np.float32)


def write_nyu(root: Path, *, n_train: int = 4, n_test: int = 3) -> Path:
    """Write a directory laid out like NYU Depth V2."""
    for name, numbers in (("nyu_train", range(n_train)), ("nyu_test", range(100, 100 + n_test))):
        lines = []
        for number in numbers:
            image, inside = scene(number)
            depth = (1000 * metres(inside)).astype(np.uint16)
            depth[:2] = 0  # no measurement
            _save(image, root / f"room/rgb_{number}.png")
            _save(Image.fromarray(depth), root / f"room/depth_{number}.png")
            lines.append(f"/room/rgb_{number}.png /room/depth_{number}.png 518.8579\n")
        (root / f"{name}.txt").write_text("".join(lines))
    return root


def write_depth_folder(root: Path, *, n_train: int = 4, n_val: int = 3) -> Path:
    """Write a DepthFolder with the splits `train` and `val`, every pixel measured."""
    for split, numbers in (("train", range(n_train)), ("val", range(100, 100 + n_val))):
        for number in numbers:
            image, inside = scene(number)
            _save(image, root / "images" / split / f"{number}.png")
            path = root / "depth" / split / f"{number}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, metres(inside))
    return root


def write_ade20k(root: Path, *, n_train: int = 4, n_val: int = 3) -> Path:
    """Write a directory laid out like ADE20K: label 0 is nothing, 1 the wall, 2 the box."""
    for name, split, numbers in (("training", "train", range(n_train)), ("validation", "val", range(100, 100 + n_val))):
        lines = []
        for number in numbers:
            image, inside = scene(number)
            labels = np.where(inside, 2, 1).astype(np.uint8)
            labels[:2] = 0
            _save(image, root / f"images/{name}/{number}.png")
            _save(Image.fromarray(labels), root / f"annotations/{name}/{number}.png")
            lines.append(f"{name}/{number}.png\n")
        (root / f"ADE20K_object150_{split}.txt").write_text("".join(lines))
    return root


def write_segmentation_folder(root: Path, *, n_train: int = 4, n_val: int = 3) -> Path:
    """Write a SegmentationFolder with the splits `train` and `val`: class 0 is the wall, 1 the box."""
    for split, numbers in (("train", range(n_train)), ("val", range(100, 100 + n_val))):
        for number in numbers:
            image, inside = scene(number)
            _save(image, root / "images" / split / f"{number}.png")
            _save(Image.fromarray(inside.astype(np.uint8)), root / "labels" / split / f"{number}.png")
    (root / "classes.txt").write_text("wall\nbox\n")
    return root


def write_backbone(path: Path) -> Path:
    """Write the configuration of a small ViT, whose random weights are always the same."""
    path.write_text("student:\n  arch: vit_tiny\n  patch_size: 16\n  n_storage_tokens: 2\n")
    return path


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def write_run(directory: Path) -> None:
    """Write what a training leaves behind: its configuration, and a teacher with random weights."""
    config = OmegaConf.merge(get_default_config(), OmegaConf.load(write_backbone(directory / "config.yaml")))
    OmegaConf.save(config, directory / "config.yaml")
    backbone, _ = build_model_from_cfg(config, only_teacher=True)
    backbone.to_empty(device="cpu").init_weights()
    torch.save({"teacher": nn.ModuleDict({"backbone": backbone}).state_dict()}, directory / "teacher_checkpoint.pth")
