"""The figures of the demo, drawn with a random tiny model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from dinov3.demo import figures
from dinov3.demo.figures import Photo, fit_to_patches, marked_patch, patch_features, pca_colours, similarity_map
from dinov3.models.vision_transformer import vit_tiny


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = vit_tiny(patch_size=4, depth=1, pos_embed_rope_dtype="fp32")
    model.init_weights()
    return model.eval()


def two_halves(size: tuple[int, int] = (48, 32)) -> Image.Image:
    pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    pixels[:, size[0] // 2 :] = (250, 120, 30)
    return Image.fromarray(pixels)


def test_photos_become_whole_patches_of_the_same_shape():
    assert fit_to_patches(Image.new("RGB", (600, 400)), 4, short_side=10).size == (60, 40)
    assert fit_to_patches(Image.new("RGB", (451, 300)), 7, short_side=10).size == (15 * 7, 10 * 7)


def test_very_long_photos_are_cropped_to_their_centre():
    assert fit_to_patches(Image.new("RGB", (900, 100)), 4, short_side=10).size == (80, 40)


def test_patch_features_have_the_layout_of_the_image(model):
    features = patch_features(model, fit_to_patches(two_halves(), 4, short_side=6))
    assert features.shape == (6, 9, 192) and features.dtype == np.float32
    left, right = features[:, :4].mean((0, 1)), features[:, 5:].mean((0, 1))
    assert np.linalg.norm(left - right) > 5 * features[:, :4].std((0, 1)).max()


def test_patch_features_are_those_of_the_last_block_after_the_norm(model):
    image = fit_to_patches(two_halves(), 4, short_side=6)
    pixels = torch.from_numpy(np.asarray(image) / 255.0).permute(2, 0, 1).float()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = model.forward_features(((pixels - mean[:, None, None]) / std[:, None, None])[None])["x_norm_patchtokens"]
    assert patch_features(model, image).reshape(-1, 192) == pytest.approx(expected[0].detach().numpy(), abs=1e-4)


def test_pca_colours_do_not_depend_on_the_signs_of_the_components():
    features = np.random.default_rng(0).gamma(1.0, size=(5, 7, 12)).astype(np.float32)
    colours = pca_colours(features)
    assert colours.shape == (5, 7, 3) and 0 <= colours.min() < 0.3 and 0.7 < colours.max() <= 1
    assert pca_colours(features) == pytest.approx(colours)
    # Turning the feature space mirrors components, not what they mean.
    assert pca_colours(features[..., ::-1].copy()) == pytest.approx(colours, abs=1e-3)


def test_similarity_is_one_at_the_mark_and_follows_the_cosine():
    features = np.zeros((2, 2, 3), dtype=np.float32)
    features[0, 0], features[0, 1], features[1, 0], features[1, 1] = (2, 0, 0), (5, 0, 0), (0, 1, 0), (-1, 0, 0)
    assert similarity_map(features, (0.1, 0.1)) == pytest.approx(np.array([[1, 1], [0, -1]]))


@pytest.mark.parametrize("mark, patch", [((0.0, 0.0), (0, 0)), ((0.99, 0.2), (0, 9)), ((1.0, 1.0), (3, 9))])
def test_marks_are_shares_of_width_and_height(mark, patch):
    assert marked_patch((4, 10), mark) == patch


@pytest.mark.parametrize("draw", [figures.draw_pca, figures.draw_similarity])
@pytest.mark.parametrize("sizes", [[(48, 32)], [(48, 32), (32, 48), (40, 40)]])
def test_figures_are_drawn_for_any_number_and_shape_of_photos(model, tmp_path, monkeypatch, draw, sizes):
    monkeypatch.setattr(figures, "PATCHES_ON_SHORT_SIDE", 8)
    monkeypatch.setattr(figures, "DPI", 50)
    photos = [Photo(str(size), two_halves(size), (0.2, 0.5)) for size in sizes]
    path = draw(photos, {"one": model, "other": model}, tmp_path / "figure.png", title="a title")
    with Image.open(path) as figure:
        assert 200 < figure.width <= 17 * 50 and 100 < figure.height < 1500
        assert np.asarray(figure.convert("RGB")).std() > 20


def test_models_of_different_patch_sizes_do_not_share_a_figure(model, tmp_path):
    other = vit_tiny(patch_size=8, depth=1)
    with pytest.raises(ValueError, match=r"one patch size, not \[4, 8\]"):
        figures.draw_pca([Photo("x", two_halves())], {"a": model, "b": other}, tmp_path / "x.png", title="")
