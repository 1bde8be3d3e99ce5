from __future__ import annotations

import gc
import itertools
import logging
import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from dinov3.data import augmentations
from dinov3.data.augmentations import DataAugmentationDINO
from dinov3.data.collate import collate_data_and_cast
from dinov3.data.masking import MaskingGenerator
from dinov3.data.transforms import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

SMALL = {
    "global_crops_scale": (0.32, 1.0),
    "local_crops_scale": (0.05, 0.32),
    "local_crops_number": 3,
    "global_crops_size": 32,
    "local_crops_size": 16,
}
VIEW_KEYS = ("global_crops", "global_crops_teacher", "gram_teacher_crops", "local_crops")


def augmentation(**overrides: Any) -> DataAugmentationDINO:
    return DataAugmentationDINO(**(SMALL | overrides))


def noise(height: int = 40, width: int = 60, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def views_at(seed: int, augment: DataAugmentationDINO, image: Image.Image | None = None) -> dict[str, Any]:
    torch.manual_seed(seed)
    return augment(image or noise())


def all_views(views: dict[str, Any]) -> list[Tensor]:
    return [view for key in VIEW_KEYS for view in views.get(key, [])]


def normalized(view: Tensor) -> Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return (view.float() / 255 - mean) / std


@pytest.fixture
def undistorted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("JITTER_PROBABILITY", "GRAYSCALE_PROBABILITY", "FLIP_PROBABILITY"):
        monkeypatch.setattr(augmentations, name, 0.0)
    monkeypatch.setattr(augmentations, "SOLARIZE_PROBABILITIES", (0.0, 0.0))


# Pixels


def levels(seed: int = 0) -> Tensor:
    """Noise with the corners of the colour cube, equal channels and their neighbours in its first rows."""
    image = torch.randint(0, 256, (3, 24, 32), generator=torch.Generator().manual_seed(seed)).float()
    corners = torch.tensor(list(itertools.product((0.0, 1.0, 128.0, 255.0), repeat=3))).T
    image[:, :2] = corners.reshape(3, 2, 32)
    return image


@pytest.mark.parametrize("turns", [-0.1, -0.03, 0.0, 0.04, 0.1])
def test_hue_rotation_agrees_with_torchvision(turns: float) -> None:
    want = TF.adjust_hue(levels() / 255, turns) * 255
    assert torch.allclose(augmentations._rotate_hue(levels(), turns), want, atol=0.02)


@pytest.mark.parametrize("seed", range(8))
def test_colour_jitter_agrees_with_torchvision(seed: int) -> None:
    torch.manual_seed(seed)
    brightness, contrast, saturation, hue = torch.rand(4, dtype=torch.float64).tolist()
    want = levels() / 255
    for step in torch.randperm(4).tolist():
        want = [
            lambda x: TF.adjust_brightness(x, 0.6 + 0.8 * brightness),
            lambda x: TF.adjust_contrast(x, 0.6 + 0.8 * contrast),
            lambda x: TF.adjust_saturation(x, 0.8 + 0.4 * saturation),
            lambda x: TF.adjust_hue(x, -0.1 + 0.2 * hue),
        ][step](want)
    torch.manual_seed(seed)
    assert torch.allclose(augmentations._jitter_color(levels()), want * 255, atol=0.1)


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.7, 1.3, 2.0])
def test_blur_agrees_with_torchvision(sigma: float) -> None:
    want = TF.gaussian_blur(levels(), [9, 9], [sigma, sigma])
    got = augmentations._blur(levels(), augmentations._gaussian_taps(sigma))
    assert torch.allclose(got, want, atol=0.1)


def test_the_widest_blur_uses_the_whole_kernel_and_the_narrowest_is_none() -> None:
    assert len(augmentations._gaussian_taps(2.0)) == 5
    assert augmentations._gaussian_taps(0.1) == [1.0]


def test_grayscale_repeats_the_luma(monkeypatch: pytest.MonkeyPatch, undistorted: None) -> None:
    monkeypatch.setattr(augmentations, "GRAYSCALE_PROBABILITY", 1.0)
    view = augmentations._distort(levels().byte(), jitter=True)
    want = TF.rgb_to_grayscale(levels(), num_output_channels=3)
    assert torch.equal(view, view[:1].expand_as(view))
    assert (view.float() - want).abs().max() <= 0.55


def test_cuts_agree_with_pillow(undistorted: None) -> None:
    image = noise()
    augment = augmentation(blur_probabilities=(0, 0, 0), global_crops_scale=(1, 1), output_uint8=True)
    square = image.crop((0, 0, 40, 40))
    want = torch.from_numpy(np.array(square.resize((32, 32), Image.Resampling.BICUBIC))).permute(2, 0, 1)
    for view in augment(square)["global_crops"]:
        assert (view.int() - want.int()).abs().max() <= 1


# Cuts


@pytest.mark.parametrize(("height", "width"), [(40, 60), (1, 1), (5, 300), (300, 5)])
def test_boxes_lie_in_the_image_and_have_the_wanted_shape(height: int, width: int) -> None:
    torch.manual_seed(0)
    for _ in range(200):
        top, left, box_height, box_width = augmentations._random_box(height, width, (0.2, 0.6))
        assert top >= 0 and left >= 0 and box_height >= 1 and box_width >= 1
        assert top + box_height <= height and left + box_width <= width
        # Rounding to pixels may leave the range by half a pixel.
        assert (box_width - 0.5) / (box_height + 0.5) <= 4 / 3
        assert (box_width + 0.5) / (box_height - 0.5) >= 3 / 4


def test_boxes_reach_every_border() -> None:
    torch.manual_seed(0)
    boxes = [augmentations._random_box(8, 8, (0.2, 0.3)) for _ in range(300)]
    assert {box[0] for box in boxes} >= {0, 8 - 4} and {box[1] for box in boxes} >= {0, 8 - 4}
    assert max(top + height for top, _, height, _ in boxes) == 8
    assert max(left + width for _, left, _, width in boxes) == 8


@pytest.mark.parametrize(
    ("size", "box"), [((12, 100), (0, 42, 12, 16)), ((100, 12), (42, 0, 16, 12)), ((12, 15), (0, 0, 12, 15))]
)
def test_an_image_that_no_box_fits_is_cut_at_its_centre(size: tuple[int, int], box: tuple[int, ...]) -> None:
    assert augmentations._central_box(*size) == box


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (7, 5)])
def test_images_smaller_than_the_crops_are_enlarged(size: tuple[int, int]) -> None:
    views = views_at(0, augmentation(), noise(*size))
    assert [view.shape for view in views["global_crops"]] == [(3, 32, 32)] * 2
    assert [view.shape for view in views["local_crops"]] == [(3, 16, 16)] * 3


def test_without_horizontal_flips_no_view_is_mirrored() -> None:
    ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8)[None, :, None] * 4, (64, 1, 3)))

    def mirrored(horizontal_flips: bool) -> list[bool]:
        augment = augmentation(teacher_no_color_jitter=True, horizontal_flips=horizontal_flips)
        torch.manual_seed(0)
        teacher = [view for _ in range(20) for view in augment(ramp)["global_crops_teacher"]]
        return [bool(view[0, :, 0].mean() > view[0, :, -1].mean()) for view in teacher]

    assert not any(mirrored(False))
    assert 5 < sum(mirrored(True)) < 35


# Teacher views and the Gram teacher


def test_gram_teacher_sees_the_distorted_view_before_it_is_resized() -> None:
    views = views_at(1, augmentation(gram_teacher_crops_size=48))
    for small, large in zip(views["global_crops"], views["gram_teacher_crops"], strict=True):
        assert large.shape == (3, 48, 48)
        assert torch.allclose(
            small, TF.resize(large, [32, 32], TF.InterpolationMode.BICUBIC, antialias=True), atol=1e-5
        )


def test_a_smaller_gram_view_is_resized_from_the_global_one() -> None:
    views = views_at(1, augmentation(gram_teacher_crops_size=24))
    for large, small in zip(views["global_crops"], views["gram_teacher_crops"], strict=True):
        assert torch.allclose(
            small, TF.resize(large, [24, 24], TF.InterpolationMode.BICUBIC, antialias=True), atol=1e-5
        )


def test_gram_views_of_the_global_size_are_the_global_crops() -> None:
    views = views_at(1, augmentation(gram_teacher_crops_size=32))
    for crop, gram in zip(views["global_crops"], views["gram_teacher_crops"], strict=True):
        assert torch.equal(crop, gram)


@pytest.mark.parametrize("gram_size", [24, 32, 48])
def test_gram_views_without_distortions_are_bare_cuts(gram_size: int) -> None:
    fixed = {"global_crops_scale": (1, 1), "horizontal_flips": False}
    augment = augmentation(gram_teacher_crops_size=gram_size, gram_teacher_no_distortions=True, **fixed)
    all_gram = [view for seed in range(4) for view in views_at(seed, augment, noise(48, 48))["gram_teacher_crops"]]
    all_global = [view for seed in range(4) for view in views_at(seed, augment, noise(48, 48))["global_crops"]]
    assert all(torch.equal(view, all_gram[0]) and view.shape == (3, gram_size, gram_size) for view in all_gram)
    assert len({view.sum().item() for view in all_global}) > 4


@pytest.mark.parametrize("gram", [{}, {"gram_teacher_crops_size": 48}, {"gram_teacher_crops_size": 24}])
def test_teacher_without_colour_jitter_sees_bare_cuts_of_global_size(gram: dict[str, int]) -> None:
    fixed = {"global_crops_scale": (1, 1), "horizontal_flips": False, "teacher_no_color_jitter": True}
    for seed in range(4):
        views = views_at(seed, augmentation(**fixed, **gram), noise(48, 48))
        first, second = views["global_crops_teacher"]
        assert first.shape == (3, 32, 32)
        assert torch.equal(first, second)
        assert not torch.equal(views["global_crops"][0], views["global_crops"][1])


# Local views cut out of global ones


@pytest.mark.parametrize("gram", [{}, {"gram_teacher_crops_size": 80}])
def test_local_subset_views_are_parts_of_the_global_crops(undistorted: None, gram: dict[str, int]) -> None:
    subset = {"local_crops_subset_of_global_crops": True, "global_crops_size": 64, "local_crops_size": 32}
    augment = augmentation(
        **subset, **gram, local_crops_number=5, blur_probabilities=(0, 0, 0), teacher_no_color_jitter=True
    )
    views = views_at(0, augment)
    sources = [views["global_crops_teacher"][index] for index in (0, 0, 0, 1, 1)]
    assert len(views["local_crops"]) == len(views["offsets"]) == 5
    for view, (top, left), source in zip(views["local_crops"], views["offsets"], sources, strict=True):
        assert torch.equal(view, source[:, top : top + 32, left : left + 32])


def test_local_subset_offsets_lie_on_the_patch_grid_and_reach_its_end() -> None:
    augment = augmentation(
        local_crops_subset_of_global_crops=True, global_crops_size=32, patch_size=8, local_crops_number=40
    )
    offsets = views_at(0, augment)["offsets"]
    assert {offset for pair in offsets for offset in pair} == {0, 8, 16}


@pytest.mark.parametrize("number", [0, 1, 2, 7])
def test_local_subset_of_the_global_size_gives_all_views(number: int) -> None:
    augment = augmentation(local_crops_subset_of_global_crops=True, local_crops_size=32, local_crops_number=number)
    views = views_at(0, augment)
    assert views["offsets"] == [(0, 0)] * number
    assert [view.shape for view in views["local_crops"]] == [(3, 32, 32)] * number


# Distortions of the views


def plain(views: dict[str, Any]) -> set[tuple[float, ...]]:
    """The colours of the views of a one-coloured image, without the second global one, which may be solarized."""
    crops = [views["global_crops"][0], *views["local_crops"]]
    return {tuple(round(value, 3) for value in crop[:, 0, 0].tolist()) for crop in crops}


def test_shared_jitter_gives_all_views_the_same_colour() -> None:
    image = Image.new("RGB", (40, 40), (200, 120, 40))
    shared = [plain(views_at(seed, augmentation(share_color_jitter=True), image)) for seed in range(5)]
    single = [plain(views_at(seed, augmentation(), image)) for seed in range(5)]
    assert all(len(colours) == 1 for colours in shared) and len(set.union(*shared)) > 2
    assert all(len(colours) > 1 for colours in single)


def test_no_blur_pass_runs_where_the_probability_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("blurred")

    monkeypatch.setattr(augmentations, "_blur", fail)
    for seed in range(5):
        views_at(seed, augmentation(blur_probabilities=(0.0, 0.0, 0.0)))
    with pytest.raises(AssertionError, match="blurred"):
        views_at(0, augmentation(blur_probabilities=(1.0, 0.0, 0.0), local_crops_number=0))


@pytest.mark.parametrize(("index", "names"), [(0, ["global 1"]), (1, ["global 2"]), (2, ["local"])])
def test_blur_probabilities_belong_to_their_views(undistorted: None, index: int, names: list[str]) -> None:
    probabilities = [1.0 if i == index else 0.0 for i in range(3)]
    fixed = {"global_crops_scale": (1, 1), "local_crops_scale": (1, 1), "local_crops_size": 32, "local_crops_number": 1}
    sharp = views_at(0, augmentation(**fixed, blur_probabilities=(0, 0, 0)), noise(32, 32))["global_crops"][0]
    changed: set[str] = set()
    for seed in range(4):
        views = views_at(seed, augmentation(**fixed, blur_probabilities=probabilities), noise(32, 32))
        crops = zip(("global 1", "global 2", "local"), [*views["global_crops"], *views["local_crops"]], strict=True)
        changed |= {name for name, crop in crops if not torch.equal(crop, sharp)}
    assert changed == set(names)


# uint8 views


@pytest.mark.parametrize(
    "options", [{}, {"local_crops_subset_of_global_crops": True}, {"teacher_no_color_jitter": True}], ids=str
)
def test_uint8_views_normalised_are_the_float_views(options: dict[str, Any]) -> None:
    floats = views_at(3, augmentation(**options))
    integers = views_at(3, augmentation(**options, output_uint8=True))
    assert floats.keys() == integers.keys()
    for want, got in zip(all_views(floats), all_views(integers), strict=True):
        assert (got.dtype, want.dtype) == (torch.uint8, torch.float32)
        assert torch.allclose(normalized(got), want, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "float_keys"),
    [
        ({"gram_teacher_crops_size": 48}, {"global_crops", "global_crops_teacher"}),
        ({"gram_teacher_crops_size": 24}, {"gram_teacher_crops"}),
        ({"gram_teacher_crops_size": 32}, set()),
        ({"gram_teacher_crops_size": 48, "gram_teacher_no_distortions": True}, set()),
    ],
)
def test_only_views_resized_as_floats_stay_floats(options: dict[str, Any], float_keys: set[str]) -> None:
    floats = views_at(3, augmentation(**options))
    mixed = views_at(3, augmentation(**options, output_uint8=True))
    assert {key for key in VIEW_KEYS if mixed[key][0].dtype == torch.float32} == float_keys
    for want, got in zip(all_views(floats), all_views(mixed), strict=True):
        assert torch.allclose(got if got.dtype == torch.float32 else normalized(got), want, atol=1e-6)


def test_collated_uint8_views_equal_collated_float_views() -> None:
    def batch(output_uint8: bool) -> dict[str, Any]:
        augment = augmentation(gram_teacher_crops_size=48, output_uint8=output_uint8)
        return collate_data_and_cast(
            [(views_at(seed, augment), ()) for seed in range(2)],
            mask_ratio_tuple=(0.1, 0.5),
            mask_probability=0.5,
            dtype=torch.float32,
            mask_generator=MaskingGenerator(input_size=2),
            normalize=(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
        )

    floats, integers = batch(False), batch(True)
    for key in ("collated_global_crops", "collated_local_crops", "collated_gram_teacher_crops"):
        assert torch.equal(floats[key], integers[key]), key


# What loaders need


def test_torchs_generator_alone_decides() -> None:
    random.seed(0)
    np.random.seed(0)
    states = random.getstate(), np.random.get_state()[1].tolist()
    first = views_at(7, augmentation())
    assert states == (random.getstate(), np.random.get_state()[1].tolist())
    random.seed(1)
    np.random.seed(1)
    again, other = views_at(7, augmentation()), views_at(8, augmentation())
    assert all(torch.equal(a, b) for a, b in zip(all_views(first), all_views(again), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(all_views(first), all_views(other), strict=True))


def test_the_image_is_left_as_it_is() -> None:
    image = noise(32, 32)
    for seed in range(4):
        views_at(seed, augmentation(global_crops_scale=(1, 1), share_color_jitter=seed % 2 == 0), image)
    assert np.array_equal(np.array(image), np.array(noise(32, 32)))


@pytest.mark.parametrize("options", [{}, {"local_crops_subset_of_global_crops": True}], ids=str)
def test_views_own_their_memory_and_no_more(options: dict[str, Any], undistorted: None) -> None:
    fixed = {"global_crops_scale": (1, 1), "blur_probabilities": (0, 0, 0), "output_uint8": True}
    views = views_at(0, augmentation(**fixed, **options), noise(32, 32))
    crops = [*views["global_crops"], *views["local_crops"]]
    assert all(crop.is_contiguous() and crop.untyped_storage().nbytes() == crop.numel() for crop in crops)
    assert len({crop.untyped_storage().data_ptr() for crop in crops}) == len(crops)


def test_nothing_is_left_for_the_garbage_collector() -> None:
    augment, image = augmentation(), noise()
    augment(image)
    gc.collect()
    gc.disable()
    try:
        for _ in range(5):
            augment(image)
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_pickled_augmentation_draws_the_same_views() -> None:
    augment = augmentation(gram_teacher_crops_size=48)
    copy = pickle.loads(pickle.dumps(augment))
    pairs = zip(all_views(views_at(0, augment)), all_views(views_at(0, copy)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_parameters_are_logged_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="dinov3"):
        augmentation(local_crops_number=5)
    (record,) = caplog.records
    assert "local_crops_number=5" in record.getMessage() and "\n" not in record.getMessage()


# Errors


@pytest.mark.parametrize(
    ("image", "got"),
    [
        (Image.new("L", (8, 8)), "mode 'L'"),
        (Image.new("RGBA", (8, 8)), "mode 'RGBA'"),
        (torch.zeros(3, 8, 8), "Tensor"),
        (np.zeros((8, 8, 3)), r"an array of float64 \[8, 8, 3\]"),
        (np.zeros((3, 8, 8), np.uint8), r"an array of uint8 \[3, 8, 8\]"),
    ],
)
def test_other_inputs_than_rgb_images_are_refused(image: Any, got: str) -> None:
    with pytest.raises(TypeError, match=rf"a PIL image of mode RGB or an array of uint8 .*, got {got}"):
        augmentation()(image)


def test_an_array_gives_the_views_of_its_picture() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    views = []
    for image in (Image.fromarray(pixels), pixels):
        torch.manual_seed(0)
        views.append(augmentation()(image))
    for name in ("global_crops", "local_crops"):
        assert all(map(torch.equal, views[0][name], views[1][name]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"global_crops_scale": (0.0, 1.0)}, r"global_crops_scale.*0 < a <= b <= 1; got \(0.0, 1.0\)"),
        ({"local_crops_scale": (0.5, 0.2)}, r"local_crops_scale.*got \(0.5, 0.2\)"),
        ({"local_crops_scale": (0.5, 1.2)}, r"local_crops_scale.*got \(0.5, 1.2\)"),
        ({"global_crops_scale": (float("nan"), 1)}, "global_crops_scale must be 2 numbers"),
        ({"global_crops_scale": 0.5}, "global_crops_scale must be 2 numbers, got 0.5"),
        ({"local_crops_number": -1}, "local_crops_number must be at least 0, got -1"),
        ({"global_crops_size": 4}, "global_crops_size must be at least 5, got 4"),
        ({"local_crops_size": 0}, "local_crops_size must be at least 5, got 0"),
        ({"gram_teacher_crops_size": 0}, "gram_teacher_crops_size must be at least 5, got 0"),
        ({"patch_size": 0}, "patch_size must be at least 1, got 0"),
        ({"std": (0.2, 0.2, 0.0)}, "std must be 3 numbers from"),
        ({"mean": (0.5, 0.5)}, r"mean must be 3 numbers, got \(0.5, 0.5\)"),
        ({"blur_probabilities": (0.0, 1.1, 0.5)}, "blur_probabilities must be 3 numbers from 0 to 1"),
        (
            {"local_crops_subset_of_global_crops": True, "local_crops_size": 48},
            "local_crops_size=48 > global_crops_size",
        ),
        ({"local_crops_subset_of_global_crops": True, "local_crops_size": 24}, "local_crops_size=24 .* is 16"),
        ({"local_crops_subset_of_global_crops": True, "global_crops_size": 40}, "global_crops_size=40 .* is 32"),
    ],
)
def test_wrong_parameters_are_errors_at_construction(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        augmentation(**arguments)


@pytest.mark.parametrize("name", ["global_crops_size", "local_crops_number", "gram_teacher_crops_size", "patch_size"])
def test_sizes_must_be_integers(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be an integer, got 32.5"):
        augmentation(**{name: 32.5})
