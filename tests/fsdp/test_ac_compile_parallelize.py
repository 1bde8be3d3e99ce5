"""Activation checkpointing, compilation and sharding of small networks, in one process."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dinov3 import distributed
from dinov3.distributed import runtime
from dinov3.fsdp import ac_compile_parallelize, clip_grad_norm_, full_state_dict
from dinov3.fsdp.ac_compile_parallelize import checkpoint_activations, wants_compilation
from tests.checkpointer import toy


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(runtime.DEVICE_VARIABLE, "cpu")
    yield
    distributed.disable()


def config(*, param_dtype: str = "fp32", sharding_strategy: str = "SHARD_GRAD_OP", **train: Any) -> Any:
    return OmegaConf.create(
        {
            "train": {"checkpointing": False, "checkpointing_full": False, "compile": False, "cudagraphs": False}
            | {"fsdp": "auto"}
            | train,
            "compute_precision": {
                "param_dtype": param_dtype,
                "reduce_dtype": "fp32",
                "sharding_strategy": sharding_strategy,
            },
        }
    )


class Stages(nn.Module):
    """The parts of a ConvNeXt: downsampling layers and stages of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.downsample_layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.stages = nn.ModuleList(nn.Sequential(toy.Block(8), toy.Block(8)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(downsample(x))
        return x


def make(kind: str = "vit", seed: int = 0) -> nn.ModuleDict:
    torch.manual_seed(seed)
    backbone = toy.Backbone(8) if kind == "vit" else Stages()
    return nn.ModuleDict({"backbone": backbone, "dino_head": nn.Linear(8, 6)})


def loss_and_gradients(model: nn.ModuleDict) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model["dino_head"](model["backbone"](toy.batch(0))).square().mean()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in gradients.items()}


def test_one_float32_process_keeps_plain_modules_and_values() -> None:
    model = make()
    expected = copy.deepcopy(model.state_dict())
    ac_compile_parallelize(model, [], config())
    assert not distributed.is_enabled()
    assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())
    toy.assert_equal(model.state_dict(), expected)


@pytest.mark.parametrize("kind", ["vit", "convnext"])
@pytest.mark.parametrize(
    "train",
    [
        {"fsdp": "always"},
        {"checkpointing": True},
        {"checkpointing": True, "checkpointing_full": True},
        {"fsdp": "always", "checkpointing": True},
        {"fsdp": "always", "checkpointing": True, "checkpointing_full": True},
    ],
    ids=str,
)
def test_losses_gradients_and_names_are_those_of_the_plain_model(kind: str, train: dict[str, Any]) -> None:
    model, frozen = make(kind), make(kind, seed=1).requires_grad_(False)
    names = list(model.state_dict())
    expected_loss, expected_gradients = loss_and_gradients(model)
    expected_output = frozen["backbone"](toy.batch(3))
    ac_compile_parallelize(model, [frozen], config(**train))
    loss, gradients = loss_and_gradients(model)
    torch.testing.assert_close(loss, expected_loss)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name])
    torch.testing.assert_close(frozen["backbone"](toy.batch(3)), expected_output)
    assert list(model.state_dict()) == names
    is_sharded = {isinstance(parameter, DTensor) for each in (model, frozen) for parameter in each.parameters()}
    assert is_sharded == {train.get("fsdp") == "always"}


def test_mixed_precision_computes_in_bfloat16_over_float32_weights() -> None:
    model = make()
    full_precision = model["backbone"](toy.batch(0))
    ac_compile_parallelize(model, [], config(param_dtype="bf16"))
    seen: list[torch.dtype] = []
    model["backbone"].blocks[0].fc1.register_forward_hook(lambda m, i, o: seen.extend([m.weight.dtype, o.dtype]))
    output = model["backbone"](toy.batch(0))
    assert seen == [torch.bfloat16, torch.bfloat16]
    difference = (output.float() - full_precision).abs().max()
    assert 0 < difference < 0.1
    output.float().sum().backward()
    for parameter in model["backbone"].parameters():
        assert parameter.dtype == torch.float32 and parameter.grad is not None
        assert parameter.grad.dtype == torch.float32


@pytest.mark.parametrize("fsdp", ["auto", "always"])
def test_model_on_the_meta_device_gets_memory(fsdp: str) -> None:
    with torch.device("meta"):
        model, frozen = make(), make().requires_grad_(False)
    ac_compile_parallelize(model, [frozen], config(fsdp=fsdp))
    for each in (model, frozen):
        assert all(entry.device.type == "cpu" for entry in (*each.parameters(), *each.buffers()))
        with torch.no_grad():
            for parameter in each.parameters():
                parameter.fill_(0.5)
    loss_and_gradients(model)


def test_frozen_model_holds_no_whole_parameters_after_a_forward_pass() -> None:
    model, frozen = make(), make().requires_grad_(False)
    ac_compile_parallelize(model, [frozen], config(fsdp="always"))
    inside: list[bool] = []
    frozen["backbone"].norm.register_forward_hook(lambda m, *_: inside.append(isinstance(m.weight, DTensor)))
    frozen["backbone"](toy.batch(0))
    assert inside == [False]
    assert all(isinstance(parameter, DTensor) for parameter in frozen.parameters())


def test_intermediate_layers_gather_the_parameters() -> None:
    class WithLayers(toy.Backbone):
        def get_intermediate_layers(self, x: Tensor) -> Tensor:
            return self.norm(self.blocks[0](x))

    model = nn.ModuleDict({"backbone": WithLayers(8)})
    expected = model["backbone"].get_intermediate_layers(toy.batch(0))
    ac_compile_parallelize(model, [], config(fsdp="always"))
    torch.testing.assert_close(model["backbone"].get_intermediate_layers(toy.batch(0)), expected)


class Counting(toy.Block):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        Counting.calls += 1
        return super().forward(x)


class CountProducts(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode, calls", [("off", 1), ("full", 2), ("selective", 2)])
def test_checkpointing_recomputes_the_blocks(mode: str, calls: int) -> None:
    block = Counting(8)
    if mode != "off":
        checkpoint_activations([block], full=mode == "full")
    Counting.calls = 0
    block(toy.batch(0).requires_grad_()).sum().backward()
    assert Counting.calls == calls


class BiasFree(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.nn.functional.gelu(self.first(x)))


@pytest.mark.parametrize("mode, products", [("off", 3), ("full", 4), ("selective", 3)])
def test_selective_checkpointing_keeps_matrix_products(mode: str, products: int) -> None:
    block = BiasFree()
    if mode != "off":
        checkpoint_activations([block], full=mode == "full")
    output = block(toy.batch(0))
    with CountProducts() as backward:
        output.sum().backward()
    # Gradients of two weights and of the hidden layer; the last product of a recomputation is not needed.
    assert backward.products == products


def test_checkpointing_repeats_the_random_numbers_of_the_forward_pass() -> None:
    block = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
    plain = copy.deepcopy(block)
    checkpoint_activations([block], full=True)
    gradients = []
    for each in (plain, block):
        torch.manual_seed(3)
        each(toy.batch(0)).square().sum().backward()
        gradients.append(each[0].weight.grad)
    assert torch.equal(*gradients)


def test_compilation_is_asked_for_only_where_it_helps_and_works(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(wants_compilation.__globals__, "_compilation_problem", lambda device: None)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert wants_compilation(True, cpu) and wants_compilation("auto", cuda)
    assert not wants_compilation("auto", cpu) and not wants_compilation(False, cuda)
    with pytest.raises(ValueError, match="unknown train.compile='yes'; use auto, true or false"):
        wants_compilation("yes", cpu)  # type: ignore[arg-type]
    monkeypatch.setitem(wants_compilation.__globals__, "_compilation_problem", lambda device: "no C++ compiler")
    with caplog.at_level(logging.WARNING, logger="dinov3"):
        assert not wants_compilation(True, cpu)
    assert "is not compiled: no C++ compiler" in caplog.text


def test_every_part_is_compiled_under_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setitem(wants_compilation.__globals__, "_compilation_problem", lambda device: None)
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: compiled.append(module))
    vit, convnext = make("vit"), make("convnext")
    ac_compile_parallelize(vit, [convnext], config(compile=True))
    stages = convnext["backbone"]
    assert compiled == [
        *vit["backbone"].blocks,
        vit["dino_head"],
        stages.downsample_layers[0],
        stages.stages[0],
        stages.downsample_layers[1],
        stages.stages[1],
        convnext["dino_head"],
    ]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"fsdp": "sometimes"}, "unknown train.fsdp='sometimes'; use auto, always or never"),
        ({"fsdp": "never", "param_dtype": "bf16"}, "train.fsdp=never computes in float32"),
        ({"sharding_strategy": "FULL_SHARD"}, "unknown compute_precision.sharding_strategy='FULL_SHARD'"),
    ],
)
def test_impossible_setting_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ac_compile_parallelize(make(), [], config(**settings))


def test_group_for_a_model_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="0 inference-only models, but 1 process groups"):
        ac_compile_parallelize(make(), [], config(), inference_only_models_process_groups=[None])


def test_batch_norm_is_refused() -> None:
    model = make()
    model["dino_head"] = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    with pytest.raises(NotImplementedError, match="batch norms"):
        ac_compile_parallelize(model, [], config())


def test_backbone_of_unknown_build_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has neither blocks nor stages"):
        ac_compile_parallelize(nn.ModuleDict({"backbone": nn.Linear(1, 1)}), [], config(fsdp="always"))


@pytest.mark.parametrize("fsdp", ["auto", "always"])
def test_gradients_are_clipped_to_the_norm_and_measured_before(fsdp: str) -> None:
    model = make()
    ac_compile_parallelize(model, [], config(fsdp=fsdp))
    _, before = loss_and_gradients(model)
    before = {name: gradient.clone() for name, gradient in before.items()}
    expected = torch.cat([gradient.flatten() for gradient in before.values()]).norm()
    norm = clip_grad_norm_(model, float("inf"))
    assert norm.shape == () and not isinstance(norm, DTensor)
    torch.testing.assert_close(norm, expected)
    torch.testing.assert_close(clip_grad_norm_(model, float(expected) / 4), expected)
    torch.testing.assert_close(clip_grad_norm_(model.parameters(), 1e9), expected / 4, rtol=1e-4, atol=0)
    for name, parameter in model.named_parameters():
        gradient = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        torch.testing.assert_close(gradient, before[name] / 4, rtol=1e-4, atol=1e-8)


def test_gradient_that_is_not_finite_shows_in_the_norm() -> None:
    model = make()
    ac_compile_parallelize(model, [], config(fsdp="always"))
    loss_and_gradients(model)
    model["backbone"].norm.weight.grad.to_local()[0] = float("nan")
    assert clip_grad_norm_(model["backbone"], 1.0).isnan() and clip_grad_norm_(model["dino_head"], 1.0).isfinite()


@pytest.mark.parametrize("param_dtype", ["fp32", "bf16"])
def test_full_state_is_whole_float32_copies_on_the_cpu(param_dtype: str) -> None:
    model = make()
    expected = copy.deepcopy(model.state_dict())
    ac_compile_parallelize(model, [], config(param_dtype=param_dtype, fsdp="auto"))
    state = full_state_dict(model)
    toy.assert_equal(state, expected)
    assert not any(isinstance(value, DTensor) for value in state.values())
    assert state["backbone.norm.weight"].dtype == torch.float32
    assert state["backbone.periods"].dtype == torch.float64
    state["backbone.norm.weight"].fill_(7)
    toy.assert_equal(full_state_dict(model), expected)
