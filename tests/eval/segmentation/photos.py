"""Photos that ship with scikit-image, with objects that were outlined by hand, as a SegmentationFolder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("background", "person", "animal", "vehicle", "cup")
#: The longer side of a photo in the units of the outlines.
SIDE = 320
# fmt: off
#: Class and outline (x, y) of each object.
OUTLINES: dict[str, list[tuple[str, list[tuple[int, int]]]]] = {
    "astronaut.png": [
        ("person", [(97, 40), (120, 10), (160, 8), (187, 40), (182, 85), (190, 115), (190, 150), (215, 165), (225, 200),
                    (222, 225), (190, 240), (175, 280), (175, 320), (25, 320), (15, 250), (25, 190), (60, 150),
                    (78, 130), (85, 100), (105, 92)]),
        ("vehicle", [(262, 0), (285, 40), (285, 175), (225, 140), (235, 105), (245, 45)]),
    ],
    "chelsea.png": [
        ("animal", [(0, 213), (5, 150), (25, 60), (35, 10), (60, 0), (285, 0), (265, 40), (262, 120), (245, 180),
                    (215, 200), (130, 213)]),
    ],
    "coffee.png": [
        ("cup", [(95, 15), (120, 8), (170, 10), (215, 40), (240, 90), (255, 120), (235, 180), (190, 207), (120, 200),
                 (60, 160), (40, 110), (60, 55), (92, 40)]),
    ],
    "rocket.jpg": [("vehicle", [(155, 70), (161, 62), (168, 70), (170, 205), (152, 205)])],
    "camera.png": [
        ("person", [(105, 60), (120, 42), (160, 42), (170, 60), (163, 95), (190, 110), (205, 110), (205, 150),
                    (180, 165), (165, 150), (140, 175), (95, 320), (60, 320), (50, 250), (0, 270), (15, 200), (30, 130),
                    (60, 80), (110, 75)]),
    ],
    "horse.png": [
        ("animal", [(15, 195), (18, 90), (40, 72), (60, 78), (110, 72), (180, 70), (230, 25), (275, 15), (285, 10),
                    (310, 70), (295, 82), (260, 75), (240, 130), (235, 245), (200, 245), (200, 155), (110, 130),
                    (85, 190), (110, 235), (90, 245), (70, 190), (60, 245), (40, 245), (38, 190), (30, 200)]),
    ],
    "motorcycle_left.png": [
        ("vehicle", [(40, 85), (60, 70), (140, 85), (210, 60), (205, 40), (240, 55), (245, 90), (280, 130), (290, 170),
                     (280, 195), (245, 190), (225, 150), (210, 165), (140, 190), (60, 170), (52, 125)]),
    ],
}
# fmt: on


def write_photos(root: Path, source: Path, *, side: int) -> Path:
    """Write the photos in `source`, with a longer side of `side` pixels, as the split `train` with objects."""
    for name, objects in OUTLINES.items():
        photo = Image.open(source / name).convert("RGB")
        scale = side / max(photo.size)
        photo = photo.resize((round(photo.width * scale), round(photo.height * scale)))
        labels, numbers = Image.new("L", photo.size), Image.new("I", photo.size)
        for number, (label, outline) in enumerate(objects, start=1):
            points = [(x * side / SIDE, y * side / SIDE) for x, y in outline]
            ImageDraw.Draw(labels).polygon(points, fill=CLASSES.index(label))
            ImageDraw.Draw(numbers).polygon(points, fill=number)
        instances = Image.fromarray(np.asarray(numbers).astype(np.uint16))
        for folder, picture in {"images": photo, "labels": labels, "instances": instances}.items():
            path = root / folder / "train" / f"{Path(name).stem}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    return root
