"""The same training on a CUDA device: one process, mixed precision, and float32 against the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dinov3.distributed import runtime
from dinov3.models.vision_transformer import vit_tiny
from dinov3.train import main

from . import tiny

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(runtime.DEVICE_VARIABLE, "cuda")


@pytest.mark.parametrize("param_dtype", ["fp32", "bf16"])
def test_a_run_trains_and_resumes(param_dtype: str, tmp_path: Path) -> None:
    config = tiny.write_config(
        tmp_path / "tiny.yaml",
        tiny.write_images(tmp_path / "images"),
        compute_precision={"param_dtype": param_dtype},
        checkpointing={"period": 5},
    )
    arguments = ["--config-file", str(config), "--output-dir", str(tmp_path / "run"), "train.OFFICIAL_EPOCH_LENGTH=5"]
    main(arguments)
    main([*arguments, "optim.epochs=3"])
    losses = tiny.read_losses(tmp_path / "run")
    assert sorted(losses) == list(range(15)) and losses[14] < losses[0]
    assert all(tensor.isfinite().all() for tensor in tiny.read_teacher(tmp_path / "run").values())


def test_features_are_those_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    model = vit_tiny(depth=2, patch_size=8, n_storage_tokens=2, layerscale_init=0.5, pos_embed_rope_dtype="fp32")
    model.init_weights()
    images = torch.randn(2, 3, 48, 64)
    want = model.eval()(images)
    torch.testing.assert_close(model.cuda()(images.cuda()).cpu(), want, rtol=1e-4, atol=1e-4)
