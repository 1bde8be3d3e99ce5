"""The classifiers of linear probing: a grid of linear layers that see the same tokens, trained as one.

Notable:
- The input is the class tokens of the last n blocks, shallow to deep, and the mean of the last block's patch tokens.
  Inputs of fewer blocks are the last columns of those of more, so one matrix serves the whole grid.
- Parameters are stored per classifier, under the published names, but lie side by side in memory (`FusedHeads`): all
  classifiers of one input are one matrix product and one loss.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dinov3 import distributed
from dinov3.eval.features.extraction import model_device
from dinov3.models.intermediate_layers import ModelWithIntermediateLayers

Tokens = Sequence[tuple[Tensor, Tensor]]

INIT_STD = 0.01
INIT_SEED = 0
DDP_PREFIX = "module."


def has_ddp_wrapper(module: nn.Module) -> bool:
    """Whether a module is wrapped for data-parallel training."""
    return isinstance(module, DistributedDataParallel)


def remove_ddp_wrapper(module: nn.Module) -> nn.Module:
    """The module without that wrapper."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def scale_lr(learning_rate: float, batch_size: int) -> float:
    """A learning rate for a global batch of 256, for one of `batch_size` images in each process."""
    return learning_rate * (batch_size * distributed.get_world_size()) / 256.0


def create_linear_input(x_tokens_list: Tokens, use_n_blocks: int, use_avgpool: bool) -> Tensor:
    """What a classifier sees of an image.

    Args:
        x_tokens_list: (patch tokens [B, P, D], class token [B, D]) of the last blocks, shallow to deep.
        use_n_blocks: n, of how many blocks the class token is taken.
        use_avgpool: append the mean of the last block's patch tokens.

    Returns:
        float32 [B, n D], or [B, (n + 1) D] with `use_avgpool`; computed in the dtype of the tokens.
    """
    parts = [class_token for _, class_token in x_tokens_list[-use_n_blocks:]]
    if use_avgpool:
        parts.append(x_tokens_list[-1][0].mean(dim=1))
    return torch.cat(parts, dim=-1).float()


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
        """What the backbone runs in."""
        device = model_device(self.feature_model).type
        with self.feature_model.autocast_ctx():
            return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32

    def extra_repr(self) -> str:
        """The settings."""
        return f"n={self.n}"

    def forward(self, images: Tensor) -> Tensor:
        """float32 [B, (n + 1) D]."""
        return create_linear_input(self.feature_model(images), self.n, use_avgpool=True)


class LinearClassifier(nn.Module):
    """A linear layer on tokens.

    Args:
        out_dim: width of its input.
        use_n_blocks: see `create_linear_input`.
        use_avgpool: likewise.
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
        """Logits [B, C] of the tokens of at least `use_n_blocks` blocks."""
        return self.linear(create_linear_input(x_tokens_list, self.use_n_blocks, self.use_avgpool))


class AllClassifiers(nn.Module):
    """Classifiers by name."""

    classifiers_dict: Any

    def __init__(self, classifiers_dict: Mapping[str, LinearClassifier]) -> None:
        super().__init__()
        self.classifiers_dict = nn.ModuleDict(dict(classifiers_dict))
        self._fused: FusedHeads | None = None

    @property
    def fused(self) -> FusedHeads:
        """The same classifiers as one; made anew when they were moved."""
        if self._fused is None or not self._fused.shares_memory():
            self._fused = FusedHeads(self)
        return self._fused

    def forward(self, inputs: Tokens) -> dict[str, Tensor]:
        """Logits [B, C] by name."""
        return {name: classifier(inputs) for name, classifier in self.classifiers_dict.items()}

    def __len__(self) -> int:
        return len(self.classifiers_dict)


class LinearPostprocessor(nn.Module):
    """A classifier's logits, of some of its classes, as predictions.

    Args:
        linear_classifier: gives logits [B, C].
        class_mapping: the classes to keep, in their new order; None: all.
    """

    def __init__(self, linear_classifier: nn.Module, class_mapping: Sequence[int] | Tensor | None = None) -> None:
        super().__init__()
        self.linear_classifier = linear_classifier
        self.class_mapping = None if class_mapping is None else torch.as_tensor(class_mapping, dtype=torch.int64)

    def forward(self, samples: Any, targets: Tensor) -> dict[str, Tensor]:
        """`{"preds": logits, "target": targets}`."""
        logits = self.linear_classifier(samples)
        if self.class_mapping is not None:
            logits = logits[:, self.class_mapping.to(logits.device)]
        return {"preds": logits, "target": targets}


class FusedHeads:
    """All classifiers of a grid at once.

    Their parameters become views of one matrix per input width, and stay what the state dict and optimizers see.

    Args:
        classifiers: with average pooling, all of the same number of classes.

    Attributes:
        names: of the classifiers, in the order of the results.
    """

    def __init__(self, classifiers: AllClassifiers) -> None:
        self.names = list(classifiers.classifiers_dict)
        by_width: dict[int, list[int]] = {}
        heads = [classifier.linear for classifier in classifiers.classifiers_dict.values()]
        for place, head in enumerate(heads):
            by_width.setdefault(head.in_features, []).append(place)
        self._groups = [_FusedGroup([heads[place] for place in places]) for places in by_width.values()]
        places = torch.tensor([place for places in by_width.values() for place in places])
        self._order = places.argsort()
        self._in_order = bool((self._order == torch.arange(len(places))).all())

    def shares_memory(self) -> bool:
        """Whether the classifiers' parameters still are views of the matrices here."""
        return all(group.shares_memory() for group in self._groups)

    @torch.no_grad()
    def logits(self, inputs: Tensor) -> Tensor:
        """float32 [B, H, C] of the H classifiers for inputs [B, W], W at least the largest width."""
        return self._arrange(torch.cat([group.logits(inputs) for group in self._groups], dim=1), dim=1)

    def backward(self, inputs: Tensor, labels: Tensor, criterion: nn.Module) -> Tensor:
        """Set the gradients of the sum of all classifiers' losses, averaged over processes.

        Args:
            inputs: float32 [B, W].
            labels: int64 [B], or floating point [B, C].
            criterion: a loss without reduction of (logits [N, C], labels).

        Returns:
            The losses [H] of this process, detached.
        """
        losses = torch.cat([group.backward(inputs, labels, criterion) for group in self._groups])
        return self._arrange(losses, dim=0)

    def _arrange(self, values: Tensor, dim: int) -> Tensor:
        return values if self._in_order else values.index_select(dim, self._order.to(values.device))


class _FusedGroup:
    # Heads of one input width: a weight [H C, W] and a bias [H C], of which each head has its rows.

    def __init__(self, heads: Sequence[nn.Linear]) -> None:
        self._heads = heads
        self.n_heads, self.n_classes, self.width = len(heads), heads[0].out_features, heads[0].in_features
        self.weight = torch.cat([head.weight.detach() for head in heads]).requires_grad_()
        self.bias = torch.cat([head.bias.detach() for head in heads]).requires_grad_()
        for head, weight, bias in zip(heads, *self._parts(self.weight.detach(), self.bias.detach()), strict=True):
            head.weight.data, head.bias.data = weight, bias

    def shares_memory(self) -> bool:
        views = zip(self._heads, *self._parts(self.weight, self.bias), strict=True)
        return all(h.weight.data_ptr() == w.data_ptr() and h.bias.data_ptr() == b.data_ptr() for h, w, b in views)

    def logits(self, inputs: Tensor) -> Tensor:
        logits = F.linear(inputs[:, -self.width :], self.weight, self.bias)
        return logits.view(len(inputs), self.n_heads, self.n_classes)

    def backward(self, inputs: Tensor, labels: Tensor, criterion: nn.Module) -> Tensor:
        logits = self.logits(inputs)
        losses = criterion(logits.flatten(0, 1), labels.repeat_interleave(self.n_heads, dim=0))
        losses = losses.view(len(inputs), self.n_heads, -1).mean(dim=(0, 2))
        gradients = torch.autograd.grad(losses.sum(), [self.weight, self.bias])
        world_size = distributed.get_world_size()
        if world_size > 1:
            gradients = tuple(distributed.all_reduce(gradient).div_(world_size) for gradient in gradients)
        for head, weight, bias in zip(self._heads, *self._parts(*gradients), strict=True):
            head.weight.grad, head.bias.grad = weight, bias
        return losses.detach()

    def _parts(self, weight: Tensor, bias: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        return weight.split(self.n_classes), bias.split(self.n_classes)


def setup_linear_classifiers(
    sample_output: Tokens,
    n_last_blocks_list: Sequence[int],
    learning_rates: Sequence[float],
    batch_size: int,
    num_classes: int = 1000,
) -> tuple[AllClassifiers, list[dict[str, Any]]]:
    """The grid of classifiers; the same initial weights in every process, whatever was drawn before.

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
    """Names of classifiers of (number of blocks, learning rate).

    The learning rate stands there with five decimals. Of several that round alike the last has the name, the others
    also their position in the grid.
    """
    names = [f"classifier_{n}_blocks_avgpool_True_lr_{lr:.5f}".replace(".", "_") for n, lr in grid]
    left = Counter(names)
    for place, name in enumerate(list(names)):
        left[name] -= 1
        if left[name]:
            names[place] = f"{name}_{place}"
    return names


def export_classifier(checkpoint: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """One classifier of a checkpoint as the state dict of a linear layer.

    With one block it fits a linear head of the hub, as `weights=` of `dinov3_vit7b16_lc`.

    Args:
        checkpoint: what a `checkpoint.pth` holds.
        name: of the classifier.

    Returns:
        `weight` [C, W] and `bias` [C].

    Raises:
        ValueError: it is not there; names those that are.
    """
    state = without_ddp_prefix(checkpoint["linear_classifiers"])
    prefix = f"classifiers_dict.{name}.linear."
    found = {entry.removeprefix(prefix): tensor for entry, tensor in state.items() if entry.startswith(prefix)}
    if not found:
        raise ValueError(f"no classifier {name!r} in the checkpoint; it has {', '.join(names_in_state(state))}")
    return found


def without_ddp_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict under the names without `module.`."""
    return {name.removeprefix(DDP_PREFIX): tensor for name, tensor in state.items()}


def names_in_state(state: Mapping[str, Tensor]) -> list[str]:
    """The classifiers of a state dict of `AllClassifiers`, in order."""
    return list(dict.fromkeys(name.split(".")[1] for name in state if name.startswith("classifiers_dict.")))
