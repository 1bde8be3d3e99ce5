"""The contrastive loss of images and texts (CLIP, arXiv 2103.00020, section 2.3), for batches on many processes.

Notable:
- Each process returns the loss of its own pairs against the images and texts of all processes; the mean over the
  processes is the usual symmetric loss of the whole batch. Gradients of the other processes' losses are included.
- The logits are handled in blocks of rows, and computed again in the backward pass where all of them would be large:
  only texts and the normalisers of texts are exchanged, and no softmax is ever held as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from dinov3.distributed import all_gather_with_grad, get_process_subgroup, get_rank

#: Rows of logits that are handled at once.
N_ROWS = 128
#: Logits are kept for the backward pass if there are at most so many (256 MiB).
N_KEPT = 2**26


def contrastive_loss(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, *, group: ProcessGroup | None = None
) -> Tensor:
    """Compute the symmetric cross entropy of pairs of images and texts.

    Args:
        image_features: [n, E], usually of length 1; converted to float32.
        text_features: [n, E], of the texts that belong to the images; n is equal on all processes.
        logit_scale: factor of the logits, shape [1] or [].
        group: the processes that share negatives. Default: all.

    Returns:
        0-dim float32: the mean over the pairs of this process.

    Raises:
        ValueError: features of different shapes.
    """
    if image_features.shape != text_features.shape or image_features.ndim != 2:
        raise ValueError(
            f"expected features [pairs, channels] of as many texts as images, got {list(image_features.shape)} of "
            f"images and {list(text_features.shape)} of texts"
        )
    group = group or get_process_subgroup()
    with torch.autocast(image_features.device.type, enabled=False):
        arguments = (image_features.float(), text_features.float(), logit_scale.float().reshape(()), group)
        return cast(Tensor, _ContrastiveLoss.apply(*arguments))


class _ContrastiveLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, texts: Tensor, scale: Tensor, group: ProcessGroup | None) -> Tensor:
        n = len(images)
        all_texts = all_gather_with_grad(texts, group)  # [N, E]
        kept: list[Tensor] | None = [] if n * len(all_texts) <= N_KEPT else None
        image_lse = images.new_empty(n)  # logarithm of each image's normaliser, over all texts
        text_lse = images.new_full([len(all_texts)], -torch.inf)  # the same of each text, over the images so far
        matching = scale * (images * texts).sum(dim=1)  # [n]
        for rows in _blocks(n):
            logits = scale * images[rows] @ all_texts.mT  # [rows, N]
            image_lse[rows] = logits.logsumexp(dim=1)
            text_lse = torch.logaddexp(text_lse, logits.logsumexp(dim=0))
            if kept is not None:
                kept.append(logits)
        text_lse = all_gather_with_grad(text_lse[None], group).logsumexp(dim=0)
        first = get_rank(group) * n if group else 0
        ctx.save_for_backward(images, texts, all_texts, scale, image_lse, text_lse)
        ctx.kept, ctx.group, ctx.first = kept, group, first
        return (image_lse + text_lse[first : first + n] - 2 * matching).sum() / (2 * n)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        images, texts, all_texts, scale, image_lse, text_lse = ctx.saved_tensors
        n, own = len(images), gradients[0] / (2 * len(images))
        # A text belongs to the loss of its own process, whose gradient may have another factor.
        of_texts = all_gather_with_grad(own.reshape(1), ctx.group).repeat_interleave(n)  # [N]
        image_gradient = torch.empty_like(images)
        text_gradient = torch.zeros_like(all_texts)
        scale_gradient = torch.zeros_like(scale)
        for index, rows in enumerate(_blocks(n)):
            logits = ctx.kept[index] if ctx.kept is not None else scale * images[rows] @ all_texts.mT
            share = own * (logits - image_lse[rows, None]).exp() + of_texts * (logits - text_lse).exp()  # [rows, N]
            of_pairs = torch.arange(ctx.first + rows.start, ctx.first + rows.stop, device=images.device)
            share[torch.arange(len(share), device=images.device), of_pairs] -= 2 * own
            scale_gradient += (share * logits).sum()
            share *= scale
            torch.mm(share, all_texts, out=image_gradient[rows])
            text_gradient.addmm_(share.mT, images[rows])
        if ctx.group:
            own_gradient = torch.empty_like(texts)
            dist.reduce_scatter_tensor(own_gradient, text_gradient, group=ctx.group)
            text_gradient = own_gradient
        return image_gradient, text_gradient, scale_gradient / scale, None


def _blocks(n: int) -> Iterator[slice]:
    return (slice(start, min(start + N_ROWS, n)) for start in range(0, n, N_ROWS))
