"""Finding texts in a photo: the cosines, and the pictures that the command writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dinov3.eval.text import locate as command
from dinov3.eval.text.config import TextModelConfig
from dinov3.eval.text.locate import locate
from dinov3.eval.text.model import load_text_model
from dinov3.utils.pixel_statistics import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from tests.eval.dense import scenes
from tests.hub.small_dinotxt import make_published_dinotxt_small, write_dinotxt

TEXTS = ("a cat", "a $1 cup / mug")


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    make_published_dinotxt_small(monkeypatch)
    return write_dinotxt(tmp_path)


def arguments(weights: dict[str, Any], tmp_path: Path, *texts: str) -> list[str]:
    files = ["--weights", str(weights["head"]), "--backbone-weights", str(weights["backbone"])]
    photo = ["--image", str(tmp_path / "photo.png"), "--out", str(tmp_path / "maps"), "--size", "48"]
    return [*photo, *files, "--texts", *texts]


@torch.no_grad()
def test_cosines_are_those_of_patches_and_texts(weights: dict[str, Any]) -> None:
    model = load_text_model(TextModelConfig(str(weights["head"]), str(weights["backbone"])))
    photo = scenes.scene(0)[0]  # 48 x 64
    got = locate(model, photo, TEXTS, short_side=48)
    texts = model.model.encode_text(model.tokenizer.tokenize(TEXTS))
    texts = F.normalize(texts[:, texts.shape[1] // 2 :], dim=-1)
    pixels = torch.from_numpy(np.array(photo)) / 255
    image = ((pixels - torch.tensor(IMAGENET_DEFAULT_MEAN)) / torch.tensor(IMAGENET_DEFAULT_STD)).permute(2, 0, 1)
    patches = model.model.encode_image_with_patch_tokens(image[None])[1]
    cosines = (F.normalize(patches, dim=-1) @ texts.mT).mT.unflatten(2, (3, 4))
    torch.testing.assert_close(got, F.interpolate(cosines, (48, 64), mode="bilinear")[0], atol=1e-5, rtol=0)


def test_the_command_writes_a_map_per_text_and_the_labels(
    weights: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenes.scene(0)[0].save(tmp_path / "photo.png")
    assert command.main(arguments(weights, tmp_path, *TEXTS)) == 0
    names = sorted(path.name for path in (tmp_path / "maps").iterdir())
    assert names[0] == "photo_0_a_cat.png" and names[1].startswith("photo_1_a__1_cup___mug-")
    assert names[2:] == ["photo_labels.png"]
    assert all(min(Image.open(tmp_path / "maps" / name).size) > 200 for name in names)  # enlarged, to be read
    assert capsys.readouterr().out.count("written to ") == 3


def test_bad_input_is_refused(weights: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"--image .*photo.png cannot be read as an image: FileNotFoundError"):
        command.main(arguments(weights, tmp_path, "a cat"))
    (tmp_path / "photo.png").write_text("not an image")
    with pytest.raises(ValueError, match="cannot be read as an image"):
        command.main(arguments(weights, tmp_path, "a cat"))
    scenes.scene(0)[0].save(tmp_path / "photo.png")
    with pytest.raises(ValueError, match="text 2 of 2 is empty"):
        command.main(arguments(weights, tmp_path, "a cat", " "))
    with pytest.raises(SystemExit):
        command.main(arguments(weights, tmp_path))
    assert "--texts: expected at least one argument" in capsys.readouterr().err
