"""Memory and communication of a training per GPU: formulas, from a recipe, and how well they fit measured runs.

    python benchmarks/scaling.py                                     # the tables of docs/scaling.md
    python benchmarks/scaling.py RECIPE.yaml --processes 8 [key=value ...]
    python benchmarks/scaling.py --check                             # against one and two processes on the CPU

Nothing is trained for the tables: the networks are built on the meta device. What each formula counts stands beside it.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from train_step import SMALL, random_batch

from dinov3.configs import DinoV3SetupArgs, apply_scaling_rules_to_cfg, get_cfg_from_args
from dinov3.models.summary import _LiveTensors, count_flops
from dinov3.train.data_loading import crop_resolutions
from dinov3.train.ssl_meta_arch import SSLMetaArch
from dinov3.utils import as_torch_dtype

GIB = 2**30
FLOAT32, BFLOAT16 = 4, 2
IMAGENET = "train.dataset_path=ImageNet:split=TRAIN"
TABLES = (
    ("ViT-L/16, ImageNet-1k", "dinov3/configs/train/vitl_im1k_lin834.yaml", 32, ()),
    ("ViT-7B/16, stage 1", "dinov3/configs/train/dinov3_vit7b16_pretrain.yaml", 256, (IMAGENET,)),
    ("ViT-7B/16, stage 2", "dinov3/configs/train/dinov3_vit7b16_gram_anchor.yaml", 256, (IMAGENET, "gram.ckpt=FILE")),
)


@dataclass(frozen=True)
class Batch:
    """What one process sees in a step.

    Attributes:
        images: B.
        patches: of a global crop.
        global_tokens: of all global crops together, class and storage tokens included.
        local_tokens: of all local crops.
        n_class: class tokens of the student, (2 + number of local crops) * B.
        n_masked: masked patches, on average.
    """

    images: int
    patches: int
    global_tokens: int
    local_tokens: int
    n_class: int
    n_masked: int

    @property
    def tokens(self) -> int:
        return self.global_tokens + self.local_tokens


def main() -> None:
    args = parse_args()
    if args.check:
        check()
        return
    words = [word for word in args.words if "=" not in word]
    options = tuple(word for word in args.words if "=" in word)
    tables = [(words[0], words[0], args.processes, options)] if words else TABLES
    for title, recipe, processes, given in tables:
        print(f"\n{title} on {processes} GPUs\n")
        report(read_recipe(recipe, given), processes)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="RECIPE.yaml key=value")
    parser.add_argument("--processes", type=int, default=1, help="GPUs that train together")
    parser.add_argument("--check", action="store_true", help="compare the formulas with runs on the CPU")
    return parser.parse_intermixed_args()


def read_recipe(path: str, options: Iterable[str]) -> Any:
    return get_cfg_from_args(DinoV3SetupArgs(config_file=path, output_dir=None, opts=list(options)))


def build_on_meta(cfg: Any) -> SSLMetaArch:
    with torch.device("meta"):
        return SSLMetaArch(cfg)


# State: what lives from step to step.


def shard(shape: Iterable[int], processes: int) -> int:
    """Elements of the part of a tensor that a process holds: rows are dealt out in equal, rounded-up numbers."""
    rows, *rest = shape
    return math.ceil(rows / processes) * math.prod(rest)


def sharded(network: nn.Module, processes: int) -> int:
    return sum(shard(parameter.shape, processes) for parameter in network.parameters())


def state_bytes(arch: SSLMetaArch, processes: int) -> dict[str, int]:
    """Bytes by what they are for; everything is float32 and sharded over all processes."""
    student = FLOAT32 * sharded(arch.student, processes)
    found = {
        "student": student,
        "gradients": student,
        "AdamW, two moments": 2 * student,
        "EMA": FLOAT32 * sharded(arch.model_ema, processes),
    }
    if arch.gram_teacher is not None:
        found["Gram teacher"] = FLOAT32 * sharded(arch.gram_teacher, processes)
    if arch.is_distillation_enabled:
        found["teacher"] = FLOAT32 * sharded(arch.teacher, processes)
    return found


# Communication: every network is gathered, part by part, each time it is used, and gradients are reduced once.


def parts(network: nn.ModuleDict) -> dict[str, list[nn.Parameter]]:
    """What FSDP gathers together: each block, the rest of the backbone, each head."""
    found: dict[str, list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        words = name.split(".")
        key = ".".join(words[:3]) if words[1] == "blocks" else words[0]
        found.setdefault(key, []).append(parameter)
    return found


def gathered(network: nn.ModuleDict, processes: int) -> int:
    """Elements of the whole parameters, rounded up to equal shards."""
    return processes * sharded(network, processes)


def traffic_bytes(cfg: Any, arch: SSLMetaArch, processes: int) -> dict[str, int]:
    """Bytes that a step gathers and reduces, each collective counted with the size of the whole."""
    if processes == 1:
        return {"all-gather": 0, "reduce-scatter": 0}
    parameter, reduced = precision_bytes(cfg)
    frozen = [arch.teacher] + ([arch.gram_teacher] if arch.gram_teacher is not None else [])
    return {
        # The student is gathered for the forward pass and again for the backward pass.
        "all-gather": parameter * (2 * gathered(arch.student, processes) + sum(gathered(n, processes) for n in frozen)),
        "reduce-scatter": reduced * gathered(arch.student, processes),
    }


def precision_bytes(cfg: Any) -> tuple[int, int]:
    precision = cfg.compute_precision
    return as_torch_dtype(precision.param_dtype).itemsize, as_torch_dtype(precision.reduce_dtype).itemsize


def unsharded_bytes(cfg: Any, arch: SSLMetaArch) -> int:
    """Whole parameters and gradients at the worst moment: two parts gathered, the gradients of both being reduced."""
    parameter, reduced = precision_bytes(cfg)
    sizes = sorted(sum(p.numel() for p in group) for group in parts(arch.student).values())
    return 2 * parameter * sum(sizes[-2:]) + reduced * sizes[-1]


# Activations: what the forward pass leaves for the backward pass.


def largest_resolution(cfg: Any) -> Any:
    """Of the recipe's pairs of crop sizes the one with the most pixels."""
    n_local = cfg.crops.local_crops_number
    return max(crop_resolutions(cfg), key=lambda r: 2 * r.global_size**2 + n_local * r.local_size**2)


def batch_of(cfg: Any, n_masked: int | None = None) -> Batch:
    """The largest of the recipe's crop resolutions; `n_masked` replaces the average."""
    images, n_local = cfg.train.batch_size_per_gpu, cfg.crops.local_crops_number
    resolution = largest_resolution(cfg)
    prefix, patch = 1 + cfg.student.n_storage_tokens, cfg.student.patch_size
    patches, local_patches = ((s // patch) ** 2 for s in (resolution.global_size, resolution.local_size))
    if n_masked is None:
        mean_ratio = sum(cfg.ibot.mask_ratio_min_max) / 2
        n_masked = round(2 * images * cfg.ibot.mask_sample_probability * mean_ratio * patches)
    return Batch(
        images=images,
        patches=patches,
        global_tokens=2 * images * (prefix + patches),
        local_tokens=n_local * images * (prefix + local_patches),
        n_class=(2 + n_local) * images,
        n_masked=n_masked,
    )


def block_elements(cfg: Any, arch: SSLMetaArch) -> tuple[float, float]:
    """Elements that a block keeps per token: without checkpointing, and with it as the recipe says."""
    student, dim = cfg.student, arch.embed_dim
    block: Any = arch.student["backbone"].blocks[0]
    is_gated = hasattr(block.mlp, "w3")
    hidden = block.mlp.w3.in_features if is_gated else block.mlp.fc2.in_features
    scales = 2 if student.layerscale else 0
    # Norm's input and output, queries, keys, values, rotated queries and keys, attention's output and its copy for all
    # crops together.
    attention = (2 + 3 + 2 + 2) * dim
    # Norm's input and output; the hidden layer before and after its activation, a gate has two branches.
    ffn = 2 * dim + (4 if is_gated else 2) * hidden
    # LayerScale keeps what it multiplies. Stochastic depth computes fewer samples, and keeps what it adds to them.
    share = 1 - student.drop_path_rate
    additions = 2 * dim if student.drop_path_rate > 0 else 0
    everything = share * (attention + ffn + scales * dim + additions)
    if not cfg.train.checkpointing:
        return everything, everything
    kept = dim  # the block's input
    if not cfg.train.checkpointing_full:
        kept += share * dim  # attention's output
        if student.fp8_enabled:
            # Results of 8-bit products, which are bfloat16; those of ordinary layers with a bias are recomputed.
            products = 3 * dim + dim + (2 if is_gated else 1) * hidden + dim
            kept += share * products * BFLOAT16 / precision_bytes(cfg)[0]
    return everything, kept


def activation_bytes(cfg: Any, arch: SSLMetaArch, batch: Batch) -> dict[str, float]:
    """Bytes at the end of the forward pass, by where they are."""
    size, dim = precision_bytes(cfg)[0], arch.embed_dim
    n_blocks = len(arch.student["backbone"].blocks)  # type: ignore[arg-type]
    _, kept = block_elements(cfg, arch)
    n_teacher_class = 2 * batch.images
    resolution = largest_resolution(cfg)

    def head(settings: Any, rows: int) -> float:
        # Input, each hidden layer before and after its GELU, bottleneck before and after its normalisation.
        layers = 2 * settings.head_hidden_dim * (settings.head_nlayers - 1) + 2 * settings.head_bottleneck_dim
        return size * rows * (dim + layers)

    # Student: logits, and their log-softmax in float32. Teacher: targets in float32, and the logits of class tokens.
    # The class-token loss keeps targets summed over the teacher's crops: for the local crops, and for each global one.
    dino, ibot = cfg.dino.head_n_prototypes, cfg.ibot.head_n_prototypes
    logits = (size + FLOAT32) * (batch.n_class * dino + batch.n_masked * ibot)
    targets = FLOAT32 * (n_teacher_class * dino + batch.n_masked * ibot) + size * n_teacher_class * dino
    targets += FLOAT32 * (batch.images + n_teacher_class) * dino
    gram = 0
    if cfg.gram.use_loss:
        # Student: patches in float32, normalised, and their similarities; of the teacher the last two.
        patches = 2 * batch.images * batch.patches
        others = batch.patches if cfg.gram.img_level else patches
        gram = FLOAT32 * patches * (3 * dim + 2 * others) + size * patches * dim
    pixels = n_teacher_class * resolution.global_size**2
    pixels += cfg.crops.local_crops_number * batch.images * resolution.local_size**2
    heads = head(cfg.dino, batch.n_class) + head(cfg.ibot, batch.n_masked)
    return {
        "blocks": size * n_blocks * kept * batch.tokens,
        # The last block's output and its norm's; the teacher's features.
        "features, heads": size * dim * (2 * batch.tokens + batch.global_tokens) + heads,
        "logits, targets": logits + targets,
        "Gram loss": gram,
        "images": size * 3 * pixels,
    }


def temporary_bytes(cfg: Any, arch: SSLMetaArch, batch: Batch) -> float:
    """What is needed for a moment: gradients of the largest logits, a recomputed block, or one of the Gram teacher."""
    size = precision_bytes(cfg)[0]
    logits = 2 * FLOAT32 * max(batch.n_class * cfg.dino.head_n_prototypes, batch.n_masked * cfg.ibot.head_n_prototypes)
    block = size * block_elements(cfg, arch)[0] * batch.tokens if cfg.train.checkpointing else 0.0
    return max(logits, block, gram_teacher_bytes(cfg, arch))


def gram_teacher_bytes(cfg: Any, arch: SSLMetaArch) -> float:
    """What the Gram teacher, which sees larger crops, needs in the FFN of a block."""
    if arch.gram_teacher is None:
        return 0.0
    side = largest_resolution(cfg).gram_size // cfg.student.patch_size
    tokens = 2 * cfg.train.batch_size_per_gpu * (1 + cfg.student.n_storage_tokens + side**2)
    ffn = arch.student["backbone"].blocks[0].mlp  # type: ignore[index,union-attr]
    elements = 3 * ffn.w3.in_features if hasattr(ffn, "w3") else 2 * ffn.fc2.in_features
    return precision_bytes(cfg)[0] * tokens * (2 * arch.embed_dim + elements)


# Arithmetic: to compare communication with.


def flops(cfg: Any, arch: SSLMetaArch) -> float:
    """Floating-point operations of one process's step in the backbones."""
    resolution = largest_resolution(cfg)
    images, backbone = cfg.train.batch_size_per_gpu, arch.student["backbone"]
    of_global = 2 * images * count_flops(backbone, resolution.global_size)
    of_local = cfg.crops.local_crops_number * images * count_flops(backbone, resolution.local_size)
    passes = 4 if cfg.train.checkpointing and cfg.train.checkpointing_full else 3
    student = passes * (1 - cfg.student.drop_path_rate) * (of_global + of_local)
    gram = 2 * images * count_flops(backbone, resolution.gram_size) if arch.gram_teacher is not None else 0
    return student + of_global + gram


def peak_bytes(cfg: Any, arch: SSLMetaArch, batch: Batch, gradients: float) -> float:
    """The most that a step needs beside the networks: gradients grow while activations go, and there is a rest."""
    return max(gradients, sum(activation_bytes(cfg, arch, batch).values())) + temporary_bytes(cfg, arch, batch)


def report(cfg: Any, processes: int) -> None:
    """Print memory, communication and arithmetic per GPU."""
    arch, batch = build_on_meta(cfg), batch_of(cfg)
    state = state_bytes(arch, processes)
    activations = activation_bytes(cfg, arch, batch)
    unsharded = unsharded_bytes(cfg, arch)
    lasting = sum(state.values()) - state["gradients"]
    total = lasting + unsharded + peak_bytes(cfg, arch, batch, state["gradients"])
    rows: dict[str, float] = {
        **state,
        "whole parts, gathered or reduced": unsharded,
        **{f"activations: {name}": n_bytes for name, n_bytes in activations.items()},
        "temporary": temporary_bytes(cfg, arch, batch),
        "peak (of gradients and activations the larger)": total,
    }
    print("| memory per GPU | GiB |\n| --- | ---: |")
    for name, n_bytes in rows.items():
        print(f"| {name} | {n_bytes / GIB:.2f} |")
    print("\n| per step and GPU | |\n| --- | ---: |")
    for name, n_bytes in traffic_bytes(cfg, arch, processes).items():
        print(f"| {name}, received | {n_bytes * (processes - 1) / processes / 1e9:.2f} GB |")
    print(f"| arithmetic of the backbones | {flops(cfg, arch) / 1e12:.1f} TFLOP |")


# The check.


class Collectives(TorchDispatchMode):
    """Counts the bytes of the whole of every all-gather and reduce-scatter."""

    def __init__(self) -> None:
        super().__init__()
        self.n_bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if "allgather_base" in name:
            self.n_bytes["all-gather"] += args[0].nbytes
        elif "reduce_scatter_base" in name:
            self.n_bytes["reduce-scatter"] += args[1].nbytes
        return func(*args, **(kwargs or {}))


GRAM = ("gram.use_loss=true", "gram.ema_teacher=true", "gram.rep_update=false", "gram.img_level=true")
CHECKED = {
    "plain": ("train.checkpointing=false",),
    "stochastic depth 0.5": ("train.checkpointing=false", "student.drop_path_rate=0.5"),
    "SwiGLU": ("train.checkpointing=false", "student.ffn_layer=swiglu64"),
    "checkpointing, full": ("train.checkpointing=true", "train.checkpointing_full=true"),
    "checkpointing, selective": ("train.checkpointing=true",),
    "selective, 8 bits": ("train.checkpointing=true", "student.fp8_enabled=true", "student.ffn_layer=swiglu64"),
    "Gram": ("train.checkpointing=false", *GRAM),
    "Gram over the batch": ("train.checkpointing=false", *GRAM, "gram.img_level=false"),
    "many prototypes": ("train.checkpointing=false", "dino.head_n_prototypes=16384", "ibot.head_n_prototypes=16384"),
}


def small_config(*options: str) -> Any:
    sizes = ("crops.global_crops_size=96", "crops.local_crops_size=48", "train.batch_size_per_gpu=4")
    cfg = get_cfg_from_args(DinoV3SetupArgs("", output_dir=None, opts=[*SMALL, *sizes, *options]))
    apply_scaling_rules_to_cfg(cfg)
    return cfg


def build(cfg: Any) -> SSLMetaArch:
    torch.manual_seed(0)
    arch = build_on_meta(cfg)
    arch.prepare_for_distributed_training()
    arch.init_weights()
    return arch.train()


def measure_activations(options: Iterable[str]) -> tuple[float, float, float, float]:
    """(formula, measured) of what is alive before the backward pass, and of the peak, without the networks."""
    cfg = small_config(*options)
    arch, data = build(cfg), random_batch(cfg)
    present = [*arch.parameters(), *arch.buffers(), *(value for value in data.values() if isinstance(value, Tensor))]
    tracker = _LiveTensors(ignored={tensor.untyped_storage()._cdata for tensor in present})
    alive: list[int] = []
    backprop = arch.backprop_loss

    def note_and_backprop(loss: Tensor) -> None:
        alive.append(tracker._alive)
        backprop(loss)

    arch.backprop_loss = note_and_backprop  # type: ignore[method-assign]
    pixels = sum(data[key].nbytes for key in ("collated_global_crops", "collated_local_crops"))
    with tracker:
        arch.forward_backward(data, teacher_temp=0.07)
    batch = batch_of(cfg, n_masked=len(data["mask_indices_list"]))
    formula = sum(activation_bytes(cfg, arch, batch).values())
    peak = peak_bytes(cfg, arch, batch, state_bytes(arch, 1)["gradients"])
    return formula, alive[0] + pixels, peak, tracker.peak + pixels


def check() -> None:
    os.environ["DINOV3_DEVICE"] = "cpu"
    print("Activations, one process, float32: MiB by formula, measured, error\n")
    print("| configuration | kept for the backward pass | | | peak with gradients | | |\n| --- |" + " ---: |" * 6)
    for name, options in CHECKED.items():
        formula, measured, peak, measured_peak = (n_bytes / 2**20 for n_bytes in measure_activations(options))
        print(
            f"| {name} | {formula:.1f} | {measured:.1f} | {formula / measured - 1:+.0%} "
            f"| {peak:.1f} | {measured_peak:.1f} | {peak / measured_peak - 1:+.0%} |"
        )
    print("\nState of rank 0, and bytes of a step's collectives: formula, measured\n")
    print("| processes | precision | | formula | measured |\n| ---: | --- | --- | ---: | ---: |")
    for processes in (1, 2):
        for precision in ("fp32", "bf16"):
            for name, formula, measured in run_processes(processes, precision):
                print(f"| {processes} | {precision} | {name} | {formula} | {measured} |")


def run_processes(processes: int, precision: str) -> list[tuple[str, int, int]]:
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    port = 20000 + os.getpid() % 20000
    workers = [
        context.Process(target=measure_process, args=(rank, processes, precision, port, queue))
        for rank in range(processes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        if worker.exitcode != 0:
            raise RuntimeError(f"a process ended with {worker.exitcode}")
    return queue.get()


def measure_process(rank: int, processes: int, precision: str, port: int, queue: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=processes)
    cfg = small_config(f"compute_precision.param_dtype={precision}", "train.checkpointing=true", "train.fsdp=always")
    arch, data = build(cfg), random_batch(cfg)
    optimizer = torch.optim.AdamW(arch.get_params_groups(), foreach=True)
    arch.forward_backward(data, teacher_temp=0.07)  # FSDP's first step differs: it finds out what follows what
    optimizer.zero_grad(set_to_none=True)
    with Collectives() as collectives:
        arch.forward_backward(data, teacher_temp=0.07)
    optimizer.step()
    if rank == 0:
        on_meta = build_on_meta(cfg)
        measured = {**dict(measured_state(arch, optimizer)), **collectives.n_bytes}
        formulas = state_bytes(on_meta, processes) | traffic_bytes(cfg, on_meta, processes)
        queue.put([(name, formula, measured.get(name, 0)) for name, formula in formulas.items()])
    dist.barrier()
    dist.destroy_process_group()


def measured_state(arch: SSLMetaArch, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, int]]:
    moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    gradients = [p.grad for p in arch.student.parameters() if p.grad is not None]
    yield "student", local_bytes(arch.student.parameters())
    yield "gradients", local_bytes(gradients)
    yield "AdamW, two moments", local_bytes(moments)
    yield "EMA", local_bytes(arch.model_ema.parameters())


def local_bytes(tensors: Iterable[Tensor]) -> int:
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)


if __name__ == "__main__":
    main()
