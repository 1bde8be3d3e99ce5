"""The datasets of a segmentation run."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from dinov3.eval.segmentation.config import SegmentationConfig
from dinov3.eval.segmentation.data import make_segmentation_dataset


@pytest.mark.parametrize("n_classes", [1, 2])
def test_head_of_one_class_is_remarked(n_classes: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for folder, value in (("images", 100), ("labels", 255)):
        (tmp_path / folder).mkdir()
        Image.new("L", (32, 32), value).save(tmp_path / folder / "a.png")
    config = SegmentationConfig()
    config.decoder_head.num_classes, config.eval.reduce_zero_label = n_classes, False
    config.datasets.train = f"SegmentationFolder:root={tmp_path}"
    make_segmentation_dataset(config, "train")
    assert ("masks of 0 and 255 have one class only" in caplog.text) == (n_classes == 1)
