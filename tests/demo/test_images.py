"""The images of the demo: packaged and the user's own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov3.data.datasets import BadImageError, ImageFolder
from dinov3.demo import images as demo_images
from dinov3.demo import packaged
from dinov3.demo.images import TILE_SIDE, cut_tiles, held_out, prepare_images


@pytest.fixture(scope="module")
def packaged_tree(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_images, "TILES_PER_PHOTO", 2)
        yield prepare_images(tmp_path_factory.mktemp("demo") / "images")[0]


@pytest.fixture
def few_tiles(monkeypatch):
    monkeypatch.setattr(demo_images, "USER_MIN_TRAIN_IMAGES", 12)


def write_folder(root: Path, files: list[str], size: tuple[int, int] = (60, 40)) -> Path:
    rng = np.random.default_rng(0)
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    return root


def pixels_of(directory: Path) -> set[bytes]:
    return {Image.open(path).tobytes() for path in directory.rglob("*.png")}


class TestPackaged:
    def test_every_digit_and_face_is_in_exactly_one_split(self, packaged_tree):
        for task, total in (("digits", 1797), ("faces", 200)):
            train = pixels_of(packaged_tree.root / "train" / task)
            test = pixels_of(packaged_tree.root / "test" / task)
            assert not train & test
            assert sum(packaged_tree.task_sizes[task]) == total == len(train | test)

    def test_classes_are_in_both_splits_in_like_shares(self, packaged_tree):
        train, test = (ImageFolder(root=str(packaged_tree.root / split / "digits")) for split in ("train", "test"))
        assert train.classes == test.classes == [str(digit) for digit in range(10)]
        shares = np.bincount(test.get_targets()) / (np.bincount(train.get_targets()) + np.bincount(test.get_targets()))
        assert shares == pytest.approx(0.28, abs=0.01)

    def test_digits_lie_in_the_folder_of_their_label(self, packaged_tree):
        digits, labels = packaged.load_digits()
        for index in (0, 7, 1000):
            (path,) = packaged_tree.root.glob(f"*/digits/*/{index:04d}.png")
            assert path.parent.name == str(labels[index])
            small = Image.open(path).resize((8, 8), Image.Resampling.BOX)
            correlation = np.corrcoef(np.asarray(small).ravel(), np.asarray(digits[index]).ravel())[0, 1]
            assert correlation > 0.95

    def test_faces_are_faces(self, packaged_tree):
        faces, labels = packaged.load_faces()
        shared = {}
        for label in (0, 1):
            rows = np.array([np.asarray(faces[i], dtype=float).ravel() for i in np.flatnonzero(labels == label)])
            shared[label] = rows.mean(0).var() / rows.var(1).mean()
        # Faces are aligned, so that their mean keeps more of what is in each than that of other things does.
        assert shared[1] > 1.4 * shared[0]

    def test_held_out_photos_have_no_tiles(self, packaged_tree):
        held_out_photos = {photo.name for photo in packaged_tree.photos if photo.is_held_out}
        trained_on = {path.name for path in (packaged_tree.root / "train" / "photos").iterdir()}
        assert held_out_photos and not held_out_photos & trained_on
        assert {photo.name for photo in packaged_tree.photos} - held_out_photos <= trained_on

    def test_all_training_images_are_one_folder_dataset(self, packaged_tree):
        assert len(ImageFolder(root=str(packaged_tree.root / "train"), labels="none")) == packaged_tree.n_train

    def test_credits_name_every_photo(self, packaged_tree):
        lines = (packaged_tree.root / "CREDITS.txt").read_text().splitlines()
        assert len(lines) == len(packaged.find_photos()) and all(": " in line for line in lines)

    def test_a_missing_package_is_named_with_the_command(self, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ModuleNotFoundError, match=r'skimage.*pip install "dinov3\[demo\]"'):
            packaged.find_photos()


@pytest.mark.usefixtures("few_tiles")
class TestUsersFolder:
    def test_class_folders_become_a_task_with_held_out_images(self, tmp_path):
        files = [f"{name}/{i}.png" for name in ("cat", "dog") for i in range(4)]
        folder = write_folder(tmp_path / "mine", files)
        images, was_there = prepare_images(tmp_path / "out", folder)
        assert not was_there and images.tasks == ["labelled"] and images.task_sizes == {"labelled": (6, 2)}
        test = ImageFolder(root=str(images.root / "test" / "labelled"))
        assert test.classes == ["cat", "dog"] and len(test) == 2
        assert all(photo.is_held_out for photo in images.photos) and len(images.photos) == 2

    def test_few_images_are_joined_by_tiles_of_those_that_are_trained_on(self, tmp_path):
        files = [f"{name}/{i}.png" for name in ("cat", "dog") for i in range(4)]
        images, _ = prepare_images(tmp_path / "out", write_folder(tmp_path / "mine", files))
        assert images.n_train >= demo_images.USER_MIN_TRAIN_IMAGES
        assert len(list((images.root / "train" / "tiles").iterdir())) == 6

    def test_without_class_folders_there_is_no_task(self, tmp_path):
        images, _ = prepare_images(tmp_path / "out", write_folder(tmp_path / "mine", ["a.png", "b.jpg", "trip/c.png"]))
        assert images.tasks == [] and not (images.root / "test").exists()
        assert [photo.name for photo in images.photos] == ["a.png", "b.jpg", "c.png"]

    def test_exif_rotation_is_respected(self, tmp_path):
        (tmp_path / "mine").mkdir()
        exif = Image.Exif()
        exif[0x0112] = 6  # to be shown turned by 90 degrees
        Image.new("RGB", (60, 40)).save(tmp_path / "mine" / "a.jpg", exif=exif)
        images, _ = prepare_images(tmp_path / "out", tmp_path / "mine")
        assert Image.open(images.root / images.photos[0].file).size == (40, 60)

    def test_a_missing_folder_is_an_error_that_names_it(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no_such.*not a directory"):
            prepare_images(tmp_path / "out", tmp_path / "no_such")

    def test_a_folder_without_images_is_an_error(self, tmp_path):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "notes.txt").write_text("nothing to see")
        with pytest.raises(FileNotFoundError, match="no images in"):
            prepare_images(tmp_path / "out", tmp_path / "mine")
        assert not (tmp_path / "out").exists()

    def test_a_broken_image_is_named_and_leaves_no_half_tree(self, tmp_path):
        folder = write_folder(tmp_path / "mine", ["a.png"])
        (folder / "b.png").write_bytes(b"not a png")
        with pytest.raises(BadImageError, match=r"b\.png.*repair or remove"):
            prepare_images(tmp_path / "out", folder)
        assert [path.name for path in tmp_path.iterdir()] == ["mine"]

    def test_a_class_of_one_image_is_an_error(self, tmp_path):
        folder = write_folder(tmp_path / "mine", ["cat/0.png", "cat/1.png", "dog/0.png"])
        with pytest.raises(ValueError, match="'dog' has 1 image"):
            prepare_images(tmp_path / "out", folder)


@pytest.mark.usefixtures("few_tiles")
class TestUsingAgain:
    def test_an_unchanged_folder_is_not_written_again(self, tmp_path):
        folder = write_folder(tmp_path / "mine", ["a.png", "b.png"])
        first, _ = prepare_images(tmp_path / "out", folder)
        second, was_there = prepare_images(tmp_path / "out", folder)
        assert was_there and second == first

    def test_a_changed_folder_is_written_again(self, tmp_path):
        folder = write_folder(tmp_path / "mine", ["a.png", "b.png"])
        prepare_images(tmp_path / "out", folder)
        write_folder(folder, ["c.png"])
        images, was_there = prepare_images(tmp_path / "out", folder)
        assert not was_there and len(images.photos) == 3

    def test_a_damaged_manifest_is_written_again(self, tmp_path):
        folder = write_folder(tmp_path / "mine", ["a.png"])
        first, _ = prepare_images(tmp_path / "out", folder)
        (tmp_path / "out" / "manifest.json").write_text("{")
        second, was_there = prepare_images(tmp_path / "out", folder)
        assert not was_there and second == first

    def test_foreign_files_are_never_deleted(self, tmp_path):
        folder = write_folder(tmp_path / "mine", ["a.png"])
        other = write_folder(tmp_path / "other", ["b.png"])
        with pytest.raises(ValueError, match="did not write"):
            prepare_images(other, folder)
        assert (other / "b.png").is_file()

    def test_the_tree_may_not_lie_among_the_users_images(self, tmp_path):
        folder = write_folder(tmp_path / "mine", ["a.png"])
        with pytest.raises(ValueError, match="lies inside of --images"):
            prepare_images(folder / "outputs" / "images", folder)
        assert [path.name for path in folder.iterdir()] == ["a.png"]

    def test_the_manifest_is_plain_json(self, tmp_path):
        prepare_images(tmp_path / "out", write_folder(tmp_path / "mine", ["a.png"]))
        assert json.loads((tmp_path / "out" / "manifest.json").read_text())["tasks"] == []


class TestTiles:
    def test_tiles_have_one_size_and_lie_inside_the_image(self):
        # Outside of an image, resizing would raise.
        for size in ((300, 200), (200, 300), (20, 20)):
            tiles = cut_tiles(Image.new("RGB", size), 30, np.random.default_rng(0))
            assert len(tiles) == 30 and {tile.size for tile in tiles} == {(TILE_SIDE, TILE_SIDE)}

    def test_tiles_differ_in_scale(self):
        ramp = Image.fromarray(np.tile(np.linspace(0, 255, 400, dtype=np.uint8), (300, 1)))
        spans = [np.ptp(np.asarray(tile).astype(int)) for tile in cut_tiles(ramp, 40, np.random.default_rng(0))]
        assert max(spans) > 2.5 * min(spans)


@pytest.mark.parametrize("share, expected", [(0.25, 2), (0.0, 1), (1.0, 7)])
def test_held_out_takes_at_least_one_and_not_all_of_each_class(share, expected):
    labels = np.repeat([0, 5], 8)
    chosen = held_out(labels, share)
    assert [chosen[labels == label].sum() for label in (0, 5)] == [expected, expected]
