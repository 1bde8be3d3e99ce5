"""One training iteration: schedules, forward and backward, clipping, and a step that is taken only if all is finite.

Notable: a non-finite loss or gradient never reaches the weights. All ranks decide alike from one reduced vector, which
also carries the metrics, so that an iteration has one small all-reduce and one host synchronisation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dinov3 import distributed
from dinov3.fsdp import clip_grad_norm_
from dinov3.train.schedules import StepSettings, apply_optim_scheduler
from dinov3.train.ssl_meta_arch import SSLMetaArch


class NonFiniteLossError(RuntimeError):
    """A loss term or a gradient is NaN or infinite; the step was not applied."""


@dataclass
class StepResult:
    """What a step measured: averages over the ranks, on the device; `problem` says why it was not applied."""

    metrics: dict[str, Tensor | float]
    problem: str | None = None


def train_step(
    model: SSLMetaArch,
    optimizer: torch.optim.Optimizer,
    data: dict[str, Any],
    settings: StepSettings,
    *,
    iteration: int,
    clip_grad: float | None,
) -> StepResult:
    """Run iteration `iteration` on one batch; weights and EMA change only if loss and gradients are finite.

    Args:
        model: the student, its EMA and the losses.
        optimizer: over `model.get_params_groups()`.
        data: a batch of `collate_data_and_cast` plus `global_batch_size`.
        settings: this iteration's scheduled values.
        iteration: absolute iteration.
        clip_grad: largest gradient norm of each of backbone, dino_head and ibot_head; None or 0 only measures it.

    Returns:
        The metrics, and a description of what was not finite, if anything.
    """
    apply_optim_scheduler(optimizer, settings.lr, settings.weight_decay, settings.last_layer_lr)
    optimizer.zero_grad(set_to_none=True)
    total_loss, terms = model.forward_backward(data, teacher_temp=settings.teacher_temp, iteration=iteration)
    gradient_norms = {
        f"{name}_grad_norm": clip_grad_norm_(network, clip_grad or float("inf"))
        for name, network in model.student.items()
    }
    metrics, n_bad_ranks = _average_over_ranks({"total_loss": total_loss, **terms, **gradient_norms}, model.device)
    if n_bad_ranks:
        problem = _describe_problem(model, metrics, iteration, n_bad_ranks)
        optimizer.zero_grad(set_to_none=True)
        return StepResult(metrics, problem)
    optimizer.step()
    model.update_ema(settings.momentum)
    return StepResult(metrics)


def _average_over_ranks(
    values: dict[str, Tensor | float], device: torch.device
) -> tuple[dict[str, Tensor | float], int]:
    measured = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    packed = torch.stack([value.detach().to(device, torch.float32) for value in measured.values()])
    is_bad = (~packed.isfinite().all()).to(packed.dtype).reshape(1)
    packed = distributed.all_reduce(torch.cat([packed, is_bad]))
    n_bad_ranks = int(packed[-1].item())
    means = packed[:-1] / distributed.get_subgroup_size()
    return values | dict(zip(measured, means.unbind(), strict=True)), n_bad_ranks


def _describe_problem(model: SSLMetaArch, metrics: dict[str, Tensor | float], iteration: int, n_bad_ranks: int) -> str:
    numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, Tensor)}
    bad = [name for name, value in numbers.items() if value != value or abs(value) == float("inf")]
    terms = ", ".join(f"{name} = {value:.4g}" for name, value in numbers.items())
    gradients = [
        name
        for name, parameter in model.student.named_parameters()
        if parameter.grad is not None and not bool(_local(parameter.grad).isfinite().all())
    ]
    named = f"; gradients not finite in {', '.join(gradients[:5])}" if gradients else ""
    more = f" and {len(gradients) - 5} more" if len(gradients) > 5 else ""
    where = f" on {n_bad_ranks} of {distributed.get_subgroup_size()} ranks" if distributed.is_enabled() else ""
    return f"step {iteration}: {', '.join(bad)} not finite{where} ({terms}){named}{more}"


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if hasattr(gradient, "to_local") else gradient
