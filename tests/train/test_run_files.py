"""What a run writes, and when."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dinov3.train import main
from tests.parity import golden

from . import tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run-files")
    config = tiny.write_config(
        root / "tiny.yaml",
        tiny.write_images(root / "images"),
        train={"OFFICIAL_EPOCH_LENGTH": 4, "print_freq": 10, "tensorboard": True},
        evaluation={"eval_period_iterations": 4},
        checkpointing={"period": 2, "max_to_keep": 2, "keep_every": 4},
    )
    main(["--config-file", str(config), "--output-dir", str(root / "out")])
    return root / "out"


def test_files_are_those_of_the_published_layout(run: Path) -> None:
    expected = golden.case("trainer", "run-files")["expect"]
    assert sorted(path.name for path in (run / "ckpt").iterdir()) == sorted(expected["ckpt"])
    assert all((run / "eval" / name).is_file() for name in expected["eval"])
    assert all((run / name).is_file() for name in expected["top"])
    assert [line["iteration"] for line in tiny.read_metrics(run)] == expected["metric_iterations"]
    keys = list(tiny.read_metrics(run)[0])
    assert [key for key in keys if key in expected["metric_keys"]] == expected["metric_keys"]


def test_end_of_a_run_leaves_teacher_link_curves_and_tensorboard(run: Path) -> None:
    link = run / "teacher_checkpoint.pth"
    assert link.is_symlink() and link.resolve() == run / "eval" / "training_7" / "teacher_checkpoint.pth"
    assert (run / "loss_curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((run / "tensorboard").glob("events.*"))
    assert not list(run.rglob(".tmp-*"))


def test_teacher_file_holds_backbone_and_heads(run: Path) -> None:
    teacher = tiny.read_teacher(run)
    assert {name.split(".")[0] for name in teacher} == {"backbone", "dino_head", "ibot_head"}
    assert all(tensor.isfinite().all() for tensor in teacher.values())


def test_checkpoint_holds_each_network_once(run: Path) -> None:
    from torch.distributed.checkpoint import FileSystemReader

    names = FileSystemReader(run / "ckpt" / "7").read_metadata().state_dict_metadata
    assert any(name.startswith("model.model_ema.backbone.") for name in names)
    assert not any(name.startswith("model.teacher.") for name in names)


def test_longer_run_continues_where_the_shorter_one_ended(run: Path, tmp_path: Path) -> None:
    expected = golden.case("trainer", "run-files")["expect"]["resumed_with_epochs_3_starts_at"]
    longer = shutil.copytree(run, tmp_path / "longer", symlinks=True)
    config = longer / "config.yaml"
    main(["--config-file", str(config), "--output-dir", str(longer), "optim.epochs=3", "train.print_freq=1"])
    iterations = [line["iteration"] for line in tiny.read_metrics(longer)]
    assert iterations[2:] == list(range(expected, 12))
