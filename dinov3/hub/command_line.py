"""What the command lines of the hub share: which model is meant, image sizes, files that are never half-written."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import torch
from torch import nn

from dinov3.hub import backbones
from dinov3.hub.backbones import Weights
from dinov3.hub.runs import dinov3_from_run, read_run_config
from dinov3.hub.transforms import Normalization, normalization_of
from dinov3.models.summary import Tokens, count_tokens, patch_stride
from dinov3.utils import as_torch_dtype, did_you_mean

#: The published backbones.
ENTRIES = tuple(sorted(name for name in backbones.__all__ if name.startswith("dinov3_")))

MODEL_HELP = f"one of {', '.join(ENTRIES)}; or the output directory of a training run, for its newest teacher"
WEIGHTS_HELP = (
    "a file, a directory or a URL of weights of this model, or LVD1689M or SAT493M for the published ones (default: "
    "LVD1689M, which are downloaded and need access); not for a training run"
)

NORMALIZATIONS = ("auto", "lvd", "sat")
#: First digits of the published files that were trained on satellite images.
SAT_MARKS = ("sat493m", "eadcf0ff", "a6675841")


@dataclass(frozen=True)
class ModelChoice:
    """A backbone as a command line names it.

    Attributes:
        name: a published backbone, or the output directory of a training run.
        weights: as `weights=` of the hub; None: the published ones. A training run has its own.
    """

    name: str
    weights: str | None = None

    @property
    def is_run(self) -> bool:
        """Whether this is a training run."""
        return self.name not in ENTRIES

    def check(self) -> None:
        """Refuse what cannot be, before anything is loaded.

        Raises:
            ValueError: there is no such model, or weights are given for a training run.
            FileNotFoundError: a path of no directory.
        """
        if not self.is_run:
            return
        path = Path(self.name).expanduser()
        if path.is_dir():
            if self.weights is not None:
                raise ValueError(f"{self.name} is a training run, which has its own weights: leave out --weights")
        elif len(path.parts) > 1:
            raise FileNotFoundError(f"there is no training run at {self.name}: no such directory")
        else:
            raise ValueError(
                f"unknown model {self.name!r}{did_you_mean(self.name, ENTRIES)}: choose one of {', '.join(ENTRIES)}, "
                "or the output directory of a training run"
            )

    def load(self, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
        """The backbone with its weights, in evaluation mode.

        Args:
            device: where it goes.
            dtype: of its parameters.

        Raises:
            ValueError, OSError: see `check` and the entries of the hub.
        """
        self.check()
        if self.is_run:
            return _cast_parameters(dinov3_from_run(self.name), dtype).to(device)
        options = {} if self.weights is None else {"weights": self.weights}
        model: nn.Module = getattr(backbones, self.name)(device=device, dtype=dtype, **options)
        return model

    def build(self) -> nn.Module:
        """The backbone on the meta device: its structure, without weights and without memory.

        Raises:
            ValueError, OSError: see `check`, and `dinov3_from_run` for training runs.
        """
        self.check()
        if self.is_run:
            return dinov3_from_run(self.name).to("meta")
        options = {} if self.weights is None else {"weights": self.weights}
        model: nn.Module = getattr(backbones, self.name)(pretrained=False, device="meta", **options)
        return model

    def __str__(self) -> str:
        return self.name if self.is_run or self.weights is None else f"{self.name} ({self.weights})"


def find_normalization(choice: ModelChoice, model: nn.Module, wanted: str = "auto") -> tuple[str, Normalization]:
    """The normalisation of pixels that belongs to some weights.

    Args:
        choice: the model and its weights; satellite weights are known by the name of their file, a training run by its
            configuration.
        model: the backbone, in which the satellite weights of ViT-L/16 are known by their additional norm.
        wanted: `auto`, or `lvd` or `sat` to decide it.

    Returns:
        What to call it, and the normalisation.
    """
    if wanted == "auto" and choice.is_run:
        crops = read_run_config(Path(choice.name).expanduser()).crops
        return "of the training run", Normalization(tuple(crops.rgb_mean), tuple(crops.rgb_std))
    lvd, sat = Weights.LVD1689M, Weights.SAT493M
    named = (choice.weights or lvd.name).lower()
    if wanted != "auto":
        data, how = {"lvd": lvd, "sat": sat}[wanted], ""
    elif any(mark in named for mark in SAT_MARKS):
        data, how = sat, ""
    elif choice.name == "dinov3_vitl16":
        # Of this one the satellite weights have a norm more.
        data, how = lvd if getattr(model, "local_cls_norm", None) is None else sat, ""
    else:
        told = lvd.name.lower() in named or choice.name != "dinov3_vit7b16"
        data, how = lvd, "" if told else " (assumed: the name of the weights does not say)"
    return data.name + how, normalization_of(data)


def make_parser(module: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """The parser of `python -m dinov3.hub.<module>`."""
    return argparse.ArgumentParser(
        prog=f"python -m dinov3.hub.{module}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) from `S` or `HxW`, in pixels; for argparse."""
    match = re.fullmatch(r"([0-9]+)(?:x([0-9]+))?", text)
    if not match or 0 in (size := (int(match[1]), int(match[2] or match[1]))):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a side such as 224, or HEIGHTxWIDTH such as 480x640")
    return size


def parse_dtype(text: str) -> torch.dtype:
    """A floating-point dtype by name; for argparse."""
    known = {"float32", "bfloat16", "float16"}
    try:
        dtype = as_torch_dtype(text)
    except KeyError:
        dtype = None
    if str(dtype).removeprefix("torch.") not in known:
        raise argparse.ArgumentTypeError(f"{text!r}: expected one of {', '.join(sorted(known))}")
    assert dtype is not None
    return dtype


def positive(text: str) -> int:
    """A whole number from 1; for argparse."""
    if not re.fullmatch(r"[0-9]+", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, at least 1")
    return int(text)


def check_image_size(model: nn.Module, size: tuple[int, int]) -> Tokens:
    """The tokens of images of this size, with a note on stderr if some of the pixels are in none of them.

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
    """Such as `201 (1 class, 4 storage, 14 x 14 patch tokens) of 384 channels`."""
    parts = [f"{tokens.n_class} class", f"{tokens.n_storage} storage", f"{tokens.grid[0]} x {tokens.grid[1]} patch"]
    return f"{tokens.total} ({', '.join(parts)} tokens) of {tokens.channels} channels"


def describe_bytes(n_bytes: int) -> str:
    """Such as `82.5 MiB`."""
    for unit, size, digits in (("GiB", 2**30, 2), ("MiB", 2**20, 1), ("KiB", 2**10, 1)):
        if n_bytes >= size:
            return f"{n_bytes / size:.{digits}f} {unit}"
    return f"{n_bytes} bytes"


def check_output(path: Path, *, overwrite: bool) -> None:
    """Refuse a file that cannot be written, before the work begins.

    Raises:
        FileExistsError: the file is there, and `overwrite` is not set.
        FileNotFoundError: its directory is not there.
        IsADirectoryError: it is a directory.
    """
    if path.is_dir():
        raise IsADirectoryError(f"--out {path} is a directory: name a file")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists already: choose another --out, or replace it with --overwrite")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"--out {path}: there is no directory {path.parent}")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`: its file takes the name `path` if the body ends well, and goes if it does not."""
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def require(package: str, purpose: str, pip_name: str) -> None:
    """Say what to install if a package is missing.

    Raises:
        ModuleNotFoundError: it is.
    """
    try:
        __import__(package)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{purpose} needs {package}: pip install {pip_name}") from error


def _cast_parameters(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model  # Buffers stay: the periods of positions need their precision.
