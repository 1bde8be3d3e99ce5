"""Leaving entries out of a module's state dict."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def register_dont_save_hooks(module: nn.Module, dont_save: Iterable[str]) -> None:
    """Leave entries out of `module.state_dict()`, and do not miss them in `module.load_state_dict()`.

    Args:
        module: e.g. a meta-architecture with a frozen teacher.
        dont_save: names of entries or of submodules, relative to `module`.
    """
    names = tuple(name.removesuffix(".") for name in dont_save)
    prefix_of_load = ""

    def is_left_out(key: str, prefix: str) -> bool:
        relative = key.removeprefix(prefix)
        return any(relative == name or relative.startswith(f"{name}.") for name in names)

    def drop_from_state_dict(_module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
        for key in [key for key in state if key.startswith(prefix) and is_left_out(key, prefix)]:
            del state[key]

    def remember_prefix(_module: nn.Module, _state: dict[str, Any], prefix: str, *_: Any) -> None:
        nonlocal prefix_of_load
        prefix_of_load = prefix

    def drop_from_missing(_module: nn.Module, incompatible: Any) -> None:
        missing = incompatible.missing_keys
        missing[:] = [
            key for key in missing if not (key.startswith(prefix_of_load) and is_left_out(key, prefix_of_load))
        ]

    module.register_state_dict_post_hook(drop_from_state_dict)
    module.register_load_state_dict_pre_hook(remember_prefix)
    module.register_load_state_dict_post_hook(drop_from_missing)
