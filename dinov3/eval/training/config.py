"""How a head on a frozen backbone is optimised, and which settings its training depends on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dinov3 import distributed
from dinov3.configs.settings import key
from dinov3.eval.command.results import plain


@dataclass
class SchedulerConfig:
    """How the learning rate changes."""

    type: str = key("WarmupOneCycleLR", "WarmupOneCycleLR, WarmupMultiStepLR, or a scheduler of torch")
    total_iter: int = key(38400, "number of steps", minimum=1)
    constructor_kwargs: dict[str, Any] = key({}, "further arguments of the scheduler, e.g. warmup_iters")


@dataclass
class OptimizerConfig:
    """AdamW."""

    lr: float = key(1e-4, "peak of the learning rate", minimum=0)
    beta1: float = key(0.9, "decay of the first moment; the scheduler may change it")
    beta2: float = key(0.999, "decay of the second moment")
    weight_decay: float = key(0.01, "weight decay", minimum=0)
    gradient_clip: float = key(35.0, "largest norm of the gradient; inf: any", above=0)


def training_settings(config: Any, *, ignored: Sequence[str]) -> dict[str, Any]:
    """List the settings that a training depends on, by dotted key, and the images per step of all processes.

    Args:
        config: a dataclass with `bs`, the images per step and process.
        ignored: keys and sections that have no effect on the training.
    """

    def leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        for name, entry in value.items():
            if prefix + name in ignored:
                continue
            if isinstance(entry, Mapping):
                yield from leaves(entry, f"{prefix}{name}.")
            else:
                yield prefix + name, entry

    return {**dict(leaves(plain(asdict(config)))), "bs x processes": config.bs * distributed.get_world_size()}
