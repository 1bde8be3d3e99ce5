"""Golden cases of `segmentation`: training, evaluation, configuration, data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor

from dinov3.data.datasets import ADE20K
from dinov3.eval.command.results import plain
from dinov3.eval.segmentation.config import SegmentationConfig
from dinov3.eval.segmentation.eval import evaluate_segmentation_model
from dinov3.eval.segmentation.inference import make_inference
from dinov3.eval.segmentation.loss import MultiSegmentationLoss
from dinov3.eval.segmentation.train import train_step
from dinov3.eval.training.schedulers import build_scheduler
from dinov3.heads.backbone_layers import BackboneLayersSet
from dinov3.heads.segmentation import build_segmentation_decoder
from tests.parity import deterministic
from tests.parity.dense import assert_expected, assert_output, by_id, case_of, make_input, tiny_vit
from tests.parity.test_depth_system import part_of
from tests.parity.toy_segmentor import ToySegmentor

CONFIGS = Path(__file__).parents[2] / "dinov3" / "eval" / "segmentation" / "configs"
IGNORED = 255


def make_label(case: dict[str, Any], number: int, toy: ToySegmentor) -> Tensor:
    """A label map that agrees with the toy in half of the pixels."""
    label = make_input(case, f"label_u{number}").floor()
    agree = make_input(case, f"agree_u{number}")
    options = case["kwargs"]
    prediction = make_inference(
        make_input(case, f"img{number}"),
        toy,
        inference_mode="slide",
        rescale_to=label.shape[-2:],
        n_output_channels=options["num_classes"],
        crop_size=(options["eval_res"],) * 2,
        stride=(options["eval_stride"],) * 2,
    ).argmax(1)[None]
    label = torch.where(agree < 0.5, 1 + prediction, label)
    return torch.where(agree > 0.95, IGNORED, label).to(torch.uint8)


@by_id("segmentation", "eval/")
def test_evaluation(case: dict[str, Any]) -> None:
    toy = ToySegmentor(case["build"]["toy"]["K"], case["build"]["toy"]["seed"])
    items = []
    for number in range(2):
        image = make_input(case, f"img{number}")
        images = [image]
        if "images" in case:
            images.append(F.interpolate(image, scale_factor=1.25, mode="bilinear", align_corners=False))
            images += [one.flip(-1) for one in images]
        label = make_label(case, number, toy)
        assert_output(case, f"label{number}", label)
        items.append((images, (torch.tensor([number]), label)))
    got = evaluate_segmentation_model(
        toy,
        items,
        "cpu",
        case["kwargs"]["eval_res"],
        case["kwargs"]["eval_stride"],
        "linear",
        case["kwargs"]["num_classes"],
        torch.float32,
    )
    assert list(got) == list(case["expected"]["metrics"])
    assert got == pytest.approx(case["expected"]["metrics"], abs=0.05)


@by_id("segmentation", "train/steps")
def test_training_steps(case: dict[str, Any]) -> None:
    build = case["build"]
    model = build_segmentation_decoder(tiny_vit("segmentation"), BackboneLayersSet.LAST, "linear", **build["kwargs"])
    deterministic.fill_(model, build["fill_seed"])
    model.train()
    head = model.segmentation_model[1]
    options = build["optimizer"]
    optimizer = torch.optim.AdamW(
        head.parameters(), lr=options["lr"], betas=tuple(options["betas"]), weight_decay=options["weight_decay"]
    )
    name, total_iter, arguments = build["scheduler"]
    arguments = {**arguments, "final_div_factor": float(arguments["final_div_factor"])}
    scheduler = build_scheduler(name, optimizer, options["lr"], total_iter, arguments)
    criterion = MultiSegmentationLoss(celoss_weight=1.0)
    before = head.conv.weight.detach().clone()
    losses, rates = [], []
    for step in range(5):
        labels = make_input(case, f"gt{step}_u").floor()
        labels = labels.masked_fill(labels == build["kwargs"]["num_classes"], IGNORED).to(torch.uint8)
        batch = make_input(case, f"x{step}"), (torch.arange(len(labels)), labels)
        rates.append(optimizer.param_groups[0]["lr"])
        loss = train_step(
            model, batch, "cpu", None, optimizer, options["gradient_clip"], scheduler, criterion, torch.float32, step
        )
        losses.append(loss.item())
    want = case["expected"]
    assert losses == pytest.approx(want["loss"], rel=case["tol"]["rtol"])
    assert rates == pytest.approx(want["lr"], rel=1e-6)
    change = (head.conv.weight - before).abs().max().item()
    assert change == pytest.approx(want["max_change_of_conv.weight"], rel=0.02)
    for name in case["outputs"]:
        assert_output(case, name, head.state_dict()[name])


@pytest.mark.parametrize("name", case_of("segmentation", "config/resolved")["expected"])
def test_configuration(name: str) -> None:
    case = case_of("segmentation", "config/resolved")
    config = OmegaConf.structured(SegmentationConfig)
    if name != "defaults":
        given = OmegaConf.from_dotlist(["datasets.root=/data", "output_dir=/out"])
        config = OmegaConf.merge(config, OmegaConf.load(CONFIGS / name), given)
    want = case["expected"][name]
    assert_expected(case, part_of(plain(OmegaConf.to_container(config)), want), want)


@by_id("segmentation", "data/ade20k-index")
def test_ade20k_index(case: dict[str, Any], tmp_path: Path) -> None:
    for name, lines in make_input(case, "lists").items():
        (tmp_path / f"ADE20K_object150_{name}.txt").write_text("\n".join(lines) + "\n")
    for split, want in case["expected"].items():
        dataset = ADE20K(split=ADE20K.Split[split], root=str(tmp_path))
        assert {"image_paths": dataset.image_paths, "target_paths": dataset.target_paths} == want
