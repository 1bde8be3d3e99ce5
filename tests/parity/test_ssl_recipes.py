"""Golden cases of the recipe files, key by key, and of configurations that must be refused before a model is built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from dinov3.configs import ConfigError, get_default_config, validate
from dinov3.configs.settings import flatten

from . import golden

REPOSITORY = Path(__file__).parents[2]

#: Ours, beside the published keys.
NEW_KEYS = {
    "student.depth": None,
    "train.attention": "sdpa",
    "train.fsdp": "auto",
    "train.grad_accumulation_steps": 1,
    "train.on_bad_image": "raise",
    "train.alpha": "white",
    "train.exif": "auto",
    "train.max_image_pixels": 178956970,
    "train.max_nonfinite_steps": 0,
    "train.print_freq": 10,
    "train.tensorboard": True,
    "train.progress": "auto",
    "optim.freeze_backbone_epochs": 0,
    "crops.blur_probabilities": [0.0, 0.9, 0.5],
    "checkpointing.verify": "auto",
    "checkpointing.max_seconds": None,
    "checkpointing.async_save": False,
}


@pytest.mark.parametrize("case", golden.cases("ssl", "recipe/"), ids=lambda case: case["id"])
def test_recipe_has_the_published_keys_and_values(case: dict[str, Any]) -> None:
    got = dict(flatten(OmegaConf.to_container(OmegaConf.load(REPOSITORY / case["yaml"]))))
    want = dict(case["expected"]["flat"])
    if case["id"] == "recipe/ssl_default_config":
        want |= {"student.ffn_ratio": None, **NEW_KEYS}
    if case["id"] == "recipe/vitl_im1k_lin834":
        want["train.output_dir"] = "."
    assert got.keys() == want.keys()
    # As JSON, so that 1, 1.0 and true differ.
    assert {key: json.dumps(value) for key, value in got.items()} == {k: json.dumps(v) for k, v in want.items()}


def _entries(case_id: str) -> list[Any]:
    case = golden.case("ssl", case_id)
    return [
        pytest.param(case["config"], entry, raises, id=f"{case_id.split('/')[1]}-{index}")
        for index, (entry, raises) in enumerate(zip(case["entries"], case["expected"]["raises"], strict=True))
    ]


@pytest.mark.parametrize(("base", "entry", "raises"), _entries("arch_errors/valid") + _entries("arch_errors/invalid"))
def test_contradictions_are_refused_before_a_model_is_built(
    base: dict[str, Any], entry: dict[str, Any], raises: str | None, tmp_path: Path
) -> None:
    cfg = OmegaConf.merge(get_default_config(), base, entry["config"])
    if "distill_config" in entry:
        cfg.distillation.full_cfg_path = str(tmp_path / "teacher.yaml")
        OmegaConf.save(entry["distill_config"], cfg.distillation.full_cfg_path)
    if raises is None:
        validate(cfg)
    else:
        with pytest.raises(ConfigError):
            validate(cfg)


def test_a_fitting_teacher_is_accepted(tmp_path: Path) -> None:
    case = golden.case("ssl", "arch/distillation")
    path = tmp_path / "teacher.yaml"
    OmegaConf.save(case["distill_config"], path)
    validate(OmegaConf.merge(get_default_config(), case["config"], {"distillation": {"full_cfg_path": str(path)}}))
