"""Small images and weights for the commands of texts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("red", "green_grass", "blue")


def write_folder(root: Path, *, per_class: int = 3) -> Path:
    """Write an ImageFolder whose classes differ in colour."""
    generator = np.random.default_rng(0)
    for channel, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for number in range(per_class):
            pixels = generator.integers(0, 80, (40, 56, 3))
            pixels[..., channel] += 150
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{number}.png")
    return root


def write_captions(root: Path, captions: list[list[str]]) -> Path:
    """Write a CocoCaptions VAL with these captions of each image."""
    images = root / "val2017" / "val2017"
    images.mkdir(parents=True)
    generator = np.random.default_rng(1)
    for number in range(len(captions)):
        Image.fromarray(generator.integers(0, 255, (40, 48, 3)).astype(np.uint8)).save(images / f"{number}.png")
    content = {
        "images": [{"id": number, "file_name": f"{number}.png"} for number in range(len(captions))],
        "annotations": [{"image_id": n, "caption": text} for n, own in enumerate(captions) for text in own],
    }
    file = root / "annotations_trainval2017" / "annotations" / "captions_val2017.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(content))
    return root
