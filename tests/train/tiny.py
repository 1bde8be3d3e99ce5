"""A training that takes seconds on a CPU: small random images and a two-block ViT."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

from dinov3.checkpointer import find_all_checkpoints
from dinov3.configs import DinoV3SetupArgs, setup_config
from dinov3.train.loop import Trainer
from dinov3.train.preemption import Preemption
from dinov3.train.train import build_model

CONFIG = {
    "compute_precision": {"param_dtype": "fp32"},
    "student": {
        "arch": "vit_tiny",
        "depth": 2,
        "patch_size": 8,
        "drop_path_rate": 0.2,
        "n_storage_tokens": 1,
        "mask_k_bias": True,
        "pos_embed_rope_dtype": "fp32",
        "pos_embed_rope_rescale_coords": 2,
    },
    "dino": {"head_n_prototypes": 32, "head_hidden_dim": 48, "head_bottleneck_dim": 16},
    "ibot": {"head_n_prototypes": 32, "head_hidden_dim": 48, "head_bottleneck_dim": 16},
    "crops": {"global_crops_size": 32, "local_crops_size": 16, "local_crops_number": 2},
    "train": {
        "batch_size_per_gpu": 4,
        "num_workers": 0,
        "OFFICIAL_EPOCH_LENGTH": 10,
        "compile": False,
        "tensorboard": False,
        "print_freq": 1,
    },
    "optim": {"epochs": 2, "warmup_epochs": 1, "freeze_last_layer_epochs": 0, "lr": 0.01},
    "teacher": {"warmup_teacher_temp_epochs": 1},
    "evaluation": {"eval_period_iterations": 0},
    "checkpointing": {"period": 10},
}


def write_images(root: Path, count: int = 12, size: int = 40) -> Path:
    """`count` PNG files of smooth noise in two class folders below `root`."""
    rng = np.random.default_rng(0)
    for index in range(count):
        directory = root / ("even", "odd")[index % 2]
        directory.mkdir(parents=True, exist_ok=True)
        noise = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((size, size), Image.Resampling.BILINEAR).save(directory / f"{index}.png")
    return root


def write_config(path: Path, images: Path, **sections: dict[str, Any]) -> Path:
    """The tiny configuration on `images`, with the settings of `sections` merged in."""
    config = OmegaConf.merge(CONFIG, {"train": {"dataset_path": f"ImageFolder:root={images}"}}, sections)
    OmegaConf.save(config, path)
    return path


def make_trainer(directory: Path, *, period: int, preemption: Preemption | None = None, **train: Any) -> Trainer:
    """A trainer of six iterations on images in `directory`, with a checkpoint every `period`."""
    config = write_config(
        directory / "tiny.yaml",
        write_images(directory / "images"),
        train={"OFFICIAL_EPOCH_LENGTH": 3} | train,
        checkpointing={"period": period},
    )
    cfg = setup_config(DinoV3SetupArgs(config_file=str(config), output_dir=str(directory / "out")))
    return Trainer(cfg, build_model(cfg), preemption=preemption)


def copy_as_killed(run: Path, copy: Path, *, after: int) -> None:
    """Copy a finished run into what a kill leaves: no checkpoint after an iteration, but metrics that ran ahead."""
    shutil.copytree(run, copy, symlinks=True)
    for directory in find_all_checkpoints(copy / "ckpt"):
        if int(directory.name) > after:
            shutil.rmtree(directory)
    (copy / "teacher_checkpoint.pth").unlink()


def read_metrics(output_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics file."""
    return [json.loads(line) for line in (output_dir / "training_metrics.json").read_text().splitlines()]


def read_losses(output_dir: Path) -> dict[int, float]:
    """Total loss by iteration; fails if an iteration stands twice."""
    lines = read_metrics(output_dir)
    losses = {line["iteration"]: line["total_loss"] for line in lines}
    assert len(losses) == len(lines), "an iteration was logged twice"
    return losses


def read_teacher(output_dir: Path) -> dict[str, Tensor]:
    """The exported teacher of a run."""
    return torch.load(output_dir / "teacher_checkpoint.pth", weights_only=True)["teacher"]


def assert_same_weights(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Equal names and bit-equal tensors."""
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"{len(different)} of {len(a)} entries differ, first {different[:3]}"
