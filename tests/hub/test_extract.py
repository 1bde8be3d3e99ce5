"""Features of a folder of images, and what the command lines of the hub share."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.transforms import v2

from dinov3.configs import get_default_config
from dinov3.data.datasets import BadImageError
from dinov3.data.transforms import IMAGENET_DEFAULT_MEAN, SAT_DEFAULT_MEAN, SAT_DEFAULT_STD
from dinov3.distributed import runtime
from dinov3.hub import extract
from dinov3.hub.command_line import ModelChoice, find_normalization
from dinov3.hub.extract import ExtractOptions, read_features
from dinov3.hub.runs import dinov3_from_run
from dinov3.models import build_model_from_cfg
from dinov3.models.convnext import ConvNeXt
from dinov3.utils.command_line import run_command_line

STUDENT = {"arch": "vit_tiny", "depth": 1, "n_storage_tokens": 2, "mask_k_bias": True, "layerscale": 1.0}
CROPS = {"rgb_mean": [0.1, 0.2, 0.3], "rgb_std": [0.4, 0.5, 0.6]}
N_IMAGES = 7


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv(runtime.DEVICE_VARIABLE, "cpu")
    yield
    runtime.set_device(None)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    save_run(directory, seed=0)
    return directory


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("images")
    make_images(directory)
    return directory


@pytest.fixture
def options(run: Path, images: Path, tmp_path: Path) -> ExtractOptions:
    return ExtractOptions(
        ModelChoice(str(run)), images, tmp_path / "out.safetensors", size=(32, 48), batch_size=2, num_workers=0
    )


def save_run(directory: Path, seed: int) -> None:
    cfg = OmegaConf.merge(get_default_config(), {"student": STUDENT, "crops": CROPS})
    OmegaConf.save(cfg, directory / "config.yaml")
    torch.manual_seed(seed)
    model, _ = build_model_from_cfg(cfg, only_teacher=True)
    model.to_empty(device="cpu")
    model.init_weights()
    torch.save({"teacher": {f"backbone.{k}": v for k, v in model.state_dict().items()}}, directory / "x")
    (directory / "x").replace(directory / "teacher_checkpoint.pth")


def make_images(directory: Path) -> None:
    pixels = np.random.default_rng(0)
    for number in range(N_IMAGES):
        path = directory / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels.integers(0, 256, (40 + number, 50, 3), dtype=np.uint8)).save(path)


def interrupt_after(monkeypatch: pytest.MonkeyPatch, n_shards: int) -> Callable[[], int]:
    """Ctrl-C after some shards; returns a function that counts the shards that were written."""
    save, written = extract._save_shard, []

    def save_or_stop(path: Path, *args: Any) -> None:
        if len(written) == n_shards:
            raise KeyboardInterrupt
        save(path, *args)
        written.append(path)

    monkeypatch.setattr(extract, "_save_shard", save_or_stop)
    return lambda: len(written)


def no_others(options: ExtractOptions) -> bool:
    return [path.name for path in options.out.parent.iterdir()] == [options.out.name]


def test_features_are_those_of_the_model(options: ExtractOptions, run: Path, images: Path) -> None:
    names, features = extract.extract(replace(options, tokens=extract.TOKENS))
    assert names == ["a/0.png", "a/2.png", "a/4.png", "a/6.png", "b/1.png", "b/3.png", "b/5.png"]
    model = dinov3_from_run(run)
    steps = [v2.Resize((32, 48), antialias=True), v2.ToDtype(torch.float32, scale=True)]
    transform = v2.Compose([v2.PILToTensor(), *steps, v2.Normalize(CROPS["rgb_mean"], CROPS["rgb_std"])])
    batch = torch.stack([transform(Image.open(images / name)) for name in names])
    with torch.no_grad():
        want: Any = model.forward_features(batch)  # type: ignore[operator]
    patches = want["x_norm_patchtokens"]
    expected = {
        "cls": want["x_norm_clstoken"],
        "avg": patches.mean(1),
        "patch": patches.reshape(N_IMAGES, 2, 3, 192),
        "storage": want["x_storage_tokens"],
    }
    assert list(features) == list(expected)
    for token, tensor in features.items():
        torch.testing.assert_close(tensor, expected[token], rtol=1e-4, atol=1e-5)
    assert no_others(options)


def test_the_file_can_be_written_over_while_its_features_are_in_use(options: ExtractOptions) -> None:
    _, features = extract.extract(options)
    before = features["cls"].clone()
    save_file(features, options.out)
    assert torch.equal(features["cls"], before) and torch.equal(load_file(options.out)["cls"], before)


def test_the_file_records_how_it_was_made(options: ExtractOptions) -> None:
    extract.extract(options)
    with safe_open(options.out, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["size"] == "32x48" and metadata["tokens"] == "cls" and metadata["mean"] == "[0.1, 0.2, 0.3]"


def test_an_interrupted_extraction_resumes_and_gives_the_same_bytes(
    options: ExtractOptions, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(extract, "BATCHES_PER_SHARD", 1)
    whole = replace(options, out=options.out.with_name("whole.safetensors"), tokens=("cls", "patch"))
    extract.extract(whole)
    parted = replace(options, tokens=("cls", "patch"))
    with monkeypatch.context() as patched:
        interrupt_after(patched, 2)
        with pytest.raises(KeyboardInterrupt):
            extract.extract(parted)
    assert not parted.out.exists()
    written = interrupt_after(monkeypatch, 99)
    capsys.readouterr()
    extract.extract(parted)
    assert written() == 2  # of the four
    assert "resuming: 4 images are already done" in capsys.readouterr().err
    assert parted.out.read_bytes() == whole.out.read_bytes()


def test_workers_make_no_difference(options: ExtractOptions) -> None:
    with_workers = replace(options, out=options.out.with_name("workers.safetensors"), num_workers=2)
    for each in (options, with_workers):
        extract.extract(each)
    assert options.out.read_bytes() == with_workers.out.read_bytes()


def test_an_extraction_with_other_settings_is_not_resumed(
    options: ExtractOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extract, "BATCHES_PER_SHARD", 1)
    with monkeypatch.context() as patched:
        interrupt_after(patched, 1)
        with pytest.raises(KeyboardInterrupt):
            extract.extract(options)
    other = replace(options, size=(32, 32))
    with pytest.raises(FileExistsError, match="size was 32x48, now 32x32.*--overwrite"):
        extract.extract(other)
    extract.extract(replace(other, overwrite=True))
    assert no_others(options)


def test_other_weights_are_other_settings(
    options: ExtractOptions, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    monkeypatch.setattr(extract, "BATCHES_PER_SHARD", 1)
    options = replace(options, model=ModelChoice(str(run)))
    save_run(run, seed=1)
    with monkeypatch.context() as patched:
        interrupt_after(patched, 1)
        with pytest.raises(KeyboardInterrupt):
            extract.extract(options)
    save_run(run, seed=2)
    with pytest.raises(FileExistsError, match="weights was"):
        extract.extract(options)


@pytest.fixture
def with_bad_image(options: ExtractOptions, tmp_path: Path) -> ExtractOptions:
    directory = tmp_path / "images"
    directory.mkdir()
    make_images(directory)
    (directory / "a" / "0.png").write_bytes(b"no image")
    (directory / "a" / "2.png").write_bytes((directory / "a" / "2.png").read_bytes()[:200])
    return replace(options, images=directory, out=directory.parent / "features" / "out.safetensors")


def test_bad_images_are_skipped_and_listed(with_bad_image: ExtractOptions, capsys: pytest.CaptureFixture[str]) -> None:
    with_bad_image.out.parent.mkdir()
    names, features = extract.extract(with_bad_image)
    assert names == ["a/4.png", "a/6.png", "b/1.png", "b/3.png", "b/5.png"] and len(features["cls"]) == 5
    report = capsys.readouterr().err
    assert "2 of 7 images\n  a/0.png\n  a/2.png" in report and "cannot identify image file" in report
    assert load_file(with_bad_image.out)["skipped"].numpy().tobytes() == b"a/0.png\0a/2.png\0"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_bad_images_can_stop_it(with_bad_image: ExtractOptions, num_workers: int) -> None:
    with_bad_image.out.parent.mkdir()
    with pytest.raises(BadImageError, match=r"^ImageFolder: cannot read image 0, .*0\.png"):
        extract.extract(replace(with_bad_image, on_bad_image="raise", num_workers=num_workers))
    assert not with_bad_image.out.exists()


def test_a_folder_of_only_bad_images_is_an_error(options: ExtractOptions, tmp_path: Path) -> None:
    directory = tmp_path / "bad"
    directory.mkdir()
    (directory / "x.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 1 images in .*bad can be read"):
        extract.extract(replace(options, images=directory))
    assert not options.out.exists()


@pytest.mark.parametrize(
    ("prepare", "error", "message"),
    [
        (lambda path: None, FileNotFoundError, "--images .*: there is no such directory"),
        (lambda path: path.write_text(""), FileNotFoundError, "--images .*: it is a file"),
        (lambda path: path.mkdir(), FileNotFoundError, "no images in .*: looked for files ending in jpg"),
    ],
)
def test_a_folder_without_images(
    options: ExtractOptions, tmp_path: Path, prepare: Callable[[Path], Any], error: type[Exception], message: str
) -> None:
    prepare(tmp_path / "folder")
    with pytest.raises(error, match=message):
        extract.extract(replace(options, images=tmp_path / "folder"))


def test_an_unreadable_folder(options: ExtractOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="cannot read the directory .*: permission denied"):
        extract.extract(options)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"size": (32, 8)}, ValueError, "32 x 8 pixels is smaller than a patch: .* at least 16 pixels"),
        ({"tokens": ("cls", "patches")}, ValueError, "--tokens cls,patches: expected some of cls,avg,patch,storage"),
        ({"tokens": ("cls", "cls")}, ValueError, "each once"),
        ({"device": "gpu"}, ValueError, "'gpu' is not a device"),
        ({"model": ModelChoice("dinov3_vit16s")}, ValueError, r"unknown model .*did you mean 'dinov3_vits16'\?"),
        ({"model": ModelChoice("runs/nothing")}, FileNotFoundError, "there is no training run at runs/nothing, nor a"),
        ({"out": Path("features.pth")}, ValueError, r"--out features.pth: .* must end in \.safetensors"),
        ({"model": ModelChoice("dinov3_vits16", "no.pth")}, FileNotFoundError, "no weights at .*no.pth"),
    ],
)
def test_options_that_cannot_be(
    options: ExtractOptions, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        extract.extract(replace(options, **changes))


def test_weights_for_a_training_run_are_refused(options: ExtractOptions) -> None:
    with pytest.raises(ValueError, match="leave out --weights"):
        extract.extract(replace(options, model=replace(options.model, weights="x.pth")))


def test_what_is_there_is_not_overwritten_unasked(options: ExtractOptions) -> None:
    options.out.write_text("mine")
    with pytest.raises(FileExistsError, match="exists already.*--overwrite"):
        extract.extract(options)
    assert options.out.read_text() == "mine"
    extract.extract(replace(options, overwrite=True))
    assert len(read_features(options.out).names) == N_IMAGES


def test_nothing_is_left_under_the_name_of_the_output_if_joining_fails(
    options: ExtractOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> bytes:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(extract, "make_safetensors_header", full)
        with pytest.raises(OSError, match="No space left"):
            extract.extract(options)
    assert [path.name for path in options.out.parent.iterdir()] == ["out.safetensors.parts"]
    extract.extract(options)
    assert no_others(options)


def test_pixels_outside_the_patches_are_noted(options: ExtractOptions, capsys: pytest.CaptureFixture[str]) -> None:
    extract.extract(replace(options, size=(32, 50)))
    assert "the last 0 rows and 2 columns belong to no patch" in capsys.readouterr().err


def test_low_precision_keeps_the_periods_of_positions(run: Path) -> None:
    model: Any = ModelChoice(str(run)).load(dtype=torch.float16)
    assert model.cls_token.dtype == torch.float16
    want: Any = dinov3_from_run(run)
    assert torch.equal(model.rope_embed.periods, want.rope_embed.periods)


def test_low_precision_is_stored_as_such(options: ExtractOptions) -> None:
    exact = extract.extract(options).tensors["cls"]
    low = extract.extract(replace(options, dtype=torch.bfloat16, overwrite=True)).tensors["cls"]
    assert low.dtype == torch.bfloat16
    assert (low.float() - exact).abs().max() < 0.1


class Given(ModelChoice):
    """A choice of a model that is there already."""

    model: nn.Module

    @classmethod
    def of(cls, model: nn.Module) -> Given:
        choice = cls("dinov3_convnext_tiny")
        object.__setattr__(choice, "model", model.eval())
        return choice

    def load(self, *, device: Any = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
        return self.model.to(device, dtype)


def test_a_convnext_has_patches_of_32_pixels(options: ExtractOptions) -> None:
    model = ConvNeXt(depths=[1, 1, 1, 1], dims=[4, 8, 8, 16])
    choice = Given.of(model)
    _, features = extract.extract(
        replace(options, model=choice, size=(64, 96), tokens=("patch", "storage"), batch_size=4)
    )
    assert features["patch"].shape == (N_IMAGES, 2, 3, 16) and features["storage"].shape == (N_IMAGES, 0, 16)


def test_features_that_are_not_finite_are_an_error(options: ExtractOptions) -> None:
    model = ConvNeXt(depths=[1, 1, 1, 1], dims=[4, 8, 8, 16])
    nn.init.constant_(model.norm.bias, float("nan"))
    with pytest.raises(ValueError, match="NaN or infinity"):
        extract.extract(replace(options, model=Given.of(model), size=(64, 96)))


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (None, "LVD1689M"),
        ("LVD1689M", "LVD1689M"),
        ("SAT493M", "SAT493M"),
        ("~/dinov3_vit7b16_pretrain_sat493m-a6675841.pth", "SAT493M"),
        ("renamed-a6675841.pth", "SAT493M"),
        ("mine.pth", "LVD1689M (assumed: the name of the weights does not say)"),
    ],
)
def test_the_normalisation_belongs_to_the_weights(weights: str | None, expected: str) -> None:
    choice = ModelChoice("dinov3_vit7b16", weights)
    name, normalization = find_normalization(choice, nn.Module())
    assert name == expected
    assert normalization.mean == (SAT_DEFAULT_MEAN if expected == "SAT493M" else IMAGENET_DEFAULT_MEAN)
    assert find_normalization(choice, nn.Module(), "sat") == ("SAT493M", (SAT_DEFAULT_MEAN, SAT_DEFAULT_STD))
    assert find_normalization(choice, nn.Module(), "lvd")[0] == "LVD1689M"


@pytest.mark.parametrize("place", ["", "teacher_checkpoint.pth"])
def test_a_run_and_what_lies_in_it_have_the_normalisation_of_their_training(place: str, run: Path) -> None:
    assert find_normalization(ModelChoice(str(run / place)), nn.Module())[0] == "of the training run"


def test_checkpoints_of_backbones_of_any_size_are_models(options: ExtractOptions, run: Path, tmp_path: Path) -> None:
    from dinov3.hub.convert import convert

    _, expected = extract.extract(options)
    expected = {name: tensor.clone() for name, tensor in expected.items()}
    convert(run, tmp_path / "huggingface", to="huggingface")
    choice = ModelChoice(str(tmp_path / "huggingface"))
    assert find_normalization(choice, nn.Module())[0] == "of the configuration beside the weights"
    _, found = extract.extract(replace(options, model=choice, overwrite=True))
    torch.testing.assert_close(found["cls"], expected["cls"], rtol=0, atol=1e-3)  # positions in bfloat16
    torch.save({"state_dict": ModelChoice(str(run)).load().state_dict()}, tmp_path / "mine.pth")
    choice = ModelChoice(str(tmp_path / "mine.pth"))
    assert find_normalization(choice, nn.Module())[0] == "LVD1689M (assumed: the name of the weights does not say)"
    assert len(extract.extract(replace(options, model=choice, overwrite=True)).names) == N_IMAGES


@pytest.mark.parametrize(("norm", "expected"), [(nn.LayerNorm(2), "SAT493M"), (None, "LVD1689M")])
def test_satellite_weights_of_vit_l_are_known_by_their_additional_norm(norm: nn.Module | None, expected: str) -> None:
    model = nn.Module()
    model.local_cls_norm = norm
    assert find_normalization(ModelChoice("dinov3_vitl16", "mine.pth"), model)[0] == expected


def test_the_command_line(
    run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "features.safetensors"
    arguments = f"--model {run} --images {images} --out {out} --tokens cls,patch --size 32x48 --num-workers 0"
    extract.main(arguments.split())
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{out}: cls [7, 192], patch [7, 2, 3, 192]")
    assert "7 images in" in captured.err and "9 (1 class, 2 storage, 2 x 3 patch tokens) of 192" in captured.err
    monkeypatch.delenv("DINOV3_TRACEBACK", raising=False)
    with pytest.raises(SystemExit, match="1"):
        run_command_line(lambda: extract.main(arguments.split()))
    assert capsys.readouterr().err.startswith(f"error: {out} exists already")


@pytest.mark.parametrize(
    ("option", "message"),
    [("--size 0", "expected a side"), ("--dtype int8", "expected one of bfloat16"), ("--batch-size 0", "at least 1")],
)
def test_invalid_values(option: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        extract.main(f"--model dinov3_vits16 --images x --out y {option}".split())
    assert message in capsys.readouterr().err


def test_files_without_features_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": Tensor([1])}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="does not hold features of images"):
        read_features(tmp_path / "x.safetensors")


def test_images_are_read_as_they_are_seen(options: ExtractOptions, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 48), dtype=np.uint8)
    lying = Image.fromarray(np.rot90(pixels)).convert("RGB")
    lying.getexif()[0x0112] = 6
    (tmp_path / "photos").mkdir()
    Image.fromarray(pixels).save(tmp_path / "photos" / "8.png")
    Image.fromarray(pixels.astype(np.uint16) * 257).save(tmp_path / "photos" / "16.png")
    Image.fromarray(pixels.astype(np.float32) / 255).save(tmp_path / "photos" / "32.tif")
    lying.save(tmp_path / "photos" / "lying.png", exif=lying.getexif())
    features = extract.extract(replace(options, images=tmp_path / "photos", batch_size=1)).tensors["cls"]
    assert len(features) == 4 and all(torch.equal(row, features[0]) for row in features)


def test_images_above_the_limit_are_skipped(options: ExtractOptions, capsys: pytest.CaptureFixture[str]) -> None:
    features = extract.extract(replace(options, max_image_pixels=43 * 50))
    assert len(features.names) == 4 and "more than the limit of 2150" in capsys.readouterr().err
