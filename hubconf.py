"""Entry points of `torch.hub`: `torch.hub.load(<this directory>, "dinov3_vits16", source="local", weights=PATH)`."""

# ruff: noqa: E402 -- the package is checked before anything of it is imported, because another one would answer.

import importlib.util
import os


def _check_package() -> None:
    """Refuse the package `dinov3` of another directory, whose code the entries would run without a word."""
    expected = os.path.join(os.path.dirname(os.path.realpath(__file__)), "dinov3")
    try:
        spec = importlib.util.find_spec("dinov3")
    except ValueError:  # It was imported, but does not say from where.
        spec = None
    places = [] if spec is None else list(spec.submodule_search_locations or [spec.origin])
    if not any(place and os.path.realpath(place) == expected for place in places):
        found = f"comes from {places[0]}" if places else "is missing"
        raise ImportError(
            f"{os.path.realpath(__file__)} needs the package dinov3 in {expected}, but in this process dinov3 {found}; "
            "a process can only have one. If that is another copy of this project, load the model from that one, or "
            "use a new process for this one; otherwise rename or uninstall it, or take it out of sys.path"
        )


_check_package()

from dinov3.hub.backbones import (
    dinov3_convnext_base,
    dinov3_convnext_large,
    dinov3_convnext_small,
    dinov3_convnext_tiny,
    dinov3_vit7b16,
    dinov3_vitb16,
    dinov3_vith16plus,
    dinov3_vitl16,
    dinov3_vitl16plus,
    dinov3_vits16,
    dinov3_vits16plus,
)
from dinov3.hub.classifiers import dinov3_vit7b16_lc
from dinov3.hub.depthers import dinov3_vit7b16_dd, dinov3_vitl16_chmv2
from dinov3.hub.detectors import dinov3_vit7b16_de
from dinov3.hub.dinotxt import dinov3_vitl16_dinotxt_tet1280d20h24l
from dinov3.hub.from_checkpoint import dinov3_from_checkpoint
from dinov3.hub.runs import dinov3_from_run
from dinov3.hub.segmentors import dinov3_vit7b16_ms

dependencies = ["torch", "numpy"]

__all__ = [
    "dinov3_convnext_base",
    "dinov3_convnext_large",
    "dinov3_convnext_small",
    "dinov3_convnext_tiny",
    "dinov3_from_checkpoint",
    "dinov3_from_run",
    "dinov3_vit7b16",
    "dinov3_vit7b16_dd",
    "dinov3_vit7b16_de",
    "dinov3_vit7b16_lc",
    "dinov3_vit7b16_ms",
    "dinov3_vitb16",
    "dinov3_vith16plus",
    "dinov3_vitl16",
    "dinov3_vitl16_chmv2",
    "dinov3_vitl16_dinotxt_tet1280d20h24l",
    "dinov3_vitl16plus",
    "dinov3_vits16",
    "dinov3_vits16plus",
]
