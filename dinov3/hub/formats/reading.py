"""Files and directories as transformers and timm save them: weights in one file or several, a config.json beside."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dinov3.utils.messages import list_names
from dinov3.utils.weight_files import WeightsError, is_safetensors, read_file, read_safetensors_header, should_map

CONFIG_FILE = "config.json"
INDEX_SUFFIX = ".safetensors.index.json"
#: Files with the weights of a model directory, in the order in which they are looked for.
WEIGHTS_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
MODEL_TYPES = ("dinov3_vit", "dinov3_convnext")


@dataclass(frozen=True)
class Content:
    """What a weights file holds, with what lies beside it.

    Attributes:
        entries: as they are.
        metadata: of the safetensors files.
        config: the content of the `config.json` of transformers or timm in the same directory; empty if there is none.
    """

    entries: Mapping[str, Any]
    metadata: dict[str, str]
    config: dict[str, Any]


def read_content(path: Path, *, mmap: bool | None = None) -> Content:
    """Read a weights file of any format, or a directory as transformers and timm save it.

    Args:
        path: a PyTorch checkpoint, a safetensors file, the index of a sharded one, or a directory with one of these
            and possibly a `config.json`.
        mmap: see `read_file`; shards of one model count together.

    Raises:
        WeightsError: there are no weights, or they are damaged or those of something else.
    """
    if path.is_dir():
        config: dict[str, Any] = {}
        if (path / CONFIG_FILE).is_file():
            config = _read_json(path / CONFIG_FILE)
            _check_config(config, path)
        content = read_content(_weights_file(path), mmap=mmap)
        if not _is_config_of(config, content.entries):
            raise WeightsError(
                f"{path} contradicts itself: its {CONFIG_FILE} describes a model of {_channels(config)} channels, its "
                "weights have another size; fetch both again"
            )
        return replace(content, config=config)
    if path.suffix == ".json":
        return _read_sharded(path, mmap=mmap)
    entries = read_file(path, mmap=mmap)
    metadata = read_safetensors_header(path).metadata if is_safetensors(path) else {}
    return Content(entries, metadata, _config_beside(path, entries))


def is_model_directory(path: Path) -> bool:
    """Return whether a directory looks like a model of transformers or timm."""
    return (path / CONFIG_FILE).is_file() or any(path.glob("*.safetensors")) or (path / WEIGHTS_FILES[-1]).is_file()


def _weights_file(directory: Path) -> Path:
    for name in WEIGHTS_FILES:
        if (directory / name).is_file():
            return directory / name
    others = sorted(directory.glob(f"*{INDEX_SUFFIX}")) or sorted(directory.glob("*.safetensors"))
    if len(others) == 1:
        return others[0]
    if others:
        names = list_names([path.name for path in others], most=10)
        raise WeightsError(f"{directory} holds several weights files: pass one of {names}")
    held = list_names(sorted(path.name for path in directory.iterdir()), most=10)
    raise WeightsError(
        f"{directory} has a {CONFIG_FILE}, but no weights: expected {' or '.join(WEIGHTS_FILES[:2])}, found {held}; "
        "the download was incomplete or left out large files"
    )


def _read_sharded(index: Path, *, mmap: bool | None) -> Content:
    files = _read_json(index).get("weight_map")
    if not isinstance(files, Mapping) or not all(isinstance(name, str) for name in files.values()):
        raise WeightsError(
            f"{index} is not the index of a sharded checkpoint: it has no weight_map; expected "
            f"model{INDEX_SUFFIX}, or pass the directory"
        )
    shards = sorted(set(files.values()))
    for name in shards:
        if Path(name).name != name or name in ("", ".", ".."):
            raise WeightsError(f"{index} names a shard outside its directory, which is not read: {name!r}")
    missing = [name for name in shards if not (index.parent / name).is_file()]
    if missing:
        raise WeightsError(
            f"{index.parent} lacks {len(missing)} of the {len(shards)} shards that {index.name} names: "
            f"{list_names(missing)}; fetch them"
        )
    if mmap is None:
        mmap = should_map(*(index.parent / name for name in shards))
    entries: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    for name in shards:
        shard = read_content(index.parent / name, mmap=mmap)
        wanted = {key for key, file in files.items() if file == name}
        if absent := sorted(wanted - set(shard.entries)):
            raise WeightsError(f"{index} says that {absent[0]} is in {name}, but it is not there; fetch both again")
        entries |= {key: tensor for key, tensor in shard.entries.items() if key in wanted}
        metadata |= shard.metadata
    return Content(entries, metadata, _config_beside(index, entries))


def _config_beside(path: Path, entries: Mapping[str, Any]) -> dict[str, Any]:
    if not (path.parent / CONFIG_FILE).is_file():
        return {}
    try:
        config = _read_json(path.parent / CONFIG_FILE)
        _check_config(config, path)
    except WeightsError:  # A file of this name need not have anything to do with these weights.
        return {}
    return config if _is_config_of(config, entries) else {}


def _check_config(config: Mapping[str, Any], source: Path) -> None:
    model_type, architecture = config.get("model_type"), str(config.get("architecture", ""))
    if model_type in MODEL_TYPES or "dinov3" in architecture or architecture.startswith("convnext_"):
        return
    found = f"model_type {model_type!r}" if model_type else f"architecture {architecture!r}" if architecture else None
    raise WeightsError(
        f"{source} does not hold a DINOv3 backbone: its {CONFIG_FILE} names "
        + (found or "neither a model_type nor an architecture")
        + f"; expected the model_type {' or '.join(MODEL_TYPES)} of transformers, or a DINOv3 architecture of timm"
    )


def _is_config_of(config: Mapping[str, Any], entries: Mapping[str, Any]) -> bool:
    channels = _channels(config)
    tokens = [entry for name, entry in entries.items() if name.endswith("cls_token") and isinstance(entry, Tensor)]
    return channels is None or all(token.shape[-1] == channels for token in tokens)


def _channels(config: Mapping[str, Any]) -> int | None:
    if config.get("model_type") == "dinov3_vit":
        return config.get("hidden_size")
    return config.get("num_features") if "dinov3" in str(config.get("architecture")) else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not JSON, or is damaged: {error}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}, expected a JSON object")
    return content
