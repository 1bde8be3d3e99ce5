"""Weights from any format to the release's, Hugging Face transformers' or timm's.

    python -m dinov3.hub.convert SRC DST --to {release,huggingface,timm}

Notable:
- The output appears under its name when it is complete, and not before.
- Converting there and back changes no bit: what the other library has no place for is kept in the metadata of its
  safetensors file, which that library does not look at.
- Tensors pass through one after the other, from a mapped file to the output.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dinov3.hub.architectures import build_from_shapes, published_name
from dinov3.hub.command_line import SAT_MARKS, describe_bytes, make_parser, written_whole
from dinov3.hub.formats.conversion import Converted, Foreign, from_release
from dinov3.hub.formats.huggingface import huggingface_config, preprocessor_config
from dinov3.hub.formats.layouts import LAYER_NORM_EPS, Library
from dinov3.hub.formats.reading import CONFIG_FILE
from dinov3.hub.formats.timm import timm_config
from dinov3.hub.runs import CONFIG_FILE as RUN_CONFIG_FILE
from dinov3.hub.runs import find_teacher, read_run_config
from dinov3.hub.sources import locate
from dinov3.hub.transforms import Normalization, normalization_of
from dinov3.hub.weights import check_complete, read_state_dict
from dinov3.models.convnext import ConvNeXt
from dinov3.utils.command_line import run_command_line
from dinov3.utils.weight_files import WeightsError, write_safetensors

Target = Literal["release", "huggingface", "timm"]
Data = Literal["lvd1689m", "sat493m"]

TARGETS = ("release", "huggingface", "timm")
DATA = ("lvd1689m", "sat493m")
RELEASE_SUFFIXES = (".pth", ".pt", ".safetensors")
WEIGHTS_FILE = "model.safetensors"
PREPROCESSOR_FILE = "preprocessor_config.json"
#: Hugging Face's own limit for one file of the larger published models.
MAX_SHARD_BYTES = 5 * 10**9
#: What an earlier conversion may have left in a directory that is written anew.
REPLACEABLE = (CONFIG_FILE, PREPROCESSOR_FILE, "README.md", "LICENSE.md", ".gitattributes")


@dataclass(frozen=True)
class Written:
    """What `convert` wrote.

    Attributes:
        model: the hub entry that the weights are of; None: of another size.
        n_tensors: number of tensors.
        n_bytes: of all tensors together.
        files: all that was written.
    """

    model: str | None
    n_tensors: int
    n_bytes: int
    files: tuple[Path, ...]


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    to: Target,
    data: Data | None = None,
    overwrite: bool = False,
    progress: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Written:
    """Write the weights of a backbone in another format.

    Args:
        source: as `weights=` of the hub: a file, a directory or a URL, in any format; or the output directory of a
            training run, for its newest teacher.
        destination: for `release`, a file ending in .pth, .pt or .safetensors; for the others a directory, which
            `AutoModel.from_pretrained(DIRECTORY)` and `timm.create_model("local-dir:DIRECTORY", pretrained=True)` load,
            or a file ending in .safetensors for the weights alone.
        to: the format.
        data: what the weights were trained on, which decides on the normalisation of images that is written beside
            them; None: told by the names of files and by their entries, `lvd1689m` if they do not tell.
        overwrite: replace what is there.
        progress: show a bar.
        max_shard_bytes: Hugging Face directories hold files of at most this size.

    Raises:
        FileNotFoundError: there is nothing at the source, or no directory for the destination.
        FileExistsError: the destination exists.
        ValueError: the source holds no complete backbone, its model cannot be had in that library, or the destination
            has a name that does not suit.
        OSError: the disk is full, and the like.
    """
    destination = Path(destination).expanduser()
    _check_destination(destination, to, overwrite=overwrite)
    path = locate(source, progress=progress)
    if destination.exists() and destination.resolve() in (path.resolve(), *path.resolve().parents):
        raise ValueError(f"{destination} is what is read: choose another destination")
    weights = _read(path)
    name, size = published_name(weights.state), sum(tensor.nbytes for tensor in weights.state.values())
    _check_space(destination, size)
    if to == "release":
        with _Progress(size, progress) as bar:
            file = _write_release(destination, weights.state, bar)
        return Written(name, len(weights.state), size, (file,))
    foreign = _convert(weights, to, source=path)
    metadata = {"format": "pt"} | foreign.metadata
    size = sum(tensor.nbytes for tensor in foreign.state.values())
    with _Progress(size, progress) as bar:
        if destination.suffix == ".safetensors":
            files: tuple[Path, ...] = (_write_file(destination, foreign.state, metadata, bar),)
        else:
            normalization = _normalization(data or _data_of(path, weights.state, name))
            if to == "huggingface":
                config = huggingface_config(weights.state, foreign.state, layer_norm_eps=weights.layer_norm_eps)
                texts = {CONFIG_FILE: config, PREPROCESSOR_FILE: preprocessor_config(*normalization)}
            else:
                texts = {CONFIG_FILE: timm_config(weights.state, foreign.state, name, normalization)}
                max_shard_bytes = size
            files = _write_directory(destination, foreign.state, metadata, texts, max_shard_bytes, bar)
    return Written(name, len(foreign.state), size, files)


@dataclass(frozen=True)
class _Weights:
    state: Mapping[str, Tensor]
    layer_norm_eps: float
    normalize_coords: str = "separate"


def _read(path: Path) -> _Weights:
    if (path / RUN_CONFIG_FILE).is_file():
        return _read_run(path)
    state = read_state_dict(path)
    model = build_from_shapes(state)
    check_complete(state, model, source=str(path))
    eps = LAYER_NORM_EPS["convnext" if isinstance(model, ConvNeXt) else "vit"]
    return _Weights(state, float(state.config.get("layer_norm_eps", eps)) if isinstance(state, Converted) else eps)


def _read_run(path: Path) -> _Weights:
    from dinov3.models import build_model_from_cfg

    teacher = find_teacher(path)
    state = read_state_dict(teacher)
    check_complete(state, build_from_shapes(state), source=str(teacher))
    model, _ = build_model_from_cfg(read_run_config(path), only_teacher=True, fp8=False)
    rope = getattr(model, "rope_embed", None)
    eps = getattr(model.norm, "eps", LAYER_NORM_EPS["vit"])
    return _Weights(state, float(eps), "separate" if rope is None else rope.normalize_coords)


def _convert(weights: _Weights, to: Library, *, source: Path) -> Foreign:
    if weights.normalize_coords != "separate":
        raise WeightsError(
            f"{source}: the model was trained with positions normalised by {weights.normalize_coords!r}; the DINOv3 "
            f"models of {to} know only 'separate'"
        )
    if to == "timm" and "cls_token" in weights.state and weights.layer_norm_eps != LAYER_NORM_EPS["vit"]:
        raise WeightsError(
            f"{source}: the layer norms of the model add {weights.layer_norm_eps} to the variance, those of timm's "
            f"DINOv3 models {LAYER_NORM_EPS['vit']} (norm_layer=layernormbf16): convert it --to huggingface, which can "
            "have both"
        )
    try:
        return from_release(weights.state, to)
    except WeightsError as error:
        raise WeightsError(f"{source}: {error}") from error


def _check_destination(path: Path, to: Target, *, overwrite: bool) -> None:
    if to not in TARGETS:
        raise ValueError(f"unknown format {to!r}: expected one of {', '.join(TARGETS)}")
    if to == "release" and path.suffix not in RELEASE_SUFFIXES:
        raise ValueError(f"{path}: the release's format is one file, ending in {', '.join(RELEASE_SUFFIXES)}")
    if to != "release" and path.suffix in (".pth", ".pt", ".bin"):
        raise ValueError(f"{path}: {to} takes a directory, or a file ending in .safetensors for the weights alone")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no directory {path.absolute().parent}")
    if not path.exists():
        return
    is_file = to == "release" or path.suffix == ".safetensors"
    if path.is_dir() == is_file:
        raise FileExistsError(f"{path} exists and is {'a directory' if is_file else 'a file'}: choose another name")
    others = [] if is_file else [entry.name for entry in path.iterdir() if not _is_replaceable(entry)]
    if others:
        raise FileExistsError(f"{path} holds files of something else ({', '.join(sorted(others)[:5])}): choose another")
    if not overwrite and (is_file or any(path.iterdir())):
        raise FileExistsError(f"{path} exists already: choose another name, or replace it with --overwrite")


def _is_replaceable(path: Path) -> bool:
    return path.is_file() and (path.name in REPLACEABLE or ".safetensors" in path.suffixes)


def _check_space(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path.absolute().parent).free
    if needed > free:
        raise OSError(f"{path} needs {needed / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free on that disk")


def _data_of(path: Path, state: Mapping[str, Tensor], name: str | None) -> Data:
    is_named = any(mark in part.lower() for mark in SAT_MARKS for part in (path.name, path.resolve().parent.name))
    return "sat493m" if is_named or (name == "dinov3_vitl16" and "local_cls_norm.weight" in state) else "lvd1689m"


def _normalization(data: str) -> Normalization:
    if data not in DATA:
        raise ValueError(f"unknown data {data!r}: expected one of {', '.join(DATA)}")
    return normalization_of(data)


class _Progress:
    """A bar of bytes, shown or not; it begins with the first of them."""

    def __init__(self, total: int, is_shown: bool) -> None:
        self.total, self.is_shown = total, is_shown
        self.bar: Any = None

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *args: Any) -> None:
        if self.bar is not None:
            self.bar.close()

    def __call__(self, n_bytes: int) -> None:
        if self.bar is None:
            from tqdm import tqdm

            unit: Any = {"unit": "B", "unit_scale": True, "unit_divisor": 1024}
            self.bar = tqdm(total=self.total, disable=not self.is_shown, desc="writing", **unit)
        # A file has some bytes more than its tensors.
        self.bar.update(min(n_bytes, self.total - self.bar.n))


def _write_release(path: Path, state: Mapping[str, Tensor], bar: _Progress) -> Path:
    if path.suffix == ".safetensors":
        return _write_file(path, state, {"format": "pt"}, bar)
    with written_whole(path) as temporary, temporary.open("wb") as file:
        torch.save(_without_needless_bytes(state), _Counted(file, bar))  # type: ignore[arg-type]
    return path


def _without_needless_bytes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # torch.save writes the whole storage that a tensor is a part of.
    return {
        name: tensor.detach() if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.detach().clone()
        for name, tensor in state.items()
    }


class _Counted:
    """A file that reports what is written to it."""

    def __init__(self, file: Any, bar: _Progress) -> None:
        self.file, self.bar = file, bar

    def write(self, data: Any) -> int:
        self.bar(len(data))
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _write_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], bar: _Progress) -> Path:
    with written_whole(path) as temporary:
        write_safetensors(temporary, tensors, metadata, on_written=bar)
    return path


def _write_directory(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    texts: Mapping[str, Mapping[str, Any]],
    max_shard_bytes: int,
    bar: _Progress,
) -> tuple[Path, ...]:
    from dinov3.utils.files import publish_directory, temporary_beside

    temporary = temporary_beside(path)
    temporary.mkdir()
    try:
        for name, content in texts.items():
            (temporary / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        _write_shards(temporary, tensors, metadata, max_shard_bytes, bar)
        publish_directory(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return tuple(sorted(path.iterdir()))


def _write_shards(
    directory: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], max_shard_bytes: int, bar: _Progress
) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > max_shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        _write_file(directory / WEIGHTS_FILE, tensors, metadata, bar)
        return
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        _write_file(directory / name, shard, metadata if name == names[0] else {"format": "pt"}, bar)
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
    }
    (directory / f"{WEIGHTS_FILE}.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def make_arguments() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = make_parser(
        "convert",
        "Write the weights of a backbone in another format.",
        "examples:\n"
        "  python -m dinov3.hub.convert dinov3_vits16_pretrain_lvd1689m-08c60483.pth vits16 --to huggingface\n"
        "  python -m dinov3.hub.convert vits16 vits16.pth --to release\n"
        "  python -m dinov3.hub.convert runs/mine mine --to timm",
    )
    parser.add_argument(
        "source", metavar="SRC", help="a file, directory or URL of weights in any format, or of a training run"
    )
    parser.add_argument(
        "destination",
        type=Path,
        metavar="DST",
        help="release: a .pth or .safetensors file; huggingface, timm: a directory, or a .safetensors file for the "
        "weights alone",
    )
    parser.add_argument("--to", choices=TARGETS, required=True, help="the format to write")
    parser.add_argument(
        "--data",
        type=str.lower,
        choices=DATA,
        help="what the weights were trained on, for the normalisation that is written beside them (default: told by "
        "the name of the file)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.add_argument("--no-progress", action="store_true", help="show no bar")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command line; `argv` is what follows the program's name."""
    args = make_arguments().parse_args(argv)
    written = convert(
        args.source,
        args.destination,
        to=args.to,
        data=args.data,
        overwrite=args.overwrite,
        progress=not args.no_progress,
    )
    what = written.model or "a backbone of another size than the published ones"
    print(f"{args.destination}: {what}, {written.n_tensors} tensors, {describe_bytes(written.n_bytes)}")
    if args.to == "huggingface" and args.destination.is_dir():
        print(f'load it with transformers.AutoModel.from_pretrained("{args.destination}")')
    elif args.to == "timm" and args.destination.is_dir():
        print(f'load it with timm.create_model("local-dir:{args.destination}", pretrained=True)')


if __name__ == "__main__":
    run_command_line(main)
