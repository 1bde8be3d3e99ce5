"""Freed memory that the process keeps for the next tensors."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from dinov3.configs import exit_job, setup_job
from dinov3.hub import backbones
from dinov3.hub.weights import load_backbone_
from dinov3.models.convnext import ConvNeXt
from dinov3.utils import memory
from dinov3.utils.command_line import run_command_line
from dinov3.utils.memory import keep_freed_memory

needs_glibc = pytest.mark.skipif(not memory._is_glibc(), reason="this C library is not glibc")

# In a process of its own, because a larger block that was freed before has the same effect.
COUNT_FAULTS = """
import resource
import torch
from dinov3.utils.memory import keep_freed_memory

def count():
    for _ in range(6):  # the first find no place for their tensors in what is free
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        tensors = [torch.zeros(2**20, dtype=torch.uint8).add_(1) for _ in range(16)]
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(resource.getpagesize(), count(), keep_freed_memory(), count())
"""


@needs_glibc
def test_operations_find_the_memory_of_those_before() -> None:
    done = subprocess.run([sys.executable, "-c", COUNT_FAULTS], check=True, capture_output=True, text=True)
    page, before, has_effect, after = done.stdout.split()
    n_pages = 16 * 2**20 // int(page)
    assert has_effect == "True" and int(before) > n_pages / 2 and int(after) < n_pages / 10


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Arguments of the calls of `mallopt`, none of which is made."""
    calls: list[tuple[int, int]] = []

    def mallopt(parameter: int, value: int) -> int:
        calls.append((parameter, value))
        return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    return calls


def run_a_command() -> None:
    with pytest.raises(SystemExit):
        run_command_line(lambda: None)


def run_a_job() -> None:
    setup_job(distributed_enabled=False, logging_enabled=False, seed=None)
    exit_job()


def load_a_model() -> None:
    model = ConvNeXt(depths=[1, 1, 1, 1], dims=[4, 4, 4, 4])
    load_backbone_(model, model.state_dict())


def build_a_model() -> None:
    backbones.dinov3_vits16(pretrained=False)


@needs_glibc
@pytest.mark.parametrize("start", [run_a_command, run_a_job, load_a_model, build_a_model])
def test_what_starts_computing_keeps_memory(start: Callable[[], Any], calls: list[tuple[int, int]]) -> None:
    start()
    assert calls == [(-3, 32 * 2**20), (-1, 512 * 2**20)]


@pytest.mark.parametrize(
    ("name", "value"), [("MALLOC_TRIM_THRESHOLD_", "131072"), ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=9")]
)
def test_what_users_chose_stays(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, calls: list[tuple[int, int]]
) -> None:
    monkeypatch.setenv(name, value)
    assert not keep_freed_memory() and not calls


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch, calls: list[tuple[int, int]]) -> None:
    monkeypatch.delattr("os.confstr", raising=False)
    assert not keep_freed_memory() and not calls
