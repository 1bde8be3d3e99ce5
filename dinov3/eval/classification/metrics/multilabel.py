"""Metrics of problems with several classes per sample, given as multi-hot rows."""

from __future__ import annotations

import torch
from torch import Tensor

from dinov3 import distributed
from dinov3.eval.classification.metrics.classification import AveragingMethod, CountingMetric
from dinov3.eval.classification.metrics.curves import ScoresMetric, precision_recall_points

THRESHOLD = 0.5
VOC2007_RECALLS = 11


class MultilabelF1(CountingMetric):
    """F1 at probability 1/2; scores are probabilities if all of them lie in [0, 1], else logits.

    Args:
        num_classes: number of score columns.
        average: `MEAN_MULTILABEL_F1` or `MEAN_PER_CLASS_MULTILABEL_F1`.
    """

    counts: Tensor
    n_outside: Tensor

    def __init__(self, num_classes: int, average: AveragingMethod) -> None:
        super().__init__()
        self.average = average
        # Hits and positive predictions, of scores as probabilities and as logits; positive targets.
        self.add_counter("counts", 5, num_classes)
        self.add_counter("n_outside")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count a batch of scores [B, C] and multi-hot targets [B, C]."""
        is_positive = target > 0
        said = [preds > THRESHOLD, preds > 0]
        parts = [part for positive in said for part in (positive & is_positive, positive)]
        self.counts += torch.stack([*parts, is_positive]).sum(dim=1)
        self.n_outside += ((preds < 0) | (preds > 1)).sum()

    def compute(self) -> dict[str, Tensor]:
        """`{"top-1": F1}` over the samples of all processes; a class never said nor present counts as 0."""
        counts, n_outside = (distributed.all_reduce(t.clone()) for t in (self.counts, self.n_outside))
        hits, said = counts[2:4].double() if n_outside > 0 else counts[:2].double()
        both = said + counts[4]
        if self.average is AveragingMethod.MEAN_MULTILABEL_F1:
            hits, both = hits.sum(), both.sum()
        return {"top-1": (2 * hits / both.clamp(min=1)).mean().float()}


class MacroAveragePrecision(ScoresMetric):
    """Mean over classes of the area under the precision-recall steps; 0 for a class without positives."""

    def compute(self) -> dict[str, Tensor]:
        """`{"top-1": mean average precision}` over the samples of all processes."""
        scores, targets = self.gather()
        columns = zip(scores.T, targets.T > 0, strict=True)
        return {"top-1": torch.stack([_average_precision(*column) for column in columns]).mean()}


class MeanAveragePrecisionVOC2007(ScoresMetric):
    """Mean over classes of the 11-point interpolated average precision of PASCAL VOC 2007.

    Args:
        num_classes: number of score columns.
        add_point: let precision 1 at recall 0 count as a point, as published figures do. It adds up to 1/11.
    """

    def __init__(self, num_classes: int, add_point: bool = True) -> None:
        super().__init__(num_classes)
        self.add_point = add_point

    def compute(self) -> dict[str, Tensor]:
        """`{"top-1": mean average precision}` over the samples of all processes."""
        scores, targets = self.gather()
        columns = zip(scores.T, targets.T > 0, strict=True)
        return {"top-1": torch.stack([self._interpolated_precision(*column) for column in columns]).mean()}

    def _interpolated_precision(self, scores: Tensor, is_positive: Tensor) -> Tensor:
        precision = recall = scores[:0]
        if is_positive.any():
            precision, recall = precision_recall_points(scores, is_positive)
        if self.add_point:
            precision, recall = torch.cat([precision, scores.new_ones(1)]), torch.cat([recall, scores.new_zeros(1)])
        levels = torch.linspace(0, 1, VOC2007_RECALLS, device=scores.device)
        reached = torch.where(recall >= levels[:, None], precision, 0.0)  # [11, K]
        return reached.amax(dim=1).mean() if len(precision) else scores.new_zeros(())


def _average_precision(scores: Tensor, is_positive: Tensor) -> Tensor:
    if not is_positive.any():
        return scores.new_zeros(())
    precision, recall = precision_recall_points(scores, is_positive)
    return (precision * recall.diff(prepend=recall.new_zeros(1))).sum()
