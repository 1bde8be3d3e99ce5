"""Weights of the published heads: from what users give as `weights=` to the head.

Notable: a head is built on the meta device and takes over the tensors of its file, which stay mapped.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from enum import Enum
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dinov3.heads.weights import head_entries, load_head_, read_head
from dinov3.hub.sources import is_download, locate
from dinov3.utils.weight_files import WeightsError

Head = TypeVar("Head", bound=nn.Module)
Published = TypeVar("Published", bound=Enum)

WeightsFrom = str | os.PathLike[str] | Mapping[str, Tensor]


def choose_weights(
    target: str,
    weights: Enum | WeightsFrom,
    choices: type[Published],
    *,
    available: Collection[Published],
    pretrained: bool,
    file_hash: str | None,
) -> Published | WeightsFrom:
    """The published weights that are meant, or where others are.

    Args:
        target: what the head is, for error messages.
        weights: what the user gave.
        choices: the enumeration of all published weights of such heads.
        available: those of this head.
        pretrained: whether they are read at all.
        file_hash: chooses another published file, if given.

    Returns:
        A member of `available`, or `weights`.

    Raises:
        ValueError: they were not published for this head; or weights from elsewhere that are not read, or with a hash.
        TypeError: weights of another type.
    """
    if isinstance(weights, str) and weights.upper() in choices.__members__:
        weights = choices[weights.upper()]
    if isinstance(weights, Enum):
        published = next((member for member in available if member is weights), None)
        if published is None:
            names = ", ".join(str(member) for member in available)
            raise ValueError(f"{target} was not published with {weights}, only with {names}")
        return published
    if not isinstance(weights, str | os.PathLike | Mapping):
        raise TypeError(
            f"{target}: weights must be a {choices.__name__}, a path, a URL or a state dict, got {weights!r}"
        )
    if not pretrained:
        raise ValueError(f"{target}: weights are given, but pretrained=False reads none; leave out one of the two")
    if file_hash:
        raise ValueError(f"{target}: hash chooses among published files, but weights are given")
    return weights


def load_head(
    head: Head,
    weights: WeightsFrom,
    *,
    target: str,
    prefix: str,
    device: torch.device,
    check_hash: bool,
    options: Mapping[str, Any],
) -> Head:
    """A head that was built on the meta device, with its weights.

    Args:
        head: changed in place.
        weights: a path, a URL or a state dict: of the head, or of a whole model.
        target: what the head is, for error messages.
        prefix: of the head's entries in the state dict of a whole model.
        device: where the head goes.
        check_hash: compare a file with the SHA-256 digits at the end of its name.
        options: `progress` and `mmap`, as for a backbone's file.

    Returns:
        `head`.

    Raises:
        FileNotFoundError: there is no such local file.
        WeightsError: the file is damaged, or not of this head.
        ConnectionError: the download failed.
    """
    entries, source = _read(weights, prefix, check_hash, options)
    try:
        return load_head_(head, entries, source=source, target=target).to(device)
    except WeightsError as error:
        if any(name.endswith("patch_embed.proj.weight") for name in entries):
            hint = f"It is a backbone: give it as backbone_weights=, and {target} alone as weights=."
            raise WeightsError(f"{error} {hint}") from error
        raise


def _read(
    weights: WeightsFrom, prefix: str, check_hash: bool, options: Mapping[str, Any]
) -> tuple[dict[str, Any], str]:
    if isinstance(weights, Mapping):
        entries = head_entries(weights, prefix)
        # Copied, because the head takes its tensors over.
        copies = {name: entry.clone() if isinstance(entry, Tensor) else entry for name, entry in entries.items()}
        return copies, "the state dict"
    path = locate(weights, check_hash=check_hash, progress=options.get("progress", True))
    try:
        return read_head(path, prefix=prefix, mmap=options.get("mmap", True)), str(path)
    except WeightsError as error:
        if is_download(weights):
            raise WeightsError(f"{error} (It lies in the cache: delete it there to download it again.)") from error
        raise
