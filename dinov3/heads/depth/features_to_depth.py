"""From a head's outputs to metres: a depth as the mean of depth bins, weighted per pixel (AdaBins, arXiv 2011.14141).

Notable:
- Every strategy is a ratio of two sums over the bins: sum_k b_k (a(x_k) + e) / sum_k (a(x_k) + e). Both sums are one
  product with a matrix [2, K], so that neither weights nor weighted bins are ever stored.
- Everything is in float32, even under autocast: bfloat16 has no numbers between 4 and 4.03 m.
- The canopy height model CHMv2 was trained on depths divided by 8. Its bins are scaled down and its norm scales up
  again, so only use them together.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dinov3.heads.precision import autocast_to
from dinov3.utils.messages import check_choice

logger = logging.getLogger("dinov3")

MIXLOG = "chmv2_mixlog"
#: Depths of CHMv2 in training, over those in metres.
MIXLOG_SCALE = 8.0


def create_chmv2_mixlog_bins(
    min_depth: float, max_depth: float, n_bins: int, device: torch.device | str | None = None
) -> Tensor:
    """Return bin centres [n_bins], float32, that go from logarithmic to linear spacing, of depths divided by 8.

    Args:
        min_depth: centre of the first bin, above 0.
        max_depth: 8 times the centre of the last bin.
        n_bins: K.
        device: of the result.
    """
    lowest, highest = min_depth, max_depth / MIXLOG_SCALE
    linear = _linear_bins(lowest, highest, n_bins, device)
    share = torch.linspace(1, 0, n_bins, device=device)
    return share * _log_bins(lowest, highest, n_bins, device) + (1 - share) * linear


def create_outputs_with_chmv2_mixlog_norm(
    input: Tensor, bins: Tensor, max_clamp_value: float = 1e-4, eps_shift: float = 1e-8, eps: float = 1e-12
) -> Tensor:
    """Compute depths with the weights of CHMv2: 8 sum_k w_k b_k, w_k = (relu(x_k) + eps_shift) / their sum.

    Args:
        input: x [B, K, H, W], any floating point.
        bins: b [K], of depths divided by 8.
        max_clamp_value: has no effect: it bounds a shift of negative values, and relu leaves none.
        eps_shift: keeps weights positive where no x is.
        eps: smallest value of a bin, of the sum and of the result over 8.

    Returns:
        Metres [B, 1, H, W], float32. Where the sum is infinite or NaN, it counts as 1.
    """
    sums = _Sums.of(bins.float().clamp(min=eps), eps_shift)
    with autocast_to(input.device.type, torch.float32):
        return _mixlog_depth(input.float().relu(), sums, eps)


class FeaturesToDepth(nn.Module):
    """Turn the logits of depth bins into metres; a single channel is a depth itself.

    Args:
        min_depth: centre of the first bin, in metres; added to the depth of a single channel.
        max_depth: centre of the last bin, in metres.
        bins_strategy: spacing of the centres: `linear`, `log` or `chmv2_mixlog`.
        norm_strategy: how logits become weights: `linear` (relu(x) + 0.1), `softmax`, `sigmoid` or `chmv2_mixlog`
            (relu(x) + 1e-8, and 8 times the mean); all but softmax divided by their sum.

    Raises:
        ValueError: an unknown strategy, or a range that it cannot divide.
    """

    def __init__(
        self,
        min_depth: float = 0.001,
        max_depth: float = 80,
        bins_strategy: str = "linear",
        norm_strategy: str = "linear",
    ) -> None:
        super().__init__()
        check_choice("bins_strategy", bins_strategy, _BINS)
        check_choice("norm_strategy", norm_strategy, _NORMS)
        if not 0 <= min_depth < max_depth:
            raise ValueError(
                f"min_depth={min_depth}, max_depth={max_depth}: expected 0 <= min_depth < max_depth, in metres"
            )
        if min_depth == 0 and bins_strategy != "linear":
            raise ValueError(f"min_depth=0 has no logarithm: bins_strategy={bins_strategy!r} needs min_depth above 0")
        if (bins_strategy == MIXLOG) != (norm_strategy == MIXLOG):
            logger.warning(
                "bins_strategy=%s with norm_strategy=%s: depths are off by a factor of 8, as %s only works as both",
                bins_strategy,
                norm_strategy,
                MIXLOG,
            )
        self.min_depth = min_depth
        self.max_depth = max_depth
        self.bins_strategy = bins_strategy
        self.norm_strategy = norm_strategy
        self._sums: dict[tuple[int, torch.device], _Sums] = {}

    def extra_repr(self) -> str:
        """Show the arguments."""
        return f"{self.min_depth}, {self.max_depth}, bins={self.bins_strategy}, norm={self.norm_strategy}"

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, K, H, W], any floating point, to [B, 1, H, W], float32, in metres."""
        with autocast_to(x.device.type, torch.float32):
            x = x.float()
            if x.shape[1] == 1:
                return x.relu() + self.min_depth
            values, sums = _NORMS[self.norm_strategy].activation(x), self._sums_of(x)
            if self.norm_strategy == MIXLOG:
                return _mixlog_depth(values, sums)
            weighted, total = sums(values)
            return sums.scale * (weighted / total)

    def _sums_of(self, x: Tensor) -> _Sums:
        key = (x.shape[1], x.device)
        if torch.compiler.is_compiling():
            return self._make_sums(*key)
        if key not in self._sums:
            # Not inference tensors, because training uses them, too.
            with torch.inference_mode(False), torch.no_grad():
                self._sums[key] = self._make_sums(*key)
        return self._sums[key]

    def _make_sums(self, n_bins: int, device: torch.device) -> _Sums:
        bins = _BINS[self.bins_strategy](self.min_depth, self.max_depth, n_bins, device)
        if self.norm_strategy == MIXLOG:
            bins = bins.clamp(min=1e-12)
        return _Sums.of(bins, _NORMS[self.norm_strategy].shift)


class _Sums(NamedTuple):
    """The sums over the bins that a depth is the ratio of, as a product and a constant.

    The first is divided by `scale`, so that it never exceeds the second and only overflows with it.
    """

    matrix: Tensor  # [2, K]
    constant: Tensor  # [2, 1]
    scale: Tensor  # []

    @classmethod
    def of(cls, bins: Tensor, shift: float) -> _Sums:
        scale = bins.max()
        matrix = torch.stack([bins / scale, torch.ones_like(bins)])
        return cls(matrix, shift * matrix.sum(dim=1, keepdim=True), scale)

    def __call__(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return both sums of values [B, K, H, W], [B, 1, H, W] each."""
        sums = self.matrix @ values.flatten(2) + self.constant  # [B, 2, H * W]
        weighted, total = sums.unflatten(2, values.shape[2:]).split(1, dim=1)
        return weighted, total


def _mixlog_depth(values: Tensor, sums: _Sums, eps: float = 1e-12) -> Tensor:
    weighted, total = sums(values)
    total = torch.where(total.isfinite(), total, 1.0).clamp(min=eps)
    return MIXLOG_SCALE * (sums.scale * (weighted / total)).clamp(min=eps)


_MakeBins = Callable[[float, float, int, torch.device | str | None], Tensor]


class _Norm(NamedTuple):
    activation: Callable[[Tensor], Tensor]
    shift: float


_NORMS = {
    "linear": _Norm(torch.relu, 0.1),
    "softmax": _Norm(lambda x: x.softmax(dim=1), 0.0),
    "sigmoid": _Norm(torch.sigmoid, 0.0),
    MIXLOG: _Norm(torch.relu, 1e-8),
}


def _linear_bins(lowest: float, highest: float, n_bins: int, device: torch.device | str | None) -> Tensor:
    return torch.linspace(lowest, highest, n_bins, device=device)


def _log_bins(lowest: float, highest: float, n_bins: int, device: torch.device | str | None) -> Tensor:
    return torch.linspace(math.log(lowest), math.log(highest), n_bins, device=device).exp()


_BINS: dict[str, _MakeBins] = {"linear": _linear_bins, "log": _log_bins, MIXLOG: create_chmv2_mixlog_bins}
