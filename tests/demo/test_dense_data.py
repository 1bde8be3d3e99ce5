"""The two small dense data sets: real depths and honest masks, cut into parts that share no pixel."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov3.data import make_dataset
from dinov3.data.datasets import DepthFolder, SegmentationFolder
from dinov3.demo import dense_data
from dinov3.demo.dense_data import CLASSES, DenseData, disparity_to_metres, main, write_dense_data


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DenseData:
    return write_dense_data(tmp_path_factory.mktemp("dense"))


def open_all(data: DenseData, task: str, split: str):
    dataset = make_dataset(dataset_str=data.dataset(task, split))
    return dataset, [dataset[index] for index in range(len(dataset))]


def covered(root: Path, split: str, picture: str) -> set[tuple[int, int]]:
    """The pixels (x, y) of a picture that a split holds."""
    pixels = set()
    for path in (root / "images" / split).glob(f"{picture}_*.png"):
        left, top = map(int, re.findall(r"_[xy](\d+)", path.stem))
        width, height = Image.open(path).size
        pixels |= {(x, y) for x in range(left, left + width) for y in range(top, top + height)}
    return pixels


def files_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


class TestDepth:
    def test_both_splits_open_and_every_sample_reads(self, data):
        for split, count in (("train", 12), ("val", 2)):
            dataset, samples = open_all(data, "depth", split)
            assert isinstance(dataset, DepthFolder) and len(samples) == count
            assert {image.size for image, _ in samples} == {(240, 240)}

    def test_depths_are_those_of_a_garage(self, data):
        for split in ("train", "val"):
            for _, depth in open_all(data, "depth", split)[1]:
                known = depth[depth > 0]
                assert known.min() > 2.0 and known.max() < 5.1
                assert 0.8 < len(known) / depth.size < 1  # the benchmark has gaps in every part of it

    def test_depths_follow_from_disparities_by_the_published_calibration(self):
        # For 40 pixels: 994.978 * 193.001 / (40 + 31.086) mm.
        disparity = np.array([[40.0, 8.0], [np.inf, np.nan]], np.float32)
        np.testing.assert_allclose(disparity_to_metres(disparity), [[2.701400, 4.913057], [0, 0]], rtol=1e-6)

    def test_maps_lie_on_their_images(self, data):
        source = Path(dense_data._find_files()["motorcycle_disp.npz"])
        with np.load(source) as archive:
            metres = disparity_to_metres(archive["arr_0"])
        photo = np.asarray(Image.open(source.with_name("motorcycle_left.png")).convert("RGB"))
        dataset = DepthFolder(root=str(data.depth), split="val")
        image, depth = dataset[1]
        assert dataset.get_image_relpath(1) == "images/val/motorcycle_x501_y260.png"
        assert np.array_equal(image, photo[260:500, 501:741])
        np.testing.assert_allclose(depth, metres[260:500, 501:741], atol=0.00051)

    def test_no_pixel_is_in_both_splits(self, data):
        train, val = (covered(data.depth, split, "motorcycle") for split in ("train", "val"))
        assert train and val and not train & val


class TestSegmentation:
    def test_both_splits_have_every_class(self, data):
        for split, count in (("train", 9), ("val", 6)):
            dataset, samples = open_all(data, "segmentation", split)
            assert isinstance(dataset, SegmentationFolder) and len(samples) == count
            assert dataset.class_names == list(CLASSES)
            assert {index for _, label in samples for index in np.unique(label).tolist()} == {0, 1, 2, 3}

    def test_each_picture_has_its_own_class_and_background(self, data):
        own = {"coins": "coin", "tissue": "stained tissue", "horse": "horse"}
        for split in ("train", "val"):
            dataset, samples = open_all(data, "segmentation", split)
            for index, (_, label) in enumerate(samples):
                picture = Path(dataset.get_image_relpath(index)).name.partition("_")[0]
                share = (np.asarray(label) == CLASSES.index(own[picture])).mean()
                assert 0.05 < share < 0.95
                assert set(np.unique(label).tolist()) == {0, CLASSES.index(own[picture])}

    @pytest.mark.parametrize("picture", ["coins", "tissue", "horse"])
    def test_no_pixel_is_in_both_splits(self, picture, data):
        train, val = (covered(data.segmentation, split, picture) for split in ("train", "val"))
        assert train and val and not train & val

    def test_every_coin_is_found_whole(self):
        from skimage.measure import label, regionprops

        gray = np.asarray(Image.open(dense_data._find_files()["coins.png"]).convert("L"))
        coins = regionprops(label(dense_data._find_coins(gray)))
        assert len(coins) == 24  # as many as the picture shows
        assert all(coin.solidity > 0.93 and coin.euler_number == 1 for coin in coins)

    def test_stained_tissue_is_browner_than_the_rest(self, data):
        for image, label in open_all(data, "segmentation", "val")[1]:
            pixels, is_tissue = np.asarray(image, dtype=float), np.asarray(label) == CLASSES.index("stained tissue")
            if is_tissue.any():
                redness = pixels[..., 0] - pixels[..., 2]
                assert redness[is_tissue].mean() > redness[~is_tissue].mean() + 50

    def test_the_horse_is_dark(self, data):
        for image, label in open_all(data, "segmentation", "train")[1]:
            is_horse = np.asarray(label) == CLASSES.index("horse")
            if is_horse.any():
                assert np.array_equal(is_horse, np.asarray(image.convert("L")) < 128)


class TestWriting:
    def test_it_is_the_same_each_time(self, data, tmp_path):
        again = write_dense_data(tmp_path / "out")
        assert files_of(again.depth.parent) == files_of(data.depth.parent)

    def test_what_is_there_is_left_alone_and_other_files_too(self, data, capsys):
        root = data.depth.parent
        (root / "run.txt").write_text("mine")
        before = {path: path.stat().st_mtime_ns for path in (data.depth / "images/val").iterdir()}
        write_dense_data(root)
        assert {path: path.stat().st_mtime_ns for path in (data.depth / "images/val").iterdir()} == before
        assert f"{data.depth} is there already" in capsys.readouterr().out and (root / "run.txt").is_file()
        (root / "run.txt").unlink()

    def test_a_tree_of_an_older_format_is_written_again(self, tmp_path, monkeypatch):
        monkeypatch.setattr(dense_data, "FORMAT", 0)
        data = write_dense_data(tmp_path)
        (data.depth / "images/val/motorcycle_x501_y000.png").unlink()
        monkeypatch.undo()
        assert len(DepthFolder(root=str(write_dense_data(tmp_path).depth), split="val")) == 2

    def test_foreign_files_are_never_deleted(self, tmp_path):
        (tmp_path / "segmentation").mkdir()
        (tmp_path / "segmentation" / "mine.txt").write_text("mine")
        with pytest.raises(ValueError, match=rf"{tmp_path}/segmentation holds files that this program did not write"):
            write_dense_data(tmp_path)
        assert (tmp_path / "segmentation" / "mine.txt").is_file()

    def test_nothing_half_written_stays(self, tmp_path, monkeypatch):
        def fail(self, path):
            raise OSError("disk full")

        monkeypatch.setattr(Image.Image, "save", fail)
        with pytest.raises(OSError, match="disk full"):
            write_dense_data(tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_the_readme_has_sources_licences_and_rules(self, data):
        text = (data.depth.parent / "README.txt").read_text()
        for word in ("Middlebury", "994.978 pixels", "193.001 mm", "states no licence", "CC0", "watershed", "Otsu"):
            assert word in text
        assert max(map(len, text.splitlines())) <= 120

    def test_a_missing_package_is_named_with_the_command(self, monkeypatch, tmp_path):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ModuleNotFoundError, match=r'skimage.*not installed: .*pip install "dinov3\[demo\]"'):
            write_dense_data(tmp_path)

    def test_a_missing_picture_is_named(self, monkeypatch, tmp_path):
        monkeypatch.setattr(dense_data, "FILES", (*dense_data.FILES, "zebra.png"))
        with pytest.raises(FileNotFoundError, match=r"skimage/data lacks zebra\.png: another version"):
            write_dense_data(tmp_path)

    def test_the_command_prints_strings_that_name_what_it_wrote(self, data, capsys):
        main([str(data.depth.parent)])
        output = capsys.readouterr().out
        for task in ("depth", "segmentation"):
            for split in ("train", "val"):
                assert data.dataset(task, split) in output
        assert str(data.depth.parent / "README.txt") in output
