"""Golden cases of `depth`: losses, valid pixels, metrics, schedules, transforms and pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from dinov3.eval.depth import loss as losses
from dinov3.eval.depth import transforms
from dinov3.eval.depth.loss import LossType
from tests.parity import golden
from tests.parity.dense import assert_expected, assert_output, by_id, case_of, make_input

LOSSES = {
    "sigloss": lambda: losses.SigLoss(warm_up=False),
    "gradient": losses.GradientLoss,
    "gradient-log": losses.GradientLogLoss,
    "l1": losses.L1Loss,
    "multi": lambda: losses.MultiLoss(
        {LossType.GRADIENT_LOG_LOSS: 0.5, LossType.L1: 0.25, LossType.GRADIENT_LOSS: 0.1}
    ),
}


def maps_of(case: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    return make_input(case, "pred"), make_input(case, "gt"), make_input(case, "mask_u") < 0.7


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_their_gradients(name: str) -> None:
    case = case_of("depth", f"loss/{name}")
    pred, gt, mask = maps_of(case)
    loss = LOSSES[name]()
    pred.requires_grad_()
    masked = loss(pred, gt.masked_fill(~mask, 0.0), mask)
    masked.backward()
    assert_output(case, "grad", pred.grad)
    got = {"masked": masked.item(), "unmasked_with_original_gt": loss(pred, gt).item()}
    assert_expected(case, got, case["expected"])


def test_sigloss_leaves_the_variance_out_at_first() -> None:
    case = case_of("depth", "loss/sigloss-warmup")
    pred, gt, mask = maps_of(case)
    loss = losses.SigLoss(warm_up=True, warm_iter=2)
    values = [loss(pred, gt.masked_fill(~mask, 0.0), mask).item() for _ in range(5)]
    assert_expected(case, values, case["expected"]["values"])


@by_id("depth", "loss/registry")
def test_loss_types(case: dict[str, Any]) -> None:
    assert {member.name: member.value for member in LossType} == case["expected"]["names"]
    module = LossType.SIGLOSS.module()
    got = {name: getattr(module, name) for name in ("warm_up", "warm_iter", "eps")}
    assert_expected(case, {"class": type(module).__name__, **got}, case["expected"]["SIGLOSS"])


@by_id("depth", "mask/valid-mask")
def test_valid_pixels(case: dict[str, Any]) -> None:
    make_valid_mask = golden.target("dinov3.eval.depth.datasets.datasets_utils.make_valid_mask")
    crops = golden.target("dinov3.eval.depth.datasets.datasets_utils._EvalCropType")
    for name, want in case["expected"]["boxes"].items():
        size, crop = name.split("-")
        mask = make_valid_mask(torch.ones(1, 1, *map(int, size.split("x"))), crops[crop])
        inside = mask[0, 0].nonzero()
        assert int(mask.sum()) == want["count"]
        assert inside[0].tolist() == want["top_left"] and inside[-1].tolist() == want["bottom_right"]
    u = make_input(case, "u")
    mask = make_valid_mask(torch.where(u < 0.5, 7.0, u), crops.NYU_EIGEN, ignored_value=7.0)
    assert mask.dtype == torch.bool
    assert_output(case, "mask", mask.to(torch.uint8))


@by_id("depth", "metrics/all")
def test_metrics(case: dict[str, Any]) -> None:
    module = golden.target("dinov3.eval.depth.metrics")
    gt_u, hole = make_input(case, "gt_u"), make_input(case, "hole_u")
    gt, pred, mask = (
        gt_u.masked_fill(hole < 0.1, 0.0),
        gt_u * make_input(case, "factor"),
        make_input(case, "mask_u") < 0.8,
    )
    ratio = torch.full((1, 1, 4, 4), 2.0), torch.full((1, 1, 4, 4), 3.0)
    got = {
        "masked": module.calculate_depth_metrics(gt, pred, mask)._asdict(),
        "subset_rmse_a1": module.calculate_depth_metrics(gt, pred, mask, ["rmse", "a1"])._asdict(),
        "constant_ratio_gt2_pred3": module.calculate_depth_metrics(*ratio)._asdict(),
        "names_in_order": list(module.DEPTH_METRICS_NAME),
        "lower_is_better": {metric.name: metric.is_lower_better for metric in module.DEPTH_METRICS},
    }
    assert_expected(case, got, case["expected"])


@by_id("depth", "metrics/align")
def test_alignment(case: dict[str, Any]) -> None:
    from dinov3.eval.depth.metrics import align_depth_least_square

    pred = make_input(case, "pred")
    gt = 1.7 * pred + 0.9 + make_input(case, "noise")
    aligned, scale, shift = align_depth_least_square(gt, pred, make_input(case, "mask_u") < 0.6)
    assert_output(case, "aligned", aligned)
    assert_expected(case, {"scale": scale, "shift": shift}, case["expected"])


def rates_and_momenta(scheduler: Any, n_steps: int) -> dict[str, Tensor]:
    """What the optimizer holds before each step."""
    seen: dict[str, list[float]] = {"lr": [], "betas": [], "momentum": []}
    group = scheduler.optimizer.param_groups[0]
    for _ in range(n_steps):
        seen["lr"].append(group["lr"])
        seen["betas"].append(group.get("betas", (0.0,))[0])
        seen["momentum"].append(group.get("momentum", 0.0))
        scheduler.optimizer.step()
        scheduler.step()
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in seen.items()}


def make_adamw(lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=lr, betas=(0.9, 0.99))


@pytest.mark.parametrize("name", case_of("depth", "scheduler/warmup-onecycle")["build"]["kwargs"])
def test_warmup_one_cycle(name: str) -> None:
    case = case_of("depth", "scheduler/warmup-onecycle")
    kwargs = dict(case["build"]["kwargs"][name])
    kwargs["final_div_factor"] = float(kwargs.get("final_div_factor", 1000.0))
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9) if name == "sgd_momentum" else make_adamw(0.1)
    got = rates_and_momenta(golden.target(case["build"]["class"])(optimizer, **kwargs), 40)
    outputs = [output for output in case["outputs"] if output.startswith(name)]
    assert len(outputs) == 2
    for output in outputs:
        assert_output(case, output, got[output.removeprefix(f"{name}_")])


@by_id("depth", "scheduler/nyu-full")
def test_schedule_of_the_nyu_recipe(case: dict[str, Any]) -> None:
    scheduler_type, _, lr, total_iter, kwargs = case["build"]["args"]
    build_scheduler = golden.target(case["build"]["function"])
    got = rates_and_momenta(build_scheduler(scheduler_type, make_adamw(lr), lr, total_iter, kwargs), total_iter)
    kept = [*range(0, total_iter, 400), total_iter - 1]
    assert_output(case, "nyu_lr", got["lr"][kept])
    assert_output(case, "nyu_betas", got["betas"][kept])


@by_id("depth", "scheduler/warmup-multistep")
def test_warmup_multi_step(case: dict[str, Any]) -> None:
    scheduler = golden.target(case["build"]["class"])(make_adamw(0.1), **case["build"]["kwargs"])
    assert_output(case, "lr", rates_and_momenta(scheduler, 40)["lr"])


@by_id("depth", "scheduler/annealing")
def test_annealing(case: dict[str, Any]) -> None:
    schedulers = golden.target("dinov3.eval.depth.schedulers")
    shares = (0, 0.25, 0.5, 0.9, 1)
    got = {
        "cos(0.3, 0.01, p) p=0,.25,.5,.9,1": [schedulers.annealing_cos(0.3, 0.01, p) for p in shares],
        "linear(0.3, 0.01, p)": [schedulers.annealing_linear(0.3, 0.01, p) for p in shares],
    }
    assert_expected(case, got, case["expected"])


def pil_pair(case: dict[str, Any]) -> tuple[Image.Image, Image.Image]:
    image = (255 * make_input(case, "img_u")).to(torch.uint8).numpy()
    return Image.fromarray(image), Image.fromarray(make_input(case, "depth_u").numpy().astype(np.uint16))


@by_id("depth", "transform/eval-")
def test_evaluation_transform(case: dict[str, Any]) -> None:
    images, depths = transforms.make_depth_eval_transforms(**case["kwargs"])(*pil_pair(case))
    assert_expected(case, [len(images), len(depths)], case["expected"]["lengths"])
    for name in case["outputs"]:
        assert_output(case, name, {"img": images, "depth": depths}[name[:-1]][int(name[-1])])


@by_id("depth", "transform/nyu-crop")
def test_nyu_crop(case: dict[str, Any]) -> None:
    for name, want in case["expected"]["box_y1_y2_x1_x2"].items():
        height, width = map(int, name.split("x"))
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        image = Image.fromarray(rows.numpy().astype(np.int32)), Image.fromarray(columns.numpy().astype(np.int32))
        for y, x in (transforms.NYUCrop()(rows, columns), map(np.asarray, transforms.NYUCrop()(*image))):
            assert [int(y.min()), int(y.max()) + 1, int(x.min()), int(x.max()) + 1] == want


@by_id("depth", "transform/resize-both")
def test_resize_of_both(case: dict[str, Any]) -> None:
    image, depth = transforms.ResizeV2(case["kwargs"]["size"], resize_label=True)(*pil_pair(case))
    assert_output(case, "img", torch.from_numpy(np.array(image)))
    assert_output(case, "depth", torch.from_numpy(np.array(depth).astype(np.int32)))


@by_id("depth", "transform/color-aug")
def test_colour_augmentation(case: dict[str, Any]) -> None:
    g, b, k = (case["kwargs"][name] for name in "gbk")
    change = transforms.ColorAug(prob=1.0, gamma_range=(g, g), brightness_range=(b, b), color_range=(k, k))
    assert_output(case, "out", change(make_input(case, "x")))


@by_id("depth", "transform/rotate-pair")
def test_joint_rotation(case: dict[str, Any]) -> None:
    angle = case["kwargs"]["a"]
    rotate = v2.RandomRotation(degrees=(angle, angle), interpolation=v2.InterpolationMode.BILINEAR)
    image, depth = rotate(make_input(case, "x"), transforms.Depth(make_input(case, "d")))
    assert_output(case, "img", image)
    assert_output(case, "depth", depth.as_subclass(Tensor))


@by_id("depth", "transform/flip-inverse")
def test_mean_of_the_flips(case: dict[str, Any]) -> None:
    assert_output(case, "out", transforms.LeftRightFlipAug(flip=True).inverse(make_input(case, "x")))


@by_id("depth", "viz/colorize")
def test_colours_of_a_depth_map(case: dict[str, Any]) -> None:
    colorize = golden.target("dinov3.eval.depth.visualization_utils.depth_tensor_to_colorized_pil")
    x = make_input(case, "x")
    assert_output(case, "rgb", torch.from_numpy(np.array(colorize(x))))
    assert_output(case, "rgb_range", torch.from_numpy(np.array(colorize(x, vmin=1.0, vmax=4.0))))
    assert list(colorize(torch.full((1, 3, 3), 2.0)).getpixel((1, 1))) == case["expected"]["constant_rgb"]


@by_id("depth", "viz/blend")
def test_blending(case: dict[str, Any]) -> None:
    module = golden.target("dinov3.eval.depth.visualization_utils")
    image = module.normalized_tensor_to_pil(make_input(case, "img"))
    assert_output(case, "unnormalized", torch.from_numpy(np.array(image)))
    colors = np.array(module.depth_tensor_to_colorized_pil(make_input(case, "x")))
    assert_output(case, "blended", torch.from_numpy(np.array(module.alpha_blend(image, colors, alpha=0.6))))
