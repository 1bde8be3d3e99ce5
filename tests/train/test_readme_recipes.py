"""The README's commands for the published recipes, with a tiny network and tiny images added."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from dinov3.run.arguments import parse_arguments
from dinov3.train import main
from tests.multiprocess import launch

from . import tiny

REPOSITORY = Path(__file__).parents[2]

LAUNCHER = "python -m dinov3.run.submit "
TINY = (
    "train.dataset_path=ImageFolder:root=images student.arch=vit_tiny student.depth=1 student.ffn_ratio=null "
    "student.layerscale=0.1 dino.head_n_prototypes=64 dino.head_hidden_dim=64 dino.head_bottleneck_dim=64 "
    "ibot.head_n_prototypes=64 ibot.head_hidden_dim=64 ibot.head_bottleneck_dim=64 crops.local_crops_number=1 "
    "train.batch_size_per_gpu=4 train.num_workers=0 train.OFFICIAL_EPOCH_LENGTH=1 train.compile=false "
    "train.tensorboard=false train.print_freq=1 checkpointing.period=2"
)
SMALL = "crops.global_crops_size=32 crops.local_crops_size=16"
RISING = "schedules.lr.warmup_epochs=1 schedules.teacher_temp.warmup_epochs=1 schedules.lr.freeze_last_layer_epochs=1"
#: By a word that only one of the commands has.
OVERRIDES = {
    "pretrain.yaml": f"{SMALL} {RISING} optim.epochs=2",
    "gram_anchor.yaml": (
        f"{SMALL} {RISING} optim.epochs=5 crops.gram_teacher_crops_size=48 gram.it_first_update=3 "
        "gram.update_frequency=1 gram.loss_weight_schedule.warmup_epochs=2 "
        "dino.local_loss_weight_schedule.warmup_epochs=2"
    ),
    "high_res_adapt.yaml": (
        "optim.epochs=2 crops.global_crops_size=[32,48,48,48,48] crops.local_crops_size=[16,16,32,32,32] "
        "crops.gram_teacher_crops_size=[48,64,64,64,64] schedules.lr.cosine_epochs=1 "
        "dino.koleo_distributed_loss_group_size=4"
    ),
    "multi_distillation.yaml": (
        f"{SMALL} optim.epochs=2 schedules.lr.cosine_epochs=1 multidistillation.global_batch_size=4 "
        "'multidistillation.students=[{name: a, config_path: dinov3/configs/train/lvd1689m_students/vits_mlp4_4.yaml, "
        "ranks_range: [0, 1]}, {name: b, config_path: dinov3/configs/train/lvd1689m_students/vitb_mlp4_3.yaml, "
        "ranks_range: [1, 2]}]'"
    ),
}


def commands() -> list[str]:
    """The lines of the README's section, continued ones joined."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    section = text[text.index("### The published recipes") :]
    block = re.search(r"```bash\n(.*?)```", section, re.DOTALL)
    assert block is not None
    return block[1].replace("\\\n", " ").strip().splitlines()


def train_in(directory: Path, arguments: list[str]) -> None:
    os.chdir(directory)
    main(arguments)


def run(command: str, directory: Path) -> None:
    """Run a line of the README as the launcher would, though with fewer processes and no new interpreter."""
    if not command.startswith(LAUNCHER):
        subprocess.run(["bash", "-c", command], cwd=directory, check=True)
        return
    (extra,) = [extra for word, extra in OVERRIDES.items() if word in command]
    args = parse_arguments([*shlex.split(command.removeprefix(LAUNCHER)), "--cluster", "slurm", "--dry-run"])
    assert args.module_path == "dinov3/train/train.py"
    arguments = [*args.script_args, "--output-dir", args.output_dir, *shlex.split(f"{TINY} {extra}")]
    n_processes = 2 if "--multi-distillation" in arguments else 1
    launch(train_in, n_processes, directory, arguments, output=directory / "said.txt")


@pytest.mark.distributed
@pytest.mark.slow
def test_published_recipes_follow_each_other(tmp_path: Path) -> None:
    tiny.write_images(tmp_path / "images", count=8, size=48)
    lines = commands()
    assert sum(line.startswith(LAUNCHER) for line in lines) == len(OVERRIDES)
    for line in lines:
        run(line, tmp_path)

    outputs = tmp_path / "outputs"
    iterations = {name: read_iterations(outputs / name) for name in ("stage1", "stage2", "stage3")}
    assert iterations == {"stage1": [0, 1], "stage2": [2, 3, 4], "stage3": [0, 1]}
    last = tiny.read_metrics(outputs / "stage2")[-1]
    assert last["gram_loss_weight"] == 2.0 and last["gram_loss"] > 0
    for student in ("a", "b"):
        assert (outputs / "students" / student / "teacher_checkpoint.pth").exists()
        assert read_iterations(outputs / "students" / student) == [0, 1]


def read_iterations(run: Path) -> list[int]:
    return [line["iteration"] for line in tiny.read_metrics(run)]
