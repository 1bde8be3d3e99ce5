"""The training loop: resume, iterate, log, checkpoint, export, finish.

Notable: a run that was killed and resumed on the same number of processes repeats an uninterrupted one bit for bit on
the CPU; checkpoints appear under their name only when complete; at the end there are a checkpoint, an export of the
teacher and `loss_curves.png`.
"""

from __future__ import annotations

import gc
import itertools
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dinov3 import distributed
from dinov3.checkpointer import RngState, checkpoint_holds, find_latest_checkpoint, load_checkpoint
from dinov3.configs.scaling import count_iterations
from dinov3.data.fingerprint import check_same_on_all_ranks
from dinov3.distributed import runtime
from dinov3.hub.run_directory import CHECKPOINT_DIRECTORY, TEACHER_FILE
from dinov3.logging import MetricLogger, SmoothedValue, truncate_metrics_file
from dinov3.train.data_loading import build_train_loader, dataset_of, global_batch_size
from dinov3.train.gram import warn_of_idle_gram
from dinov3.train.plot import METRICS_FILE, plot_losses
from dinov3.train.preemption import Preemption
from dinov3.train.resuming import newest_common_checkpoint, report_changed_data, report_changes
from dinov3.train.saving import Saver, export_path, export_teacher
from dinov3.train.schedules import build_schedulers, settings_at
from dinov3.train.ssl_meta_arch import SSLMetaArch
from dinov3.train.step import NonFiniteLossError, StepResult, train_step
from dinov3.utils.files import DiskFullError

logger = logging.getLogger("dinov3")

GARBAGE_COLLECTION_PERIOD = 150
#: What a rank can ask of all of them: to stop, to save, and to wait for its save in the background.
STOP, SAVE, SAVING = "stop", "save", "saving"
#: Prefix in checkpoints; those of a stage without Gram anchoring have no such weights.
GRAM_TEACHER = "gram_teacher."


def do_train(
    cfg: Any,
    model: SSLMetaArch,
    *,
    resume: bool = True,
    data_loader: Any = None,
    preemption: Preemption | None = None,
    profiler: torch.profiler.profile | None = None,
) -> dict[str, float]:
    """Train `model` as `cfg` says, from the newest checkpoint in `train.output_dir` if there is one.

    Args:
        cfg: the training configuration, learning rate already scaled.
        model: a meta-architecture, prepared for distributed training, weights not yet initialised.
        resume: continue from the newest valid checkpoint.
        data_loader: batches to train on instead of those of `train.dataset_path`, from the first iteration of this
            call on; `train.grad_accumulation_steps` of them per iteration.
        preemption: when to stop early, with a checkpoint. Default: never.
        profiler: its `step` is called after every training step.

    Returns:
        The global average of every metric.

    Raises:
        NonFiniteLossError: a loss or gradient was not finite; the last good checkpoint is intact.
        CheckpointError: no usable checkpoint is left to resume from, or two saves in a row failed.
        SystemExit: stopped early; see `Preemption.leave`.
    """
    return Trainer(cfg, model, preemption=preemption, profiler=profiler).run(resume=resume, data_loader=data_loader)


class Trainer:
    """The state of one training run.

    Args:
        cfg: the training configuration.
        model: the meta-architecture.
        preemption: when to stop early. Default: never.
        profiler: its `step` is called after every training step.
    """

    def __init__(
        self,
        cfg: Any,
        model: SSLMetaArch,
        *,
        preemption: Preemption | None = None,
        profiler: torch.profiler.profile | None = None,
    ) -> None:
        self.cfg = cfg
        self.model = model.train()
        self.output_dir = Path(cfg.train.output_dir)
        self.checkpoint_root = self.output_dir / CHECKPOINT_DIRECTORY
        self.n_iterations = count_iterations(cfg, cfg.optim.epochs)
        self.n_iterations_of_heads = count_iterations(cfg, cfg.optim.freeze_backbone_epochs)
        self.batches_per_step: int = cfg.train.grad_accumulation_steps
        self.global_batch_size = global_batch_size(cfg) * self.batches_per_step
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
        self.saver = Saver(cfg, self.checkpoint_root)
        self.preemption = preemption
        self.profiler = profiler
        self.must_stop = False
        self.seconds_for_data = 0.0
        self.exported: int | None = None
        self.resumed_from: Path | None = None

    def run(self, *, resume: bool = True, data_loader: Any = None) -> dict[str, float]:
        """Train to the end; see `do_train`."""
        try:
            return self._run(resume, data_loader)
        except DiskFullError as error:
            raise DiskFullError(error.errno, f"{error}. Newest checkpoint: {self._describe_newest()}") from error

    def _run(self, resume: bool, data_loader: Any) -> dict[str, float]:
        self.model.init_weights()
        start = self._resume() if resume else 0
        last = self.n_iterations - 1
        if start > last:
            logger.info("nothing to do: %d of %d iterations are done", start, self.n_iterations)
            wanted = (
                export_path(self.output_dir, start - 1, sharded=self.cfg.train.sharded_eval_checkpoint),
                self.output_dir / TEACHER_FILE,
            )
            # A run may have been killed between its last checkpoint and the export.
            if not distributed.broadcast_object(all(path.exists() for path in wanted)):
                self.export(start - 1)
            return {}
        if data_loader is None:
            data_loader = build_train_loader(self.cfg, start_iteration=start * self.batches_per_step)
            self.saver.data = check_same_on_all_ranks(dataset_of(data_loader), "train.dataset_path")
            if self.resumed_from is not None:
                report_changed_data(self.resumed_from, self.saver.data)
        # Collections at different times on different ranks would make all of them wait for each other.
        gc.disable()
        try:
            done = self._iterate(data_loader, start)
        finally:
            gc.enable()
            gc.collect()
        stops_early = self.must_stop and done < last
        if not stops_early:
            done = last
        self.saver.finish()
        if self.saver.newest != done:
            self.save(done)
            self.saver.finish()
        if stops_early:
            assert self.preemption is not None
            newest = find_latest_checkpoint(self.checkpoint_root)
            logger.warning("stopped after iteration %d; newest checkpoint: %s", done, newest)
            self.preemption.leave()
        if self.exported != last:
            self.export(last)
        self.metric_logger.synchronize_between_processes()
        if distributed.is_subgroup_main_process():
            logger.info("loss curves: %s", plot_losses(self.output_dir))
        return {name: meter.global_avg for name, meter in self.metric_logger.meters.items()}

    def _iterate(self, loader: Any, start: int) -> int:
        # The loop. Returns the last iteration.
        cfg, iteration = self.cfg, start
        steps = self.metric_logger.log_every(
            self._batches_of_steps(loader),
            cfg.train.print_freq,
            header="Training",
            n_iterations=self.n_iterations,
            start_iteration=start,
            progress=cfg.train.progress,
        )
        for iteration, batches in enumerate(steps, start=start):
            done = iteration + 1
            if iteration % GARBAGE_COLLECTION_PERIOD == 0:
                gc.collect()
            started = time.perf_counter()
            result = self.step(batches, iteration)
            seconds = time.perf_counter() - started
            self._handle_nonfinite(result)
            settings = settings_at(self.schedules, iteration)
            self.metric_logger.update(
                lr=settings.lr,
                wd=settings.weight_decay,
                mom=settings.momentum,
                last_layer_lr=settings.last_layer_lr,
                **result.metrics,
                teacher_temp=settings.teacher_temp,
                images_per_second=self.global_batch_size / seconds,
                data_wait_share=self.seconds_for_data / (self.seconds_for_data + seconds),
                max_memory_mib=runtime.max_memory_mib(),
            )
            if self.profiler is not None:
                self.profiler.step()
            # A save in the background is complete when no rank writes any more, which all learn at the same step.
            if SAVING not in result.requests:
                self.saver.finish()
            export_period = cfg.evaluation.eval_period_iterations
            if export_period > 0 and done % export_period == 0:
                self.export(iteration)
            # Weights after a dropped step are those before it, and the next checkpoint will have them.
            if result.problem is None and (done % cfg.checkpointing.period == 0 or SAVE in result.requests):
                self.save(iteration)
            self.must_stop = STOP in result.requests
        return iteration

    def _batches_of_steps(self, loader: Any) -> Iterator[list[dict[str, Any]]]:
        batches = iter(loader)
        while not self.must_stop:
            started = time.perf_counter()
            of_step = list(itertools.islice(batches, self.batches_per_step))
            self.seconds_for_data = time.perf_counter() - started
            if len(of_step) < self.batches_per_step:
                return
            yield of_step

    def step(self, batches: list[dict[str, Any]], iteration: int) -> StepResult:
        """Train on the batches of one iteration; see `train_step`."""
        for data in batches:
            n_bad_images = data.pop("n_bad_images", None)
            if n_bad_images is not None:  # only with `train.on_bad_image=skip`
                self.n_bad_images += int(distributed.all_reduce(torch.tensor(n_bad_images, device=runtime.device())))
                self.metric_logger.update(bad_images=self.n_bad_images)
        return train_step(
            self.model,
            self.optimizer,
            [data | {"global_batch_size": self.global_batch_size} for data in batches],
            settings_at(self.schedules, iteration),
            iteration=iteration,
            clip_grad=self.cfg.optim.clip_grad,
            freeze_backbone=iteration < self.n_iterations_of_heads,
            requests={
                STOP: self.preemption is not None and self.preemption.is_requested,
                SAVE: self.saver.is_due,
                SAVING: self.saver.is_running,
            },
        )

    def _handle_nonfinite(self, result: StepResult) -> None:
        if result.problem is None:
            self.nonfinite_in_a_row = 0
            return
        self.nonfinite_in_a_row += 1
        allowed = self.cfg.train.max_nonfinite_steps
        if self.nonfinite_in_a_row <= allowed:
            logger.warning("%s; dropped (%d of %d allowed)", result.problem, self.nonfinite_in_a_row, allowed)
            return
        self.saver.finish()
        raise NonFiniteLossError(
            f"{result.problem}. The step was not applied. Last good checkpoint: {self._describe_newest()}. "
            "Lower the learning rate or optim.clip_grad and start again (the run resumes there), or let "
            "train.max_nonfinite_steps=N drop up to N such steps in a row."
        )

    def _describe_newest(self) -> str:
        return str(find_latest_checkpoint(self.checkpoint_root) or "none yet")

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds of the trainer itself."""
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
        """Write `ckpt/<iteration>`, with `checkpointing.async_save` in the background; see `Saver`."""
        self.saver.save(iteration, model=self.model, optimizer=self.optimizer, rng=self.rng_state, trainer=self)

    def load(self, directory: Path) -> int:
        """Load a checkpoint; return the iteration that it was saved after."""
        done = load_checkpoint(
            directory,
            model=self.model,
            optimizer=self.optimizer,
            process_group=distributed.get_process_subgroup(),
            verify=False,  # whoever found it has verified it
            may_lack=[GRAM_TEACHER],
            rng=self.rng_state,
            trainer=self,
        )
        self.model.continue_gram(done, is_loaded=checkpoint_holds(directory, f"model.{GRAM_TEACHER}"))
        return done

    def export(self, iteration: int) -> None:
        """Write the EMA teacher after `iteration` to `eval/training_<iteration>`."""
        path = export_teacher(self.model, self.output_dir, iteration, sharded=self.cfg.train.sharded_eval_checkpoint)
        self.exported = iteration
        logger.info("teacher after iteration %d: %s", iteration, path)

    def _resume(self) -> int:
        # Returns the first iteration to run.
        settings = self.cfg.checkpointing
        directory = newest_common_checkpoint(self.checkpoint_root, verify=settings.verify, period=settings.period)
        start = 0
        if directory is None:
            warn_of_idle_gram(self.model.gram_loss_weight.values, self.n_iterations)
        else:
            report_changes(directory, self.cfg)
            start = self.load(directory) + 1
            self.resumed_from = directory
            logger.info("resumed from %s: %d of %d iterations are done", directory, start, self.n_iterations)
        if distributed.is_subgroup_main_process():
            # Iterations after the checkpoint are run again.
            truncate_metrics_file(self.output_dir / METRICS_FILE, start)
        return start
