"""Classes as vectors: the mean of many sentences about each (CLIP, arXiv 2103.00020, section 3.1.4)."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3.eval.command.progress import Progress
from dinov3.eval.text.config import FROM_DATASET, IMAGENET
from dinov3.heads.dinotxt.model import DINOTxt
from dinov3.heads.dinotxt.tokenizer import Tokenizer
from dinov3.utils.messages import list_names
from dinov3.utils.text import read_lines

logger = logging.getLogger("dinov3")

_WORDNET_ID = re.compile("n[0-9]{8}")


def imagenet_templates() -> list[str]:
    """Return the 80 sentences that CLIP's authors published, with `{}` for the class."""
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

    return [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]


def imagenet_class_names() -> list[str]:
    """Return the names of ImageNet's 1000 classes as CLIP's authors published them, in the order of WordNet ids."""
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    return list(IMAGENET_CLASSNAMES)


@torch.no_grad()
def encode_classes(
    model: DINOTxt,
    tokenizer: Tokenizer,
    class_names: Sequence[str],
    templates: Sequence[str],
    *,
    channels: slice = slice(None),
    batch_size: int = 256,
) -> Tensor:
    """Encode classes as the mean of their sentences, each of length 1, as is the mean.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        class_names: of C classes.
        templates: sentences with `{}` or `{0}` for the class.
        channels: of the vectors, those that count, e.g. the half that is aligned with patch tokens.
        batch_size: sentences that are encoded at once.

    Returns:
        [C, channels], on the model's device.

    Raises:
        ValueError: there are no classes or templates, or a template has no place for the class.
    """
    if not class_names or not templates:
        raise ValueError(f"{len(class_names)} classes and {len(templates)} templates: at least one of each is needed")
    for template in templates:
        if template.format("x") == template.format("y"):
            raise ValueError(f"template {template!r} has no place for the class: write {{}} where its name goes")
    prompts = [template.format(name) for name in class_names for template in templates]
    features = encode_texts(model, tokenizer, prompts, channels=channels, batch_size=batch_size)
    return F.normalize(features.unflatten(0, (len(class_names), len(templates))).mean(dim=1), dim=-1)


@torch.no_grad()
def encode_texts(
    model: DINOTxt,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    channels: slice = slice(None),
    batch_size: int = 256,
) -> Tensor:
    """Encode texts; those that are too long are cut, and a warning says how many.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        texts: T of them, at least one.
        channels: of the vectors, those that count.
        batch_size: texts that are encoded at once.

    Returns:
        [T, channels], of length 1, on the model's device.

    Raises:
        ValueError: there are no texts.
    """
    if not texts:
        raise ValueError("there are no texts to encode: give at least one")
    context_length = model.text_model.backbone.context_length
    tokens = tokenizer.tokenize(texts, context_length)  # [T, N]
    _warn_of_cut_texts(tokens, tokenizer, texts)
    # Texts of equal length share a batch, so that the model can leave out what comes after their ends.
    order = tokens.argmax(dim=1).argsort(stable=True)
    features: Tensor | None = None
    with Progress("texts", len(texts), unit="text") as progress:
        for rows in order.split(batch_size):
            encoded = model.encode_text(tokens[rows].to(model.logit_scale.device))[:, channels]
            if features is None:
                features = encoded.new_empty(len(texts), encoded.shape[1])
            features[rows.to(encoded.device)] = F.normalize(encoded, dim=-1)
            progress.advance(len(rows))
    assert features is not None
    return features


def read_class_names(source: str, dataset: Any, n_classes: int | None) -> list[str]:
    """Return the names of a data set's classes, in the order of its labels.

    Args:
        source: as in `PromptsConfig.classes`.
        dataset: has its names as `class_names`, `find_class_name(index)` or `classes`, or does not know them. An
            underscore in them is a space.
        n_classes: of the data set. Default: unknown, any number of names will do.

    Raises:
        ValueError: the data set does not know its names, or there are more or fewer than classes.
    """
    if source == IMAGENET:
        names = imagenet_class_names()
    elif source == FROM_DATASET:
        names = [name.replace("_", " ") for name in _names_of(dataset)]
    else:
        names = _read_entries(source, "prompts.classes")
    if n_classes is not None and len(names) != n_classes:
        raise ValueError(
            f"prompts.classes={source} has {len(names)} names ({list_names(names)}), but the data set has {n_classes} "
            "classes: give a file with one name per line, in the order of the labels"
        )
    return names


def read_templates(source: str) -> list[str]:
    """Return the templates that `PromptsConfig.templates` names; raises a ValueError if one has no place for a class.

    Args:
        source: as in `PromptsConfig.templates`.
    """
    return imagenet_templates() if source == IMAGENET else _read_entries(source, "prompts.templates")


def _names_of(dataset: Any) -> list[str]:
    names = getattr(dataset, "class_names", None)
    if names is None and getattr(dataset, "classes", None) is not None:
        names = list(dataset.classes)
        if hasattr(dataset, "find_class_name"):  # of ImageNet, `classes` are ids
            names = [dataset.find_class_name(index) for index in range(len(names))]
    if names is None:
        raise ValueError(
            f"{type(dataset).__name__} does not know the names of its classes: give prompts.classes=FILE, with one "
            "name per line, in the order of the labels"
        )
    if all(_WORDNET_ID.fullmatch(name) for name in names):
        raise ValueError(
            f"the classes of the data set are WordNet ids ({list_names(names)}), not words: give "
            f"prompts.classes={IMAGENET} for all of ImageNet's, or a file with one name per line"
        )
    return list(names)


def _read_entries(path: str, name: str) -> list[str]:
    entries = [line.strip() for line in read_lines(Path(path).expanduser())]
    if not entries:
        raise ValueError(f"{name}={path}: the file is empty, expected one per line")
    if "" in entries:
        raise ValueError(f"{name}={path}: line {entries.index('') + 1} is empty, expected one per line")
    return entries


def _warn_of_cut_texts(tokens: Tensor, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    # A text that was cut fills its row; one that fits exactly does too.
    context_length = tokens.shape[1]
    full = (tokens[:, -1] != 0).nonzero()[:, 0].tolist()
    cut = [index for index in full if len(tokenizer.encode(texts[index])) + 2 > context_length]
    if cut:
        logger.warning(
            "%d of %d texts are longer than the model's %d tokens and are cut, the first is %r",
            len(cut),
            len(texts),
            context_length,
            texts[cut[0]],
        )
