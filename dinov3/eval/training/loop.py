"""Training a head on a frozen backbone: one loop for every dense task.

Notable:
- What a step computes depends on its number alone: its images (`train_loader`), what is dropped, the rates. A training
  that was killed goes on from its newest checkpoint to the same weights.
- A loss that is not finite is never applied: the training stops, and its checkpoints stay as they are.
- Gradients are averaged over the processes, and batch norms see the images of all of them.
"""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from dinov3 import distributed
from dinov3.checkpointer import remove_stale_temporaries
from dinov3.distributed.batch_norm import synchronize_batch_norms_
from dinov3.eval.command.results import without_nan, write_atomically
from dinov3.eval.training.checkpoints import (
    BEST_NAME,
    FINAL_NAME,
    find_latest_checkpoint,
    link,
    load_checkpoint,
    save_checkpoint,
)
from dinov3.utils.weight_files import WeightsError

logger = logging.getLogger("dinov3")

METRICS_FILENAME = "training_metrics.json"
LOG_PERIOD = 10  # steps
N_LISTED = 5

Metrics = dict[str, float]


@dataclass
class HeadTraining:
    """What the loop needs to know of a task.

    Attributes:
        head: what is trained.
        optimizer: of its parameters.
        scheduler: of the rates.
        make_batches: this process's batches from a step on, e.g. `make_train_loader`.
        step: trains on the batch of a step, as `apply_gradients` does, and gives the loss.
        validate: measures the head.
        is_better: whether metrics are better than others.
        to_entries: the head's state dict as files hold it.
        from_entries: loads such into the head.
        settings: on which the result depends; those of a checkpoint must be the same.
        more_state: further state by name, as pairs of a function that gives it and one that takes it.
    """

    head: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    make_batches: Callable[[int], Iterable[Any]]
    step: Callable[[Any, int], Tensor]
    validate: Callable[[], Metrics]
    is_better: Callable[[Metrics, Metrics], bool]
    to_entries: Callable[[], Mapping[str, Tensor]]
    from_entries: Callable[[Mapping[str, Tensor]], None]
    settings: Mapping[str, Any]
    more_state: Mapping[str, tuple[Callable[[], Any], Callable[[Any], None]]] = field(default_factory=dict)


@dataclass
class TrainingResult:
    """What is known after some steps.

    Attributes:
        iteration: steps that have been done.
        metrics: of the last validation.
        best_metrics: of the best one.
        best_iteration: steps that had been done at the best one.
    """

    iteration: int = 0
    metrics: Metrics = field(default_factory=dict)
    best_metrics: Metrics = field(default_factory=dict)
    best_iteration: int = 0


def train_head(
    task: HeadTraining, *, total_iter: int, eval_interval: int, output_dir: str | Path, seed: int
) -> TrainingResult:
    """Train until `total_iter` steps are done, from the newest checkpoint on.

    Args:
        task: what is trained, and how.
        total_iter: number of steps.
        eval_interval: steps between validations, after which a checkpoint is written; the last step has one too.
        output_dir: for checkpoints and `training_metrics.json`.
        seed: of what is random in a step.

    Returns:
        The metrics of the last and of the best validation; `model_final.pth` holds the last head, `best.pth` the best.

    Raises:
        ValueError: a checkpoint is of another training, or damaged.
        RuntimeError: the loss is not finite.
    """
    directory = Path(output_dir)
    if total_iter < 1 or eval_interval < 1:
        raise ValueError(f"total_iter={total_iter} and eval_interval={eval_interval} must be at least 1")
    if distributed.is_main_process():
        remove_stale_temporaries(directory)
    synchronize_batch_norms_(task.head)
    result = _resume(task, directory)
    if result.iteration >= total_iter:
        logger.info("trained already: %s is after %d steps", directory / FINAL_NAME, result.iteration)
        return result
    record = _Record(directory / METRICS_FILENAME, done=result.iteration)
    first = result.iteration
    batches = islice(task.make_batches(first), total_iter - first)
    hidden = None if distributed.is_main_process() else True
    with tqdm(batches, "training", total_iter, initial=first, unit="step", disable=hidden) as progress:
        for iteration, batch in enumerate(progress, start=first):
            task.head.train()
            _seed_step(seed, iteration)
            loss = task.step(batch, iteration)
            result.iteration = iteration + 1
            is_last = result.iteration == total_iter
            if result.iteration % LOG_PERIOD == 0 or is_last:
                rate = task.optimizer.param_groups[0]["lr"]
                record.add({"iteration": result.iteration, "loss": loss.item(), "lr": rate})
                progress.set_postfix(loss=f"{loss.item():.4f}", lr=f"{rate:.2e}")
            if result.iteration % eval_interval == 0 or is_last:
                _validate_and_save(task, result, directory, record, is_last=is_last)
    return result


def apply_gradients(
    loss: Tensor,
    optimizer: torch.optim.Optimizer,
    *,
    clip: float,
    iteration: int,
    scaler: torch.amp.GradScaler | None = None,
) -> Tensor:
    """The backward pass of a loss and a step of its optimizer, over all processes.

    Args:
        loss: of this process.
        optimizer: of the parameters that get gradients.
        clip: largest norm of the gradient; inf: any.
        iteration: number of the step, for errors.
        scaler: of the loss, for float16; None: none.

    Returns:
        The mean loss of the processes, before the step.

    Raises:
        RuntimeError: it is not finite; nothing was changed.
    """
    mean_loss = distributed.all_reduce(loss.detach().float().clone(), "mean")
    if not mean_loss.isfinite():
        raise RuntimeError(
            f"the loss of step {iteration} is {mean_loss.item()}: the step was not applied and training stops; earlier "
            "checkpoints are intact. Lower optimizer.lr, or look for unusable targets"
        )
    optimizer.zero_grad(set_to_none=True)
    (loss if scaler is None else scaler.scale(loss)).backward()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    _average_gradients(parameters)
    if scaler is not None:
        scaler.unscale_(optimizer)
    if math.isfinite(clip):
        clip_grad_norm_(parameters, clip)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    return mean_loss


def _average_gradients(parameters: list[nn.Parameter]) -> None:
    if distributed.get_world_size() == 1:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = distributed.all_reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
    sizes = [gradient.numel() for gradient in gradients]
    for parameter, part in zip(parameters, flat.split(sizes), strict=True):
        parameter.grad = part.view_as(parameter)


def _validate_and_save(
    task: HeadTraining, result: TrainingResult, directory: Path, record: _Record, *, is_last: bool
) -> None:
    task.head.eval()
    result.metrics = task.validate()
    record.add({"iteration": result.iteration, "validation": result.metrics})
    logger.info(
        "after %d steps: %s",
        result.iteration,
        ", ".join(f"{name} {value:.4g}" for name, value in result.metrics.items()),
    )
    improved = not result.best_metrics or task.is_better(result.metrics, result.best_metrics)
    if improved:
        result.best_metrics, result.best_iteration = result.metrics, result.iteration
    if distributed.is_main_process():
        path = save_checkpoint(
            directory,
            result.iteration,
            task.to_entries(),
            task.optimizer,
            scheduler=task.scheduler.state_dict(),
            settings=dict(task.settings),
            result=asdict(result),
            more={name: get() for name, (get, _) in task.more_state.items()},
        )
        for name, wanted in ((BEST_NAME, improved), (FINAL_NAME, is_last)):
            if wanted:
                link(path, path.with_name(name))
    distributed.barrier()


def _resume(task: HeadTraining, directory: Path) -> TrainingResult:
    path = distributed.broadcast_object(find_latest_checkpoint(directory))
    if path is None:
        return TrainingResult()
    content, iteration = load_checkpoint(path)
    if iteration is None or "optimizer" not in content:
        raise WeightsError(
            f"{path} holds a head but not the state of its training, so there is nothing to continue: choose another "
            "output_dir, or move the file away; load_from=FILE evaluates it"
        )
    _check_settings(path, content.get("settings", task.settings), task.settings)
    task.from_entries(content["model"])
    task.optimizer.load_state_dict(content["optimizer"])
    if "scheduler" in content:
        task.scheduler.load_state_dict(content["scheduler"])
    else:
        _advance(task.scheduler, iteration)
    for name, (_, put) in task.more_state.items():
        if name in content.get("more", {}):
            put(content["more"][name])
    logger.info("continuing from %s after %d steps", path, iteration)
    return TrainingResult(**content["result"]) if "result" in content else TrainingResult(iteration)


def _check_settings(path: Path, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    differing = [name for name in {**earlier, **now} if earlier.get(name) != now.get(name)]
    if differing:
        listing = ", ".join(f"{name}: {earlier.get(name)}, now {now.get(name)}" for name in differing[:N_LISTED])
        listing += f", and {len(differing) - N_LISTED} more" if len(differing) > N_LISTED else ""
        raise ValueError(
            f"{path} was trained with other settings ({listing}): give those to continue it, or choose another "
            "output_dir"
        )


def _advance(scheduler: Any, n_steps: int) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
        for _ in range(n_steps):
            scheduler.step()


def _seed_step(seed: int, iteration: int) -> None:
    words = np.random.SeedSequence([seed, iteration, distributed.get_rank()]).generate_state(2)
    torch.manual_seed(int(words.view(np.uint64)[0]))


class _Record:
    # One JSON object per line; what a killed training had recorded after its checkpoint is dropped.
    def __init__(self, path: Path, *, done: int) -> None:
        self._path = path
        if distributed.is_main_process() and path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            write_atomically(path, "".join(line for line in lines if json.loads(line)["iteration"] <= done))

    def add(self, entry: Mapping[str, Any]) -> None:
        if distributed.is_main_process():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(without_nan(entry)) + "\n")
