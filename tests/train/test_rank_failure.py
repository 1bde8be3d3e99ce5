"""One process of a training dies: the other ends within a minute and says why."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from dinov3.train import rank_failure

from . import tiny

REPOSITORY = Path(__file__).parents[2]
GRACE_SECONDS = 2.0

# One interpreter, which forks both ranks of each case, because torch takes seconds to import.
DRIVER = """
    import json, os, signal, sys, time
    from dinov3.train import main, rank_failure
    from dinov3.train import loop
    from dinov3.utils.command_line import run_command_line

    root, config, ports, grace = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), float(sys.argv[4])
    rank_failure.GRACE_SECONDS = grace
    train_step = loop.train_step

    def fail(kind, rank):
        def step(*args, iteration, **kwargs):
            if iteration == 1 and rank == 1:
                if kind == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise ArithmeticError("the wheel is broken")
            if iteration == 1 and kind == "raises, and the other hangs":
                time.sleep(100)
            return train_step(*args, iteration=iteration, **kwargs)
        return step

    def run(kind, rank, port):
        environment = dict(TORCHELASTIC_RUN_ID="x", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2",
                           RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2")
        os.environ.update(environment)
        loop.train_step = fail(kind, rank)
        output = os.path.join(root, kind)
        os.makedirs(output, exist_ok=True)
        os.dup2(os.open(os.path.join(output, f"out{rank}.txt"), os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(1, 2)
        try:
            run_command_line(lambda: main(["--config-file", config, "--output-dir", output]))
        except SystemExit as end:
            return end.code
        except BaseException:
            import traceback
            traceback.print_exc()
            return 1

    results = {}
    for kind, port in ports.items():
        children = {}
        for rank in range(2):
            if (child := os.fork()) == 0:
                status = run(kind, rank, port)
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(status)
            children[child] = rank
        ends = {}
        for _ in range(2):
            child, status = os.wait()
            ends[children[child]] = (os.waitstatus_to_exitcode(status), time.monotonic())
        results[kind] = {"codes": [ends[rank][0] for rank in range(2)], "seconds": ends[0][1] - ends[1][1]}
    print(json.dumps(results))
"""
KINDS = ("raises", "killed", "raises, and the other hangs")


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """How both ranks of each case ended, and how many seconds later rank 0 did than rank 1, which failed."""
    root = tmp_path_factory.mktemp("lost-ranks")
    config = tiny.write_config(root / "tiny.yaml", tiny.write_images(root / "images"), train={"batch_size_per_gpu": 2})
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in KINDS]
    ports = {kind: listener.getsockname()[1] for kind, listener in zip(KINDS, listeners, strict=True)}
    for listener in listeners:
        listener.close()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(DRIVER), str(root), str(config), json.dumps(ports), str(GRACE_SECONDS)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return root, json.loads(done.stdout)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_other_rank_ends_with_the_error_of_the_one_that_died(ends: tuple[Path, dict[str, Any]], kind: str) -> None:
    root, results = ends
    assert results[kind]["codes"] == [1, -9 if kind == "killed" else 1]
    assert results[kind]["seconds"] < 30
    logs = root / kind / "logs"
    said = (root / kind / "out0.txt").read_text() + (logs / "log.txt").read_text()
    if kind == "killed":
        assert "Another process of this training is gone without an error message" in said
        assert not (logs / "error.rank1.txt").exists()
        return
    assert "rank 1 failed: ArithmeticError: the wheel is broken" in said
    assert "the wheel is broken" in (logs / "error.rank1.txt").read_text()
    assert "Traceback" in (logs / "log.txt.rank1").read_text()


def test_first_error_that_is_not_the_loss_of_another_counts(tmp_path: Path) -> None:
    (tmp_path / "error.rank0.txt").write_text("Traceback\ndinov3.train.rank_failure.LostRankError: rank 2 failed\n")
    (tmp_path / "error.rank2.txt").write_text("Traceback\nValueError: bad crop\n")
    assert "rank 2 failed: ValueError: bad crop" in rank_failure._explain(tmp_path)


def test_old_errors_go_when_a_run_starts(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "error.rank0.txt").touch()
    with rank_failure.ending_together(tmp_path):
        assert list((tmp_path / "logs").iterdir()) == []
