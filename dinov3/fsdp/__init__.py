"""Wrapping a model for training: activation checkpointing, compilation, sharding."""

from __future__ import annotations

from dinov3.fsdp.ac_compile_parallelize import ac_compile_parallelize
from dinov3.fsdp.sharding import clip_grad_norm_, full_state_dict, set_gradient_sync

__all__ = ["ac_compile_parallelize", "clip_grad_norm_", "full_state_dict", "set_gradient_sync"]
