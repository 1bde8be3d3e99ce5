"""The predict commands: from trained heads and folders of images to arrays and pictures."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinov3.eval.depth import predict as depth_predict
from dinov3.eval.depth import run as depth_run
from dinov3.eval.segmentation import predict as segmentation_predict
from dinov3.eval.segmentation import run as segmentation_run
from tests.eval.dense import scenes
from tests.eval.depth.test_run import arguments as depth_arguments
from tests.eval.segmentation.test_run import FOLDER
from tests.eval.segmentation.test_run import arguments as segmentation_arguments

SIZE = (70, 50)  # (width, height), no multiples of a patch


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output directories of a depth and of a segmentation training."""
    root = tmp_path_factory.mktemp("heads")
    scenes.write_backbone(root / "backbone.yaml")
    scenes.write_nyu(root)
    scenes.write_segmentation_folder(root / "folder")
    depth_run.main(depth_arguments(root, root / "depth"))
    folder = f"datasets.root={root / 'folder'}"
    segmentation_run.main(segmentation_arguments(root, root / "segmentation", folder, *FOLDER))
    return root


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "photos" / "below").mkdir(parents=True)
    for name in ("one.png", "below/two.jpg"):
        scenes.scene(7)[0].resize(SIZE).save(tmp_path / "photos" / name)
    return tmp_path / "photos"


def test_depth_has_the_size_of_its_image(heads: Path, photos: Path, tmp_path: Path) -> None:
    depth_predict.main(["--images", str(photos), "--weights", str(heads / "depth"), "--out", str(tmp_path / "out")])
    for name in ("one", "below/two"):
        depth = np.load(tmp_path / "out" / f"{name}_depth.npy")
        assert depth.dtype == np.float32 and depth.shape == SIZE[::-1]
        assert np.isfinite(depth).all() and depth.min() > 0
        assert Image.open(tmp_path / "out" / f"{name}_depth.png").mode == "RGB"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["below", "one_depth.npy", "one_depth.png"]


def test_classes_are_indices_of_the_folder(heads: Path, photos: Path, tmp_path: Path) -> None:
    weights = ["--weights", str(heads / "segmentation" / "model_final.pth")]
    segmentation_predict.main(["--images", str(photos / "one.png"), *weights, "--out", str(tmp_path / "out")])
    labels = np.asarray(Image.open(tmp_path / "out" / "one_labels.png"))
    assert labels.shape == SIZE[::-1] and set(np.unique(labels)) <= {0, 1}
    assert (tmp_path / "out" / "one_segmentation.png").is_file()


def test_predictions_are_those_of_the_evaluation(heads: Path, tmp_path: Path) -> None:
    config = f"load_from={heads / 'segmentation' / 'best.pth'}"
    folder = f"datasets.root={heads / 'folder'}"
    segmentation_run.main(segmentation_arguments(heads, tmp_path, folder, *FOLDER, config, "save_predictions=true"))
    images = str(heads / "folder" / "images" / "val" / "100.png")
    weights = str(heads / "segmentation" / "best.pth")
    segmentation_predict.main(["--images", images, "--weights", weights, "--out", str(tmp_path / "out")])
    saved, predicted = (tmp_path / "predictions" / "000000.png", tmp_path / "out" / "100_labels.png")
    assert np.array_equal(np.asarray(Image.open(saved)), np.asarray(Image.open(predicted)))


def test_a_stopped_command_continues(
    heads: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--images", str(photos), "--weights", str(heads / "depth"), "--out", str(tmp_path / "out")]
    depth_predict.main(given)
    (tmp_path / "out" / "one_depth.png").unlink()
    before = (tmp_path / "out" / "below" / "two_depth.npy").stat().st_mtime_ns
    depth_predict.main(given)
    assert (tmp_path / "out" / "one_depth.png").is_file()
    assert (tmp_path / "out" / "below" / "two_depth.npy").stat().st_mtime_ns == before
    assert "1 of 2 images have predictions" in capsys.readouterr().out
    depth_predict.main([*given, "--overwrite"])
    assert (tmp_path / "out" / "below" / "two_depth.npy").stat().st_mtime_ns > before


def test_unreadable_images_are_skipped_or_end_the_command(
    heads: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "broken.jpg").write_bytes((photos / "one.png").read_bytes()[:60])
    given = ["--images", str(photos), "--weights", str(heads / "depth"), "--out", str(tmp_path / "out")]
    depth_predict.main(given)
    assert "broken.jpg cannot be read as an image" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("broken*"))
    with pytest.raises(ValueError, match=r"broken\.jpg cannot be read"):
        depth_predict.main([*given, "--on-bad-image", "raise"])


def test_images_of_one_stem_keep_their_endings(heads: Path, photos: Path, tmp_path: Path) -> None:
    shutil.copy(photos / "below" / "two.jpg", photos / "one.jpg")
    depth_predict.main(["--images", str(photos), "--weights", str(heads / "depth"), "--out", str(tmp_path / "out")])
    assert {path.name for path in (tmp_path / "out").glob("*.npy")} == {"one.jpg_depth.npy", "one.png_depth.npy"}


def test_what_is_missing_is_named(heads: Path, photos: Path, tmp_path: Path) -> None:
    images, out = ["--images", str(photos)], ["--out", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="give --weights of a trained head, or --model"):
        depth_predict.main([*images, *out])
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth: there is no such file"):
        depth_predict.main([*images, *out, "--weights", str(tmp_path / "nowhere.pth")])
    with pytest.raises(FileNotFoundError, match=r"there is no model_final\.pth or best\.pth"):
        depth_predict.main([*images, *out, "--weights", str(photos)])
    torch.save({}, tmp_path / "alone.pth")
    with pytest.raises(FileNotFoundError, match=r"no segmentation_config\.yaml beside it"):
        segmentation_predict.main([*images, *out, "--weights", str(tmp_path / "alone.pth")])
    with pytest.raises(FileNotFoundError, match="nothing: there is no such file or directory"):
        depth_predict.main(["--images", str(tmp_path / "nothing"), *out, "--weights", str(heads / "depth")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty: there are no images in it"):
        depth_predict.main(["--images", str(tmp_path / "empty"), *out, "--weights", str(heads / "depth")])
    with pytest.raises(ValueError, match=r"--range 5.0 2.0: expected"):
        depth_predict.main([*images, *out, "--weights", str(heads / "depth"), "--range", "5", "2"])
    assert not (tmp_path / "out").exists()


def test_what_pillow_calls_an_attack_is_a_bad_image(
    heads: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--images", str(photos), "--weights", str(heads / "depth"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="none of 2 images can be read"):
        depth_predict.main([*given, "--max-image-pixels", "200"])
    assert "one.png cannot be read as an image" in (printed := capsys.readouterr().err)
    assert "--max-image-pixels N" in printed


def test_images_are_predicted_as_they_are_seen(heads: Path, photos: Path, tmp_path: Path) -> None:
    picture = Image.open(photos / "one.png")
    lying = picture.transpose(Image.Transpose.ROTATE_90)
    lying.getexif()[0x0112] = 6
    lying.save(photos / "lying.png", exif=lying.getexif())
    given = ["--images", str(photos), "--weights", str(heads / "depth"), "--out", str(tmp_path / "out")]
    depth_predict.main(given)
    one, lying_one = (np.load(tmp_path / "out" / f"{name}_depth.npy") for name in ("one", "lying"))
    assert np.array_equal(one, lying_one)
