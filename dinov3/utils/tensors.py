"""Token lists of different lengths, concatenated for one matrix product and split again; where new tensors go."""

from __future__ import annotations

import torch
from torch import Tensor


def cat_keep_shapes(x_list: list[Tensor]) -> tuple[Tensor, list[torch.Size], list[int]]:
    """Concatenate tensors after flattening all their dimensions but the last.

    Args:
        x_list: tensors [..., D] that agree in D; at least one.

    Returns:
        The rows [sum of n_i, D] (a view of the input if there is only one), the shapes of the inputs, and their numbers
        of rows n_i. `uncat_with_shapes` takes the three back.
    """
    flat = [x.flatten(0, -2) for x in x_list]
    return flat[0] if len(flat) == 1 else torch.cat(flat), [x.shape for x in x_list], [len(x) for x in flat]


def uncat_with_shapes(flat: Tensor, shapes: list[torch.Size], num_tokens: list[int]) -> list[Tensor]:
    """Undo `cat_keep_shapes`, also after a projection that changed the last dimension.

    Args:
        flat: [sum of num_tokens, D'].
        shapes: the shapes [..., D] of the entries; their last dimension is not used.
        num_tokens: the number of rows of each entry.

    Returns:
        Views of `flat` of shapes [..., D'].
    """
    return [rows.unflatten(0, shape[:-1]) for rows, shape in zip(flat.split(num_tokens), shapes, strict=True)]


def default_device() -> torch.device:
    """Return where `torch.empty` and its like put new tensors now; inside `with torch.device("meta")`, that device."""
    # Before PyTorch 2.8, torch.get_default_device() does not see such a region.
    return torch.empty(0).device
