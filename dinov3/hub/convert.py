"""Weights from any format to the release's, Hugging Face transformers' or timm's.

    python -m dinov3.hub.convert SRC DST --to {release,huggingface,timm}

Notable:
- The output only appears under its name when it is complete.
- Converting there and back changes no bit: what the other library has no place for is kept in the metadata of its
  safetensors file, which that library ignores.
- Tensors pass through one after the other, from a mapped file to the output, which is another file until it is renamed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm
from tqdm.utils import CallbackIOWrapper

from dinov3.hub.architectures import published_name
from dinov3.hub.command_line import describe_bytes, make_parser, names_satellite_weights, normalization_of_run
from dinov3.hub.formats.conversion import Foreign, from_release
from dinov3.hub.formats.huggingface import huggingface_config, preprocessor_config
from dinov3.hub.formats.layouts import LAYER_NORM_EPS, Library
from dinov3.hub.formats.reading import CONFIG_FILE
from dinov3.hub.formats.timm import timm_config
from dinov3.hub.from_checkpoint import complete_backbone
from dinov3.hub.run_directory import find_checkpoint, find_run_config, read_run_config
from dinov3.hub.sources import locate, naming_download
from dinov3.hub.transforms import normalization_of
from dinov3.hub.weights import read_state_dict
from dinov3.utils.command_line import run_command_line
from dinov3.utils.files import atomic_write, publish_directory, temporary_beside
from dinov3.utils.messages import list_names
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
#: Files of an earlier conversion, or a download, that may be replaced with their directory.
REPLACEABLE = (CONFIG_FILE, PREPROCESSOR_FILE, "README.md", "LICENSE.md", ".gitattributes")


@dataclass(frozen=True)
class Written:
    """What `convert` wrote.

    Attributes:
        model: the hub entry that the weights are of; None for another size.
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
            or a file ending in .safetensors for only the weights.
        to: the format.
        data: what the weights were trained on, which decides the normalisation of images that is written beside them.
            Default: that of the training run; without one, recognised by the names of files and entries, otherwise
            `lvd1689m`.
        overwrite: replace what is there.
        progress: show a bar.
        max_shard_bytes: Hugging Face directories hold files of at most this size.

    Raises:
        FileNotFoundError: there is nothing at the source, or no directory for the destination.
        FileExistsError: the destination exists.
        ValueError: the source does not hold a complete backbone, that library has no such model, or the destination
            has an unsuitable name.
        OSError: the disk is full, and the like.
    """
    if data not in (None, *DATA):
        raise ValueError(f"unknown data {data!r}: expected one of {', '.join(DATA)}")
    destination = Path(destination).expanduser()
    _check_destination(destination, to, overwrite=overwrite)
    path = locate(source, progress=progress)
    if destination.exists() and destination.resolve() in (path.resolve(), *path.resolve().parents):
        raise ValueError(f"the source would be overwritten: {destination} is or holds it; choose another destination")
    with naming_download(source, path):
        weights = _read(path)
        tensors, metadata = weights.state, {"format": "pt"}
        if to != "release":
            foreign = _convert(weights, to, source=path)
            tensors, metadata = foreign.state, metadata | foreign.metadata
    name, size = published_name(weights.state), sum(tensor.nbytes for tensor in tensors.values())
    free = shutil.disk_usage(destination.absolute().parent).free
    if size > free:
        raise OSError(f"{destination} needs {size / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free on that disk")
    files: tuple[Path, ...] = (destination,)
    unit: Any = {"unit": "B", "unit_scale": True, "unit_divisor": 1024}
    with tqdm(total=size, disable=not progress, desc="writing", **unit) as bar:
        if destination.suffix == ".safetensors":
            write_safetensors(destination, tensors, metadata, on_written=bar.update)
        elif to == "release":
            with atomic_write(destination) as file:
                # A file has some bytes more than its tensors.
                counted = CallbackIOWrapper(lambda n_bytes: bar.update(min(n_bytes, size - bar.n)), file, "write")
                # It writes the whole storage that a tensor is a part of.
                is_whole = {key: tensor.untyped_storage().nbytes() == tensor.nbytes for key, tensor in tensors.items()}
                torch.save({k: t.detach() if is_whole[k] else t.detach().clone() for k, t in tensors.items()}, counted)
        else:
            of_run = normalization_of_run(path) if data is None else None
            mean, std = of_run or normalization_of(data or _recognise_data(path, weights.state, name))
            if to == "huggingface":
                config = huggingface_config(weights.state, tensors, layer_norm_eps=weights.layer_norm_eps)
                texts = {CONFIG_FILE: config, PREPROCESSOR_FILE: preprocessor_config(mean, std)}
            else:
                texts = {CONFIG_FILE: timm_config(weights.state, tensors, name, (mean, std))}
                max_shard_bytes = size  # timm reads one file.
            files = _write_directory(destination, tensors, metadata, texts, max_shard_bytes, bar.update)
    return Written(name, len(tensors), size, files)


@dataclass(frozen=True)
class _Weights:
    state: Mapping[str, Tensor]
    layer_norm_eps: float
    normalize_coords: str = "separate"


def _read(path: Path) -> _Weights:
    config_file, source = find_run_config(path), find_checkpoint(path)
    config = None if config_file is None else read_run_config(config_file.parent).student
    model, state = complete_backbone(read_state_dict(source, mmap=True), source=str(source), config=config)
    rope = getattr(model, "rope_embed", None)
    normalize_coords = "separate" if rope is None else rope.normalize_coords
    return _Weights(state, float(getattr(model.norm, "eps", LAYER_NORM_EPS["vit"])), normalize_coords)


def _convert(weights: _Weights, to: Library, *, source: Path) -> Foreign:
    if weights.normalize_coords != "separate":
        raise WeightsError(
            f"{source}: the model was trained with positions normalised by {weights.normalize_coords!r}; the DINOv3 "
            f"models of {to} only support 'separate'"
        )
    if to == "timm" and "cls_token" in weights.state and weights.layer_norm_eps != LAYER_NORM_EPS["vit"]:
        raise WeightsError(
            f"{source}: the layer norms of the model add {weights.layer_norm_eps} to the variance, those of timm's "
            f"DINOv3 models {LAYER_NORM_EPS['vit']} (norm_layer=layernormbf16): convert it --to huggingface, which "
            "supports both"
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
        raise ValueError(f"{path}: {to} takes a directory, or a file ending in .safetensors for only the weights")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no directory {path.absolute().parent}")
    if not path.exists():
        return
    is_file = to == "release" or path.suffix == ".safetensors"
    if path.is_dir() == is_file:
        raise FileExistsError(f"{path} exists and is {'a directory' if is_file else 'a file'}: choose another name")
    there = [] if is_file else sorted(path.iterdir())
    others = [
        entry.name
        for entry in there
        if not (entry.is_file() and (entry.name in REPLACEABLE or ".safetensors" in entry.suffixes))
    ]
    if others:
        raise FileExistsError(f"{path} holds files of something else ({list_names(others)}): choose another")
    if not overwrite and (is_file or there):
        raise FileExistsError(f"{path} exists already: choose another name, or replace it with --overwrite")


def _recognise_data(path: Path, state: Mapping[str, Tensor], name: str | None) -> Data:
    is_named = names_satellite_weights(path.name) or names_satellite_weights(path.resolve().parent.name)
    return "sat493m" if is_named or (name == "dinov3_vitl16" and "local_cls_norm.weight" in state) else "lvd1689m"


def _write_directory(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    texts: dict[str, dict[str, Any]],
    max_shard_bytes: int,
    on_written: Callable[[int], Any],
) -> tuple[Path, ...]:
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > max_shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [WEIGHTS_FILE]
    else:
        texts[f"{WEIGHTS_FILE}.index.json"] = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
            "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
        }
    temporary = temporary_beside(path)
    temporary.mkdir()
    try:
        for name, content in texts.items():
            (temporary / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for name, shard in zip(names, shards, strict=True):
            # The first shard carries what was not converted, as readers merge the metadata of all.
            of_shard = metadata if name == names[0] else {"format": "pt"}
            write_safetensors(temporary / name, shard, of_shard, on_written=on_written)
        publish_directory(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return tuple(sorted(path.iterdir()))


def main(argv: list[str] | None = None) -> None:
    """Run the command line, given what follows the program's name."""
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
        help="release: a .pth or .safetensors file; huggingface, timm: a directory, or a .safetensors file for "
        "only the weights",
    )
    parser.add_argument("--to", choices=TARGETS, required=True, help="the format to write")
    parser.add_argument(
        "--data",
        type=str.lower,
        choices=DATA,
        help="what the weights were trained on, for the normalisation that is written beside them (default: recognised "
        "by the name of the file)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.add_argument("--no-progress", action="store_true", help="show no bar")
    args = parser.parse_args(argv)
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
