"""What a backbone costs before it is run: parameters, tokens, arithmetic, memory, and a table of its modules.

    python -m dinov3.hub.summary dinov3_vitb16 --size 224

Notable: nothing is downloaded or computed; the 7B model takes as long as the smallest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dinov3.hub import command_line as cli
from dinov3.models.summary import estimate_memory, flops_by_module, module_table
from dinov3.utils import count_parameters
from dinov3.utils.command_line import run_command_line

EPILOG = """\
arithmetic   of one forward pass of one image; a multiply-add counts as two operations. Matrix products, convolutions
             and attention are counted, the small rest is not.
weights      parameters in the dtype, and buffers.
activations  an estimate: the most bytes of tensors alive at once in a forward pass without gradients, and the bytes
             that a forward pass with gradients keeps for the backward pass, both in eager mode. What kernels and the
             allocator take besides, gradients, and the state of an optimizer are not included.

examples:
  python -m dinov3.hub.summary dinov3_vitb16 --size 224
  python -m dinov3.hub.summary dinov3_vit7b16 --size 768x1024 --dtype bfloat16 --depth 3
  python -m dinov3.hub.summary dinov3_convnext_tiny --size 512 --batch-size 8
"""


@dataclass(frozen=True)
class SummaryOptions:
    """What to sum up; also the options of the command line.

    Attributes:
        model: which backbone; of its weights only the kind counts, e.g. `SAT493M`.
    """

    model: cli.ModelChoice
    size: tuple[int, int] = cli.option(
        "of the image, in pixels (default: 224)", default=(224, 224), type=cli.parse_size, metavar="S | HxW"
    )
    batch_size: int = cli.option(
        "images at once, for the memory (default: 1)", default=1, type=cli.positive, metavar="N"
    )
    dtype: torch.dtype = cli.option(
        "float32, bfloat16 or float16, of parameters and images, for the memory (default: float32)",
        default=torch.float32,
        type=cli.parse_dtype,
        metavar="DTYPE",
    )
    depth: int = cli.option("levels of modules in the table (default: 2)", default=2, type=cli.positive, metavar="N")


def describe(options: SummaryOptions) -> Iterator[str]:
    """Yield lines about a backbone.

    Raises:
        ValueError: there is no such model, or the images are smaller than a patch.
        FileNotFoundError: there is no such training run.
    """
    model, size = options.model.build(), options.size
    tokens = cli.check_image_size(model, size)
    memory = estimate_memory(model, size, batch_size=options.batch_size, dtype=options.dtype)
    flops = flops_by_module(model, size)
    dtype = str(options.dtype).removeprefix("torch.")
    batch = "a batch of 1 image" if options.batch_size == 1 else f"a batch of {options.batch_size} images"
    inference, backward = cli.describe_bytes(memory.forward), cli.describe_bytes(memory.backward)
    yield f"{options.model}: {type(model).__name__}, {count_parameters(model):,} parameters"
    yield f"image        {size[0]} x {size[1]} pixels"
    yield f"tokens       {cli.describe_tokens(tokens)}"
    yield f"arithmetic   {flops[''] / 1e9:.2f} GFLOP per image"
    yield f"weights      {cli.describe_bytes(memory.weights)} in {dtype}"
    yield (
        f"activations  about {inference} for inference, {backward} kept for a backward pass "
        f"(estimates, {dtype}, {batch})"
    )
    yield ""
    yield module_table(model, flops, max_depth=options.depth)


def main(argv: list[str] | None = None) -> None:
    """Run the command line, given what follows the program's name."""
    parser = cli.make_parser(
        "summary", "Parameters, tokens, arithmetic and memory of a backbone, module by module.", EPILOG
    )
    parser.add_argument("model", metavar="MODEL", help=cli.MODEL_HELP)
    parser.add_argument(
        "--weights",
        choices=("LVD1689M", "SAT493M"),
        help="which published weights the structure is for; nothing is downloaded (default: LVD1689M)",
    )
    for line in describe(cli.parse_options(parser, SummaryOptions, argv)):
        print(line)


if __name__ == "__main__":
    run_command_line(main)
