"""Training the grid of classifiers of linear probing: its batches, its step and its checkpoints."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov3 import distributed
from dinov3.checkpointer import find_all_checkpoints, keep_last_n_checkpoints
from dinov3.data.fingerprint import fingerprint
from dinov3.data.loaders import usable_workers
from dinov3.eval.classification.linear_config import TrainConfig
from dinov3.eval.classification.linear_heads import (
    AllClassifiers,
    LinearInputs,
    names_in_state,
    setup_linear_classifiers,
    tokens_of_first_image,
)
from dinov3.eval.classification.linear_scoring import Evaluator
from dinov3.eval.features.cache import IN_MEMORY, FeatureStore, model_device, weights_digest
from dinov3.eval.features.extraction import extract_cached, gather_rows
from dinov3.eval.training.checkpoints import Checkpoints, copy_entries, unwrap_ddp_state_dict
from dinov3.eval.training.loader import TrainOrder, make_train_loader
from dinov3.eval.training.loop import HeadTraining, Metrics, train_head
from dinov3.models.intermediate_layers import ModelWithIntermediateLayers
from dinov3.utils.files import explaining_full_disk, fsync, publish_directory, temporary_beside
from dinov3.utils.weight_files import WeightsError, read_file

logger = logging.getLogger("dinov3")

CHECKPOINT_FILE = "checkpoint.pth"
FINAL, BEST = "final", "best"
ACCURACY = "accuracy"
NO_ACCURACY = -1.0  # best accuracy before the first validation
MANY_PASSES = 50  # in an epoch


def train_linear_classifiers(
    *,
    feature_model: ModelWithIntermediateLayers,
    train_dataset: Any,
    train_config: TrainConfig,
    training_num_classes: int,
    val_evaluator: Evaluator,
    checkpoint_output_dir: str | Path,
    store: FeatureStore = IN_MEMORY,
    prefixstring: str = "",
) -> tuple[ModelWithIntermediateLayers, AllClassifiers, int]:
    """Train the grid of classifiers on a frozen backbone.

    Args:
        feature_model: gives the tokens of as many blocks as the largest of `n_last_blocks_list`.
        train_dataset: gives (image, target).
        train_config: the settings.
        training_num_classes: number of logits.
        val_evaluator: is asked every `eval_period_iterations`, but not after the last step.
        checkpoint_output_dir: gets `<iteration>/`, `best/` and `final/`, each with a `checkpoint.pth`.
        store: of inputs, for `augment=false`.
        prefixstring: of the records of validations.

    Returns:
        The feature model, the classifiers, and the number of steps they have been trained for.
    """
    config = resolve_epoch_length(train_config, len(train_dataset))
    assert config.epoch_length is not None
    max_iter = config.epochs * config.epoch_length
    classifiers, groups = setup_linear_classifiers(
        tokens_of_first_image(feature_model, train_dataset),
        config.n_last_blocks_list,
        config.learning_rates,
        config.batch_size,
        training_num_classes,
    )
    peaks = [{"lr": group["lr"]} for group in groups]  # the scheduler changes those of the groups
    optimizer = config.optimizer_type.get_optimizer(groups)
    scheduler = config.scheduler_type.get_scheduler(optimizer, peaks, config.epoch_length, config.epochs, max_iter)
    criterion = config.loss_type.get_criterion()

    def step(batch: tuple[Tensor, Tensor], iteration: int) -> Tensor:
        return train_step(classifiers, *batch, criterion, optimizer, scheduler)[0]

    def evaluate(n_steps: int) -> Metrics:
        results = val_evaluator.evaluate_and_maybe_save(
            feature_model, classifiers, n_steps - 1, prefixstring=prefixstring, save_predictions=False
        )
        return {ACCURACY: results[val_evaluator.main_metric_name]}

    task = HeadTraining(
        head=classifiers,
        optimizer=optimizer,
        scheduler=scheduler,
        checkpoints=LinearCheckpoints(checkpoint_output_dir, config, classifiers.names),
        settings=_settings(config, feature_model, len(train_dataset), training_num_classes),
        data=fingerprint(train_dataset),
        make_batches=lambda first: make_batches(feature_model, train_dataset, config, first, store),
        step=step,
        evaluate=evaluate,
        is_better=lambda metrics, best: val_evaluator.is_improvement(metrics[ACCURACY], best[ACCURACY]),
        on_start=lambda first: val_evaluator.forget_from(first, prefixstring),
        description=f"{prefixstring}training",
        loss_name="loss of the first classifier",
    )
    eval_period = config.epoch_length if config.eval_period_iterations is None else config.eval_period_iterations
    train_head(
        task,
        total_iter=max_iter,
        eval_interval=eval_period if eval_period > 0 else max_iter,
        save_interval=config.save_checkpoint_iterations or config.epoch_length,
        evaluate_at_end=False,  # the protocol does that, together with the test sets, also if nothing is left to train
    )
    return feature_model, classifiers, max_iter


def train_step(
    classifiers: AllClassifiers,
    inputs: Tensor,
    labels: Tensor,
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
) -> Tensor:
    """Do one step of all classifiers, each as if it were the only one.

    Args:
        classifiers: the grid.
        inputs: float32 [B, W] of `LinearInputs` for the most blocks of the grid.
        labels: int64 [B], or multi-hot [B, C].
        criterion: a loss without reduction, see `LossType.get_criterion`.
        optimizer: of one group per classifier.
        scheduler: stepped after it.

    Returns:
        The mean losses [H] of this process, before the step.
    """
    losses = classifiers.fused.backward(inputs, labels.float() if labels.ndim > 1 else labels, criterion)
    optimizer.step()
    scheduler.step()
    return losses


def resolve_epoch_length(config: TrainConfig, n_images: int) -> TrainConfig:
    """Fill in `epoch_length`, log how often the images will be seen, and warn if that is rarely or very often."""
    global_batch = config.batch_size * distributed.get_world_size()
    epoch_length = config.epoch_length or -(-n_images // global_batch)
    passes = config.epochs * epoch_length * global_batch / n_images
    logger.info(
        f"training: {config.epochs * epoch_length} steps of {global_batch} images, {epoch_length * global_batch} "
        f"images per epoch, {passes:.2f} passes over {n_images} training images"
    )
    steps = f"train.epoch_length={epoch_length} steps of {global_batch} images"
    if passes < config.epochs / 2:
        logger.warning(
            f"{config.epochs} epochs of {steps} are only {passes:.2f} passes over the training images, and learning "
            "rates are for a larger batch; the defaults are made for 1024 images per step. train.epoch_length=null "
            "makes an epoch one pass"
        )
    elif passes > MANY_PASSES * config.epochs:
        logger.warning(
            f"{steps} are {passes / config.epochs:.0f} passes over the training images, which takes long; "
            "train.epoch_length=null makes an epoch one pass"
        )
    return dataclasses.replace(config, epoch_length=epoch_length)


def make_batches(
    feature_model: ModelWithIntermediateLayers,
    dataset: Any,
    config: TrainConfig,
    first_iteration: int,
    store: FeatureStore,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield endless batches of (inputs float32 [B, W], labels), starting with that of `first_iteration`."""
    model = LinearInputs(feature_model, max(config.n_last_blocks_list)).eval()
    if config.augment or not model.fit_into(config.memory_budget_mb, dataset):
        device = model_device(model)
        num_workers = usable_workers(config.num_workers)
        for images, labels in make_train_loader(dataset, config.batch_size, num_workers, first_iteration):
            yield model(images.to(device, non_blocking=True)), labels.to(device, non_blocking=True)
    # Without augmentation the inputs never change: they are computed once and taken in the order of the loader above.
    rows = gather_rows(
        extract_cached(
            model,
            dataset,
            store,
            batch_size=config.batch_size,
            num_workers=config.num_workers,
            description="training features",
        )
    )
    order = iter(TrainOrder(len(dataset), config.batch_size, first_iteration))
    while True:
        chosen = torch.tensor([request.indices[0] for request in islice(order, config.batch_size)])
        chosen = chosen.to(rows.features.device, non_blocking=True)
        yield rows.features[chosen], rows.targets[chosen]


class LinearCheckpoints(Checkpoints):
    """Checkpoints of linear probing, as published: `<last finished iteration>/`, `best/` and `final/`.

    Args:
        directory: where they are.
        config: whether and from what to continue, and how many to keep.
        names: the classifiers of the grid, in order.
    """

    advice = "choose another output_dir, or start over with train.resume=false"

    def __init__(self, directory: str | Path, config: TrainConfig, names: Sequence[str]) -> None:
        super().__init__(directory)
        self._config = config
        self._names = list(names)

    def find_newest(self) -> Path | None:
        """Return the newest checkpoint file, of `train.classifier_fpath` if the directory has none."""
        return find_checkpoint(self._config, self.directory)

    def read(self, path: Path) -> dict[str, Any]:
        """Read a checkpoint of ours, or of the official release, whose names are wrapped and which has no settings.

        Raises:
            ValueError: it has another grid of classifiers, is something else, or damaged.
        """
        checkpoint = read_checkpoint(path)
        model = unwrap_ddp_state_dict(checkpoint["linear_classifiers"])
        if (found := names_in_state(model)) != self._names:
            different = sorted(set(found) ^ set(self._names)) or ["their order"]
            raise ValueError(
                f"{path} has another grid of classifiers, different in {', '.join(different)}: {self.advice}"
            )
        iteration, best = checkpoint["iteration"] + 1, float(checkpoint["best_accuracy"])
        result = {"iteration": iteration, "best_metrics": {} if best == NO_ACCURACY else {ACCURACY: best}}
        # Without the schedule, which follows from the configuration: the release restarts it after a resume.
        content = {"model": model, "optimizer": checkpoint["optimizer"], "iteration": iteration, "result": result}
        return content | {name: checkpoint[name] for name in ("settings",) if name in checkpoint}

    def save(self, content: Mapping[str, Any], *, is_due: bool, is_best: bool, is_last: bool) -> None:
        """Write a checkpoint under each of its names, and remove older ones that the policy does not keep."""
        iteration = content["iteration"] - 1
        checkpoint = {
            "iteration": iteration,
            "linear_classifiers": copy_entries(content["model"]),
            "best_accuracy": content["result"]["best_metrics"].get(ACCURACY, NO_ACCURACY),
            **{name: content[name] for name in ("optimizer", "scheduler", "settings")},
        }
        if is_best:
            write_checkpoint(self.directory / BEST, checkpoint)
        if is_due:
            write_checkpoint(self.directory / (FINAL if is_last else str(iteration)), checkpoint)
        keep_last_n_checkpoints(self.directory, self._config.checkpoint_retention_policy.max_to_keep)


def find_checkpoint(config: TrainConfig, directory: Path) -> Path | None:
    """Return the checkpoint file to continue from: in the directory of this training, or `train.classifier_fpath`.

    Raises:
        FileNotFoundError: the latter is needed, but holds no checkpoint.
    """
    if not config.resume:
        return None
    own = _newest_in(directory)
    if own is not None or not config.classifier_fpath:
        return own
    given = Path(config.classifier_fpath)
    if given.is_file():
        return given
    found = given / CHECKPOINT_FILE if (given / CHECKPOINT_FILE).is_file() else _newest_in(given)
    if found is None:
        raise FileNotFoundError(
            f"train.classifier_fpath={given}: expected a checkpoint file, a directory with {CHECKPOINT_FILE}, or a "
            "directory of such directories named by iteration"
        )
    return found


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of ours, or of the official release; tensors on the CPU.

    Raises:
        ValueError: it is something else, or damaged.
    """
    checkpoint = dict(read_file(Path(path), mmap=False))
    if missing := {"iteration", "linear_classifiers", "optimizer", "best_accuracy"} - set(checkpoint):
        raise WeightsError(f"{path} is not a linear-probing checkpoint: it has no {', '.join(sorted(missing))}")
    return checkpoint


def write_checkpoint(directory: Path, content: Mapping[str, Any]) -> None:
    """Put a `checkpoint.pth` into a directory, replacing what was there; one process does it."""
    temporary = temporary_beside(directory)
    temporary.mkdir(parents=True)
    with explaining_full_disk(temporary):
        torch.save(dict(content), temporary / CHECKPOINT_FILE)
        fsync(temporary / CHECKPOINT_FILE)
    publish_directory(temporary, directory)


def _settings(config: TrainConfig, model: nn.Module, n_images: int, n_classes: int) -> dict[str, Any]:
    # What the weights depend on, besides the grid, which the names of the classifiers describe.
    return {
        "model": distributed.broadcast_object(weights_digest(model)),
        "training images": n_images,
        "classes": n_classes,
        "images per step": config.batch_size * distributed.get_world_size(),
        "train.epochs": config.epochs,
        "train.epoch_length": config.epoch_length,
        "train.loss_type": config.loss_type.name,
        "train.optimizer_type": config.optimizer_type.name,
        "train.scheduler_type": config.scheduler_type.name,
        "train.augment": config.augment,
    }


def _newest_in(directory: Path) -> Path | None:
    for candidate in [directory / FINAL, *reversed(find_all_checkpoints(directory))]:
        if (candidate / CHECKPOINT_FILE).is_file():
            return candidate / CHECKPOINT_FILE
    return None
