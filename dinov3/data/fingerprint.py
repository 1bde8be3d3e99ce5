"""Whether a dataset is the same on all ranks, and the same as when a run was saved: its length and a digest of names.

Samplers draw indices. Where ranks list different files (a copy to a local disk that is not complete, say), the same
index means different images, some images are never drawn and others twice, and nothing fails.
"""

from __future__ import annotations

import hashlib
import socket
from typing import Any, NamedTuple

import numpy as np

from dinov3 import distributed
from dinov3.utils.messages import list_names

#: So many names are digested, evenly spaced: a file more or less moves those after it, wherever it is.
N_DIGESTED = 2**16


class DataFingerprint(NamedTuple):
    """What tells two datasets apart.

    Attributes:
        n_images: length.
        names: digest of the names of the images, empty if they have none.
    """

    n_images: int
    names: str


def fingerprint(dataset: Any) -> DataFingerprint:
    """Return length and digest of a dataset with `len()` and, if it has one, `get_image_relpath(index)`."""
    n_images = len(dataset)
    if not hasattr(dataset, "get_image_relpath"):
        return DataFingerprint(n_images, "")
    digest = hashlib.sha256()
    for index in np.linspace(0, n_images - 1, num=min(n_images, N_DIGESTED), dtype=np.int64).tolist():
        digest.update(dataset.get_image_relpath(index).encode(errors="surrogateescape") + b"\0")
    return DataFingerprint(n_images, digest.hexdigest()[:16])


def check_same_on_all_ranks(dataset: Any, name: str) -> DataFingerprint:
    """Return the fingerprint of a dataset; all ranks call it.

    Args:
        dataset: as for `fingerprint`.
        name: what the error calls it.

    Raises:
        ValueError: on all ranks, if it is not the same on all of them.
    """
    own = fingerprint(dataset)
    everybody = distributed.get_default_process_group()
    ranks = distributed.all_gather_objects((own, socket.gethostname()), everybody)
    places: dict[DataFingerprint, list[str]] = {}
    for rank, (found, host) in enumerate(ranks):
        places.setdefault(found, []).append(f"{rank} ({host})")
    if len(places) == 1:
        return own
    if len({found.n_images for found in places}) > 1:
        counts = "; ".join(f"{found.n_images} images on rank {list_names(where)}" for found, where in places.items())
    else:
        groups = " and ".join(f"rank {list_names(where)}" for where in places.values())
        counts = f"{own.n_images} images on all ranks, but other names on {groups}"
    raise ValueError(
        f"{name} is not the same on all ranks: {counts}. Copy the data again where it is not complete, or read it from "
        "one shared directory"
    )


def describe_change(before: Any, now: DataFingerprint) -> str | None:
    """Return how a dataset differs from what it was when a run was saved, or None if it does not or nobody knows.

    Args:
        before: the fingerprint of then, perhaps as a list; None if it was not saved.
        now: that of today.
    """
    if before is None or DataFingerprint(*before) == now:
        return None
    then = DataFingerprint(*before)
    if then.n_images != now.n_images:
        return f"{then.n_images} training images before, {now.n_images} now"
    return f"{now.n_images} training images as before, but other names or another order"
