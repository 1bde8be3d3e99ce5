"""What the command lines of the hub share: which model is meant, options, image sizes, checks of the output."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dinov3.hub import backbones
from dinov3.hub.backbones import Weights
from dinov3.hub.from_checkpoint import dinov3_from_checkpoint
from dinov3.hub.run_directory import find_run_config, read_run_config
from dinov3.hub.sources import without_secrets
from dinov3.hub.transforms import Normalization, normalization_of
from dinov3.models.summary import Tokens, count_tokens, patch_stride
from dinov3.utils import as_torch_dtype, did_you_mean
from dinov3.utils.command_line import ArgumentParser

#: The published backbones.
ENTRIES = tuple(sorted(name for name in backbones.__all__ if name.startswith("dinov3_")))

MODEL_HELP = (
    f"one of {', '.join(ENTRIES)}; or the output directory of a training run, for its newest teacher; or a checkpoint "
    "of a backbone of any size, as dinov3_from_checkpoint takes it"
)
WEIGHTS_HELP = (
    "a file, a directory or a URL of weights of this model, or LVD1689M or SAT493M for the published ones (default: "
    "LVD1689M, which are downloaded and need access); not for a training run or a checkpoint"
)

NORMALIZATIONS = ("auto", "lvd", "sat")
#: First digits of the published files that were trained on satellite images, and the name of these images.
SAT_MARKS = ("sat493m", "eadcf0ff", "a6675841")


@dataclass(frozen=True)
class ModelChoice:
    """A backbone as a command line names it.

    Attributes:
        name: a published backbone, or the path of a training run or a checkpoint.
        weights: as `weights=` of the hub. Default: the published ones. Training runs and checkpoints have their own.
    """

    name: str
    weights: str | None = None

    @property
    def is_path(self) -> bool:
        """Whether this is a training run or a checkpoint."""
        return self.name not in ENTRIES

    def check(self) -> None:
        """Refuse what cannot be loaded, before anything is.

        Raises:
            ValueError: there is no such model, or weights are given for a training run or a checkpoint.
            FileNotFoundError: there is nothing at a path.
        """
        if not self.is_path:
            return
        path = Path(self.name).expanduser()
        if path.exists():
            if self.weights is not None:
                raise ValueError(f"{self.name} is a path, which has its own weights: leave out --weights")
        elif len(path.parts) > 1:
            raise FileNotFoundError(f"there is no training run at {self.name}, nor a checkpoint: no such path")
        else:
            raise ValueError(
                f"unknown model {self.name!r}{did_you_mean(self.name, ENTRIES)}: choose one of {', '.join(ENTRIES)}, "
                "or the path of a training run or a checkpoint"
            )

    def load(self, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
        """Load the backbone with its weights, in evaluation mode.

        Args:
            device: where it goes.
            dtype: of its parameters; buffers keep theirs.

        Raises:
            ValueError, OSError: see `check` and the entries of the hub.
        """
        self.check()
        if not self.is_path:
            return self._call_entry(device=device, dtype=dtype)
        model = dinov3_from_checkpoint(self.name)
        for parameter in model.parameters():  # Not buffers: the periods of positions need their precision.
            parameter.data = parameter.data.to(dtype)
        return model.to(device)

    def build(self) -> nn.Module:
        """Build the backbone on the meta device: its structure, without weights and without memory.

        Raises:
            ValueError, OSError: see `check`, and `dinov3_from_checkpoint` for paths.
        """
        self.check()
        if self.is_path:
            return dinov3_from_checkpoint(self.name).to("meta")
        return self._call_entry(pretrained=False, device="meta")

    def _call_entry(self, **options: Any) -> nn.Module:
        weights = {} if self.weights is None else {"weights": self.weights}
        model: nn.Module = getattr(backbones, self.name)(**weights, **options)
        return model

    def __str__(self) -> str:
        return self.name if self.is_path or self.weights is None else f"{self.name} ({without_secrets(self.weights)})"


def find_normalization(choice: ModelChoice, model: nn.Module, wanted: str = "auto") -> tuple[str, Normalization]:
    """Find the normalisation of pixels that belongs to some weights.

    Args:
        choice: the model and its weights. Satellite weights are recognised by the name of their file, training runs
            and the directories of other libraries have a configuration.
        model: the backbone; the satellite weights of ViT-L/16 are recognised by its additional norm.
        wanted: `auto`, or `lvd` or `sat` to decide it.

    Returns:
        What to call it, and the normalisation.
    """
    if wanted == "auto" and choice.is_path:
        path = Path(choice.name).expanduser()
        if of_run := normalization_of_run(path):
            return "of the training run", of_run
        if saved := saved_normalization(path):
            return "of the configuration beside the weights", saved
    name, note = (choice.weights or (choice.name if choice.is_path else Weights.LVD1689M.name)).lower(), ""
    if wanted != "auto":
        is_satellite = wanted == "sat"
    elif choice.name == "dinov3_vitl16":
        is_satellite = names_satellite_weights(name) or getattr(model, "local_cls_norm", None) is not None
    else:
        is_satellite = names_satellite_weights(name)
        # Both weights of the 7B have the additional norm, so only the name can tell them apart.
        is_open = choice.is_path or choice.name == "dinov3_vit7b16"
        if is_open and not is_satellite and "lvd1689m" not in name:
            note = " (assumed: the name of the weights does not say)"
    data = Weights.SAT493M if is_satellite else Weights.LVD1689M
    return data.name + note, normalization_of(data)


def normalization_of_run(path: Path) -> Normalization | None:
    """Return the normalisation of the training run that `path` is, or lies in; None without a run."""
    if (config_file := find_run_config(path)) is None:
        return None
    crops = read_run_config(config_file.parent).crops
    return Normalization(tuple(crops.rgb_mean), tuple(crops.rgb_std)) if "rgb_mean" in crops else None


def saved_normalization(path: Path) -> Normalization | None:
    """Read the normalisation that transformers and timm save in a model's directory; None without one."""
    directory = path if path.is_dir() else path.parent
    for name, section, mean, std in (
        ("preprocessor_config.json", None, "image_mean", "image_std"),  # Hugging Face
        ("config.json", "pretrained_cfg", "mean", "std"),  # timm
    ):
        if (directory / name).is_file():
            content = json.loads((directory / name).read_text(encoding="utf-8"))
            content = content if section is None else content.get(section, {})
            if mean in content and std in content:
                return Normalization(tuple(content[mean]), tuple(content[std]))
    return None


def names_satellite_weights(name: str) -> bool:
    """Return whether the name of a weights file says that they were trained on satellite images."""
    return any(mark in name.lower() for mark in SAT_MARKS)


def make_parser(module: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """Make the parser of `python -m dinov3.hub.<module>`."""
    return ArgumentParser(
        prog=f"python -m dinov3.hub.{module}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def option(help: str, default: Any = dataclasses.MISSING, **argument: Any) -> Any:
    """Declare a field of a dataclass that `parse_options` makes an option of the command line.

    Args:
        help: what the option means.
        default: of the field. Without one the option is required.
        **argument: more arguments of `ArgumentParser.add_argument`.
    """
    return dataclasses.field(default=default, metadata={"help": help, **argument})


def parse_options(parser: argparse.ArgumentParser, options_class: type[Any], argv: list[str] | None) -> Any:
    """Parse a command line into a dataclass, of which `model` is a `ModelChoice`.

    Args:
        parser: has the arguments `model` and `weights`; gets an option `--some-name` for each field `some_name` that
            was declared with `option`.
        options_class: the dataclass.
        argv: what follows the program's name. Default: that of this process.
    """
    for field in dataclasses.fields(options_class):
        if field.metadata:
            is_required = field.default is dataclasses.MISSING
            rest: dict[str, Any] = {"required": True} if is_required else {"default": field.default}
            parser.add_argument(f"--{field.name.replace('_', '-')}", **field.metadata, **rest)
    given = vars(parser.parse_args(argv))
    return options_class(model=ModelChoice(given.pop("model"), given.pop("weights")), **given)


def parse_size(text: str) -> tuple[int, int]:
    """Parse (height, width) from `S` or `HxW`, in pixels; for argparse."""
    match = re.fullmatch(r"([0-9]+)(?:x([0-9]+))?", text)
    if not match or 0 in (size := (int(match[1]), int(match[2] or match[1]))):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a side such as 224, or HEIGHTxWIDTH such as 480x640")
    return size


def parse_dtype(text: str) -> torch.dtype:
    """Parse a floating-point dtype by its name; for argparse."""
    try:
        dtype = as_torch_dtype(text)
    except KeyError:
        dtype = None
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise argparse.ArgumentTypeError(f"{text!r}: expected one of bfloat16, float16, float32")
    return dtype


def positive(text: str) -> int:
    """Parse a whole number from 1; for argparse."""
    if not re.fullmatch(r"[0-9]+", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, at least 1")
    return int(text)


def check_image_size(model: nn.Module, size: tuple[int, int]) -> Tokens:
    """Count the tokens of images of this size, with a note on stderr if some of the pixels are in none of them.

    Args:
        model: a backbone.
        size: (height, width) in pixels.

    Raises:
        ValueError: the size is smaller than a patch.
    """
    tokens, stride = count_tokens(model, size), patch_stride(model)
    if size[0] % stride or size[1] % stride:
        print(
            f"note: {size[0]} x {size[1]} pixels are not whole patches of {stride}: the last {size[0] % stride} rows "
            f"and {size[1] % stride} columns belong to no patch",
            file=sys.stderr,
        )
    return tokens


def describe_tokens(tokens: Tokens) -> str:
    """Write `201 (1 class, 4 storage, 14 x 14 patch tokens) of 384 channels` and the like."""
    rows, columns = tokens.grid
    parts = f"{tokens.n_class} class, {tokens.n_storage} storage, {rows} x {columns} patch tokens"
    return f"{tokens.total} ({parts}) of {tokens.channels} channels"


def describe_bytes(n_bytes: int) -> str:
    """Write `82.5 MiB` and the like."""
    for unit, size, digits in (("GiB", 2**30, 2), ("MiB", 2**20, 1), ("KiB", 2**10, 1)):
        if n_bytes >= size:
            return f"{n_bytes / size:.{digits}f} {unit}"
    return f"{n_bytes} bytes"


def check_output(path: Path, *, overwrite: bool) -> None:
    """Refuse a file that cannot be written, before the work begins.

    Raises:
        FileExistsError: the file exists, and `overwrite` is not set.
        FileNotFoundError: its directory does not exist.
        IsADirectoryError: it is a directory.
    """
    if path.is_dir():
        raise IsADirectoryError(f"--out {path} is a directory: name a file")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists already: choose another --out, or replace it with --overwrite")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"--out {path}: there is no directory {path.parent}")
