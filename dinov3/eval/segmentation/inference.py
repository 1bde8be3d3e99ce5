"""Segmenting an image of any size with a model of a fixed one: the whole image resized, or windows that slide over it.

    logits = make_inference(
        images, model, inference_mode="slide", rescale_to=(height, width), n_output_channels=150,
        crop_size=(896, 896), stride=(596, 596), output_activation=functools.partial(torch.softmax, dim=1),
    )  # [B, 150, height, width]

A model is anything with `predict(images, rescale_to=(height, width))`. That of a linear head returns logits
[N, K, h, w]; that of a Mask2Former head (`"m2f"`) a dictionary with `pred_masks` [N, Q, h, w] and `pred_logits`
[N, Q, K + 1]. Only torch is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dinov3.heads.mask2former.semantic import semantic_scores
from dinov3.layers.resizing import resize_bilinear

INFERENCE_MODES = ("whole", "slide")
DECODER_HEAD_TYPES = ("linear", "m2f")
WHOLE_SIZE = (512, 512)

MAX_WINDOWS = 8
MAX_PREDICTION_BYTES = 2**30

Size = tuple[int, int]
#: Image of the batch, and the first row and column of a window in it.
Place = tuple[int, int, int]


@torch.no_grad()
def make_inference(
    x: Tensor,
    segmentation_model: Any,
    inference_mode: str = "whole",
    decoder_head_type: str = "linear",
    rescale_to: Sequence[int] = (512, 512),
    n_output_channels: int = 256,
    crop_size: Sequence[int] | None = None,
    stride: Sequence[int] | None = None,
    apply_horizontal_flip: bool = False,
    num_max_forward: int = 1,
    output_activation: Callable[[Tensor], Tensor] | None = None,
    *,
    whole_size: Sequence[int] | None = WHOLE_SIZE,
    max_windows_per_batch: int | None = None,
) -> Tensor:
    """Predict class maps of images.

    Args:
        x: images [B, C, H, W] as the model takes them.
        segmentation_model: has `predict(images, rescale_to=(height, width))`; see the module.
        inference_mode: `"whole"`: one prediction for the image at `whole_size`; `"slide"`: the mean over windows.
        decoder_head_type: what `predict` returns: `"linear"` or `"m2f"`, whose queries become class maps, see
            `semantic_scores`.
        rescale_to: (height, width) of the result, in pixels.
        n_output_channels: K, the number of classes; used for windows only.
        crop_size: (height, width) of windows, required for them. If both are larger than the sides of the image, both
            become its shorter side, and the stride at most that; if one is, the window is as high or as wide as the
            image.
        stride: (rows, columns) from window to window, required for them.
        apply_horizontal_flip: mirror the result, where `x` was mirrored.
        num_max_forward: see `slide_inference`.
        output_activation: applied last, e.g. a softmax over dimension 1; windows are averaged as predicted.
        whole_size: (height, width) that the whole image is resized to, bilinearly without antialiasing, whatever its
            aspect ratio; None keeps the size of the image.
        max_windows_per_batch: see `slide_inference`.

    Returns:
        float32 [B, K, *rescale_to] on the device of the predictions, without gradients, or what `output_activation`
        returns for that.

    Raises:
        ValueError: an argument is out of range, windows leave pixels out, or predictions are not as described.
    """
    _check_images(x)
    _check_choice("inference_mode", inference_mode, INFERENCE_MODES)
    _check_choice("decoder_head_type", decoder_head_type, DECODER_HEAD_TYPES)
    size = _pair("rescale_to", rescale_to)
    if inference_mode == "whole":
        images = x if whole_size is None else resize_bilinear(x, _pair("whole_size", whole_size))
        maps = _predict(segmentation_model, images, size, decoder_head_type).float()
    else:
        if crop_size is None or stride is None:
            missing = "crop_size" if crop_size is None else "stride"
            raise ValueError(
                f"{missing}=None: inference_mode='slide' needs (height, width) of windows and their stride"
            )
        sums = slide_inference(
            x,
            segmentation_model,
            decoder_head_type,
            n_output_channels,
            crop_size,
            stride,
            num_max_forward,
            max_windows_per_batch=max_windows_per_batch,
        )
        maps = resize_bilinear(sums, size)
    if apply_horizontal_flip:
        maps = maps.flip(-1)
    return maps if output_activation is None else output_activation(maps)


@torch.no_grad()
def slide_inference(
    inputs: Tensor,
    segmentation_model: Any,
    decoder_head_type: str = "linear",
    n_output_channels: int = 256,
    crop_size: Sequence[int] = (512, 512),
    stride: Sequence[int] = (341, 341),
    num_max_forward: int = 1,
    *,
    max_windows_per_batch: int | None = None,
) -> Tensor:
    """Predict class maps of images, averaged over windows that slide over them.

    Args:
        inputs: images [B, C, H, W] as the model takes them.
        segmentation_model: has `predict(images, rescale_to=(height, width))`; see the module.
        decoder_head_type: `"linear"` or `"m2f"`.
        n_output_channels: K, the number of classes.
        crop_size: (height, width) of windows.
        stride: (rows, columns) from window to window.
        num_max_forward: the smallest number of calls of `predict`. Processes that share a sharded model must call it
            equally often, so each is given the largest number of windows that one of them has: windows are spread over
            that many calls, and the missing calls are made with zeros.
        max_windows_per_batch: the most windows in one call, which bounds the memory of its activations and predictions.
            Default: one on the CPU, where more gain nothing; otherwise up to 8, with predictions [., K, h, w] of 1 GiB
            at most. Several windows in one call may change the result by what the model rounds.

    Returns:
        float32 [B, K, H, W] on the device of the images, without gradients.

    Raises:
        ValueError: an argument is out of range, windows leave pixels out, or predictions are not as described.
    """
    _check_images(inputs)
    _check_choice("decoder_head_type", decoder_head_type, DECODER_HEAD_TYPES)
    if max_windows_per_batch is not None and max_windows_per_batch < 1:
        raise ValueError(f"max_windows_per_batch={max_windows_per_batch}: expected at least one window")
    image_size = (inputs.shape[-2], inputs.shape[-1])
    crop, step = _pair("crop_size", crop_size), _pair("stride", stride)
    if crop[0] > image_size[0] and crop[1] > image_size[1]:
        crop = min(image_size), min(image_size)
        # A stride for the larger windows would leave pixels of a panorama between these.
        step = min(step[0], crop[0]), min(step[1], crop[1])
    size = (min(crop[0], image_size[0]), min(crop[1], image_size[1]))
    tops, lefts = (_window_starts(*lengths) for lengths in zip(image_size, crop, step, strict=True))
    counts = _count_windows(image_size[0], size[0], tops)[:, None] * _count_windows(image_size[1], size[1], lefts)
    if int(counts.min()) == 0:
        raise ValueError(
            f"stride={step} leaves pixels of an image of {image_size} without a window of crop_size={size}: "
            "give a stride of at most the crop size"
        )

    limit = max_windows_per_batch or _default_limit(4 * n_output_channels * size[0] * size[1], inputs.device)
    places = [(image, top, left) for image in range(len(inputs)) for top in tops for left in lefts]
    per_call = max(1, min(limit, math.ceil(len(places) / max(num_max_forward, 1))))
    # Float32 sums, also of images in half precision; a single window per call is added in the published order, so the
    # result is the same to the bit.
    sums = inputs.new_zeros(len(inputs), n_output_channels, *image_size, dtype=torch.float32)
    for first in range(0, len(places), per_call):
        _add_windows_(sums, inputs, places[first : first + per_call], size, segmentation_model, decoder_head_type)
    for _ in range(num_max_forward - math.ceil(len(places) / per_call)):
        segmentation_model.predict(inputs.new_zeros(1, inputs.shape[1], *crop), rescale_to=crop)
    return sums.div_(counts.to(inputs.device))


def _window_starts(image_length: int, crop_length: int, step: int) -> list[int]:
    n_windows = max(image_length - crop_length + step - 1, 0) // step + 1
    # The last window is moved back into the image, so all have one size and fit into one call.
    return [max(min(index * step + crop_length, image_length) - crop_length, 0) for index in range(n_windows)]


def _count_windows(image_length: int, window_length: int, starts: list[int]) -> Tensor:
    # Of each pixel in one direction; windows are a product of both. Whole numbers, of which bytes could hold too few.
    count = torch.zeros(image_length, dtype=torch.int64)
    for start in starts:
        count[start : start + window_length] += 1
    return count


def _default_limit(bytes_per_prediction: int, device: torch.device) -> int:
    return 1 if device.type == "cpu" else max(1, min(MAX_WINDOWS, MAX_PREDICTION_BYTES // bytes_per_prediction))


def _add_windows_(
    sums: Tensor, inputs: Tensor, places: list[Place], size: Size, model: Any, decoder_head_type: str
) -> None:
    windows = [
        (image, slice(None), slice(top, top + size[0]), slice(left, left + size[1])) for image, top, left in places
    ]
    maps = _predict(model, torch.stack([inputs[window] for window in windows]), size, decoder_head_type)
    if maps.shape[1] != sums.shape[1]:
        raise ValueError(
            f"n_output_channels={sums.shape[1]}, but the model predicts {maps.shape[1]} classes: "
            f"give n_output_channels={maps.shape[1]}"
        )
    for window, window_map in zip(windows, maps.to(sums.device), strict=True):
        sums[window] += window_map


def _predict(model: Any, images: Tensor, size: Size, decoder_head_type: str) -> Tensor:
    # [N, K, *size]
    prediction = model.predict(images, rescale_to=size)
    if isinstance(prediction, Mapping) != (decoder_head_type == "m2f"):
        expected = "a dictionary with pred_masks and pred_logits" if decoder_head_type == "m2f" else "a tensor"
        got = type(prediction).__name__
        raise ValueError(f"decoder_head_type={decoder_head_type!r}: expected {expected} from predict, got {got}")
    if decoder_head_type == "m2f":
        prediction = semantic_scores(prediction["pred_logits"], prediction["pred_masks"])
    maps = prediction
    if maps.ndim != 4 or len(maps) != len(images) or maps.shape[-2:] != size:
        raise ValueError(
            f"predict(images, rescale_to={size}) of {len(images)} images returned maps of shape {list(maps.shape)}, "
            f"expected [{len(images)}, classes, {size[0]}, {size[1]}]"
        )
    return maps


def _check_images(images: Tensor) -> None:
    if images.ndim != 4:
        raise ValueError(f"expected images [batch, channels, height, width], got shape {list(images.shape)}")


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r}: expected {' or '.join(map(repr, choices))}")


def _pair(name: str, value: Sequence[int]) -> Size:
    numbers = list(value) if isinstance(value, Sequence) else []
    if len(numbers) != 2 or min(numbers) < 1:
        raise ValueError(f"{name}={value!r}: expected (height, width) in pixels, both at least 1")
    return int(numbers[0]), int(numbers[1])
