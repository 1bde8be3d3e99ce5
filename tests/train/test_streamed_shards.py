"""Training on tar shards that are read from front to back."""

from __future__ import annotations

from pathlib import Path

import pytest

from dinov3.train import main
from tests.data.tars import cut_off, write_tar

from . import tiny


@pytest.fixture
def shards(tmp_path: Path) -> str:
    """The string of four compressed shards of three images each, of which the last ends early."""
    images = sorted(tiny.write_images(tmp_path / "images").rglob("*.png"))
    for number in range(4):
        members = {path.name: path.read_bytes() for path in images[3 * number : 3 * number + 3]}
        path = write_tar(tmp_path / f"{number}.tar.gz", members, mode="w:gz")
    cut_off(path, path.stat().st_size * 4 // 5)
    return f"WebDataset:urls={tmp_path}/{{0..3}}.tar.gz:mode=stream:buffer=5"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tiny.write_config(tmp_path / "tiny.yaml", tmp_path, train={"OFFICIAL_EPOCH_LENGTH": 3})


def test_a_shard_that_ends_early_stops_the_run_before_it_begins(config: Path, shards: str, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"3\.tar\.gz ends early or is damaged, at byte \d+ .*train\.on_bad_image=skip"
    ):
        main(["--config-file", str(config), "--output-dir", str(tmp_path / "run"), f"train.dataset_path={shards}"])


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_resumed_run_on_what_can_be_read_equals_the_uninterrupted_one(
    config: Path, shards: str, tmp_path: Path
) -> None:
    def run(output: Path) -> None:
        options = [f"train.dataset_path={shards}", "train.on_bad_image=skip", "train.num_workers=2"]
        main(["--config-file", str(config), "--output-dir", str(output), *options, "checkpointing.period=2"])

    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run(whole)
    tiny.copy_as_killed(whole, resumed, after=3)
    run(resumed)

    assert "using its 2 complete samples" in (whole / "logs" / "log.txt").read_text()
    assert tiny.read_losses(resumed) == tiny.read_losses(whole)
    tiny.assert_same_weights(tiny.read_teacher(resumed), tiny.read_teacher(whole))
