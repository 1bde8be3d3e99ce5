"""The published backbones by name: modes, dtypes, where weights may come from, and what is refused."""

from __future__ import annotations

import copy
import hashlib
import inspect
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dinov3.hub import backbones, sources
from dinov3.hub.architectures import PUBLISHED, PublishedConvNeXt, PublishedViT
from dinov3.hub.backbones import Weights, dinov3_convnext_tiny, dinov3_vitl16, dinov3_vits16
from dinov3.utils.weight_files import WeightsError

ENTRIES = [name for name in backbones.__all__ if name.startswith("dinov3_")]
IMAGES = torch.randn(2, 3, 48, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def small_models_and_an_empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Three entries in a size for tests, and a cache of their own; returns the cache's directory of checkpoints."""
    small = partial(PublishedViT, depth=2, ffn_ratio=4)
    monkeypatch.setitem(
        PUBLISHED,
        "dinov3_vits16",
        small(embed_dim=32, num_heads=2, ffn_layer="mlp", hashes={"LVD1689M": "08c60483"}),
    )
    monkeypatch.setitem(
        PUBLISHED,
        "dinov3_vitl16",
        small(
            embed_dim=48,
            num_heads=3,
            ffn_layer="swiglu64",
            hashes={"LVD1689M": "8aa4cbdd", "SAT493M": "eadcf0ff"},
            untied=frozenset({"SAT493M"}),
        ),
    )
    monkeypatch.setitem(
        PUBLISHED,
        "dinov3_convnext_tiny",
        PublishedConvNeXt(depths=[1, 1, 2, 1], dims=[8, 16, 24, 32], hashes={"LVD1689M": "21b726bb"}),
    )
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


def random_state(seed: int = 0, entry: Any = dinov3_vits16, **kwargs: Any) -> dict[str, Tensor]:
    """A state dict as it is published: bfloat16 periods, and no value at its initial one."""
    torch.manual_seed(seed)
    state = entry(pretrained=False, **kwargs).state_dict()
    for name, tensor in state.items():
        if not name.endswith(("periods", "bias_mask")):
            tensor += 0.1 * torch.randn_like(tensor)
    if "rope_embed.periods" in state:
        state["rope_embed.periods"] = state["rope_embed.periods"].bfloat16()
    return dict(state)


def save(state: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    return path


def assert_holds(model: nn.Module, state: dict[str, Tensor]) -> None:
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    for name, tensor in loaded.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, state[name].float()), name


def test_model_is_in_evaluation_mode_and_deterministic(tmp_path: Path) -> None:
    path = save(random_state(), tmp_path / "w.pth")
    for model in (dinov3_vits16(weights=path), dinov3_vits16(pretrained=False)):
        assert not any(module.training for module in model.modules())
        assert torch.equal(model(IMAGES), model(IMAGES))
    model = dinov3_vits16(weights=path).train()
    torch.manual_seed(0)
    first = model(IMAGES)
    torch.manual_seed(0)
    assert torch.equal(model(IMAGES), first) and not torch.equal(model(IMAGES), first)


def test_initialisation_reads_nothing_and_leaves_nothing_out() -> None:
    model = dinov3_vitl16(pretrained=False, weights=Weights.SAT493M)
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    torch.manual_seed(0)
    first = dinov3_vitl16(pretrained=False).state_dict()
    torch.manual_seed(0)
    assert_holds(dinov3_vitl16(pretrained=False), first)
    with pytest.raises(ValueError, match="weights are given, but pretrained=False reads none"):
        dinov3_vitl16(pretrained=False, weights="a.pth")


@pytest.mark.parametrize(
    ("weights", "untied"), [(Weights.LVD1689M, False), (Weights.SAT493M, True), ("sat493m", True), ("LVD1689M", False)]
)
def test_published_weights_choose_the_structure(weights: Any, untied: bool) -> None:
    model = dinov3_vitl16(pretrained=False, weights=weights)
    assert model.untie_global_and_local_cls_norm is untied
    assert ("local_cls_norm.weight" in model.state_dict()) is untied


@pytest.mark.parametrize("form", ["str", "path", "file URL", "home", "training", "safetensors", "dict", "no mmap"])
def test_local_weights_in_every_form(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    state = random_state()
    path = save(state, tmp_path / "a b" / "weights.pth")
    training = {"teacher": {f"backbone.{k}": v for k, v in state.items()} | {"dino_head.mlp.0.weight": torch.ones(1)}}
    save_file(state, tmp_path / "weights.safetensors")
    weights = {
        "str": str(path),
        "path": path,
        "file URL": path.as_uri(),
        "home": "~/a b/weights.pth",
        "training": save(training, tmp_path / "training.pth"),
        "safetensors": tmp_path / "weights.safetensors",
        "dict": state,
        "no mmap": path,
    }[form]
    assert_holds(dinov3_vits16(weights=weights, mmap=form != "no mmap"), state)


def test_files_of_equal_name_are_different_files_and_are_not_copied(
    tmp_path: Path, small_models_and_an_empty_cache: Path
) -> None:
    states = [random_state(seed) for seed in (1, 2)]
    paths = [save(state, tmp_path / str(i) / "weights.pth") for i, state in enumerate(states)]
    for state, path in zip(states, paths, strict=True):
        assert_holds(dinov3_vits16(weights=str(path)), state)
    assert not small_models_and_an_empty_cache.exists()


def test_missing_file_is_not_looked_up_in_the_cache(tmp_path: Path, small_models_and_an_empty_cache: Path) -> None:
    save(random_state(), small_models_and_an_empty_cache / "weights.pth")
    for weights in ("none/weights.pth", tmp_path / "weights.pth", (tmp_path / "weights.pth").as_uri(), "weights.pth"):
        with pytest.raises(FileNotFoundError, match=r"no weights at \S*weights.pth"):
            dinov3_vits16(weights=weights)


def test_misspelt_names_of_published_weights_are_recognised() -> None:
    with pytest.raises(FileNotFoundError, match="no weights at lvd1689 .did you mean 'LVD1689M'"):
        dinov3_vits16(weights="lvd1689")


def test_parameters_are_trainable_and_the_file_stays(tmp_path: Path) -> None:
    state = random_state()
    path = save(state, tmp_path / "w.pth")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    model = dinov3_vits16(weights=path)
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(IMAGES).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.blocks[0].attn.qkv.weight, state["blocks.0.attn.qkv.weight"])
    assert hashlib.sha256(path.read_bytes()).hexdigest() == digest
    assert_holds(dinov3_vits16(weights=path), state)


def test_state_dict_that_is_given_is_not_shared() -> None:
    state = random_state()
    before = copy.deepcopy(state)
    with torch.no_grad():
        dinov3_vits16(weights=state).cls_token.add_(1)
    assert torch.equal(state["cls_token"], before["cls_token"])


def test_content_decides_on_the_norm_of_local_crops(tmp_path: Path) -> None:
    untied = random_state(entry=dinov3_vitl16, weights=Weights.SAT493M)
    tied = {name: tensor for name, tensor in untied.items() if not name.startswith("local_cls_norm.")}
    model = dinov3_vitl16(weights=save(untied, tmp_path / "renamed.pth"))
    assert model.untie_global_and_local_cls_norm is True
    assert_holds(model, untied)
    model = dinov3_vitl16(weights=save(tied, tmp_path / "renamed.pth"))
    assert model.untie_global_and_local_cls_norm is False
    assert_holds(model, tied)


def test_options_of_the_model() -> None:
    model = dinov3_vits16(pretrained=False, drop_path_rate=0.3, pos_embed_rope_jitter_coords=1.5, device="meta")
    assert model.blocks[0].sample_drop_ratio == 0.3 and model.rope_embed.jitter_coords == 1.5
    assert all(parameter.is_meta for parameter in model.parameters())


def test_convnext_is_loaded_as_the_vits_are(tmp_path: Path) -> None:
    state = random_state(entry=dinov3_convnext_tiny)
    model = dinov3_convnext_tiny(weights=save(state, tmp_path / "w.pth"), patch_size=8, check_hash=False)
    assert_holds(model, state)
    assert model.norms[3] is model.norm and not any(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    (patches,) = model.get_intermediate_layers(IMAGES, reshape=True)
    assert patches.shape == (2, 32, 6, 8)
    assert torch.equal(model(IMAGES), dinov3_convnext_tiny(weights=state)(IMAGES))
    torch.manual_seed(0)
    first = dinov3_convnext_tiny(pretrained=False).state_dict()
    torch.manual_seed(0)
    assert_holds(dinov3_convnext_tiny(pretrained=False), first)


@pytest.mark.parametrize("entry", [dinov3_vits16, dinov3_convnext_tiny])
@pytest.mark.parametrize("dtype", [torch.bfloat16, "float16", torch.float64])
def test_parameters_take_a_dtype_and_positions_do_not(entry: Any, dtype: Any, tmp_path: Path) -> None:
    state = random_state(entry=entry)
    path = save(state, tmp_path / "w.pth")
    want = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    for model in (entry(weights=path, dtype=dtype), entry(weights=state, dtype=dtype)):
        for name, tensor in model.state_dict().items():
            own = torch.float32 if name.endswith("periods") else want
            assert tensor.dtype == own and torch.equal(tensor, state[name].to(own)), name
        assert all(parameter.requires_grad for parameter in model.parameters())
        features = model(IMAGES.to(want))
        assert features.dtype == want
        reference = entry(weights=path)(IMAGES)
        assert torch.cosine_similarity(features.double(), reference.double()).min() > 0.999
    new = entry(pretrained=False, dtype=dtype)
    assert {p.dtype for p in new.parameters()} == {want} and new(IMAGES.to(want)).isfinite().all()


def test_low_precision_start_is_the_rounded_full_one() -> None:
    torch.manual_seed(0)
    full = dinov3_vits16(pretrained=False).state_dict()
    torch.manual_seed(0)
    low = dinov3_vits16(pretrained=False, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(low[name], full[name].to(low[name].dtype)) for name in full)


@pytest.mark.parametrize("entry", [dinov3_vits16, dinov3_convnext_tiny])
def test_tensors_of_the_dtype_are_taken_over(entry: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    low = {name: tensor.bfloat16() for name, tensor in random_state(entry=entry).items()}
    path = save(low, tmp_path / "w.pth")
    mapped: dict[str, Tensor] = {}

    def read(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
        mapped.update(read_state_dict(*args, **kwargs))
        return mapped

    read_state_dict = backbones.read_state_dict
    monkeypatch.setattr(backbones, "read_state_dict", read)
    model = entry(weights=path, dtype=torch.bfloat16)
    for name, tensor in model.state_dict().items():
        if not name.endswith("periods") and not (name.startswith("norm.") and "norms.3.bias" in mapped):
            assert tensor.data_ptr() == mapped[name].data_ptr(), name
    assert_holds(entry(weights=path), low)


@pytest.mark.parametrize("to_file", [torch.save, save_file])
def test_a_model_can_be_saved_over_its_own_file(to_file: Any, tmp_path: Path) -> None:
    path, state = tmp_path / "w.pth", random_state()
    to_file(state, path)
    model = dinov3_vits16(weights=path)
    path.write_bytes(bytes(path.stat().st_size))  # as another file copied over it
    assert_holds(model, state)
    to_file(model.state_dict(), path)
    assert_holds(dinov3_vits16(weights=path), state)


@pytest.mark.parametrize("dtype", [torch.int8, "int", "float33", torch.float8_e4m3fn, 3])
def test_dtype_that_is_not_floating_point(dtype: Any) -> None:
    with pytest.raises(ValueError, match="dinov3_vits16: dtype must be float32, bfloat16, float16 or float64, got "):
        dinov3_vits16(pretrained=False, dtype=dtype)


@pytest.mark.slow
def test_model_compiles_to_machine_code() -> None:
    model = dinov3_vits16(weights=random_state())
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        for images in (IMAGES, IMAGES[:1, :, :32, :32]):  # The second size is compiled with symbolic sizes.
            want = model(images, is_training=True)
            torch.testing.assert_close(compiled(images, is_training=True), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"patch_size": 0}, "patch_size must be positive"),
        ({"embed_dim": 8}, "dinov3_convnext_tiny has no keyword argument 'embed_dim'"),
        ({"depths": [1, 1, 1, 1]}, r"dinov3_convnext_tiny fixes depths \(\[1, 1, 2, 1\]\)"),
        ({"layer_scale_init_value": 0.1}, "fixes layer_scale_init_value"),
        ({"pos_embed_rope_jitter_coords": 1.5}, "has no keyword argument 'pos_embed_rope_jitter_coords'"),
        ({"unknown": 1}, "has no keyword argument 'unknown'"),
        ({"version": "v2"}, "its weights have only one version"),
        ({"weights": Weights.SAT493M}, "was not published with weights SAT493M, only with LVD1689M"),
    ],
)
def test_keywords_that_a_convnext_refuses(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        dinov3_convnext_tiny(**{"pretrained": False, **kwargs})


def test_published_weights_come_from_their_address(
    small_models_and_an_empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = random_state()
    asked: list[str] = []

    def download(url: str, path: Path, **_: Any) -> None:
        asked.append(url)
        save(state, path)

    monkeypatch.setattr(sources, "download", download)
    for weights in (Weights.LVD1689M, "lvd1689m"):
        assert_holds(dinov3_vits16(weights=weights), state)
    assert asked == [backbones.url_of("dinov3_vits16", Weights.LVD1689M)]
    name = "dinov3_vits16_pretrain_lvd1689m-08c60483.pth"
    assert [path.name for path in small_models_and_an_empty_cache.iterdir()] == [name]
    with pytest.raises(WeightsError, match="does not match the hash in its name"):
        dinov3_vits16(check_hash=True)
    dinov3_vits16(hash="01234567")
    assert asked[1].endswith("dinov3_vits16_pretrain_lvd1689m-01234567.pth")
    for digits in ("08c60482", "08c60438", "8c60483"):
        with pytest.raises(ValueError, match=f"hash='{digits}' .did you mean '08c60483'.*: expected the digits"):
            dinov3_vits16(hash=digits)
    with pytest.raises(ValueError, match=r"hash='v2': expected the digits at the end .*, such as '08c60483'"):
        dinov3_vits16(hash="v2")
    cached = small_models_and_an_empty_cache / name
    cached.write_bytes(cached.read_bytes()[:5000])
    with pytest.raises(
        WeightsError,
        match=rf"truncated.*{name} was downloaded from https://somewhere/{name}: delete it to",
    ):
        dinov3_vits16(weights=f"https://somewhere/{name}?Signature=secret")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"weight": "a.pth"}, "dinov3_vits16 has no keyword argument 'weight' .did you mean 'weights'"),
        ({"drop_path": 0.1}, "did you mean 'drop_path_rate'"),
        ({"zzz": 1}, "has no keyword argument 'zzz'; it takes pretrained, weights, check_hash, "),
        ({"embed_dim": 8}, r"dinov3_vits16 fixes embed_dim \(32\)"),
        ({"patch_size": 8}, r"dinov3_vits16 fixes patch_size \(16\)"),
        ({"untie_global_and_local_cls_norm": True}, "fixes untie_global_and_local_cls_norm"),
        ({"version": "v2"}, "its weights have only one version, got version='v2'"),
        ({"weights": 3}, "weights must be a Weights, a path, a URL or a state dict, got 3"),
    ],
)
def test_keywords_that_are_unknown_or_fixed(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        dinov3_vits16(**kwargs)


def test_unknown_kind_of_url_and_needless_hash(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="weights='s3://b/w.pth': cannot read s3:// URLs"):
        dinov3_vits16(weights="s3://b/w.pth")
    with pytest.raises(ValueError, match="hash can only select published weights, but other weights are given"):
        dinov3_vits16(weights=save(random_state(), tmp_path / "w.pth"), hash="01234567")


def test_check_hash_of_a_local_file(tmp_path: Path) -> None:
    state = random_state()
    plain = save(state, tmp_path / "w.pth")
    digest = hashlib.sha256(plain.read_bytes()).hexdigest()
    named = tmp_path / f"w-{digest[:8]}.pth"
    shutil.copy(plain, named)
    assert_holds(dinov3_vits16(weights=named, check_hash=True), state)
    named.write_bytes(named.read_bytes() + b"!")
    with pytest.raises(WeightsError, match=f"{named} does not match the hash in its name.*not with {digest[:8]}"):
        dinov3_vits16(weights=named, check_hash=True)
    with pytest.raises(ValueError, match="check_hash=True, but the name of w.pth does not end in -<hash>.pth"):
        dinov3_vits16(weights=plain, check_hash=True)


@pytest.mark.parametrize("entry", ENTRIES)
def test_entries_have_a_signature_and_help_that_read_well(entry: str) -> None:
    function = getattr(backbones, entry)
    signature = inspect.signature(function)
    defaults = {name: parameter.default for name, parameter in signature.parameters.items()}
    defaults.pop("kwargs")
    assert defaults == {"pretrained": True, "weights": Weights.LVD1689M, "check_hash": False}
    first, _, rest = function.__doc__.partition("\n")
    assert first.startswith(("DINOv3 ViT-", "DINOv3 ConvNeXt-")) and first.endswith(".")
    assert "pretrained: load `weights`" in rest and "Raises:" in rest
