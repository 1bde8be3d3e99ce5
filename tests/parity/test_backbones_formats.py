"""Names, dtypes and shapes of the published models in the layouts of transformers and timm, as those have them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dinov3.hub.formats.conversion import from_release, to_release
from dinov3.hub.formats.layouts import Library, detect

from .state_dicts import Entry, read_manifest

#: Library, hub entry, and whether the bias of queries and values is zero, which timm leaves out.
MANIFESTS: dict[str, tuple[Library, str, bool]] = {
    "transformers_vits16": ("huggingface", "dinov3_vits16", False),
    "transformers_vits16plus": ("huggingface", "dinov3_vits16plus", False),
    "transformers_vit7b16": ("huggingface", "dinov3_vit7b16", False),
    "transformers_convnext_tiny": ("huggingface", "dinov3_convnext_tiny", False),
    "timm_vits16": ("timm", "dinov3_vits16", True),
    "timm_vits16_qkvb": ("timm", "dinov3_vits16", False),
    "timm_vits16plus_qkvb": ("timm", "dinov3_vits16plus", False),
    "timm_vit7b16": ("timm", "dinov3_vit7b16", False),
    "timm_convnext_tiny": ("timm", "dinov3_convnext_tiny", False),
}
LARGEST_REAL = 2**16


def state_of(manifest: str, *, zero_bias: bool = False) -> dict[str, Tensor]:
    """A state dict of a list; matrices are on the meta device, because only their names and shapes matter."""
    state = {}
    for name, (dtype, shape) in read_manifest(manifest).items():
        is_large = torch.Size(shape).numel() > LARGEST_REAL
        state[name] = torch.ones(shape, dtype=getattr(torch, dtype), device="meta" if is_large else "cpu")
        if name == "rope_embed.periods":
            state[name] = 100 ** (torch.arange(shape[0]) / shape[0])
        elif name.endswith(("qkv.bias", "qkv.bias_mask")):
            state[name].view(3, -1)[1] = 0  # Keys have none.
            state[name] *= 0 if zero_bias else 1
    return state


def entries_of(state: dict[str, Tensor]) -> dict[str, Entry]:
    return {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in state.items()}


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_names_that_are_written_are_those_of_the_library(manifest: str) -> None:
    library, entry, zero_bias = MANIFESTS[manifest]
    found = from_release(state_of(entry, zero_bias=zero_bias), library).state
    assert entries_of(found) == read_manifest(manifest)


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_names_of_the_library_become_the_published_ones(manifest: str) -> None:
    library, entry, _ = MANIFESTS[manifest]
    state = state_of(manifest)
    layout = detect(state)
    assert layout is not None and layout.library == library
    wanted = read_manifest(entry)
    # Other libraries have no place for the norm of local crops, which no forward outside a training uses.
    wanted = {name: value for name, value in wanted.items() if not name.startswith("local_cls_norm.")}
    assert entries_of(to_release(state)) == wanted
