"""The demo from beginning to end, with a training of two steps."""

from __future__ import annotations

import json
import shutil
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from dinov3.configs import DinoV3SetupArgs, get_cfg_from_args, validate
from dinov3.demo import __main__ as command_line
from dinov3.demo import figures, packaged
from dinov3.demo import images as demo_images
from dinov3.demo.run import RANDOM, RECIPE, TRAINED, DemoOptions, run_demo
from dinov3.train.loop import Trainer
from tests.demo.test_images import write_folder

TINY = (
    "student.depth=1",
    "train.batch_size_per_gpu=4",
    "train.num_workers=0",
    "crops.local_crops_number=1",
    *(f"{head}.head_{key}" for head in ("dino", "ibot") for key in ("n_prototypes=16", "hidden_dim=16")),
)


@pytest.fixture(scope="module")
def small():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(demo_images, "USER_MIN_TRAIN_IMAGES", 8)
        monkeypatch.setattr(demo_images, "TILES_PER_PHOTO", 1)
        monkeypatch.setattr(figures, "PATCHES_ON_SHORT_SIDE", 6)
        monkeypatch.setattr(figures, "DPI", 50)
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory, small):
    """A directory with a finished demo on classes of one's own, its results, and what it printed."""
    directory = tmp_path_factory.mktemp("demo")
    with redirect_stdout(StringIO()) as printed:
        results = run_demo(options(directory, images=classes(directory), seed=3))
    return directory, results, printed.getvalue()


def options(tmp_path: Path, **settings: object) -> DemoOptions:
    return DemoOptions(output_dir=tmp_path / "out", **({"iterations": 2, "overrides": TINY} | settings))


def classes(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "mine", [f"{name}/{i}.png" for name in ("cat", "dog") for i in range(4)])


def test_the_recipe_is_valid_and_its_lengths_are_shares_of_the_run():
    cfg = get_cfg_from_args(DinoV3SetupArgs(RECIPE, opts=["train.dataset_path=ImageFolder:root=."]))
    validate(cfg)
    assert cfg.optim.epochs == 1 and cfg.optim.warmup_epochs < 1 and cfg.student.arch == "vit_tiny"


def test_classes_of_ones_own_are_classified_before_and_after_training(done):
    _, results, printed = done
    assert results.accuracy.keys() == {"labelled"}
    assert results.accuracy["labelled"].keys() == {"class token", "mean patch token"}
    for by_model in results.accuracy["labelled"].values():
        assert by_model.keys() == {RANDOM, TRAINED} and all(0 <= value <= 100 for value in by_model.values())
    assert all(Path(path).exists() for path in results.files.values()) and len(results.files) == 5
    assert "6-NN accuracy on 2 held-out images (labelled)" in printed
    assert all(path in printed for path in results.files.values())


def test_results_are_recorded(done):
    directory, results, _ = done
    record = json.loads((directory / "out" / "results.json").read_text())
    assert record["seed"] == 3 and record["iterations"] == 2 and record["accuracy"] == results.accuracy


def test_a_second_start_trains_nothing_and_finds_the_same(done, capsys):
    directory, results, _ = done
    second = run_demo(options(directory, images=directory / "mine", seed=3))
    printed = capsys.readouterr().out
    assert "wrote" in printed or "using again" in printed
    assert "nothing left to train" in printed and second.accuracy == results.accuracy


def test_photos_without_classes_are_drawn_but_not_classified_and_a_training_on_them_resumes(
    tmp_path, small, monkeypatch, capsys
):
    wanted = options(
        tmp_path,
        images=write_folder(tmp_path / "mine", ["a.png", "b.png"]),
        iterations=3,
        overrides=(*TINY, "checkpointing.period=1"),
    )
    done: list[int] = []
    step, interrupt = Trainer.step, iter([True])

    def interrupted_once(trainer, batches, iteration):
        if iteration == 2 and next(interrupt, False):
            raise KeyboardInterrupt
        done.append(iteration)
        return step(trainer, batches, iteration)

    monkeypatch.setattr(Trainer, "step", interrupted_once)
    with pytest.raises(KeyboardInterrupt):
        run_demo(wanted)
    results = run_demo(wanted)
    assert done == [0, 1, 2] and not list((tmp_path / "out").glob("run.before-*"))
    assert results.accuracy == {} and (tmp_path / "out" / "pca.png").is_file()
    assert "no k-NN: the images have no class folders" in capsys.readouterr().out


def test_other_settings_train_again_and_keep_the_earlier_run(done, tmp_path, capsys):
    directory = Path(shutil.copytree(done[0], tmp_path / "copy"))
    run_demo(options(directory, images=done[0] / "mine", seed=1))
    assert "starts afresh" in capsys.readouterr().out
    (aside,) = (directory / "out").glob("run.before-*")
    assert (aside / "teacher_checkpoint.pth").exists()
    assert (directory / "out" / "run" / "teacher_checkpoint.pth").exists()


def test_a_bad_folder_is_an_error_before_anything_is_trained(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a directory"):
        run_demo(options(tmp_path, images=tmp_path / "no_such"))
    assert not (tmp_path / "out" / "run").exists()


def test_a_wrong_setting_is_an_error_before_anything_is_trained(tmp_path):
    folder = write_folder(tmp_path / "mine", ["a.png"])
    with pytest.raises(ValueError, match=r"optim\.lrr.*optim\.lr"):
        run_demo(options(tmp_path, images=folder, overrides=("optim.lrr=1",)))
    assert not (tmp_path / "out" / "run").exists()


@pytest.mark.slow
def test_packaged_images_go_through_the_whole_demo(tmp_path, small, monkeypatch):
    digits, labels = packaged.load_digits()
    monkeypatch.setattr(packaged, "load_digits", lambda: (digits[:300], labels[:300]))
    results = run_demo(options(tmp_path))
    assert results.accuracy.keys() == {"digits", "faces"}
    # Ten classes, and two: even random features are better than guessing.
    assert results.accuracy["digits"]["mean patch token"][RANDOM] > 20
    assert results.accuracy["faces"]["mean patch token"][RANDOM] > 60


class TestCommandLine:
    def test_flags_and_settings_in_any_order(self):
        parsed = command_line.parse_args(["optim.lr=1", "--seed", "3", "--images", "x", "a.b=c", "--iterations", "7"])
        assert parsed == DemoOptions(Path("outputs/demo"), Path("x"), 3, 7, ("optim.lr=1", "a.b=c"))

    @pytest.mark.parametrize("arguments", [["word"], ["--iteration", "3"], ["--iterations", "0"]])
    def test_what_it_does_not_know_is_refused(self, arguments, capsys):
        with pytest.raises(SystemExit, match="2"):
            command_line.parse_args(arguments)
        assert "usage:" in capsys.readouterr().err

    def test_help_names_every_flag(self, capsys):
        with pytest.raises(SystemExit, match="0"):
            command_line.parse_args(["--help"])
        text = capsys.readouterr().out
        assert all(flag in text for flag in ("--output-dir", "--images", "--seed", "--iterations", "key=value"))
