"""Every setting of a training, with its default, meaning, choices and range.

`ssl_default_config.yaml` holds the same keys, defaults and comments in the published form; a test keeps them equal.
"Epochs" are counted in units of `train.OFFICIAL_EPOCH_LENGTH` iterations, not in passes over the data.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

from dinov3.configs.settings import UNSET, key, settings_of

VIT_ARCHITECTURES = (
    "vit_tiny",
    "vit_small",
    "vit_base",
    "vit_large",
    "vit_so400m",
    "vit_huge2",
    "vit_giant2",
    "vit_7b",
)
CONVNEXT_ARCHITECTURES = ("convnext_tiny", "convnext_small", "convnext_base", "convnext_large")
MULTI_DISTILLATION = "MultiDistillationMetaArch"

_DTYPES = ("fp32", "fp16", "bf16")
_AUTO = (True, False, "auto")


def _unused(default: Any, why: str = "") -> Any:
    # Keys that published configuration files set; changing them earns a warning.
    return key(default, f"no effect: {why}" if why else "no effect", unused=True)


@dataclass
class Model:
    """What is trained."""

    META_ARCHITECTURE: str = key(
        "SSLMetaArch", "the second: several students of one teacher", choices=("SSLMetaArch", MULTI_DISTILLATION)
    )
    DEVICE: str = _unused("cuda", "the device is found at start, or taken from the environment variable DINOV3_DEVICE")
    WEIGHTS: str = _unused("")
    DTYPE: str = _unused("float32", "see compute_precision")


@dataclass
class ComputePrecision:
    """Number formats."""

    param_dtype: str = key("bf16", "what forward and backward compute in, and crops are cast to", choices=_DTYPES)
    reduce_dtype: str = key("fp32", "what gradients are summed in across processes", choices=_DTYPES)
    sharding_strategy: str = key("SHARD_GRAD_OP", "weights stay whole until backward", choices=("SHARD_GRAD_OP",))


@dataclass
class Schedule:
    """Linear from start to peak, then a cosine to end, then constant."""

    start: float = key(UNSET, "at iteration 0", minimum=0)
    peak: float = key(UNSET, "after the warm-up", minimum=0)
    end: float = key(UNSET, "after the cosine", minimum=0)
    warmup_epochs: float = key(UNSET, "linear from start to peak", minimum=0)
    cosine_epochs: float | None = key(UNSET, "from peak to end; by default all that remains", minimum=0)


@dataclass
class LearningRateSchedule(Schedule):
    """`optim.scaling_rule` multiplies peak and end."""

    freeze_last_layer_epochs: float | None = key(
        UNSET, "how long the last layers of the heads are frozen; by default not at all", minimum=0
    )


@dataclass
class MomentumSchedule(Schedule):
    """Of the EMA teacher."""

    start: float = key(UNSET, "at iteration 0", minimum=0, maximum=1)
    peak: float = key(UNSET, "after the warm-up", minimum=0, maximum=1)
    end: float = key(UNSET, "after the cosine", minimum=0, maximum=1)


@dataclass
class TemperatureSchedule(Schedule):
    """Of the teacher's targets."""

    start: float = key(UNSET, "at iteration 0", above=0)
    peak: float = key(UNSET, "after the warm-up", above=0)
    end: float = key(UNSET, "after the cosine", above=0)


@dataclass
class LocalLossWeightSchedule(Schedule):
    """Weight of the local-crop term."""

    start: float = key(0.5, "at iteration 0", minimum=0)
    peak: float = key(0.5, "after the warm-up", minimum=0)
    end: float = key(0.5, "after the cosine (`cosine_epochs`; by default all that remains)", minimum=0)
    warmup_epochs: float = key(0, "linear from start to peak", minimum=0)


@dataclass
class Schedules:
    """Schedules in the place of those of `optim` and `teacher`; all four are needed."""

    lr: LearningRateSchedule = field(default_factory=LearningRateSchedule)
    weight_decay: Schedule = field(default_factory=Schedule)
    momentum: MomentumSchedule = field(default_factory=MomentumSchedule)
    teacher_temp: TemperatureSchedule = field(default_factory=TemperatureSchedule)


@dataclass
class Dino:
    """DINO: class tokens of student and teacher agree on prototypes, across crops of an image."""

    loss_weight: float = key(1.0, "of the local and global class-token terms together", minimum=0)
    global_ignore_diagonal: bool = key(True, "leave out the pairs of a global crop with itself")
    head_n_prototypes: int = key(65536, "outputs of the class-token head", minimum=1)
    head_bottleneck_dim: int = key(256, "width of the normalised layer before the prototypes", minimum=1)
    head_norm_last_layer: bool = _unused(False)
    head_nlayers: int = key(3, "layers of the head's MLP", minimum=1)
    head_hidden_dim: int = key(2048, "width of the head's MLP", minimum=1)
    koleo_loss_weight: float = key(0.1, "per global crop; spreads class tokens apart", minimum=0)
    koleo_loss_distributed: bool = key(False, "search the neighbours among the images of all processes")
    koleo_topk: int = key(1, "neighbours per image; more than 1 needs koleo_loss_distributed", minimum=1)
    koleo_distributed_replicas: int = key(0, "retired: only 0 is accepted")
    koleo_distributed_loss_group_size: int | None = key(
        None, "images per group in which neighbours are searched; null: the global batch", minimum=1
    )
    koleo_distributed_loss_group_data: bool = _unused(True)
    force_weight_norm: bool = _unused(False)
    reweight_dino_local_loss: bool = key(False, "multiply the local-crop term by the next schedule")
    local_loss_weight_schedule: LocalLossWeightSchedule = field(default_factory=LocalLossWeightSchedule)


@dataclass
class Ibot:
    """iBOT: the student predicts the teacher's patch tokens where its own are masked."""

    loss_weight: float = key(1.0, "of the masked-patch term", minimum=0)
    mask_sample_probability: float = key(0.5, "fraction of the global crops that get a mask", minimum=0, maximum=1)
    mask_ratio_min_max: list[float] = key(
        [0.1, 0.5], "masked fraction of the patches, spread evenly over the masked crops", length=2
    )
    mask_random_circular_shift: bool = key(False, "roll each mask by a random offset")
    force_masking_even_with_zero_weight: bool = _unused(False, "masks are always drawn")
    separate_head: bool = key(True, "patches have a head of their own; false is not supported")
    head_n_prototypes: int = key(65536, "outputs of the patch head", minimum=1)
    head_bottleneck_dim: int = key(256, "width of the normalised layer before the prototypes", minimum=1)
    head_norm_last_layer: bool = _unused(False)
    head_nlayers: int = key(3, "layers of the head's MLP", minimum=1)
    head_hidden_dim: int = key(2048, "width of the head's MLP", minimum=1)


@dataclass
class Gram:
    """Gram anchoring: keep the similarities among an image's patches close to those of an earlier teacher."""

    use_loss: bool = key(False, "switch it on")
    compute_stats: bool = key(False, "also log the loss on masked and on unmasked patches")
    loss_weight: float = key(1.0, "constant weight, if loss_weight_schedule is null", minimum=0)
    ema_teacher: bool = key(False, "anchor to the present EMA teacher instead of an earlier one")
    ckpt: str | None = key(None, "file or directory with the Gram teacher to start from")
    it_load_ema_teacher: int = key(-1, "copy the EMA into the Gram teacher before this iteration; negative: never")
    rep_update: bool = key(True, "refresh the Gram teacher from the EMA teacher every update_frequency iterations")
    update_frequency: int = key(50000, "iterations between refreshes", minimum=1)
    it_first_update: int = key(0, "no refresh before this many iterations", minimum=0)
    max_updates: int | None = key(None, "how many refreshes at most; null: no limit", minimum=0)
    normalized: bool = key(True, "cosine similarities instead of dot products")
    img_level: bool = key(False, "similarities within each image, instead of within the whole local batch")
    remove_neg: bool = key(False, "set negative similarities of both sides to 0")
    remove_only_teacher_neg: bool = key(False, "set negative similarities of the teacher to 0")
    tokens_used: str = key("all", "which patches are compared", choices=("all", "masked", "unmasked"))
    global_teacher_resize_method: str = key(
        "bicubic", "resizing of the teacher's feature map to the student's", choices=("bicubic", "bilinear")
    )
    global_teacher_resize_antialias: bool = key(False, "low-pass filter when that makes it smaller")
    loss_weight_schedule: Schedule | None = key(
        None, "null, or {start, peak, end, warmup_epochs[, cosine_epochs]} instead of loss_weight"
    )


@dataclass
class Train:
    """Data, processes and speed."""

    batch_size_per_gpu: int = key(64, "images per process and batch", minimum=1)
    grad_accumulation_steps: int = key(
        1, "batches per step; gradients are averaged, but Sinkhorn, KoLeo and Gram see one batch", minimum=1
    )
    dataset_path: str | None = key("ImageNet:split=TRAIN", "for instance ImageFolder:root=/data/photos")
    data_config: str | None = _unused(None)
    output_dir: str = key(".", "where the run writes; --output-dir wins")
    saveckp_freq: int = _unused(20, "see checkpointing.period")
    seed: int = key(0, "of everything random; each process adds its rank", minimum=0)
    num_workers: int = key(10, "data-loading workers per process; 0 loads in the training process", minimum=0)
    OFFICIAL_EPOCH_LENGTH: int = key(1250, 'iterations per "epoch"; a run has optim.epochs times as many', minimum=1)
    monitor_gradient_norm: bool = _unused(False, "the norms are always logged")
    chunk_schedule: list[Any] = _unused([])
    use_teacher_head: bool = _unused(True)
    learn_from_teacher_tokens: bool = _unused(False)
    centering: str = key(
        "sinkhorn_knopp", "balances the teacher's targets over prototypes", choices=("sinkhorn_knopp",)
    )
    checkpointing: bool = key(False, "recompute activations of the blocks in the backward pass, to save memory")
    checkpointing_full: bool = key(False, "recompute all of them, instead of keeping the costly ones")
    compile: bool | str = key(True, "torch.compile; auto: on a CUDA device only", choices=_AUTO)
    cudagraphs: bool = key(False, "with compile: record CUDA graphs of the blocks")
    attention: str = key(
        "sdpa",
        "a call for each crop size, or one call for all crops (on CUDA, with the package xformers)",
        choices=("sdpa", "xformers"),
    )
    fsdp: str = key(
        "auto",
        "shard the networks; auto: for several processes or mixed precision",
        choices=("auto", "always", "never"),
    )
    sharded_eval_checkpoint: bool = key(False, "export the teacher as a sharded directory instead of one file")
    cache_dataset: bool = key(False, "each process cycles over its own part of the data, for node-local caches")
    on_bad_image: str = key("raise", "skip takes another image when one does not decode", choices=("raise", "skip"))
    alpha: str = key("white", "transparent pixels: on white, or drop the transparency", choices=("white", "drop"))
    exif: str = key(
        "auto",
        "turn pictures as their EXIF data say; auto: yes, except those of ImageNet and other published benchmarks",
        choices=("auto", "apply", "ignore"),
    )
    max_image_pixels: int = key(178_956_970, "larger images are bad images", minimum=1)
    max_nonfinite_steps: int = key(0, "non-finite steps in a row that are dropped; one more stops the run", minimum=0)
    print_freq: int = key(10, "iterations between lines in the log and in training_metrics.json", minimum=1)
    tensorboard: bool = key(True, "write <output_dir>/tensorboard")
    progress: bool | str = key("auto", "a progress bar; auto: on a terminal only", choices=_AUTO)


@dataclass
class Student:
    """The backbone."""

    arch: str = key("vit_large", "network", choices=VIT_ARCHITECTURES + CONVNEXT_ARCHITECTURES)
    patch_size: int = key(16, "pixels per side of a ViT's patch", minimum=1)
    depth: int | None = key(None, "number of a ViT's blocks; null: the architecture's own", minimum=1)
    drop_path_rate: float = key(0.3, "stochastic depth of a ViT", minimum=0, below=1)
    layerscale: float | None = key(1e-5, "initial value of a ViT's residual scales; null or 0: none", minimum=0)
    pretrained_weights: str | None = key("", "backbone weights to start from")
    ffn_layer: str = key("mlp", "feed-forward layers", choices=("mlp", "swiglu", "swiglu32", "swiglu64", "swiglu128"))
    ffn_ratio: float | None = key(
        None, "hidden width of the feed-forward layers over the embedding's; null: the architecture's own", above=0
    )
    resume_from_teacher_chkpt: str | None = key("", "teacher export (backbone and heads) to start student and EMA from")
    qkv_bias: bool = key(True, "bias in the attention's input projection")
    proj_bias: bool = key(True, "bias in the attention's output projection")
    ffn_bias: bool = key(True, "bias in the feed-forward layers")
    norm_layer: str = key(
        "layernorm",
        "eps is 1e-6 in the first and 1e-5 in the second",
        choices=("layernorm", "layernormbf16", "rmsnorm"),
    )
    n_storage_tokens: int = key(0, "register tokens", minimum=0)
    mask_k_bias: bool = key(False, "no bias on attention keys")
    untie_cls_and_patch_norms: bool = key(False, "a final norm of its own for the class and storage tokens")
    untie_global_and_local_cls_norm: bool = key(False, "in training: a final norm for class tokens of local crops")
    in_chans: int = key(3, "image channels", minimum=1)
    pos_embed_type: str = key("rope", "both are the same", choices=("rope", "ropenew"))
    pos_embed_rope_base: float | None = key(
        100.0, "ratio of the longest to the shortest period; null with min_period and max_period", above=0
    )
    pos_embed_rope_min_period: float | None = key(None, "shortest period, if base is null", above=0)
    pos_embed_rope_max_period: float | None = key(None, "longest period, if base is null", above=0)
    pos_embed_rope_normalize_coords: str = key(
        "separate", "the image side that is mapped to [-1, 1]", choices=("min", "max", "separate")
    )
    pos_embed_rope_shift_coords: float | None = key(None, "in training: shift coordinates by at most this", minimum=0)
    pos_embed_rope_jitter_coords: float | None = key(None, "in training: stretch each axis by at most this", minimum=1)
    pos_embed_rope_rescale_coords: float | None = key(None, "in training: stretch both axes by at most this", minimum=1)
    pos_embed_rope_dtype: str = key("bf16", "precision of the rotation's periods", choices=_DTYPES)
    fp8_enabled: bool = key(False, "train with 8-bit matrix products: CUDA of capability 8.9 or more, CPUs for tests")
    fp8_filter: str = key("blocks", "regular expression: the linear layers that fp8_enabled converts")


@dataclass
class Teacher:
    """The EMA teacher of a run without a `schedules` section."""

    momentum_teacher: float | None = key(0.992, "EMA momentum at the start", minimum=0, maximum=1)
    final_momentum_teacher: float | None = key(1, "EMA momentum at the end, reached on a cosine", minimum=0, maximum=1)
    warmup_teacher_temp: float | None = key(0.04, "temperature of the teacher's targets at the start", above=0)
    teacher_temp: float | None = key(0.07, "temperature after the warm-up", above=0)
    warmup_teacher_temp_epochs: float | None = key(30, "length of that warm-up", minimum=0)
    in_chans: int = _unused(3)


@dataclass
class Distillation:
    """A frozen, larger teacher."""

    enabled: bool = key(False, "switch it on")
    full_cfg_path: str | None = key("", "the teacher's training configuration, for its architecture and heads")
    checkpoint_path: str | None = key("", "the teacher's export, file or directory; ignore: random weights, for tests")


@dataclass
class Multidistillation:
    """Several students of one frozen teacher, each on its own group of processes."""

    enabled: bool = key(False, "switch it on; needs global_batch_size and students")
    global_batch_size: int = key(UNSET, "images per batch of all processes together", minimum=1)
    students: list[Any] = key(UNSET, "list of {name, config_path, ranks_range: [first process, last process + 1]}")


@dataclass
class Hrft:
    """Retired."""

    enabled: bool = key(False, "retired: set student.resume_from_teacher_chkpt")
    checkpoint_path: str | None = key("", "retired: set student.resume_from_teacher_chkpt")


@dataclass
class Optim:
    """AdamW and, without a `schedules` section, its schedules."""

    epochs: float = key(100, "length of the run", above=0)
    optimizer: str = key("adamw", "with decoupled weight decay", choices=("adamw",))
    weight_decay: float | None = key(0.04, "at the start (without `schedules`)", minimum=0)
    weight_decay_end: float | None = key(0.4, "at the end, reached on a cosine (without `schedules`)", minimum=0)
    lr: float | None = key(0.001, "peak learning rate, before scaling_rule (without `schedules`)", minimum=0)
    warmup_epochs: float | None = key(10, "linear rise of the learning rate from 0 (without `schedules`)", minimum=0)
    min_lr: float | None = key(1e-6, "learning rate at the end, never scaled (without `schedules`)", minimum=0)
    schedule_trunc_extra: float | None = key(
        0.0, "stretch the cosines by this fraction and cut them off (without `schedules`)", minimum=0
    )
    clip_grad: float | None = key(3.0, "largest gradient norm of backbone and each head; null or 0: any", minimum=0)
    freeze_last_layer_epochs: float | None = key(
        1, "how long the last layers of the heads are frozen (without `schedules`)", minimum=0
    )
    freeze_backbone_epochs: float = key(
        0, "at the start only the heads are trained, for this long (for student.pretrained_weights)", minimum=0
    )
    scaling_rule: str | None = key(
        "sqrt_wrt_1024",
        "for B images a step: lr * 4 * sqrt(B/1024), lr * B/256, or lr",
        choices=("sqrt_wrt_1024", "linear_wrt_256", "none", None),
    )
    patch_embed_lr_mult: float = key(0.2, "learning rate of the patch embedding, relative", minimum=0)
    dino_head_wd_multiplier: float = key(1.0, "weight decay of the class-token head, relative", minimum=0)
    layerwise_decay: float = key(0.9, "learning rate of a ViT's block relative to the next block's", above=0, maximum=1)
    multi_tensor_optim: bool = key(True, "fuse parameter groups with equal settings")
    dump_fsdp_weights_path: str | None = _unused("")
    adamw_beta1: float = key(0.9, "decay of the mean of gradients", minimum=0, below=1)
    adamw_beta2: float = key(0.999, "decay of the mean of squared gradients", minimum=0, below=1)


@dataclass
class Crops:
    """Sizes in pixels; lists of one length give several resolutions, one of which is drawn for each batch."""

    global_crops_scale: list[float] = key([0.32, 1.0], "share of the image's area", above=0, maximum=1, length=2)
    local_crops_number: int = key(8, "local crops per image; there are 2 global ones", minimum=1)
    local_crops_scale: list[float] = key([0.05, 0.32], "share of the image's area", above=0, maximum=1, length=2)
    global_crops_size: int | list[int] = key(224, "side of a global crop", minimum=1)
    local_crops_size: int | list[int] = key(96, "side of a local crop", minimum=1)
    global_local_crop_pairs_ratios: float | list[float] = key(1.0, "how often each resolution is drawn", above=0)
    gram_teacher_crops_size: int | list[int] | None = key(
        None, "side of the Gram teacher's view of a global crop; null: it needs none", minimum=1
    )
    localcrops_subset_of_globalcrops: bool = key(False, "cut local crops out of the global ones")
    share_color_jitter: bool = key(False, "one colour change for all crops of an image")
    horizontal_flips: bool = key(True, "mirror half of the crops")
    gram_teacher_no_distortions: bool = key(False, "no colour change or blur in the Gram teacher's view")
    rgb_mean: list[float] = key([0.485, 0.456, 0.406], "subtracted from pixels in 0..1", length=3)
    rgb_std: list[float] = key([0.229, 0.224, 0.225], "pixels are divided by it", above=0, length=3)
    blur_probabilities: list[float] = key(
        [0.0, 0.9, 0.5], "of the first global, the second global and the local crops", minimum=0, maximum=1, length=3
    )
    teacher_to_student_resolution_scale: float = key(
        1.0, "student's image side over the teacher's; 2.0: ConvNeXt taught by a /16 ViT", above=0
    )


@dataclass
class EvaluationFiles:
    """Unused."""

    high_freq: str = _unused("benchmark_high_frequency.yaml")
    low_freq: str = _unused("benchmark_low_frequency.yaml")


@dataclass
class Evaluation:
    """Exports of the teacher."""

    eval_period_iterations: int = key(12500, "iterations between exports of the teacher; 0 or less: only at the end")
    low_freq_every: int = _unused(5)
    config_files: EvaluationFiles = field(default_factory=EvaluationFiles)


@dataclass
class Checkpointing:
    """Checkpoints to resume from."""

    period: int = key(3750, "iterations between checkpoints; there is always one at the end", minimum=1)
    max_to_keep: int | None = key(3, "newest checkpoints that stay; null: all", minimum=1)
    keep_every: int = key(99999999999999999, "iterations between checkpoints that are kept for ever", minimum=1)
    max_seconds: float | None = key(None, "also save this long after the last save; null: by iterations only", above=0)
    async_save: bool = key(False, "write checkpoints in the background; needs memory for a copy")
    verify: bool | str = key("auto", "compare checksums when loading a checkpoint; auto: of up to 8 GB", choices=_AUTO)


@dataclass
class TrainingConfig:
    """The whole configuration; sections in the order of the published file."""

    MODEL: Model = field(default_factory=Model)
    compute_precision: ComputePrecision = field(default_factory=ComputePrecision)
    dino: Dino = field(default_factory=Dino)
    ibot: Ibot = field(default_factory=Ibot)
    gram: Gram = field(default_factory=Gram)
    train: Train = field(default_factory=Train)
    student: Student = field(default_factory=Student)
    teacher: Teacher = field(default_factory=Teacher)
    distillation: Distillation = field(default_factory=Distillation)
    multidistillation: Multidistillation = field(default_factory=Multidistillation)
    hrft: Hrft = field(default_factory=Hrft)
    optim: Optim = field(default_factory=Optim)
    crops: Crops = field(default_factory=Crops)
    evaluation: Evaluation = field(default_factory=Evaluation)
    checkpointing: Checkpointing = field(default_factory=Checkpointing)
    schedules: Schedules | None = key(UNSET, "schedules that replace those of optim and teacher; absent by default")


SETTINGS = settings_of(TrainingConfig)

#: Settings that a `schedules` section replaces.
REPLACED_BY_SCHEDULES = (
    "optim.lr",
    "optim.min_lr",
    "optim.warmup_epochs",
    "optim.weight_decay",
    "optim.weight_decay_end",
    "optim.schedule_trunc_extra",
    "optim.freeze_last_layer_epochs",
    "teacher.momentum_teacher",
    "teacher.final_momentum_teacher",
    "teacher.warmup_teacher_temp",
    "teacher.teacher_temp",
    "teacher.warmup_teacher_temp_epochs",
)

#: Keys of published recipes that never did anything and are not in the default configuration: dropped with a warning.
RETIRED = frozenset(
    f"{section}.{name}"
    for section, names in {
        "coding_rate_loss": ("use_cls_loss cls_loss_weight use_masked_patches_loss masked_patches_loss_weight epsilon"),
        "student": (
            "drop_path_uniform drop_path_shape patch_drop sin_cos_embeddings fourier_embeddings fourier_encoding_dim "
            "multiple_pos_embeddings cls_pos_embedding reg_pos_embedding block_chunks mask_attention "
            "mask_register_attention interpolate_offset interpolate_antialias init_std_cls init_std_reg "
            "rescale_weights_by_layer_id pos_embed_grid_size pos_embed_rope_gamma pos_embed_rope_init_multi_frequencies"
        ),
        "train": "cell_augmentation cell_augmentation_type",
    }.items()
    for name in names.split()
)


@functools.cache
def default_values() -> dict[str, Any]:
    """Return the default of every key that a configuration always has, by its dotted name."""
    return {name: setting.default for name, setting in SETTINGS.items() if setting.default is not UNSET}
