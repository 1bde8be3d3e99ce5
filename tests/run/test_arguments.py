from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dinov3.distributed import runtime
from dinov3.run.arguments import parse_arguments, user_settings
from dinov3.run.job import split_output_dir, with_output_dir

ON_SLURM = ["script.py", "--cluster", "slurm", "--dry-run"]


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(argv)
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_what_the_launcher_does_not_know_goes_to_the_script_in_order() -> None:
    args = parse_arguments(["script.py", "a=1", "--nodes", "2", "--flag", "x", "--dry-run", "-v", "b=[1, 2]", "--c=3"])
    assert args.script_args == ["a=1", "--flag", "x", "-v", "b=[1, 2]", "--c=3"]
    assert (args.nodes, args.dry_run) == (2, True)


def test_options_of_the_script_are_not_taken_for_abbreviations() -> None:
    args = parse_arguments([*ON_SLURM, "--time", "3", "--out", "x", "--ex", "y"])
    assert args.script_args == ["--time", "3", "--out", "x", "--ex", "y"]


def test_two_dashes_end_the_options_of_the_launcher() -> None:
    args = parse_arguments([*ON_SLURM, "--ngpus", "2", "--", "--ngpus", "3", "--", "--wait"])
    assert args.ngpus == 2 and not args.wait
    assert args.script_args == ["--ngpus", "3", "--", "--wait"]


@pytest.mark.parametrize(
    "spelling", [["--output-dir", "X"], ["--output-dir=X"], ["output_dir=X"], ["--", "output_dir=X"]]
)
def test_every_spelling_of_the_output_directory_counts_and_none_is_left(spelling: list[str]) -> None:
    args = parse_arguments([*ON_SLURM, "a=1", *spelling])
    assert args.output_dir == "X"
    assert args.script_args == ["a=1"]


def test_last_output_directory_wins() -> None:
    assert split_output_dir(["--output-dir=A", "x", "output_dir=B"]) == ("B", ["x"])
    assert parse_arguments([*ON_SLURM, "--output-dir", "A", "--", "output_dir=B"]).output_dir == "B"


def test_output_directory_has_a_default_and_needs_a_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_arguments(["dir/script.py", "--dry-run"]).output_dir == "outputs/script/%j"
    assert "--output-dir: expected a directory" in error_of(capsys, "script.py", "--output-dir")
    assert "output_dir: expected a directory" in error_of(capsys, "script.py", "output_dir=")


def test_exactly_one_output_directory_reaches_the_script(tmp_path: Path) -> None:
    expected = [f"--output-dir={tmp_path}/5", "a"]
    assert with_output_dir(["a"], f"{tmp_path}/%j", "5") == expected
    for own in ([f"--output-dir={tmp_path}/5"], ["--output-dir", f"{tmp_path}/%j"], [f"output_dir={tmp_path}/%j"]):
        assert with_output_dir([*own, "a"], "elsewhere", "5") == expected
    assert with_output_dir(expected, "elsewhere", "5") == expected


def test_nothing_about_a_site_is_built_in(settings_file: Path) -> None:
    assert user_settings() == {}
    settings_file.write_text("slurm_partition: p\nslurm_qos:\n")
    assert user_settings() == {"slurm_partition": "p"}


def test_flag_beats_environment_beats_file_beats_default(settings_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings_file.write_text("slurm_partition: file\nslurm_qos: file\nslurm_account: 7\nslurm_setup: module load x\n")
    monkeypatch.setenv("DINOV3_SLURM_PARTITION", "environment")
    monkeypatch.setenv("DINOV3_SLURM_QOS", "environment")
    args = parse_arguments([*ON_SLURM, "--slurm-partition", "flag"])
    assert (args.slurm_partition, args.slurm_qos, args.slurm_account) == ("flag", "environment", "7")
    assert (args.slurm_constraint, args.nodes, args.ngpus) == (None, 1, 8)
    assert args.slurm_setup == ["module load x"]
    assert parse_arguments([*ON_SLURM, "--slurm-setup", "a", "--slurm-setup", "b"]).slurm_setup == ["a", "b"]


@pytest.mark.parametrize(
    "content, message",
    [
        ("slurm_partion: x", "'slurm_partion' (did you mean 'slurm_partition'?)"),
        ("mem_gb: lots", "mem_gb: expected a number, not 'lots'"),
        ("nodes: 1.5", "nodes: expected a whole number, not 1.5"),
        ("nodes: true", "nodes: expected a whole number, not True"),
        ("slurm_setup: [1]", "slurm_setup: expected shell lines, not [1]"),
        ("cluster: slrm", "cluster: expected one of auto, slurm, local, debug, not 'slrm' (did you mean 'slurm'?)"),
        ("- x", "expected lines such as 'slurm_partition: NAME', not a list"),
        ("a: [", "is not YAML"),
    ],
)
def test_wrong_settings_are_named_with_their_file(settings_file: Path, content: str, message: str) -> None:
    settings_file.write_text(content)
    with pytest.raises(ValueError) as error:
        parse_arguments(["script.py"])
    assert str(settings_file) in str(error.value) and message in str(error.value)


def test_wrong_setting_in_the_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINOV3_CPUS_PER_TASK", "many")
    with pytest.raises(ValueError, match="DINOV3_CPUS_PER_TASK: expected a whole number, not 'many'"):
        parse_arguments(["script.py"])


@pytest.mark.parametrize("answers, expected", [(True, "slurm"), (False, "local")])
def test_automatic_cluster_is_slurm_if_it_answers(
    answers: bool, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dinov3.run.arguments.slurm_answers", lambda: answers)
    assert parse_arguments(["script.py"]).cluster == expected
    assert ("--cluster local" in capsys.readouterr().err) == (expected == "local")


@pytest.mark.parametrize(
    "gpus, argv, expected", [(0, [], 0), (4, [], 4), (4, ["--ngpus", "3"], 3), (0, ["--ngpus", "2"], 2)]
)
def test_this_machine_runs_a_task_for_each_gpu_it_has(
    gpus: int, argv: list[str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "device", lambda: torch.device("cuda" if gpus else "cpu"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: gpus)
    assert parse_arguments(["script.py", "--cluster", "local", *argv]).ngpus == expected


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--cluster", "sulrm"], "--cluster: expected one of auto, slurm, local, debug, not 'sulrm'"),
        (["--cluster", "slurm"], "`scontrol ping` finds no controller"),
        (["--cluster", "local", "--nodes", "2"], "--nodes 2: --cluster local runs on this machine only"),
        (["--cluster", "local", "--output-dir", "a/%j/b"], "%j can only be in the last part"),
        (["--ngpus", "-1"], "--ngpus: expected at least 0, not -1"),
        (["--cpus-per-task", "0"], "--cpus-per-task: expected at least 1, not 0"),
        (["--nodes", "two"], "argument --nodes: invalid int value: 'two'"),
    ],
)
def test_wrong_options_are_named(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in error_of(capsys, "script.py", *argv)


def test_missing_script_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "SCRIPT" in error_of(capsys, "--ngpus", "2")


def test_more_gpus_than_this_machine_has_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runtime, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert "3 GPUs were requested, but this machine has 2" in error_of(
        capsys, "s.py", "--cluster", "local", "--ngpus", "3"
    )


@pytest.mark.parametrize(
    "token, near", [("--partition=x", "--slurm-partition"), ("--slurm-partion", "--slurm-partition")]
)
def test_option_that_looks_like_one_of_the_launcher_is_pointed_out(
    token: str, near: str, capsys: pytest.CaptureFixture[Any]
) -> None:
    args = parse_arguments([*ON_SLURM, token])
    assert args.script_args == [token]
    flag = token.partition("=")[0]
    expected = f"{flag} is not a launcher option, passing it to the script (did you mean '{near}'?)\n"
    assert expected in capsys.readouterr().err
