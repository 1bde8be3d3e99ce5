"""Pictures of objects: their masks in colours over the photo, with a name at each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dinov3.eval.dense.pictures import MIN_SIDE, MIN_TEXT, class_colors

OVERLAY_ALPHA = 0.5  # weight of the colours over the photo
TEXT_SHARE = 0.04  # height of the text over the shorter side


def objects_picture(ids: np.ndarray, *, labels: Sequence[str], image: Image.Image) -> Image.Image:
    """Draw each object of a photo in its colour, with an outline and a name in the middle of it.

    Args:
        ids: integers [H, W]: 0 in no object, otherwise its number. The numbers that occur, in rising order, have the
            names `labels`.
        labels: what is written at each object.
        image: the photo, of the size of the map.

    Returns:
        An RGB image; small ones are enlarged, so that the text can be read.

    Raises:
        ValueError: there are not as many labels as objects.
    """
    numbers = [number for number in np.unique(ids).tolist() if number]
    if len(numbers) != len(labels):
        raise ValueError(f"{len(labels)} labels for {len(numbers)} objects")
    factor = max(1, -(-MIN_SIDE // max(ids.shape)))
    ids = ids.repeat(factor, axis=0).repeat(factor, axis=1)
    pixels = np.asarray(image.convert("RGB").resize(ids.shape[::-1]), dtype=np.float32).copy()
    colours = class_colors(len(numbers))
    for number, colour in zip(numbers, colours, strict=True):
        inside = ids == number
        pixels[inside] += OVERLAY_ALPHA * (colour - pixels[inside])
    # An outline where the number of a neighbour differs.
    outline = np.zeros(ids.shape, bool)
    outline[:, 1:] |= ids[:, 1:] != ids[:, :-1]
    outline[1:] |= ids[1:] != ids[:-1]
    pixels[outline] = 255
    picture = Image.fromarray(pixels.round().astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    size = max(MIN_TEXT, round(TEXT_SHARE * min(ids.shape)))
    font = ImageFont.load_default(size)
    for number, label in zip(numbers, labels, strict=True):
        rows, columns = np.nonzero(ids == number)
        # The pixel of the object that is nearest to its centre, which itself may lie outside.
        nearest = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
        half = draw.textlength(label, font=font) / 2
        # Kept inside the picture.
        x = min(max(float(columns[nearest]), half + 3), max(picture.width - half - 3, half + 3))
        y = min(max(float(rows[nearest]), size), max(picture.height - size, size))
        box = draw.textbbox((x, y), label, font=font, anchor="mm")
        draw.rectangle((box[0] - 3, box[1] - 2, box[2] + 3, box[3] + 2), fill=(0, 0, 0))
        draw.text((x, y), label, font=font, anchor="mm", fill=(255, 255, 255))
    return picture
