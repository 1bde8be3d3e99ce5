"""The configuration of depth training and evaluation.

configs/config-nyu.yaml                           trains a linear head on NYU Depth V2
configs/config-nyu-synthmix-dpt-inference.yaml    evaluates the released DPT head of the 7B on it
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from dinov3.configs.settings import key
from dinov3.eval.dense import config as dense
from dinov3.eval.dense.config import Dtype, check_declared, check_factors, check_image_size
from dinov3.eval.depth.loss import LossType
from dinov3.eval.depth.metrics import DEPTH_METRICS_NAME, EvalCropType
from dinov3.eval.depth.transforms import FIXED_CROPS
from dinov3.eval.training.config import OptimizerConfig, SchedulerConfig
from dinov3.heads.depth.depther import DecoderConfig
from dinov3.heads.depth.dpt import DPTHead
from dinov3.hub import depthers
from dinov3.hub.transforms import normalization_of
from dinov3.utils import did_you_mean
from dinov3.utils.pixel_statistics import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

HUB_DEPTHERS = tuple(depthers.PUBLISHED)
#: What `decoder_head.head_kwargs` may hold, by the type of the head; the others are keys of `decoder_head`.
HEAD_KWARGS: dict[str, list[str]] = {
    "linear": [],
    "dpt": [
        name
        for name in inspect.signature(DPTHead).parameters
        if name not in ("in_channels", "n_output_channels", "readout_type", "use_batchnorm")
    ],
}


class Extension(Enum):
    """File format of saved predictions."""

    JPG = "jpg"
    PNG = "png"
    PTH = "pth"


@dataclass
class DatasetsConfig(dense.DatasetsConfig):
    """The images; `root` is added to dataset strings that have none."""

    test: str = key("", "dataset string, for the evaluation at the end")


@dataclass
class TrainTransformConfig:
    """Augmentation of training images."""

    img_size: Any = key(
        None, "short side, or [height, width], that images and depths are resized to; null: as they are"
    )
    random_crop: list[int] | None = key(None, "[height, width] of a random crop; null: none", length=2, minimum=1)
    brightness_range: list[float] = key([0.9, 1.1], "factor of the colours", length=2, above=0)
    rotation_angle: float = key(2.5, "largest angle, in degrees", minimum=0)
    fixed_crop: str = key("FULL", "NYU is without the border of NYU's images", choices=tuple(FIXED_CROPS))
    eval_mask: EvalCropType = key(EvalCropType.FULL, "pixels that count: FULL or NYU_EIGEN")


@dataclass
class EvalTransformConfig:
    """Preprocessing of evaluated images."""

    img_size: Any = key(None, "short side, or [height, width], that images are resized to; null: as they are")
    fixed_crop: str = key("FULL", "NYU is without the border of NYU's images", choices=tuple(FIXED_CROPS))
    eval_mask: EvalCropType = key(EvalCropType.FULL, "pixels that count: FULL or NYU_EIGEN")


@dataclass
class TransformConfig:
    """From files to tensors."""

    train: TrainTransformConfig | None = None
    eval: EvalTransformConfig = field(default_factory=EvalTransformConfig)
    mean: list[float] = key(list(IMAGENET_DEFAULT_MEAN), "of the normalisation, by channel", length=3)
    std: list[float] = key(list(IMAGENET_DEFAULT_STD), "of the normalisation, by channel", length=3, above=0)
    normalization_constant: float = key(1000.0, "stored depth of one metre; not used for datasets in metres", above=0)


@dataclass
class EvalConfig:
    """How depth is measured."""

    ignored_value: float = key(0.0, "depth of pixels without measurement")
    align_least_squares: bool = key(False, "fit scale and shift of each prediction to the ground truth first")
    min_depth: float = key(0.001, "smallest depth that counts, metres", minimum=0)
    max_depth: float = key(10.0, "largest depth that counts, metres")
    use_tta: bool = key(True, "average with the prediction of the flipped image")
    eval_interval: int = key(1600, "steps between validations and checkpoints", minimum=1)
    unpad_predictions: bool = key(False, "cut off what the padding to whole patches added; false: as published")


@dataclass
class ResultConfig:
    """Saved predictions."""

    save_results: bool = key(False, "save every prediction")
    extension: Extension = key(Extension.JPG, "JPG, PNG, or PTH for tensors")
    save_resolution: int | None = key(
        None, "short side of saved pictures, pixels; null: that of the ground truth", minimum=1
    )
    overlay_alpha: float = key(1.0, "below 1, depth is laid over the image", minimum=0, maximum=1)
    save_separate_files: bool = key(False, "also image, prediction and ground truth, each in a file")


@dataclass
class DepthConfig(dense.RunConfig):
    """All settings of a run."""

    seed: int = key(321, "of the first weights, the order of the images and their augmentation")
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    datasets: DatasetsConfig = field(default_factory=DatasetsConfig)
    decoder_head: DecoderConfig = field(default_factory=DecoderConfig)
    model_dtype: Dtype | None = key(
        None, "FLOAT32 or BFLOAT16; null: that of the backbone's training, FLOAT32 for the hub"
    )
    losses: dict[LossType, float] | None = key(None, "weights, e.g. {SIGLOSS: 1.0}; or GRADIENT_LOSS, L1, ...")
    global_loss: bool = key(
        False,
        "one loss of the images of all processes, so that results do not depend on their number; false: as published",
    )
    transforms: TransformConfig = field(default_factory=TransformConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    metrics: list[str] = key(["rmse", "abs_rel", "a1"], f"of {', '.join(DEPTH_METRICS_NAME)}")
    result_config: ResultConfig = field(default_factory=ResultConfig)
    load_from: str | None = key(None, f"evaluate: a trained head's file, or {' or '.join(HUB_DEPTHERS)}")
    output_dir: str = key("", "where everything goes; . on the command line")

    def __post_init__(self) -> None:
        check_declared(self)
        for name in self.metrics:
            if name not in DEPTH_METRICS_NAME:
                raise ValueError(
                    f"metrics: {name!r} is unknown{did_you_mean(name, DEPTH_METRICS_NAME)}: "
                    f"expected some of {', '.join(DEPTH_METRICS_NAME)}"
                )
        check_image_size("transforms.eval.img_size", self.transforms.eval.img_size)
        if self.transforms.train is not None:
            check_image_size("transforms.train.img_size", self.transforms.train.img_size)
            check_factors("transforms.train.brightness_range", self.transforms.train.brightness_range)
        if self.eval.min_depth >= self.eval.max_depth:
            raise ValueError(f"eval.min_depth={self.eval.min_depth} must be below eval.max_depth={self.eval.max_depth}")
        if self.load_from in HUB_DEPTHERS:
            # What is written and compared is what runs: the head of the released model.
            self.decoder_head = depthers.config_of(self.load_from)
            given = list(self.transforms.mean), list(self.transforms.std)
            if given == (list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD)):
                mean, std = normalization_of(depthers.PUBLISHED[self.load_from].weights.name)
                self.transforms = replace(self.transforms, mean=list(mean), std=list(std))

    def check(self) -> None:
        """Refuse settings that cannot work, before anything is loaded.

        Raises:
            ValueError: names the key.
            FileNotFoundError: the trained head does not exist.
        """
        self.check_model()
        if not self.load_from:
            missing = [f"datasets.{name}" for name in ("train", "val") if not getattr(self.datasets, name)]
            missing += [] if self.losses else ["losses"]
            if missing:
                raise ValueError(f"training needs {', '.join(missing)}: see configs/config-nyu.yaml")
            if self.transforms.train is None:
                raise ValueError("training needs transforms.train, e.g. transforms.train.random_crop=[416,544]")
        elif not self.datasets.test:
            raise ValueError("evaluating needs datasets.test, e.g. NYU:split=TEST")

    def check_model(self) -> None:
        """Refuse settings that name no model, or weights that nothing uses; raises as `check` does."""
        if self.load_from in HUB_DEPTHERS:
            return
        self.check_trained_model(HUB_DEPTHERS)
        head = self.decoder_head
        if head.type not in HEAD_KWARGS:
            raise ValueError(
                f"decoder_head.type={head.type!r}{did_you_mean(head.type, HEAD_KWARGS)}: expected "
                f"{' or '.join(HEAD_KWARGS)}"
            )
        known = HEAD_KWARGS[head.type]
        for name in set(head.head_kwargs).difference(known):
            raise ValueError(
                f"decoder_head.head_kwargs.{name}{did_you_mean(name, known)}: a {head.type} head takes "
                f"{', '.join(known) or 'none, only one of decoder_head.type=dpt does'}"
            )
