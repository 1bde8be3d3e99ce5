"""Training the grid of classifiers, with checkpoints from which a killed run goes on as if nothing had happened.

Notable:
- What a step sees depends on its number alone: the order of the images and the crops drawn from them follow from the
  place of each image in the training. So do the rates of the schedule. Several processes share out the images of one
  larger batch.
- With `train.augment=false` the inputs of the classifiers never change: they are computed once and kept.
"""

from __future__ import annotations

import dataclasses
import logging
import pickle
import warnings
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dinov3 import distributed
from dinov3.checkpointer import (
    CheckpointRetentionPolicy,
    find_all_checkpoints,
    keep_last_n_checkpoints,
    remove_stale_temporaries,
)
from dinov3.eval.classification.linear_config import TrainConfig
from dinov3.eval.classification.linear_heads import (
    AllClassifiers,
    LinearInputs,
    Tokens,
    names_in_state,
    setup_linear_classifiers,
    without_ddp_prefix,
)
from dinov3.eval.command.progress import Progress
from dinov3.eval.features.cache import FeatureCache, extract_cached, weights_digest
from dinov3.eval.features.extraction import gather_rows, model_device, usable_workers
from dinov3.eval.training.loader import TrainOrder, make_train_loader
from dinov3.models.intermediate_layers import ModelWithIntermediateLayers
from dinov3.utils.files import publish_directory, temporary_beside

logger = logging.getLogger("dinov3")

CHECKPOINT_FILE = "checkpoint.pth"
FINAL, BEST = "final", "best"
LOG_PERIOD = 10  # steps
MANY_PASSES = 50  # in an epoch
NO_ACCURACY = -1.0  # best accuracy before the first validation


class Validation(Protocol):
    """What training asks of an evaluator."""

    @property
    def main_metric_name(self) -> str:
        """Key of the best classifier's score."""
        ...

    def evaluate_and_maybe_save(
        self,
        feature_model: nn.Module,
        linear_classifiers: nn.Module,
        iteration: int,
        *,
        prefixstring: str,
        save_predictions: bool,
    ) -> dict[str, Any]:
        """`{main_metric_name: percent, "best_classifier": name}`."""
        ...

    def is_improvement(self, accuracy: float, best: float) -> bool:
        """Whether an accuracy is at least as good as the best one so far."""
        ...

    def forget_from(self, iteration: int, prefixstring: str) -> None:
        """Drop what was recorded from this iteration on."""
        ...


def setup_linear_training(
    *,
    config: TrainConfig,
    sample_output: Tokens,
    training_num_classes: int,
    checkpoint_output_dir: str | Path,
    settings: Mapping[str, Any] | None = None,
) -> tuple[AllClassifiers, int, int, nn.Module, torch.optim.Optimizer, Any, float]:
    """Everything that a training needs, as its newest checkpoint left it.

    Args:
        config: the settings; `epoch_length` must be given.
        sample_output: tokens of some image.
        training_num_classes: number of logits.
        checkpoint_output_dir: where checkpoints are.
        settings: on which the result depends; those in a checkpoint must be the same.

    Returns:
        Classifiers, first iteration to do, number of iterations, criterion, optimizer, scheduler, best accuracy.

    Raises:
        ValueError: a checkpoint is damaged, or of another training.
        FileNotFoundError: `train.classifier_fpath` is not there, or has no checkpoint in it.
    """
    assert config.epoch_length is not None
    classifiers, groups = setup_linear_classifiers(
        sample_output, config.n_last_blocks_list, config.learning_rates, config.batch_size, training_num_classes
    )
    lrs = [{"lr": group["lr"]} for group in groups]  # the scheduler changes those of the groups
    optimizer = config.optimizer_type.get_optimizer(groups)
    max_iter = config.epochs * config.epoch_length
    scheduler = config.scheduler_type.get_scheduler(optimizer, lrs, config.epoch_length, config.epochs, max_iter)
    start_iter, best_accuracy = 0, NO_ACCURACY
    path = distributed.broadcast_object(_find_checkpoint(config, Path(checkpoint_output_dir)))
    if path is not None:
        checkpoint = read_checkpoint(path)
        _check_fits(checkpoint, path, classifiers, settings, max_iter)
        classifiers.load_state_dict(without_ddp_prefix(checkpoint["linear_classifiers"]))
        start_iter, best_accuracy = checkpoint["iteration"] + 1, float(checkpoint["best_accuracy"])
        _advance(scheduler, start_iter)
        # Rates and momenta are those of the schedule, also if the checkpoint was written without one.
        state = optimizer.state_dict() | {"state": checkpoint["optimizer"]["state"]}
        optimizer.load_state_dict(state)
        logger.info("continuing from %s after %d of %d steps", path, start_iter, max_iter)
    criterion = config.loss_type.get_criterion()
    return classifiers, start_iter, max_iter, criterion, optimizer, scheduler, best_accuracy


def train_linear_classifiers(
    *,
    feature_model: ModelWithIntermediateLayers,
    train_dataset: Any,
    train_config: TrainConfig,
    training_num_classes: int,
    val_evaluator: Validation,
    checkpoint_output_dir: str | Path,
    cache: FeatureCache | None = None,
    prefixstring: str = "",
) -> tuple[ModelWithIntermediateLayers, AllClassifiers, int]:
    """Train the grid of classifiers on a frozen backbone.

    Args:
        feature_model: gives the tokens of as many blocks as the largest of `n_last_blocks_list`.
        train_dataset: gives (image, target).
        train_config: the settings.
        training_num_classes: number of logits.
        val_evaluator: is asked every `eval_period_iterations`, but not after the last step.
        checkpoint_output_dir: `<iteration>/`, `best/` and `final/`, each with a `checkpoint.pth`.
        cache: of inputs, for `augment=false`.
        prefixstring: of the records of validations.

    Returns:
        The feature model, the classifiers, and the number of steps they have been trained for.
    """
    config = resolve_epoch_length(train_config, len(train_dataset))
    assert config.epoch_length is not None
    directory = Path(checkpoint_output_dir)
    sample_output = _tokens_of_first_image(feature_model, train_dataset)
    settings = _settings(config, feature_model, train_dataset, training_num_classes)
    if distributed.is_main_process():
        remove_stale_temporaries(directory)
    classifiers, start_iter, max_iter, criterion, optimizer, scheduler, best = setup_linear_training(
        config=config,
        sample_output=sample_output,
        training_num_classes=training_num_classes,
        checkpoint_output_dir=directory,
        settings=settings,
    )
    val_evaluator.forget_from(start_iter, prefixstring)
    batches = make_batches(feature_model, train_dataset, config, start_iter, cache) if start_iter < max_iter else []
    save_period = config.save_checkpoint_iterations or config.epoch_length
    eval_period = config.epoch_length if config.eval_period_iterations is None else config.eval_period_iterations
    steps = enumerate(islice(batches, max_iter - start_iter), start=start_iter)
    with Progress(f"{prefixstring}training", max_iter, unit="step", initial=start_iter) as progress:
        for iteration, (inputs, labels) in steps:
            losses = train_step(classifiers, inputs, labels, criterion, optimizer, scheduler)
            is_last = iteration == max_iter - 1
            note = None
            if iteration % LOG_PERIOD == 0 or is_last:
                note = f"loss {losses[0].item():.4f}, lr {optimizer.param_groups[0]['lr']:.2e} of the first classifier"
                logger.debug("step %d: %s", iteration, note)
            progress.advance(note=note)
            if eval_period > 0 and (iteration + 1) % eval_period == 0 and not is_last:
                results = val_evaluator.evaluate_and_maybe_save(
                    feature_model, classifiers, iteration, prefixstring=prefixstring, save_predictions=False
                )
                accuracy = results[val_evaluator.main_metric_name]
                if val_evaluator.is_improvement(accuracy, best):
                    best = accuracy
                    save_checkpoint(directory / BEST, classifiers, optimizer, scheduler, iteration, best, settings)
            if is_last or (iteration + 1) % save_period == 0:
                name = FINAL if is_last else str(iteration)
                save_checkpoint(directory / name, classifiers, optimizer, scheduler, iteration, best, settings)
                _keep_newest(directory, config.checkpoint_retention_policy)
    return feature_model, classifiers, max_iter


def train_step(
    classifiers: AllClassifiers,
    inputs: Tensor,
    labels: Tensor,
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
) -> Tensor:
    """One step of all classifiers, each as if alone.

    Args:
        classifiers: the grid.
        inputs: float32 [B, W] of `LinearInputs` for the most blocks of the grid.
        labels: int64 [B], or multi-hot [B, C].
        criterion: as of `LossType.get_criterion`.
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
    """The settings with an `epoch_length`; says, and warns, how often the images will be seen."""
    global_batch = config.batch_size * distributed.get_world_size()
    epoch_length = config.epoch_length or -(-n_images // global_batch)
    passes = config.epochs * epoch_length * global_batch / n_images
    logger.info(
        "training: %d steps of %d images, %d images per epoch, %.2f passes over %d training images",
        config.epochs * epoch_length,
        global_batch,
        epoch_length * global_batch,
        passes,
        n_images,
    )
    if passes < config.epochs / 2:
        logger.warning(
            "%d epochs of train.epoch_length=%d steps of %d images are only %.2f passes over the training images, and "
            "learning rates are for a larger batch; the defaults are made for 1024 images per step. "
            "train.epoch_length=null makes an epoch one pass",
            config.epochs,
            epoch_length,
            global_batch,
            passes,
        )
    elif passes > MANY_PASSES * config.epochs:
        logger.warning(
            "train.epoch_length=%d steps of %d images are %.0f passes over the training images, which takes long; "
            "train.epoch_length=null makes an epoch one pass",
            epoch_length,
            global_batch,
            passes / config.epochs,
        )
    return dataclasses.replace(config, epoch_length=epoch_length)


def make_batches(
    feature_model: ModelWithIntermediateLayers,
    dataset: Any,
    config: TrainConfig,
    first_iteration: int,
    cache: FeatureCache | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of (inputs float32 [B, W], labels), from that of `first_iteration` on."""
    model = LinearInputs(feature_model, max(config.n_last_blocks_list)).eval()
    if not config.augment and inputs_fit(model, dataset, config.memory_budget_mb):
        return _kept_batches(model, dataset, config, first_iteration, cache)
    return _image_batches(model, dataset, config, first_iteration)


def inputs_fit(model: LinearInputs, dataset: Any, memory_budget_mb: float) -> bool:
    """Whether the inputs of a whole dataset are within a budget; says so if not."""
    width = (model.n + 1) * _tokens_of_first_image(model.feature_model, dataset)[-1][1].shape[1]
    size_mb = 4 * len(dataset) * width / 2**20
    if size_mb > memory_budget_mb:
        logger.warning(
            "features of %d images take %.0f MB, more than train.memory_budget_mb=%.0f: they are not kept, and the "
            "images go through the model in every pass",
            len(dataset),
            size_mb,
            memory_budget_mb,
        )
    return size_mb <= memory_budget_mb


def save_checkpoint(
    directory: Path,
    classifiers: AllClassifiers,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    iteration: int,
    best_accuracy: float,
    settings: Mapping[str, Any],
) -> None:
    """Write `<directory>/checkpoint.pth`, complete or not at all; the main process does it, all wait."""
    if distributed.is_main_process():
        content = {
            "iteration": iteration,
            "linear_classifiers": {name: tensor.clone() for name, tensor in classifiers.state_dict().items()},
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "best_accuracy": best_accuracy,
            "settings": dict(settings),
        }
        write_checkpoint(directory, content)
    distributed.barrier()


def write_checkpoint(directory: Path, content: Mapping[str, Any]) -> None:
    """Put a `checkpoint.pth` into a directory, replacing what was there; one process does it."""
    temporary = temporary_beside(directory)
    temporary.mkdir(parents=True)
    torch.save(dict(content), temporary / CHECKPOINT_FILE)
    publish_directory(temporary, directory)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """What `save_checkpoint`, or the official release, wrote; tensors on the CPU.

    Raises:
        ValueError: it is something else, or damaged.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is no checkpoint of linear classifiers, or damaged: {error}") from error
    missing = {"iteration", "linear_classifiers", "optimizer", "best_accuracy"} - set(checkpoint)
    if missing:
        raise ValueError(f"{path} is no checkpoint of linear classifiers: it has no {', '.join(sorted(missing))}")
    return checkpoint


def find_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint file in a directory of them: `final`, else the largest iteration."""
    for candidate in [directory / FINAL, *reversed(find_all_checkpoints(directory))]:
        if (candidate / CHECKPOINT_FILE).is_file():
            return candidate / CHECKPOINT_FILE
    return None


def check_checkpoint_path(config: TrainConfig, directory: str | Path) -> None:
    """Refuse a `train.classifier_fpath` that will be needed, but holds no checkpoint; the main process does it.

    Raises:
        FileNotFoundError: names the path.
    """
    _find_checkpoint(config, Path(directory))


def _find_checkpoint(config: TrainConfig, directory: Path) -> Path | None:
    if not config.resume or not distributed.is_main_process():
        return None
    own = find_checkpoint(directory)
    if own is not None or not config.classifier_fpath:
        return own
    given = Path(config.classifier_fpath)
    if given.is_file():
        return given
    found = given / CHECKPOINT_FILE if (given / CHECKPOINT_FILE).is_file() else find_checkpoint(given)
    if found is None:
        raise FileNotFoundError(
            f"train.classifier_fpath={given}: expected a checkpoint file, a directory with {CHECKPOINT_FILE}, or a "
            "directory of such directories named by iteration"
        )
    return found


def _check_fits(
    checkpoint: Mapping[str, Any],
    path: Path,
    classifiers: AllClassifiers,
    settings: Mapping[str, Any] | None,
    max_iter: int,
) -> None:
    advice = "train.resume=false starts anew, another output_dir leaves the checkpoint alone"
    found, wanted = (
        names_in_state(without_ddp_prefix(checkpoint["linear_classifiers"])),
        list(classifiers.classifiers_dict),
    )
    if found != wanted:
        different = sorted(set(found) ^ set(wanted)) or ["their order"]
        raise ValueError(f"{path} has another grid of classifiers, different in {', '.join(different)}; {advice}")
    stored = checkpoint.get("settings")
    if stored is not None and settings is not None:
        for name in settings:
            if stored.get(name) != settings[name]:
                raise ValueError(
                    f"{path} is of another training: {name} was {stored.get(name)}, now {settings[name]}; {advice}"
                )
    if checkpoint["iteration"] >= max_iter:
        raise ValueError(
            f"{path} has {checkpoint['iteration'] + 1} steps, more than the {max_iter} asked for; {advice}"
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in classifiers.state_dict().items()}
    for name, tensor in without_ddp_prefix(checkpoint["linear_classifiers"]).items():
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(f"{path}: {name} is {tuple(tensor.shape)}, expected {shapes[name]}; {advice}")


def _settings(config: TrainConfig, model: nn.Module, dataset: Any, num_classes: int) -> dict[str, Any]:
    return {
        "model": distributed.broadcast_object(weights_digest(model)),
        "training images": len(dataset),
        "classes": num_classes,
        "images per step": config.batch_size * distributed.get_world_size(),
        "train.epochs": config.epochs,
        "train.epoch_length": config.epoch_length,
        "train.loss_type": config.loss_type.name,
        "train.optimizer_type": config.optimizer_type.name,
        "train.scheduler_type": config.scheduler_type.name,
        "train.augment": config.augment,
    }


def _advance(scheduler: Any, n_steps: int) -> None:
    # By the same operations as the steps that were done, so that the rates are the same to the last bit.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
        for _ in range(n_steps):
            scheduler.step()


def _tokens_of_first_image(feature_model: nn.Module, dataset: Any) -> Tokens:
    tokens: Tokens = feature_model(dataset[0][0][None].to(model_device(feature_model)))
    if not all(bool(part.isfinite().all()) for block in tokens for part in block):
        raise ValueError("the model gives NaN or infinite features, its weights are not usable")
    return tokens


def _image_batches(
    model: LinearInputs, dataset: Any, config: TrainConfig, first_iteration: int
) -> Iterator[tuple[Tensor, Tensor]]:
    device = model_device(model)
    num_workers = usable_workers(config.num_workers)
    for images, labels in make_train_loader(dataset, config.batch_size, num_workers, first_iteration):
        yield model(images.to(device, non_blocking=True)), labels.to(device, non_blocking=True)


def _kept_batches(
    model: LinearInputs, dataset: Any, config: TrainConfig, first_iteration: int, cache: FeatureCache | None
) -> Iterator[tuple[Tensor, Tensor]]:
    rows = gather_rows(
        extract_cached(
            model,
            dataset,
            batch_size=config.batch_size,
            num_workers=config.num_workers,
            cache=cache,
            description="training features",
        )
    )
    order = iter(TrainOrder(len(dataset), config.batch_size, first_iteration))
    while True:
        chosen = torch.tensor([request.indices[0] for request in islice(order, config.batch_size)])
        chosen = chosen.to(rows.features.device, non_blocking=True)
        yield rows.features[chosen], rows.targets[chosen]


def _keep_newest(directory: Path, policy: CheckpointRetentionPolicy) -> None:
    if distributed.is_main_process():
        keep_last_n_checkpoints(directory, policy.max_to_keep)
