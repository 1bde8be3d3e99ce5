"""The README's commands for the published recipes, word for word, with a tiny network and tiny images added."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from . import tiny

REPOSITORY = Path(__file__).parents[2]

HERE = "--cluster local --nodes 1 --ngpus 0 --wait"
TINY = (
    "train.dataset_path=ImageFolder:root=images student.arch=vit_tiny student.depth=2 student.ffn_ratio=null "
    "student.layerscale=0.1 dino.head_n_prototypes=64 dino.head_hidden_dim=64 dino.head_bottleneck_dim=64 "
    "ibot.head_n_prototypes=64 ibot.head_hidden_dim=64 ibot.head_bottleneck_dim=64 crops.local_crops_number=2 "
    "train.batch_size_per_gpu=4 train.num_workers=0 train.OFFICIAL_EPOCH_LENGTH=1 train.compile=false "
    "train.tensorboard=false train.print_freq=1 checkpointing.period=2"
)
SMALL = "crops.global_crops_size=64 crops.local_crops_size=32"
RISING = "schedules.lr.warmup_epochs=1 schedules.teacher_temp.warmup_epochs=1 schedules.lr.freeze_last_layer_epochs=1"
#: By a word that only one of the commands has.
OVERRIDES = {
    "pretrain.yaml": f"{SMALL} {RISING} optim.epochs=2",
    "gram_anchor.yaml": (
        f"{SMALL} {RISING} optim.epochs=5 crops.gram_teacher_crops_size=96 gram.it_first_update=3 "
        "gram.update_frequency=1 gram.loss_weight_schedule.warmup_epochs=2 "
        "dino.local_loss_weight_schedule.warmup_epochs=2"
    ),
    "high_res_adapt.yaml": (
        "optim.epochs=2 crops.global_crops_size=[64,96,96,96,96] crops.local_crops_size=[32,32,48,64,64] "
        "crops.gram_teacher_crops_size=[96,128,128,128,128] schedules.lr.cosine_epochs=1 "
        "dino.koleo_distributed_loss_group_size=4"
    ),
    "multi_distillation.yaml": (
        f"--tasks-per-node 2 {SMALL} optim.epochs=2 schedules.lr.cosine_epochs=1 multidistillation.global_batch_size=4 "
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


def overridden(command: str) -> str:
    found = [extra for word, extra in OVERRIDES.items() if word in command]
    return " ".join([command, HERE, TINY, *found]) if found else command


@pytest.mark.distributed
@pytest.mark.slow
def test_published_recipes_follow_each_other(tmp_path: Path) -> None:
    tiny.write_images(tmp_path / "images", count=16, size=64)
    (tmp_path / "dinov3").symlink_to(REPOSITORY / "dinov3")
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "DINOV3_DEVICE": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    lines = commands()
    assert sum(any(word in line for word in OVERRIDES) for line in lines) == len(OVERRIDES)
    for line in lines:
        completed = subprocess.run(
            ["bash", "-c", overridden(line)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert completed.returncode == 0, f"{line}\n{completed.stdout[-2000:]}\n{completed.stderr[-4000:]}"

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
