"""Saving the state of the random generators of every rank as an entry of a checkpoint."""

from __future__ import annotations

import json
import logging
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov3.distributed import get_subgroup_rank, get_subgroup_size, runtime

logger = logging.getLogger("dinov3")


class RngState:
    """Saves and restores the generators of Python, NumPy, torch on the CPU and torch on the device.

    Each rank saves its own under `rank<r>`. They are restored exactly on the same number of processes; with a
    different number they are left as they are, and the log says so.
    """

    def state_dict(self) -> dict[str, Any]:
        """Return the state of this rank's generators, as uint8 tensors, and the number of ranks."""
        kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
        states = {
            "python": _to_bytes(random.getstate()),
            "numpy": _to_bytes([kind, np.asarray(keys).tolist(), position, has_gauss, cached]),
            "torch": torch.get_rng_state(),
        }
        if (device_state := runtime.get_rng_state()) is not None:
            states["device"] = device_state.cpu()
        return {"world_size": get_subgroup_size(), f"rank{get_subgroup_rank()}": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore this rank's generators from what all ranks saved."""
        if state["world_size"] != get_subgroup_size():
            logger.warning(
                "saved by %d processes and resumed by %d: random numbers and the split of the data will differ",
                state["world_size"],
                get_subgroup_size(),
            )
            return
        states = state[f"rank{get_subgroup_rank()}"]
        version, keys, gauss = _from_bytes(states["python"])
        random.setstate((version, tuple(keys), gauss))
        kind, keys, position, has_gauss, cached = _from_bytes(states["numpy"])
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
        torch.set_rng_state(states["torch"])
        if ("device" in states) != (runtime.get_rng_state() is not None):
            logger.warning("saved on a different kind of device: its random generator is not restored")
        elif "device" in states:
            runtime.set_rng_state(states["device"])


def _to_bytes(value: Any) -> Tensor:
    # As a tensor of JSON, so that no pickle is needed to read it.
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _from_bytes(tensor: Tensor) -> Any:
    return json.loads(bytes(tensor.tolist()))
