"""The grammar of dataset strings, and what is said about strings that break it."""

from __future__ import annotations

import pytest

from dinov3.data.datasets import ImageNet
from dinov3.data.datasets.strings import DatasetStringError, parse_dataset_string


def parse(string: str) -> list[tuple[str, dict[str, object]]]:
    return [(dataset.name, dataset.kwargs) for dataset in parse_dataset_string(string)]


@pytest.mark.parametrize(
    ("string", "root"),
    [
        ("ImageFolder:root=/a", "/a"),
        ("ImageFolder:root=s3://bucket/x", "s3://bucket/x"),
        ("ImageFolder:root=C:/data", "C:/data"),
        ("ImageFolder:root=/a=b", "/a=b"),
        ("ImageFolder:root=/a:b/c", "/a:b/c"),
        ("ImageFolder:root=/a:1=2", "/a:1=2"),
        ("ImageFolder:root=/with space/und Umlaut ä", "/with space/und Umlaut ä"),
        ("ImageFolder:root=/a:root=/b", "/b"),
        ("ImageFolder:root=", ""),
        ("ImageFolder:root=/a+b", "/a+b"),
        ("ImageFolder:root=/a+ImageNets", "/a+ImageNets"),
        ("ImageFolder:root=/a+ImageNet/b", "/a+ImageNet/b"),
    ],
)
def test_values_may_hold_separators(string: str, root: str) -> None:
    assert parse(string) == [("ImageFolder", {"root": root})]


def test_all_keys_of_image_folder() -> None:
    assert parse("ImageFolder:root=/a:split=TRAIN:labels=none:extra=/b") == [
        ("ImageFolder", {"root": "/a", "split": "TRAIN", "labels": "none", "extra": "/b"})
    ]


@pytest.mark.parametrize("split", ["TRAIN", "train", "Train"])
def test_split_names_match_whatever_their_case(split: str) -> None:
    assert parse(f"ImageNet:split={split}")[0][1] == {"split": ImageNet.Split.TRAIN}


def test_datasets_are_joined_by_plus() -> None:
    assert parse("ImageFolder:root=/a+b+ImageNet:split=VAL:root=/c+ImageNet") == [
        ("ImageFolder", {"root": "/a+b"}),
        ("ImageNet", {"split": ImageNet.Split.VAL, "root": "/c"}),
        ("ImageNet", {}),
    ]


@pytest.mark.parametrize(
    ("string", "expected"),
    [
        ("", ["unknown dataset ''", "ImageFolder, ImageNet"]),
        ("imagenet", ["unknown dataset 'imagenet'", "did you mean 'ImageNet'"]),
        ("ImageFoldre:root=/a", ["unknown dataset 'ImageFoldre'", "did you mean 'ImageFolder'"]),
        ("/data/photos", ["unknown dataset '/data/photos'", "e.g. 'ImageFolder:root=/data/photos'"]),
        (
            "ImageFolder:rot=/a",
            ["unknown key 'rot'", "did you mean 'root'", "needs root and takes split, labels, extra"],
        ),
        ("ImageFolder:root=/a:lables=none", ["unknown key 'lables'", "did you mean 'labels'"]),
        ("ImageFolder:root", ["'root' is not key=value", "needs root"]),
        ("ImageFolder:", ["'' is not key=value"]),
        ("ImageFolder::root=/a", ["'' is not key=value"]),
        ("ImageFolder:root=/a:labels=folders", ["labels='folders'", "did you mean 'folder'", "auto, folder, none"]),
        ("ImageNet:split=TRIAN", ["unknown split 'TRIAN'", "did you mean 'TRAIN'", "TRAIN, VAL, TEST"]),
        ("ImageNet:labels=none", ["unknown key 'labels'", "ImageNet needs split, root, extra"]),
        ("ImageFolder:root=/a+ImageNet:split=x", ["unknown split 'x'"]),
    ],
)
def test_error_quotes_the_string_names_the_token_and_says_what_is_allowed(string: str, expected: list[str]) -> None:
    with pytest.raises(DatasetStringError) as info:
        parse_dataset_string(string)
    for text in (repr(string), *expected):
        assert text in str(info.value)


def test_the_error_is_a_value_error() -> None:
    assert issubclass(DatasetStringError, ValueError)
