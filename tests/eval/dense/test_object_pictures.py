"""Pictures of objects."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dinov3.eval.dense.object_pictures import objects_picture
from dinov3.eval.dense.pictures import class_colors


def test_objects_have_colours_and_names_over_the_photo() -> None:
    ids = np.zeros((200, 400), np.int64)
    ids[20:180, 10:190], ids[20:180, 210:390] = 1, 7
    picture = np.asarray(
        objects_picture(ids, labels=["cat 0.90", "dog 0.80"], image=Image.new("RGB", (400, 200), "gray"))
    )
    assert picture.shape == (200, 400, 3)
    for (x, y), colour in zip([(20, 30), (220, 30)], class_colors(2), strict=True):
        assert picture[y, x] == pytest.approx((128 + colour.astype(float)) / 2, abs=1)
    assert (picture[5, 5] == 128).all()
    for x in (100, 300):  # white text on black, in the middle
        around = picture[85:115, x - 40 : x + 40]
        assert (around == 255).all(-1).any() and (around == 0).all(-1).any()


def test_small_photos_are_enlarged_and_may_have_no_objects() -> None:
    picture = objects_picture(np.zeros((20, 40), np.int64), labels=[], image=Image.new("RGB", (40, 20), "gray"))
    assert picture.size == (320, 160)


def test_labels_are_those_of_the_objects() -> None:
    with pytest.raises(ValueError, match="2 labels for 1 objects"):
        objects_picture(np.ones((4, 4), np.int64), labels=["a", "b"], image=Image.new("RGB", (4, 4)))
