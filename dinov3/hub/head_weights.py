"""Published heads on published backbones: what their hub entries have in common.

To add one, write a module beside this one (`classifiers.py` is the shortest to follow) with

1. an enumeration of the data that heads of this kind were trained on,
2. a `PublishedHead`: its backbone, its file, and where the head sits in the whole model,
3. a function that builds the whole model around a backbone, with the head on a given device,
4. the entry, decorated with `document_arguments`, which calls `load_published`;

then export the entry in `hubconf.py`, and add it to the entries in `tests/hub/test_hubconf.py`.

Notable: a head is built on the meta device and takes over the tensors of its file.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dinov3.heads.weights import head_entries, load_head_, read_head, set_aside
from dinov3.hub import backbones
from dinov3.hub.backbones import WeightsLike
from dinov3.hub.sources import BASE_URL, Source, check_file_hash, choose_weights, read_weights
from dinov3.utils.weight_files import WeightsError

logger = logging.getLogger("dinov3")

Model = TypeVar("Model", bound=nn.Module)
Entry = TypeVar("Entry", bound=Callable[..., Any])


@dataclass(frozen=True)
class PublishedHead:
    """A head that was published for one backbone.

    Attributes:
        entry: its hub entry.
        backbone: the hub entry of the backbone.
        weights: the data that the published head was trained on.
        file: the published file below `BASE_URL`, without `-<hash>.pth`.
        file_hash: first digits of the file's SHA-256.
        module: name of the head in the whole model, e.g. `decoder`. The backbone may be inside it: its entries are
            then those of the backbone, not of the head. Empty: the head is all but the backbone.
        defaults: entries that files of the head may lack, with a warning, and what they then are.
    """

    entry: str
    backbone: str
    weights: Enum
    file: str
    file_hash: str
    module: str
    defaults: Mapping[str, Tensor] = field(default_factory=dict)

    def url(self, file_hash: str | None = None) -> str:
        """Return the address of the published head, or of a version of it with another hash."""
        digits = check_file_hash(file_hash, [self.file_hash]) if file_hash else self.file_hash
        return f"{BASE_URL}/{self.file}-{digits}.pth"


def document_arguments(
    head: PublishedHead, *, returns: str, arguments: str = "", keywords: str = ""
) -> Callable[[Entry], Entry]:
    """Return a decorator that documents the arguments which all entries with a head share.

    Args:
        head: what the entry loads.
        returns: what the entry returns, in words that follow "A".
        arguments: lines about arguments that only this entry has, indented as in a docstring.
        keywords: what `**kwargs` also takes.
    """

    def decorate(entry: Entry) -> Entry:
        entry.__doc__ = f"""{entry.__doc__}

    Args:
        pretrained: load the weights of backbone and head; if False, initialise both at random and read nothing.
        weights: of the head: `{head.weights}` or its name; or a local path, a file:// or https:// URL, or a state
            dict. They may hold only the head,
            as published or as a training saved it, or the whole model.
        backbone_weights: of the backbone, as `weights=` of `{head.backbone}`.
        check_hash: compare both files with the SHA-256 digits at the end of their names.{arguments}
        **kwargs: as for `{head.backbone}`, e.g. `device` and `dtype`, which hold for the head too; `hash` selects
            another published head{keywords}.

    Returns:
        A {returns}, in evaluation mode, on the CPU unless `device` is given.

    Raises:
        FileNotFoundError: there is no such local file.
        ValueError: such weights were not published, or a file is not a checkpoint of its part of this model.
        ConnectionError: a download failed.
        TypeError: an unknown keyword, or one that this model fixes.
    """
        return entry

    return decorate


def load_published(
    published: PublishedHead,
    build: Callable[..., Model],
    *,
    pretrained: bool,
    weights: Enum | Source,
    backbone_weights: WeightsLike,
    check_hash: bool,
    **kwargs: Any,
) -> Model:
    """Build a backbone and the model around it, and load the weights of both.

    Args:
        published: which head on which backbone.
        build: makes the whole model, given the backbone, and as `head_device` the device to build the head on.
        pretrained: see `document_arguments`, as for all that follow.
        weights: of the head.
        backbone_weights: of the backbone.
        check_hash: of both files.
        **kwargs: of the backbone's entry, and `hash`.

    Returns:
        The model in evaluation mode.
    """
    target = f"the head of {published.entry}"
    selectors = {"hash": kwargs.pop("hash", None)}
    source = choose_weights(target, weights, [published.weights], pretrained=pretrained, selectors=selectors)
    make_backbone = getattr(backbones, published.backbone)
    backbone = make_backbone(pretrained=pretrained, weights=backbone_weights, check_hash=check_hash, **kwargs)
    parameter = next(backbone.parameters())
    # On the meta device nothing is initialised that the weights overwrite.
    model = build(backbone, head_device=torch.device("meta") if pretrained else parameter.device)
    head = model.get_submodule(published.module)
    # A backbone inside the head keeps the dtypes and the weights that it has.
    with set_aside(head, backbone) as inside:
        head.to(parameter.dtype)
        if pretrained:
            prefix, mmap = f"{published.module}." if published.module else "", kwargs.get("mmap")
            if isinstance(source, Mapping):
                entries, name = head_entries(source, prefix), "the state dict"
            else:
                entries, name = read_weights(
                    published.url(selectors["hash"]) if isinstance(source, Enum) else source,
                    lambda path: read_head(path, prefix=prefix, mmap=mmap),
                    check_hash=check_hash,
                    progress=kwargs.get("progress", True),
                )
            entries = {key: entry for key, entry in entries.items() if not inside or not key.startswith(inside)}
            if isinstance(source, Mapping):
                # Copied, because the head takes its tensors over.
                entries = {key: e.clone() if isinstance(e, Tensor) else e for key, e in entries.items()}
            for missing in published.defaults.keys() - entries.keys():
                logger.warning("%s lacks %s, which becomes %s", name, missing, published.defaults[missing].tolist())
                entries[missing] = published.defaults[missing].clone()
            _load_(head, entries, source=name, target=target)
            head.to(parameter.device)
    return model.eval()


def _load_(head: nn.Module, entries: dict[str, Any], *, source: str, target: str) -> None:
    try:
        load_head_(head, entries, source=source, target=target)
    except WeightsError as error:
        if any(entry.endswith("patch_embed.proj.weight") for entry in entries):
            hint = f"These are the weights of a backbone: pass them as backbone_weights=, and {target} as weights=."
            raise WeightsError(f"{error} {hint}") from error
        raise
