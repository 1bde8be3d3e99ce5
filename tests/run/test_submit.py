from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import submitit

from dinov3.run.submit import CheckpointableSubmitter, get_submitit_parser, main, submit_jobs

from .jobs import submit, wait_until

SAY_ARGUMENTS = "import sys\ndef main(argv):\n    print('argv:', argv, '__name__:', __name__)\n"


@pytest.fixture
def script(tmp_path: Path) -> Path:
    return write_script(tmp_path, SAY_ARGUMENTS)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    before = surroundings()
    yield
    assert surroundings() == before


def surroundings() -> tuple[dict[str, str], list[str], str]:
    variables = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    return variables, sys.path[:], os.getcwd()


def write_script(directory: Path, code: str, name: str = "script.py") -> Path:
    path = directory / "scripts" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(code)
    return path


def dry_run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[list[str], str]:
    assert main([*map(str, argv), "--dry-run"]) == 0
    captured = capsys.readouterr()
    return captured.out.splitlines(), captured.err


def test_dry_run_prints_the_batch_script_without_a_cluster(
    script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--nodes", 2, "--ngpus", 4, "--cpus-per-task", 6, "--mem-gb", 0, "--slurm-account", "acc"]
    lines, said = dry_run(capsys, script, *options, "--slurm-nice", 5, "--output-dir", tmp_path / "%j", "a=1")
    assert lines[0] == "#!/bin/bash"
    for option in (
        "account=acc", "cpus-per-task=6", "gpus-per-node=4", "ntasks-per-node=4", "nodes=2", "mem=0GB", "nice=5",
        "time=2800", "signal=USR2@120", "open-mode=append", "job-name=script:main",
    ):  # fmt: skip
        assert f"#SBATCH --{option}" in lines
    (srun,) = [line for line in lines if line.startswith("srun")]
    assert "--kill-on-bad-exit=1 --cpus-per-task=6" in srun and str(tmp_path / "%j") in srun
    assert f"{script} --output-dir={tmp_path}/%j a=1" in said
    assert [path.name for path in tmp_path.iterdir()] == ["config", "scripts"]


def test_what_is_not_set_is_not_passed_to_slurm(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines, _ = dry_run(capsys, script, "--ngpus", 0)
    options = {line.split("=")[0].removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")}
    assert options == {
        "error", "job-name", "nodes", "ntasks-per-node", "open-mode", "output", "requeue", "signal", "time", "wckey"
    }  # fmt: skip
    assert "#SBATCH --ntasks-per-node=1" in lines


@pytest.mark.parametrize(
    "name, code, message",
    [
        ("notes.txt", "", "notes.txt is not a Python file"),
        ("broken.py", "def main(:", "broken.py is not valid Python"),
        ("other.py", "def mian(argv): pass", r"does not define 'main' \(did you mean 'mian'\?\)"),
        ("none.py", "x = 1", "does not define 'main'; its functions: none"),
    ],
)
def test_script_that_cannot_run_is_refused_before_it_is_queued(
    name: str, code: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        main([str(write_script(tmp_path, code, name)), "--cluster", "local", "--output-dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "code",
    ["if True:\n    def main(argv): pass", "from json import dumps as main", "from json import *", "main = print"],
)
def test_functions_are_found_wherever_a_script_defines_them(
    code: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dry_run(capsys, write_script(tmp_path, code))


def test_missing_script_and_missing_submitit_say_what_to_do(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"script nothing\.py does not exist"):
        main(["nothing.py", "--cluster", "debug"])
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ModuleNotFoundError, match="pip install submitit"):
        main([str(script), "--dry-run"])


def test_debug_runs_the_script_in_this_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_script(tmp_path, "WORD = 'beside the script'", "helper_of_script.py")
    code = "import os\ndef main(argv):\n    from helper_of_script import WORD\n    print(os.getpid(), argv, WORD)\n"
    script = write_script(tmp_path, code, "json.py")
    standard = sys.modules["json"]
    assert main([str(script), "--cluster", "debug", "a=1", f"output_dir={tmp_path / 'out'}", "--flag"]) == 0
    assert (
        f"{os.getpid()} ['--output-dir={tmp_path / 'out'}', 'a=1', '--flag'] beside the script"
        in capsys.readouterr().out
    )
    assert sys.modules["json"] is standard and not hasattr(standard, "main")
    sys.modules.pop("helper_of_script")


def test_debug_raises_what_the_script_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = write_script(tmp_path, "def main(argv):\n    raise KeyError('the reason')\n")
    with open(os.devnull) as nobody, pytest.raises(KeyError, match="the reason"):
        monkeypatch.setattr(sys, "stdin", nobody)
        main([str(script), "--cluster", "debug", "--output-dir", str(tmp_path / "out")])


def test_script_that_exits_well_is_a_success(tmp_path: Path) -> None:
    script = write_script(tmp_path, "import sys\ndef main(argv):\n    sys.exit(int(argv[1]))\n")
    assert main([str(script), "--cluster", "debug", "--output-dir", str(tmp_path / "out"), "0"]) == 0
    with pytest.raises(SystemExit, match="3"):
        main([str(script), "--cluster", "debug", "--output-dir", str(tmp_path / "out"), "3"])


def test_job_records_its_command_and_the_state_of_the_code(tmp_path: Path) -> None:
    script = write_script(tmp_path, "def main(argv): pass\n")
    git = ["git", "-C", str(script.parent), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q", "-b", "trunk"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    script.write_text("def main(argv): pass  # not committed\n")
    (script.parent / "new.txt").touch()

    main([str(script), "--cluster", "debug", "--output-dir", str(tmp_path / "out"), "a=1"])

    (path,) = (tmp_path / "out").glob("*_launch.json")
    record = json.loads(path.read_text())
    assert record["git"] == {
        "checkout": str(script.parent), "commit": commit, "branch": "trunk", "status": [" M script.py", "?? new.txt"]
    }  # fmt: skip
    assert record["working_directory"] == os.getcwd() and record["script"]["args"] == ["a=1"]
    assert f"{script} --cluster debug" in record["command"]
    (patch,) = (tmp_path / "out").glob("*_uncommitted.patch")
    assert "+def main(argv): pass  # not committed" in patch.read_text()
    subprocess.run([*git, "apply", "-R", "--check", str(patch)], check=True)


def test_requeued_job_makes_the_same_call_again(
    script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submitter = CheckpointableSubmitter(str(script), "main", ["a=1"], str(tmp_path / "out"))
    for _ in range(2):
        again = submitter.checkpoint()
        assert isinstance(again, submitit.helpers.DelayedSubmission)
        submitter = again.function
        again.result()
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("argv:")]
    assert len(said) == 2 and said[0] == said[1]
    assert said[0].startswith(f"argv: ['--output-dir={tmp_path}/out', 'a=1'] __name__: _dinov3_file_script_")


def test_several_calls_become_several_jobs(script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = get_submitit_parser().parse_args(["--cluster", "debug"])
    args.output_dir = str(tmp_path / "%j")
    calls = [CheckpointableSubmitter(str(script), "main", [word], args.output_dir) for word in ("a", "b")]
    jobs = submit_jobs(calls, args, name="sweep")
    for job in jobs:
        job.result()
    said = capsys.readouterr().out
    for job, word in zip(jobs, ("a", "b"), strict=True):
        assert f"argv: ['--output-dir={tmp_path}/{job.job_id}', '{word}']" in said


@pytest.mark.slow
@pytest.mark.distributed
def test_local_tasks_know_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = """
    import os
    import torch
    from dinov3 import distributed

    NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "CUDA_VISIBLE_DEVICES")

    def main(argv):
        values = [os.environ[name] for name in NAMES]
        distributed.enable()
        total = distributed.all_reduce(torch.tensor(distributed.get_rank() + 1.0))
        print("task", *values, float(total), argv, os.getcwd(), flush=True, force=True)
        distributed.disable()
    """
    script = write_script(tmp_path, textwrap.dedent(code))
    options = ["--cluster", "local", "--ngpus", "2", "--wait", "--output-dir", str(tmp_path / "%j")]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setenv("CUDA_VISIBLE_DEVICES", "5,3,1")
        assert main([str(script), *options, "a=1"]) == 0
    shown = capsys.readouterr().out
    (output,) = [path.parent for path in tmp_path.glob("*/*_launch.json")]
    said = [line for path in sorted(output.glob("*_log.out")) for line in path.read_text().splitlines()]
    arguments = [f"--output-dir={output}", "a=1"]
    assert [line for line in said if line.startswith("task")] == [
        f"task {rank} 2 {rank} 2 127.0.0.1 5,3 3.0 {arguments} {tmp_path}" for rank in range(2)
    ]
    assert f"task 0 2 0 2 127.0.0.1 5,3 3.0 {arguments} {tmp_path}" in shown, "the log was not shown"
    assert f"submitted local job {output.name}" in shown
    assert not (tmp_path / "%j").exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_failing_local_task_ends_the_others_and_its_error_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = """
    import os, time

    def main(argv):
        if os.environ["RANK"] == "1":
            raise ValueError("this is why")
        time.sleep(1000)  # longer than the test may take
    """
    script = write_script(tmp_path, textwrap.dedent(code))
    assert (
        main([str(script), "--cluster", "local", "--ngpus", "2", "--wait", "--output-dir", str(tmp_path / "out")]) == 1
    )
    shown = capsys.readouterr().err
    assert "task 1 failed: ValueError: this is why" in shown
    assert "task 0 was killed" in shown


@pytest.mark.slow
@pytest.mark.distributed
def test_launcher_runs_by_path_and_its_local_job_continues_without_it_until_it_is_killed(tmp_path: Path) -> None:
    script = write_script(
        tmp_path, "import time\ndef main(argv):\n    print('here', flush=True)\n    time.sleep(100)\n"
    )
    # The output is read to its end, so the job must not hold it open.
    done = submit(script, "--cluster", "local", "--ngpus", 0, "--output-dir", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    job = int(next(line for line in done.stdout.splitlines() if "to stop it" in line).split()[-1])
    log = tmp_path / "out" / f"{job}_0_log.out"
    wait_until(lambda: log.exists() and "here" in log.read_text(), 60)
    os.kill(job, 15)
    wait_until(lambda: not _is_running(job), 20)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z" if Path("/proc").exists() else True
