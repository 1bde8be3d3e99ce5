"""Finding the checkpoint to resume from, and reporting what has changed since it was saved."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dinov3 import distributed
from dinov3.checkpointer import CheckpointError, latest_valid_checkpoint, read_manifest
from dinov3.configs.merging import plain
from dinov3.configs.settings import flatten
from dinov3.data.fingerprint import DataFingerprint, describe_change

logger = logging.getLogger("dinov3")

#: Settings that change nothing about the numbers of a run.
HARMLESS = ("train.output_dir", "train.num_workers", "train.print_freq", "train.progress", "train.tensorboard")
HARMLESS_SECTIONS = ("checkpointing.", "evaluation.")


def run_metadata(cfg: Any, data: DataFingerprint | None = None) -> dict[str, Any]:
    """Return the configuration, its SHA-256 and what the data are, for the manifest of a checkpoint."""
    config = OmegaConf.to_container(cfg, resolve=True)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    return {"config": config, "config_sha256": digest, "data": data}


def newest_common_checkpoint(root: Path, *, verify: Any, period: int) -> Path | None:
    """Find this student's newest undamaged checkpoint of an iteration that the other students have, too.

    They save one after the other, so that a job that is killed may leave them at different iterations.

    Args:
        root: this student's directory of checkpoints.
        verify: see `latest_valid_checkpoint`.
        period: iterations between checkpoints.

    Returns:
        The checkpoint; None if there is none yet.

    Raises:
        CheckpointError: some students have no checkpoint although others have been trained for longer than a period.
    """
    limit: int | None = None
    while True:
        directory = latest_valid_checkpoint(root, verify=verify, not_after=limit)
        own = -1 if directory is None else int(directory.name)
        iterations = distributed.all_gather_objects(own, distributed.get_default_process_group())
        if len(set(iterations)) == 1:
            return directory
        limit = min(iterations)
        logger.warning("the students stand at iterations %s: going back to a common one", sorted(set(iterations)))
        if limit < 0 and max(iterations) >= period:
            raise CheckpointError(
                f"the students' newest iterations are {sorted(set(iterations))}, -1 for no checkpoint at all ({own} in "
                f"{root}): restore what is missing, or start over with --no-resume"
            )


def report_changes(directory: Path, cfg: Any) -> list[str]:
    """Log a warning that lists what has changed since a checkpoint was saved.

    Args:
        directory: the checkpoint; one without a manifest, as the official release writes them, cannot be compared.
        cfg: the configuration of the resumed run.

    Returns:
        One phrase per difference.
    """
    try:
        manifest = read_manifest(directory)
    except CheckpointError as error:
        logger.info("cannot compare the configuration with that of the checkpoint: %s", error)
        return []
    changes = _config_changes(manifest["metadata"].get("config"), cfg)
    if changes:
        logger.warning("the run continues with other settings than before: %s", "; ".join(changes))
    before, now = manifest["world_size"], distributed.get_subgroup_size()
    if before != now:
        changes.append(f"{before} processes before, {now} now")
        logger.warning(
            "%s: data are split and sums are taken in another order, so that the run is not bit for bit what it was",
            changes[-1],
        )
    return changes


def report_changed_data(directory: Path, data: DataFingerprint) -> str | None:
    """Log a warning if the training data are not those of a checkpoint.

    Args:
        directory: the checkpoint; one without a manifest, or older than this check, cannot be compared.
        data: those of the resumed run.

    Returns:
        What has changed.
    """
    try:
        before = read_manifest(directory)["metadata"].get("data")
    except CheckpointError:  # reported by `report_changes`
        return None
    change = describe_change(before, data)
    if change is not None:
        logger.warning(
            "%s: the order of the images is drawn again, so that the run is not bit for bit what it was, and until the "
            "next pass over the data some images come more often than others",
            change,
        )
    return change


def _config_changes(before: Any, cfg: Any) -> list[str]:
    if before is None:
        return []
    old, new = dict(flatten(before)), dict(flatten(plain(cfg)))
    # Each worker reads a stream of shards in an order of its own.
    harmful = ("train.num_workers",) if "mode=stream" in str(new.get("train.dataset_path")) else ()
    return [
        f"{key}: {old.get(key)} before, {new.get(key)} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
        and (key in harmful or key not in HARMLESS)
        and not key.startswith(HARMLESS_SECTIONS)
    ]
