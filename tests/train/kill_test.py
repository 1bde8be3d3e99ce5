"""Kill a training again and again, at random moments and during saves; its end must be that of an undisturbed one.

    python -m tests.train.kill_test --kills 20 --terms 5 [--seed N] [key=value ...]

Notable: each life of the run is a fork of this process, because an interpreter with torch takes seconds to start.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from dinov3.checkpointer import find_latest_checkpoint, read_tensors
from dinov3.train import main as train
from dinov3.train.preemption import EXIT_STATUS

from . import tiny

PERIOD = 2
ITERATIONS_PER_LIFE = 4
POLL_SECONDS = 0.002
TIMEOUT_SECONDS = 300


@dataclass
class Tally:
    """What was done to the run."""

    kills: int = 0
    kills_while_saving: int = 0
    terms: int = 0
    lives: int = 1


def run(root: Path, *, n_kills: int, n_terms: int, seed: int, options: list[str]) -> Tally:
    """Train twice, once disturbed; raise an AssertionError unless both end alike.

    Args:
        root: an empty directory.
        n_kills: SIGKILLs, every other one while a checkpoint is being written.
        n_terms: SIGTERMs, after which the run must save and exit with the status that asks to be run again.
        seed: of the moments.
        options: `key=value` for the training.
    """
    last = ITERATIONS_PER_LIFE * (n_kills + n_terms) + 2 * PERIOD - 1
    config = tiny.write_config(
        root / "tiny.yaml",
        tiny.write_images(root / "images"),
        train={"OFFICIAL_EPOCH_LENGTH": (last + 1) // 2},
        checkpointing={"period": PERIOD},
    )
    arguments = ["--config-file", str(config), *options]
    assert wait_for(start([*arguments, "--output-dir", str(root / "undisturbed")])) == 0

    tally = Tally()
    rng = random.Random(seed)
    victim = [*arguments, "--output-dir", str(root / "disturbed")]
    blows = [signal.SIGKILL] * n_kills + [signal.SIGTERM] * n_terms
    rng.shuffle(blows)
    for blow in blows:
        disturb(victim, root / "disturbed", blow, rng, tally)
    assert wait_for(start(victim)) == 0
    compare(root / "undisturbed", root / "disturbed", last)
    return tally


def disturb(arguments: list[str], output: Path, blow: signal.Signals, rng: random.Random, tally: Tally) -> None:
    """One life of the run: it makes some progress, then it is killed, or told to stop."""
    before = n_lines(output)
    process = start(arguments)
    tally.lives += 1
    wanted = before + rng.randint(1, ITERATIONS_PER_LIFE - 1)
    for _ in polls(process, f"no iteration after {before}"):
        if n_lines(output) >= wanted:
            break
    if blow is signal.SIGTERM:
        time.sleep(rng.uniform(0, 0.05))
        os.kill(process, signal.SIGTERM)
        assert wait_for(process) == EXIT_STATUS
        newest = find_latest_checkpoint(output / "ckpt")
        assert newest is not None and int(newest.name) == last_iteration(output), "stopped without saving"
        tally.terms += 1
        return
    if tally.kills % 2:
        for _ in polls(process, "no save begins"):
            if is_saving(output):
                break
        time.sleep(rng.uniform(0, 0.02))
    else:
        time.sleep(rng.uniform(0, 0.1))
    os.kill(process, signal.SIGKILL)
    assert wait_for(process) == -signal.SIGKILL
    tally.kills += 1
    tally.kills_while_saving += is_saving(output)


def compare(expected: Path, got: Path, last: int) -> None:
    """Equal weights, EMA and moments, and equal losses wherever both runs logged them."""
    tiny.assert_same_weights(tiny.read_teacher(got), tiny.read_teacher(expected))
    tiny.assert_same_weights(*(read_tensors(output / "ckpt" / str(last), "model.") for output in (got, expected)))
    tiny.assert_same_weights(*(read_tensors(output / "ckpt" / str(last), "optimizer.") for output in (got, expected)))
    losses, want = tiny.read_losses(got), tiny.read_losses(expected)
    assert losses.keys() <= want.keys() and all(losses[iteration] == want[iteration] for iteration in losses)
    assert not list((got / "ckpt").glob(".tmp-*")), "a save that was cut off was not cleaned up"


def start(arguments: list[str]) -> int:
    """Fork a training; its output goes nowhere but to its log."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1)
        os.dup2(devnull, 2)
        train(arguments)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    finally:
        os._exit(status)


def wait_for(process: int) -> int:
    """The exit status; negative: the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def polls(process: int, complaint: str) -> Iterator[None]:
    """Look again and again, while the process lives and has time."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        ended, status = os.waitpid(process, os.WNOHANG)
        assert not ended, f"the run ended by itself with status {os.waitstatus_to_exitcode(status)}: {complaint}"
        yield
        time.sleep(POLL_SECONDS)
    raise AssertionError(complaint)


def is_saving(output: Path) -> bool:
    return any((output / "ckpt").glob(".tmp-*"))


def n_lines(output: Path) -> int:
    path = output / "training_metrics.json"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def last_iteration(output: Path) -> int:
    return max(tiny.read_losses(output))


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser("python -m tests.train.kill_test", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="SIGKILLs (default: 20)")
    parser.add_argument("--terms", type=int, default=5, metavar="N", help="SIGTERMs (default: 5)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments (default: 0)")
    parser.add_argument("options", nargs="*", metavar="key=value", help="settings of the training")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    os.environ.setdefault("DINOV3_DEVICE", "cpu")
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as root:
        tally = run(Path(root), n_kills=args.kills, n_terms=args.terms, seed=args.seed, options=args.options)
    print(
        f"{tally.kills} kills ({tally.kills_while_saving} of them during a save), {tally.terms} SIGTERMs, "
        f"{tally.lives} lives, {time.monotonic() - started:.0f} s: bit for bit the undisturbed run",
        file=sys.stdout,
    )


if __name__ == "__main__":
    main()
