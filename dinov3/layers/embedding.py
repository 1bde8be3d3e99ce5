"""Learned vectors, such as the contents of queries."""

from __future__ import annotations

import torch
from torch import nn


def make_embedding(n_rows: int, dim: int) -> nn.Embedding:
    """Make trainable vectors [n_rows, dim], from a normal distribution; on the meta device nothing is initialised."""
    embedding = nn.Embedding.from_pretrained(torch.empty(n_rows, dim), freeze=False)
    if not embedding.weight.is_meta:  # On the meta device torch would import its compiler to do nothing.
        embedding.reset_parameters()
    return embedding
