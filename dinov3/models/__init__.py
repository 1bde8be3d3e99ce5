"""Backbones, and building them from a configuration."""

from dinov3.models.building import build_model, build_model_from_cfg, init_fp8

__all__ = ["build_model", "build_model_from_cfg", "init_fp8"]
