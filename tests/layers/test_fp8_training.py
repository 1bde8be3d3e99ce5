"""8-bit linear layers in a backbone: built from a configuration, recomputed, sharded, saved."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dinov3 import distributed
from dinov3.configs import get_default_config
from dinov3.distributed import runtime
from dinov3.fsdp import ac_compile_parallelize, full_state_dict
from dinov3.hub.runs import dinov3_from_run
from dinov3.layers.fp8_linear import Fp8Linear, Fp8LinearKMaskedBias, fp8_problem
from dinov3.models import build_model, build_model_from_cfg, init_fp8
from dinov3.models.summary import flops_by_module
from dinov3.train import main
from tests.configs.helpers import config as full_config
from tests.configs.helpers import refused
from tests.multiprocess import run_ranks
from tests.train import tiny

#: The 7B's kind of network at the smallest width that heads and 8-bit products allow.
STUDENT = {
    "arch": "vit_tiny",
    "depth": 2,
    "patch_size": 8,
    "drop_path_rate": 0.0,
    "layerscale": 0.1,
    "ffn_layer": "swiglu64",
    "n_storage_tokens": 2,
    "mask_k_bias": True,
    "pos_embed_rope_dtype": "fp32",
    "fp8_enabled": True,
}
N_LINEARS = 2 * (2 + 3)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(runtime.DEVICE_VARIABLE, "cpu")
    yield
    distributed.disable()


def config(**train: Any) -> Any:
    precision = {"param_dtype": train.pop("param_dtype", "fp32")}
    train = {"checkpointing": False, "checkpointing_full": False, "compile": False} | train
    return OmegaConf.merge(get_default_config(), {"student": STUDENT, "train": train, "compute_precision": precision})


def make(**student: Any) -> nn.Module:
    torch.manual_seed(0)
    model, _ = build_model(OmegaConf.create(STUDENT | student), only_teacher=True, device="cpu")
    model.init_weights()
    return model


def in_8_bits(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, Fp8Linear | Fp8LinearKMaskedBias)]


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def features_and_gradients(model: nn.ModuleDict) -> tuple[Tensor, dict[str, Tensor]]:
    features = model["backbone"](images().to(next(model.parameters()).device)).float()
    # Not a norm of the features, which the last layer makes constant.
    (features * torch.linspace(-1, 1, features.numel()).view_as(features).to(features)).mean().backward()
    gradients = {name: p.grad for name, p in model["backbone"].named_parameters() if p.grad is not None}
    return features.detach(), {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in gradients.items()}


def test_student_and_teacher_of_a_configuration_compute_in_8_bits() -> None:
    student, teacher, _ = build_model_from_cfg(config())
    for model in (student, teacher):
        assert len(in_8_bits(model)) == N_LINEARS and all(name.startswith("blocks.") for name in in_8_bits(model))
        assert {entry.device.type for entry in model.state_dict().values()} == {"meta"}
    assert list(student.state_dict()) == list(make(fp8_enabled=False).state_dict())


def test_the_filter_selects_the_layers() -> None:
    assert in_8_bits(make(fp8_filter=r"mlp\.w3")) == ["blocks.0.mlp.w3", "blocks.1.mlp.w3"]


def test_weights_are_initialised_as_those_of_a_plain_model() -> None:
    plain, model = make(fp8_enabled=False).state_dict(), make().state_dict()
    assert all(torch.equal(model[name], entry) for name, entry in plain.items())


def test_whoever_only_uses_a_model_gets_a_plain_one() -> None:
    model, _ = build_model_from_cfg(config(), only_teacher=True, fp8=False)
    assert in_8_bits(model) == []


def test_features_are_close_to_those_of_the_plain_model() -> None:
    plain, model = make(fp8_enabled=False).eval()(images()), make().eval()(images())
    assert 1e-4 < (model - plain).norm() / plain.norm() < 0.05


def test_operations_are_counted() -> None:
    plain, model = (flops_by_module(make(fp8_enabled=enabled), 32) for enabled in (False, True))
    assert model == plain


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"fp8_filter": "nothing"}, "fp8_filter=nothing: no linear layer of DinoVisionTransformer"),
        ({"ffn_ratio": 0.9}, None),
        ({"ffn_layer": "mlp", "ffn_ratio": 0.9}, "blocks.0.mlp.fc1 has 192 input and 172 output channels"),
        ({"arch": "convnext_tiny", "fp8_filter": ""}, "pwconv1 has 96 input and 384 output channels"),
    ],
    ids=["filter", "aligned", "width", "convnext"],
)
def test_layers_that_do_not_fit(student: dict[str, Any], message: str | None) -> None:
    args = OmegaConf.create(STUDENT | student)
    if message is None:
        build_model(args, device="meta")
        return
    with pytest.raises(ValueError, match=f"student.fp8_enabled=true with .*{message}"):
        build_model(args, device="meta")


def test_a_device_without_8_bit_products_is_refused_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    from dinov3.models import building

    monkeypatch.setattr(building, "fp8_problem", lambda device: f"no 8 bits on {device.type}")
    monkeypatch.setattr(building.vision_transformer, "vit_tiny", None)
    with pytest.raises(ValueError, match="student.fp8_enabled=true: no 8 bits on cpu; set student.fp8_enabled=false"):
        build_model_from_cfg(config())
    with pytest.raises(ValueError, match="no 8 bits on mps"):
        build_model(OmegaConf.create(STUDENT), device="mps")
    with pytest.raises(ValueError, match="no 8 bits on cpu"):
        init_fp8(nn.Linear(64, 64), {"fp8_enabled": True})
    assert init_fp8(nn.Linear(64, 64), {"fp8_enabled": False}) is not None


def test_settings_that_cannot_work_are_refused_by_the_configuration() -> None:
    on = ("student.fp8_enabled=true",)
    refused(r"fp8_filter=\(: not a regular expression", full_config(*on, "student.fp8_filter=("))
    refused("compute_precision.param_dtype=fp16 does not mix", full_config(*on, "compute_precision.param_dtype=fp16"))


@pytest.mark.parametrize("full", [False, True])
def test_recomputed_activations_change_nothing(full: bool) -> None:
    features, gradients = features_and_gradients(nn.ModuleDict({"backbone": make()}))
    model = nn.ModuleDict({"backbone": make()})
    ac_compile_parallelize(model, [], config(checkpointing=True, checkpointing_full=full))
    got, got_gradients = features_and_gradients(model)
    assert torch.equal(got, features) and gradients.keys() == got_gradients.keys()
    assert all(torch.equal(got_gradients[name], gradient) for name, gradient in gradients.items())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_process_shards_in_mixed_precision(checkpointing: bool) -> None:
    features, gradients = features_and_gradients(nn.ModuleDict({"backbone": make()}))
    model = nn.ModuleDict({"backbone": make()})
    names = list(model.state_dict())
    ac_compile_parallelize(model, [], config(param_dtype="bf16", checkpointing=checkpointing))
    seen: list[torch.dtype] = []
    inner = model["backbone"].blocks[0].mlp.w1
    inner.register_forward_hook(lambda module, inputs, output: seen.extend([module.weight.dtype, output.dtype]))
    got, got_gradients = features_and_gradients(model)
    assert set(seen) == {torch.bfloat16} and list(model.state_dict()) == names
    assert isinstance(inner.weight, DTensor) and inner.weight.dtype == torch.float32
    assert (got - features).norm() / features.norm() < 0.05
    for name, gradient in gradients.items():
        assert got_gradients[name].dtype == torch.float32
        assert (got_gradients[name] - gradient).norm() <= 0.15 * gradient.norm() + 1e-5, name


@pytest.mark.parametrize("param_dtype", ["fp32", "bf16"])
def test_a_run_trains_and_its_teacher_is_an_ordinary_model(param_dtype: str, tmp_path: Path) -> None:
    config_file = tiny.write_config(
        tmp_path / "tiny.yaml",
        tiny.write_images(tmp_path / "images"),
        student={"fp8_enabled": True, "ffn_layer": "swiglu64", "drop_path_rate": 0.5},
        compute_precision={"param_dtype": param_dtype},
        train={"OFFICIAL_EPOCH_LENGTH": 2, "checkpointing": True},
    )
    main(["--config-file", str(config_file), "--output-dir", str(tmp_path / "run")])
    assert sorted(tiny.read_losses(tmp_path / "run")) == [0, 1, 2, 3]
    assert all(entry.isfinite().all() for entry in tiny.read_teacher(tmp_path / "run").values())
    assert in_8_bits(dinov3_from_run(tmp_path / "run")) == []


def sharded(rank: int, world_size: int) -> dict[str, Any]:
    os.environ[runtime.DEVICE_VARIABLE] = "cpu"
    torch.manual_seed(rank)
    with torch.device("meta"):
        model = nn.ModuleDict({"backbone": build_model_from_cfg(config(), only_teacher=True)[0]})
    ac_compile_parallelize(model, [], config())
    torch.manual_seed(0)
    plain = make()
    for name, entry in model["backbone"].state_dict().items():
        whole = plain.state_dict()[name]
        if isinstance(entry, DTensor):
            rows = whole.chunk(world_size)
            entry.to_local().copy_(rows[rank] if rank < len(rows) else whole[:0])
        else:
            entry.copy_(whole)
    features, gradients = features_and_gradients(model)
    return {"features": features, "gradients": gradients, "state": full_state_dict(model)}


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_compute_what_one_does() -> None:
    features, gradients = features_and_gradients(nn.ModuleDict({"backbone": make()}))
    first, second = run_ranks(sharded, 2)
    assert torch.equal(first["features"], features) and torch.equal(second["features"], features)
    for name, gradient in gradients.items():
        torch.testing.assert_close(first["gradients"][name], gradient)
    plain = make().state_dict()
    assert all(torch.equal(first["state"][f"backbone.{name}"], entry) for name, entry in plain.items())


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_a_backbone_trains_on_a_gpu(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(runtime.DEVICE_VARIABLE, "cuda")
    if fp8_problem(runtime.device()) is not None:
        pytest.skip(str(fp8_problem(runtime.device())))
    features, gradients = features_and_gradients(nn.ModuleDict({"backbone": make()}))
    model = nn.ModuleDict({"backbone": make()})
    ac_compile_parallelize(model, [], config(param_dtype="bf16", checkpointing=True, compile=compiled))
    got, got_gradients = features_and_gradients(model)
    assert (got.cpu() - features).norm() / features.norm() < 0.05
    for name, gradient in gradients.items():
        assert (got_gradients[name].cpu() - gradient).norm() <= 0.15 * gradient.norm() + 1e-5, name
