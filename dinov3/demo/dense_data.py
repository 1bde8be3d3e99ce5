"""Two small real data sets with a target per pixel, made from pictures inside scikit-image. Nothing is downloaded.

    python -m dinov3.demo.dense_data OUT

    OUT/depth/{images,depth}/{train,val}/...             a DepthFolder: a motorcycle in a garage, metres from stereo
    OUT/segmentation/{images,labels}/{train,val}/...     a SegmentationFolder: coins, stained tissue, a horse
    OUT/README.txt                                       what it is, who made it, and by which rule the masks came about

Training and validation are different parts of the same pictures: no pixel is in both, yet they look alike. What is
measured on them says that a pipeline works, not how good a model is.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from dinov3.demo.trees import fingerprint, package_directory, write_tree
from dinov3.utils.command_line import ArgumentParser, run_command_line
from dinov3.utils.files import atomic_write

FORMAT = 1  # of the trees; with another number every tree is written again
SPLITS = ("train", "val")

FILES = ("motorcycle_left.png", "motorcycle_disp.npz", "coins.png", "ihc.png", "horse.png")  # of skimage/data
CLASSES = ("background", "coin", "stained tissue", "horse")

MIN_COIN = 100  # pixels

# The published calibration of the scene, for images of a quarter of the size, as scikit-image documents it.
FOCAL_LENGTH = 994.978  # pixels
BASELINE = 193.001  # mm
DISPARITY_OFFSET = 31.086  # pixels between the principal points of the two cameras

README = f"""\
Two small data sets for trying out dense prediction, written by `python -m dinov3.demo.dense_data`. All pictures lie
inside the Python package scikit-image; sources and licences are those that its documentation states.

Training and validation are different parts of the same pictures. No pixel is in both, but they were taken with one
camera in one light: numbers measured here say that a pipeline works, not how good a model is. Pieces of the training
parts overlap one another, those for validation do not.

depth/, a DepthFolder
    The left image of the "Motorcycle" stereo pair of the Middlebury 2014 benchmark (Scharstein et al., High-resolution
    stereo datasets with subpixel-accurate ground truth, GCPR 2014; https://vision.middlebury.edu/stereo/data/), in a
    quarter of its size. scikit-image states no licence for it.
    Depth = focal length x baseline / (disparity + offset), with the published calibration: {FOCAL_LENGTH} pixels,
    {BASELINE} mm, {DISPARITY_OFFSET} pixels. PNG of 16 bits in millimetres; 0 where the benchmark has no disparity.
    Training: columns 0 to 479. Validation: columns 501 to 740.

segmentation/, a SegmentationFolder with the classes {", ".join(CLASSES)}
    No mask was drawn by hand; each follows from its picture by a rule.
    coins.png (Greek coins from Pompeii, Brooklyn Museum; no known copyright restrictions): watershed of the Sobel
        gradient, from pixels darker than 30 (background) and brighter than 150 (coin); holes are filled, parts of
        fewer than {MIN_COIN} pixels left out.
        Training: the upper two rows of coins. Validation: the lower two.
    ihc.png (colonic glands, Center for Microscopy And Molecular Imaging; no known copyright restrictions): the
        brown stain (DAB, by colour deconvolution), smoothed by a Gaussian of 2 pixels, over Otsu's threshold.
        Training: the left half. Validation: the right half.
    horse.png (silhouette by Andreas Preuss, CC0): pixels darker than half of white.
        Training: the left half. Validation: the right half.
"""


@dataclass(frozen=True)
class DenseData:
    """Where the data sets lie.

    Attributes:
        depth: root of the DepthFolder.
        segmentation: root of the SegmentationFolder.
    """

    depth: Path
    segmentation: Path

    def dataset(self, task: str, split: str) -> str:
        """Return the dataset string of a task (`depth` or `segmentation`) and a split (`train` or `val`)."""
        return f"{task.capitalize()}Folder:root={getattr(self, task)}:split={split}"


@dataclass(frozen=True)
class _Picture:
    name: str
    image: np.ndarray  # uint8 [H, W, 3]
    target: np.ndarray  # [H, W]
    boxes: dict[str, list[tuple[slice, slice]]]  # rows and columns of each piece, by split


def write_dense_data(output_dir: Path) -> DenseData:
    """Write both data sets, unless they are there already.

    Args:
        output_dir: the directory for `depth`, `segmentation` and `README.txt`; other files in it stay as they are.

    Returns:
        Where they lie.

    Raises:
        ModuleNotFoundError: scikit-image is not installed.
        FileNotFoundError: this version of scikit-image lacks one of the pictures.
        ValueError: `depth` or `segmentation` exists, but holds something else.
    """
    output_dir = output_dir.expanduser()
    files = _find_files()
    data = DenseData(output_dir / "depth", output_dir / "segmentation")
    made_of = fingerprint([str(FORMAT), *(f"{name}:{files[name].stat().st_size}" for name in sorted(files))])

    def write_depth(root: Path) -> dict[str, Any]:
        return _write_pieces(root, "depth", _make_depth(files), progress="depth")

    def write_segmentation(root: Path) -> dict[str, Any]:
        (root / "classes.txt").write_text("\n".join(CLASSES) + "\n", encoding="utf-8")
        return _write_pieces(root, "labels", _make_segmentation(files), progress="segmentation")

    for root, write in ((data.depth, write_depth), (data.segmentation, write_segmentation)):
        _, was_there = write_tree(root, made_of, write)
        if was_there:
            print(f"{root} is there already")
    with atomic_write(output_dir / "README.txt", "w") as file:
        file.write(README)
    return data


def disparity_to_metres(disparity: np.ndarray) -> np.ndarray:
    """Compute the depth of the stereo scene.

    Args:
        disparity: pixels [H, W]; NaN or infinite where there is none.

    Returns:
        Metres, float64 [H, W], 0 where there is no disparity.
    """
    is_known = np.isfinite(disparity)
    offset = np.where(is_known, disparity, 0).astype(np.float64) + DISPARITY_OFFSET
    return np.where(is_known, FOCAL_LENGTH * BASELINE / offset / 1000, 0)


def main(argv: list[str] | None = None) -> None:
    """Write both data sets from the command line; None takes the arguments of the program."""
    parser = ArgumentParser(
        prog="python -m dinov3.demo.dense_data",
        description="Write two small real data sets with a target per pixel, depth and segmentation, made from "
        "pictures inside the package scikit-image. Nothing is downloaded; data that is there already is left as it is.",
    )
    parser.add_argument("output_dir", type=Path, metavar="OUT", help="the directory to write, e.g. data/dense")
    data = write_dense_data(parser.parse_args(sys.argv[1:] if argv is None else argv).output_dir)
    print(f"sources, licences and rules: {data.depth.parent / 'README.txt'}")
    for task in ("depth", "segmentation"):
        for split in SPLITS:
            n_images = len(list((getattr(data, task) / "images" / split).iterdir()))
            print(f"{n_images:>3} images  {data.dataset(task, split)}")


def _find_files() -> dict[str, Path]:
    directory = package_directory("skimage") / "data"
    # Looked up on the disk, because skimage.data would download missing files.
    files = {name: directory / name for name in FILES}
    missing = [name for name, path in files.items() if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{directory} lacks {', '.join(missing)}: another version of scikit-image, e.g. 0.26, has them"
        )
    return files


def _write_pieces(root: Path, targets: str, pictures: list[_Picture], *, progress: str) -> dict[str, Any]:
    pieces = [
        (split, picture, rows, columns)
        for picture in pictures
        for split in SPLITS
        for rows, columns in picture.boxes[split]
    ]
    for split, picture, rows, columns in tqdm(pieces, desc=progress, unit="image"):
        for folder, array in (("images", picture.image), (targets, picture.target)):
            path = root / folder / split / f"{picture.name}_x{columns.start:03d}_y{rows.start:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array[rows, columns]).save(path)
    return {"pictures": [picture.name for picture in pictures]}


def _spread_boxes(
    left: int, top: int, right: int, bottom: int, *, size: tuple[int, int], columns: int, rows: int
) -> list[tuple[slice, slice]]:
    # Pieces of one size (width, height), spread evenly over a part of a picture.
    width, height = size
    lefts = np.linspace(left, right - width, columns).round().astype(int)
    tops = np.linspace(top, bottom - height, rows).round().astype(int)
    return [(slice(y, y + height), slice(x, x + width)) for y in tops for x in lefts]


def _make_depth(files: dict[str, Path]) -> list[_Picture]:
    with np.load(files["motorcycle_disp.npz"]) as archive:
        (disparity,) = archive.values()
    millimetres = np.rint(disparity_to_metres(disparity) * 1000).astype(np.uint16)
    boxes = {
        "train": _spread_boxes(0, 0, 480, 500, size=(240, 240), columns=3, rows=4),
        "val": _spread_boxes(501, 0, 741, 500, size=(240, 240), columns=1, rows=2),
    }
    return [_Picture("motorcycle", _read_rgb(files["motorcycle_left.png"]), millimetres, boxes)]


def _make_segmentation(files: dict[str, Path]) -> list[_Picture]:
    coins, tissue, horse = (_read_rgb(files[f"{name}.png"]) for name in ("coins", "ihc", "horse"))
    coins_boxes = {
        "train": _spread_boxes(0, 0, 384, 150, size=(192, 150), columns=3, rows=1),
        "val": _spread_boxes(0, 151, 384, 303, size=(192, 152), columns=2, rows=1),
    }
    tissue_boxes = {
        "train": _spread_boxes(0, 0, 256, 512, size=(256, 256), columns=1, rows=3),
        "val": _spread_boxes(256, 0, 512, 512, size=(256, 256), columns=1, rows=2),
    }
    horse_boxes = {
        "train": _spread_boxes(0, 0, 200, 328, size=(200, 200), columns=1, rows=3),
        "val": _spread_boxes(200, 0, 400, 328, size=(200, 164), columns=1, rows=2),
    }
    return [
        _Picture("coins", coins, _class_map(_find_coins(coins[..., 0]), "coin"), coins_boxes),
        _Picture("tissue", tissue, _class_map(_find_stain(tissue), "stained tissue"), tissue_boxes),
        _Picture("horse", horse, _class_map(horse[..., 0] < 128, "horse"), horse_boxes),
    ]


def _find_coins(gray: np.ndarray) -> np.ndarray:
    from skimage.filters import sobel
    from skimage.measure import label
    from skimage.segmentation import clear_border, watershed

    markers = np.where(gray > 150, 2, np.where(gray < 30, 1, 0))
    coins = watershed(sobel(gray), markers) == 2
    holes = clear_border(label(~coins)) > 0  # background that does not reach the border
    parts = label(coins | holes)
    is_coin = np.bincount(parts.ravel()) >= MIN_COIN
    is_coin[0] = False  # the background
    return is_coin[parts]


def _find_stain(rgb: np.ndarray) -> np.ndarray:
    from skimage.color import rgb2hed
    from skimage.filters import gaussian, threshold_otsu

    brown = rgb2hed(rgb)[..., 2]
    return gaussian(brown, sigma=2) > threshold_otsu(brown)


def _class_map(mask: np.ndarray, name: str) -> np.ndarray:
    return np.where(mask, CLASSES.index(name), 0).astype(np.uint8)


def _read_rgb(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


if __name__ == "__main__":
    run_command_line(main)
