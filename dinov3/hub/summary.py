"""What a backbone costs before it is run: parameters, tokens, arithmetic, memory, and a table of its modules.

    python -m dinov3.hub.summary dinov3_vitb16 --size 224

Notable: nothing is downloaded and nothing is computed; the 7B model takes as long as the smallest.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch

from dinov3.hub.command_line import (
    MODEL_HELP,
    ModelChoice,
    check_image_size,
    describe_bytes,
    describe_tokens,
    make_parser,
    parse_dtype,
    parse_size,
    positive,
)
from dinov3.models.summary import count_flops, estimate_memory, module_table
from dinov3.utils import count_parameters
from dinov3.utils.command_line import run_command_line

EPILOG = """\
arithmetic   of one forward pass of one image; a multiply-add counts as two operations. Matrix products, convolutions
             and attention are counted, the small rest is not.
weights      parameters in the dtype, and buffers.
activations  an estimate: the most bytes of tensors alive at once in a forward pass without gradients, and the bytes
             that a forward pass with gradients keeps for the backward pass, both in eager mode. What kernels and the
             allocator take besides, gradients, and the state of an optimizer are not in it.

examples:
  python -m dinov3.hub.summary dinov3_vitb16 --size 224
  python -m dinov3.hub.summary dinov3_vit7b16 --size 768x1024 --dtype bfloat16 --depth 3
  python -m dinov3.hub.summary dinov3_convnext_tiny --size 512 --batch-size 8
"""


def describe(
    choice: ModelChoice,
    size: tuple[int, int] = (224, 224),
    *,
    batch_size: int = 1,
    dtype: torch.dtype = torch.float32,
    depth: int = 2,
) -> Iterator[str]:
    """Lines about a backbone.

    Args:
        choice: which one; of the weights only the kind counts, e.g. `SAT493M`.
        size: (height, width) of the images in pixels.
        batch_size: images at once, for the memory.
        dtype: of parameters and images, for the memory.
        depth: levels of modules in the table.

    Raises:
        ValueError: there is no such model, or the images are smaller than a patch.
        FileNotFoundError: there is no such training run.
    """
    model = choice.build()
    tokens = check_image_size(model, size)
    memory = estimate_memory(model, size, batch_size=batch_size, dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    batch = "a batch of 1 image" if batch_size == 1 else f"a batch of {batch_size} images"
    yield f"{choice}: {type(model).__name__}, {count_parameters(model):,} parameters"
    yield f"image        {size[0]} x {size[1]} pixels"
    yield f"tokens       {describe_tokens(tokens)}"
    yield f"arithmetic   {count_flops(model, size) / 1e9:.2f} GFLOP per image"
    yield f"weights      {describe_bytes(memory.weights)} in {name}"
    inference, backward = (describe_bytes(n_bytes) for n_bytes in (memory.forward, memory.backward))
    yield (
        f"activations  about {inference} for inference, {backward} kept for a backward pass "
        f"(estimates, {name}, {batch})"
    )
    yield ""
    yield module_table(model, size, max_depth=depth)


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of `python -m dinov3.hub.summary`."""
    parser = make_parser(
        "summary", "Parameters, tokens, arithmetic and memory of a backbone, module by module.", EPILOG
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--weights",
        choices=("LVD1689M", "SAT493M"),
        help="which published weights the structure is for; nothing is downloaded (default: LVD1689M)",
    )
    parser.add_argument(
        "--size", type=parse_size, default=(224, 224), metavar="S | HxW", help="of the image, in pixels (default: 224)"
    )
    parser.add_argument("--batch-size", type=positive, default=1, metavar="N", help="for the memory (default: 1)")
    parser.add_argument(
        "--dtype",
        type=parse_dtype,
        default=torch.float32,
        metavar="DTYPE",
        help="float32, bfloat16 or float16, for the memory (default: float32)",
    )
    parser.add_argument(
        "--depth", type=positive, default=2, metavar="N", help="levels of modules in the table (default: 2)"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command line; `argv` is what follows the program's name."""
    args = get_args_parser().parse_args(argv)
    choice = ModelChoice(args.model, args.weights)
    for line in describe(choice, args.size, batch_size=args.batch_size, dtype=args.dtype, depth=args.depth):
        print(line)


if __name__ == "__main__":
    run_command_line(main)
