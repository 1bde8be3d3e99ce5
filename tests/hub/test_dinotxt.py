"""The published model of images and texts by name: where its weights and its vocabulary may come from."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov3.heads.dinotxt.model import DINOTxt
from dinov3.heads.dinotxt.tokenizer import Tokenizer
from dinov3.hub.backbones import Weights
from dinov3.hub.dinotxt import dinov3_vitl16_dinotxt_tet1280d20h24l, get_tokenizer
from dinov3.utils.weight_files import WeightsError
from tests.hub.small_dinotxt import BACKBONE, make_published_dinotxt_small, write_dinotxt


@pytest.fixture(autouse=True)
def small_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The published sizes are those of tests, and the cache is empty."""
    make_published_dinotxt_small(monkeypatch)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    """A filled model, and the paths of its parts."""
    return write_dinotxt(tmp_path)


def load(files: dict[str, Any], **kwargs: Any) -> DINOTxt:
    arguments = {"weights": files["head"], "backbone_weights": files["backbone"], **kwargs}
    return dinov3_vitl16_dinotxt_tet1280d20h24l(**arguments)[0]


def assert_holds(model: DINOTxt, state: dict[str, Tensor]) -> None:
    entries = model.state_dict()
    assert entries.keys() == state.keys() and not model.training
    assert [name for name, entry in entries.items() if not torch.equal(entry, state[name])] == []


def test_two_files_give_the_model(files: dict[str, Any]) -> None:
    assert_holds(load(files), files["state"])


def test_whole_files_and_state_dicts(files: dict[str, Any], tmp_path: Path) -> None:
    torch.save({"model": files["state"]}, tmp_path / "whole.pth")
    assert_holds(load(files, weights=tmp_path / "whole.pth"), files["state"])
    assert_holds(load(files, weights=files["state"]), files["state"])
    model = load(files, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_missing_scale_is_the_first_one_and_other_differences_are_errors(
    files: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    head = {name: entry for name, entry in files["state"].items() if not name.startswith(BACKBONE)}
    scale = head.pop("logit_scale")
    model = load(files, weights=head)
    assert model.logit_scale.tolist() == [pytest.approx(2.6592600)] and "lacks logit_scale" in caplog.text
    with pytest.raises(WeightsError, match=r"1 missing \(text_model.head.linear_projection.weight\)"):
        load(files, weights={name: entry for name, entry in head.items() if not name.startswith("text_model.head")})
    with pytest.raises(WeightsError, match=r"1 unknown \(text_model.extra\)"):
        load(files, weights=head | {"logit_scale": scale, "text_model.extra": scale})


def test_the_other_backbone_is_warned_of(files: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    load(files)
    assert caplog.text == ""
    dinov3_vitl16_dinotxt_tet1280d20h24l(pretrained=False, backbone_weights=Weights.SAT493M)
    assert "with that of SAT493M, texts do not fit" in caplog.text


def test_vocabularies(tmp_path: Path) -> None:
    from open_clip.tokenizer import default_bpe

    shutil.copy(default_bpe(), tmp_path / "v.txt.gz")
    for tokenizer in (get_tokenizer(), get_tokenizer(str(tmp_path / "v.txt.gz"))):
        assert isinstance(tokenizer, Tokenizer) and tokenizer.encode("a dog") == [320, 1929]
    with pytest.raises(FileNotFoundError, match="no vocabulary at"):
        get_tokenizer(str(tmp_path / "missing.gz"))
    (tmp_path / "other.gz").write_bytes(gzip.compress(b"x"))
    with pytest.raises(ValueError, match="is not a vocabulary"):
        dinov3_vitl16_dinotxt_tet1280d20h24l(pretrained=False, bpe_path_or_url=str(tmp_path / "other.gz"))
    with pytest.raises(FileNotFoundError, match=r"no vocabulary at http://127.0.0.1:9/v.gz: could not download"):
        get_tokenizer("http://127.0.0.1:9/v.gz")
