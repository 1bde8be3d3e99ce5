"""Training a head on a frozen backbone: one loop for every task."""

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

from dinov3 import distributed
from dinov3.checkpointer import remove_stale_temporaries
from dinov3.data.fingerprint import DataFingerprint, describe_change
from dinov3.distributed.batch_norm import synchronize_batch_norms_
from dinov3.eval.command.progress import Progress
from dinov3.eval.command.results import without_nan
from dinov3.eval.training.checkpoints import Checkpoints
from dinov3.heads.weights import head_entries
from dinov3.utils.files import atomic_write, explaining_full_disk
from dinov3.utils.messages import list_names
from dinov3.utils.weight_files import WeightsError

logger = logging.getLogger("dinov3")

METRICS_FILENAME = "training_metrics.json"
LOG_PERIOD = 10  # steps

Metrics = dict[str, float]


@dataclass
class HeadTraining:
    """State and callbacks that `train_head` needs for one task.

    Attributes:
        head: put into training mode before each step, and into evaluation mode before each evaluation.
        optimizer: of the head's parameters.
        scheduler: stepped by `step`.
        checkpoints: where the training is saved and resumed from.
        settings: what the result depends on; a checkpoint with other settings is refused.
        make_batches: returns this process's batches from a given step on, e.g. with `make_train_loader`.
        step: trains on the batch of a step, e.g. with `apply_gradients`, and returns the loss to show.
        evaluate: returns the metrics of the head after a number of steps.
        is_better: whether the first metrics beat the second, e.g. `better_by`.
        prefix: of the head's entries in checkpoints.
        more_state: further state by name, as a function that returns it and one that takes it back.
        on_start: called with the number of steps that are already done.
        metrics_file: gets one JSON object per line: losses, rates and metrics.
        description: of the progress bar.
        loss_name: what the loss is called there.
        data: what the training images are, which checkpoints remember; None if nobody knows.
    """

    head: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    checkpoints: Checkpoints
    settings: Mapping[str, Any]
    make_batches: Callable[[int], Iterable[Any]]
    step: Callable[[Any, int], Tensor]
    evaluate: Callable[[int], Metrics]
    is_better: Callable[[Metrics, Metrics], bool]
    prefix: str = ""
    more_state: Mapping[str, tuple[Callable[[], Any], Callable[[Any], None]]] = field(default_factory=dict)
    on_start: Callable[[int], None] = lambda _: None
    metrics_file: Path | None = None
    description: str = "training"
    loss_name: str = "loss"
    data: DataFingerprint | None = None


@dataclass
class TrainingResult:
    """What is known after some steps.

    Attributes:
        iteration: steps that have been done.
        metrics: of the last evaluation.
        best_metrics: of the best evaluation; empty before the first.
        best_iteration: steps that had been done at the best one.
    """

    iteration: int = 0
    metrics: Metrics = field(default_factory=dict)
    best_metrics: Metrics = field(default_factory=dict)
    best_iteration: int = 0


def train_head(
    task: HeadTraining,
    *,
    total_iter: int,
    eval_interval: int,
    save_interval: int | None = None,
    evaluate_at_end: bool = True,
    seed: int = 0,
) -> TrainingResult:
    """Train until `total_iter` steps are done, starting from the newest checkpoint.

    What a step computes depends only on its number, so a training that was killed ends with the same weights.

    Args:
        task: what is trained, and how; its head ends with the last weights.
        total_iter: number of steps.
        eval_interval: steps between evaluations.
        save_interval: steps between checkpoints. Default: `eval_interval`. The last step has one too.
        evaluate_at_end: evaluate after the last step too, if it has not been done yet.
        seed: of what is random in a step.

    Raises:
        ValueError: a checkpoint belongs to another training, or is damaged.
    """
    save_interval = eval_interval if save_interval is None else save_interval
    if min(total_iter, eval_interval, save_interval) < 1:
        raise ValueError(f"{total_iter=}, {eval_interval=} and {save_interval=} must be at least 1")
    if distributed.is_main_process():
        remove_stale_temporaries(task.checkpoints.directory)
    synchronize_batch_norms_(task.head)
    result = resume(task, total_iter)
    first = result.iteration
    task.on_start(first)
    _forget_after(task.metrics_file, first)
    if first == total_iter:
        logger.info("all %d steps are already done", total_iter)
        return result
    batches = islice(task.make_batches(first), total_iter - first)
    with Progress(task.description, total_iter, unit="step", initial=first) as progress:
        for iteration, batch in enumerate(batches, start=first):
            task.head.train()
            # What is dropped in a step depends on its number, not on what was drawn before a resume.
            words = np.random.SeedSequence([seed, iteration, distributed.get_rank()]).generate_state(2)
            torch.manual_seed(int(words.view(np.uint64)[0]))
            loss = task.step(batch, iteration)
            done = result.iteration = iteration + 1
            is_last = done == total_iter
            note = None
            if done % LOG_PERIOD == 0 or is_last:  # not in every step, because `item` waits for an accelerator
                rate = task.optimizer.param_groups[0]["lr"]
                note = f"{task.loss_name} {loss.item():.4f}, lr {rate:.2e}"
                _record(task.metrics_file, {"iteration": done, "loss": loss.item(), "lr": rate})
            progress.advance(note=note)

            is_best = False
            if evaluate_at_end if is_last else done % eval_interval == 0:
                task.head.eval()
                result.metrics = task.evaluate(done)
                _record(task.metrics_file, {"iteration": done, "validation": result.metrics})
                values = ", ".join(f"{name} {value:.4g}" for name, value in result.metrics.items())
                logger.info("after %d steps: %s", done, values)
                is_best = not result.best_metrics or task.is_better(result.metrics, result.best_metrics)
                if is_best:
                    result.best_metrics, result.best_iteration = result.metrics, done
            is_due = is_last or done % save_interval == 0
            if is_due or is_best:
                _save(task, result, is_due=is_due, is_best=is_best, is_last=is_last)
    return result


def resume(task: HeadTraining, total_iter: int) -> TrainingResult:
    """Put the newest checkpoint, if there is one, into a task, and return what was known then.

    Raises:
        ValueError: it belongs to another training, or is damaged.
    """
    path = distributed.broadcast_object(task.checkpoints.find_newest() if distributed.is_main_process() else None)
    if path is None:
        return TrainingResult()
    content = task.checkpoints.read(path)
    iteration = content["iteration"]
    before, now = content.get("settings", task.settings), task.settings
    if differing := [name for name in {**before, **now} if before.get(name) != now.get(name)]:
        changes = list_names([f"{name}: {before.get(name)}, now {now.get(name)}" for name in differing])
        raise ValueError(
            f"{path} was trained with other settings ({changes}): use those to continue it, or "
            f"{task.checkpoints.advice}"
        )
    change = None if task.data is None else describe_change(content.get("data"), task.data)
    if change is not None:
        logger.warning(
            "%s: %s; the order of the images is drawn again, so the result is not reproducible", path, change
        )
    if iteration > total_iter:
        raise ValueError(
            f"{path} has {iteration} steps, more than the {total_iter} asked for: {task.checkpoints.advice}"
        )
    try:
        # In place, because the optimizer holds these very parameters.
        task.head.load_state_dict(head_entries(content["model"], task.prefix))
    except RuntimeError as error:
        problems = list_names([line.strip() for line in str(error).splitlines()[1:]], most=2)
        raise WeightsError(f"{path} does not fit the head: {problems}; {task.checkpoints.advice}") from error
    if "scheduler" in content:
        task.optimizer.load_state_dict(content["optimizer"])
        task.scheduler.load_state_dict(content["scheduler"])
    else:
        # The release stores no schedule. Repeating its steps gives the rates to the last bit; those in the file's
        # optimizer may be wrong.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
            for _ in range(iteration):
                task.scheduler.step()
        task.optimizer.load_state_dict(task.optimizer.state_dict() | {"state": content["optimizer"]["state"]})
    for name, (_, put) in task.more_state.items():
        if name in content.get("more", {}):
            put(content["more"][name])
    logger.info("continuing from %s after %d of %d steps", path, iteration, total_iter)
    return TrainingResult(**content["result"]) if "result" in content else TrainingResult(iteration)


def better_by(name: str, *, lower_is_better: bool = False) -> Callable[[Metrics, Metrics], bool]:
    """Return a comparison of metrics by one of them, in which everything beats NaN."""
    sign = -1 if lower_is_better else 1
    return lambda metrics, others: math.isnan(others[name]) or sign * metrics[name] > sign * others[name]


def apply_gradients(
    loss: Tensor,
    optimizer: torch.optim.Optimizer,
    *,
    clip: float,
    iteration: int,
    scaler: torch.amp.GradScaler | None = None,
) -> Tensor:
    """Do the backward pass of a loss and a step of its optimizer, with gradients averaged over all processes.

    Args:
        loss: of this process.
        optimizer: of the parameters that get gradients.
        clip: largest norm of the gradient; inf: any.
        iteration: number of the step, for errors.
        scaler: of the loss, which float16 needs.

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
    scaler = scaler or torch.amp.GradScaler(enabled=False)
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if distributed.get_world_size() > 1:
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        # In one message, because heads have many small parameters.
        flat = distributed.all_reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
        for parameter, part in zip(parameters, flat.split([g.numel() for g in gradients]), strict=True):
            parameter.grad = part.view_as(parameter)
    scaler.unscale_(optimizer)
    if math.isfinite(clip):
        clip_grad_norm_(parameters, clip)
    scaler.step(optimizer)
    scaler.update()
    return mean_loss


def _save(task: HeadTraining, result: TrainingResult, *, is_due: bool, is_best: bool, is_last: bool) -> None:
    if distributed.is_main_process():
        content = {
            "model": {task.prefix + name: tensor for name, tensor in task.head.state_dict().items()},
            "optimizer": task.optimizer.state_dict(),
            "scheduler": task.scheduler.state_dict(),
            "iteration": result.iteration,
            "settings": dict(task.settings),
            "data": None if task.data is None else list(task.data),
            "result": asdict(result),
            "more": {name: get() for name, (get, _) in task.more_state.items()},
        }
        task.checkpoints.save(content, is_due=is_due, is_best=is_best, is_last=is_last)
    distributed.barrier()


def _record(path: Path | None, entry: Mapping[str, Any]) -> None:
    if path is not None and distributed.is_main_process():
        path.parent.mkdir(parents=True, exist_ok=True)
        with explaining_full_disk(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(without_nan(entry)) + "\n")


def _forget_after(path: Path | None, iteration: int) -> None:
    # Steps that were done after the checkpoint are done again.
    if path is not None and distributed.is_main_process() and path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        complete = [line for line in lines if line.endswith("\n")]  # a kill may leave half a line
        with atomic_write(path, "w") as file:
            file.writelines(line for line in complete if json.loads(line)["iteration"] <= iteration)
