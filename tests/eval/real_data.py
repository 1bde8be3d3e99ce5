"""Real labelled images that lie in installed packages, as users have them on disk, and a small backbone of a run."""

from __future__ import annotations

import csv
import importlib
from collections.abc import Iterable
from pathlib import Path

import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import nn

from dinov3 import distributed
from dinov3.configs import get_default_config
from dinov3.data.datasets import ImageNet
from dinov3.demo import packaged
from dinov3.models import build_model_from_cfg

#: A ViT that sees the strokes of a digit: patches of 4 pixels, and layer scales large enough that its blocks matter.
STUDENT = {
    "arch": "vit_tiny",
    "depth": 2,
    "patch_size": 4,
    "n_storage_tokens": 1,
    "mask_k_bias": True,
    "layerscale": 0.1,
    "drop_path_rate": 0.0,
    "pos_embed_rope_dtype": "fp32",
}
WEIGHT_SCALE = 3
SIDE = 16  # pixels
HELD_OUT = 4  # every fourth image


def write_digits(root: Path, count: int = 800) -> Path:
    """scikit-learn's scanned digits as `{train,test}/<digit>/<number>.png`."""
    images, labels = packaged.load_digits()
    for index in range(count):
        _save(images[index], root / _part(index) / str(labels[index]) / f"{index:04d}.png")
    return root


def write_faces(root: Path) -> Path:
    """scikit-image's faces, and other things, as `{train,test}/{face,other}/<number>.png`."""
    images, labels = packaged.load_faces()
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        _save(image, root / _part(index) / ("face" if label else "other") / f"{index:04d}.png")
    return root


def write_imagenet(root: Path, count: int = 400) -> Path:
    """Digits under the names of ImageNet-1k, with the files of `extra` in `<root>/extra`."""
    images, labels = packaged.load_digits()
    with open(_made(root) / "labels.txt", "w", newline="") as file:
        csv.writer(file).writerows([f"n{digit:08d}", f"digit {digit}"] for digit in range(10))
    for index in range(count):
        class_id = f"n{labels[index]:08d}"
        split = ImageNet.Split.TRAIN if _part(index) == "train" else ImageNet.Split.VAL
        _save(images[index], root / split.get_image_relpath(index + 1, class_id), quality=95)
    for split in (ImageNet.Split.TRAIN, ImageNet.Split.VAL):
        ImageNet(split=split, root=str(root), extra=str(_made(root / "extra"))).dump_extra()
    return root


def write_run(root: Path, seed: int = 0) -> Path:
    """The output directory of a training run, with a teacher of random weights."""
    cfg = OmegaConf.merge(get_default_config(), {"student": STUDENT, "compute_precision": {"param_dtype": "fp32"}})
    torch.manual_seed(seed)
    model, _ = build_model_from_cfg(cfg, only_teacher=True)
    model.to_empty(device="cpu")
    model.init_weights()
    for parameter in model.parameters():  # initial weights are so small that class tokens hardly see the image
        parameter.data *= WEIGHT_SCALE if parameter.ndim > 1 else 1
    OmegaConf.save(cfg, _made(root) / "config.yaml")
    teacher = _made(root / "eval" / "training_9") / "teacher_checkpoint.pth"
    torch.save({"teacher": nn.ModuleDict({"backbone": model}).state_dict()}, teacher)
    (root / "teacher_checkpoint.pth").symlink_to(teacher.relative_to(root))
    return root


def size_settings() -> list[str]:
    """Images as they are, loaded without further processes."""
    return [
        *(f"transform.{name}={SIDE}" for name in ("resize_size", "crop_size")),
        *("train.num_workers=0", "eval.num_workers=0"),
    ]


def run_commands(commands: Iterable[list[str]]) -> None:
    """Call `main` of each [module, argument, ...], in the process group of the launcher, if there is one."""
    distributed.enable()
    for module, *argv in commands:
        assert importlib.import_module(module).main(argv) == 0
    distributed.disable()


def _part(index: int) -> str:
    return "test" if index % HELD_OUT == 0 else "train"


def _save(image: Image.Image, path: Path, **options: int) -> None:
    _made(path.parent)
    image.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(path, **options)


def _made(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    return directory
