"""Starting from a released backbone or an earlier teacher, and training fresh heads first."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from dinov3.checkpointer import CheckpointError, save_checkpoint
from dinov3.configs import ConfigError, find_problems, get_default_config
from dinov3.hub import sources
from dinov3.hub.weights import WeightsError
from dinov3.train.loop import Trainer
from dinov3.train.ssl_meta_arch import SSLMetaArch
from dinov3.train.train import build_model

from . import tiny


def config(**sections: Any) -> Any:
    return OmegaConf.merge(get_default_config(), tiny.CONFIG, sections)


def initialised(cfg: Any) -> SSLMetaArch:
    arch = SSLMetaArch(cfg)
    arch.init_weights()
    return arch


@functools.cache
def earlier() -> SSLMetaArch:
    return initialised(config())


def assert_equal(got: torch.nn.Module, want: torch.nn.Module) -> None:
    torch.testing.assert_close(got.state_dict(), want.state_dict(), rtol=0, atol=0)


def differ(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return any(not torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("form", ["backbone", "teacher", "directory"])
def test_student_and_ema_start_from_a_backbone_with_fresh_heads(form: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    if form == "directory":
        path = tmp_path / "directory"
        save_checkpoint(path, iteration=0, model=earlier().model_ema)
    elif form == "teacher":
        torch.save({"teacher": earlier().model_ema.state_dict()}, path)
    else:
        torch.save(earlier().model_ema["backbone"].state_dict(), path)

    arch = initialised(config(student={"pretrained_weights": str(path)}))
    assert_equal(arch.student["backbone"], earlier().model_ema["backbone"])
    assert_equal(arch.model_ema, arch.student)
    assert differ(arch.student["dino_head"], earlier().student["dino_head"])


def test_a_backbone_from_transformers_is_a_start(tmp_path: Path) -> None:
    from dinov3.hub.convert import convert

    torch.save(earlier().model_ema["backbone"].state_dict(), tmp_path / "release.pth")
    convert(tmp_path / "release.pth", tmp_path / "model", to="huggingface")
    arch = initialised(config(student={"pretrained_weights": str(tmp_path / "model")}))
    assert_equal(arch.student["backbone"], earlier().model_ema["backbone"])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training run with two checkpoints, of which the newer one is that of `earlier()`."""
    root = tmp_path_factory.mktemp("run")
    older = initialised(config(train={"seed": 1}))
    for iteration, arch in ((9, older), (19, earlier())):
        save_checkpoint(root / "ckpt" / str(iteration), iteration=iteration, model=arch)
    (root / "eval" / "training_19").mkdir(parents=True)
    torch.save({"teacher": earlier().model_ema.state_dict()}, root / "eval" / "training_19" / "teacher_checkpoint.pth")
    OmegaConf.save(config(), root / "config.yaml")
    return root


PLACES = [".", "ckpt", "ckpt/19", "eval", "eval/training_19", "eval/training_19/teacher_checkpoint.pth"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("setting", ["pretrained_weights", "resume_from_teacher_chkpt", "gram", "distillation"])
def test_a_run_and_whatever_lies_in_it_is_its_newest_teacher(setting: str, place: str, run: Path) -> None:
    path = str(run / place)
    if setting == "gram":
        arch = initialised(config(gram={"use_loss": True, "ckpt": path, "ema_teacher": False}))
        assert_equal(arch.gram_teacher["backbone"], earlier().model_ema["backbone"])
    elif setting == "distillation":
        teacher = {"enabled": True, "full_cfg_path": str(run / "config.yaml"), "checkpoint_path": path}
        assert_equal(initialised(config(distillation=teacher)).teacher, earlier().model_ema)
    else:
        arch = initialised(config(student={setting: path}))
        assert_equal(arch.student["backbone"], earlier().model_ema["backbone"])


@pytest.mark.parametrize("setting", ["pretrained_weights", "resume_from_teacher_chkpt"])
def test_a_run_without_a_teacher_names_the_setting_and_what_was_looked_for(setting: str, tmp_path: Path) -> None:
    OmegaConf.save(config(), tmp_path / "config.yaml")
    with pytest.raises(
        FileNotFoundError, match=rf"student.{setting}: .*has not saved a teacher yet: looked for eval/training_"
    ):
        initialised(config(student={setting: str(tmp_path)}))


def test_a_checkpoint_of_another_trainer_is_a_start(tmp_path: Path) -> None:
    state = earlier().model_ema["backbone"].state_dict()
    names = {f"model.encoder._orig_mod.{name}": tensor for name, tensor in state.items()}
    torch.save({"state_dict": names | {"model.fc.weight": torch.ones(2)}, "epoch": 3}, tmp_path / "w.ckpt")
    arch = initialised(config(student={"pretrained_weights": str(tmp_path / "w.ckpt")}))
    assert_equal(arch.student["backbone"], earlier().model_ema["backbone"])


def test_student_and_ema_continue_an_earlier_teacher_heads_included(tmp_path: Path) -> None:
    torch.save({"teacher": earlier().model_ema.state_dict()}, tmp_path / "teacher.pth")
    arch = initialised(config(student={"resume_from_teacher_chkpt": str(tmp_path / "teacher.pth")}))
    assert_equal(arch.student, earlier().model_ema)
    assert_equal(arch.model_ema, earlier().model_ema)


@pytest.mark.parametrize("key", ["resume_from_teacher_chkpt", "distillation"])
def test_a_backbone_without_heads_is_no_teacher(key: str, tmp_path: Path) -> None:
    path = tmp_path / "backbone.pth"
    torch.save(earlier().model_ema["backbone"].state_dict(), path)
    OmegaConf.save(config(), tmp_path / "teacher.yaml")
    distillation = {"enabled": True, "full_cfg_path": str(tmp_path / "teacher.yaml"), "checkpoint_path": str(path)}
    changes = {"distillation": distillation} if key == "distillation" else {"student": {key: str(path)}}
    setting = "distillation.checkpoint_path" if key == "distillation" else f"student.{key}"
    with pytest.raises(
        CheckpointError, match=rf"(?s){setting}: .*missing.*student.pretrained_weights.*freeze_backbone"
    ):
        initialised(config(**changes))


def test_a_backbone_of_another_size_names_the_setting(tmp_path: Path) -> None:
    torch.save(initialised(config(student={"depth": 3})).student["backbone"].state_dict(), tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"student.pretrained_weights: .*other.pth does not fit vit_tiny"):
        initialised(config(student={"pretrained_weights": str(tmp_path / "other.pth")}))


def test_a_backbone_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()

    def download(url: str, path: Path, **_: Any) -> None:
        arch = earlier() if "good" in url else initialised(config(student={"depth": 3}))
        torch.save(arch.student["backbone"].state_dict(), path)

    monkeypatch.setattr(sources, "download", download)
    arch = initialised(config(student={"pretrained_weights": "https://host/good/model.pth?Signature=secret"}))
    assert_equal(arch.student["backbone"], earlier().student["backbone"])
    pattern = r"^student.pretrained_weights=https://host/bad/model.pth: \S+/checkpoints/model_\w+.pth does not fit "
    with pytest.raises(WeightsError, match=pattern):
        initialised(config(student={"pretrained_weights": "https://host/bad/model.pth?Signature=secret"}))


def test_a_missing_file_names_the_setting(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"student.pretrained_weights: .*nowhere.pth"):
        initialised(config(student={"pretrained_weights": str(tmp_path / "nowhere.pth")}))


def test_two_origins_are_refused() -> None:
    both = {"pretrained_weights": "a.pth", "resume_from_teacher_chkpt": "b.pth"}
    with pytest.raises(ConfigError, match="are both set"):
        problems = find_problems(config(student=both, train={"dataset_path": "ImageFolder:root=x"}))
        raise ConfigError("; ".join(problems))


def test_while_heads_are_trained_alone_the_backbone_keeps_every_bit(tmp_path: Path) -> None:
    images = tiny.write_images(tmp_path / "images")
    torch.save(earlier().model_ema["backbone"].state_dict(), tmp_path / "backbone.pth")
    cfg = config(
        train={"dataset_path": f"ImageFolder:root={images}", "output_dir": str(tmp_path), "OFFICIAL_EPOCH_LENGTH": 3},
        optim={"epochs": 2, "freeze_backbone_epochs": 1, "warmup_epochs": 0},
        student={"pretrained_weights": str(tmp_path / "backbone.pth")},
        checkpointing={"period": 100},
    )
    trainer = Trainer(cfg, build_model(cfg))
    backbones: list[list[bool]] = []
    heads: list[bool] = []
    update_ema = trainer.model.update_ema
    start = earlier().model_ema

    def observe(momentum: float) -> None:
        update_ema(momentum)
        networks = (trainer.model.student, trainer.model.model_ema)
        backbones.append([differ(network["backbone"], start["backbone"]) for network in networks])
        heads.append(differ(trainer.model.student["dino_head"], trainer.model.model_ema["dino_head"]))

    trainer.model.update_ema = observe  # type: ignore[method-assign]
    trainer.run()
    assert backbones == [[False, False]] * 3 + [[True, True]] * 3
    assert all(heads)
