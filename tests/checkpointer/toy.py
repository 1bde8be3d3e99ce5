"""A small trained module, and its training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class Toy(nn.Module):
    """A student and an EMA teacher of a backbone with two blocks and a head."""

    def __init__(self, width: int = 8, n_prototypes: int = 6) -> None:
        super().__init__()
        self.student = network(width, n_prototypes)
        self.model_ema = network(width, n_prototypes).requires_grad_(False)
        self.register_buffer("center", torch.zeros(1, n_prototypes))

    def forward(self, x: Tensor) -> Tensor:
        return self.student["dino_head"](self.student["backbone"](x))


class Backbone(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.register_buffer("periods", torch.linspace(1, 2, 3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(torch.nn.functional.gelu(self.fc1(self.norm(x))))


def network(width: int, n_prototypes: int) -> nn.ModuleDict:
    return nn.ModuleDict({"backbone": Backbone(width), "dino_head": nn.Linear(width, n_prototypes)})


def make(seed: int = 0, **sizes: int) -> tuple[Toy, torch.optim.Optimizer]:
    """A module with an AdamW of two groups; nothing was stepped yet."""
    torch.manual_seed(seed)
    model = Toy(**sizes)
    return model, make_optimizer(model)


def make_optimizer(model: Toy) -> torch.optim.Optimizer:
    groups = [
        {"params": list(model.student["backbone"].parameters()), "lr_multiplier": 0.5, "is_last_layer": False},
        {"params": list(model.student["dino_head"].parameters()), "lr_multiplier": 1.0, "is_last_layer": True},
    ]
    return torch.optim.AdamW(groups, lr=0.01)


def batch(step: int, width: int = 8, rows: int = 4) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(step))


def train(model: Toy, optimizer: torch.optim.Optimizer, steps: range, rows: slice = slice(None)) -> None:
    """Some steps on fixed data, the same for every process if `rows` is; the teacher follows."""
    for step in steps:
        optimizer.zero_grad(set_to_none=True)
        model(batch(step)[rows]).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            for own, of_student in zip(model.model_ema.parameters(), model.student.parameters(), strict=True):
                own.lerp_(of_student, 0.1)


def assert_equal(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Bitwise equal state dicts."""
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def data_file(directory: Path) -> Path:
    """The largest file of a checkpoint, which holds the tensors."""
    return max(directory.iterdir(), key=lambda path: path.stat().st_size)
