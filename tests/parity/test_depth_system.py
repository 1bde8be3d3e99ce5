"""Golden cases of `depth`: training, evaluation, checkpoints, configuration, data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor, nn

from dinov3.data.datasets import NYU
from dinov3.eval.command.results import plain
from dinov3.eval.depth.config import DepthConfig, ResultConfig, TrainTransformConfig
from dinov3.eval.depth.eval import evaluate_depther_with_dataloader
from dinov3.eval.depth.loss import LossType, MultiLoss
from dinov3.eval.depth.metrics import DEPTH_METRICS
from dinov3.eval.depth.train import train_step
from dinov3.eval.training.checkpoints import (
    find_latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    unwrap_ddp_state_dict,
)
from dinov3.eval.training.schedulers import build_scheduler
from dinov3.heads.depth.depther import DecoderConfig, make_depther_from_config
from tests.parity import deterministic
from tests.parity.dense import assert_expected, assert_output, by_id, case_of, make_input, tiny_vit

CONFIGS = Path(__file__).parents[2] / "dinov3" / "eval" / "depth" / "configs"


class StandIn(nn.Module):
    """The depth model of the cases `eval/*`."""

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.avg_pool2d(x.mean(1, keepdim=True), 4)
        width = pooled.shape[-1]
        return 2.5 + 3 * torch.sigmoid(2 * pooled) + (torch.arange(width) + 0.5) / width


def items(case: dict[str, Any]) -> list[Any]:
    found = []
    for number in range(3):
        image = make_input(case, f"img{number}")
        depth = make_input(case, f"gt{number}_u").clamp(min=0)
        flipped = case["kwargs"]["use_tta"]
        images, depths = ([x, x.flip(-1)] if flipped else [x] for x in (image, depth))
        found.append((images, (torch.tensor([number if number < 2 else -1]), depths)))
    return found


@by_id("depth", "eval/")
def test_evaluation(case: dict[str, Any]) -> None:
    def evaluate(reduce_results: bool) -> Any:
        return evaluate_depther_with_dataloader(
            items(case),
            StandIn(),
            device="cpu",
            metrics=DEPTH_METRICS,
            result_config=ResultConfig(),
            ignored_value=0.0,
            reduce_results=reduce_results,
            **case["kwargs"],
        )

    results, _, _ = evaluate(True)
    assert list(results) == [metric.name for metric in DEPTH_METRICS]
    assert_expected(case, results, case["expected"]["reduced"])
    results, _, indices = evaluate(False)
    assert_expected(case, results, case["expected"]["per_image"])
    assert indices == case["expected"]["indices"]


@by_id("depth", "train/steps")
def test_training_steps(case: dict[str, Any]) -> None:
    build = case["build"]
    depther = make_depther_from_config(tiny_vit("depth"), DecoderConfig(**build["config"]["kwargs"]))
    deterministic.fill_(depther, build["fill_seed"])
    depther.train()
    options = build["optimizer"]
    optimizer = torch.optim.AdamW(
        depther.decoder.parameters(),
        lr=options["lr"],
        betas=tuple(options["betas"]),
        weight_decay=options["weight_decay"],
    )
    arguments = dict(build["scheduler"])
    scheduler = build_scheduler("WarmupOneCycleLR", optimizer, options["lr"], arguments.pop("total_iter"), arguments)
    criterion = MultiLoss({LossType.SIGLOSS: 1.0, LossType.GRADIENT_LOG_LOSS: 0.5})
    config = DepthConfig()
    config.optimizer.gradient_clip = options["gradient_clip"]
    config.transforms.train = TrainTransformConfig()
    before = depther.decoder.conv_depth.weight.detach().clone()
    seen: dict[str, list[float]] = {"loss": [], "lr": [], "beta1": []}
    for step in range(6):
        batch = make_input(case, f"x{step}"), make_input(case, f"gt{step}_u").clamp(min=0)
        seen["lr"].append(optimizer.param_groups[0]["lr"])
        seen["beta1"].append(optimizer.param_groups[0]["betas"][0])
        seen["loss"].append(float(train_step(depther, batch, criterion, optimizer, scheduler, config, step)))
    want = case["expected"]
    for name, values in seen.items():
        assert values == pytest.approx(want[name], rel=case["tol"]["rtol"], abs=case["tol"]["atol"]), name
    change = (depther.decoder.conv_depth.weight - before).abs().max().item()
    assert change == pytest.approx(want["max_change_of_conv_depth.weight"], rel=0.02)
    for name in case["outputs"]:
        assert_output(case, name, depther.decoder.state_dict()[name])


@by_id("depth", "checkpoint/files")
def test_checkpoint_files(case: dict[str, Any], tmp_path: Path) -> None:
    want = case["expected"]
    head = nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(head.parameters())
    latest = []
    for name in want["files"]:
        if name.startswith("model_0"):
            save_checkpoint(tmp_path, int(name[6:14]), head, optimizer)
            newest = find_latest_checkpoint(tmp_path)
        else:
            save_checkpoint(tmp_path, 38400, head, optimizer, name=name)
            latest += [newest, find_latest_checkpoint(tmp_path)]
    assert sorted(path.name for path in tmp_path.iterdir()) == want["files"]
    assert [path.name for path in latest if path] == want["latest_without_and_with_model_final"]
    assert sorted(torch.load(tmp_path / want["files"][0])) == want["keys"]
    content, iteration = load_checkpoint(tmp_path / "model_00001600.pth")
    assert iteration == 1600 and set(content) == {"model", "optimizer"}
    assert torch.equal(content["model"]["weight"], head.weight)
    assert unwrap_ddp_state_dict({"module.a": 1, "module.module.b": 2}) == want["unwrap"]
    assert unwrap_ddp_state_dict({"module.a": 1, "b": 2}) == want["unwrap_mixed_left_alone"]
    assert find_latest_checkpoint(tmp_path / "nowhere") is want["missing_folder"]


def part_of(values: Any, want: Any) -> Any:
    """The keys of nested `values` that `want` has: there may be more settings."""
    if isinstance(want, dict) and isinstance(values, dict):
        return {key: part_of(values[key], entry) for key, entry in want.items()}
    return values


@pytest.mark.parametrize("name", case_of("depth", "config/resolved")["expected"])
def test_configuration(name: str) -> None:
    case = case_of("depth", "config/resolved")
    config = OmegaConf.structured(DepthConfig)
    if name != "defaults":
        given = OmegaConf.from_dotlist(["datasets.root=/data", "output_dir=/out"])
        config = OmegaConf.merge(config, OmegaConf.load(CONFIGS / name), given)
    want = case["expected"][name]
    assert_expected(case, part_of(plain(OmegaConf.to_container(config)), want), want)


@by_id("depth", "data/nyu-index")
def test_nyu_index(case: dict[str, Any], tmp_path: Path) -> None:
    for name in case["inputs"]:
        (tmp_path / name).write_text("\n".join(make_input(case, name)) + "\n")
    for split, want in case["expected"].items():
        dataset = NYU(split=NYU.Split[split], root=str(tmp_path))
        assert {"image_paths": dataset.image_paths, "target_paths": dataset.target_paths} == want
