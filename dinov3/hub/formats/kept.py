"""What another library has no place for, as text in the metadata of a safetensors file.

Written there, it comes back bit by bit when the file is converted again; libraries do not look at it.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dinov3.hub.formats.biases import effective_bias
from dinov3.hub.formats.layouts import State
from dinov3.utils.weight_files import SAFETENSORS_DTYPES, WeightsError

#: Under this name the metadata of a safetensors file holds what the layout has no place for.
METADATA_KEY = "dinov3"
#: Far above what the small entries of the largest model take: metadata cannot fill the memory.
MAX_KEPT_BYTES = 64 * 2**20


def keep(state: Mapping[str, Tensor], back: Mapping[str, Tensor]) -> dict[str, str]:
    """Metadata that tells `state` from `back`, which is what converting there and back makes of it; empty if equal."""
    kept = {name: tensor for name, tensor in state.items() if name not in back or not _is_same(tensor, back[name])}
    absent = [name for name in back if name not in state]
    if not kept and not absent:
        return {}
    return {METADATA_KEY: json.dumps({"kept": {name: _pack(t) for name, t in kept.items()}, "absent": absent})}


def restore(back: State, metadata: Mapping[str, str]) -> State:
    """The state that `keep` saw, of what converting there and back made of it.

    Biases that were trained after the conversion win over those that were kept.

    Raises:
        WeightsError: the metadata is damaged.
    """
    packed = metadata.get(METADATA_KEY)
    if packed is None:
        return back
    try:
        content = json.loads(packed)
        kept = {name: _unpack(entry) for name, entry in content["kept"].items()}
        absent = set(content["absent"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, zlib.error) as error:
        raise WeightsError(
            f"the metadata {METADATA_KEY!r} of the safetensors file is damaged ({error!r}): what an earlier conversion "
            "put aside cannot be read; convert the original weights again"
        ) from error
    restored = {name: tensor for name, tensor in {**back, **kept}.items() if name not in absent}
    blocks = {name.partition(".attn.")[0] for name in (*kept, *absent) if ".attn.qkv.bias" in name}
    for block in blocks:
        now, before = effective_bias(back, block), effective_bias(restored, block)
        if now is not None and not (torch.equal(now, before) if before is not None else not now.any()):
            names = (f"{block}.attn.qkv.bias", f"{block}.attn.qkv.bias_mask")
            restored |= {name: back[name] for name in names}
    return restored


def _is_same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.data_ptr() == b.data_ptr() and a.stride() == b.stride():
        return True
    return torch.equal(_as_bytes(a), _as_bytes(b))


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _pack(tensor: Tensor) -> dict[str, Any]:
    return {
        "dtype": next(code for code, dtype in SAFETENSORS_DTYPES.items() if dtype == tensor.dtype),
        "shape": list(tensor.shape),
        "data": base64.b64encode(zlib.compress(bytes(_as_bytes(tensor).numpy()), 9)).decode(),
    }


def _unpack(entry: Mapping[str, Any]) -> Tensor:
    dtype, shape = SAFETENSORS_DTYPES[entry["dtype"]], [int(size) for size in entry["shape"]]
    size = math.prod(shape) * dtype.itemsize
    if not 0 <= size <= MAX_KEPT_BYTES:
        raise ValueError(f"{size} bytes")
    data = zlib.decompressobj().decompress(base64.b64decode(entry["data"]), size + 1)
    if len(data) != size:
        raise ValueError(f"expected {size} bytes")
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)
