"""Checkpoints of trainings, on torch.distributed.checkpoint: atomic, verified, strict, for any number of processes."""

from __future__ import annotations

from dinov3.checkpointer.dcp import CheckpointError, read_tensors
from dinov3.checkpointer.initializing import fill_from_tensors, init_fsdp_model_from_checkpoint
from dinov3.checkpointer.loading import checkpoint_holds, load_checkpoint
from dinov3.checkpointer.manifest import latest_valid_checkpoint, read_manifest
from dinov3.checkpointer.rng import RngState
from dinov3.checkpointer.run_directory import (
    CheckpointRetentionPolicy,
    RunLock,
    cleanup_checkpoint,
    find_all_checkpoints,
    find_latest_checkpoint,
    keep_checkpoint_copy,
    keep_last_n_checkpoints,
    remove_stale_temporaries,
)
from dinov3.checkpointer.saving import BackgroundSaver, save_checkpoint

__all__ = [
    "BackgroundSaver",
    "CheckpointError",
    "CheckpointRetentionPolicy",
    "RngState",
    "RunLock",
    "checkpoint_holds",
    "cleanup_checkpoint",
    "fill_from_tensors",
    "find_all_checkpoints",
    "find_latest_checkpoint",
    "init_fsdp_model_from_checkpoint",
    "keep_checkpoint_copy",
    "keep_last_n_checkpoints",
    "latest_valid_checkpoint",
    "load_checkpoint",
    "read_manifest",
    "read_tensors",
    "remove_stale_temporaries",
    "save_checkpoint",
]
