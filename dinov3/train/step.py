"""One training iteration: schedules, forward and backward, clipping, and a step that is taken only if all is finite.

Notable: a non-finite loss or gradient never reaches the weights. All ranks take the same decision from one reduced
vector, which also carries the metrics and what single ranks ask for, so that an iteration has one small all-reduce and
one host synchronisation.

With several batches per step (`train.grad_accumulation_steps`) the gradients are those of the mean loss. A term that
looks at one image at a time is what it would be for all images at once; Sinkhorn-Knopp, KoLeo and a Gram loss over the
whole batch see one micro-batch at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dinov3 import distributed
from dinov3.fsdp import clip_grad_norm_, set_gradient_sync
from dinov3.train.networks import local_part
from dinov3.train.schedules import StepSettings, apply_optim_scheduler
from dinov3.train.ssl_meta_arch import SSLMetaArch
from dinov3.utils.messages import list_names


class NonFiniteLossError(RuntimeError):
    """A loss term or a gradient is NaN or infinite; the step was not applied."""


@dataclass
class StepResult:
    """What a step measured, and what all ranks learned in it.

    Attributes:
        metrics: averages over ranks and micro-batches, on the device.
        problem: why the step was not applied; None if it was.
        requests: what at least one rank asked for.
    """

    metrics: dict[str, Tensor | float]
    problem: str | None = None
    requests: frozenset[str] = frozenset()


def train_step(
    model: SSLMetaArch,
    optimizer: torch.optim.Optimizer,
    data: dict[str, Any] | Sequence[dict[str, Any]],
    settings: StepSettings,
    *,
    iteration: int,
    clip_grad: float | None,
    freeze_backbone: bool = False,
    requests: Mapping[str, bool] | None = None,
) -> StepResult:
    """Run iteration `iteration` on one or more batches; weights and EMA change only if loss and gradients are finite.

    Args:
        model: the student, its EMA and the losses.
        optimizer: over `model.get_params_groups()`.
        data: a batch of `collate_data_and_cast` plus `global_batch_size`; or several, whose gradients are averaged.
        settings: this iteration's scheduled values.
        iteration: absolute iteration.
        clip_grad: largest gradient norm of each of backbone, dino_head and ibot_head; None or 0 only measures it.
        freeze_backbone: train only the heads.
        requests: whether this rank asks for something, by name; the same names on all ranks.

    Returns:
        The metrics, a description of what was not finite, if anything, and what any rank asked for.
    """
    if model.gram_calendar.loads_before(iteration):
        model.gram_load_ema_teacher()
    apply_optim_scheduler(optimizer, settings.lr, settings.weight_decay, settings.last_layer_lr)
    optimizer.zero_grad(set_to_none=True)
    batches = [data] if isinstance(data, dict) else data
    losses = _accumulate_gradients(model, batches, settings.teacher_temp, iteration)
    gradient_norms: dict[str, Tensor | float] = {
        f"{name}_grad_norm": clip_grad_norm_(network, clip_grad or float("inf"))
        for name, network in model.student.items()
    }
    metrics, n_bad_ranks, granted = _average_over_ranks(losses | gradient_norms, requests or {}, model.device)
    if n_bad_ranks:
        problem = _describe_problem(model, metrics, iteration, n_bad_ranks)
        optimizer.zero_grad(set_to_none=True)
        return StepResult(metrics, problem, granted)
    if freeze_backbone:  # AdamW skips parameters without gradients, their moments included
        model.student["backbone"].zero_grad(set_to_none=True)
    optimizer.step()
    model.update_ema(settings.momentum)
    if model.gram_calendar.refreshes_after(iteration):
        model.update_gram()
    return StepResult(metrics, requests=granted)


def _accumulate_gradients(
    model: SSLMetaArch, batches: Sequence[dict[str, Any]], teacher_temp: float, iteration: int
) -> dict[str, Tensor | float]:
    measured: list[dict[str, Tensor | float]] = []
    for number, batch in enumerate(batches, start=1):
        if len(batches) > 1:
            # Until the last backward pass each process sums up its own gradients.
            set_gradient_sync(model.student, number == len(batches))
        total_loss, terms = model.forward_backward(batch, teacher_temp=teacher_temp, iteration=iteration)
        measured.append({"total_loss": total_loss, **terms})
    if len(batches) == 1:
        return measured[0]
    gradients = [local_part(p.grad) for p in model.student.parameters() if p.grad is not None]
    torch._foreach_div_(gradients, len(batches))
    return {name: _mean([terms[name] for terms in measured]) for name in measured[0]}


def _mean(values: Sequence[Tensor | float]) -> Tensor | float:
    tensors = [value for value in values if isinstance(value, Tensor)]
    return torch.stack(tensors).mean(0) if tensors else sum(values) / len(values)


def _average_over_ranks(
    values: dict[str, Tensor | float], requests: Mapping[str, bool], device: torch.device
) -> tuple[dict[str, Tensor | float], int, frozenset[str]]:
    measured = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    packed = torch.stack([value.detach().to(device, torch.float32) for value in measured.values()])
    is_bad = (~packed.isfinite().all()).to(packed.dtype).reshape(1)
    asked = torch.tensor([float(is_asked) for is_asked in requests.values()], device=device)
    packed = distributed.all_reduce(torch.cat([packed, is_bad, asked]))
    means = packed[: len(measured)] / distributed.get_subgroup_size()
    flags = packed[len(measured) :]
    if requests and distributed.get_process_subgroup() is not distributed.get_default_process_group():
        # The groups of several students learn from each other what is asked for.
        distributed.all_reduce(flags[1:], group=distributed.get_default_process_group())
    n_bad_ranks, *counts = flags.tolist()
    granted = frozenset(name for name, count in zip(requests, counts, strict=True) if count)
    return values | dict(zip(measured, means.unbind(), strict=True)), int(n_bad_ranks), granted


def _describe_problem(model: SSLMetaArch, metrics: dict[str, Tensor | float], iteration: int, n_bad_ranks: int) -> str:
    numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, Tensor)}
    bad = [name for name, value in numbers.items() if value != value or abs(value) == float("inf")]
    terms = ", ".join(f"{name} = {value:.4g}" for name, value in numbers.items())
    gradients = [
        name
        for name, parameter in model.student.named_parameters()
        if parameter.grad is not None and not bool(local_part(parameter.grad).isfinite().all())
    ]
    named = f"; gradients not finite in {list_names(gradients)}" if gradients else ""
    where = f" on {n_bad_ranks} of {distributed.get_subgroup_size()} ranks" if distributed.is_enabled() else ""
    return f"step {iteration}: {', '.join(bad)} not finite{where} ({terms}){named}"
