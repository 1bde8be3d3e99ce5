from __future__ import annotations

import random
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dinov3 import utils
from dinov3.utils.custom_callable import load_custom_callable


def test_token_lists_come_back_after_a_projection() -> None:
    xs = [torch.randn(2, 3, 4), torch.randn(5, 4)]
    flat, shapes, num_tokens = utils.cat_keep_shapes(xs)
    assert flat.shape == (11, 4) and num_tokens == [6, 5]
    wide = utils.uncat_with_shapes(torch.cat([flat, flat], dim=1), shapes, num_tokens)
    for got, x in zip(wide, xs, strict=True):
        assert torch.equal(got, torch.cat([x, x], dim=-1))


def test_default_device_is_where_new_tensors_go() -> None:
    assert utils.default_device() == torch.device("cpu")
    with torch.device("meta"):
        assert utils.default_device() == torch.device("meta")


def test_replacing_modules() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.ReLU()))
    utils.named_replace(lambda module, name: nn.GELU() if isinstance(module, nn.ReLU) else module, model)
    assert isinstance(model[1][0], nn.GELU)
    assert isinstance(utils.named_replace(lambda module, name: nn.Identity(), model, include_root=True), nn.Identity)


def test_counts_and_batchnorms() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    model[0].requires_grad_(False)
    assert utils.count_parameters(model) == 15
    assert utils.has_batchnorms(model) and not utils.has_batchnorms(model[0])


def test_seeds_fix_all_three_generators() -> None:
    def draw() -> tuple[float, float, float]:
        utils.fix_random_seeds(3)
        return torch.rand(()).item(), float(np.random.rand()), random.random()

    assert draw() == draw()


@pytest.mark.parametrize(
    ("name", "want"),
    [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("bf16", torch.bfloat16), (np.int64, torch.int64)],
)
def test_dtypes_by_name(name: object, want: torch.dtype) -> None:
    assert utils.as_torch_dtype(name) == want and utils.as_torch_dtype(want) == want


def test_git_state_never_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: object, **kwargs: object) -> None:
        raise FileNotFoundError("git")

    assert utils.get_sha().startswith("sha: ")
    monkeypatch.setattr(subprocess, "run", missing)
    assert utils.get_sha() == "sha: N/A, status: clean, branch: N/A"


def test_callables_from_files(tmp_path: Path) -> None:
    (tmp_path / "helper_of_mine.py").write_text("VALUE = 3\n")
    (tmp_path / "random.py").write_text("from helper_of_mine import VALUE\ndef f():\n    return VALUE\n")
    assert load_custom_callable(tmp_path / "random.py", "f")() == 3
    assert random.random() < 1  # the standard module is not replaced
    with pytest.raises(FileNotFoundError, match="there is no Python file"):
        load_custom_callable(tmp_path / "nothing.py", "f")
    with pytest.raises(AttributeError, match="does not define 'g'"):
        load_custom_callable(tmp_path / "random.py", "g")
