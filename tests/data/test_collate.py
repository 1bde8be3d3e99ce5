from __future__ import annotations

import pickle
import random
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dinov3.data.collate import collate_data_and_cast, get_batch_subset
from dinov3.data.masking import MaskingGenerator

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def image(size: int, seed: int) -> Tensor:
    return torch.randint(256, (3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def samples(n: int, *, gram: bool = False, dtype: torch.dtype = torch.float32) -> list[tuple[dict[str, Any], Any]]:
    def sample(i: int) -> tuple[dict[str, Any], Any]:
        crops = {
            "global_crops": [image(8, 100 * i + k).to(dtype) for k in range(2)],
            "local_crops": [image(4, 100 * i + 10 + k).to(dtype) for k in range(3)],
        }
        if gram:
            crops["gram_teacher_crops"] = [image(12, 100 * i + 20 + k).to(dtype) for k in range(2)]
        return crops, "dropped"

    return [sample(i) for i in range(n)]


def collate(samples_list: list[Any], seed: int = 0, **changes: Any) -> dict[str, Any]:
    random.seed(seed)
    np.random.seed(seed)
    arguments: dict[str, Any] = {
        "mask_ratio_tuple": (0.1, 0.5),
        "mask_probability": 0.5,
        "dtype": torch.float32,
        "n_tokens": 64,
        "mask_generator": MaskingGenerator((8, 8), max_num_patches=32.0),
    }
    return collate_data_and_cast(samples_list, **(arguments | changes))


def test_crops_are_crop_major() -> None:
    data = samples(3, gram=True)
    batch = collate(data)
    for key, n_crops in (("global_crops", 2), ("local_crops", 3), ("gram_teacher_crops", 2)):
        collated = batch[f"collated_{key}"]
        assert len(collated) == 3 * n_crops
        for k in range(n_crops):
            for i in range(3):
                assert torch.equal(collated[3 * k + i], data[i][0][key][k])


def test_gram_crops_only_when_present() -> None:
    assert "collated_gram_teacher_crops" not in collate(samples(2))


def test_masks_are_described_by_indices_weights_and_counts() -> None:
    batch = collate(samples(6))
    masks = batch["collated_masks"]
    assert masks.shape == (12, 64) and masks.dtype == torch.bool
    flat = masks.flatten()
    assert batch["mask_indices_list"].tolist() == [i for i in range(12 * 64) if flat[i]]
    per_crop = [1 / int(masks[i // 64].sum()) for i in batch["mask_indices_list"].tolist()]
    torch.testing.assert_close(batch["masks_weight"], torch.tensor(per_crop))
    assert batch["n_masked_patches"].tolist() == [flat.sum()] == [batch["upperbound"]]


def test_ratios_are_stratified_and_shuffled_among_crops() -> None:
    batch = collate(samples(8), mask_probability=0.5)
    counts = batch["collated_masks"].sum(1).tolist()
    want = [int(64 * r) for r in torch.linspace(0.1, 0.5, 9)[1:]]
    assert sorted(counts) == [0] * 8 + want
    assert counts != want + [0] * 8


def test_share_of_masked_crops_is_truncated() -> None:
    counts = collate(samples(3), mask_probability=0.49)["collated_masks"].sum(1)
    assert int((counts > 0).sum()) == 2


def test_no_masks_at_all() -> None:
    batch = collate(samples(2), mask_probability=0.0)
    assert not batch["collated_masks"].any()
    assert batch["upperbound"] == 0 and batch["n_masked_patches"].tolist() == [0]
    assert batch["mask_indices_list"].dtype == torch.int64 and len(batch["masks_weight"]) == 0


def test_circular_shift_rolls_whole_masks() -> None:
    still = collate(samples(1), mask_probability=1.0, mask_ratio_tuple=(0.3, 0.3))
    random.seed(0)
    np.random.seed(0)
    generator = MaskingGenerator((8, 8), max_num_patches=32.0)
    masks = []
    for _ in range(2):
        mask = generator(19)
        masks.append(np.roll(mask, (random.randint(0, 7), random.randint(0, 7)), axis=(0, 1)))
    random.shuffle(masks)
    rolled = collate(samples(1), mask_probability=1.0, mask_ratio_tuple=(0.3, 0.3), random_circular_shift=True)
    assert torch.equal(rolled["collated_masks"], torch.from_numpy(np.stack(masks)).flatten(1))
    assert not torch.equal(rolled["collated_masks"], still["collated_masks"])


def test_masks_for_another_number_of_images() -> None:
    batch = collate(samples(2), local_batch_size=5)
    assert batch["collated_masks"].shape == (10, 64)
    assert len(batch["collated_global_crops"]) == 4


def test_grid_size_is_the_default_number_of_tokens() -> None:
    with_default, explicit = collate(samples(4), n_tokens=None), collate(samples(4))
    assert torch.equal(with_default["collated_masks"], explicit["collated_masks"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_uint8_crops_are_scaled_and_normalised(dtype: torch.dtype) -> None:
    data = samples(2, gram=True, dtype=torch.uint8)
    batch = collate(data, dtype=dtype, normalize=(MEAN, STD))
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    for key in ("global_crops", "local_crops", "gram_teacher_crops"):
        want = (data[1][0][key][0] / 255 - mean) / std
        assert batch[f"collated_{key}"].dtype == dtype
        assert torch.equal(batch[f"collated_{key}"][1], want.to(dtype))


def test_floating_point_crops_are_not_normalised() -> None:
    data = samples(2)
    assert torch.equal(collate(data, normalize=(MEAN, STD))["collated_global_crops"][0], data[0][0]["global_crops"][0])


def test_uint8_crops_without_statistics_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"the crops are uint8: pass normalize=\(mean, std\)"):
        collate(samples(2, dtype=torch.uint8))


def test_missing_samples_or_generator_are_an_error() -> None:
    with pytest.raises(ValueError, match="empty list of samples"):
        collate([])
    with pytest.raises(ValueError, match="needs a mask_generator"):
        collate(samples(2), mask_generator=None)


def test_only_the_seeds_of_random_and_numpy_decide() -> None:
    first = collate(samples(4), seed=5)
    torch.manual_seed(1)
    assert torch.equal(first["collated_masks"], collate(samples(4), seed=5)["collated_masks"])
    assert not torch.equal(first["collated_masks"], collate(samples(4), seed=6)["collated_masks"])


def test_collate_can_be_sent_to_workers() -> None:
    function = partial(collate_data_and_cast, mask_generator=MaskingGenerator((8, 8)))
    assert pickle.loads(pickle.dumps(function)).func is collate_data_and_cast


def test_subset_keeps_the_first_images_and_masks_of_each_crop() -> None:
    batch = collate(samples(5, gram=True), mask_probability=1.0) | {"global_batch_size": 20}
    subset = get_batch_subset(batch, 2)
    assert "collated_gram_teacher_crops" not in subset
    assert torch.equal(subset["collated_global_crops"], batch["collated_global_crops"][[0, 1, 2, 5, 6, 7]])
    assert torch.equal(subset["collated_local_crops"], batch["collated_local_crops"][[0, 1, 2, 5, 6, 7, 10, 11, 12]])
    masks = batch["collated_masks"][[0, 1, 5, 6]]
    assert torch.equal(subset["collated_masks"], masks)
    assert subset["n_masked_patches"].tolist() == [masks.sum()] == [len(subset["masks_weight"])]
    assert subset["upperbound"] == batch["upperbound"]
    assert subset["global_batch_size"] == 10


def test_subset_shuffles_masks_until_a_patch_is_masked() -> None:
    batch = collate(samples(4))
    batch["collated_masks"] = torch.zeros(8, 64, dtype=torch.bool)
    batch["collated_masks"][3, :7] = True
    subset = get_batch_subset(batch, 4)
    assert subset["n_masked_patches"].tolist() == [7]
    torch.testing.assert_close(subset["masks_weight"], torch.full((7,), 1 / 7))


def test_subset_without_a_masked_patch_is_an_error() -> None:
    with pytest.raises(ValueError, match="no masked patch to keep: 0 patches are masked in 8 crops"):
        get_batch_subset(collate(samples(4), mask_probability=0.0), 2)
    with pytest.raises(ValueError, match="divided by 9"):
        get_batch_subset(collate(samples(4)), 9)
