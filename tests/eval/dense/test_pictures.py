"""Pictures of predictions: colours that mean what the bar and the legend say, at every size."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dinov3.eval.dense import pictures
from dinov3.eval.dense.pictures import class_colors, depth_picture, segmentation_picture

GRAY = pictures.UNKNOWN
NAMES = ["sky", "sea", "wet sand"]


def where(picture: Image.Image, colour: tuple[int, ...] | np.ndarray) -> tuple[int, int, int, int] | None:
    """Smallest box (left, top, right, bottom) around the pixels of a colour; None if there is none."""
    rows, columns = np.nonzero((np.asarray(picture) == np.asarray(colour)).all(axis=-1))
    if not len(rows):
        return None
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def plasma(share: float) -> tuple[int, ...]:
    import matplotlib

    return tuple(round(255 * channel) for channel in matplotlib.colormaps["plasma"](share)[:3])


def ramp(height: int = 400, width: int = 500) -> np.ndarray:
    return np.tile(np.linspace(1, 5, width, dtype=np.float32), (height, 1))


# Depth


def test_the_photo_stands_left_of_the_map_and_the_bar_right_of_it() -> None:
    depth = np.full((400, 500), 2.0, np.float32)
    picture = depth_picture(depth, image=Image.new("RGB", (500, 400), (0, 255, 0)), limits=(2, 4))
    photo = where(picture, (0, 255, 0))
    assert photo is not None and photo[2] - photo[0] == 500 and photo[3] - photo[1] == 400
    box = where(picture, plasma(0.0))
    assert box is not None and photo[2] < box[0] and (box[1], box[3]) == (photo[1], photo[3])
    nearest, farthest = picture.getpixel((box[2] - 1, box[3] - 1)), where(picture, plasma(1.0))
    assert nearest == plasma(0.0)
    assert farthest is not None and farthest[0] > photo[2] + 500 and farthest[1] == photo[1]


def test_a_wide_photo_stands_above_its_map() -> None:
    picture = depth_picture(np.full((300, 1024), 2.0), image=Image.new("RGB", (1024, 300), (0, 255, 0)), limits=(2, 4))
    photo, box = where(picture, (0, 255, 0)), where(picture, plasma(0.0))
    assert photo is not None and box is not None
    assert photo[0] == box[0] and photo[3] < box[1] and picture.height > 600 and picture.width < 1200


def test_colours_run_from_the_first_limit_to_the_last_and_no_further() -> None:
    depth = np.repeat([[0.5, 1.0, 2.0, 3.0, 9.0]], 4, axis=0).repeat(100, axis=0).repeat(100, axis=1)
    picture = depth_picture(depth, limits=(1, 3))
    colours = [picture.getpixel((50 + 100 * column, 50)) for column in range(5)]
    assert colours[0] == colours[1] == plasma(0.0) and colours[3] == colours[4] == plasma(1.0)
    assert colours[2] == plasma(128 / 255)


def test_without_limits_single_outliers_do_not_flatten_the_rest() -> None:
    depth = ramp()
    depth[0, 0] = 1000.0
    picture = depth_picture(depth)
    left, right = picture.getpixel((20, 200)), picture.getpixel((490, 200))
    np.testing.assert_allclose(left, plasma(0.02), atol=8)
    np.testing.assert_allclose(right, plasma(0.98), atol=8)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0, -1.0])
def test_what_is_unknown_is_gray_and_does_not_change_the_rest(value: float) -> None:
    depth = ramp()
    depth[100:200, 100:200] = value
    picture, whole = depth_picture(depth, limits=(1, 5)), depth_picture(ramp(), limits=(1, 5))
    box = where(picture, GRAY)
    assert box is not None and (box[2] - box[0], box[3] - box[1]) == (100, 100)
    outside = np.ones((whole.height, whole.width), bool)
    outside[box[1] : box[3], box[0] : box[2]] = False
    assert np.array_equal(np.asarray(picture)[outside], np.asarray(whole)[outside])


def test_a_map_of_nothing_known_is_gray_without_a_bar() -> None:
    picture = np.asarray(depth_picture(np.zeros((320, 320))))
    assert {tuple(pixel) for pixel in picture.reshape(-1, 3).tolist()} == {GRAY, pictures.PAPER}


def test_a_flat_map_has_the_colour_of_the_middle() -> None:
    picture = depth_picture(np.full((320, 320), 3.0))
    np.testing.assert_allclose(picture.getpixel((100, 100)), plasma(0.5), atol=3)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (2.1, 4.9, ["2.5", "3.0", "3.5", "4.0", "4.5"]),
        (0.0, 1.0, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (2200, 3000, ["2200", "2400", "2600", "2800", "3000"]),
        (0.011, 0.038, ["0.015", "0.020", "0.025", "0.030", "0.035"]),
        (1.0, 10_000.0, ["2000", "4000", "6000", "8000", "10000"]),
        (999.9, 1000.5, ["999.9", "1000.0", "1000.1", "1000.2", "1000.3", "1000.4", "1000.5"]),
    ],
)
def test_ticks_are_round_numbers_inside_the_limits(low: float, high: float, expected: list[str]) -> None:
    assert pictures._ticks(low, high, max_count=20) == expected


@pytest.mark.parametrize("max_count", [1, 2, 3])
def test_a_low_bar_has_fewer_ticks(max_count: int) -> None:
    assert len(pictures._ticks(0.0, 9.7, max_count)) <= max_count


def test_the_labels_hold_the_unit() -> None:
    # Nothing else of the picture depends on it.
    metres, none = depth_picture(ramp(), unit="m"), depth_picture(ramp(), unit="")
    assert metres.width > none.width and metres.height == none.height


def test_small_maps_are_enlarged_by_whole_pixels() -> None:
    depth = np.array([[1.0, 3.0], [3.0, 1.0]])
    picture = depth_picture(depth, limits=(1, 3))
    box = where(picture.crop((0, 0, 330, picture.height)), plasma(0.0))
    assert box is not None and (box[2] - box[0], box[3] - box[1]) == (320, 320)
    corners = [picture.getpixel((box[0] + x, box[1] + y)) for x, y in ((159, 159), (160, 159), (160, 160))]
    assert corners == [plasma(0.0), plasma(1.0), plasma(0.0)]


def test_the_photo_is_resized_to_the_map() -> None:
    picture = depth_picture(ramp(), image=Image.new("RGB", (50, 40), (0, 255, 0)))
    box = where(picture, (0, 255, 0))
    assert box is not None and (box[2] - box[0], box[3] - box[1]) == (500, 400)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"depth": np.zeros((1, 4, 4))}, r"depth: expected a map \[height, width\], not an array \[1, 4, 4\]"),
        ({"depth": np.zeros((0, 4))}, r"not an array \[0, 4\]"),
        ({"limits": (3, 3)}, r"limits=\(3, 3\): expected two numbers, the first one smaller"),
        ({"limits": (1, np.nan)}, "expected two numbers"),
        ({"colormap": "plasmo"}, "colormap='plasmo': matplotlib has no such colormap"),
    ],
)
def test_depths_that_cannot_be_drawn_are_an_error(arguments: dict, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        depth_picture(**({"depth": ramp()} | arguments))


# Segmentation


def stripes(*shares: int, side: int = 400) -> np.ndarray:
    """A square map whose class i fills `shares[i]` rows of 100."""
    return np.repeat(np.repeat(np.arange(len(shares)), np.array(shares) * side // 100)[:, None], side, axis=1)


def legend_order(picture: Image.Image, indices: list[int], left: int) -> list[int]:
    """The classes by the height of their swatches."""
    legend = picture.crop((left, 0, picture.width, picture.height))
    boxes = {index: where(legend, class_colors(index + 1)[index]) for index in indices}
    assert None not in boxes.values()
    return sorted(indices, key=lambda index: boxes[index][1])  # type: ignore[index]


def test_the_legend_has_the_classes_that_occur_the_largest_first() -> None:
    picture = segmentation_picture(stripes(20, 0, 80), class_names=NAMES)
    assert legend_order(picture, [0, 2], left=420) == [2, 0]
    assert where(picture, class_colors(2)[1]) is None


def test_the_photo_shows_through_the_colours() -> None:
    photo = Image.new("RGB", (400, 400), (100, 0, 200))
    for alpha in (0.0, 0.25, 1.0):
        picture = segmentation_picture(stripes(100), class_names=NAMES, image=photo, overlay_alpha=alpha)
        expected = alpha * class_colors(1)[0] + (1 - alpha) * np.array([100, 0, 200])
        np.testing.assert_allclose(picture.getpixel((200, 200)), expected, atol=1)


@pytest.mark.parametrize("no_class", [3, 255, -1])
def test_pixels_of_no_class_show_the_photo_and_are_not_in_the_legend(no_class: int) -> None:
    labels = stripes(50, 50)
    labels[200:] = no_class
    picture = segmentation_picture(labels, class_names=NAMES, image=Image.new("RGB", (400, 400), (1, 2, 3)))
    assert picture.getpixel((200, 300)) == (1, 2, 3)
    assert segmentation_picture(labels, class_names=NAMES).getpixel((200, 300)) == GRAY
    assert where(picture.crop((420, 0, picture.width, 400)), (1, 2, 3)) is None


def test_a_map_of_no_class_at_all_can_be_drawn() -> None:
    assert segmentation_picture(np.full((400, 400), 255, np.uint8), class_names=NAMES).getpixel((9, 9)) == GRAY
    assert segmentation_picture(np.full((400, 400), 255), class_names=[]).getpixel((9, 9)) == GRAY


def test_the_legend_of_a_wide_map_stands_below_it() -> None:
    tall = segmentation_picture(np.zeros((1000, 400), int), class_names=NAMES)
    wide = segmentation_picture(np.zeros((400, 1000), int), class_names=NAMES)
    assert tall.width > 450 and tall.height < 1030
    assert wide.width < 1030 and wide.height > 420


@pytest.mark.parametrize("shape", [(64, 64), (300, 1024), (1024, 300), (2, 400), (400, 2), (1, 1)])
def test_more_classes_than_there_is_room_for_are_counted(shape: tuple[int, int], monkeypatch) -> None:
    drawn: list[str] = []
    draw = pictures.ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        pictures.ImageDraw.ImageDraw,
        "text",
        lambda self, xy, text, **kw: (drawn.append(text), draw(self, xy, text, **kw)),
    )
    labels = np.resize(np.arange(150), shape)
    picture = segmentation_picture(labels, class_names=[f"class {index}" for index in range(150)])
    n_shown = sum(text.startswith("class ") for text in drawn)
    n_classes = min(150, labels.size)
    more = [text for text in drawn if text.startswith("+")]
    assert more == ([f"+{n_classes - n_shown} more"] if n_shown < n_classes else []) and n_shown > 0
    assert picture.width < 4 * 1024 and picture.height < 4 * 1024


def test_long_names_are_shortened() -> None:
    short = segmentation_picture(stripes(100), class_names=["a" * 60])
    long = segmentation_picture(stripes(100), class_names=["a" * 600])
    assert short.width == long.width < 2 * 400


def test_shares_of_less_than_half_a_percent_are_not_zero() -> None:
    assert pictures._Entry("a", 0.004, (0, 0, 0)).percent == "< 1 %"
    assert pictures._Entry("a", 0.305, (0, 0, 0)).percent == "30 %"


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64])
def test_labels_may_be_of_any_integer_type(dtype: type) -> None:
    names = [f"class {index}" for index in range(300)]
    expected = segmentation_picture(stripes(50, 50), class_names=names)
    assert segmentation_picture(stripes(50, 50).astype(dtype), class_names=names).tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"labels": np.zeros((1, 4, 4), int)}, r"labels: expected a map \[height, width\], not an array \[1, 4, 4\]"),
        ({"labels": np.zeros((4, 4))}, "labels: expected integers, class indices, not float64"),
        ({"overlay_alpha": 60}, "overlay_alpha=60: expected 0"),
    ],
)
def test_labels_that_cannot_be_drawn_are_an_error(arguments: dict, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        segmentation_picture(**({"labels": stripes(100), "class_names": NAMES} | arguments))


# Colours


def test_colours_are_the_same_for_any_number_of_classes_and_all_differ() -> None:
    colours = class_colors(256)
    assert colours.shape == (256, 3) and colours.dtype == np.uint8
    assert len({tuple(colour) for colour in colours.tolist()}) == 256
    for n in (0, 1, 8, 150):
        assert np.array_equal(class_colors(n), colours[:n])
    assert np.array_equal(class_colors(300)[256:], colours[:44])


def test_a_caller_cannot_change_the_colours() -> None:
    class_colors(4)[:] = 0
    assert class_colors(4).any(axis=1).all()


def distances(rgb: np.ndarray) -> np.ndarray:
    lab = pictures._lab(rgb)
    return np.linalg.norm(lab[:, None] - lab[None], axis=-1)[np.triu_indices(len(rgb), 1)]


def test_colours_can_be_told_apart() -> None:
    # A difference of 2.3 in L*a*b* is just noticeable.
    assert distances(class_colors(8)).min() > 25
    assert distances(class_colors(30)).min() > 20
    assert distances(class_colors(150)).min() > 8


def test_first_colours_differ_for_people_who_do_not_see_red_from_green() -> None:
    # Deuteranopia after Vienot et al. 1999, in linear RGB.
    linear = (class_colors(7) / 255.0) ** 2.2
    seen = linear @ np.array([[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]]).T
    assert distances(255 * seen.clip(0, 1) ** (1 / 2.2)).min() > 12


def test_lab_of_known_colours() -> None:
    known = pictures._lab(np.array([[255, 255, 255], [10, 10, 10], [28, 28, 28], [255, 0, 0], [0, 0, 255]]))
    expected = [[100, 0, 0], [2.74, 0, 0], [10.27, 0, 0], [53.24, 80.09, 67.20], [32.30, 79.19, -107.86]]
    np.testing.assert_allclose(known, expected, atol=0.05)


def test_matplotlib_is_imported_only_when_a_depth_is_drawn() -> None:
    program = (
        "import sys, numpy as np; from dinov3.eval.dense.pictures import segmentation_picture as draw; "
        "draw(np.zeros((2, 2), int), class_names=['a']); assert 'matplotlib' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_drawing_opens_no_figure() -> None:
    program = (
        "import sys, numpy as np; from dinov3.eval.dense.pictures import depth_picture; "
        "depth_picture(np.ones((2, 2))); assert 'matplotlib.pyplot' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
