"""Several students of one frozen teacher in one job (arXiv 2508.10104, section 6).

Each student has a subgroup of the processes, sized so that all take equally long. All processes run the teacher, each
on its part of the batch; then every student gets all images and what the teacher says of them. The teacher's cost per
student falls with the number of students.

Notable:
- What travels is normalised bottlenecks, a few hundred numbers, and not logits over 100 000 prototypes; of the patches
  only those that the receiver has masked; and every process is sent only its own share.
- The last layers of the teacher's heads then run where the student is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dinov3 import distributed
from dinov3.distributed import distribute_to_subgroups, get_default_process_group, rows_of_ranks, send_rows
from dinov3.train.ssl_meta_arch import N_GLOBAL_CROPS, SSLMetaArch


class MultiDistillationMetaArch(SSLMetaArch):
    """The student of this process's subgroup, its EMA, and the teacher that it shares with the other students.

    Args:
        cfg: the configuration of this student (see `dinov3.configs.setup_multidistillation`).

    Raises:
        ValueError: the configuration contradicts itself.
    """

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        if not cfg.distillation.enabled:
            raise ValueError("MODEL.META_ARCHITECTURE=MultiDistillationMetaArch needs distillation.enabled=true")
        if cfg.gram.use_loss:
            raise ValueError("gram.use_loss=true: Gram anchoring has no part in multi-distillation; set it to false")

    def forward_backward(
        self, data: dict[str, Any], *, teacher_temp: float, iteration: int = 0
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Run one forward and backward pass, as `SSLMetaArch.forward_backward` does.

        Args:
            data: B images, of which those beyond `global_batch_size` over all processes are cut off; masks bool [2n, P]
                for the n images of this process of the student.
            teacher_temp: temperature of the teacher's targets, > 0.
            iteration: absolute training iteration.

        Returns:
            The total loss, and the terms with `batch_size`, which is B.
        """
        # `global_batch_size` counts the images of a step, which may have several batches.
        self.global_batch_size: int = data["global_batch_size"] // self.cfg.train.grad_accumulation_steps
        total_loss, terms = super().forward_backward(data, teacher_temp=teacher_temp, iteration=iteration)
        return total_loss, {"batch_size": len(data["collated_global_crops"]) // N_GLOBAL_CROPS} | terms

    def exchange_crops(self, crops: Tensor) -> Tensor:
        """Swap crops [n_crops, B, ...] of this process's images for the [n_crops, n, ...] that its student sees."""
        return distribute_to_subgroups(crops, 1, self.global_batch_size)

    def teacher_logits(self, features: dict[str, Tensor], mask_indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of the n images that the student sees in this process; see `SSLMetaArch`."""
        dino_head, ibot_head = self.teacher["dino_head"], self.teacher["ibot_head"]
        cls = dino_head(features["x_norm_clstoken"], no_last_layer=True).unflatten(0, (N_GLOBAL_CROPS, -1))
        cls = distribute_to_subgroups(cls, 1, self.global_batch_size).flatten(0, 1)  # [2n, bottleneck]
        outgoing, n_to, senders = self._plan_of_patches(features["x_norm_patchtokens"], mask_indices)
        n_from = senders.bincount(minlength=len(n_to)).tolist()
        received = send_rows(ibot_head(outgoing, no_last_layer=True), n_to, n_from)
        patches = torch.empty_like(received)
        patches[senders.argsort(stable=True)] = received  # [M, bottleneck], in the order of mask_indices
        return dino_head(cls, only_last_layer=True), ibot_head(patches, only_last_layer=True)

    def _plan_of_patches(self, tokens: Tensor, mask_indices: Tensor) -> tuple[Tensor, list[int], Tensor]:
        # Own patch tokens [n, D] in the order of their receivers, how many for each, and who sends the wanted ones.
        n_images, n_patches = len(tokens) // N_GLOBAL_CROPS, tokens.shape[1]
        rank = distributed.get_rank()
        shares = rows_of_ranks(self.global_batch_size)
        wanted_by_rank = distributed.gather_all_tensors(mask_indices, get_default_process_group())
        outgoing: list[Tensor] = []
        for wanted, share in zip(wanted_by_rank, shares, strict=True):
            crops, images, patches = _places(wanted, share, n_patches)
            is_here = images // n_images == rank
            rows = (crops * n_images + images - rank * n_images) * n_patches + patches
            outgoing.append(rows[is_here])
        own_images = _places(mask_indices, shares[rank], n_patches)[1]
        selected = tokens.flatten(0, 1).index_select(0, torch.cat(outgoing))
        return selected, [len(rows) for rows in outgoing], own_images // n_images


def _places(indices: Tensor, images: range, n_patches: int) -> tuple[Tensor, Tensor, Tensor]:
    # Crop, image of the whole batch, and patch of positions in the flattened [2, len(images), P] patches.
    of_crop = len(images) * n_patches
    return indices // of_crop, images.start + indices // n_patches % len(images), indices % n_patches
