"""The set loss of mask classification (Mask2Former, arXiv 2112.01527, sections 3.3 and 4.1).

Each query predicts a class and a mask. A query is assigned to each object of an image so that the sum of the costs is
smallest (Hungarian matching); assigned queries learn the class and the mask of their object, the others "no object".
Masks are compared at sampled points, not at all pixels, which takes a third of the memory.

Notable:
- Each prediction, after every layer of the decoder, is matched and learns on its own (deep supervision).
- For the matching all masks of an image are compared at the same uniform points; for the loss each mask has its own
  points, most of them where the prediction is the least certain.
- Sums are divided by counts over all processes, so several processes have the mean loss of one on the whole batch.
- Unlike the published training, pixels that are not valid (unlabelled, crowds, padding) do not count at all; there they
  are "not in any mask". Without such pixels both are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from dinov3 import distributed


class MaskClassificationLoss(nn.Module):
    """Compare sets of predicted classes and masks with the objects of images.

    Args:
        num_classes: K, without "no object".
        class_weight: of the cross entropy, in the loss and in the costs of the matching.
        mask_weight: of the binary cross entropy of masks.
        dice_weight: of the dice loss of masks.
        no_object_weight: of "no object" in the cross entropy of classes.
        n_points: at which a mask is compared.
        oversampling: for each point that is kept as uncertain, so many are drawn.
        importance: share of the points that are uncertain ones; the others are uniform.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        class_weight: float = 2.0,
        mask_weight: float = 5.0,
        dice_weight: float = 5.0,
        no_object_weight: float = 0.1,
        n_points: int = 12544,
        oversampling: float = 3.0,
        importance: float = 0.75,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.weights = (class_weight, mask_weight, dice_weight)
        self.no_object_weight = no_object_weight
        self.n_points = n_points
        self.oversampling = oversampling
        self.importance = importance

    def forward(
        self,
        outputs: Mapping[str, Any],
        classes: Sequence[Tensor],
        masks: Sequence[Tensor],
        *,
        valid: Tensor | None = None,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """Sum the losses of all predictions; all processes call it.

        Args:
            outputs: `pred_logits` [B, Q, K + 1], whose last class is "no object", `pred_masks`, logits [B, Q, h, w],
                and `aux_outputs`, a list of more such predictions.
            classes: of each image int64 [G], from 0 to K - 1; G is the number of its objects, which may be 0.
            masks: of each image bool [G, H, W].
            valid: bool [B, H, W], pixels that count. Default: all.
            generators: of each image, for the points. Default: the global one.

        Returns:
            0-dim float32.

        Raises:
            ValueError: a class is out of range.
        """
        for ids in classes:
            if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.num_classes:
                raise ValueError(
                    f"objects of the classes {ids.unique().tolist()}: expected classes from 0 to {self.num_classes - 1}"
                )
        predictions = [outputs, *outputs.get("aux_outputs", ())]
        n_queries = outputs["pred_logits"].shape[1]
        n_matched = sum(min(len(ids), n_queries) for ids in classes)
        n_unmatched = len(classes) * n_queries - n_matched
        counts = torch.tensor(
            [n_matched, n_matched + self.no_object_weight * n_unmatched], device=outputs["pred_logits"].device
        )
        n_masks, class_norm = distributed.all_reduce(counts, "mean")
        with torch.autocast(outputs["pred_logits"].device.type, enabled=False):
            total = outputs["pred_logits"].new_zeros((), dtype=torch.float32)
            for prediction in predictions:
                for i, (ids, targets) in enumerate(zip(classes, masks, strict=True)):
                    class_loss, mask_loss, dice_loss = self._image_losses(
                        prediction["pred_logits"][i].float(),
                        prediction["pred_masks"][i].float(),
                        ids,
                        targets.float(),
                        None if valid is None else valid[i],
                        None if generators is None else generators[i],
                    )
                    class_weight, mask_weight, dice_weight = self.weights
                    total = total + class_weight * class_loss / class_norm
                    total = total + (mask_weight * mask_loss + dice_weight * dice_loss) / n_masks.clamp(min=1)
        return total

    def _image_losses(
        self,
        logits: Tensor,
        masks: Tensor,
        classes: Tensor,
        targets: Tensor,
        valid: Tensor | None,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Sums over the queries, and over the objects, of one image.
        queries, objects = self._match(logits, masks, classes, targets, valid, generator)
        labels = torch.full((len(logits),), self.num_classes, device=logits.device)
        labels[queries] = classes[objects]
        class_weights = torch.where(labels == self.num_classes, self.no_object_weight, 1.0)
        class_loss = (F.cross_entropy(logits, labels, reduction="none") * class_weights).sum()
        if not len(queries):
            return class_loss, 0 * masks.sum(), 0 * masks.sum()  # every output takes part in every step
        masks, targets = masks[queries], targets[objects]
        points = self._uncertain_points(masks.detach(), generator)
        mask_losses, dice_losses = point_losses(
            values_at(masks, points), values_at(targets, points), _valid_at(valid, points)
        )
        return class_loss, mask_losses.sum(), dice_losses.sum()

    @torch.no_grad()
    def _match(
        self,
        logits: Tensor,
        masks: Tensor,
        classes: Tensor,
        targets: Tensor,
        valid: Tensor | None,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor]:
        if not len(classes):
            return classes, classes
        points = torch.rand(1, self.n_points, 2, generator=generator, device=masks.device)
        mask_costs, dice_costs = pairwise_costs(
            values_at(masks, points), values_at(targets, points), _valid_at(valid, points)[0]
        )
        class_weight, mask_weight, dice_weight = self.weights
        class_costs = -logits.softmax(dim=-1)[:, classes]  # [Q, G]
        costs = class_weight * class_costs + mask_weight * mask_costs + dice_weight * dice_costs
        # What is not finite cannot be matched; the loss itself then is not finite either, which the training reports.
        pairs = linear_sum_assignment(costs.nan_to_num(nan=1e6, posinf=1e6, neginf=-1e6).cpu().numpy())
        queries, objects = (torch.as_tensor(indices, device=masks.device) for indices in pairs)
        return queries, objects

    def _uncertain_points(self, masks: Tensor, generator: torch.Generator | None) -> Tensor:
        # [N, P, 2] for masks [N, h, w]
        n_uncertain = int(self.importance * self.n_points)
        n_drawn = int(self.oversampling * self.n_points)
        drawn = torch.rand(len(masks), n_drawn, 2, generator=generator, device=masks.device)
        nearest_to_boundary = values_at(masks, drawn).abs().topk(n_uncertain, largest=False).indices
        uncertain = drawn.gather(1, nearest_to_boundary[..., None].expand(-1, -1, 2))
        n_uniform = self.n_points - n_uncertain
        uniform = torch.rand(len(masks), n_uniform, 2, generator=generator, device=masks.device)
        return torch.cat([uncertain, uniform], dim=1)


def point_losses(logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the binary cross entropy and the dice loss of pairs of masks at points.

    Args:
        logits: [N, P].
        targets: [N, P], in [0, 1].
        weights: of the points, broadcast to [N, P].

    Returns:
        Two tensors [N].
    """
    weights = weights.expand_as(logits)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    mask_losses = (cross_entropy * weights).sum(-1) / weights.sum(-1).clamp(min=1)
    probabilities = logits.sigmoid() * weights
    intersection = (probabilities * targets).sum(-1)
    # One more than the sums, so that masks without a point have a loss.
    dice_losses = 1 - (2 * intersection + 1) / (probabilities.sum(-1) + (targets * weights).sum(-1) + 1)
    return mask_losses, dice_losses


def pairwise_costs(logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `point_losses` of all pairs of Q predictions [Q, P] and G objects [G, P], points weighted by [P].

    Returns:
        Two tensors [Q, G].
    """
    weighted_targets = (targets * weights).mT  # [P, G]
    if_outside = F.softplus(logits) @ weights  # [Q], the cross entropy of a mask that is nowhere
    mask_costs = (if_outside[:, None] - logits @ weighted_targets) / weights.sum().clamp(min=1)
    probabilities = logits.sigmoid()
    sums = (probabilities @ weights)[:, None] + weighted_targets.sum(0)
    return mask_costs, 1 - (2 * probabilities @ weighted_targets + 1) / (sums + 1)


def values_at(maps: Tensor, points: Tensor, *, mode: str = "bilinear") -> Tensor:
    """Read maps [N, h, w] at points [N, P, 2] or [1, P, 2], (x, y) in [0, 1] from corner to corner: [N, P]."""
    grid = (2 * points - 1).expand(len(maps), -1, -1)[:, None]
    return F.grid_sample(maps[:, None], grid, mode=mode, padding_mode="border", align_corners=False)[:, 0, 0]


def _valid_at(valid: Tensor | None, points: Tensor) -> Tensor:
    # [N, P]: 1 where a point counts, otherwise 0
    if valid is None:
        return points.new_ones(points.shape[:2])
    return values_at(valid.float()[None].expand(len(points), -1, -1), points, mode="nearest")
