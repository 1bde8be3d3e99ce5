"""The configuration of training and evaluating semantic segmentation.

configs/config-ade20k-linear-training.yaml    trains a linear head on ADE20K
configs/config-ade20k-m2f-inference.yaml      evaluates the released Mask2Former head of the 7B on it
configs/config-ade20k-m2f-train.yaml          trains a Mask2Former head of that size on it
configs/config-m2f-small.yaml                 trains a small Mask2Former head on a SegmentationFolder
configs/config-folder-linear-training.yaml    trains a linear head on a SegmentationFolder
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dinov3.configs.settings import key
from dinov3.eval.dense import config as dense
from dinov3.eval.dense.config import Dtype, check_declared, check_factors, check_image_size
from dinov3.eval.segmentation.metrics import INSTANCE_METRICS, PANOPTIC_METRICS, SEGMENTATION_METRICS
from dinov3.eval.segmentation.transforms import MEAN, STD
from dinov3.eval.training.config import OptimizerConfig, SchedulerConfig
from dinov3.heads.backbone_layers import BackboneLayersSet
from dinov3.hub.segmentors import PUBLISHED
from dinov3.utils import did_you_mean

HUB_SEGMENTORS = (PUBLISHED.entry,)
HEAD_TYPES = ("linear", "m2f")
MODES = ("slide", "whole")
#: What is measured, and the metrics of each.
TASKS = {"semantic": SEGMENTATION_METRICS, "instance": INSTANCE_METRICS, "panoptic": PANOPTIC_METRICS}
ALL_METRICS = [name for names in TASKS.values() for name in names]


@dataclass
class SegmentationSchedulerConfig(SchedulerConfig):
    """How the learning rate changes."""

    total_iter: int = key(40000, "number of steps", minimum=1)


@dataclass
class SegmentationOptimizerConfig(OptimizerConfig):
    """AdamW."""

    lr: float = key(1e-3, "peak of the learning rate", minimum=0)


@dataclass
class DatasetsConfig(dense.DatasetsConfig):
    """The images; `root` is added to dataset strings that have none."""

    val: str = key("", "dataset string, for validation during training and for the evaluation")


@dataclass
class DecoderConfig:
    """The head."""

    type: str = key("m2f", "linear; or m2f, a Mask2Former head on four blocks of a ViT")
    backbone_out_layers: Any = key(
        BackboneLayersSet.LAST, "LAST, FOUR_LAST, FOUR_EVEN_INTERVALS, or a list of blocks that the head reads"
    )
    use_batchnorm: bool = key(True, "normalise the channels first (linear head)")
    use_cls_token: bool = key(False, "append the class token to the channels (linear head)")
    use_backbone_norm: bool = key(True, "apply the backbone's final norm (linear head)")
    num_classes: int = key(150, "number of classes", minimum=1)
    hidden_dim: int = key(2048, "width of an m2f head")
    ffn_dim: int = key(4096, "hidden width of the feed-forward networks (m2f head)", minimum=1)
    n_queries: int = key(100, "masks that are predicted for an image (m2f head)", minimum=1)
    n_encoder_layers: int = key(6, "layers of the pixel decoder (m2f head)", minimum=1)
    n_decoder_layers: int = key(9, "layers of the mask decoder (m2f head)", minimum=1)
    drop_path: float = key(
        0.3,
        "share of the images whose feed-forward branches training drops (adapter of an m2f head)",
        minimum=0,
        below=1,
    )
    dropout: float = key(0.1, "share of the channels that training drops (linear head)", minimum=0, maximum=1)


@dataclass
class TrainTransformConfig:
    """Augmentation of training images."""

    img_size: Any = key(None, "short side, or [height, width], of images and labels; null: as they are")
    random_img_size_ratio_range: list[float] | None = key(
        None, "random factor of img_size, e.g. [0.5, 2.0]; null: none", length=2, above=0
    )
    crop_size: list[int] | None = key(
        None, "[height, width] of a random crop, padded if need be; null: none", length=2, minimum=1
    )
    flip_prob: float = key(0.0, "probability of a horizontal flip", minimum=0, maximum=1)


@dataclass
class EvalTransformConfig:
    """Preprocessing of evaluated images."""

    img_size: Any = key(None, "short side, or [height, width], of images; null: eval.crop_size")
    tta_ratios: list[float] = key([1.0], "factors of img_size with eval.use_tta", above=0)


@dataclass
class TransformConfig:
    """From files to tensors."""

    train: TrainTransformConfig = field(default_factory=TrainTransformConfig)
    eval: EvalTransformConfig = field(default_factory=EvalTransformConfig)
    mean: list[float] = key(list(MEAN), "of the normalisation, by channel, of pixels from 0 to 255")
    std: list[float] = key(list(STD), "of the normalisation, by channel, of pixels from 0 to 255", above=0)


@dataclass
class TrainConfig:
    """The loss."""

    diceloss_weight: float = key(0.0, "factor of the dice loss (linear head)", minimum=0)
    celoss_weight: float = key(1.0, "factor of the cross entropy (linear head)", minimum=0)
    n_points: int = key(12544, "points at which masks are compared (m2f head)", minimum=1)


@dataclass
class EvalConfig:
    """How segmentation is measured."""

    compute_metric_per_image: bool = key(
        False, "average the metrics of images; false: metrics of the areas of all images"
    )
    reduce_zero_label: bool = key(True, "label 0 is ignored and the classes begin at 1, in training too")
    mode: str = key("slide", "windows of crop_size, or images resized to crop_size x crop_size", choices=MODES)
    crop_size: int = key(512, "side of the square windows, pixels", minimum=1)
    stride: int = key(341, "pixels between windows", minimum=1)
    eval_interval: int = key(40000, "steps between validations and checkpoints", minimum=1)
    tasks: list[str] = key(
        ["semantic"], "what is measured: semantic, always, and instance, panoptic (m2f head; datasets with objects)"
    )
    stuff: list[str] = key([], "names or numbers of classes that have no objects (tasks instance and panoptic)")
    use_tta: bool = key(False, "average over transforms.eval.tta_ratios and flips")
    max_windows_per_batch: int | None = key(
        None, "windows in one call of the model, which bounds its memory; null: 1 on the CPU, otherwise 8", minimum=1
    )


@dataclass
class SegmentationConfig(dense.RunConfig):
    """All settings of a run."""

    num_workers: int = key(6, "loader processes", minimum=0)
    model_dtype: Dtype = key(Dtype.FLOAT32, "FLOAT32 or BFLOAT16")
    seed: int = key(100, "of the first weights, the order of the images and their augmentation")
    datasets: DatasetsConfig = field(default_factory=DatasetsConfig)
    load_from: str | None = key(None, f"evaluate: a trained head's file, or {' or '.join(HUB_SEGMENTORS)}")
    metric_to_save: str = key("mIoU", "metric by which the best head is chosen", choices=ALL_METRICS)
    decoder_head: DecoderConfig = field(default_factory=DecoderConfig)
    scheduler: SegmentationSchedulerConfig = field(default_factory=SegmentationSchedulerConfig)
    optimizer: SegmentationOptimizerConfig = field(default_factory=SegmentationOptimizerConfig)
    transforms: TransformConfig = field(default_factory=TransformConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    save_predictions: bool = key(False, "write every predicted map, as index masks and as pictures")
    output_dir: str | None = key(None, "where everything goes; . on the command line")

    def __post_init__(self) -> None:
        check_declared(self)
        transforms, evaluation = self.transforms, self.eval
        check_image_size("transforms.train.img_size", transforms.train.img_size)
        check_image_size("transforms.eval.img_size", transforms.eval.img_size)
        check_factors("transforms.train.random_img_size_ratio_range", transforms.train.random_img_size_ratio_range)
        if not transforms.eval.tta_ratios:
            raise ValueError("transforms.eval.tta_ratios=[]: expected at least one factor")
        for name, values in (("mean", transforms.mean), ("std", transforms.std)):
            if len(values) not in (1, 3):
                raise ValueError(f"transforms.{name}={values}: expected 3 numbers, or one for all channels")
        if evaluation.mode == "slide" and evaluation.stride > evaluation.crop_size:
            raise ValueError(
                f"eval.stride={evaluation.stride} must be at most eval.crop_size={evaluation.crop_size}, otherwise "
                "pixels between windows would be in none"
            )

    def check(self) -> None:
        """Refuse settings that cannot work, before anything is loaded.

        Raises:
            ValueError: names the key.
            FileNotFoundError: the trained head does not exist.
        """
        self.check_model()
        self.check_tasks()
        if not self.datasets.val:
            raise ValueError("datasets.val is missing, e.g. ADE20K:split=VAL or SegmentationFolder:split=val")
        if not self.load_from and not self.datasets.train:
            raise ValueError(
                "training needs datasets.train, e.g. ADE20K:split=TRAIN; load_from=FILE evaluates a trained head"
            )

    def check_tasks(self) -> None:
        """Refuse tasks that the head does not have, or do not measure `metric_to_save`.

        Raises:
            ValueError: names the key.
        """
        tasks = self.eval.tasks
        for task in tasks:
            if task not in TASKS:
                raise ValueError(f"eval.tasks={tasks}{did_you_mean(task, TASKS)}: expected some of {', '.join(TASKS)}")
        if "semantic" not in tasks:
            raise ValueError(f"eval.tasks={tasks}: semantic is always measured, add it")
        if len(tasks) > 1 and self.decoder_head.type != "m2f":
            raise ValueError(f"eval.tasks={tasks}: instance and panoptic need decoder_head.type=m2f")
        if self.metric_to_save not in [name for task in tasks for name in TASKS[task]]:
            raise ValueError(f"metric_to_save={self.metric_to_save} is not a metric of eval.tasks={tasks}")

    def check_model(self) -> None:
        """Refuse settings that name no model, a head that it cannot have, or weights that nothing uses.

        Raises:
            ValueError: names the key.
            FileNotFoundError: the trained head does not exist.
        """
        head = self.decoder_head
        if head.type not in HEAD_TYPES:
            raise ValueError(
                f"decoder_head.type={head.type!r}{did_you_mean(head.type, HEAD_TYPES)}: expected "
                f"{' or '.join(map(repr, HEAD_TYPES))}"
            )
        if self.load_from in HUB_SEGMENTORS:
            if head.type != "m2f":
                raise ValueError(
                    f"load_from={self.load_from} has a Mask2Former head: give decoder_head.type=m2f, not {head.type}; "
                    "see configs/config-ade20k-m2f-inference.yaml"
                )
            return
        if head.type == "m2f" and head.backbone_out_layers in (BackboneLayersSet.LAST, BackboneLayersSet.LAST.name):
            raise ValueError(
                "decoder_head.backbone_out_layers=LAST: a Mask2Former head reads four blocks; give "
                "FOUR_EVEN_INTERVALS, FOUR_LAST or four indices"
            )
        self.check_trained_model(HUB_SEGMENTORS)
