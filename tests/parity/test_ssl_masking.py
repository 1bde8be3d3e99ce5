"""Golden cases of masks and batches: bit for bit, with both random generators left in the same state."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from . import deterministic, golden

PIXELS = "[:,0,0,0]"


def seed_both(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)


def next_draws() -> torch.Tensor:
    return torch.tensor([random.random(), np.random.rand()], dtype=torch.float64)


def mask_generator(build: dict[str, Any]) -> Any:
    size = build["input_size"]
    arguments = build | {"input_size": tuple(size) if isinstance(size, list) else size}
    return golden.target("dinov3.data.masking.MaskingGenerator")(**arguments)


@pytest.mark.parametrize("case", golden.cases("ssl", "masking/"), ids=lambda c: c["id"])
def test_masks_and_generator_states(case: dict[str, Any]) -> None:
    generator = mask_generator(case["build"])
    assert list(generator.get_shape()) == case["expected"]["shape"]
    seed_both(case["rng_seed"])
    masks = np.stack([generator(count) for count in case["calls"]])
    stored = golden.tensors("ssl")
    assert masks.dtype == bool
    assert torch.equal(torch.from_numpy(masks).to(torch.uint8), stored[f"{case['id']}/masks"])
    assert torch.equal(next_draws(), stored[f"{case['id']}/next"])


@pytest.mark.parametrize("case", golden.cases("ssl", "collate/"), ids=lambda c: c["id"])
def test_batch(case: dict[str, Any]) -> None:
    collate = golden.target("dinov3.data.collate.collate_data_and_cast")
    seed_both(case["rng_seed"])
    batch = collate(
        samples(case),
        mask_generator=mask_generator(case["generator"]),
        dtype=getattr(torch, case["dtype"]),
        **case["kwargs"],
    )
    if "subset" in case:
        subset = golden.target("dinov3.data.collate.get_batch_subset")(batch, case["subset"])
        batch = batch | {f"subset.{name}": value for name, value in subset.items()}

    assert batch.keys() == case["expected"].keys()
    for name, want in case["expected"].items():
        if isinstance(want, int):
            assert batch[name] == want and type(batch[name]) is int, name
        else:
            assert list(batch[name].shape) == want["shape"], name
            assert str(batch[name].dtype) == f"torch.{want['dtype']}", name
    batch["next"] = next_draws()
    for name in case["outputs"]:
        got = batch[name.removesuffix(PIXELS)]
        got = got[:, 0, 0, 0] if name.endswith(PIXELS) else got
        want = golden.tensors("ssl")[f"{case['id']}/{name}"]
        assert torch.equal(got.to(torch.uint8) if got.dtype == torch.bool else got, want), name


def samples(case: dict[str, Any]) -> list[tuple[dict[str, list[torch.Tensor]], tuple[()]]]:
    crops = {
        "global_crops": ("global", case["n_global"], case["crop_shape"]),
        "local_crops": ("local", case["n_local"], case["local_shape"]),
    }
    if "gram_shape" in case:
        crops["gram_teacher_crops"] = ("gram", case["n_global"], case["gram_shape"])
    return [
        (
            {
                key: [deterministic.tensor(f"{name}.{k}.{i}", tuple(shape), case["seed"]) for k in range(count)]
                for key, (name, count, shape) in crops.items()
            },
            (),
        )
        for i in range(case["n_samples"])
    ]
