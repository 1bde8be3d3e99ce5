"""Classes as vectors: the mean of many sentences about each (CLIP, arXiv 2103.00020, section 3.1.4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3.eval.command.progress import Progress
from dinov3.heads.dinotxt.model import DINOTxt
from dinov3.heads.dinotxt.tokenizer import Tokenizer


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
    context_length = model.text_model.backbone.context_length
    tokens = tokenizer.tokenize(prompts, context_length)  # [C * templates, N]
    # Sentences of equal length share a batch, so that the model can leave out what comes after their ends.
    order = tokens.argmax(dim=1).argsort(stable=True)
    features: Tensor | None = None
    with Progress("class names", len(prompts), unit="sentence") as progress:
        for rows in order.split(batch_size):
            encoded = model.encode_text(tokens[rows].to(model.logit_scale.device))[:, channels]
            if features is None:
                features = encoded.new_empty(len(prompts), encoded.shape[1])
            features[rows.to(encoded.device)] = F.normalize(encoded, dim=-1)
            progress.advance(len(rows))
    assert features is not None
    return F.normalize(features.unflatten(0, (len(class_names), len(templates))).mean(dim=1), dim=-1)
