"""Datasets from strings, and loaders whose batches depend only on their number."""

from __future__ import annotations

import functools
import gc
import itertools
import logging
import pickle
import random
import re
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DistributedSampler, IterableDataset

from dinov3.data import (
    CombinedDataLoader,
    DataAugmentationDINO,
    MaskingGenerator,
    SamplerType,
    collate_data_and_cast,
    loaders,
    make_data_loader,
    make_dataset,
)
from dinov3.data.datasets import BadImageError, ConcatenatedDataset, ImageFolder
from dinov3.data.images import ImageReading
from dinov3.data.loaders import make_train_data_loader, usable_workers
from dinov3.data.meta_loaders import count_draws
from dinov3.data.samplers import InfiniteSampler, ShardedInfiniteSampler

from .tars import write_tar

N_SAMPLES = 10


class Draws:
    """Item i is (i, three random draws); samples listed as bad cannot be read."""

    def __init__(self, bad: tuple[int, ...] = (), length: int = N_SAMPLES) -> None:
        self.bad = bad
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> list[float]:
        draws = [random.random(), float(np.random.rand()), float(torch.rand(()))]
        if index in self.bad:
            raise BadImageError(f"Draws: cannot read image {index}, /data/{index}.png")
        return [index, *draws]


def collate_draws(samples: list[list[float]]) -> dict[str, Any]:
    masks = [random.random(), float(np.random.rand()), float(torch.rand(()))]
    return {"samples": torch.tensor(samples, dtype=torch.float64), "masks": torch.tensor(masks, dtype=torch.float64)}


class Cycle:
    """Part of a cycle of references, which only the garbage collector can free."""

    alive = 0

    def __init__(self) -> None:
        Cycle.alive += 1
        self.itself = self

    def __del__(self) -> None:
        Cycle.alive -= 1


class MakesGarbage:
    """Each item leaves a cycle behind, and says how many of them are there."""

    def __len__(self) -> int:
        return 3000

    def __getitem__(self, index: int) -> int:
        Cycle()
        return Cycle.alive


def stack(samples: list[int]) -> dict[str, torch.Tensor]:
    return {"samples": torch.tensor(samples)}


def train_loader(dataset: Any = None, **kwargs: Any) -> Any:
    arguments = {
        "batch_size": 4,
        "num_workers": 0,
        "sampler_type": SamplerType.INFINITE,
        "sampler_seed": 2,
        "collate_fn": collate_draws,
        "seed_key": (0, 0, 0),
        "first_batch": 0,
        "on_bad_image": "raise",
    }
    return make_train_data_loader(dataset=Draws() if dataset is None else dataset, **(arguments | kwargs))


def take(loader: Any, count: int) -> list[Any]:
    iterator = iter(loader)
    return [next(iterator) for _ in range(count)]


def assert_same(batches: list[Any], others: list[Any]) -> None:
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for key, value in batch.items():
            same = torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
            assert same, key


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for number in range(6):
        path = root / ("even" if number % 2 == 0 else "odd") / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(path)
    return root


def image_loader(root: Path, *, index: int = 0, size: int = 32, **kwargs: Any) -> Any:
    augmentation = DataAugmentationDINO((0.3, 1.0), (0.1, 0.3), 2, global_crops_size=size, local_crops_size=16)
    grid = size // 16
    collate = functools.partial(
        collate_data_and_cast,
        mask_ratio_tuple=(0.1, 0.5),
        mask_probability=0.5,
        dtype=torch.float32,
        n_tokens=grid**2,
        mask_generator=MaskingGenerator(input_size=(grid, grid), max_num_patches=0.5 * grid**2),
    )
    dataset = make_dataset(dataset_str=f"ImageFolder:root={root}", transform=augmentation)
    return train_loader(
        dataset, batch_size=2, collate_fn=collate, seed_key=(3, index, 0), sampler_seed=5 + index, **kwargs
    )


# Training loaders


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_number_of_workers_makes_no_difference_to_augmented_and_masked_batches(images: Path) -> None:
    assert_same(take(image_loader(images, num_workers=3), 5), take(image_loader(images), 5))


@pytest.mark.distributed
def test_spawned_workers_load_the_same_batches(images: Path) -> None:
    spawned = image_loader(images, num_workers=1, multiprocessing_context="spawn")
    assert_same(take(spawned, 2), take(image_loader(images), 2))


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.distributed)])
def test_a_resumed_loader_continues_bit_for_bit(num_workers: int) -> None:
    whole = take(train_loader(), 20)
    for first in (1, 7, 13) if num_workers == 0 else (7,):
        assert_same(take(train_loader(first_batch=first, num_workers=num_workers), 20 - first), whole[first:])


def test_resumed_loaders_of_several_resolutions_continue_bit_for_bit(images: Path) -> None:
    ratios = (0.3, 0.7)

    def combined(first: int) -> Any:
        delivered = count_draws(ratios, 65537, first)
        parts = [
            image_loader(images, index=index, size=size, first_batch=delivered[index])
            for index, size in enumerate((32, 48))
        ]
        return CombinedDataLoader(
            zip(parts, ratios, strict=True), 2, CombinedDataLoader.GLOBAL_HOMOGENEOUS, advance=first
        )

    whole = take(combined(0), 8)
    assert len({batch["collated_global_crops"].shape for batch in whole}) == 2
    assert_same(take(combined(4), 4), whole[4:])


def test_the_same_loader_starts_again_at_each_iter() -> None:
    loader = train_loader(first_batch=3)
    assert_same(take(loader, 5), take(loader, 5))


@pytest.mark.parametrize("key", [(1, 0, 0), (0, 1, 0), (0, 0, 1)], ids=["seed", "loader", "rank"])
def test_every_part_of_the_key_changes_all_draws(key: tuple[int, int, int]) -> None:
    batches, others = take(train_loader(), 3), take(train_loader(seed_key=key), 3)
    for batch, other in zip(batches, others, strict=True):
        assert torch.equal(batch["samples"][:, 0], other["samples"][:, 0])
        assert not (batch["samples"][:, 1:] == other["samples"][:, 1:]).any()
        assert not (batch["masks"] == other["masks"]).any()


def test_no_two_samples_share_draws_even_of_the_same_image() -> None:
    batches = take(train_loader(Draws(length=1)), 20)
    for column in range(1, 4):
        assert len(torch.cat([batch["samples"][:, column] for batch in batches]).unique()) == 20 * 4
    assert len(torch.stack([batch["masks"] for batch in batches]).unique()) == 20 * 3


def test_masks_do_not_depend_on_what_the_samples_draw() -> None:
    # A position has the same draws, whatever the size of the batch.
    small, large = take(train_loader(batch_size=2), 1)[0], take(train_loader(batch_size=4), 1)[0]
    assert torch.equal(small["samples"], large["samples"][:2])
    assert torch.equal(small["masks"], large["masks"])


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.distributed)])
def test_loading_leaves_the_generators_of_the_process_alone(num_workers: int) -> None:
    before = random.getstate(), np.random.get_state()[1:3], torch.get_rng_state()
    before = (before[0], (before[1][0].copy(), before[1][1]), before[2])
    take(train_loader(num_workers=num_workers), 3)
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1][0]) and np.random.get_state()[2] == before[1][1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_generators_are_restored_after_an_error_too() -> None:
    before = torch.get_rng_state()
    with pytest.raises(BadImageError):
        take(train_loader(Draws(bad=tuple(range(N_SAMPLES)))), 1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "sampler_type", [SamplerType.INFINITE, SamplerType.SHARDED_INFINITE, SamplerType.SHARDED_INFINITE_NEW]
)
def test_an_epoch_of_an_infinite_loader_has_every_sample_once(sampler_type: SamplerType) -> None:
    batches = take(train_loader(batch_size=5, sampler_type=sampler_type), 2)
    assert sorted(torch.cat([batch["samples"][:, 0] for batch in batches]).tolist()) == list(range(N_SAMPLES))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"sampler_type": SamplerType.EPOCH}, "must be one of INFINITE, SHARDED_INFINITE, SHARDED_INFINITE_NEW"),
        ({"on_bad_image": "ignore"}, "train.on_bad_image='ignore' is not one of raise, skip"),
        ({"seed_key": (-1, 0, 0)}, "at least 0"),
        ({"dataset": Draws(length=0)}, "dataset is empty"),
    ],
)
def test_impossible_training_loaders_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_loader(**kwargs)


# How images are read


def test_a_dataset_string_wins_over_the_settings_of_a_training(images: Path) -> None:
    text = f"ImageFolder:root={images}"
    reading = ImageReading(alpha="drop", exif="ignore", max_image_pixels=9)
    joined = make_dataset(dataset_str=f"{text}+{text}:alpha=white:exif=apply:max_image_pixels=1000000", reading=reading)
    assert [dataset.reading for dataset in joined.datasets] == [
        reading,
        ImageReading(alpha="white", exif="apply", max_image_pixels=1_000_000),
    ]
    for wrong, message in [("alpha=black", "takes white, drop"), ("max_image_pixels=1e9", "a whole number")]:
        with pytest.raises(ValueError, match=message):
            make_dataset(dataset_str=f"{text}:{wrong}")


# Bad images


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.distributed)])
def test_a_bad_image_stops_the_run_with_its_name(num_workers: int) -> None:
    message = ""
    try:
        take(train_loader(Draws(bad=(3,)), num_workers=num_workers), 4)
    except BadImageError as error:
        message = str(error)
        error.__traceback__ = None  # or torch's cycle of references keeps the worker, and waits 5 s for it later
    assert message == "Draws: cannot read image 3, /data/3.png"


@pytest.mark.distributed
def test_a_bad_image_in_a_worker_is_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"nothing")
    dataset = make_dataset(dataset_str=f"ImageFolder:root={tmp_path}", transform=np.asarray)
    loader = make_data_loader(dataset=dataset, batch_size=1, num_workers=1, shuffle=False, sampler_type=None)
    message = ""
    try:
        list(loader)
    except BadImageError as error:
        message = str(error)
        error.__traceback__ = None
    assert re.fullmatch(r"ImageFolder: cannot read image 0, .*/bad\.png: UnidentifiedImageError: .*", message)


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.distributed)])
def test_a_skipped_image_is_replaced_by_the_next_one_counted_and_logged_once(
    num_workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    whole = take(train_loader(), 10)
    with caplog.at_level(logging.WARNING, "dinov3"):
        skipping = take(train_loader(Draws(bad=(3, 4, 9)), on_bad_image="skip", num_workers=num_workers), 10)
    for batch, expected in zip(skipping, whole, strict=True):
        wanted = expected["samples"][:, 0].tolist()
        assert batch["samples"][:, 0].tolist() == [{3: 5, 4: 5, 9: 0}.get(index, index) for index in wanted]
        assert batch["n_bad_images"] == sum({3: 2, 4: 1, 9: 1}.get(index, 0) for index in wanted)
        # The draws are those of the position, as if the image had been there from the start.
        assert torch.equal(batch["samples"][:, 1:], expected["samples"][:, 1:])
        assert torch.equal(batch["masks"], expected["masks"])
    logged = sorted(record.message for record in caplog.records if record.levelno == logging.WARNING)
    assert [message.split(";")[0] for message in logged] == [
        f"Draws: cannot read image {index}, /data/{index}.png" for index in (3, 4, 9)
    ]


def test_replacement_is_the_same_after_a_resume() -> None:
    dataset = Draws(bad=(0, 3, 4))
    whole = take(train_loader(dataset, on_bad_image="skip"), 8)
    assert_same(take(train_loader(dataset, on_bad_image="skip", first_batch=5), 3), whole[5:])


@pytest.mark.parametrize(("length", "tries"), [(5, 5), (300, 101)])
def test_replacement_gives_up_after_a_hundred_tries(length: int, tries: int) -> None:
    dataset = Draws(bad=tuple(range(length)), length=length)
    with pytest.raises(BadImageError, match=rf"none of {tries} images in a row .*cannot read image \d+, /data/"):
        take(train_loader(dataset, on_bad_image="skip"), 1)


def test_other_errors_are_not_skipped() -> None:
    class Broken(Draws):
        def __getitem__(self, index: int) -> list[float]:
            raise KeyError("a mistake in a transform")

    with pytest.raises(KeyError, match="a mistake in a transform"):
        take(train_loader(Broken(), on_bad_image="skip"), 1)


def test_truncated_image_of_a_folder_is_skipped(images: Path, tmp_path: Path) -> None:
    for number in range(3):
        whole = (images / "even" / "0.png").read_bytes()
        (tmp_path / f"{number}.png").write_bytes(whole[: len(whole) // 2] if number == 1 else whole)
    with pytest.raises(BadImageError, match=r"ImageFolder: cannot read image 1, .*1\.png"):
        take(image_loader(tmp_path), 2)
    batches = take(image_loader(tmp_path, on_bad_image="skip"), 3)
    assert sum(batch["n_bad_images"] for batch in batches) == 2


# Garbage


@pytest.mark.distributed
@pytest.mark.parametrize("training", [True, False])
def test_workers_collect_garbage_although_their_parent_does_not(training: bool) -> None:
    kwargs = {"dataset": MakesGarbage(), "batch_size": 100, "num_workers": 1, "collate_fn": stack}
    loader = train_loader(**kwargs) if training else make_data_loader(**kwargs)
    gc.disable()
    try:
        alive = max(int(batch["samples"].max()) for batch in itertools.islice(loader, 30))
    finally:
        gc.enable()
    assert alive < 1500


def test_worker_initialisation_freezes_enables_and_calls_the_given_function() -> None:
    called = []
    gc.disable()
    try:
        loaders.init_worker(7, then=called.append)
        assert gc.isenabled() and gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
        gc.enable()
    assert called == [7]


def collate_memory(samples: list[Any]) -> dict[str, Any]:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {"megabytes": pages * resource.getpagesize() / 2**20}


class LeavesCycles:
    """The augmentation, and a cycle of 500 objects and 200 kB behind each image, as torchvision leaves smaller ones."""

    def __init__(self) -> None:
        self.augmentation = DataAugmentationDINO((0.3, 1.0), (0.1, 0.3), 1, global_crops_size=32, local_crops_size=16)

    def __call__(self, image: Any) -> Any:
        cycle: list[Any] = [bytearray(200_000), *([] for _ in range(500))]
        cycle.append(cycle)
        return self.augmentation(image)


@pytest.mark.distributed
@pytest.mark.parametrize("source", ["ImageFolder", "WebDataset", "stream"])
def test_memory_of_a_worker_stays_level(source: str, images: Path, tmp_path: Path) -> None:
    files = sorted(images.rglob("*.png"))
    mode = "w:gz" if source == "stream" else "w"
    for shard in range(4):
        members = {f"{number}.png": files[number % len(files)].read_bytes() for number in range(50)}
        write_tar(tmp_path / f"{shard}.tar{mode[1:].replace(':', '.')}", members, mode=mode)
    string = {
        "ImageFolder": f"ImageFolder:root={images}",
        "WebDataset": f"WebDataset:urls={tmp_path}",
        "stream": f"WebDataset:urls={tmp_path}:mode=stream:buffer=64",
    }[source]
    dataset = make_dataset(dataset_str=string, transform=LeavesCycles())
    gc.disable()
    try:
        loader = train_loader(dataset, batch_size=20, num_workers=1, collate_fn=collate_memory)
        used = [batch["megabytes"] for batch in itertools.islice(loader, 10 + 25)]
    finally:
        gc.enable()
    assert max(used[10:]) - used[10] < 20  # the cycles of 500 images would take 100 MB


# Ordinary loaders


def indices(loader: Any, count: int | None = None) -> list[list[int]]:
    return [batch.tolist() for batch in itertools.islice(loader, count)]


def plain_loader(**kwargs: Any) -> Any:
    return make_data_loader(**({"dataset": list(range(N_SAMPLES)), "batch_size": 4, "num_workers": 0} | kwargs))


def test_default_loader_is_endless_and_shuffled_by_its_seed() -> None:
    first = indices(plain_loader(), 6)
    assert indices(plain_loader(), 6) == first
    assert indices(plain_loader(seed=1), 6) != first
    assert sorted(sum(first[:5], [])) == sorted([*range(N_SAMPLES)] * 2)


def test_in_order_without_a_sampler() -> None:
    in_order = plain_loader(sampler_type=None, shuffle=False, drop_last=False)
    assert indices(in_order) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_shuffling_is_honoured_and_seeded_without_a_sampler() -> None:
    def order(seed: int) -> list[int]:
        return sum(indices(plain_loader(sampler_type=None, shuffle=True, seed=seed, drop_last=False)), [])

    assert order(0) == order(0) != order(1)
    assert sorted(order(0)) == list(range(N_SAMPLES)) != order(0)


def test_drop_last_drops_what_is_not_full() -> None:
    assert len(indices(plain_loader(sampler_type=SamplerType.EPOCH))) == 2
    assert len(indices(plain_loader(sampler_type=SamplerType.EPOCH, drop_last=False))) == 3


@pytest.mark.parametrize(("size", "expected"), [(-1, N_SAMPLES), (0, N_SAMPLES), (25, 25)])
def test_an_epoch_has_the_given_size_or_that_of_the_dataset(size: int, expected: int) -> None:
    assert len(plain_loader(sampler_type=SamplerType.EPOCH, sampler_size=size).sampler) == expected


def test_distributed_type_is_torchs_sampler_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaders.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(loaders.distributed, "get_world_size", lambda: 3)
    loader = plain_loader(sampler_type=SamplerType.DISTRIBUTED, shuffle=False, drop_last=False)
    assert isinstance(loader.sampler, DistributedSampler)
    assert indices(loader) == [[1, 4, 7, 0]]


@pytest.mark.parametrize(
    "sampler_type", [SamplerType.INFINITE, SamplerType.SHARDED_INFINITE, SamplerType.SHARDED_INFINITE_NEW]
)
def test_sampler_advance_reaches_the_infinite_samplers(sampler_type: SamplerType) -> None:
    whole = sum(indices(plain_loader(sampler_type=sampler_type), 8), [])
    assert sum(indices(plain_loader(sampler_type=sampler_type, sampler_advance=12), 5), []) == whole[12:]


def test_each_sampler_type_has_its_own_order() -> None:
    make = functools.partial(ShardedInfiniteSampler, sample_count=N_SAMPLES, shuffle=True, seed=3)
    expected = {
        SamplerType.INFINITE: InfiniteSampler(sample_count=N_SAMPLES, shuffle=True, seed=3),
        SamplerType.SHARDED_INFINITE: make(),
        SamplerType.SHARDED_INFINITE_NEW: make(use_new_shuffle_tensor_slice=True),
    }
    for sampler_type, sampler in expected.items():
        batches = indices(plain_loader(sampler_type=sampler_type, seed=3), 5)
        assert sum(batches, []) == list(itertools.islice(sampler, 20)), sampler_type


@pytest.mark.parametrize(
    ("sampler_type", "kwargs", "error"),
    [
        (SamplerType.INFINITE, {"sampler_size": 5}, ValueError),
        (SamplerType.SHARDED_INFINITE, {"sampler_size": 5}, ValueError),
        (SamplerType.SHARDED_INFINITE_NEW, {"sampler_size": 5}, ValueError),
        (SamplerType.DISTRIBUTED, {"sampler_size": 5}, ValueError),
        (SamplerType.DISTRIBUTED, {"sampler_advance": 5}, ValueError),
        (SamplerType.EPOCH, {"sampler_advance": 5}, NotImplementedError),
        (None, {"sampler_size": 5}, ValueError),
        (None, {"sampler_advance": 5}, ValueError),
    ],
)
def test_settings_that_a_sampler_does_not_take_are_refused(
    sampler_type: SamplerType | None, kwargs: dict[str, int], error: type[Exception]
) -> None:
    name = next(iter(kwargs))
    with pytest.raises(error, match=f"{name}=5"):
        plain_loader(sampler_type=sampler_type, **kwargs)


def test_an_iterable_dataset_is_refused_with_the_reason() -> None:
    class Stream(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(3))

    with pytest.raises(TypeError, match=r"Stream is an IterableDataset.*__len__"):
        plain_loader(dataset=Stream())


def test_options_of_workers_are_ignored_without_workers() -> None:
    loader = plain_loader(persistent_workers=True, prefetch_factor=3, timeout=5, multiprocessing_context="spawn")
    assert len(indices(loader, 2)) == 2


def test_options_of_workers_are_passed_on() -> None:
    loader = plain_loader(
        num_workers=1, persistent_workers=True, prefetch_factor=3, timeout=5, multiprocessing_context="spawn"
    )
    assert (loader.persistent_workers, loader.prefetch_factor, loader.timeout) == (True, 3, 5)
    assert loader.multiprocessing_context.get_start_method() == "spawn"


@pytest.mark.parametrize(("device", "pinned"), [("cpu", False), ("cuda", True)])
def test_memory_is_pinned_only_for_cuda(device: str, pinned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaders.runtime, "device", lambda: torch.device(device))
    assert plain_loader().pin_memory == pinned
    assert train_loader().loader.pin_memory == pinned


# Datasets from strings


def double(value: Any) -> Any:
    return (value, value)


def swap(image: Any, target: Any) -> Any:
    return target, image


def test_make_dataset_opens_what_the_string_names(images: Path, caplog: pytest.LogCaptureFixture) -> None:
    string = f"ImageFolder:root={images}"
    with caplog.at_level(logging.INFO, "dinov3"):
        dataset = make_dataset(dataset_str=string, transform=double, target_transform=double)
    assert isinstance(dataset, ImageFolder)
    assert f"{string}: 6 samples" in caplog.text
    (image, same_image), targets = dataset[5]
    assert image is same_image and targets == (1, 1)


def test_make_dataset_takes_transforms_of_both(images: Path) -> None:
    target, image = make_dataset(dataset_str=f"ImageFolder:root={images}", transforms=swap)[0]
    assert target == 0 and image.size == (48, 40)


def test_transforms_are_set_on_datasets_that_do_not_keep_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class Bare:
        def __init__(self, **kwargs: Any) -> None:
            pass

        def __len__(self) -> int:
            return 1

    monkeypatch.setitem(loaders.DATASETS, "ImageFolder", (Bare, loaders.DATASETS["ImageFolder"][1]))
    dataset = make_dataset(dataset_str="ImageFolder:root=/a", transform=double)
    assert (dataset.transform, dataset.target_transform, dataset.transforms) == (double, None, None)


def test_joined_datasets_are_one_after_the_other(images: Path) -> None:
    string = f"ImageFolder:root={images}"
    joined = make_dataset(dataset_str=f"{string}+{string}", transform=double, target_transform=double)
    assert isinstance(joined, ConcatenatedDataset) and len(joined) == 12
    assert joined.get_targets().tolist() == [0, 0, 0, 1, 1, 1] * 2
    assert joined.classes == ["even", "odd"]
    assert joined.get_image_relpath(7) == "even/2.png"
    assert joined.get_image_data(7) == (images / "even/2.png").read_bytes()
    images_of, targets_of = joined[11]
    assert len(images_of) == 2 and targets_of == (1, 1)
    assert joined[-12][1] == (0, 0)
    with pytest.raises(IndexError, match="12 is out of range for 12"):
        joined[12]


def test_joined_datasets_with_other_classes_have_no_labels(images: Path) -> None:
    joined = make_dataset(dataset_str=f"ImageFolder:root={images}+ImageFolder:root={images / 'odd'}")
    assert len(joined) == 9
    assert joined.classes is None and joined.get_targets() is None
    assert joined[0][1] is None and joined.get_target(8) is None


def test_broken_image_of_a_joined_dataset_is_named(images: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"nothing")
    joined = make_dataset(dataset_str=f"ImageFolder:root={images}+ImageFolder:root={tmp_path}")
    with pytest.raises(BadImageError, match=r"image 0, .*broken\.png"):
        joined[6]


@pytest.mark.parametrize(
    "string", ["ImageFolder", "ImageFolder:root=", "ImageNet:root=/a:extra=/b", "ImageNet:split=TRAIN:root=/a:extra="]
)
def test_missing_keys_are_reported_before_anything_is_opened(string: str) -> None:
    with pytest.raises(ValueError, match=r"needs (root|split|extra) as well; Image\w+ needs") as info:
        make_dataset(dataset_str=string)
    assert repr(string) in str(info.value)


def test_datasets_can_be_pickled(images: Path) -> None:
    string = f"ImageFolder:root={images}"
    for dataset_str in (string, f"{string}+{string}"):
        dataset = make_dataset(dataset_str=dataset_str, transform=double)
        copy = pickle.loads(pickle.dumps(dataset))
        assert len(copy) == len(dataset) and copy[1][0][0].tobytes() == dataset[1][0][0].tobytes()


@pytest.mark.parametrize("name", ["CombinedDataLoader", "make_classification_eval_transform", "SamplerType"])
def test_public_names_can_be_imported_from_the_package(name: str) -> None:
    import dinov3.data

    exported: Callable[..., Any] = getattr(dinov3.data, name)
    assert name in dinov3.data.__all__ and exported.__name__ == name


def test_a_root_is_for_datasets_whose_string_names_none(tmp_path: Path) -> None:
    for name in ("given:x=1", "named"):
        (tmp_path / name / "class").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name / "class" / "image.png")
    given = str(tmp_path / "given:x=1")  # not to be written into a dataset string
    assert str(make_dataset(dataset_str="ImageFolder", root=given).root) == given
    named = f"ImageFolder:root={tmp_path / 'named'}"
    assert str(make_dataset(dataset_str=named, root=given).root) == str(tmp_path / "named")


def test_loader_processes_are_no_more_than_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2})
    assert [usable_workers(wanted) for wanted in (0, 2, 3, 8)] == [0, 2, 3, 3]
