"""The command line of the trainer: flags and options in any order, and one clear message for each kind of bad input."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinov3.train import get_args_parser, main, train
from dinov3.train.train import parse_args
from dinov3.utils.command_line import run_command_line
from tests.parity import golden

from . import tiny


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return tiny.write_images(tmp_path / "images")


@pytest.fixture
def config(tmp_path: Path, images: Path) -> Path:
    return tiny.write_config(tmp_path / "tiny.yaml", images, train={"OFFICIAL_EPOCH_LENGTH": 1})


def test_parser_has_the_published_flags() -> None:
    actions = {action.dest: action for action in get_args_parser()._actions}
    for name, expected in golden.case("trainer", "train-cli")["expect"].items():
        action = actions[name]
        assert action.option_strings == expected["flags"]
        assert action.default == expected["default"]
        assert action.nargs == expected["nargs"]
        assert (action.type.__name__ if action.type else None) == expected["type"]


def test_flags_and_options_come_in_any_order() -> None:
    args = parse_args(["optim.epochs=1", "--output-dir", "a=b", "--no-resume", "optim.lr=2", "--seed=3"])
    assert args.output_dir == "a=b" and args.no_resume
    assert args.opts == ["optim.epochs=1", "optim.lr=2", "train.seed=3"]


@pytest.mark.parametrize("argv", [["--no-resum"], ["--nosuch"], ["bareword"], ["--output-dir"]])
def test_unknown_flags_and_bare_words_are_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(argv)
    assert argv[0] in capsys.readouterr().err


def test_unknown_flag_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(["--no-resum", "--config_file=a"])
    said = capsys.readouterr().err
    assert "--no-resum (did you mean '--no-resume'?), --config_file=a (did you mean '--config-file'?)" in said


def run(config: Path, output: Path, *options: str) -> Any:
    return main(["--config-file", str(config), "--output-dir", str(output), *options])


def test_unknown_key_suggests_the_nearest(config: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.batch_size_per_gpuu.*train\.batch_size_per_gpu"):
        run(config, tmp_path / "out", "train.batch_size_per_gpuu=3")


def test_wrong_type_names_key_value_and_expected_type(config: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"optim\.epochs=many: expected number"):
        run(config, tmp_path / "out", "optim.epochs=many")


def test_malformed_dataset_string_is_quoted(config: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ImageFolder:rot=/x"):
        run(config, tmp_path / "out", "train.dataset_path=ImageFolder:rot=/x")


def test_missing_dataset_directory_is_named(config: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run(config, tmp_path / "out", f"train.dataset_path=ImageFolder:root={tmp_path}/nowhere")


def test_empty_dataset_directory_says_what_was_looked_for(config: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=r"empty.*png"):
        run(config, tmp_path / "out", f"train.dataset_path=ImageFolder:root={tmp_path}/empty")


def test_unreadable_image_is_named(config: Path, images: Path, tmp_path: Path) -> None:
    (images / "even" / "0.png").write_bytes(b"not an image")
    with pytest.raises(RuntimeError, match=r"0\.png"):
        run(config, tmp_path / "out")


def test_grey_images_of_16_bits_train_as_those_of_8(config: Path, images: Path, tmp_path: Path) -> None:
    losses = []
    for bits, factor in ((8, 1), (16, 257)):
        for path in images.rglob("*.png"):
            if bits == 8:
                Image.open(path).convert("L").save(path)
            else:
                Image.fromarray(np.asarray(Image.open(path)).astype(np.uint16) * factor).save(path)
        run(config, tmp_path / str(bits))
        losses.append(tiny.read_losses(tmp_path / str(bits)))
    assert len(losses[0]) == 2 and losses[0] == losses[1]


@pytest.mark.distributed
def test_an_unreadable_image_ends_the_command_in_two_lines(
    config: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in sorted(images.rglob("*.png"))[1:]:  # the first one is read before the workers start
        path.write_bytes(b"not an image")
    monkeypatch.delenv("DINOV3_TRACEBACK", raising=False)
    with pytest.raises(SystemExit):
        run_command_line(lambda: run(config, tmp_path / "out", "train.num_workers=1"))
    lines = [line for line in capsys.readouterr().err.splitlines() if "png" in line or "Traceback" in line]
    assert len(lines) == 1 and lines[0].startswith("error: ImageFolder: cannot read image ")


def test_truncated_image_is_skipped_counted_and_logged_when_asked(config: Path, images: Path, tmp_path: Path) -> None:
    whole = (images / "odd" / "1.png").read_bytes()
    (images / "odd" / "1.png").write_bytes(whole[: len(whole) // 2])
    run(config, tmp_path / "out", "train.on_bad_image=skip", "train.OFFICIAL_EPOCH_LENGTH=4")
    counts = [line["bad_images"] for line in tiny.read_metrics(tmp_path / "out")]
    assert counts == sorted(counts) and counts[-1] in (2, 3)  # 32 images are drawn in passes over 12
    assert "1.png" in (tmp_path / "out" / "logs" / "log.txt").read_text()


def test_output_directory_that_cannot_be_written_is_refused(config: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RuntimeError, match="output directory .*file/out cannot be made .*give another"):
        run(config, tmp_path / "file" / "out")


def test_batch_of_one_is_too_small_for_koleo(config: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"(?i)koleo.*batch|batch.*koleo"):
        run(config, tmp_path / "out", "train.batch_size_per_gpu=1")


def test_crop_smaller_than_a_patch_is_refused(config: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="local_crops_size"):
        run(config, tmp_path / "out", "crops.local_crops_size=4")


def test_images_smaller_than_a_crop_are_enlarged(config: Path, images: Path, tmp_path: Path) -> None:
    for path in images.rglob("*.png"):
        Image.open(path).resize((7, 5)).save(path)
    run(config, tmp_path / "out")
    assert len(tiny.read_losses(tmp_path / "out")) == 2


def test_checkpoint_of_another_architecture_names_what_differs(config: Path, tmp_path: Path) -> None:
    run(config, tmp_path / "out")
    with pytest.raises(RuntimeError, match=r"head_n_prototypes|dino_head\.last_layer\.weight"):
        run(config, tmp_path / "out", "dino.head_n_prototypes=16", "optim.epochs=3")


def test_second_run_in_the_same_directory_is_refused(config: Path, tmp_path: Path) -> None:
    from dinov3.checkpointer import RunLock

    (tmp_path / "out").mkdir()
    with RunLock(tmp_path / "out"), pytest.raises(RuntimeError, match="out"):
        run(config, tmp_path / "out")


def test_command_prints_one_message_instead_of_a_traceback(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--config-file", str(config), "optim.lrr=1", "--output-dir", str(tmp_path / "out")]
    script = Path(train.__file__)
    monkeypatch.setattr(sys, "argv", [str(script), *options])
    monkeypatch.setattr(sys, "path", [str(script.parent), *sys.path])
    monkeypatch.delenv("DINOV3_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    assert end.value.code == 1 and sys.path[0] == str(script.parents[2])
    printed = capsys.readouterr().err
    assert "error: " in printed and "optim.lr" in printed and "Traceback" not in printed


def test_eval_only_exports_the_newest_teacher(config: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run(config, output, "checkpointing.period=1")
    want = tiny.read_teacher(output)
    for path in (output / "eval").rglob("*.pth"):
        path.unlink()
    run(config, output, "--eval-only")
    tiny.assert_same_weights(tiny.read_teacher(output), want)
