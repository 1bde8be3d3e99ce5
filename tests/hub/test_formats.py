"""Weights of Hugging Face transformers and timm in our models: equal features, whatever form they come in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dinov3.hub.backbones import dinov3_convnext_tiny, dinov3_vit7b16, dinov3_vits16, dinov3_vits16plus
from dinov3.hub.formats import reading
from dinov3.hub.formats.conversion import METADATA_KEY, from_release, to_release
from dinov3.hub.formats.layouts import detect, rope_base
from dinov3.hub.weights import load_backbone_, read_state_dict
from dinov3.models.vision_transformer import DinoVisionTransformer
from dinov3.utils import weight_files
from dinov3.utils.weight_files import WeightsError, read_file

from . import libraries
from .libraries import DEPTH, DIM, HEADS, IMAGES, REGISTERS, assert_bits_equal, assert_near, release_state


@pytest.fixture(autouse=True)
def small_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    libraries.make_entries_small(monkeypatch)


@pytest.fixture(scope="module")
def huggingface(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A directory as transformers writes it, and its model."""
    path, model = tmp_path_factory.mktemp("huggingface"), libraries.transformers_vit()
    model.save_pretrained(path)
    return path, model


def assert_features_equal(model: Any, theirs: Tensor) -> None:
    """`theirs`: class token, registers, patches."""
    with torch.no_grad():
        features = model.forward_features(IMAGES)
    parts = [features["x_norm_clstoken"][:, None], features["x_storage_tokens"], features["x_norm_patchtokens"]]
    assert_near(torch.cat(parts, dim=1), theirs)


@torch.no_grad()
@pytest.mark.parametrize(
    ("entry", "options"),
    [
        (dinov3_vits16, {}),
        (dinov3_vits16, {"key_bias": True}),
        (dinov3_vits16, {"rope_theta": 10.0}),
        (dinov3_vits16plus, {"gated": True}),
        (dinov3_vits16, {"query_bias": True, "value_bias": False}),
        (dinov3_vit7b16, {"gated": True, "num_hidden_layers": 3, "query_bias": False, "value_bias": False}),
    ],
)
def test_vit_of_transformers(entry: Any, options: dict[str, Any], tmp_path: Path) -> None:
    theirs = libraries.transformers_vit(**options)
    theirs.save_pretrained(tmp_path)
    model = entry(weights=tmp_path)
    outputs = theirs(IMAGES, output_hidden_states=True)
    assert_features_equal(model, outputs.last_hidden_state)
    patches, cls_token = model.get_intermediate_layers(IMAGES, n=[0], return_class_token=True, norm=False)[0]
    assert_near(patches, outputs.hidden_states[1][:, 1 + REGISTERS :])
    assert_near(cls_token, outputs.hidden_states[1][:, 0])
    assert torch.equal(model.mask_token, theirs.embeddings.mask_token[0])


@torch.no_grad()
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_vit_of_timm(gated: bool, bias: bool, tmp_path: Path) -> None:
    theirs = libraries.timm_vit(gated=gated, bias=bias)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": "vit_small_patch16_dinov3", "num_features": DIM, "model_args": {"num_heads": HEADS}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = (dinov3_vits16plus if gated else dinov3_vits16)(weights=tmp_path)
    assert_features_equal(model, theirs.forward_features(IMAGES))
    assert_near(model(IMAGES), theirs(IMAGES))
    mask = model.blocks[0].attn.qkv.bias_mask.view(3, -1)
    assert mask.unique(dim=1).flatten().tolist() == [1, 0, 1]


@torch.no_grad()
def test_convnext_of_transformers(tmp_path: Path) -> None:
    theirs = libraries.transformers_convnext()
    theirs.save_pretrained(tmp_path)
    model = dinov3_convnext_tiny(weights=tmp_path)
    assert_features_equal(model, theirs(IMAGES).last_hidden_state)


@torch.no_grad()
def test_convnext_of_timm(tmp_path: Path) -> None:
    theirs = libraries.timm_convnext()
    torch.save(theirs.state_dict(), tmp_path / "model.pth")
    model = dinov3_convnext_tiny(weights=tmp_path / "model.pth")
    assert_near(model(IMAGES), theirs(IMAGES))
    for ours, stage in zip(
        model.get_intermediate_layers(IMAGES, 4, True, norm=False),
        theirs.forward_intermediates(IMAGES)[1],
        strict=False,
    ):
        assert_near(ours, stage)
    state = model.state_dict()
    assert torch.equal(state["norm.weight"], state["norms.3.weight"])


def in_memory(directory: Path, model: Any) -> Any:
    return model.state_dict()


def file_in_its_directory(directory: Path, model: Any) -> Any:
    return directory / "model.safetensors"


def torch_file(directory: Path, model: Any) -> Any:
    shutil.copy(directory / "config.json", directory / "torch" / "config.json")
    torch.save(model.state_dict(), directory / "torch" / "weights.pth")
    return directory / "torch" / "weights.pth"


def torch_directory(directory: Path, model: Any) -> Any:
    shutil.copy(directory / "config.json", directory / "torch" / "config.json")
    torch.save(model.state_dict(), directory / "torch" / "pytorch_model.bin")
    return directory / "torch"


def part_of_a_larger_model(directory: Path, model: Any) -> Any:
    shutil.copy(directory / "config.json", directory / "torch" / "config.json")
    theirs = {f"vision.{name}": tensor for name, tensor in load_file(directory / "model.safetensors").items()}
    save_file(theirs | {"classifier.weight": torch.ones(2)}, directory / "torch" / "model.safetensors")
    return directory / "torch"


@torch.no_grad()
@pytest.mark.parametrize(
    "form", [file_in_its_directory, torch_file, torch_directory, part_of_a_larger_model], ids=lambda f: f.__name__
)
def test_forms_of_a_model_of_transformers(
    form: Callable[[Path, Any], Any], huggingface: tuple[Path, Any], tmp_path: Path
) -> None:
    directory, theirs = huggingface
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    (tmp_path / "torch").mkdir()
    model = dinov3_vits16(weights=form(tmp_path, theirs))
    assert_features_equal(model, theirs(IMAGES).last_hidden_state)


@torch.no_grad()
def test_state_dict_in_memory_and_sharded_directory(huggingface: tuple[Path, Any], tmp_path: Path) -> None:
    _, theirs = huggingface
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    wanted = theirs(IMAGES).last_hidden_state
    for weights in (tmp_path, tmp_path / "model.safetensors.index.json"):
        assert_features_equal(dinov3_vits16(weights=weights), wanted)
    assert_features_equal(dinov3_vits16(weights=theirs.state_dict()), wanted)
    with torch.device("meta"):
        model = DinoVisionTransformer(
            embed_dim=DIM,
            depth=DEPTH,
            num_heads=HEADS,
            ffn_ratio=2,
            n_storage_tokens=REGISTERS,
            layerscale_init=1.0,
            norm_layer="layernormbf16",
            pos_embed_rope_dtype="fp32",
            mask_k_bias=False,
        )
    assert_features_equal(load_backbone_(model, theirs.state_dict()).eval(), wanted)


@pytest.mark.parametrize(
    ("names", "layout"),
    [
        ({"embeddings.patch_embeddings.weight"}, "huggingface vit"),
        ({"model.embeddings.patch_embeddings.weight"}, "huggingface vit model."),
        ({"reg_token", "cls_token"}, "timm vit"),
        ({"blocks.0.gamma_1", "cls_token"}, "timm vit"),
        ({"model.stages.0.downsample_layers.0.weight"}, "huggingface convnext"),
        ({"x.model.stages.0.downsample_layers.0.weight"}, "huggingface convnext x."),
        ({"stem.0.weight", "stages.0.blocks.0.conv_dw.weight"}, "timm convnext"),
        ({"stem.0.weight"}, None),
        ({"downsample_layers.0.0.weight", "stages.0.0.dwconv.weight"}, None),
        ({"patch_embed.proj.weight", "blocks.0.ls1.gamma", "storage_tokens"}, None),
    ],
)
def test_layout_is_recognised_by_names(names: set[str], layout: str | None) -> None:
    found = detect(names)
    assert (found and f"{found.library} {found.family} {found.prefix}".strip()) == layout


@pytest.mark.parametrize("library", ["huggingface", "timm"])
@pytest.mark.parametrize(
    "change",
    [
        lambda s: s | {n: torch.zeros_like(t) for n, t in s.items() if "qkv.bias" in n},
        lambda s: s | {n: torch.zeros_like(t) for n, t in s.items() if n.endswith("bias_mask")},
        lambda s: s | {n: torch.ones_like(t) for n, t in s.items() if n.endswith(("bias", "bias_mask")) and "qkv" in n},
        lambda s: s | {"local_cls_norm.weight": torch.randn(DIM), "local_cls_norm.bias": torch.randn(DIM)},
        lambda s: s | {"rope_embed.periods": s["rope_embed.periods"].bfloat16()},
        lambda s: {n: t for n, t in s.items() if not n.endswith("bias_mask")},
        lambda s: {n: t.bfloat16() for n, t in s.items()},
        lambda s: {n: t for n, t in s.items() if n != "storage_tokens"},
    ],
    ids=["zero", "released masks", "key bias", "local norm", "bf16 periods", "no masks", "bf16", "no registers"],
)
def test_peculiar_models_there_and_back(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], library: Any, request: pytest.FixtureRequest
) -> None:
    state = change(release_state("dinov3_vits16"))
    if library == "timm" and "key bias" in request.node.name:
        with pytest.raises(WeightsError, match="a bias of the keys that is not zero, which .* models of timm cannot"):
            from_release(state, library)
        return
    foreign = from_release(state, library)
    assert_bits_equal(to_release(foreign.state, metadata=foreign.metadata), state)


@pytest.mark.parametrize("library", ["huggingface", "timm"])
def test_last_name_of_the_final_norm_of_a_convnext_counts(library: Any) -> None:
    state = release_state("dinov3_convnext_tiny")
    state["norm.weight"] = state["norm.weight"] + 1
    foreign = from_release(state, library)
    name = {"huggingface": "layer_norm.weight", "timm": "head.norm.weight"}[library]
    assert torch.equal(foreign.state[name], state["norms.3.weight"])
    assert_bits_equal(to_release(foreign.state, metadata=foreign.metadata), state)


def test_released_zero_biases_are_left_out_for_timm_and_kept_for_transformers() -> None:
    state = release_state("dinov3_vits16")
    assert "blocks.0.attn.q_bias" in from_release(state, "timm").state
    zero = state | {name: torch.zeros_like(tensor) for name, tensor in state.items() if "qkv.bias" in name}
    assert not any("q_bias" in name for name in from_release(zero, "timm").state)
    assert not from_release(zero, "huggingface").state["layer.0.attention.q_proj.bias"].any()


def test_biases_that_were_trained_after_conversion_win_over_what_was_kept() -> None:
    state = release_state("dinov3_vits16")
    state |= {name: torch.zeros_like(tensor) for name, tensor in state.items() if "qkv.bias" in name}
    foreign = from_release(state, "huggingface")
    foreign.state["layer.0.attention.q_proj.bias"] = torch.ones(DIM)
    back = to_release(foreign.state, metadata=foreign.metadata)
    assert torch.equal(back["blocks.0.attn.qkv.bias"][:DIM], torch.ones(DIM))
    assert back["blocks.0.attn.qkv.bias_mask"].view(3, -1).unique(dim=1).flatten().tolist() == [1, 0, 1]
    assert not back["blocks.1.attn.qkv.bias_mask"].any()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: s | {"cls_norm.weight": s["norm.weight"], "cls_norm.bias": s["norm.bias"]}, r"\(cls_norm\)"),
        (lambda s: {n: t for n, t in s.items() if n != "norm.bias"}, "RMS norms"),
        (lambda s: {n: t for n, t in s.items() if ".ls" not in n}, "no layer scales"),
        (lambda s: s | {"rope_embed.periods": torch.tensor([0.5, 7.0, 9.0, 90.0])}, "periods that are not powers"),
    ],
)
@pytest.mark.parametrize("library", ["huggingface", "timm"])
def test_what_cannot_be_represented_is_refused(change: Any, reason: str, library: Any) -> None:
    with pytest.raises(WeightsError, match=f"the model has .*{reason}.*, which the DINOv3 models of .* cannot have"):
        from_release(change(release_state("dinov3_vits16")), library)


@pytest.mark.parametrize("base", [100.0, 10.0, 10000.0])
@pytest.mark.parametrize("n", [2, 16, 32])
def test_base_is_found_in_periods(base: float, n: int) -> None:
    periods = base ** (torch.arange(n) / n)
    found = rope_base(periods)
    assert found == pytest.approx(base, rel=1e-3) and (base != 100.0 or found == 100.0)
    assert rope_base(periods.bfloat16()) == base
    assert rope_base(periods + torch.linspace(3, 0, n)) is None
    assert rope_base(100.4 ** (torch.arange(n) / n)) == pytest.approx(100.4, rel=1e-4)


def test_entries_are_shared_where_only_names_change(huggingface: tuple[Path, Any], tmp_path: Path) -> None:
    theirs = load_file(huggingface[0] / "model.safetensors")
    ours = to_release(theirs)
    assert ours["blocks.1.mlp.fc1.weight"] is theirs["layer.1.mlp.up_proj.weight"]
    back = from_release(ours | {"rope_embed.periods": 100 ** (torch.arange(4) / 4)}, "huggingface").state
    assert back["layer.1.mlp.up_proj.weight"] is theirs["layer.1.mlp.up_proj.weight"]
    queries, joined = back["layer.0.attention.q_proj.weight"], ours["blocks.0.attn.qkv.weight"]
    assert queries.untyped_storage().data_ptr() == joined.untyped_storage().data_ptr()
    release = release_state("dinov3_vits16")
    assert all(to_release(release)[name] is tensor for name, tensor in release.items())


def test_mapped_safetensors_are_never_written_to(huggingface: tuple[Path, Any]) -> None:
    path = huggingface[0] / "model.safetensors"
    before, maps = path.read_bytes(), Path("/proc/self/maps")
    state = read_state_dict(path, mmap=True)
    assert not maps.exists() or str(path) in maps.read_text()
    state["blocks.0.mlp.fc1.weight"].add_(1)
    assert path.read_bytes() == before
    del state
    read = read_state_dict(path)
    assert not maps.exists() or str(path) not in maps.read_text()
    assert torch.equal(read["blocks.0.mlp.fc1.weight"], load_file(path)["layer.0.mlp.up_proj.weight"])


def test_shards_of_one_model_are_mapped_if_they_are_large_together(
    huggingface: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    huggingface[1].save_pretrained(tmp_path, max_shard_size="20KB")
    sizes = [path.stat().st_size for path in tmp_path.glob("*.safetensors")]
    mapped = []
    monkeypatch.setattr(reading, "read_file", lambda path, mmap: mapped.append(mmap) or read_file(path, mmap=mmap))
    for limit, expected in {sum(sizes): False, sum(sizes) - 1: True}.items():
        monkeypatch.setattr(weight_files, "MAPPED_ABOVE", limit)
        read_state_dict(tmp_path)
        assert mapped == [expected] * len(sizes)
        mapped.clear()


def test_configuration_of_something_else_beside_a_file_is_not_used(tmp_path: Path) -> None:
    state = release_state("dinov3_vits16")
    theirs = from_release(state, "huggingface").state
    save_file({name: tensor.contiguous() for name, tensor in theirs.items()}, tmp_path / "weights.safetensors")
    wide = {"model_type": "dinov3_vit", "hidden_size": 4 * DIM, "num_attention_heads": 4}
    for config in (json.dumps({"model_type": "bert"}), "{broken", json.dumps(wide)):
        (tmp_path / "config.json").write_text(config)
        found = read_state_dict(tmp_path / "weights.safetensors")["rope_embed.periods"]
        assert rope_base(found) == 100.0 and len(found) == DIM // HEADS // 4


def write(directory: Path, **files: Any) -> None:
    for name, content in files.items():
        (directory / name.replace("__", ".")).write_text(content if isinstance(content, str) else json.dumps(content))


OTHER_CONFIGS = {
    "model_type 'dinov2'": {"model_type": "dinov2"},
    "architecture 'resnet50'": {"architecture": "resnet50"},
    "neither a model_type nor an architecture": {},
}


@pytest.mark.parametrize("found", OTHER_CONFIGS)
def test_directory_of_another_model(found: str, tmp_path: Path) -> None:
    write(tmp_path, config__json=OTHER_CONFIGS[found])
    with pytest.raises(
        WeightsError, match=f"{tmp_path} does not hold a DINOv3 backbone: its config.json names {found}"
    ):
        dinov3_vits16(weights=tmp_path)


def test_incomplete_directories(huggingface: tuple[Path, Any], tmp_path: Path) -> None:
    shutil.copy(huggingface[0] / "config.json", tmp_path)
    with pytest.raises(WeightsError, match=r"has a config.json, but no weights: .* found config.json; the download"):
        dinov3_vits16(weights=tmp_path)
    for name in ("a", "b"):
        shutil.copy(huggingface[0] / "model.safetensors", tmp_path / f"{name}.safetensors")
    with pytest.raises(WeightsError, match=r"holds several weights files: pass one of a.safetensors, b.safetensors"):
        dinov3_vits16(weights=tmp_path)
    (tmp_path / "b.safetensors").unlink()
    assert isinstance(dinov3_vits16(weights=tmp_path), DinoVisionTransformer)
    wide = json.loads((tmp_path / "config.json").read_text()) | {"hidden_size": 384}
    write(tmp_path, config__json=wide)
    with pytest.raises(WeightsError, match=r"contradicts itself: its config.json describes a model of 384 channels"):
        dinov3_vits16(weights=tmp_path)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"num_attention_heads": 3}, "names 3 heads, which do not fit a model of 32 channels"),
        ({"num_attention_heads": "2"}, "has num_attention_heads='2', expected a positive number"),
        ({"num_attention_heads": 2.0}, "has num_attention_heads=2.0, expected a positive number"),
        ({"rope_theta": -1}, "has rope_theta=-1, expected a positive number"),
        ({"rope_theta": None, "rope_parameters": {"rope_theta": "x"}}, "has rope_theta='x', expected a positive"),
    ],
)
def test_configuration_that_makes_no_sense(
    setting: Any, message: str, huggingface: tuple[Path, Any], tmp_path: Path
) -> None:
    shutil.copytree(huggingface[0], tmp_path, dirs_exist_ok=True)
    write(tmp_path, config__json=json.loads((tmp_path / "config.json").read_text()) | setting)
    with pytest.raises(WeightsError, match=f"^{tmp_path}: the configuration {message}"):
        dinov3_vits16(weights=tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "../a.safetensors"}}, r"names a shard outside its directory.*'../a.safetensors'"),
        ({"weight_map": {"a": "/etc/passwd"}}, "names a shard outside its directory"),
        ({"weight_map": {"a": "a.safetensors"}}, r"lacks 1 of the 1 shards that .* names: a.safetensors; fetch them"),
        ({"weight_map": {"a": "there.safetensors"}}, "says that a is in there.safetensors, but it is not there"),
        ({"weight_map": 3}, "is not the index of a sharded checkpoint: it has no weight_map"),
        ({}, "is not the index of a sharded checkpoint: it has no weight_map"),
        ([], "holds a list, expected a JSON object"),
        ("{", "is not JSON, or is damaged"),
    ],
)
def test_bad_index_of_a_sharded_checkpoint(index: Any, message: str, tmp_path: Path) -> None:
    save_file({"b": torch.ones(1)}, tmp_path / "there.safetensors")
    write(tmp_path, model__safetensors__index__json=index)
    with pytest.raises(WeightsError, match=message):
        dinov3_vits16(weights=tmp_path / "model.safetensors.index.json")


@pytest.mark.parametrize(
    "metadata",
    [
        "{",
        "[]",
        '{"kept": {}}',
        '{"kept": {"a": {"dtype": "F32", "shape": [2], "data": "AAAA"}}, "absent": []}',
        '{"kept": {"a": {"dtype": "F32", "shape": [99999999999], "data": ""}}, "absent": []}',
        '{"kept": {"a": {"dtype": "F99", "shape": [], "data": ""}}, "absent": []}',
    ],
)
def test_damaged_metadata(metadata: str, tmp_path: Path) -> None:
    theirs = from_release(release_state("dinov3_convnext_tiny"), "huggingface").state
    save_file(theirs, tmp_path / "w.safetensors", metadata={METADATA_KEY: metadata})
    with pytest.raises(WeightsError, match="w.safetensors: the metadata 'dinov3' of the safetensors file is damaged"):
        dinov3_convnext_tiny(weights=tmp_path / "w.safetensors")


def test_wrong_size_and_missing_parts_are_reported_in_our_names(huggingface: tuple[Path, Any], tmp_path: Path) -> None:
    with pytest.raises(
        WeightsError, match="does not fit dinov3_vits16plus: .* layout of Hugging Face transformers"
    ) as e:
        dinov3_vits16plus(weights=huggingface[0])
    assert "its entries are those of dinov3_vits16, use that instead;" in str(e.value) and "\n" not in str(e.value)
    theirs = load_file(huggingface[0] / "model.safetensors")
    del theirs["layer.1.attention.k_proj.weight"]
    save_file(theirs | {"extra": torch.ones(1)}, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"1 missing \(blocks.1.attn.qkv.weight\); 1 unknown \(extra\)"):
        dinov3_vits16(weights=tmp_path / "w.safetensors")


def test_other_layer_norms_are_reported(
    huggingface: tuple[Path, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(huggingface[0], tmp_path, dirs_exist_ok=True)
    write(tmp_path, config__json=json.loads((tmp_path / "config.json").read_text()) | {"layer_norm_eps": 1e-6})
    dinov3_vits16(weights=tmp_path)
    assert "was made for layer norms with eps=1e-06, but the model has eps=1e-05" in caplog.text
