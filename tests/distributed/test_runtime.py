from __future__ import annotations

import os

import pytest
import torch

from dinov3.distributed import runtime


@pytest.fixture(autouse=True)
def no_choice_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(runtime.DEVICE_VARIABLE, raising=False)
    monkeypatch.setattr(runtime, "_chosen_device", None)


def test_automatic_device_is_cuda_where_there_is_one() -> None:
    assert runtime.device().type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_environment_variable_names_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINOV3_DEVICE", "cpu")
    assert runtime.device() == torch.device("cpu")


def test_device_is_preferred_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="'gpu' is not a device"), runtime.preferring("gpu"):
        runtime.device()
    assert runtime.DEVICE_VARIABLE not in os.environ
    monkeypatch.setenv(runtime.DEVICE_VARIABLE, "meta")
    with runtime.preferring("cpu"):
        assert runtime.device() == torch.device("cpu")
    with runtime.preferring(None):
        assert os.environ[runtime.DEVICE_VARIABLE] == "meta"
    assert os.environ[runtime.DEVICE_VARIABLE] == "meta"


def test_chosen_device_wins_over_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINOV3_DEVICE", "nonsense")
    assert runtime.set_device("cpu") == torch.device("cpu")
    assert runtime.device() == torch.device("cpu")


@pytest.mark.parametrize("name", ["nonsense", "cuda:99", pytest.param("gpu", id="no mark")])
def test_wrong_device_is_named_with_what_is_possible(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("DINOV3_DEVICE", name)
    with pytest.raises(ValueError, match=f"DINOV3_DEVICE={name}: .*{name}.*"):
        runtime.device()


@pytest.mark.parametrize("name", ["nonsense", "cuda:99"])
def test_wrong_device_of_a_flag_is_not_blamed_on_the_variable(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("DINOV3_DEVICE", "cpu")
    with runtime.preferring(name), pytest.raises(ValueError, match=f"^(device )?'{name}'"):
        runtime.device()
    assert runtime.device() == torch.device("cpu")


def test_cuda_device_is_that_of_the_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert runtime.device() == torch.device("cuda", 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # one visible device for each task
    assert runtime.device() == torch.device("cuda", 0)


def test_backend_follows_the_device() -> None:
    assert runtime.backend(torch.device("cpu")) == "gloo"
    assert runtime.backend(torch.device("cuda")) == "cpu:gloo,cuda:nccl"


def test_peak_memory_is_in_mebibytes() -> None:
    runtime.synchronize()
    before = runtime.max_memory_mib()
    if runtime.device().type == "cpu":
        # A bare interpreter with torch takes more than 100 MiB, no test machine has a TiB.
        assert 100 < before < 2**20
    ballast = torch.ones(int(before + 64) * 2**18, device=runtime.device())  # float32: that many MiB + 64
    assert runtime.max_memory_mib() > before + 32
    assert len(ballast) > 0


def test_device_random_state_is_restored() -> None:
    state = runtime.get_rng_state()
    if state is None:
        assert runtime.device().type == "cpu"
        return
    first = torch.rand(3, device=runtime.device())
    runtime.set_rng_state(state)
    assert torch.equal(torch.rand(3, device=runtime.device()), first)
