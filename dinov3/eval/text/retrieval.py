"""How well images and captions find each other: recall at k, with one or several captions per image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

KS = (1, 5, 10)
ROWS_PER_STEP = 1024


class ImagesOfCaptions:
    """The images of a data set of captions, with the index as target, because captions are read apart from them."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.dataset[index][0], index


def recalls(images: Tensor, texts: Tensor, owners: Tensor, ks: Sequence[int] = KS) -> dict[str, float]:
    """Compute recall at k both ways.

    Equal cosines count against a hit, so that vectors that are all equal find nothing.

    Args:
        images: [N, E], of length 1.
        texts: [T, E], of length 1.
        owners: [T], the image that each text describes; an image has one or several.
        ks: numbers of nearest texts or images that are looked at.

    Returns:
        `image to text R@k` and `text to image R@k` in percent. With fewer candidates than k, all are looked at.
    """
    images, owners = images.to(texts.device), owners.to(texts.device)
    text_ranks, image_ranks = [], []
    for first in range(0, len(images), ROWS_PER_STEP):
        cosines = images[first : first + ROWS_PER_STEP] @ texts.mT  # [n, T]
        own = owners == torch.arange(first, first + len(cosines), device=texts.device)[:, None]
        best = cosines.masked_fill(~own, -torch.inf).amax(dim=1, keepdim=True)
        text_ranks.append(((cosines >= best) & ~own).sum(dim=1))
    for few, few_owners in zip(texts.split(ROWS_PER_STEP), owners.split(ROWS_PER_STEP), strict=True):
        cosines = few @ images.mT  # [t, N]
        image_ranks.append((cosines >= cosines.gather(1, few_owners[:, None])).sum(dim=1) - 1)
    directions = {"image to text": torch.cat(text_ranks), "text to image": torch.cat(image_ranks)}
    return {f"{name} R@{k}": 100 * float((ranks < k).double().mean()) for name, ranks in directions.items() for k in ks}
