"""`python -m dinov3.configs`: the merged settings, their mistakes, and what follows from them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dinov3.configs import get_default_config
from dinov3.configs.__main__ import main
from dinov3.configs.training_config import SETTINGS

RECIPES = "dinov3/configs/train"


@pytest.fixture(autouse=True)
def restored_log_level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("WARNING", logger="dinov3")


def test_summary_of_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"{RECIPES}/vitl_im1k_lin834.yaml", "optim.epochs=12", "--processes", "32"]) == 0
    out = capsys.readouterr().out
    assert "# effective batch  2048 images (64 per process, 32 processes)" in out
    assert "# peak lr          0.005657 (0.001 x 5.657, sqrt_wrt_1024)" in out
    assert "# steps            15000 (12 epochs of 1250), 30720000 images" in out
    assert "# crops            2 of 224 and 8 of 96 pixels" in out


def test_output_is_a_configuration_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["optim.lr=0.5"]) == 0
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
    want = get_default_config()
    want.optim.lr = 0.5
    assert OmegaConf.load(tmp_path / "mine.yaml") == want
    assert main([str(tmp_path / "mine.yaml")]) == 0


def test_only_changed_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--changed", "optim.lr=0.5", "student.arch=vit_large"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("optim:\n  lr: 0.5\n#")


def test_peak_of_a_rising_cosine_is_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = f"{RECIPES}/dinov3_vit7b16_high_res_adapt.yaml"
    assert main([recipe, "train.dataset_path=ImageFolder:root=X", "gram.ckpt=F", "--processes", "256"]) == 0
    out = capsys.readouterr().out
    assert "# peak lr          7.071e-05" in out
    assert "2 of 512/768/768/768/768" in out
    assert "# note: crops.local_crops_size: of 168 pixels" in out


def test_unknown_keys_are_flagged(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    assert main(["train.batch_size_per_gpuu=3", "--changed"]) == 1
    captured = capsys.readouterr()
    assert "batch_size_per_gpuu: 3" in captured.out
    assert "did you mean 'train.batch_size_per_gpu'" in caplog.text
    assert "unknown keys" in captured.err


def test_contradictions_are_flagged(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dino.koleo_topk=2", "ibot.separate_head=false"]) == 1
    errors = capsys.readouterr().err
    assert "error: dino.koleo_topk=2" in errors and "error: ibot.separate_head" in errors


def test_networks_that_cannot_be_built_are_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["student.arch=vit_small", "student.fp8_enabled=true", "student.fp8_filter=zz"]) == 1
    assert "section student cannot be built: no linear layer" in capsys.readouterr().err
    assert main(["student.arch=vit_small", "student.fp8_enabled=true"]) == 0


def test_malformed_dataset_strings_are_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["student.arch=vit_small", "train.dataset_path=ImageFolder:rot=x"]) == 1
    assert re.search("error: train.dataset_path: .*did you mean 'root'", capsys.readouterr().err)


@pytest.mark.parametrize("arguments", [["no_such.yaml"], ["optim.lr=[1"], ["optim.lr=fast"]])
def test_what_cannot_be_merged_is_an_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")


@pytest.mark.parametrize("arguments", [["a.yaml", "b.yaml"], ["--process", "2"], ["--processes", "0"], ["--lr=3"]])
def test_wrong_command_line_prints_the_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert "usage: python -m dinov3.configs" in capsys.readouterr().err


def test_students_of_a_multidistillation_are_checked_each(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shared = f"{RECIPES}/distillation_convnext/multi_distillation_convnext_test.yaml"
    assert main([shared]) == 0
    out = capsys.readouterr().out
    assert "# network          convnext_tiny, convnext_small, convnext_base, convnext_large" in out
    assert "# effective batch  32 images (4 per process, 8 processes)" in out
    assert main([shared, "multidistillation.global_batch_size=34"]) == 0
    out = capsys.readouterr().out
    assert "# effective batch  34 images (up to 5 per process, 8 processes)" in out
    assert "# steps            625000 (500 epochs of 1250), 21250000 images" in out
    assert "# peak lr          0.0001414 (0.0002 x 0.7071, sqrt_wrt_1024) of convnext_tiny" in out
    assert "# peak lr          7.071e-05 (0.0001 x 0.7071, sqrt_wrt_1024) of convnext_base" in out
    assert main([shared, "crops.teacher_to_student_resolution_scale=1.0"]) == 1
    assert "error: student convnext_base: crops.teacher_to_student" in capsys.readouterr().err
    assert main([f"{RECIPES}/dinov3_lvd1689m_multi_distillation.yaml"]) == 1
    assert "student vits_mlp4_4: train.dataset_path=<TRAIN/DATASET>: this is a placeholder" in capsys.readouterr().err


def test_help_lists_every_key_with_default_and_meaning() -> None:
    command = [sys.executable, "-m", "dinov3.configs", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert "key=value" in done.stdout
    lines = [line.split(maxsplit=1)[0] for line in done.stdout.splitlines() if line.startswith("  ")]
    assert set(lines) >= set(SETTINGS)
    assert re.search(r"optim\.clip_grad +3\.0 +largest gradient norm .*; at least 0\n", done.stdout)
