"""What evaluations wrap around a backbone, the loop that scores a model, and averages and files of its results."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3 import distributed
from dinov3.eval.command.results import as_file_name
from dinov3.eval.features.extraction import ResultsAccumulator

Key = TypeVar("Key", bound=Hashable)


class ModelWithNormalize(nn.Module):
    """A model whose output rows [B, D] are divided by their L2 norm (by 1e-12 where it is smaller)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Return unit rows [B, D]."""
        return F.normalize(self.model(images), dim=1, eps=1e-12)


class ModelWithMultiScale(nn.Module):
    """A model whose output is the mean over its inputs at scales 1, sqrt(1/2) and 1/2."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Return the mean output [B, D] for images [B, 3, H, W]."""
        outputs = [self.model(images)]
        for scale in (0.5**0.5, 0.5):
            scaled = F.interpolate(images, scale_factor=scale, mode="bilinear", align_corners=False)
            outputs.append(self.model(scaled))
        return torch.stack(outputs).mean(dim=0)


class ModelWithPatchMean(nn.Module):
    """A backbone whose output is the mean of its patch tokens after the final norm, instead of the class token."""

    model: Any

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if not hasattr(model, "forward_features"):
            raise ValueError(f"{type(model).__name__} has no forward_features, so it has no patch tokens")
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Return [B, D], float32."""
        return self.model.forward_features(images)["x_norm_patchtokens"].float().mean(dim=1)


def wrap_model(model: nn.Module, *, normalize: bool = True, multi_scale: bool = False) -> nn.Module:
    """Wrap a model to average over several scales, then to normalise its outputs."""
    if multi_scale:
        model = ModelWithMultiScale(model)
    return ModelWithNormalize(model) if normalize else model


class DictKeysModule(nn.Module):
    """A postprocessor that takes predictions from nested dictionaries of outputs.

    Args:
        keys: the path to the predictions.
        class_mapping: int64, the columns of the predictions to keep, in their new order. Default: all.
    """

    def __init__(self, keys: Sequence[Any], class_mapping: Tensor | None = None) -> None:
        super().__init__()
        self.keys = keys
        self.class_mapping = class_mapping

    def forward(self, features_dict: Any, targets: Tensor) -> dict[str, Tensor]:
        """Return `{"preds": features_dict[key][key]..., "target": targets}`."""
        for name in self.keys:
            features_dict = features_dict[name]
        if self.class_mapping is not None:
            features_dict = features_dict[:, self.class_mapping.to(features_dict.device)]
        return {"preds": features_dict, "target": targets}


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    data_loader: Iterable[Any],
    postprocessors: Mapping[Key, nn.Module],
    metrics: Mapping[Key, Any],
    device: torch.device,
    accumulate_results: bool = False,
) -> tuple[dict[Key, dict[str, Tensor]], dict[Key, dict[str, Tensor] | None]]:
    """Score a model, possibly by several metrics of several of its outputs at once.

    Args:
        model: put into evaluation mode.
        data_loader: yields `(samples, (index, targets))`; rows with a negative index are padding and dropped.
        postprocessors: by key, a function of (outputs, targets) that gives `{"preds", "target"}`.
        metrics: by key, what is updated with that; moved to `device`.
        device: where samples and targets go.
        accumulate_results: also return all predictions and targets.

    Returns:
        The computed metrics by key; and by key, `{"preds", "target"}` in dataset order, or None.
    """
    model.eval()
    metrics = {key: metric.to(device) for key, metric in metrics.items()}
    accumulators = {key: ResultsAccumulator() for key in postprocessors}
    for samples, (index, targets) in data_loader:
        real = index >= 0
        samples, index, targets = (t[real.to(t.device)].to(device) for t in (samples, index, targets))
        # The model is called for batches of padding too, because it may contain collectives.
        outputs = model(samples)
        for key, metric in metrics.items():
            results = postprocessors[key](outputs, targets)
            metric.update(**results)
            if accumulate_results:
                accumulators[key].update(**results, index=index)
    values = {key: metric.compute() for key, metric in metrics.items()}
    return values, {key: a.accumulate() if accumulate_results else None for key, a in accumulators.items()}


def average_metrics(
    eval_metrics_dict: Mapping[Any, Mapping[str, float]], ignore_keys: Sequence[str] = ()
) -> dict[str, float]:
    """Compute mean and unbiased standard deviation over tries.

    Args:
        eval_metrics_dict: metrics by try; their names are taken from the first one.
        ignore_keys: names to leave out.

    Returns:
        `<metric>_mean` and `<metric>_std` for each metric.
    """
    tries = list(eval_metrics_dict.values())
    averages = {}
    for name in (name for name in tries[0] if name not in ignore_keys):
        values = torch.tensor([float(metrics[name]) for metrics in tries], dtype=torch.float64)
        averages[f"{name}_mean"] = values.mean().item()
        averages[f"{name}_std"] = values.std().item() if len(values) > 1 else float("nan")
    return averages


def save_per_class(
    values: Mapping[str, Tensor], output_dir: str | os.PathLike[str], dataset_str: str, suffix: str = ""
) -> None:
    """Let the main process write `per_class-<dataset><suffix>.npy` if a metric gives "top-1" for each class."""
    if values["top-1"].ndim and distributed.is_main_process():
        directory = Path(output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        np.save(directory / f"per_class-{as_file_name(dataset_str)}{suffix}.npy", values["top-1"].cpu().numpy())


def save_results(
    preds: Tensor, target: Tensor, output_dir: str | os.PathLike[str], filename_suffix: str | int | None = None
) -> None:
    """Let the main process write `preds[_<suffix>].npy` and `target[_<suffix>].npy`."""
    if not distributed.is_main_process():
        return
    suffix = "" if filename_suffix is None else f"_{filename_suffix}"
    directory = Path(output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    for name, values in (("preds", preds), ("target", target)):
        np.save(directory / f"{name}{suffix}.npy", values.cpu().numpy())
