"""The published depth models by name: where their two weights may come from, and what is refused."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinov3.heads.depth.depther import Depther
from dinov3.heads.weights import read_head
from dinov3.hub import backbones, depthers, head_weights, sources
from dinov3.hub.backbones import Weights
from dinov3.hub.depthers import CHMV2, SYNTHMIX, DepthWeights, dinov3_vit7b16_dd, dinov3_vitl16_chmv2
from dinov3.hub.transforms import make_transform, normalization_of
from dinov3.utils.weight_files import WeightsError
from tests.heads.tiny import images, make_published_depthers_small, randomise_

ENTRIES = ["dinov3_vit7b16_dd", "dinov3_vitl16_chmv2"]
Files = dict[str, Any]


@pytest.fixture(autouse=True)
def small_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Both models in a size for tests, and a cache of their own."""
    make_published_depthers_small(monkeypatch)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))


@pytest.fixture(params=ENTRIES)
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Files:
    """A filled model, and the paths of its parts."""
    torch.manual_seed(0)
    entry = getattr(depthers, request.param)
    model = entry(pretrained=False)
    randomise_(model)
    torch.save(model.encoder.backbone.state_dict(), tmp_path / "backbone.pth")
    torch.save(model.decoder.state_dict(), tmp_path / "head.pth")
    return {
        "entry": entry,
        "backbone": tmp_path / "backbone.pth",
        "head": tmp_path / "head.pth",
        "model": model,
        "state": model.state_dict(),
    }


def load(files: Files, **kwargs: Any) -> Depther:
    return files["entry"](**{"weights": files["head"], "backbone_weights": files["backbone"], **kwargs})


def assert_holds(model: nn.Module, state: dict[str, Tensor]) -> None:
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.items())


def test_both_weights_from_files(files: Files) -> None:
    model = load(files)
    assert isinstance(model, Depther)
    assert_holds(model, files["state"])
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.encoder.parameters())
    assert all(parameter.requires_grad for parameter in model.decoder.parameters())
    with torch.no_grad():
        assert torch.equal(model(images(50, 70)), files["model"](images(50, 70)))
        assert model.predict(images(50, 70)).shape == (1, 1, 50, 70)


def test_weights_of_the_head_in_every_form(files: Files, tmp_path: Path) -> None:
    torch.save(files["state"], tmp_path / "whole.pth")
    torch.save({"model": torch.load(files["head"]), "iteration": 3}, tmp_path / "training.pth")
    head = torch.load(files["head"])
    for weights in (
        str(files["head"]),
        files["head"].as_uri(),
        head,
        tmp_path / "whole.pth",
        tmp_path / "training.pth",
    ):
        assert_holds(load(files, weights=weights, mmap=False), files["state"])
    with torch.no_grad():
        load(files, weights=head).decoder.conv_depth.head[4].weight.zero_()
    assert head["conv_depth.head.4.weight"].any()


def test_the_home_directory_can_be_written_short(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(files["head"].parent))
    assert_holds(load(files, weights="~/head.pth"), files["state"])


def test_a_head_is_not_initialised_or_copied(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    mapped: dict[str, Tensor] = {}

    def read(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
        mapped.update(read_head(*args, **kwargs))
        return mapped

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("initialised")

    monkeypatch.setattr(head_weights, "read_head", read)
    monkeypatch.setattr(nn.init, "kaiming_normal_", fail)
    state = load(files).decoder.state_dict()
    assert all(tensor.data_ptr() == mapped[name].data_ptr() for name, tensor in state.items())


def test_a_head_can_be_saved_over_its_own_file(files: Files) -> None:
    model = load(files)
    torch.save(model.decoder.state_dict(), files["head"])
    assert_holds(load(files), files["state"])


@pytest.mark.parametrize("files", ["dinov3_vit7b16_dd"], indirect=True)
def test_published_weights_come_from_their_addresses(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(url: str, path: Path, **_: Any) -> None:
        asked.append(url)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files["head" if "head" in url else "backbone"].read_bytes())

    monkeypatch.setattr(sources, "download", download)
    assert_holds(dinov3_vit7b16_dd(weights="synthmix"), files["state"])
    assert asked == [
        backbones.url_of("dinov3_vit7b16", Weights.LVD1689M),
        "https://dl.fbaipublicfiles.com/dinov3/dinov3_vit7b16/dinov3_vit7b16_synthmix_dpt_head-02040be1.pth",
    ]
    dinov3_vit7b16_dd(hash="01234567", backbone_weights=files["backbone"])
    assert asked[2:] == [SYNTHMIX.url("01234567")] and "01234567" in asked[2]


@pytest.mark.parametrize("files", ["dinov3_vitl16_chmv2"], indirect=True)
def test_canopy_heights_come_with_the_satellite_backbone(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def locate(weights: Any, **_: Any) -> Path:
        asked.append(weights)
        return files["head" if "head" in weights else "backbone"]

    monkeypatch.setattr(sources, "locate", locate)
    assert_holds(dinov3_vitl16_chmv2(True), files["state"])
    assert asked == [backbones.url_of("dinov3_vitl16", Weights.SAT493M), CHMV2.url()]


def test_hash_of_both_files_is_checked(files: Files, tmp_path: Path) -> None:
    backbone = files["model"].encoder.backbone.state_dict()
    for part, other in (("head", {"backbone_weights": backbone}), ("backbone", {})):
        wrong = files[part].rename(tmp_path / f"{part}-01234567.pth")
        with pytest.raises(WeightsError, match=f"{wrong.name} does not match the hash in its name"):
            load({**files, part: wrong}, **other, check_hash=True)


def test_dtype_and_device_hold_for_both_parts(files: Files) -> None:
    model = load(files, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.encoder.backbone.rope_embed.periods.dtype == torch.float32
    assert model(images().bfloat16()).dtype == torch.float32
    random = files["entry"](pretrained=False, device="meta", dtype="bfloat16")
    assert all(tensor.is_meta for tensor in random.state_dict().values())
    assert {parameter.dtype for parameter in random.parameters()} == {torch.bfloat16}


def test_autocast_dtype_is_that_of_the_model(files: Files) -> None:
    assert load(files).autocast_dtype == torch.float32
    assert load(files, autocast_dtype=torch.bfloat16).autocast_dtype == torch.bfloat16


def test_random_start_reads_nothing() -> None:
    model = dinov3_vitl16_chmv2(False)
    with torch.no_grad():
        depth = model(images(64, 64))
    assert depth.shape == (1, 1, 64, 64) and depth.isfinite().all() and depth.min() >= 0.008
    with pytest.raises(ValueError, match="weights are given, but pretrained=False reads none"):
        dinov3_vitl16_chmv2(pretrained=False, weights="a.pth")
    with pytest.raises(ValueError, match="weights are given, but pretrained=False reads none"):
        dinov3_vit7b16_dd(pretrained=False, backbone_weights="a.pth")


def test_depth_range_is_that_of_the_bins() -> None:
    model = dinov3_vit7b16_dd(pretrained=False, depth_range=(0.5, 20))
    with torch.no_grad():
        depth = model(images(64, 64))
    assert depth.min() >= 0.5 and depth.max() <= 20
    for wrong in (20.0, (1, 2, 3), ("a", "b")):
        with pytest.raises(ValueError, match="depth_range=.*: expected two depths in metres"):
            dinov3_vit7b16_dd(pretrained=False, depth_range=wrong)
    with pytest.raises(ValueError, match="expected 0 <= min_depth < max_depth"):
        dinov3_vit7b16_dd(pretrained=False, depth_range=(20.0, 0.5))


def test_configurations_are_not_shared() -> None:
    config = depthers.config_of("dinov3_vit7b16_dd")
    config.head_kwargs["channels"] = 3
    config.backbone_out_layers.append(1)
    again = depthers.config_of("dinov3_vit7b16_dd")
    assert again.head_kwargs["channels"] != 3 and again.backbone_out_layers == [1, 3, 5, 7]


@pytest.mark.parametrize(
    ("entry", "weights", "message"),
    [
        (dinov3_vit7b16_dd, DepthWeights.CHMV2, "only with SYNTHMIX"),
        (dinov3_vit7b16_dd, "chmv2", "was not published with weights CHMV2"),
        (dinov3_vitl16_chmv2, DepthWeights.SYNTHMIX, "only with CHMV2"),
        (dinov3_vitl16_chmv2, Weights.SAT493M, "was not published with weights SAT493M"),
    ],
)
@pytest.mark.parametrize("pretrained", [True, False])
def test_weights_of_the_other_model(entry: Any, weights: Any, message: str, pretrained: bool) -> None:
    with pytest.raises(ValueError, match=f"the head of {entry.__name__} .*{message}"):
        entry(pretrained=pretrained, weights=weights)


@pytest.mark.parametrize("files", ["dinov3_vit7b16_dd"], indirect=True)
def test_head_of_the_other_model(files: Files, tmp_path: Path) -> None:
    path = tmp_path / "chmv2.pth"
    torch.save(dinov3_vitl16_chmv2(pretrained=False).decoder.state_dict(), path)
    fit = "does not fit the head of dinov3_vit7b16_dd: expected a DPT head .*, found a DPT head .*; 22 missing"
    with pytest.raises(WeightsError, match=f"^{path} {fit} .*; 22 unknown .*; 18 of another shape"):
        load(files, weights=path)


def test_interchanged_and_damaged_files(files: Files, tmp_path: Path) -> None:
    with pytest.raises(
        WeightsError, match="found a backbone .* the weights of a backbone: pass them as backbone_weights=, and the he"
    ):
        load(files, weights=files["backbone"])
    with pytest.raises(WeightsError, match="head.pth"):
        load(files, backbone_weights=files["head"])
    truncated = tmp_path / "truncated.pth"
    truncated.write_bytes(files["head"].read_bytes()[:-3000])
    with pytest.raises(WeightsError, match=r"truncated.pth is truncated"):
        load(files, weights=truncated)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"weight": 1}, "no keyword argument 'weight' .did you mean 'weights'"),
        ({"head_kwargs": {}}, "no keyword argument 'head_kwargs'"),
        ({"weights": 3}, "weights must be a DepthWeights, a path, a URL or a state dict, got 3"),
        ({"weights": "none.pth"}, "no weights at none.pth"),
        ({"hash": "01234567"}, "hash can only select published weights"),
        ({"backbone_weights": "none.pth"}, "no weights at none.pth"),
        ({"autocast_dtype": torch.float64}, "autocast_dtype=torch.float64: expected torch.float32"),
    ],
)
def test_bad_arguments(files: Files, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError, FileNotFoundError), match=message):
        load(files, **kwargs)


def test_range_of_canopy_heights_is_fixed() -> None:
    with pytest.raises(TypeError, match="no keyword argument 'depth_range'"):
        dinov3_vitl16_chmv2(pretrained=False, depth_range=(0.1, 20.0))


def test_signatures() -> None:
    for entry, weights, data, kind in (
        (dinov3_vit7b16_dd, DepthWeights.SYNTHMIX, Weights.LVD1689M, inspect.Parameter.KEYWORD_ONLY),
        (dinov3_vitl16_chmv2, DepthWeights.CHMV2, Weights.SAT493M, inspect.Parameter.POSITIONAL_OR_KEYWORD),
    ):
        *arguments, last = inspect.signature(entry).parameters.values()
        assert {argument.name: argument.default for argument in arguments} == {
            "pretrained": True,
            "weights": weights,
            "backbone_weights": data,
            "check_hash": False,
            "autocast_dtype": torch.float32,
        }
        assert {argument.kind for argument in arguments} == {kind} and last.kind is inspect.Parameter.VAR_KEYWORD
    assert {member.name: member.value for member in DepthWeights} == {"CHMV2": "CHMV2", "SYNTHMIX": "SYNTHMIX"}


@pytest.mark.parametrize("weights", [DepthWeights.CHMV2, "chmv2", CHMV2.url()])
def test_canopy_heights_have_a_normalisation_of_their_own(weights: Any) -> None:
    assert normalization_of(weights) == ((0.420, 0.411, 0.296), (0.213, 0.156, 0.143))
    # It is neither that of the backbone inside nor that of the other depth model.
    assert normalization_of(Weights.SAT493M).mean == (0.430, 0.411, 0.296)
    assert normalization_of(DepthWeights.SYNTHMIX) == normalization_of(Weights.LVD1689M)
    assert normalization_of(SYNTHMIX.url()) == normalization_of(Weights.LVD1689M)


def test_pictures_in_their_own_resolution() -> None:
    picture = torch.full((3, 50, 71), 0.5)
    image = make_transform(None, weights=DepthWeights.CHMV2)(picture)
    assert image.shape == (3, 50, 71)
    assert image[:, 0, 0].tolist() == pytest.approx([0.08 / 0.213, 0.089 / 0.156, 0.204 / 0.143], rel=1e-4)
