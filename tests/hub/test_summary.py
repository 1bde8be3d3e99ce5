"""The command line that sums up a backbone."""

from __future__ import annotations

import pytest

from dinov3.hub import summary
from dinov3.hub.command_line import ModelChoice
from dinov3.utils import count_parameters
from dinov3.utils.command_line import run_command_line


def lines_of(arguments: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    summary.main(arguments.split())
    return capsys.readouterr().out.splitlines()


def test_a_vit(capsys: pytest.CaptureFixture[str]) -> None:
    lines = lines_of("dinov3_vits16 --size 224", capsys)
    assert lines[0] == "dinov3_vits16: DinoVisionTransformer, 21,601,152 parameters"
    assert lines[2] == "tokens       201 (1 class, 4 storage, 14 x 14 patch tokens) of 384 channels"
    assert lines[3] == "arithmetic   9.40 GFLOP per image"
    assert lines[4] == "weights      82.5 MiB in float32"
    assert "about" in lines[5] and "estimates" in lines[5]
    assert any("0 to 11, each" in line and "1,775,232" in line for line in lines)


def test_a_convnext_and_a_rectangle(capsys: pytest.CaptureFixture[str]) -> None:
    lines = lines_of("dinov3_convnext_tiny --size 64x128 --depth 1 --dtype bfloat16 --batch-size 2", capsys)
    assert lines[0] == "dinov3_convnext_tiny: ConvNeXt, 27,820,128 parameters"
    assert lines[1] == "image        64 x 128 pixels"
    assert lines[2] == "tokens       9 (1 class, 0 storage, 2 x 4 patch tokens) of 768 channels"
    assert lines[4] == "weights      53.1 MiB in bfloat16" and lines[5].endswith(
        "(estimates, bfloat16, a batch of 2 images)"
    )


def test_satellite_weights_have_one_more_norm() -> None:
    plain, satellite = (count_parameters(ModelChoice("dinov3_vitl16", data).build()) for data in (None, "SAT493M"))
    assert satellite == plain + 2 * 1024 == 303_156_224


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("vitb16", r"unknown model 'vitb16' (did you mean 'dinov3_vitb16'?)"),
        ("dinov3_vits16 --size 15", "smaller than a patch"),
        ("dinov3_convnext_tiny --size 64x31", "at least 32 pixels"),
        ("dinov3_vits16 --weights SAT493M", "dinov3_vits16 was not published with weights SAT493M"),
        ("/nowhere/run", "there is no training run at /nowhere/run"),
    ],
)
def test_errors_are_one_message(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DINOV3_TRACEBACK", raising=False)
    with pytest.raises(SystemExit, match="1"):
        run_command_line(lambda: summary.main(arguments.split()))
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and "Traceback" not in error


@pytest.mark.parametrize("size", ["x", "224x", "-3", "0", "1x2x3"])
def test_invalid_sizes(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        summary.main(["dinov3_vits16", f"--size={size}"])
    assert "HEIGHTxWIDTH" in capsys.readouterr().err
