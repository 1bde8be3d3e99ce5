"""Which checkpoints there are, and which of them stay."""

from __future__ import annotations

import enum
import os
import shutil
from pathlib import Path

from dinov3.checkpointer import files


class CheckpointRetentionPolicy(enum.Enum):
    """What `cleanup_checkpoint` leaves of a training's checkpoints."""

    ALL = "all"
    BEST = "best"
    LAST = "last"
    LAST_AND_BEST = "last_and_best"
    NONE = "none"

    @property
    def keep_filters(self) -> tuple[str, ...]:
        """Names of checkpoints that stay, besides all of them under `ALL`."""
        best = ("best",) if self in (self.BEST, self.LAST_AND_BEST) else ()
        last = ("final",) if self in (self.LAST, self.LAST_AND_BEST) else ()
        return best + last

    @property
    def max_to_keep(self) -> int | None:
        """How many numbered checkpoints a training keeps while it runs; None for all."""
        return None if self is self.ALL else 1


def find_all_checkpoints(root: str | os.PathLike[str]) -> list[Path]:
    """Directories in `root` that are named by an iteration (`0`, `1`, ... without signs or leading zeros), in order.

    Args:
        root: a directory, which need not exist.
    """
    if not Path(root).is_dir():
        return []
    found = [path for path in Path(root).iterdir() if files.ITERATION.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name))


def find_latest_checkpoint(root: str | os.PathLike[str]) -> Path | None:
    """The last of `find_all_checkpoints`, undamaged or not; None without any."""
    return next(reversed(find_all_checkpoints(root)), None)


def keep_last_n_checkpoints(root: str | os.PathLike[str], n: int | None) -> None:
    """Delete all numbered checkpoints in `root` but the newest; call it in one process.

    Args:
        root: a directory, which need not exist.
        n: how many to keep; None keeps all.

    Raises:
        ValueError: negative `n`.
    """
    if n is None:
        return
    if n < 0:
        raise ValueError(f"cannot keep {n} checkpoints; give a number >= 0, or None to keep all")
    checkpoints = find_all_checkpoints(root)
    for directory in checkpoints[: max(len(checkpoints) - n, 0)]:
        files.remove(directory)


def keep_checkpoint_copy(source: str | os.PathLike[str]) -> Path:
    """Make `<source>_keep`, which `keep_last_n_checkpoints` does not touch, out of hard links; call it in one process.

    Args:
        source: a complete checkpoint. Where the file system has no hard links, its files are copied.

    Returns:
        The new directory; it replaces an older one.
    """
    source = Path(source)
    target = source.with_name(f"{source.name}_keep")
    temporary = files.temporary_beside(target)
    shutil.copytree(source, temporary, copy_function=_link_or_copy)
    files.publish(temporary, target)
    return target


def cleanup_checkpoint(root: str | os.PathLike[str], policy: CheckpointRetentionPolicy) -> None:
    """Delete the checkpoints in `root` that `policy` does not keep; call it in one process.

    Checkpoints are the numbered directories, `best` and `final`; everything else in `root` stays.

    Args:
        root: a directory, which need not exist.
        policy: what stays.
    """
    if policy is CheckpointRetentionPolicy.ALL:
        return
    named = [Path(root) / name for name in CheckpointRetentionPolicy.LAST_AND_BEST.keep_filters]
    for directory in [*find_all_checkpoints(root), *named]:
        if directory.name not in policy.keep_filters:
            files.remove(directory)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
