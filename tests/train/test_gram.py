"""When the Gram teacher ages, which patches are compared, and what happens to a run that is resumed."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from dinov3.checkpointer import checkpoint_holds, save_checkpoint
from dinov3.configs import get_default_config
from dinov3.train.gram import GramCalendar, resize_patches, select_patches, warn_of_idle_gram
from dinov3.train.loop import Trainer
from dinov3.train.ssl_meta_arch import SSLMetaArch
from dinov3.train.train import build_model

from . import tiny

GRAM = {"gram": {"use_loss": True}, "crops": {"gram_teacher_crops_size": 48}}


def config(directory: Path, gram: dict[str, Any]) -> Any:
    settings = {"train": {"output_dir": str(directory)}, "gram": gram}
    return OmegaConf.merge(get_default_config(), tiny.CONFIG, GRAM, settings)


def write_gram_teacher(directory: Path) -> Path:
    arch = SSLMetaArch(OmegaConf.merge(get_default_config(), tiny.CONFIG))
    arch.init_weights()
    path = directory / "gram.pth"
    torch.save({"teacher": arch.model_ema.state_dict()}, path)
    return path


@pytest.mark.parametrize("maximum", [None, 0, 2])
@pytest.mark.parametrize(("first", "frequency"), list(itertools.product([0, 1, 6, 15], [1, 6, 10])))
def test_a_resumed_run_refreshes_as_the_uninterrupted_one(first: int, frequency: int, maximum: int | None) -> None:
    calendar = GramCalendar(repeats=True, first=first, frequency=frequency, maximum=maximum)
    whole = [iteration for iteration in range(60) if calendar.refreshes_after(iteration)]
    due = [n for n in range(60) if n + 1 >= max(first, 1) and (n + 1) % frequency == 0]
    assert whole == due[:maximum]
    for start in range(60):
        assert calendar.n_refreshes(start) == len([iteration for iteration in whole if iteration < start])


def test_no_calendar_without_a_gram_teacher(tmp_path: Path) -> None:
    cfg = config(tmp_path, {"ema_teacher": True, "it_load_ema_teacher": 3})
    calendar = GramCalendar.from_config(cfg)
    assert not any(calendar.loads_before(i) or calendar.refreshes_after(i) for i in range(20))


def test_patches_of_another_grid_are_interpolated() -> None:
    ramp = torch.arange(4.0).repeat(1, 4, 1).flatten(1).unsqueeze(-1)  # [1, 16, 1], growing from left to right
    smaller = resize_patches(ramp, 4, mode="bilinear", antialias=False).reshape(2, 2)
    torch.testing.assert_close(smaller, torch.tensor([[0.5, 2.5], [0.5, 2.5]]))
    assert resize_patches(ramp, 16, mode="bilinear", antialias=False) is ramp


def test_grids_that_are_not_square_are_refused() -> None:
    with pytest.raises(ValueError, match="6 patches are not a square"):
        resize_patches(torch.zeros(1, 6, 2), 4, mode="bicubic", antialias=False)


def test_masked_and_unmasked_patches_are_complements() -> None:
    patches, masks = (
        torch.arange(8.0).reshape(2, 4, 1),
        torch.tensor([[True, False, False, False], [False] * 3 + [True]]),
    )
    assert select_patches(patches, masks, "masked").flatten().tolist() == [0, 7]
    assert select_patches(patches, masks, "unmasked").flatten().tolist() == [1, 2, 3, 4, 5, 6]
    assert select_patches(patches, masks, "all") is patches


def test_a_step_without_gram_weights_says_where_they_come_from(tmp_path: Path) -> None:
    arch = SSLMetaArch(config(tmp_path, {"it_load_ema_teacher": 3}))
    arch.init_weights()
    patches = {"patch_pre_head": torch.zeros(2, 1, 16, 8)}
    masks = torch.zeros(2, 16, dtype=torch.bool)
    with pytest.raises(ValueError, match="no weights yet: give gram.ckpt=FILE"):
        arch.get_gram_teacher_output(torch.zeros(2, 3, 48, 48), masks=masks, teacher_global={}, student_global=patches)
    arch.gram_load_ema_teacher()
    with pytest.raises(ValueError, match="crops.gram_teacher_crops_size"):
        arch.get_gram_teacher_output(None, masks=masks, teacher_global={}, student_global=patches)


def test_refresh_replaces_weights_that_are_not_finite(tmp_path: Path) -> None:
    arch = SSLMetaArch(config(tmp_path, {"it_load_ema_teacher": 3}))
    arch.init_weights()
    assert arch.gram_teacher is not None
    assert arch.gram_teacher["backbone"].cls_token.isnan().all()
    arch.update_gram()
    torch.testing.assert_close(arch.gram_teacher["backbone"].state_dict(), arch.model_ema["backbone"].state_dict())


def test_stage_without_gram_is_continued_by_one_with(tmp_path: Path) -> None:
    first = Trainer(cfg := OmegaConf.merge(get_default_config(), tiny.CONFIG), build_model(cfg))
    first.model.init_weights()
    save_checkpoint(tmp_path / "ckpt" / "9", iteration=9, model=first.model, optimizer=first.optimizer)

    cfg = config(tmp_path, {"ckpt": str(write_gram_teacher(tmp_path))})
    second = Trainer(cfg, build_model(cfg))
    second.model.init_weights()
    assert second.model.gram_teacher is not None
    before = second.model.gram_teacher["backbone"].cls_token.clone()
    assert second.load(tmp_path / "ckpt" / "9") == 9
    assert torch.equal(second.model.gram_teacher["backbone"].cls_token, before)
    assert torch.equal(second.model.student["backbone"].cls_token, first.model.student["backbone"].cls_token)


def test_gram_teacher_of_a_checkpoint_wins_over_its_first_file(tmp_path: Path) -> None:
    cfg = config(tmp_path, {"ckpt": str(write_gram_teacher(tmp_path))})
    first = Trainer(cfg, build_model(cfg))
    first.model.init_weights()
    first.model.update_gram()
    save_checkpoint(tmp_path / "ckpt" / "9", iteration=9, model=first.model, optimizer=first.optimizer)
    assert checkpoint_holds(tmp_path / "ckpt" / "9", "model.gram_teacher.")

    second = Trainer(cfg, build_model(cfg))
    second.model.init_weights()
    second.load(tmp_path / "ckpt" / "9")
    assert second.model.gram_teacher is not None and first.model.gram_teacher is not None
    torch.testing.assert_close(second.model.gram_teacher.state_dict(), first.model.gram_teacher.state_dict())


def test_a_gram_teacher_that_will_never_come_is_an_error(tmp_path: Path) -> None:
    arch = SSLMetaArch(config(tmp_path, {"it_load_ema_teacher": 3}))
    arch.continue_gram(2, is_loaded=False)  # it comes before iteration 3
    with pytest.raises(ValueError, match="after iteration 3 has no Gram teacher.*it_load_ema_teacher=4"):
        arch.continue_gram(3, is_loaded=False)
    arch.continue_gram(3, is_loaded=True)
    assert arch.gram_teacher_initialized


def test_a_later_stage_that_starts_anew_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="dinov3"):
        warn_of_idle_gram([0.0] * 20 + [2.0] * 80, 100)
        assert not caplog.records
        warn_of_idle_gram([0.0] * 80 + [2.0] * 20, 100)
    assert "weight 0 until iteration 80" in caplog.text
