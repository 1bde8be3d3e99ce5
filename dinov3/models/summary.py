"""What a model costs: a table of its parameters, and its arithmetic for one image.

Notable: nothing is computed and no memory is needed, whatever the size of the model. fvcore makes the table; the
operations are counted by PyTorch's own counter on the meta device, where fvcore cannot trace, and which knows fused
attention, which fvcore does not.
"""

from __future__ import annotations

import copy
import warnings
from itertools import chain

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dinov3.utils import count_parameters


def count_flops(model: nn.Module, image_size: int | tuple[int, int] = 224, in_chans: int = 3) -> int:
    """Floating-point operations of one forward pass of one image; a multiply-add counts as two.

    Args:
        model: takes images [1, in_chans, H, W]; may be on the meta device.
        image_size: side, or (H, W), in pixels.
        in_chans: channels of the image.

    Returns:
        Operations of matrix products, convolutions and attention; the small rest is not counted.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    # The copy shares the structure; its tensors are there already, without memory.
    memo = {id(tensor): tensor.detach().to("meta") for tensor in chain(model.parameters(), model.buffers())}
    on_meta = copy.deepcopy(model, memo).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        on_meta(torch.empty(1, in_chans, height, width, device="meta"))
    return counter.get_total_flops()


def summarize(model: nn.Module, image_size: int | tuple[int, int] = 224, in_chans: int = 3, max_depth: int = 1) -> str:
    """A table of parameters by sub-module, and a line with the totals.

    Args:
        model: takes images [1, in_chans, H, W]; may be on the meta device.
        image_size: side, or (H, W), in pixels, of the image that operations are counted for.
        in_chans: channels of the image.
        max_depth: levels of sub-modules in the table.

    Returns:
        Text of several lines.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of PyTorch, about how fvcore uses it
        from fvcore.nn import parameter_count_table

    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    flops = count_flops(model, image_size, in_chans)
    return (
        f"{type(model).__name__}: {count_parameters(model) / 1e6:.1f} M parameters, "
        f"{flops / 1e9:.2f} GFLOP for one image of {height} x {width} pixels\n"
        f"{parameter_count_table(model, max_depth=max_depth)}"
    )
