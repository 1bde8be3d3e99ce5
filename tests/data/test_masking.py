from __future__ import annotations

import random
import time

import numpy as np
import pytest

from dinov3.data.masking import MaskingGenerator


def seed(value: int) -> None:
    random.seed(value)
    np.random.seed(value)


def cell_by_cell(generator: MaskingGenerator, target: int) -> np.ndarray:
    """The published algorithm with loops over cells."""
    height, width = generator.get_shape()
    mask = np.zeros((height, width), dtype=bool)
    count = 0
    while count < target:
        cap = min(target - count, generator.max_num_patches or generator.num_patches)
        added = 0
        for _ in range(10):
            area = random.uniform(generator.min_num_patches, cap)
            aspect = np.exp(random.uniform(*generator.log_aspect_ratio))
            h, w = int(round(np.sqrt(area * aspect))), int(round(np.sqrt(area / aspect)))
            if w < width and h < height:
                top, left = random.randint(0, height - h), random.randint(0, width - w)
                cells = [(i, j) for i in range(top, top + h) for j in range(left, left + w) if not mask[i, j]]
                if 0 < len(cells) <= cap:
                    for cell in cells:
                        mask[cell] = True
                    added = len(cells)
                    break
        if not added:
            break
        count += added
    unset = [i for i in range(height * width) if not mask.flat[i]]
    for i in np.random.choice(unset, size=target - count, replace=False):
        mask.flat[i] = True
    return mask


@pytest.mark.parametrize("size, cap", [((14, 14), 98.0), ((9, 5), 11), (6, None)])
def test_equals_the_published_algorithm_and_leaves_the_generators_alike(
    size: tuple[int, int] | int, cap: float | None
) -> None:
    generator = MaskingGenerator(size, max_num_patches=cap)
    for value in range(60):
        target = (7 * value) % (generator.num_patches + 1)
        seed(value)
        want, want_next = cell_by_cell(generator, target), (random.random(), np.random.rand())
        seed(value)
        got = generator(target)
        assert got.dtype == bool and got.shape == generator.get_shape()
        assert np.array_equal(got, want)
        assert (random.random(), np.random.rand()) == want_next
        assert got.sum() == target


def test_empty_mask_advances_the_numpy_generator_alone() -> None:
    seed(3)
    python_state, numpy_state = random.getstate(), np.random.get_state()[2]
    assert not MaskingGenerator((14, 14), max_num_patches=98)(0).any()
    assert random.getstate() == python_state
    assert np.random.get_state()[2] != numpy_state


def test_blocks_respect_the_limits() -> None:
    generator = MaskingGenerator((20, 20), num_masking_patches=30, min_num_patches=9, min_aspect=0.5)
    assert generator.max_num_patches == 30
    assert generator.log_aspect_ratio == pytest.approx((np.log(0.5), np.log(2)))
    seed(0)
    mask = generator(30)
    rows, columns = np.nonzero(mask)
    # With one block of 9 cells or more, far fewer rows and columns are touched than by single cells.
    assert len(set(rows)) + len(set(columns)) < 40


def test_attributes_and_representation_without_limits() -> None:
    generator = MaskingGenerator(6)
    assert (generator.height, generator.width, generator.num_patches) == (6, 6, 36)
    assert repr(generator) == "MaskingGenerator(6 x 6 patches, blocks of 4 to 36, aspect ratio 0.300 to 3.333)"


@pytest.mark.parametrize("count", [-1, 37])
def test_more_patches_than_the_grid_has_are_an_error(count: int) -> None:
    with pytest.raises(ValueError, match=f"{count} patches to mask, expected 0 to 36 .*6 x 6"):
        MaskingGenerator(6)(count)


def test_large_masks_take_well_below_a_millisecond_in_the_mean() -> None:
    generator = MaskingGenerator((48, 48), max_num_patches=1152.0)
    seed(0)
    start = time.process_time()
    for _ in range(50):
        generator(1152)
    assert (time.process_time() - start) / 50 < 1e-3
