"""An evaluation of seconds: labelled vectors in place of images, and one linear layer for a backbone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dinov3.eval import knn
from dinov3.eval.classification import data
from dinov3.eval.classification.config import FewShotConfig
from dinov3.eval.classification.knn_config import EvalConfig, KnnEvalConfig, TrainConfig
from dinov3.eval.command.model import ModelConfig

N_CLASSES = 6


class Vectors:
    """Noisy copies of one centre per class, labels known without loading; every fifth sample is there twice.

    Args:
        name: `train`, `test` or another, which changes the noise.
        size: number of samples.
    """

    def __init__(self, name: str, size: int) -> None:
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        self.labels = (torch.arange(size) * 7 % N_CLASSES).numpy()
        centres = torch.randn(N_CLASSES, 12, generator=torch.Generator().manual_seed(0))
        self.samples = centres[self.labels] + 1.5 * torch.randn(size, 12, generator=generator)
        self.samples[1::5] = self.samples[0::5][: len(self.samples[1::5])].clone()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.samples[index], int(self.labels[index])

    def get_target(self, index: int) -> int:
        return int(self.labels[index])

    def get_targets(self) -> np.ndarray[Any, Any]:
        return self.labels


class Backbone(nn.Module):
    """A linear layer; the class token and patch tokens of `forward_features` differ."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 8)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(1)
            self.fc.weight.copy_(torch.randn(8, 12, generator=generator))
            self.fc.bias.zero_()
        self.n_seen = 0

    def forward(self, samples: Tensor) -> Tensor:
        self.n_seen += len(samples)
        return self.fc(samples)

    def forward_features(self, samples: Tensor) -> dict[str, Tensor]:
        token = self.fc(samples)
        return {
            "x_norm_clstoken": token,
            "x_norm_patchtokens": torch.stack([token * 2, token[:, [7, 1, 2, 3, 4, 5, 6, 0]]], dim=1),
        }


def use_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let dataset strings `<name>:<size>` stand for `Vectors`."""
    monkeypatch.setattr(data, "make_dataset", make_vectors)


def make_vectors(*, dataset_str: str, **_: Any) -> Vectors:
    """The dataset of `<name>:<size>`."""
    name, size = dataset_str.split(":")
    return Vectors(name, int(size))


def make_config(output_dir: Any, *, train: str = "train:120", test: str = "test:50", **sections: Any) -> KnnEvalConfig:
    """A configuration without loader processes; keyword arguments such as `train__ks` set keys."""
    options: dict[str, dict[str, Any]] = {"train": {}, "eval": {}, "few_shot": {}}
    for name, value in sections.items():
        section, _, key = name.partition("__")
        options[section][key] = value
    return KnnEvalConfig(
        model=ModelConfig(),
        train=TrainConfig(**{"dataset": train, "num_workers": 0, "ks": [5, 20], "batch_size": 16} | options["train"]),
        eval=EvalConfig(**{"test_dataset": test, "num_workers": 0} | options["eval"]),
        few_shot=FewShotConfig(**options["few_shot"]),
        save_results=True,
        output_dir=str(output_dir),
    )


def run(config: KnnEvalConfig) -> dict[str, float]:
    """Evaluate the toy backbone."""
    return knn.eval_knn_with_model(model=Backbone(), autocast_dtype=torch.float32, config=config)
