"""The classifiers of linear probing: a grid of linear layers that see the same tokens, trained as one.

The input is the class tokens of the last n blocks, shallow to deep, and the mean of the last block's patch tokens.
Inputs of fewer blocks are the last columns of those of more, so one matrix serves the whole grid.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3 import distributed
from dinov3.eval.features.cache import model_device
from dinov3.models.intermediate_layers import ModelWithIntermediateLayers

logger = logging.getLogger("dinov3")

Tokens = Sequence[tuple[Tensor, Tensor]]

INIT_STD = 0.01
INIT_SEED = 0


def scale_lr(learning_rate: float, batch_size: int) -> float:
    """Scale a learning rate for a global batch of 256 to one of `batch_size` images in each process."""
    return learning_rate * (batch_size * distributed.get_world_size()) / 256.0


def create_linear_input(x_tokens_list: Tokens, use_n_blocks: int, use_avgpool: bool) -> Tensor:
    """Make what a classifier sees of an image.

    Args:
        x_tokens_list: (patch tokens [B, P, D], class token [B, D]) of the last blocks, shallow to deep.
        use_n_blocks: n, the number of blocks whose class token is used.
        use_avgpool: append the mean of the last block's patch tokens.

    Returns:
        float32 [B, n D], or [B, (n + 1) D] with `use_avgpool`; computed in the dtype of the tokens.
    """
    parts = [class_token for _, class_token in x_tokens_list[-use_n_blocks:]]
    if use_avgpool:
        parts.append(x_tokens_list[-1][0].mean(dim=1))
    return torch.cat(parts, dim=-1).float()


def tokens_of_first_image(feature_model: nn.Module, dataset: Any) -> Tokens:
    """Run the model on the first image of a dataset, to learn the width of its tokens.

    Raises:
        ValueError: the tokens are not finite.
    """
    tokens: Tokens = feature_model(dataset[0][0][None].to(model_device(feature_model)))
    if not all(bool(part.isfinite().all()) for block in tokens for part in block):
        raise ValueError("the model returns NaN or infinite features, so its weights are unusable")
    return tokens


class LinearInputs(nn.Module):
    """A frozen backbone and `create_linear_input`: images to the input [B, (n + 1) D] of the classifiers.

    Args:
        feature_model: gives the tokens of at least n blocks.
        n: number of blocks.
    """

    def __init__(self, feature_model: ModelWithIntermediateLayers, n: int) -> None:
        super().__init__()
        self.feature_model = feature_model
        self.n = n

    @property
    def autocast_dtype(self) -> torch.dtype:
        """The precision that the backbone runs in, which cached features depend on."""
        device = model_device(self.feature_model).type
        with self.feature_model.autocast_ctx():
            return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32

    def extra_repr(self) -> str:
        """Return the settings that cached features depend on."""
        return f"n={self.n}"

    def forward(self, images: Tensor) -> Tensor:
        """Return float32 [B, (n + 1) D]."""
        return create_linear_input(self.feature_model(images), self.n, use_avgpool=True)

    def fit_into(self, memory_budget_mb: float, dataset: Any) -> bool:
        """Return whether the inputs of a whole dataset fit into a budget, with a warning if not."""
        width = (self.n + 1) * tokens_of_first_image(self.feature_model, dataset)[-1][1].shape[1]
        size_mb = 4 * len(dataset) * width / 2**20
        if size_mb > memory_budget_mb:
            logger.warning(
                f"features of {len(dataset)} images take {size_mb:.0f} MB, more than train.memory_budget_mb="
                f"{memory_budget_mb:.0f}: they are not kept, and the images go through the model in every pass"
            )
        return size_mb <= memory_budget_mb


class LinearClassifier(nn.Module):
    """A linear layer on tokens.

    Args:
        out_dim: width of its input.
        use_n_blocks: see `create_linear_input`.
        use_avgpool: see `create_linear_input`.
        num_classes: number of logits.
        generator: of the initial weights, N(0, 0.01^2); biases are 0.
    """

    def __init__(
        self,
        out_dim: int,
        use_n_blocks: int,
        use_avgpool: bool,
        num_classes: int = 1000,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.use_n_blocks = use_n_blocks
        self.use_avgpool = use_avgpool
        self.linear = nn.Linear(out_dim, num_classes)
        nn.init.normal_(self.linear.weight, std=INIT_STD, generator=generator)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x_tokens_list: Tokens) -> Tensor:
        """Return logits [B, C] for the tokens of at least `use_n_blocks` blocks."""
        return self.linear(create_linear_input(x_tokens_list, self.use_n_blocks, self.use_avgpool))


class AllClassifiers(nn.Module):
    """Classifiers by name."""

    classifiers_dict: Any

    def __init__(self, classifiers_dict: Mapping[str, LinearClassifier]) -> None:
        super().__init__()
        self.classifiers_dict = nn.ModuleDict(dict(classifiers_dict))
        self._fused: FusedHeads | None = None

    @property
    def names(self) -> list[str]:
        """The names of the classifiers, in order."""
        return list(self.classifiers_dict)

    @property
    def fused(self) -> FusedHeads:
        """The same classifiers as one; made again after they were moved."""
        if self._fused is None or not self._fused.shares_memory():
            self._fused = FusedHeads(self)
        return self._fused

    def forward(self, inputs: Tokens) -> dict[str, Tensor]:
        """Return logits [B, C] by name."""
        return {name: classifier(inputs) for name, classifier in self.classifiers_dict.items()}

    def __len__(self) -> int:
        return len(self.classifiers_dict)


class LinearPostprocessor(nn.Module):
    """A classifier's logits, of some of its classes, as predictions.

    Args:
        linear_classifier: gives logits [B, C].
        class_mapping: the classes to keep, in their new order. Default: all.
    """

    def __init__(self, linear_classifier: nn.Module, class_mapping: Sequence[int] | Tensor | None = None) -> None:
        super().__init__()
        self.linear_classifier = linear_classifier
        self.class_mapping = None if class_mapping is None else torch.as_tensor(class_mapping, dtype=torch.int64)

    def forward(self, samples: Any, targets: Tensor) -> dict[str, Tensor]:
        """Return `{"preds": logits, "target": targets}`."""
        logits = self.linear_classifier(samples)
        if self.class_mapping is not None:
            logits = logits[:, self.class_mapping.to(logits.device)]
        return {"preds": logits, "target": targets}


class FusedHeads:
    """All classifiers of a grid as one matrix product and one loss for each input width.

    The parameters of the classifiers become views of these matrices, and stay what the state dict and optimizers see.

    Args:
        classifiers: with average pooling, all of the same number of classes.

    Attributes:
        names: of the classifiers, in the order of the results.
    """

    def __init__(self, classifiers: AllClassifiers) -> None:
        self.names = classifiers.names
        layers = [classifier.linear for classifier in classifiers.classifiers_dict.values()]
        self._groups = [_FusedGroup(list(group)) for _, group in groupby(layers, key=lambda layer: layer.in_features)]

    def shares_memory(self) -> bool:
        """Return whether the classifiers' parameters are still views of the matrices here."""
        return all(group.shares_memory() for group in self._groups)

    @torch.no_grad()
    def logits(self, inputs: Tensor) -> Tensor:
        """Return float32 [B, H, C] of the H classifiers for inputs [B, W], W at least the largest width."""
        return torch.cat([group.logits(inputs) for group in self._groups], dim=1)

    def backward(self, inputs: Tensor, labels: Tensor, criterion: nn.Module) -> Tensor:
        """Set the gradients of the sum of all classifiers' losses, averaged over processes.

        Args:
            inputs: float32 [B, W].
            labels: int64 [B], or floating point [B, C].
            criterion: a loss without reduction of (logits [N, C], labels).

        Returns:
            The losses [H] of this process, detached.
        """
        return torch.cat([group.backward(inputs, labels, criterion) for group in self._groups])


class _FusedGroup:
    # Heads of one input width: a weight [H C, W] and a bias [H C], of which each head has its rows.

    def __init__(self, heads: Sequence[nn.Linear]) -> None:
        self._heads = heads
        self.n_heads, self.n_classes, self.width = len(heads), heads[0].out_features, heads[0].in_features
        self.weight = torch.cat([head.weight.detach() for head in heads]).requires_grad_()
        self.bias = torch.cat([head.bias.detach() for head in heads]).requires_grad_()
        for head, weight, bias in self._rows(self.weight.detach(), self.bias.detach()):
            # `data`, because optimizers hold the parameters themselves.
            head.weight.data, head.bias.data = weight, bias

    def shares_memory(self) -> bool:
        views = self._rows(self.weight, self.bias)
        return all(h.weight.data_ptr() == w.data_ptr() and h.bias.data_ptr() == b.data_ptr() for h, w, b in views)

    def logits(self, inputs: Tensor) -> Tensor:
        logits = F.linear(inputs[:, -self.width :], self.weight, self.bias)
        return logits.view(len(inputs), self.n_heads, self.n_classes)

    def backward(self, inputs: Tensor, labels: Tensor, criterion: nn.Module) -> Tensor:
        logits = self.logits(inputs)
        losses = criterion(logits.flatten(0, 1), labels.repeat_interleave(self.n_heads, dim=0))
        losses = losses.view(len(inputs), self.n_heads, -1).mean(dim=(0, 2))
        # The sum, so that each classifier is trained as if it were the only one.
        gradients = torch.autograd.grad(losses.sum(), [self.weight, self.bias])
        world_size = distributed.get_world_size()
        if world_size > 1:
            gradients = tuple(distributed.all_reduce(gradient).div_(world_size) for gradient in gradients)
        for head, weight, bias in self._rows(*gradients):
            head.weight.grad, head.bias.grad = weight, bias
        return losses.detach()

    def _rows(self, weight: Tensor, bias: Tensor) -> zip[tuple[nn.Linear, Tensor, Tensor]]:
        return zip(self._heads, weight.split(self.n_classes), bias.split(self.n_classes), strict=True)


def setup_linear_classifiers(
    sample_output: Tokens,
    n_last_blocks_list: Sequence[int],
    learning_rates: Sequence[float],
    batch_size: int,
    num_classes: int = 1000,
) -> tuple[AllClassifiers, list[dict[str, Any]]]:
    """Make the grid of classifiers; the same initial weights in every process, whatever was drawn before.

    Args:
        sample_output: tokens of some image, for their width and device.
        n_last_blocks_list: numbers of blocks.
        learning_rates: for a global batch of 256.
        batch_size: images per step and process.
        num_classes: C.

    Returns:
        The classifiers, and one parameter group with `params` and `lr` for each.
    """
    generator = torch.Generator().manual_seed(INIT_SEED)
    grid = [(n, scale_lr(rate, batch_size)) for n in n_last_blocks_list for rate in learning_rates]
    classifiers: dict[str, LinearClassifier] = {}
    groups = []
    for name, (n, lr) in zip(classifier_names(grid), grid, strict=True):
        width = create_linear_input(sample_output, n, use_avgpool=True).shape[1]
        classifier = LinearClassifier(width, n, True, num_classes, generator).to(sample_output[-1][1].device)
        classifiers[name] = classifier
        groups.append({"params": list(classifier.parameters()), "lr": lr})
    return AllClassifiers(classifiers), groups


def classifier_names(grid: Sequence[tuple[int, float]]) -> list[str]:
    """Name classifiers of (number of blocks, learning rate).

    The name contains the learning rate with five decimals. Of several that round alike the last has the name, and the
    others also their position in the grid.
    """
    names = [f"classifier_{n}_blocks_avgpool_True_lr_{lr:.5f}".replace(".", "_") for n, lr in grid]
    left = Counter(names)
    for place, name in enumerate(list(names)):
        left[name] -= 1
        if left[name]:
            names[place] = f"{name}_{place}"
    return names


def names_in_state(state: Mapping[str, Tensor]) -> list[str]:
    """Return the classifiers of a state dict of `AllClassifiers`, in order."""
    return list(dict.fromkeys(name.split(".")[1] for name in state if name.startswith("classifiers_dict.")))
