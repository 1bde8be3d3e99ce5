"""A linear probe of seconds: small noisy images of a few classes, and a backbone of two frozen layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dinov3.eval import linear
from dinov3.eval.classification import data
from dinov3.eval.classification.config import FewShotConfig
from dinov3.eval.classification.linear_config import EvalConfig, LinearEvalConfig, TrainConfig
from dinov3.eval.command.model import ModelConfig
from dinov3.eval.features.cache import FeaturesConfig

N_CLASSES = 6


class Images:
    """Labelled noisy tensors [3, 4, 4], one pattern per class.

    Args:
        name: changes the noise.
        size: number of samples.
        jitter: add noise from the global generator to each sample, as augmentation does.
    """

    def __init__(self, name: str, size: int, jitter: bool = False) -> None:
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        self.labels: np.ndarray[Any, Any] = (torch.arange(size) * 7 % N_CLASSES).numpy()
        patterns = torch.randn(N_CLASSES, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        self.samples = patterns[self.labels] + 1.5 * torch.randn(size, 3, 4, 4, generator=generator)
        self.jitter = jitter

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        sample = self.samples[index]
        return (sample + 0.1 * torch.randn_like(sample) if self.jitter else sample), self.get_target(index)

    def get_target(self, index: int) -> Any:
        target = self.labels[index]
        return target if np.ndim(target) else int(target)

    def get_targets(self) -> Any:
        return self.labels


class Backbone(nn.Module):
    """Two layers on the four pixel columns as patches; `n_seen` counts images."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.layers = nn.ModuleList([nn.Linear(12, 8), nn.Linear(8, 8)])
        for parameter in self.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
        self.n_seen = 0

    def get_intermediate_layers(
        self, x: Tensor, n: int, reshape: bool = False, return_class_token: bool = True
    ) -> tuple[Any, ...]:
        self.n_seen += len(x)
        tokens = x.flatten(1, 2).transpose(1, 2)  # [B, 4, 12]
        outputs = []
        for layer in self.layers:
            tokens = layer(tokens).tanh()
            outputs.append((tokens[:, 1:], tokens[:, 0]))
        return tuple(outputs[-n:])


SIZES = {"TOY_TRAIN": 90, "TOY_VAL": 50, "TOY_TEST": 70}


def make_images(*, dataset_str: str, **_: Any) -> Images:
    """The dataset of a string: `TOY_TRAIN`, or `<name>:<size>`; `jitter...` is augmented."""
    name, _, size = dataset_str.partition(":")
    return Images(name, int(size) if size else SIZES[name], jitter=name.startswith("jitter"))


def use_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let dataset strings stand for `Images`."""
    monkeypatch.setattr(data, "make_dataset", make_images)


def make_config(output_dir: Any, *, save_results: bool = False, **sections: Any) -> LinearEvalConfig:
    """A configuration without loader processes or cache; keyword arguments such as `train__epochs` set keys."""
    options: dict[str, dict[str, Any]] = {"train": {}, "eval": {}, "few_shot": {}}
    for name, value in sections.items():
        section, _, key = name.partition("__")
        options[section][key] = value
    train: dict[str, Any] = {
        "dataset": "TOY_TRAIN",
        "val_dataset": "TOY_VAL",
        "num_workers": 0,
        "batch_size": 16,
        "epochs": 3,
        "epoch_length": 4,
        "learning_rates": [0.1, 1.0],
        "n_last_blocks_list": [1, 2],
    }
    return LinearEvalConfig(
        model=ModelConfig(),
        train=TrainConfig(**train | options["train"]),
        eval=EvalConfig(**{"num_workers": 0} | options["eval"]),
        few_shot=FewShotConfig(**options["few_shot"]),
        features=FeaturesConfig(cache=False),
        save_results=save_results,
        output_dir=str(output_dir),
    )


def run(config: LinearEvalConfig, model: nn.Module | None = None) -> dict[str, Any]:
    """Evaluate a backbone, by default the toy one."""
    return linear.eval_linear_with_model(model=model or Backbone(), autocast_dtype=torch.float32, config=config)
