"""The model of an evaluation: from runs, from files without a configuration, from directories of other libraries."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from dinov3.eval import knn, linear, log_regression
from dinov3.eval.classification.config import TransformConfig
from dinov3.eval.command.model import FrozenBackbone, ModelConfig, find_trained_normalization, load_model
from dinov3.hub.backbones import dinov3_vits16
from dinov3.hub.convert import convert
from dinov3.hub.runs import dinov3_from_run

from .. import real_data

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training run with a small teacher, whose last iteration is 9."""
    return real_data.write_run(tmp_path_factory.mktemp("setup") / "run")


def features(**model: Any) -> torch.Tensor:
    backbone = load_model(ModelConfig(**model))
    assert backbone.autocast_dtype == torch.float32 and not backbone.model.training
    with torch.no_grad():
        return backbone.model(IMAGES)


def features_of_run(run: Path) -> torch.Tensor:
    with torch.no_grad():
        return dinov3_from_run(run)(IMAGES)


@pytest.mark.parametrize(
    "path", ["", "teacher_checkpoint.pth", "eval/training_9", "eval/training_9/teacher_checkpoint.pth"]
)
def test_configuration_of_a_run_is_found_wherever_its_teacher_lies(path: str, run: Path) -> None:
    weights = run / path
    if weights.name == "training_9":
        weights = weights / "teacher_checkpoint.pth"
    config = ModelConfig(pretrained_weights=str(weights))
    assert config.find_config_file() == str(run / "config.yaml")
    assert config.describe() == str(run / "eval/training_9/teacher_checkpoint.pth")
    assert torch.equal(features(pretrained_weights=str(weights)), features_of_run(run))


def test_signatures_of_urls_are_not_shown() -> None:
    url = "https://somewhere/w.pth"
    assert ModelConfig(pretrained_weights=f"{url}?Signature=secret").describe() == url
    assert ModelConfig(dino_hub="dinov3_vits16", weights=f"{url}?Signature=secret").describe() == (
        f"dinov3_vits16 with {url}"
    )


def test_misspelt_names_of_published_weights() -> None:
    with pytest.raises(FileNotFoundError, match=r"model.weights=LVD1698M \(did you mean 'LVD1689M'\?\): there is no"):
        ModelConfig(dino_hub="dinov3_vits16", weights="LVD1698M").check()


def with_published_norms(run: Path, copy: Path) -> Path:
    """The run with the layer norms that the entries of its weights are taken to belong to."""
    shutil.copytree(run, copy, symlinks=True)
    cfg = OmegaConf.load(run / "config.yaml")
    cfg.student.norm_layer = "layernormbf16"
    OmegaConf.save(cfg, copy / "config.yaml")
    return copy


def test_any_other_configuration_beside_weights_is_left_alone(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    published = with_published_norms(run, tmp_path / "run")
    shutil.copy(run / "eval/training_9/teacher_checkpoint.pth", tmp_path / "mine.pth")
    (tmp_path / "config.yaml").write_text("student_loan: 1\nservice: {}\n")
    assert ModelConfig(pretrained_weights=str(tmp_path / "mine.pth")).find_config_file() is None
    with caplog.at_level("WARNING", logger="dinov3"):
        found = features(pretrained_weights=str(tmp_path / "mine.pth"))
    torch.testing.assert_close(found, features_of_run(published), rtol=1e-4, atol=1e-5)
    assert "assumed layer_norm_eps=1e-05, pos_embed_rope_normalize_coords=separate" in caplog.text
    assert "in evaluations model.config_file" in caplog.text


@pytest.mark.parametrize("library", ["huggingface", "timm"])
def test_directories_of_other_libraries_need_no_configuration(
    library: Any, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    published = with_published_norms(run, tmp_path / "run")  # timm has no others
    convert(published, tmp_path / library, to=library)
    with caplog.at_level("INFO", logger="dinov3"):
        found = features(pretrained_weights=str(tmp_path / library))
    torch.testing.assert_close(found, features_of_run(published), rtol=1e-4, atol=1e-5)
    assert "has the structure of a DinoVisionTransformer" in caplog.text


def test_published_models_are_known_by_their_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = dinov3_vits16(pretrained=False)
    torch.save(model.state_dict(), tmp_path / "released.pth")
    convert(tmp_path / "released.pth", tmp_path / "huggingface", to="huggingface")
    with torch.no_grad():
        want = model(IMAGES)
    for path in ("released.pth", "huggingface"):
        caplog.clear()
        with caplog.at_level("INFO", logger="dinov3"):
            torch.testing.assert_close(features(pretrained_weights=str(tmp_path / path)), want, rtol=1e-4, atol=1e-5)
        assert "has the structure of dinov3_vits16" in caplog.text
    hub = features(dino_hub="dinov3_vits16", weights=str(tmp_path / "huggingface"))
    torch.testing.assert_close(hub, want, rtol=1e-4, atol=1e-5)


def test_evaluation_of_a_directory_of_hugging_face(run: Path, tmp_path: Path) -> None:
    real_data.write_faces(tmp_path / "faces")
    convert(run, tmp_path / "huggingface", to="huggingface")
    accuracy = []
    for weights in (run, tmp_path / "huggingface"):
        argv = [f"model.pretrained_weights={weights}", *real_data.size_settings(), "--no-cache"]
        argv += [f"train.dataset=ImageFolder:root={tmp_path}/faces/train", f"output_dir={tmp_path}/out"]
        assert knn.main([*argv, f"eval.test_dataset=ImageFolder:root={tmp_path}/faces/test", "train.ks=[5]"]) == 0
        accuracy.append((tmp_path / "out" / "results-knn.csv").read_text())
    assert accuracy[0] == accuracy[1]


@pytest.mark.parametrize("module", [knn, log_regression, linear])
@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({}, ValueError, "no model: give model.pretrained_weights=RUN"),
        ({"pretrained_weights": "nowhere"}, FileNotFoundError, "model.pretrained_weights=nowhere: there is no such"),
        (
            {"dino_hub": "dinov3_vits16", "weights": "gone.pth"},
            FileNotFoundError,
            "model.weights=gone.pth: there is no",
        ),
        ({"dino_hub": "dinov3_vits15"}, ValueError, "model.dino_hub=dinov3_vits15.*did you mean 'dinov3_vits16'"),
        ({"config_file": "gone.yaml"}, FileNotFoundError, "no configuration file 'gone.yaml'"),
    ],
    ids=["nothing", "weights", "hub weights", "hub name", "config"],
)
def test_model_that_is_not_there_is_refused_before_anything_is_made(
    module: Any, settings: dict[str, str], error: type[Exception], message: str, tmp_path: Path
) -> None:
    test = "train.val_dataset" if module is linear else "eval.test_dataset"
    argv = [f"model.{name}={value}" for name, value in settings.items()] or ["model.weights=null"]
    with pytest.raises(error, match=message):
        module.main(
            [*argv, "train.dataset=ImageFolder:root=A", f"{test}=ImageFolder:root=B", f"output_dir={tmp_path}/out"]
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["weights.pth", "directory"])
def test_weights_of_something_else_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "directory":
        path.mkdir()
        (path / "notes.txt").write_text("")
    else:
        torch.save({"layer1.0.conv1.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(ValueError, match="neither a distributed checkpoint|not hold a DINOv3 backbone: it is a ResNet"):
        features(pretrained_weights=str(path))


def warned(caplog: pytest.LogCaptureFixture, transform: TransformConfig | None = None, **model: Any) -> str:
    caplog.clear()
    config = ModelConfig(**model)
    with caplog.at_level("WARNING", logger="dinov3"):
        known = find_trained_normalization(config, torch.nn.Identity())
        (transform or TransformConfig()).check(FrozenBackbone(torch.nn.Identity(), normalization=known))
    return caplog.text


def test_images_normalised_differently_give_a_warning(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert warned(caplog, pretrained_weights=str(run)) == ""
    cfg = OmegaConf.load(run / "config.yaml")
    cfg.crops.rgb_mean, cfg.crops.rgb_std = [0.5, 0.25, 0.125], [0.1, 0.2, 0.3]
    shutil.copytree(run, tmp_path / "run", symlinks=True)
    OmegaConf.save(cfg, tmp_path / "run" / "config.yaml")
    text = warned(caplog, pretrained_weights=str(tmp_path / "run"))
    assert "give transform.mean=[0.5,0.25,0.125] transform.std=[0.1,0.2,0.3]" in text
    same = TransformConfig(mean=[0.5, 0.25, 0.125], std=[0.1, 0.2, 0.3])
    assert warned(caplog, same, pretrained_weights=str(tmp_path / "run")) == ""


@pytest.mark.parametrize("library", ["huggingface", "timm"])
def test_normalisation_of_satellite_images_gives_a_warning(
    library: Any, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    published = with_published_norms(run, tmp_path / "run")
    for data in ("lvd1689m", "sat493m"):
        convert(published, tmp_path / data, to=library, data=data)  # type: ignore[arg-type]
        text = warned(caplog, pretrained_weights=str(tmp_path / data))
        assert ("transform.mean=[0.43,0.411,0.296]" in text) is (data == "sat493m")
    assert "transform.mean=[0.43,0.411,0.296]" in warned(caplog, dino_hub="dinov3_vit7b16", weights="SAT493M")


@pytest.mark.parametrize("settings", [{"mean": [0.5]}, {"std": [0.0, 0.1, 0.1]}, {"mean": [123.0, 117.0, 104.0]}])
def test_normalisation_that_cannot_be_is_refused(settings: dict[str, list[float]]) -> None:
    with pytest.raises(ValueError, match=f"transform.{next(iter(settings))}=.*three numbers between 0 and 1"):
        TransformConfig(**settings)  # type: ignore[arg-type]
