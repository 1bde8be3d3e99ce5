"""The training loop: resume, iterate, log, checkpoint, export, finish.

Notable: a run that was killed and resumed on the same number of processes repeats an uninterrupted one bit for bit on
the CPU; checkpoints appear under their name only when complete; at the end there are a checkpoint, an export of the
teacher and `loss_curves.png`.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dinov3 import distributed
from dinov3.checkpointer import (
    CheckpointError,
    RngState,
    find_latest_checkpoint,
    keep_checkpoint_copy,
    keep_last_n_checkpoints,
    latest_valid_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from dinov3.distributed import runtime
from dinov3.hub.runs import CHECKPOINT_DIRECTORY
from dinov3.logging import MetricLogger, SmoothedValue, truncate_metrics_file
from dinov3.train.data_loading import build_train_loader
from dinov3.train.export import export_teacher
from dinov3.train.plot import METRICS_FILE, plot_losses
from dinov3.train.resuming import report_changes, run_metadata
from dinov3.train.schedules import build_schedulers, settings_at
from dinov3.train.ssl_meta_arch import SSLMetaArch
from dinov3.train.step import NonFiniteLossError, StepResult, train_step

logger = logging.getLogger("dinov3")

GARBAGE_COLLECTION_PERIOD = 150


def do_train(cfg: Any, model: SSLMetaArch, *, resume: bool = True, data_loader: Any = None) -> dict[str, float]:
    """Train `model` as `cfg` says, from the newest checkpoint in `train.output_dir` if there is one.

    Args:
        cfg: the training configuration, learning rate already scaled.
        model: a meta-architecture, prepared for distributed training, weights not yet initialised.
        resume: continue from the newest valid checkpoint.
        data_loader: batches to train on instead of those of `train.dataset_path`, from the first iteration of this
            call on.

    Returns:
        The global average of every metric.

    Raises:
        NonFiniteLossError: a loss or gradient was not finite; the last good checkpoint is intact.
        CheckpointError: no usable checkpoint is left to resume from, or two saves in a row failed.
    """
    return Trainer(cfg, model).run(resume=resume, data_loader=data_loader)


class Trainer:
    """The state of one training run.

    Args:
        cfg: the training configuration.
        model: the meta-architecture.
    """

    def __init__(self, cfg: Any, model: SSLMetaArch) -> None:
        self.cfg = cfg
        self.model = model.train()
        self.output_dir = Path(cfg.train.output_dir)
        self.checkpoint_root = self.output_dir / CHECKPOINT_DIRECTORY
        self.n_iterations = round(cfg.optim.epochs * cfg.train.OFFICIAL_EPOCH_LENGTH)
        self.global_batch_size = cfg.train.batch_size_per_gpu * distributed.get_world_size()
        self.schedules = build_schedulers(cfg)
        self.optimizer = torch.optim.AdamW(
            model.get_params_groups(), betas=(cfg.optim.adamw_beta1, cfg.optim.adamw_beta2)
        )
        self.metric_logger = MetricLogger(
            delimiter="  ",
            output_file=str(self.output_dir / METRICS_FILE),
            tensorboard_dir=str(self.output_dir / "tensorboard") if cfg.train.tensorboard else None,
        )
        self.rng_state = RngState()
        if cfg.train.on_bad_image == "skip":
            # A running total, of which a median over a window would say nothing.
            self.metric_logger.add_meter("bad_images", SmoothedValue(window_size=1, fmt="{value:.0f}"))
        self.n_bad_images = 0
        self.nonfinite_in_a_row = 0
        self.save_failed_before = False

    def run(self, *, resume: bool = True, data_loader: Any = None) -> dict[str, float]:
        """Train to the end; see `do_train`."""
        self.model.init_weights()
        start = self._resume() if resume else 0
        if start >= self.n_iterations:
            logger.info("nothing to do: %d of %d iterations are done", start, self.n_iterations)
            return {}
        loader = data_loader if data_loader is not None else build_train_loader(self.cfg, start_iteration=start)
        with _manual_garbage_collection():
            for iteration, data in enumerate(self._batches(loader, start), start=start):
                self._iterate(data, iteration)
        return self._finish()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of the trainer itself."""
        return {
            "nonfinite_in_a_row": self.nonfinite_in_a_row,
            "n_bad_images": self.n_bad_images,
            "meters": self.metric_logger.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the trainer's own state from a checkpoint."""
        self.nonfinite_in_a_row = state["nonfinite_in_a_row"]
        self.n_bad_images = state["n_bad_images"]
        self.metric_logger.load_state_dict(state["meters"])

    def save(self, iteration: int) -> None:
        """Write `ckpt/<iteration>` and prune old checkpoints; a failure is logged, a second in a row is an error."""
        settings = self.cfg.checkpointing
        directory = self.checkpoint_root / str(iteration)
        try:
            save_checkpoint(
                directory,
                iteration=iteration,
                model=self.model,
                optimizer=self.optimizer,
                process_group=distributed.get_process_subgroup(),
                metadata=run_metadata(self.cfg),
                rng=self.rng_state,
                trainer=self,
            )
        except CheckpointError as error:
            if self.save_failed_before:
                raise
            self.save_failed_before = True
            logger.error("%s; training goes on and tries again at the next checkpoint", error)
            return
        self.save_failed_before = False
        if distributed.is_subgroup_main_process():
            keep_last_n_checkpoints(self.checkpoint_root, settings.max_to_keep)
            if (iteration + 1) % settings.keep_every == 0:
                keep_checkpoint_copy(directory)

    def load(self, directory: Path) -> int:
        """Load a checkpoint; returns the iteration that it was saved after."""
        return load_checkpoint(
            directory,
            model=self.model,
            optimizer=self.optimizer,
            process_group=distributed.get_process_subgroup(),
            verify=False,  # Its finder did.
            rng=self.rng_state,
            trainer=self,
        )

    def _resume(self) -> int:
        directory = latest_valid_checkpoint(self.checkpoint_root, verify=self.cfg.checkpointing.verify)
        if directory is not None:
            report_changes(directory, self.cfg)
        start = 0 if directory is None else self.load(directory) + 1
        if distributed.is_subgroup_main_process():
            # Iterations after the checkpoint come again.
            truncate_metrics_file(self.output_dir / METRICS_FILE, start)
        if directory is None:
            return start
        logger.info("resumed from %s: %d of %d iterations are done", directory, start, self.n_iterations)
        return start

    def _batches(self, loader: Any, start: int) -> Iterator[dict[str, Any]]:
        return self.metric_logger.log_every(
            loader,
            self.cfg.train.print_freq,
            header="Training",
            n_iterations=self.n_iterations,
            start_iteration=start,
            progress=self.cfg.train.progress,
        )

    def _iterate(self, data: dict[str, Any], iteration: int) -> None:
        if iteration % GARBAGE_COLLECTION_PERIOD == 0:
            gc.collect()
        settings = settings_at(self.schedules, iteration)
        self._count_bad_images(data.pop("n_bad_images", None))
        started = time.perf_counter()
        result = train_step(
            self.model,
            self.optimizer,
            data | {"global_batch_size": self.global_batch_size},
            settings,
            iteration=iteration,
            clip_grad=self.cfg.optim.clip_grad,
        )
        self._handle_nonfinite(result)
        self.metric_logger.update(
            lr=settings.lr,
            wd=settings.weight_decay,
            mom=settings.momentum,
            last_layer_lr=settings.last_layer_lr,
            **result.metrics,
            teacher_temp=settings.teacher_temp,
            images_per_second=self.global_batch_size / (time.perf_counter() - started),
            max_memory_mib=runtime.max_memory_mib(),
        )
        self._after_step(iteration, is_finite=result.problem is None)

    def _count_bad_images(self, count: int | None) -> None:
        if count is None:  # `train.on_bad_image=raise`
            return
        total = distributed.all_reduce(torch.tensor(count, device=runtime.device()))
        self.n_bad_images += int(total)
        self.metric_logger.update(bad_images=self.n_bad_images)

    def _after_step(self, iteration: int, *, is_finite: bool) -> None:
        done = iteration + 1
        export_period = self.cfg.evaluation.eval_period_iterations
        if export_period > 0 and done % export_period == 0:
            self.export(iteration)
        if is_finite and done % self.cfg.checkpointing.period == 0:
            self.save(iteration)

    def _handle_nonfinite(self, result: StepResult) -> None:
        if result.problem is None:
            self.nonfinite_in_a_row = 0
            return
        self.nonfinite_in_a_row += 1
        allowed = self.cfg.train.max_nonfinite_steps
        if self.nonfinite_in_a_row <= allowed:
            logger.warning("%s; dropped (%d of %d allowed)", result.problem, self.nonfinite_in_a_row, allowed)
            return
        newest = find_latest_checkpoint(self.checkpoint_root)
        raise NonFiniteLossError(
            f"{result.problem}. The step was not applied. Last good checkpoint: {newest or 'none yet'}. "
            "Lower the learning rate or optim.clip_grad and start again (the run resumes there), or let "
            "train.max_nonfinite_steps=N drop up to N such steps in a row."
        )

    def export(self, iteration: int) -> None:
        """Write the EMA teacher after `iteration` to `eval/training_<iteration>`."""
        path = export_teacher(self.model, self.output_dir, iteration, sharded=self.cfg.train.sharded_eval_checkpoint)
        logger.info("teacher after iteration %d: %s", iteration, path)

    def _finish(self) -> dict[str, float]:
        last = self.n_iterations - 1
        if self.n_iterations % self.cfg.checkpointing.period != 0:
            self.save(last)
        period = self.cfg.evaluation.eval_period_iterations
        if period <= 0 or self.n_iterations % period != 0:
            self.export(last)
        self.metric_logger.synchronize_between_processes()
        if distributed.is_subgroup_main_process():
            logger.info("loss curves: %s", plot_losses(self.output_dir))
        return {name: meter.global_avg for name, meter in self.metric_logger.meters.items()}


@contextmanager
def _manual_garbage_collection() -> Iterator[None]:
    # Collections at different times on different ranks make all of them wait for each other.
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.collect()
