"""Lists of names and suggestions in messages."""

from __future__ import annotations

import pytest

from dinov3.utils.messages import did_you_mean, list_names, refuse_unknown_arguments


def test_long_lists_of_names_are_cut() -> None:
    assert list_names(["a", "b"]) == "a, b"
    assert list_names(range(7)) == "0, 1, 2, 3, 4 and 2 more"
    assert list_names([], most=3) == "nothing"


def test_suggestions_ignore_case() -> None:
    assert did_you_mean("imagenet", ["ImageNet", "ADE20K"]) == " (did you mean 'ImageNet'?)"
    assert did_you_mean("xyz", ["ImageNet", "ADE20K"]) == ""
    assert did_you_mean("--times", ["--timeout"]) and not did_you_mean("--times", ["--timeout"], cutoff=0.85)


def test_unknown_arguments_are_named_with_the_nearest_known_one() -> None:
    def build(patch_size: int, depth: int) -> None: ...

    refuse_unknown_arguments(build, {})
    with pytest.raises(TypeError, match=r"pach_size=16 \(did you mean 'patch_size'\?\); it takes patch_size, depth"):
        refuse_unknown_arguments(build, {"pach_size": 16})
