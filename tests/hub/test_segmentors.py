"""The published segmentor by name: where its two weights may come from, and what is refused."""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinov3.eval.segmentation.inference import make_inference
from dinov3.heads.segmentation import FeatureDecoder
from dinov3.hub import backbones, sources
from dinov3.hub.architectures import PUBLISHED as ARCHITECTURES
from dinov3.hub.architectures import PublishedViT
from dinov3.hub.backbones import Weights
from dinov3.hub.segmentors import PUBLISHED, SegmentorWeights, dinov3_vit7b16_ms
from dinov3.hub.transforms import normalization_of
from dinov3.utils.weight_files import WeightsError
from tests.heads.tiny import images, randomise_

SMALL = {
    "num_classes": 5,
    "hidden_dim": 32,
    "n_queries": 7,
    "ffn_dim": 24,
    "n_encoder_layers": 1,
    "n_decoder_layers": 3,
}
BACKBONE = "segmentation_model.0.backbone."


@pytest.fixture(autouse=True)
def small_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The backbone in a size for tests, and a cache of its own."""
    hashes = {"LVD1689M": "a955f4ea", "SAT493M": "a6675841"}
    small = PublishedViT(32, 8, 1, 2, "swiglu64", hashes, untied=frozenset(hashes))
    monkeypatch.setitem(ARCHITECTURES, "dinov3_vit7b16", small)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    """A filled model, and the paths of its parts."""
    torch.manual_seed(0)
    model = dinov3_vit7b16_ms(pretrained=False, **SMALL)
    randomise_(model)
    state = model.state_dict()
    torch.save(model.segmentation_model[0].backbone.state_dict(), tmp_path / "backbone.pth")
    torch.save({name: entry for name, entry in state.items() if not name.startswith(BACKBONE)}, tmp_path / "head.pth")
    return {"backbone": tmp_path / "backbone.pth", "head": tmp_path / "head.pth", "model": model, "state": state}


def load(files: dict[str, Any], **kwargs: Any) -> FeatureDecoder:
    return dinov3_vit7b16_ms(**{"weights": files["head"], "backbone_weights": files["backbone"], **SMALL, **kwargs})


def assert_holds(model: nn.Module, state: dict[str, Tensor]) -> None:
    loaded = model.state_dict()
    assert list(loaded) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.items())


def test_both_weights_from_files(files: dict[str, Any]) -> None:
    model = load(files)
    assert_holds(model, files["state"])
    assert not any(module.training for module in model.modules())
    assert all(p.requires_grad != name.startswith(BACKBONE) for name, p in model.named_parameters())
    with torch.no_grad():
        got, want = model(images()), files["model"](images())
    assert torch.equal(got["pred_masks"], want["pred_masks"]) and got["pred_logits"].shape == (1, 7, 6)
    assert len(got["aux_outputs"]) == 3


def test_weights_of_the_head_in_every_form(files: dict[str, Any], tmp_path: Path) -> None:
    head = torch.load(files["head"])
    # The backbone in a whole model is left out: it comes from its own file.
    whole = {name: entry + 1 if name.startswith(BACKBONE) else entry for name, entry in files["state"].items()}
    torch.save(whole, tmp_path / "whole.pth")
    torch.save({"model": head, "iteration": 3}, tmp_path / "training.pth")
    bare = {name.removeprefix("segmentation_model."): entry for name, entry in head.items()}
    torch.save(bare, tmp_path / "bare.pth")
    torch.save({f"module.{name}": entry for name, entry in head.items()}, tmp_path / "parallel.pth")
    for weights in (
        files["head"].as_uri(),
        head,
        *(tmp_path / f"{name}.pth" for name in ("whole", "training", "bare", "parallel")),
    ):
        assert_holds(load(files, weights=weights, mmap=False), files["state"])
    with torch.no_grad():
        load(files, weights=head).segmentation_model[0].level_embed.zero_()
    assert head["segmentation_model.0.level_embed"].any()


def test_published_weights_come_from_their_addresses(files: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(url: str, path: Path, **_: Any) -> None:
        asked.append(url)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files["head" if "head" in url else "backbone"].read_bytes())

    monkeypatch.setattr(sources, "download", download)
    assert_holds(dinov3_vit7b16_ms(weights="ade20k", **SMALL), files["state"])
    assert asked == [
        backbones.url_of("dinov3_vit7b16", Weights.LVD1689M),
        "https://dl.fbaipublicfiles.com/dinov3/dinov3_vit7b16/dinov3_vit7b16_ade20k_m2f_head-bf307cb1.pth",
    ]


def test_a_head_is_not_initialised(files: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("initialised")

    for name in ("normal_", "trunc_normal_", "xavier_uniform_", "kaiming_uniform_"):
        monkeypatch.setattr(nn.init, name, fail)
    # Nothing on the CPU: constructors of torch's layers call them on the meta device.
    monkeypatch.setattr(nn.init, "kaiming_uniform_", lambda tensor, **_: fail() if not tensor.is_meta else tensor)
    monkeypatch.setattr(nn.init, "normal_", lambda tensor, *_, **__: fail() if not tensor.is_meta else tensor)
    load(files)


def test_dtype_and_device_hold_for_both_parts(files: dict[str, Any]) -> None:
    options = {"drop_path_rate": 0.0, "pos_embed_rope_rescale_coords": None, "mmap": True, "progress": False}
    model = load(files, dtype=torch.bfloat16, autocast_dtype=torch.float32, **options)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.segmentation_model[0].backbone.rope_embed.periods.dtype == torch.float32
    with torch.no_grad():
        assert model(images().bfloat16())["pred_masks"].isfinite().all()
    random = dinov3_vit7b16_ms(pretrained=False, device="meta", dtype="bfloat16", **SMALL)
    assert all(entry.is_meta for entry in random.state_dict().values())
    assert {parameter.dtype for parameter in random.parameters()} == {torch.bfloat16}


def test_autocast_is_bfloat16_unless_something_else_is_given(files: dict[str, Any]) -> None:
    model = load(files)
    with torch.no_grad():
        assert model(images())["pred_masks"].dtype == torch.bfloat16
        assert load(files, autocast_dtype=torch.float32)(images())["pred_masks"].dtype == torch.float32


def test_a_random_segmentor_segments_photos_of_any_size() -> None:
    model = dinov3_vit7b16_ms(pretrained=False, autocast_dtype=torch.float32, **SMALL)
    infer = functools.partial(make_inference, images(75, 50), model, decoder_head_type="m2f", rescale_to=(75, 50))
    slid = infer(inference_mode="slide", n_output_channels=5, crop_size=(40, 40), stride=(30, 30))
    whole = infer(inference_mode="whole", whole_size=None)
    assert slid.shape == whole.shape == (1, 5, 75, 50) and slid.isfinite().all() and whole.isfinite().all()


def test_a_head_of_another_size_is_refused(files: dict[str, Any]) -> None:
    wide = "does not fit the head of dinov3_vit7b16_ms: expected a Mask2Former head of width 64 and 5 classes .*found a"
    with pytest.raises(WeightsError, match=wide + " Mask2Former head of width 32 and 5 classes"):
        load(files, hidden_dim=64)
    with pytest.raises(WeightsError, match="width 32 and 6 classes .* width 32 and 5 classes .*class_embed.weight is"):
        load(files, num_classes=6)


def test_interchanged_cut_and_damaged_files(files: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="the weights of a backbone: pass them as backbone_weights=, and the head"):
        load(files, weights=files["backbone"])
    head = torch.load(files["head"])
    head.pop("segmentation_model.0.level_embed")
    head.pop("segmentation_model.1.predictor.query_feat.weight")
    with pytest.raises(WeightsError, match=r"2 missing \(0.level_embed.*1.predictor.query_feat.weight"):
        load(files, weights=head)
    truncated = tmp_path / "truncated.pth"
    truncated.write_bytes(files["head"].read_bytes()[:-3000])
    with pytest.raises(WeightsError, match=r"truncated.pth is truncated"):
        load(files, weights=truncated)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"weight": 1}, "no keyword argument 'weight' .did you mean 'weights'"),
        ({"num_clases": 21}, "no keyword argument 'num_clases' .did you mean 'num_classes'"),
        ({"hidden_dim": 48}, "hidden_dim=48: expected a multiple of 32"),
        ({"n_heads": 5}, "hidden_dim=32: expected a multiple of n_heads=5"),
        ({"weights": "ade20"}, "no weights at ade20"),
        ({"hash": "01234567"}, "hash can only select published weights"),
    ],
)
def test_bad_arguments(files: dict[str, Any], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError, FileNotFoundError), match=message):
        load(files, **kwargs)


@pytest.mark.parametrize("weights", [SegmentorWeights.ADE20K, "ade20k", PUBLISHED.url()])
def test_images_are_normalised_as_for_imagenet(weights: Any) -> None:
    assert normalization_of(weights) == normalization_of(Weights.LVD1689M)


def test_signature() -> None:
    *arguments, last = inspect.signature(dinov3_vit7b16_ms).parameters.values()
    assert {argument.name: argument.default for argument in arguments} == {
        "pretrained": True,
        "weights": SegmentorWeights.ADE20K,
        "backbone_weights": Weights.LVD1689M,
        "check_hash": False,
        "autocast_dtype": torch.bfloat16,
    }
    assert last.kind is inspect.Parameter.VAR_KEYWORD
    assert {member.name: member.value for member in SegmentorWeights} == {"ADE20K": "ADE20K"}
