"""The command that every evaluation is, with an evaluation that only notes what it is given."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from dinov3.configs.settings import key
from dinov3.eval.command import command_line
from dinov3.eval.command.command_line import run_command
from dinov3.eval.command.model import FrozenBackbone, ModelConfig
from dinov3.eval.command.results import EvaluationResult


@dataclass
class Settings:
    model: ModelConfig | None = None
    size: int = key(3, "a number")
    output_dir: str = key("", "where results go")

    def check(self) -> None:
        if self.size < 0:
            raise ValueError(f"size={self.size}: expected 0 or more")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Settings]]:
    monkeypatch.setattr(command_line, "load_model", lambda config: FrozenBackbone(torch.nn.Identity(), description="M"))
    return []


def run(seen: list[tuple[Any, Settings]], *argv: str, **options: Any) -> int:
    def evaluate(backbone: Any, config: Settings) -> EvaluationResult:
        seen.append((backbone, config))
        return EvaluationResult(
            metrics={"size": config.size},
            datasets={},
            model="M",
            autocast_dtype=torch.float32,
            report="a report",
            details={"more": 1},
            files=[Path("other.csv")],
        )

    return run_command(
        ["model.dino_hub=dinov3_vits16", *argv],
        doc="What it does.",
        config_class=Settings,
        evaluate=evaluate,
        results_file="r.csv",
        **options,
    )


def test_settings_and_results_are_written_and_printed(
    seen: list[tuple[Any, Settings]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(seen, "size=5", f"output_dir={tmp_path}", config_file="used.yaml") == 0
    ((backbone, config),) = seen
    assert backbone.description == "M" and config == Settings(ModelConfig(dino_hub="dinov3_vits16"), 5, str(tmp_path))
    assert OmegaConf.load(tmp_path / "used.yaml").size == 5
    assert (tmp_path / "r.csv").read_text() == "size\n5\n"
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["results"] == {"size": 5} and content["more"] == 1 and content["model"] == "M"
    assert capsys.readouterr().out.splitlines()[-2:] == ["a report", f"written to {tmp_path}/r.csv, other.csv"]


@pytest.mark.parametrize("name", ["config", "config_file"])
def test_what_was_written_can_be_given_again(seen: list[tuple[Any, Settings]], name: str, tmp_path: Path) -> None:
    run(seen, "size=5", f"output_dir={tmp_path}")
    run(seen, f"{name}={tmp_path}/eval_config.yaml", f"output_dir={tmp_path}/again")
    assert [config.size for _, config in seen] == [5, 5]


def test_an_evaluation_may_load_its_own_model(seen: list[tuple[Any, Settings]], tmp_path: Path) -> None:
    run(seen, f"output_dir={tmp_path}", loads_model=False)
    assert seen[0][0] is None


def test_settings_are_checked_before_anything_is_made(seen: list[tuple[Any, Settings]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="size=-1"):
        run(seen, "size=-1", f"output_dir={tmp_path}/out")
    assert not seen and not (tmp_path / "out").exists()


def test_help_shows_the_docstring_and_every_key(
    seen: list[tuple[Any, Settings]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(seen, "size=5", "--help") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("What it does.\n") and "a number" in printed and "model.dino_hub" in printed
    assert not seen
