"""Whose names the entries of a state dict have: told by the names themselves, and exchanged by a table.

A table goes from our names to another library's. It holds a name with {} for each index, or the name of a module, then
with the names of its weight and bias as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Library = Literal["huggingface", "timm"]
Family = Literal["vit", "convnext"]
State = dict[str, Tensor]
Table = Mapping[str, str]

#: Of the published models; both libraries use the same, and it is not written in the weights.
LAYER_NORM_EPS: dict[Family, float] = {"vit": 1e-5, "convnext": 1e-6}
#: Classifiers that a fine-tuned model may have on top.
_CLASSIFIERS = ("head.weight", "head.bias", "head.fc.", "classifier.")
_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class Layout:
    """How weights are named.

    Attributes:
        library: whose names.
        family: which kind of model.
        prefix: before all names of the backbone, where it is a part of a larger model.
    """

    library: Library
    family: Family
    prefix: str = ""

    def __str__(self) -> str:
        return {"huggingface": "Hugging Face transformers", "timm": "timm"}[self.library]


def detect(names: Iterable[str]) -> Layout | None:
    """Which other library's layout the names of a state dict belong to; None: none of them."""
    names = set(names)
    for name in names:
        if name.endswith("embeddings.patch_embeddings.weight"):
            return Layout("huggingface", "vit", name.removesuffix("embeddings.patch_embeddings.weight"))
        if name.endswith("stages.0.downsample_layers.0.weight"):
            prefix = name.removesuffix("stages.0.downsample_layers.0.weight")
            # In memory, "model." is a level of the backbone that its final norm is not on.
            return Layout("huggingface", "convnext", prefix.removesuffix("model."))
    if "reg_token" in names or "blocks.0.gamma_1" in names:
        return Layout("timm", "vit")
    if {"stem.0.weight", "stages.0.blocks.0.conv_dw.weight"} <= names:
        return Layout("timm", "convnext")
    return None


def own_entries(state: Mapping[str, Tensor], layout: Layout) -> State:
    """The backbone's entries without the prefix; what else a larger model has, and classifiers, are left out."""
    theirs: State = {}
    for name, tensor in state.items():
        if name.startswith(layout.prefix):
            name = name.removeprefix(layout.prefix)
        elif not name.startswith(("layer.", "stages.", "model.layer.", "model.stages.")):
            continue
        if layout.library == "huggingface":
            name = re.sub(r"^model\.(?=layer\.|stages\.)", "", name)
        if not name.startswith(_CLASSIFIERS):
            theirs[name] = tensor
    return theirs


def rename(state: Mapping[str, Tensor], table: Table) -> State:
    """The entries by the names of a table; those that it does not know keep theirs."""
    return {_renamed(name, table): tensor for name, tensor in state.items()}


def inverted(table: Table) -> Table:
    """The table back to our names."""
    return {theirs: ours for ours, theirs in table.items()}


def _renamed(name: str, table: Table) -> str:
    indices = _INDEX.findall(name)
    for pattern in (name, _INDEX.sub("{}", name)):
        module, _, leaf = pattern.rpartition(".")
        if pattern in table:
            return table[pattern].format(*indices)
        if module in table and leaf in ("weight", "bias"):
            return f"{table[module].format(*indices)}.{leaf}"
    return name
