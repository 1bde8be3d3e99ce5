"""Pictures of predictions: colours that mean what the bar and the legend say, at every size."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib._pylab_helpers import Gcf
from PIL import Image

from dinov3.eval.dense import pictures
from dinov3.eval.dense.pictures import (
    alpha_blend,
    class_colors,
    depth_picture,
    depth_tensor_to_colorized_pil,
    heat_picture,
    normalized_tensor_to_pil,
    segmentation_picture,
)

GRAY, GREEN, PAPER = (128, 128, 128), (0, 255, 0), (255, 255, 255)
FIRST, LAST = (12, 7, 134), (239, 248, 33)  # ends of "plasma"
NAMES = ["sky", "sea", "wet sand"]


def where(picture: Image.Image, colour: tuple[int, ...] | np.ndarray) -> tuple[int, int, int, int] | None:
    """Smallest box (left, top, right, bottom) around the pixels of a colour; None if there is none."""
    rows, columns = np.nonzero((np.asarray(picture) == np.asarray(colour)).all(axis=-1))
    if not len(rows):
        return None
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def plasma(share: float) -> tuple[int, ...]:
    return tuple(int(channel) for channel in matplotlib.colormaps["plasma"](share, bytes=True)[:3])


def ramp(height: int = 400, width: int = 500) -> np.ndarray:
    return np.tile(np.linspace(1, 5, width, dtype=np.float32), (height, 1))


# Depth


def draw_depth(depth: np.ndarray, **options: Any) -> Image.Image:
    return depth_picture(depth, **{"image": Image.new("RGB", depth.shape[::-1], GREEN), **options})


def map_of(picture: Image.Image, width: int = 500, height: int = 400) -> Image.Image:
    """The depth map in a picture where it is to the right of a green photo."""
    photo = where(picture, GREEN)
    assert photo is not None and photo[2] - photo[0] == width and photo[3] - photo[1] == height
    left = photo[2] + photo[0]
    return picture.crop((left, photo[1], left + width, photo[3]))


def test_the_photo_is_left_of_the_map_and_the_bar_right_of_it() -> None:
    picture = draw_depth(np.full((400, 500), 2.0, np.float32), limits=(2, 4))
    whole = map_of(picture)
    assert whole.getcolors() == [(400 * 500, plasma(0.0))]
    photo = where(picture, GREEN)
    assert photo is not None
    bar = picture.getpixel((photo[2] + 500 + 3 * photo[0], photo[1] + 1))
    np.testing.assert_allclose(bar, plasma(1.0), atol=5)  # type: ignore[arg-type]


def test_a_wide_photo_is_above_its_map() -> None:
    picture = draw_depth(np.full((300, 1024), 2.0), limits=(2, 4))
    photo, box = where(picture, GREEN), where(picture, plasma(0.0))
    assert photo is not None and box is not None
    assert photo[0] == box[0] and photo[3] < box[1] and picture.height > 600 and picture.width < 1200


def test_colours_run_from_the_first_limit_to_the_last_and_no_further() -> None:
    depth = np.repeat([[0.5, 1.0, 2.0, 3.0, 9.0]], 4, axis=0).repeat(100, axis=0).repeat(100, axis=1)
    whole = map_of(draw_depth(depth, limits=(1, 3)))
    colours = [whole.getpixel((50 + 100 * column, 50)) for column in range(5)]
    assert colours[0] == colours[1] == plasma(0.0) and colours[3] == colours[4] == plasma(1.0)
    np.testing.assert_allclose(colours[2], plasma(0.5), atol=2)  # type: ignore[arg-type]


def test_without_limits_single_outliers_do_not_flatten_the_rest() -> None:
    depth = ramp()
    depth[0, 0] = 1000.0
    whole = map_of(draw_depth(depth))
    np.testing.assert_allclose(whole.getpixel((10, 200)), plasma(0.02), atol=8)  # type: ignore[arg-type]
    np.testing.assert_allclose(whole.getpixel((490, 200)), plasma(0.98), atol=8)  # type: ignore[arg-type]


def test_what_is_unknown_is_gray_and_does_not_change_the_rest() -> None:
    depth, is_unknown = ramp(), np.zeros((400, 500), bool)
    for number, value in enumerate((np.nan, np.inf, -np.inf, 0.0, -1.0)):
        depth[100:200, 100 * number : 100 * number + 50] = value
        is_unknown[100:200, 100 * number : 100 * number + 50] = True
    got, whole = (np.asarray(map_of(draw_depth(values, limits=(1, 5)))) for values in (depth, ramp()))
    assert (got[is_unknown] == GRAY).all() and np.array_equal(got[~is_unknown], whole[~is_unknown])


def test_a_map_of_nothing_known_is_gray_without_a_bar() -> None:
    picture = draw_depth(np.zeros((320, 320)))
    assert {colour for _, colour in picture.getcolors() or []} == {GREEN, GRAY, PAPER}


def test_a_flat_map_has_the_colour_of_the_middle() -> None:
    whole = map_of(draw_depth(np.full((400, 500), 3.0)))
    np.testing.assert_allclose(whole.getpixel((100, 100)), plasma(0.5), atol=3)  # type: ignore[arg-type]


def test_the_scale_has_round_numbers_of_metres(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "_render", lambda figure, margin: figure)
    figure: Any = draw_depth(ramp(), limits=(2.1, 4.9))
    figure.draw_without_rendering()
    labels = [label.get_text() for label in figure.axes[-1].get_yticklabels()]
    assert [label for label in labels if 2.1 <= float(label.split()[0]) <= 4.9] == [
        "2.5 m", "3.0 m", "3.5 m", "4.0 m", "4.5 m"
    ]  # fmt: skip


def test_small_maps_are_enlarged_by_whole_pixels() -> None:
    whole = map_of(draw_depth(np.array([[1.0, 3.0], [3.0, 1.0]]), limits=(1, 3)), 320, 320)
    corners = [whole.getpixel((x, y)) for x, y in ((0, 0), (159, 159), (160, 159), (160, 160), (319, 319))]
    assert corners == [plasma(0.0), plasma(0.0), plasma(1.0), plasma(0.0), plasma(0.0)]


def test_the_photo_is_resized_to_the_map() -> None:
    map_of(draw_depth(ramp(), image=Image.new("RGB", (50, 40), GREEN)))


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"depth": np.zeros((1, 4, 4))}, r"depth: expected a map \[height, width\], not an array \[1, 4, 4\]"),
        ({"depth": np.zeros((0, 4))}, r"not an array \[0, 4\]"),
        ({"limits": (3, 3)}, r"limits=\(3, 3\): expected two numbers, the first one smaller"),
        ({"limits": (1, np.nan)}, "expected two numbers"),
    ],
)
def test_depths_that_cannot_be_drawn_are_an_error(arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        depth_picture(**({"depth": ramp(), "image": Image.new("RGB", (5, 4))} | arguments))


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
    picture = segmentation_picture(stripes(100), class_names=NAMES, image=photo)
    expected = 0.6 * class_colors(1)[0] + 0.4 * np.array([100, 0, 200])
    np.testing.assert_allclose(picture.getpixel((200, 200)), expected, atol=1)  # type: ignore[arg-type]


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


def legend_of(monkeypatch: pytest.MonkeyPatch, labels: np.ndarray, names: list[str]) -> list[str]:
    """The lines of the legend."""
    with monkeypatch.context() as patch:
        patch.setattr(pictures, "_render", lambda figure, margin: figure)
        figure: Any = segmentation_picture(labels, class_names=names)
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize("shape", [(64, 64), (300, 1024), (1024, 300), (2, 400), (400, 2), (1, 1)])
def test_more_classes_than_there_is_room_for_are_counted(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    labels, names = np.resize(np.arange(150), shape), [f"class {index}" for index in range(150)]
    lines = legend_of(monkeypatch, labels, names)
    n_classes, n_shown = min(150, labels.size), sum("class " in line for line in lines)
    more = [line for line in lines if line.startswith("+")]
    assert more == ([f"+{n_classes - n_shown} more"] if n_shown < n_classes else []) and n_shown > 0
    picture = segmentation_picture(labels, class_names=names)
    assert picture.width < 4 * 1024 and picture.height < 4 * 1024


def test_the_legend_shows_shares_and_names(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = stripes(30, 69, 1, side=1000)
    labels[-10:] = np.where(np.arange(1000) < 300, 2, 1)
    lines = legend_of(monkeypatch, labels, ["$a$", "b" * 60, "b" * 60])
    assert [line.strip() for line in lines] == [f"70 %  {'b' * 29}...", "30 %  $a$", f"<1 %  {'b' * 29}..."]


def test_names_are_not_formulas() -> None:
    # As formulas, these would be an error.
    segmentation_picture(stripes(100), class_names=["$\\frac$"])


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


def test_drawing_opens_no_figure() -> None:
    draw_depth(np.ones((2, 2)))
    assert not Gcf.get_all_fig_managers()


# Pictures of the evaluation


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_the_range_of_a_map_has_all_colours() -> None:
    image = depth_tensor_to_colorized_pil(torch.linspace(3, 9, 24).view(1, 1, 4, 6))
    assert image.mode == "RGB" and image.size == (6, 4)
    assert (image.getpixel((0, 0)), image.getpixel((5, 3))) == (FIRST, LAST)


def test_given_bounds_replace_those_of_the_map() -> None:
    depth = torch.tensor([[0.0, 1.0, 4.0, 9.0]])
    image = depth_tensor_to_colorized_pil(depth, vmin=1.0, vmax=4.0)
    assert [image.getpixel((x, 0)) for x in range(4)] == [FIRST, FIRST, LAST, LAST]
    equal = depth_tensor_to_colorized_pil(depth, vmin=2.0, vmax=2.0)
    assert {equal.getpixel((x, 0)) for x in range(4)} == {FIRST}


def test_other_colour_maps() -> None:
    gray = depth_tensor_to_colorized_pil(torch.tensor([[0.0, 1.0]]), cmap="gray")
    assert [gray.getpixel((x, 0)) for x in range(2)] == [(0, 0, 0), (255, 255, 255)]


def test_pixels_that_are_no_number_are_black() -> None:
    depth = torch.tensor([[1.0, torch.nan, 2.0, torch.inf]])
    image = depth_tensor_to_colorized_pil(depth)
    assert [image.getpixel((x, 0)) for x in range(4)] == [FIRST, (0, 0, 0), LAST, (0, 0, 0)]
    assert not pixels(depth_tensor_to_colorized_pil(torch.full((2, 2), torch.nan))).any()


def test_several_maps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one depth map.*\(2, 1, 4, 4\)"):
        depth_tensor_to_colorized_pil(torch.ones(2, 1, 4, 4))


def test_a_normalised_image_comes_back() -> None:
    image = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
    mean, std = (0.420, 0.411, 0.296), (0.213, 0.156, 0.143)
    normalized = (image / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    again = pixels(normalized_tensor_to_pil(normalized[None], mean, std))
    assert abs(again - image.permute(1, 2, 0).int().numpy()).max() <= 1
    assert set(pixels(normalized_tensor_to_pil(torch.full((3, 2, 2), 99.0))).flatten()) == {255}


def test_blending_weighs_the_colours() -> None:
    image, colors = Image.new("RGB", (4, 3), (200, 100, 0)), np.full((3, 4, 3), 50, dtype=np.uint8)
    assert np.array_equal(alpha_blend(image, colors, 0.0), image)
    assert np.array_equal(alpha_blend(image, colors, 1.0), colors)
    assert abs(pixels(alpha_blend(image, colors, 0.25)) - [162.5, 87.5, 12.5]).max() <= 1.5


def test_heat_is_half_transparent_over_the_photo_and_solid_on_its_scale() -> None:
    values = np.full((400, 400), -0.5, dtype=np.float32)
    values[:, 200:] = 2.0
    picture = heat_picture(values, image=Image.new("RGB", (40, 40), (0, 255, 0)), title="a $1 cup $")
    low, high = (np.array(matplotlib.colormaps["turbo"](share, bytes=True)[:3]) for share in (0.0, 1.0))
    pixels = np.asarray(picture).astype(int)
    for column, colour in ((100, low), (300, high)):
        mixed = pictures.OVERLAY_ALPHA * colour + (1 - pictures.OVERLAY_ALPHA) * np.array([0, 255, 0])
        assert np.abs(pixels[250, column] - mixed).max() <= 2
        assert (np.abs(pixels - colour).max(axis=-1) <= 3).any()
    with pytest.raises(ValueError, match=r"values: expected a map \[height, width\], not an array \[3\]"):
        heat_picture(np.zeros(3), image=Image.new("RGB", (4, 4)), title="")
