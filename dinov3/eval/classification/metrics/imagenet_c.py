"""Robustness to common corruptions: the mean corruption error of ImageNet-C (Hendrycks and Dietterich, ICLR 2019).

The errors at the five levels of a corruption are divided by those of AlexNet, and averaged over corruptions. Lower is
better, and 1 is as bad as AlexNet.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dinov3.eval.classification.metrics.counting import CountingMetric, target_rank

logger = logging.getLogger("dinov3")

N_LEVELS = 5

_ALEXNET_ERRORS = {
    "GAUSSIAN_NOISE": (0.69528, 0.82542, 0.93554, 0.98138, 0.99452),
    "SHOT_NOISE": (0.71224, 0.85108, 0.93574, 0.98182, 0.99146),
    "IMPULSE_NOISE": (0.78374, 0.89808, 0.9487, 0.9872, 0.99548),
    "DEFOCUS_BLUR": (0.65624, 0.73202, 0.85036, 0.91364, 0.94714),
    "GLASS_BLUR": (0.64308, 0.75054, 0.88806, 0.91622, 0.93344),
    "MOTION_BLUR": (0.5843, 0.70048, 0.82108, 0.8975, 0.92638),
    "ZOOM_BLUR": (0.70008, 0.76992, 0.80784, 0.84198, 0.87198),
    "SNOW": (0.71726, 0.88392, 0.86468, 0.9187, 0.94952),
    "FROST": (0.6139, 0.79734, 0.8879, 0.89942, 0.9343),
    "FOG": (0.67474, 0.7605, 0.84378, 0.8726, 0.945),
    "BRIGHTNESS": (0.4514, 0.48502, 0.54048, 0.62166, 0.7244),
    "CONTRAST": (0.64548, 0.7615, 0.88874, 0.9776, 0.9927),
    "ELASTIC_TRANSFORM": (0.52596, 0.70116, 0.55686, 0.64076, 0.80554),
    "PIXELATE": (0.52218, 0.5462, 0.73728, 0.87092, 0.91262),
    "JPEG_COMPRESSION": (0.51002, 0.54718, 0.57294, 0.65458, 0.74778),
    "SPECKLE_NOISE": (0.66192, 0.7444, 0.90246, 0.94548, 0.97268),
    "GAUSSIAN_BLUR": (0.54732, 0.70444, 0.82574, 0.89864, 0.9594),
    "SPATTER": (0.47196, 0.62194, 0.75052, 0.84132, 0.90182),
    "SATURATE": (0.59342, 0.65514, 0.51174, 0.70834, 0.8226),
}
#: Error of AlexNet by corruption and level (the release's name is misleading).
ALEXNET_INVERSE_SCORES = {name: dict(enumerate(errors, start=1)) for name, errors in _ALEXNET_ERRORS.items()}
#: Number of a (corruption, level) among all, by name.
CORRUPTION_LEVEL_TO_ID = {
    (name, level): N_LEVELS * place + level - 1
    for place, name in enumerate(sorted(ALEXNET_INVERSE_SCORES))
    for level in range(1, N_LEVELS + 1)
}
ID_TO_CORRUPTION_LEVEL = {number: pair for pair, number in CORRUPTION_LEVEL_TO_ID.items()}
#: What the corruption indices of targets mean, unless said otherwise.
CORRUPTION_TYPES = tuple(sorted((name.lower() for name in ALEXNET_INVERSE_SCORES), reverse=True))


def compute_relative_average_scores(
    accuracy: Mapping[str, Mapping[int, float]], reference: Mapping[str, Mapping[int, float]]
) -> float:
    """Average over corruptions their error relative to a reference.

    Args:
        accuracy: in [0, 1], by corruption and level; corruptions that the reference does not have are left out.
        reference: errors in [0, 1], by corruption and level.

    Returns:
        The mean, over the levels that occur; NaN without any.
    """
    relative = [
        sum(1 - value for value in levels.values()) / sum(reference[name][level] for level in levels)
        for name, levels in accuracy.items()
        if name in reference and levels
    ]
    return sum(relative) / len(relative) if relative else float("nan")


class ImageNet_C_Metric(CountingMetric):
    """Mean corruption error, as a fraction.

    Args:
        corruption_types: names in lower case, to which the corruption indices of targets refer.
    """

    ids: Tensor

    def __init__(self, corruption_types: Sequence[str] = CORRUPTION_TYPES) -> None:
        super().__init__(2, len(CORRUPTION_LEVEL_TO_ID))  # hits, samples
        unknown = [name for name in corruption_types if name.upper() not in ALEXNET_INVERSE_SCORES]
        if unknown:
            raise ValueError(f"unknown corruptions {', '.join(unknown)}; known are {', '.join(CORRUPTION_TYPES)}")
        first = [CORRUPTION_LEVEL_TO_ID[name.upper(), 1] for name in corruption_types]
        self.register_buffer("ids", torch.tensor(first), persistent=False)

    @property
    def tp(self) -> Tensor:
        """Hits by (corruption, level), int64 [95]."""
        return self.counts[0]

    @property
    def total(self) -> Tensor:
        """Samples by (corruption, level), int64 [95]."""
        return self.counts[1]

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count a batch.

        Args:
            preds: scores [B, C].
            target: int64 [B, 3]: class, corruption, level from 1 to 5.
        """
        label, corruption, level = target.unbind(dim=1)
        number = self.ids[corruption] + level - 1
        hits = target_rank(preds, label) == 0
        self.tp.scatter_add_(0, number, hits.long())
        self.total.scatter_add_(0, number, torch.ones_like(number))

    def compute(self) -> dict[str, Tensor]:
        """Return `{"top-1": mean corruption error}` over the samples of all processes."""
        tp, total = self.summed().tolist()
        accuracy: dict[str, dict[int, float]] = {}
        for number, (name, level) in ID_TO_CORRUPTION_LEVEL.items():
            if total[number]:
                accuracy.setdefault(name, {})[level] = tp[number] / total[number]
        n_covered = sum(len(levels) for levels in accuracy.values())
        if n_covered < len(total):
            logger.info("ImageNet-C: %d of %d corruptions and levels are covered", n_covered, len(total))
        return {"top-1": torch.tensor(compute_relative_average_scores(accuracy, ALEXNET_INVERSE_SCORES))}
