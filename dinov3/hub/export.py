"""A backbone as one file that runs without this library: ONNX, or a program of `torch.export`.

    python -m dinov3.hub.export dinov3_vits16 --weights FILE --format onnx --out vits16.onnx

Notable:
- One exported file takes any batch size, height and width: the grid of positions is part of the graph.
- A file only gets its name after it was read back, run on two sizes that it was not traced with, and found to give
  what the model gives.
- Everything is float32, the positions too.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import logging
import math
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dinov3.hub import command_line as cli
from dinov3.models.summary import patch_stride
from dinov3.utils.command_line import run_command_line

ENDINGS = {"onnx": ".onnx", "torch-export": ".pt2"}
DEFAULT_OPSET = 18
#: Largest difference that may remain, relative to the largest value of an output. Rounding makes about 1e-6; a size or
#: a grid that was frozen into the file makes more than 1e-2.
TOLERANCE = 1e-3
INFO_FILE = "dinov3.json"

EPILOG = """\
Input:
  images          float32 [batch, 3, height, width], normalised; height and width of at least two patches (32 pixels;
                  ConvNeXt: 64); rows and columns beyond the last whole patch are ignored
Outputs, float32, after the final norm, with D channels:
  cls_token       [batch, D]
  storage_tokens  [batch, R, D]  (registers; not of a ConvNeXt, which has none)
  patch_tokens    [batch, (height // 16) * (width // 16), D], row by row (ConvNeXt: 32)

The file also says which model it is, and the mean and standard deviation for normalising pixels in [0, 1]: ONNX in its
metadata, torch-export in its extra file dinov3.json. ONNX files of more than 2 GB keep their weights beside them, in
FILE.data: move the two together.

  onnxruntime.InferenceSession("vits16.onnx").run(None, {"images": images.numpy()})    # a list of arrays
  torch.export.load("vits16.pt2").module()(images)                                     # a dict of tensors

examples:
  python -m dinov3.hub.export dinov3_vits16 --weights dinov3_vits16.pth --format onnx --out vits16.onnx
  python -m dinov3.hub.export dinov3_convnext_tiny --weights LVD1689M --format torch-export --out tiny.pt2
  python -m dinov3.hub.export outputs/run --format onnx --out mine.onnx --opset 20
"""


class WrongExportError(RuntimeError):
    """An exported file does not compute what its model computes."""


@dataclass(frozen=True)
class ExportOptions:
    """What to export; also the options of the command line.

    Attributes:
        model: which backbone.
    """

    model: cli.ModelChoice
    format: str = cli.option("what to write", choices=tuple(ENDINGS))
    out: Path = cli.option("the .onnx or .pt2 file to write", type=Path, metavar="FILE")
    size: tuple[int, int] = cli.option(
        "of the image that the model is traced with, in pixels; the file takes any (default: 224)",
        default=(224, 224),
        type=cli.parse_size,
        metavar="S | HxW",
    )
    opset: int = cli.option(
        f"of ONNX (default: {DEFAULT_OPSET})", default=DEFAULT_OPSET, type=cli.positive, metavar="N"
    )
    overwrite: bool = cli.option("replace FILE", default=False, action="store_true")


class Difference(NamedTuple):
    """How far an exported file is from its model for images of one shape.

    Attributes:
        shape: of the images.
        largest: largest absolute difference of each output.
        relative: the largest of them, each divided by the largest absolute value of the output.
    """

    shape: tuple[int, ...]
    largest: dict[str, float]
    relative: float


class Features(nn.Module):
    """A backbone that returns a dict of `cls_token`, `storage_tokens` (if it has any) and `patch_tokens`."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone: Any = backbone

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map images [B, 3, H, W] to their tokens."""
        features = self.backbone.forward_features(images)
        storage = {"storage_tokens": features["x_storage_tokens"]} if self.backbone.n_storage_tokens > 0 else {}
        return {"cls_token": features["x_norm_clstoken"], **storage, "patch_tokens": features["x_norm_patchtokens"]}


def export(options: ExportOptions) -> list[Difference]:
    """Export a backbone into `options.out`, and compare the file with the model.

    Returns:
        The differences for two sizes that were not traced.

    Raises:
        ModuleNotFoundError: a package for ONNX is missing.
        FileExistsError: `out` exists already.
        ValueError: an option is out of its range.
        WrongExportError: the file differs from the model or takes no other size; nothing is left behind.
    """
    _check(options)
    model = Features(options.model.load()).requires_grad_(False)
    stride = patch_stride(model.backbone)
    cli.check_image_size(model.backbone, options.size)
    data, normalization = cli.find_normalization(options.model, model.backbone)
    is_onnx = options.format == "onnx"
    if is_onnx:
        _compute_positions_in_float32_(model)
    info = {
        "model": Path(options.model.name).name,
        "patch_size": stride,
        "mean": list(normalization.mean),
        "std": list(normalization.std),
    }
    print(f"tracing {options.model} at {options.size[0]} x {options.size[1]} pixels", file=sys.stderr)
    with _quiet():
        program = _trace(model, options.size)
    # On the same disk, so that moving is renaming.
    with tempfile.TemporaryDirectory(prefix=f".{options.out.name}.", dir=options.out.absolute().parent) as directory:
        file = Path(directory) / options.out.name
        with _quiet():
            if is_onnx:
                _write_onnx(program, file, info, options.opset)
            else:
                torch.export.save(program, file, extra_files={INFO_FILE: json.dumps(info)})
        run = _open_onnx(file) if is_onnx else torch.export.load(file).module()
        differences = [compare(model, run, shape) for shape in _other_shapes(model, options.size)]
        del run  # Windows cannot move a file that is open.
        for difference in differences:
            shape = " x ".join(str(size) for size in difference.shape)
            largest = ", ".join(f"{name} {value:.1e}" for name, value in difference.largest.items())
            print(f"images {shape}: largest difference {largest} (relative {difference.relative:.1e})")
        _refuse_wrong(differences, options)
        for written in sorted(Path(directory).iterdir(), key=lambda path: path == file):  # The model after its weights.
            written.replace(options.out.with_name(written.name))
    weights = _data_file(options.out)
    more = f" and {cli.describe_bytes(weights.stat().st_size)} in {weights.name}" if weights.exists() else ""
    print(f"{options.out}: {cli.describe_bytes(options.out.stat().st_size)}{more}, normalisation {data}")
    return differences


def compare(model: nn.Module, run: Callable[[Tensor], dict[str, Tensor]], shape: tuple[int, ...]) -> Difference:
    """Compare an exported program with its model on random images.

    Args:
        model: a `Features`.
        run: the exported program.
        shape: of the images.

    Raises:
        WrongExportError: the program does not take such images.
    """
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(images)
        try:
            found = run(images)
        except Exception as error:  # Whatever a runtime raises, the file is useless.
            reason = str(error).partition("\n")[0]
            raise WrongExportError(
                f"the exported model does not take images of shape {list(shape)}: {reason}"
            ) from error
    assert list(expected) == list(found), f"{list(found)} instead of {list(expected)}"
    largest, relative = {}, 0.0
    for name, want in expected.items():
        is_same_shape = want.shape == found[name].shape
        difference = (want - found[name]).abs().max().item() if is_same_shape else math.inf
        largest[name] = math.inf if math.isnan(difference) else difference
        relative = max(relative, largest[name] / want.abs().max().item())
    return Difference(shape, largest, relative)


def _check(options: ExportOptions) -> None:
    ending = ENDINGS[options.format]
    if options.out.suffix != ending:
        raise ValueError(f"--out {options.out}: files of --format {options.format} end in {ending}")
    cli.check_output(options.out, overwrite=options.overwrite)
    options.model.check()
    if options.format != "onnx":
        return
    cli.check_output(_data_file(options.out), overwrite=options.overwrite)
    packages = ("onnx", "onnxscript", "onnxruntime")
    for package in packages:
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"exporting to ONNX needs {package}: pip install {' '.join(packages)}", name=package
            ) from error
    from onnx.defs import onnx_opset_version

    if not DEFAULT_OPSET <= options.opset <= onnx_opset_version():
        raise ValueError(
            f"--opset {options.opset}: expected {DEFAULT_OPSET} to {onnx_opset_version()}, the newest that onnx knows"
        )


def _compute_positions_in_float32_(model: Features) -> None:
    # ONNX runtimes cannot compute sines in bfloat16. The published models do not, but a user's own training may.
    rope = getattr(model.backbone, "rope_embed", None)
    if rope is None or rope.dtype == torch.float32:
        return
    trained = copy.deepcopy(model)
    dtype, rope.dtype, rope.periods = rope.dtype, torch.float32, rope.periods.float()
    difference = compare(trained, model, _other_shapes(model, (0, 0))[0])
    print(
        f"note: this model computes positions in {str(dtype).removeprefix('torch.')}, which ONNX cannot; the file uses "
        f"float32 instead, which changes its features by up to {difference.relative:.1e} of the largest value",
        file=sys.stderr,
    )


def _trace(model: Features, size: tuple[int, int]) -> Any:
    from torch.export import Dim

    # For a side of one patch PyTorch would trace another program.
    smallest = 2 * patch_stride(model.backbone)
    height, width = (max(side, smallest) for side in size)
    dynamic = {0: Dim("batch", min=1), 2: Dim("height", min=smallest), 3: Dim("width", min=smallest)}
    # Not a batch of one, which PyTorch would take for a constant.
    images = torch.zeros(2, model.backbone.in_chans, height, width)
    return torch.export.export(model, (images,), dynamic_shapes={"images": dynamic})


def _other_shapes(model: Features, size: tuple[int, int]) -> Sequence[tuple[int, ...]]:
    stride, channels = patch_stride(model.backbone), model.backbone.in_chans
    grids = [(1, 3, 5), (3, 6, 2), (2, 4, 4)]
    shapes = [(batch, channels, rows * stride, columns * stride) for batch, rows, columns in grids]
    return [shape for shape in shapes if shape[2:] != size][:2]


def _write_onnx(program: Any, file: Path, info: dict[str, Any], opset: int) -> None:
    import onnx_ir

    exported: Any = torch.onnx.export(
        program,
        (),
        dynamo=True,
        opset_version=opset,
        input_names=["images"],
        output_names=list(program.call_spec.out_spec.context),
        verbose=False,
    )
    # The exporter calls the dimensions s34 and the like.
    images = exported.model.graph.inputs[0]
    names = {str(images.shape[axis]): name for axis, name in ((0, "batch"), (2, "height"), (3, "width"))}
    for value in (images, *exported.model.graph.outputs):
        value.shape = onnx_ir.Shape(
            dim if isinstance(dim, int) else re.sub(r"\w+", lambda match: names.get(match[0], match[0]), str(dim))
            for dim in value.shape
        )
    for key, entry in info.items():
        exported.model.metadata_props[key] = entry if isinstance(entry, str) else json.dumps(entry)
    exported.save(file)


def _open_onnx(file: Path) -> Callable[[Tensor], dict[str, Tensor]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(images: Tensor) -> dict[str, Tensor]:
        arrays = session.run(None, {"images": images.numpy()})
        return {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}

    return run


def _refuse_wrong(differences: list[Difference], options: ExportOptions) -> None:
    wrong = [difference for difference in differences if not difference.relative <= TOLERANCE]
    if wrong:
        raise WrongExportError(
            f"the exported model differs from {options.model} by {max(d.relative for d in wrong):.1e} of its largest "
            f"value, more than {TOLERANCE:.0e}: {options.out} was not written. Versions: torch {torch.__version__}"
            + "".join(f", {package} {_version(package)}" for package in ("onnx", "onnxscript", "onnxruntime"))
        )


def _data_file(out: Path) -> Path:
    # The exporter puts weights there that do not fit into the 2 GB of an ONNX file.
    return out.with_name(f"{out.name}.data")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # The exporters report their progress and their own deprecations, which users cannot act upon.
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)


def main(argv: list[str] | None = None) -> None:
    """Run the command line, given what follows the program's name."""
    description = "Export a backbone to ONNX or torch.export, for any batch size, height and width, and check the file."
    parser = cli.make_parser("export", description, EPILOG)
    parser.add_argument("model", metavar="MODEL", help=cli.MODEL_HELP)
    parser.add_argument("--weights", metavar="WEIGHTS", help=cli.WEIGHTS_HELP)
    export(cli.parse_options(parser, ExportOptions, argv))


if __name__ == "__main__":
    run_command_line(main)
