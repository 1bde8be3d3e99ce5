"""What the parsers of all commands say about flags that do not exist."""

from __future__ import annotations

import importlib

import pytest

from dinov3.configs import ConfigError
from dinov3.eval.command.config import cli_parser
from dinov3.utils.command_line import ArgumentParser, suggest_flag

#: Every command that takes flags; the launcher passes unknown ones on, and evaluations take key=value.
COMMANDS = {
    "dinov3.train.train": "--config-file",
    "dinov3.configs.__main__": "--processes",
    "dinov3.hub.convert": "--overwrite",
    "dinov3.hub.extract": "--batch-size",
    "dinov3.hub.export": "--out",
    "dinov3.hub.summary": "--weights",
    "dinov3.data.check": "--output-dir",
    "dinov3.data.datasets.dump": "--help",
    "dinov3.eval.report": "--output-dir",
    "dinov3.eval.depth.predict": "--backbone-weights",
    "dinov3.eval.segmentation.predict": "--on-bad-image",
    "dinov3.checkpointer.consolidate": "--safetensors",
    "dinov3.checkpointer.inspect": "--all",
    "dinov3.demo.dense_data": "--help",
    "dinov3.demo.__main__": "--output-dir",
}


@pytest.mark.parametrize(("module", "flag"), COMMANDS.items(), ids=COMMANDS)
def test_every_command_names_the_unknown_flag_and_the_right_one(
    module: str, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = f"{flag.replace('-', '_').replace('__', '--', 1)}x"
    with pytest.raises(SystemExit):
        importlib.import_module(module).main([wrong, "value"])
    assert f"unknown flag: {wrong} (did you mean '{flag}'?)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("--config_file", " (did you mean '--config-file'?)"),
        ("--config_file=a.yaml", " (did you mean '--config-file'?)"),
        ("--local_rank=0", " (torch.distributed.launch passes it: start with torchrun, which needs no such flag)"),
        ("--local-rank", " (torch.distributed.launch passes it: start with torchrun, which needs no such flag)"),
        ("--something-else", ""),
    ],
)
def test_suggestion(given: str, hint: str) -> None:
    assert suggest_flag(given, ["--config-file", "--output-dir"]) == hint


def test_values_that_look_like_numbers_are_not_flags() -> None:
    parser = ArgumentParser()
    parser.add_argument("--shift", type=float)
    assert parser.parse_args(["--shift", "-1.5"]).shift == -1.5


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--config-file", "a.yaml"],
            "unknown flag '--config-file': settings are given as key=value, here config_file=",
        ),
        (
            ["--model.weights=a"],
            "unknown flag '--model.weights=a': settings are given as key=value, here model.weights=a;",
        ),
        (
            ["--local-rank=0"],
            r"unknown flag '--local-rank=0' \(torch.distributed.launch passes it: start with torchrun",
        ),
    ],
)
def test_evaluations_take_settings_instead_of_flags(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cli_parser(argv)
