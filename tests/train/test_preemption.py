"""A signal stops a training after the step, with a checkpoint, on all processes at once."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dinov3 import distributed
from dinov3.checkpointer import find_all_checkpoints
from dinov3.train import main, preemption
from dinov3.train.data_loading import build_train_loader
from dinov3.train.loop import Trainer
from dinov3.train.preemption import EXIT_STATUS, SIGNALS, Preemption
from dinov3.train.step import _average_over_ranks
from tests.multiprocess import run_ranks, start

from . import tiny


@pytest.fixture(autouse=True)
def handlers_are_left_as_they_were() -> Iterator[None]:
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    after = [signal.getsignal(number) for number in SIGNALS]
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)
    assert after == before


def make_trainer(tmp_path: Path, preemption: Preemption, **train: Any) -> Trainer:
    return tiny.make_trainer(tmp_path, period=4, preemption=preemption, **train)


def signalled(loader: Any, number: int, at_batch: int) -> Iterator[Any]:
    for index, batch in enumerate(loader):
        if index == at_batch:
            os.kill(os.getpid(), number)
        yield batch


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_signal_is_only_noted(number: signal.Signals) -> None:
    with Preemption() as stop:
        assert not stop.is_requested
        os.kill(os.getpid(), number)
        assert stop.is_requested and stop.received is number
        with pytest.raises(SystemExit) as left:
            stop.leave()
    assert left.value.code == EXIT_STATUS


def test_stopped_run_saves_after_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.write_config(
        tmp_path / "tiny.yaml",
        tiny.write_images(tmp_path / "images"),
        train={"OFFICIAL_EPOCH_LENGTH": 2, "grad_accumulation_steps": 2},
    )
    iterate = Trainer._iterate
    monkeypatch.setattr(
        Trainer, "_iterate", lambda self, loader, start: iterate(self, signalled(loader, signal.SIGTERM, 2), start)
    )
    with pytest.raises(SystemExit) as left:
        main(["--config-file", str(config), "--output-dir", str(tmp_path / "out")])
    assert left.value.code == EXIT_STATUS
    # The third batch belongs to the second step.
    assert [path.name for path in find_all_checkpoints(tmp_path / "out" / "ckpt")] == ["1"]
    assert sorted(tiny.read_losses(tmp_path / "out")) == [0, 1]


def test_signal_in_the_last_step_lets_the_run_finish(tmp_path: Path) -> None:
    with Preemption() as stop:
        trainer = make_trainer(tmp_path, stop)
        trainer.run(data_loader=signalled(build_train_loader(trainer.cfg), signal.SIGTERM, at_batch=5))
    assert (tmp_path / "out" / "teacher_checkpoint.pth").exists()


def test_previous_handler_is_called_after_the_save(tmp_path: Path) -> None:
    seen: list[Any] = []

    def requeue(number: int, frame: Any) -> None:
        seen.append((number, [path.name for path in find_all_checkpoints(tmp_path / "out" / "ckpt")]))
        sys.exit(3)

    signal.signal(signal.SIGUSR2, requeue)
    try:
        with Preemption() as stop, pytest.raises(SystemExit) as left:
            trainer = make_trainer(tmp_path, stop)
            trainer.run(data_loader=signalled(build_train_loader(trainer.cfg), signal.SIGUSR2, at_batch=0))
        assert signal.getsignal(signal.SIGUSR2) is requeue
    finally:
        signal.signal(signal.SIGUSR2, signal.SIG_DFL)
    assert left.value.code == 3 and seen == [(signal.SIGUSR2, ["0"])]


def test_previous_handler_that_does_nothing_is_not_the_end() -> None:
    # submitit's handler of SIGTERM is such a one.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        with Preemption() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(SystemExit) as left:
                stop.leave()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert left.value.code == EXIT_STATUS


def test_only_a_second_interrupt_ends_at_once() -> None:
    with Preemption() as stop:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert stop.received is signal.SIGTERM
    with Preemption() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received is signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_outside_the_main_thread_signals_stay_as_they_are() -> None:
    problems: list[BaseException] = []

    def enter() -> None:
        try:
            with Preemption() as stop:
                assert not stop.is_requested
        except BaseException as error:
            problems.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert problems == []


def ask(rank: int, world_size: int) -> dict[str, Any]:
    """What the ranks learn of each other's requests: in one group, and in the two groups of a multi-distillation."""
    values = {"loss": torch.tensor(float(rank))}
    requests = {"stop": rank == 1, "save": rank == 0, "saving": False}
    together = _average_over_ranks(values, requests, torch.device("cpu"))
    distributed.new_subgroups([[0], [1]])
    apart = _average_over_ranks({"loss": torch.tensor(float(rank))}, requests, torch.device("cpu"))
    return {
        "together": (float(together[0]["loss"]), together[2]),
        "apart": (float(apart[0]["loss"]), apart[2]),
        "left": leave(rank),
    }


def leave(rank: int) -> list[Any]:
    """One rank has got the signal: rank 0 hands it on, all leave."""
    seen: list[Any] = []
    preemption.REQUEUE_TIMEOUT = preemption.timedelta(seconds=20)
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: seen.append(number))
    with Preemption() as stop:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGUSR2)
        try:
            stop.leave()
        except SystemExit as end:
            seen.append(end.code)
    return seen


@pytest.mark.distributed
def test_all_ranks_learn_what_one_asks_for() -> None:
    first, second = run_ranks(ask, 2)
    assert first["together"] == second["together"] == (0.5, {"stop", "save"})
    # Metrics belong to a student, requests to the job.
    assert first["apart"] == (0.0, {"stop", "save"}) and second["apart"] == (1.0, {"stop", "save"})
    assert first["left"] == [signal.SIGUSR2, EXIT_STATUS] and second["left"] == [EXIT_STATUS]


def train_in_own_group(arguments: list[str]) -> None:
    os.setsid()
    # As in a command: this process would start its workers from a new server, which takes seconds.
    multiprocessing.set_start_method("fork", force=True)
    main(arguments)


@pytest.mark.slow
def test_command_survives_a_signal_to_its_whole_process_group(tmp_path: Path) -> None:
    # Slurm and terminals send it to the loader workers, too.
    config = tiny.write_config(
        tmp_path / "tiny.yaml",
        tiny.write_images(tmp_path / "images"),
        train={"OFFICIAL_EPOCH_LENGTH": 500, "num_workers": 2},
    )
    output, said = tmp_path / "out", tmp_path / "said.txt"
    process = start(train_in_own_group, ["--config-file", str(config), "--output-dir", str(output)], output=said)
    deadline = time.monotonic() + 120
    while not (said.exists() and re.search("Training.*eta", said.read_text())):
        assert process.is_alive() and time.monotonic() < deadline, said.read_text()
        time.sleep(0.01)
    assert process.pid is not None
    os.killpg(process.pid, signal.SIGTERM)
    process.join(120)
    assert process.exitcode == EXIT_STATUS, said.read_text()
    (newest,) = find_all_checkpoints(output / "ckpt")
    assert int(newest.name) == max(tiny.read_losses(output))
