"""The configurations of zero-shot classification and retrieval, and of open-vocabulary segmentation."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from omegaconf import MISSING

from dinov3.configs.settings import key
from dinov3.eval.classification import config as classification
from dinov3.eval.dense.config import Dtype, check_declared
from dinov3.eval.features.cache import FeaturesConfig
from dinov3.eval.segmentation.inference import INFERENCE_MODES
from dinov3.eval.text.segmenter import PATCH_TOKENS
from dinov3.hub.dinotxt import DINOTxtWeights
from dinov3.hub.sources import without_secrets

ZERO_SHOT_RESULTS_FILENAME = "results-zero-shot.csv"
OPEN_VOCABULARY_RESULTS_FILENAME = "results-open-vocabulary.csv"
#: Regular expressions of the columns that `eval.report` shows.
ZERO_SHOT_MAIN_METRICS = ["top-1", "(image to text|text to image) R@1"]
OPEN_VOCABULARY_MAIN_METRICS = ["mIoU"]

FROM_DATASET = "dataset"
IMAGENET = "imagenet"


@dataclass
class TextModelConfig:
    """The model of images and texts: dinov3_vitl16_dinotxt_tet1280d20h24l."""

    weights: str | None = key(
        None, "file of the vision head and the text encoder, or of the whole model; null: the published one"
    )
    backbone_weights: str | None = key(None, "file of the vision backbone; null: the published one")
    vocabulary: str | None = key(None, "file of the tokenizer; null: the published one")
    dtype: Dtype = key(Dtype.FLOAT32, "FLOAT32 or BFLOAT16, of the images; texts are always FLOAT32")

    def check(self) -> None:
        """Refuse files that do not exist, before anything is loaded.

        Raises:
            FileNotFoundError: names the key.
        """
        for name in ("weights", "backbone_weights", "vocabulary"):
            path = getattr(self, name)
            if path and "://" not in path and not Path(path).expanduser().exists():
                raise FileNotFoundError(f"model.{name}={path}: there is no such file")

    def describe(self) -> str:
        """Name the weights, for reports."""
        weights = without_secrets(self.weights or f"published weights ({DINOTxtWeights.LVTD2300M.name})")
        return f"dinov3_vitl16_dinotxt_tet1280d20h24l with {weights}"


@dataclass
class PromptsConfig:
    """How classes become texts."""

    classes: str = key(
        FROM_DATASET,
        f"names of the classes, in the order of the labels: {FROM_DATASET}, those of the data set; {IMAGENET}, the "
        "published 1000; or a file with one per line",
    )
    templates: str = key(
        IMAGENET, f"sentences: {IMAGENET}, the published 80; or a file with one per line, {{}} for the class"
    )
    batch_size: int = key(256, "sentences that are encoded at once", minimum=1)

    def check(self) -> None:
        """Raise a FileNotFoundError that names the key if a file does not exist."""
        for name, words in (("classes", (FROM_DATASET, IMAGENET)), ("templates", (IMAGENET,))):
            value = getattr(self, name)
            if value not in words and not Path(value).expanduser().is_file():
                raise FileNotFoundError(
                    f"prompts.{name}={value}: expected {' or '.join(words)}, or a file with one per line; there is no "
                    "such file"
                )


@dataclass
class TransformConfig(classification.TransformConfig):
    """How images are prepared: resized, cropped in the centre, normalised."""

    CUSTOMARY_RATIO: ClassVar[float] = 1.0

    resize_size: int = key(512, "short side after resizing, pixels")
    crop_size: int = key(512, "side of the central crop, pixels")


@dataclass
class ZeroShotEvalConfig:
    """The images."""

    test_dataset: str = key(
        MISSING, "images with labels, e.g. ImageFolder:root=DIR, or with captions, e.g. CocoCaptions:split=VAL:root=DIR"
    )
    batch_size: int = key(64, "images per step and process", minimum=1)
    num_workers: int = key(5, "loader processes", minimum=0)


@dataclass
class ZeroShotConfig:
    """All settings of a zero-shot classification or retrieval."""

    model: TextModelConfig = field(default_factory=TextModelConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    eval: ZeroShotEvalConfig = field(default_factory=ZeroShotEvalConfig)
    transform: TransformConfig = field(default_factory=TransformConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    output_dir: str = key("", "where results go; . on the command line")

    def __post_init__(self) -> None:
        check_declared(self)

    def check(self) -> None:
        """Refuse files that do not exist, before anything is loaded; raises a FileNotFoundError."""
        self.model.check()
        self.prompts.check()


@dataclass
class OpenVocabularyEvalConfig:
    """The images, and how they are segmented."""

    test_dataset: str = key(
        MISSING, "images with label maps, e.g. ADE20K:split=VAL:root=DIR or SegmentationFolder:split=val:root=DIR"
    )
    num_workers: int = key(5, "loader processes", minimum=0)
    short_side: int = key(512, "that images are resized to, pixels", minimum=1)
    mode: str = key("slide", "windows of crop_size, or images as they are resized", choices=INFERENCE_MODES)
    crop_size: int = key(384, "side of the square windows, pixels", minimum=1)
    stride: int = key(192, "pixels between windows", minimum=1)
    patch_tokens: str = key("head", "what texts are compared with: head, or backbone, before it", choices=PATCH_TOKENS)
    reduce_zero_label: bool | None = key(
        None, "label 0 is ignored and the classes begin at 1; null: as the data set has it"
    )
    max_windows_per_batch: int | None = key(
        None, "windows in one call of the model, which bounds its memory; null: 1 on the CPU, otherwise 8", minimum=1
    )
    save_predictions: bool = key(False, "write every predicted map, as index masks and as pictures")


@dataclass
class OpenVocabularyConfig:
    """All settings of an open-vocabulary segmentation."""

    model: TextModelConfig = field(default_factory=TextModelConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    eval: OpenVocabularyEvalConfig = field(default_factory=OpenVocabularyEvalConfig)
    output_dir: str = key("", "where results go; . on the command line")

    def __post_init__(self) -> None:
        check_declared(self)
        if self.eval.mode == "slide" and self.eval.stride > self.eval.crop_size:
            raise ValueError(
                f"eval.stride={self.eval.stride} must be at most eval.crop_size={self.eval.crop_size}, otherwise "
                "pixels between windows would be in none"
            )

    def check(self) -> None:
        """Refuse files that do not exist, before anything is loaded; raises a FileNotFoundError."""
        self.model.check()
        self.prompts.check()
