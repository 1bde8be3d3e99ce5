"""The periods of positions: an entry of the weights in our layout, a number in the others' configurations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dinov3.hub.architectures import published_vit_like
from dinov3.layers import RopePositionEmbedding
from dinov3.utils.weight_files import WeightsError

DEFAULT_ROPE_BASE = 100.0
USUAL_HEAD_DIM = 64


def rope_base(periods: Tensor) -> float | None:
    """The base of which `periods` [d / 4] are the powers, up to their rounding; None if they are not such powers."""
    exact, n = periods.detach().double().cpu(), len(periods)
    # Published files hold periods that were rounded to bfloat16, whatever their dtype is now.
    roundings = ((torch.bfloat16, 2**-8), (torch.float16, 2**-10), (torch.float64, 1e-5))
    tolerance = next(tolerance for dtype, tolerance in roundings if torch.equal(exact.to(dtype).double(), exact))
    exponents = torch.arange(n, dtype=torch.float64) / n
    fitted = float((exponents @ exact.log() / (exponents @ exponents).clamp_min(1e-9)).exp())
    for base in (DEFAULT_ROPE_BASE, float(f"{fitted:.2g}"), fitted):
        if torch.allclose(exact, base**exponents, rtol=tolerance, atol=0):
            return base
    return None


def computed_periods(ours: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensor | None:
    """The periods [d / 4] of a ViT whose weights do not hold them; None if its heads cannot be told.

    Args:
        ours: the other entries, in our names.
        config: the content of a `config.json`; what it does not tell is as in the published models.

    Raises:
        WeightsError: the configuration makes no sense.
    """
    dim = ours["cls_token"].shape[-1]
    published = published_vit_like(ours)
    heads = _setting(config, "num_attention_heads", "num_heads", int)
    base = _setting(config, "rope_theta", "rope_temperature", float)
    if heads is None:
        heads = published.num_heads if published else max(1, dim // USUAL_HEAD_DIM)
        if dim % (4 * heads):
            return None
    if dim % (4 * heads):
        raise WeightsError(f"the config.json names {heads:g} heads, which do not fit a model of {dim} channels")
    return RopePositionEmbedding(dim, num_heads=int(heads), base=base or DEFAULT_ROPE_BASE, device="cpu").periods


def _setting(config: Mapping[str, Any], name: str, timm_name: str, kind: type[int] | type[float]) -> float | None:
    """A number of a configuration, in the words of either library; None if it does not name it."""
    places = {timm_name: config.get("model_args"), name: config.get("rope_parameters")}
    found = config.get(name)
    for key, section in places.items():
        if found is None and isinstance(section, Mapping):
            found = section.get(key)
    if found is None:
        return None
    if isinstance(found, bool) or not isinstance(found, (int, kind)) or found <= 0:
        raise WeightsError(f"the config.json has {name}={found!r}, expected a positive number")
    return found
