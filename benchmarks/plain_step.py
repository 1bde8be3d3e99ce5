"""A step of training against the same step composed plainly, interleaved in one run, with equal losses.

    python benchmarks/plain_step.py [--rounds 30] [--threads N] [key=value ...]

The plain composition sends each crop through backbone and head by itself, and updates parameters and EMA one tensor at
a time. Configuration and batch are those of benchmarks/train_step.py: ViT-S/16, batch 3, crops of 2 x 64 and 3 x 32 px.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from train_step import SMALL, random_batch

from dinov3.configs import DinoV3SetupArgs, apply_scaling_rules_to_cfg, get_cfg_from_args
from dinov3.distributed import runtime
from dinov3.train.schedules import build_schedulers, settings_at
from dinov3.train.ssl_meta_arch import SSLMetaArch
from dinov3.train.step import train_step


class CropByCrop(SSLMetaArch):
    """`SSLMetaArch` with a forward pass for each crop."""

    def get_teacher_output(self, images: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        """One global crop after the other."""
        with torch.no_grad():
            features = [self.teacher["backbone"](crop, is_training=True) for crop in images]
            logits = [self.teacher["dino_head"](f["x_norm_clstoken"]) for f in features]
            patches = torch.cat([f["x_norm_patchtokens"] for f in features]).flatten(0, 1)
            patch_logits = self.teacher["ibot_head"](patches[kwargs["mask_indices_list"]])
            temperature = kwargs["teacher_temp"]
            targets = self.dino_loss.sinkhorn_knopp_teacher(torch.cat(logits), teacher_temp=temperature)
            patch_targets = self.ibot_patch_loss.sinkhorn_knopp_teacher(patch_logits, teacher_temp=temperature)
        return stacked(features) | {
            "cls_after_head": torch.stack(logits),
            "cls_centered": targets.unflatten(0, (len(images), -1)),
            "masked_patch_centered": patch_targets,
        }

    def get_student_output(self, **kwargs: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One crop after the other."""
        backbone, head = self.student["backbone"], self.student["dino_head"]
        crops, masks = kwargs["global_crops"], kwargs["masks"].unflatten(0, (len(kwargs["global_crops"]), -1))
        of_global = [backbone(crop, masks=mask, is_training=True) for crop, mask in zip(crops, masks, strict=True)]
        of_local = [backbone(crop, is_training=True) for crop in kwargs["local_crops"]]
        patches = torch.cat([f["x_norm_patchtokens"] for f in of_global]).flatten(0, 1)[kwargs["mask_indices_list"]]
        student_global, student_local = (
            stacked(features) | {"cls_after_head": torch.stack([head(f["x_norm_clstoken"]) for f in features])}
            for features in (of_global, of_local)
        )
        masked = {"masked_patch_pre_head": patches, "masked_patch_after_head": self.student["ibot_head"](patches)}
        return student_global | masked, student_local


class Plain(CropByCrop):
    """`CropByCrop` that also updates one tensor after the other."""

    @torch.no_grad()
    def update_ema(self, momentum: float) -> None:
        """One tensor after the other."""
        for ema, parameter in zip(self.model_ema.parameters(), self.student.parameters(), strict=True):
            ema.mul_(momentum).add_(parameter, alpha=1 - momentum)


VARIANTS: dict[str, type[SSLMetaArch]] = {"plain": Plain, "crop by crop": CropByCrop, "dinov3": SSLMetaArch}


def stacked(features: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    names = {
        "cls_pre_head": "x_norm_clstoken",
        "reg_pre_head": "x_storage_tokens",
        "patch_pre_head": "x_norm_patchtokens",
    }
    return {ours: torch.stack([f[theirs] for f in features]) for ours, theirs in names.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("options", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    cfg = get_cfg_from_args(DinoV3SetupArgs("", output_dir=None, opts=[*SMALL, *args.options]))
    apply_scaling_rules_to_cfg(cfg)
    batch, schedules = random_batch(cfg), build_schedulers(cfg)
    variants = {name: prepare(kind, cfg) for name, kind in VARIANTS.items()}
    # On the CPU its time, which other processes do not lengthen; else the wall's.
    clock = time.process_time if runtime.device().type == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for iteration in range(args.rounds + 3):
        losses = {}
        for name, (model, optimizer) in variants.items():
            runtime.synchronize()
            started = clock()
            settings = settings_at(schedules, iteration)
            result = train_step(model, optimizer, batch, settings, iteration=iteration, clip_grad=cfg.optim.clip_grad)
            runtime.synchronize()
            if iteration >= 3:
                seconds[name].append(clock() - started)
            losses[name] = float(result.metrics["total_loss"])
        if iteration == 0:
            assert all(abs(loss / losses["dinov3"] - 1) < 1e-5 for loss in losses.values()), losses
    report(seconds)


def prepare(kind: type[SSLMetaArch], cfg: Any) -> tuple[SSLMetaArch, torch.optim.Optimizer]:
    torch.manual_seed(0)
    with torch.device("meta"):
        model = kind(cfg)
    model.prepare_for_distributed_training()
    model.init_weights()
    groups = model.get_params_groups()
    if kind is Plain:
        groups = [group | {"foreach": False, "fused": False} for group in groups]
    return model.train(), torch.optim.AdamW(groups)


def report(seconds: dict[str, list[float]]) -> None:
    """Print medians, and the median of the rounds' ratios, which a busy machine moves least."""
    print(f"{runtime.device()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name, durations in seconds.items():
        ratios = sorted(other / ours for other, ours in zip(durations, seconds["dinov3"], strict=True))
        quarter = len(ratios) // 4
        print(
            f"{name:<14}{statistics.median(durations) * 1e3:9.1f} ms median, {statistics.median(ratios):.2f} times "
            f"dinov3's (quartiles {ratios[quarter]:.2f} to {ratios[-quarter - 1]:.2f})"
        )


if __name__ == "__main__":
    main()
