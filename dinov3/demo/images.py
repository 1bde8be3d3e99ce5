"""The images of the demo, written out as `ImageFolder` trees.

    images/train/<group>/...          everything that is trained on; labelled groups have class folders
    images/test/<group>/<class>/...   labelled images that are never trained on
    images/photos/...                 the photos of the figures
    images/manifest.json              what the tree was made of

Which images are held out does not depend on the seed of the training. Photos are few and large, so that the training
uses many small tiles of them, at several scales.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from dinov3.data.datasets import ImageFolder
from dinov3.data.images import BadImageError, read_image_file
from dinov3.demo import packaged
from dinov3.demo.trees import fingerprint, write_tree

logger = logging.getLogger("dinov3")

FORMAT = 1  # of the tree; with another number every tree is written again
SPLIT_SEED = 0

IMAGE_SIDE = 32  # pixels; digits and faces are smaller than that
TILE_SIDE = 64  # pixels
TILES_PER_PHOTO = 64
TILE_SCALE = (0.15, 0.7)  # side of a tile over the short side of its photo
PHOTO_SHORT_SIDE = 512  # pixels, at most
TEST_SHARE = {"digits": 0.28, "faces": 0.5}

USER_SHORT_SIDE = 96  # pixels, of the user's labelled images
USER_TEST_SHARE = 0.25
USER_MAX_IMAGES = 4000
USER_MIN_TRAIN_IMAGES = 1000  # fewer images are supplemented by tiles
MAX_FIGURE_PHOTOS = 6


@dataclass
class FigurePhoto:
    """A photo of the figures; `file` is relative to the tree, `mark` in shares of width and height."""

    name: str
    file: str
    mark: tuple[float, float] = (0.5, 0.5)
    is_held_out: bool = False
    credit: str = ""


@dataclass
class Images:
    """A tree of images.

    Attributes:
        root: its directory.
        source: what it was made of, in words.
        n_train: number of images that are trained on.
        tasks: names of the labelled groups, which have class folders below `train/` and `test/`.
        task_sizes: numbers of labelled images for training and for testing, by task.
        photos: those of the figures.
    """

    root: Path
    source: str
    n_train: int = 0
    tasks: list[str] = field(default_factory=list)
    task_sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    photos: list[FigurePhoto] = field(default_factory=list)

    def dataset(self, split: str, task: str | None = None) -> str:
        """Return the dataset string of a split (`train` or `test`), of one task or of everything."""
        path = self.root / split / task if task else self.root / split
        return f"ImageFolder:root={path}:labels={'folder' if task else 'none'}"


def prepare_images(root: Path, folder: Path | None = None) -> tuple[Images, bool]:
    """Write the images of the demo, unless they are there already.

    Args:
        root: the directory to write; a tree that was made of other images is replaced.
        folder: the user's own images, with or without class folders. Default: those inside installed packages.

    Returns:
        The tree, and whether it was there already.

    Raises:
        FileNotFoundError: `folder` is not a directory, or holds no images.
        ValueError: `root` holds something else or lies in `folder`, or a class has too few images to hold some out.
        RuntimeError: an image of `folder` cannot be decoded.
        ModuleNotFoundError: a package that ships images is missing.
    """
    root = root.resolve()
    if folder is not None and root.is_relative_to(folder.expanduser().resolve()):
        raise ValueError(f"{root} lies inside of --images {folder} and would count as its images: choose another")
    dataset = None if folder is None else ImageFolder(root=str(folder.expanduser()))
    source, entries = _describe_packages() if dataset is None else _describe_folder(dataset)

    def write(directory: Path) -> dict[str, Any]:
        images = Images(directory, source)
        if dataset is None:
            _write_packaged(images)
        else:
            _write_folder(images, dataset)
        content = asdict(images)
        del content["root"]
        return content

    manifest, was_there = write_tree(root, fingerprint([str(FORMAT), *entries]), write)
    del manifest["fingerprint"]
    photos = [FigurePhoto(**photo | {"mark": tuple(photo["mark"])}) for photo in manifest.pop("photos")]
    sizes = {name: (train, test) for name, (train, test) in manifest.pop("task_sizes").items()}
    return Images(root, photos=photos, task_sizes=sizes, **manifest), was_there


def cut_tiles(image: Image.Image, count: int, rng: np.random.Generator) -> list[Image.Image]:
    """Cut squares out of an image at random places and scales (`TILE_SCALE`), resized to `TILE_SIDE` pixels."""
    short_side = min(image.size)
    sides = (short_side * rng.uniform(*TILE_SCALE, size=count)).clip(min=min(TILE_SIDE // 2, short_side))
    corners = rng.uniform(size=(count, 2))
    tiles = []
    for side, (u, v) in zip(sides, corners, strict=True):
        left, top = u * (image.width - side), v * (image.height - side)
        box = (left, top, left + side, top + side)
        tiles.append(image.resize((TILE_SIDE, TILE_SIDE), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0))
    return tiles


def held_out(labels: np.ndarray, share: float) -> np.ndarray:
    """Choose the samples that are held out: the same share of every class, at least one and not all; always the same.

    Args:
        labels: int [N].
        share: between 0 and 1.

    Returns:
        bool [N].
    """
    rng = np.random.default_rng(SPLIT_SEED)
    chosen = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        chosen[members[: min(max(1, round(share * len(members))), len(members) - 1)]] = True
    return chosen


def _write_packaged(images: Images) -> None:
    digits, digit_labels = packaged.load_digits()
    _write_task(images, "digits", digits, digit_labels, [str(digit) for digit in range(10)])
    faces, face_labels = packaged.load_faces()
    if faces:
        _write_task(images, "faces", faces, face_labels, ["other", "face"])
    rng = np.random.default_rng(SPLIT_SEED)
    for photo, path in tqdm(packaged.find_photos(), desc="photos", unit="photo"):
        image = Image.open(path).convert("RGB")
        if not photo.is_held_out:
            tiles = cut_tiles(image, TILES_PER_PHOTO, rng)
            images.n_train += _save(tiles, images.root / "train" / "photos" / photo.name)
        if photo.mark is not None:
            file = _save_photo(image, images.root, photo.name)
            images.photos.append(FigurePhoto(photo.name, file, photo.mark, photo.is_held_out, photo.credit))
    credits = [f"{photo.file} of {photo.package}: {photo.credit}" for photo, _ in packaged.find_photos()]
    (images.root / "CREDITS.txt").write_text("\n".join(credits) + "\n", encoding="utf-8")


def _write_task(
    images: Images, name: str, pictures: Sequence[Image.Image], labels: np.ndarray, classes: Sequence[str]
) -> None:
    is_test = held_out(labels, TEST_SHARE[name])
    for index in tqdm(range(len(pictures)), desc=name, unit="image"):
        directory = images.root / ("test" if is_test[index] else "train") / name / classes[labels[index]]
        directory.mkdir(parents=True, exist_ok=True)
        enlarged = pictures[index].resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BICUBIC)
        enlarged.save(directory / f"{index:04d}.png")
    images.tasks.append(name)
    images.task_sizes[name] = (int((~is_test).sum()), int(is_test.sum()))
    images.n_train += int((~is_test).sum())


def _write_folder(images: Images, dataset: ImageFolder) -> None:
    indices = np.arange(len(dataset))
    if len(indices) > USER_MAX_IMAGES:
        indices = np.sort(np.random.default_rng(SPLIT_SEED).permutation(indices)[:USER_MAX_IMAGES])
        logger.warning("%s: %d of its %d images are used", dataset.root, len(indices), len(dataset))
    is_test = _hold_out_of_folder(dataset, indices)
    tiles_per_image = max(0, -(-USER_MIN_TRAIN_IMAGES // max(1, int((~is_test).sum()))) - 1)
    # Labelled images are used whole; of unlabelled photos there are only tiles, as of the packaged ones.
    tiles_per_image = tiles_per_image if dataset.classes else max(1, tiles_per_image)
    rng = np.random.default_rng(SPLIT_SEED)
    # The figures show held-out images if there are any, spread over the folder.
    candidates = indices[is_test] if is_test.any() else indices
    spread = np.linspace(0, len(candidates) - 1, min(MAX_FIGURE_PHOTOS, len(candidates))).astype(int)
    shown = set(candidates[spread].tolist())
    for position, index in enumerate(tqdm(indices, desc="your images", unit="image")):
        image = _load(dataset, int(index))
        stem = f"{index:06d}"
        split = "test" if is_test[position] else "train"
        if dataset.classes:
            directory = images.root / split / "labelled" / str(dataset.get_class_name(int(index)))
            _save([_fit(image, USER_SHORT_SIDE)], directory, stem)
        if split == "train":
            images.n_train += bool(dataset.classes)
            images.n_train += _save(cut_tiles(image, tiles_per_image, rng), images.root / "train" / "tiles" / stem)
        if index in shown:
            name = Path(dataset.get_image_relpath(int(index))).name
            file = _save_photo(image, images.root, stem)
            images.photos.append(FigurePhoto(name, file, is_held_out=bool(is_test[position])))
    if dataset.classes:
        images.tasks.append("labelled")
        images.task_sizes["labelled"] = (int((~is_test).sum()), int(is_test.sum()))


def _hold_out_of_folder(dataset: ImageFolder, indices: np.ndarray) -> np.ndarray:
    targets = dataset.get_targets()
    if targets is None or dataset.classes is None:
        return np.zeros(len(indices), dtype=bool)
    labels = targets[indices]
    sizes = np.bincount(labels, minlength=len(dataset.classes))
    if sizes.min() < 2:
        name = dataset.classes[int(sizes.argmin())]
        raise ValueError(
            f"--images {dataset.root}: class folder {name!r} has {sizes.min()} image, but k-NN needs at least one to "
            "train on and one that is held out: add images, or put all images into one folder to train without classes"
        )
    return held_out(labels, USER_TEST_SHARE)


def _load(dataset: ImageFolder, index: int) -> Image.Image:
    path = Path(dataset.root, dataset.get_image_relpath(index))
    try:
        return read_image_file(path)
    except BadImageError as error:
        raise BadImageError(f"--images: {error}: repair or remove it") from error


def _fit(image: Image.Image, short_side: int) -> Image.Image:
    scale = short_side / min(image.size)
    if scale >= 1:
        return image
    size = (max(short_side, round(image.width * scale)), max(short_side, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)


def _save(pictures: Iterable[Image.Image], directory: Path, stem: str = "") -> int:
    count = 0
    for count, picture in enumerate(pictures, start=1):
        directory.mkdir(parents=True, exist_ok=True)
        picture.save(directory / f"{stem or f'{count - 1:03d}'}.png")
    return count


def _save_photo(image: Image.Image, root: Path, stem: str) -> str:
    (root / "photos").mkdir(exist_ok=True)
    _fit(image, PHOTO_SHORT_SIDE).save(root / "photos" / f"{stem}.png")
    return f"photos/{stem}.png"


def _describe_packages() -> tuple[str, list[str]]:
    photos = [f"{photo}:{path.stat().st_size}" for photo, path in packaged.find_photos()]
    settings = [TILE_SIDE, TILES_PER_PHOTO, TILE_SCALE, IMAGE_SIDE, PHOTO_SHORT_SIDE, sorted(TEST_SHARE.items())]
    return "images inside installed packages", [*photos, *map(str, settings)]


def _describe_folder(dataset: ImageFolder) -> tuple[str, list[str]]:
    entries = [str(dataset.root)]
    for index in range(len(dataset)):
        relative = dataset.get_image_relpath(index)
        status = Path(dataset.root, relative).stat()
        entries.append(f"{relative}:{status.st_size}:{status.st_mtime_ns}")
    return str(Path(dataset.root).resolve()), entries
