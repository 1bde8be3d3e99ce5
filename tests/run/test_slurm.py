"""Trainings as jobs of a real Slurm: submitted, preempted, queued again, and finished as if nothing had happened."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dinov3.run.submit import CheckpointableSubmitter, get_submitit_parser, submit_jobs
from dinov3.run.submit import main as launch_job
from dinov3.train import main
from dinov3.utils.cluster import slurm_answers
from tests.multiprocess import launch
from tests.train import tiny

from .jobs import TRAIN, start_submit, wait_until
from .one_node_slurm import OneNodeSlurm, SlurmUnavailableError, running_slurm

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

N_ITERATIONS = 40
TASKS = ("--cluster", "slurm", "--ngpus", 0, "--tasks-per-node", 2, "--timeout", 10)


@pytest.fixture(scope="session")
def slurm() -> Iterator[OneNodeSlurm]:
    try:
        with running_slurm() as cluster:
            yield cluster
    except SlurmUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def training(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    directory = tmp_path_factory.mktemp("training")
    config = tiny.write_config(directory / "tiny.yaml", tiny.write_images(directory / "images"))
    # No checkpoint except the last one and that of the preemption.
    options = [f"train.OFFICIAL_EPOCH_LENGTH={N_ITERATIONS // 2}", "checkpointing.period=10000"]
    return ["--config-file", str(config), *options]


@pytest.fixture(scope="session")
def undisturbed(training: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training in as many processes, without Slurm."""
    output = tmp_path_factory.mktemp("undisturbed")
    launch(main, 2, ["--output-dir", str(output), *training], output=output / "said.txt")
    return output


def test_preempted_training_resumes_and_ends_as_an_undisturbed_one_without_slurm(
    slurm: OneNodeSlurm, training: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    with (tmp_path / "launcher.txt").open("w+") as said:
        arguments = [TRAIN, *TASKS, "--wait", "--output-dir", output, *training]
        launcher = start_submit(*arguments, variables=slurm.environment, output=said)
        wait_until(lambda: iterations_done(output) > 2, 120, lambda: logs(tmp_path))
        job_id = re.search(r"slurm job (\d+)", (tmp_path / "launcher.txt").read_text())[1]

        slurm.run("scontrol", "requeue", job_id)  # sends SIGTERM

        wait_until(lambda: "stopped after iteration" in logs(output), 60, lambda: logs(tmp_path))
        assert 0 < iterations_done(output) < N_ITERATIONS, "the training was over before it was preempted"
        try:
            assert launcher.wait(timeout=180) == 0, logs(tmp_path)
        except subprocess.TimeoutExpired:
            launcher.kill()
            raise AssertionError(logs(tmp_path)) from None
    assert slurm.job(job_id)["Restarts"] == "1"
    assert slurm.job(job_id)["JobState"] == "COMPLETED"
    assert tiny.read_losses(output) == tiny.read_losses(undisturbed)
    tiny.assert_same_weights(tiny.read_teacher(output), tiny.read_teacher(undisturbed))


def test_several_calls_become_an_array(slurm: OneNodeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("dinov3.run.arguments.slurm_answers", slurm_answers)
    script = tmp_path / "script.py"
    script.write_text("def main(argv):\n    return argv\n")
    args = get_submitit_parser().parse_args(["--ngpus", "0", "--slurm-array-parallelism", "1"])
    args.output_dir = str(tmp_path / "%j")
    calls = [CheckpointableSubmitter(str(script), "main", [word], args.output_dir) for word in ("a", "b")]
    jobs = submit_jobs(calls, args, name="sweep")
    assert slurm.job(jobs[1].job_id)["ArrayTaskThrottle"] == "1"
    wait_until(lambda: all(job.paths.result_pickle.exists() for job in jobs), 120, lambda: logs(tmp_path))
    assert [job.result() for job in jobs] == [
        [f"--output-dir={tmp_path}/{job.job_id}", word] for job, word in zip(jobs, ("a", "b"), strict=True)
    ]


def test_refused_job_says_why_and_leaves_nothing(
    slurm: OneNodeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("dinov3.run.arguments.slurm_answers", slurm_answers)
    options = ["--cluster", "slurm", "--ngpus", "0", "--slurm-partition", "nosuch"]
    with pytest.raises(RuntimeError, match=r"Slurm refuses the job (.|\n)*nosuch"):
        launch_job([str(TRAIN), *options, "--output-dir", str(tmp_path / "out" / "%j")])
    assert list((tmp_path / "out").iterdir()) == []


def iterations_done(output: Path) -> int:
    metrics = output / "training_metrics.json"
    return len(tiny.read_metrics(output)) if metrics.exists() else 0


def logs(directory: Path) -> str:
    files = sorted([*directory.rglob("*_log.*"), *directory.rglob("*.txt")])
    return "\n".join(f"== {path}\n{path.read_text()[-5000:]}" for path in files)
