"""Every recipe loads, validates, and builds the networks that it describes, parameter for parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from dinov3.configs import get_default_config, load_teacher_config, validate
from dinov3.configs.merging import (
    PACKAGE,
    DinoV3SetupArgs,
    Layer,
    layers_of,
    load_yaml,
    merge_layers,
    resolve_config_path,
)
from dinov3.train.multidist_meta_arch import MultiDistillationMetaArch
from dinov3.train.ssl_meta_arch import SSLMetaArch
from dinov3.utils import count_parameters

ROOT = PACKAGE / "configs" / "train"
RECIPES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.yaml"))
#: Files of single students, which another recipe names.
STUDENT_DIRECTORIES = ("multidist_tests/", "lvd1689m_students/", "distillation_convnext/convnext_")
WHOLE_RECIPES = [name for name in RECIPES if not name.startswith(STUDENT_DIRECTORIES)]

TEACHER_7B = "distillation.full_cfg_path=dinov3/configs/train/dinov3_vit7b16_high_res_adapt.yaml"
#: What stands for the paths that a recipe leaves to its user; files need not exist to build a network on paper.
GIVEN = {
    "dinov3_vit7b16_pretrain.yaml": ["train.dataset_path=ImageNet:split=TRAIN"],
    "dinov3_vit7b16_gram_anchor.yaml": ["train.dataset_path=ImageNet:split=TRAIN", "gram.ckpt=gram.pth"],
    "dinov3_vit7b16_high_res_adapt.yaml": [
        "train.dataset_path=ImageNet:split=TRAIN",
        "gram.ckpt=gram.pth",
        "student.resume_from_teacher_chkpt=teacher.pth",
    ],
    "dinov3_lvd1689m_multi_distillation.yaml": [
        "train.dataset_path=ImageNet:split=TRAIN",
        TEACHER_7B,
        "distillation.checkpoint_path=teacher.pth",
    ],
    "vits16_single_gpu_gram.yaml": ["gram.ckpt=gram.pth", "student.resume_from_teacher_chkpt=teacher.pth"],
    "vits16_single_gpu_distilled.yaml": [
        "distillation.full_cfg_path=dinov3/configs/train/vits16_single_gpu.yaml",
        "distillation.checkpoint_path=teacher.pth",
    ],
}
#: How many processes a recipe was written for.
PROCESSES = {
    "dinov3_vit7b16_pretrain.yaml": 256,
    "dinov3_vit7b16_gram_anchor.yaml": 256,
    "dinov3_vit7b16_high_res_adapt.yaml": 256,
    "vitl_im1k_lin834.yaml": 32,
    "dinov3_lvd1689m_multi_distillation.yaml": 296,
    "multi_distillation_test.yaml": 8,
    "distillation_convnext/multi_distillation_convnext_test.yaml": 8,
}
#: A record, from which no training is started: its own header says so.
RECORD = "dinov3_vitl16_lvd1689m_distilled.yaml"

#: Channels, blocks and width of the FFN over the channels.
VITS = {
    "vit_tiny": (192, 12, 4),
    "vit_small": (384, 12, 4),
    "vit_base": (768, 12, 4),
    "vit_large": (1024, 24, 4),
    "vit_7b": (4096, 40, 3),
}
#: Channels and blocks of the four stages.
CONVNEXTS = {
    "convnext_tiny": ((96, 192, 384, 768), (3, 3, 9, 3)),
    "convnext_small": ((96, 192, 384, 768), (3, 3, 27, 3)),
    "convnext_base": ((128, 256, 512, 1024), (3, 3, 27, 3)),
    "convnext_large": ((192, 384, 768, 1536), (3, 3, 27, 3)),
}


def linear(channels_in: int, channels_out: int, bias: bool = True) -> int:
    return channels_in * channels_out + bias * channels_out


def ffn_parameters(student: Any, dim: int, ratio: float) -> int:
    hidden = int(dim * ratio)
    if student.ffn_layer == "mlp":
        return linear(dim, hidden, student.ffn_bias) + linear(hidden, dim, student.ffn_bias)
    multiple = int(student.ffn_layer.removeprefix("swiglu") or 8)
    gated = -(-int(hidden * 2 / 3) // multiple) * multiple
    return 2 * linear(dim, gated, student.ffn_bias) + linear(gated, dim, student.ffn_bias)


def vit_parameters(student: Any) -> int:
    dim, depth, ratio = VITS[student.arch]
    depth, ratio = student.depth or depth, student.ffn_ratio or ratio
    norm = dim if student.norm_layer == "rmsnorm" else 2 * dim
    block = 2 * norm + 2 * dim * bool(student.layerscale)
    block += linear(dim, 3 * dim, student.qkv_bias) + linear(dim, dim, student.proj_bias)
    block += ffn_parameters(student, dim, ratio)
    patches = linear(student.in_chans * student.patch_size**2, dim)
    tokens = (1 + 1 + student.n_storage_tokens) * dim  # class, mask, storage
    norms = 1 + student.untie_cls_and_patch_norms + student.untie_global_and_local_cls_norm
    return patches + tokens + depth * block + norms * norm


def convnext_parameters(student: Any) -> int:
    widths, depths = CONVNEXTS[student.arch]
    stem = linear(4 * 4 * student.in_chans, widths[0]) + 2 * widths[0]
    downsampling = sum(
        2 * before + linear(2 * 2 * before, after) for before, after in zip(widths[:-1], widths[1:], strict=True)
    )
    blocks = sum(
        depth * (linear(7 * 7, dim) + 2 * dim + linear(dim, 4 * dim) + linear(4 * dim, dim) + dim)
        for dim, depth in zip(widths, depths, strict=True)
    )
    return stem + downsampling + blocks + 2 * widths[-1]


def head_parameters(head: Any, dim: int) -> int:
    hidden, bottleneck = head.head_hidden_dim, head.head_bottleneck_dim
    widths = [dim, *[hidden] * (head.head_nlayers - 1), bottleneck]
    layers = sum(linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True))
    return layers + linear(bottleneck, head.head_n_prototypes, bias=False)


def expected_parameters(cfg: Any) -> dict[str, int]:
    if cfg.student.arch in VITS:
        backbone, dim = vit_parameters(cfg.student), VITS[cfg.student.arch][0]
    else:
        backbone, dim = convnext_parameters(cfg.student), CONVNEXTS[cfg.student.arch][0][-1]
    return {
        "backbone": backbone,
        "dino_head": head_parameters(cfg.dino, dim),
        "ibot_head": head_parameters(cfg.ibot, dim),
    }


def configurations(recipe: str) -> list[Any]:
    """Of each student that the recipe trains, with the paths that it leaves to its user."""
    layers = layers_of(DinoV3SetupArgs(ROOT / recipe, output_dir=None, opts=GIVEN.get(recipe, [])))
    cfg = merge_layers(get_default_config(), layers)
    if not cfg.multidistillation.enabled:
        return [cfg]
    paths = [resolve_config_path(student.config_path) for student in cfg.multidistillation.students]
    # A student's own file comes below the file that all of them share.
    return [merge_layers(get_default_config(), [Layer(str(path), load_yaml(path)), *layers]) for path in paths]


def parameters_of(networks: Any) -> dict[str, int]:
    assert all(parameter.is_meta for parameter in networks.parameters())
    return {name: count_parameters(network) for name, network in networks.items()}


def check_networks(cfg: Any) -> SSLMetaArch:
    is_multi = cfg.MODEL.META_ARCHITECTURE == "MultiDistillationMetaArch"
    with torch.device("meta"):
        arch = (MultiDistillationMetaArch if is_multi else SSLMetaArch)(cfg)
    expected = expected_parameters(cfg)
    assert parameters_of(arch.student) == expected
    assert parameters_of(arch.model_ema) == expected
    if cfg.distillation.enabled:
        teacher_cfg = load_teacher_config(cfg.distillation.full_cfg_path)
        assert parameters_of(arch.teacher) == expected_parameters(teacher_cfg)
    else:
        assert arch.teacher is arch.model_ema
    if cfg.gram.use_loss and not cfg.gram.ema_teacher:
        assert arch.gram_teacher is not None
        assert parameters_of(arch.gram_teacher) == {"backbone": expected["backbone"]}
    else:
        assert arch.gram_teacher is None
    trained = [parameter for group in arch.get_params_groups() for parameter in group["params"]]
    assert sum(parameter.numel() for parameter in trained) == sum(expected.values())
    return arch


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_has_known_keys_and_values_only(recipe: str) -> None:
    merge_layers(get_default_config(), [Layer(recipe, load_yaml(ROOT / recipe))], strict=True)


@pytest.mark.parametrize("recipe", [name for name in WHOLE_RECIPES if name != RECORD])
def test_recipe_can_be_trained_once_its_paths_are_given(recipe: str) -> None:
    for cfg in configurations(recipe):
        validate(cfg, world_size=PROCESSES.get(recipe, 1))


@pytest.mark.parametrize("recipe", [name for name in WHOLE_RECIPES if name != RECORD])
def test_networks_have_the_parameters_that_the_recipe_describes(recipe: str) -> None:
    for cfg in configurations(recipe):
        check_networks(cfg)


def test_the_record_of_a_student_describes_its_network() -> None:
    here = Layer("here", OmegaConf.from_dotlist([TEACHER_7B]))
    check_networks(merge_layers(get_default_config(), [Layer(RECORD, load_yaml(ROOT / RECORD)), here]))


def test_every_students_file_belongs_to_a_recipe() -> None:
    named = {
        resolve_config_path(student.config_path).relative_to(ROOT).as_posix()
        for recipe in WHOLE_RECIPES
        if recipe != RECORD
        for student in load_yaml(ROOT / recipe).get("multidistillation", {}).get("students", [])
    }
    assert named == set(RECIPES) - set(WHOLE_RECIPES)


def test_formulas_give_the_published_sizes() -> None:
    """In millions, as the paper and the model cards round them."""
    students = configurations("dinov3_lvd1689m_multi_distillation.yaml")
    sizes = [vit_parameters(cfg.student) / 1e6 for cfg in students]
    assert sizes == pytest.approx([21, 29, 86, 300], rel=0.04)
    (giant,) = configurations("dinov3_vit7b16_pretrain.yaml")
    assert vit_parameters(giant.student) / 1e6 == pytest.approx(6716, rel=1e-3)
    convnexts = configurations("distillation_convnext/multi_distillation_convnext_test.yaml")
    assert [convnext_parameters(cfg.student) / 1e6 for cfg in convnexts] == pytest.approx([29, 50, 89, 198], rel=0.05)
