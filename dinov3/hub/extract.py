"""Features of every image in a folder, into one safetensors file.

    python -m dinov3.hub.extract --model dinov3_vits16 --weights FILE --images DIR --out features.safetensors

Notable:
- Any number of images needs little memory: features are kept in shards beside the output, a few batches each, and
  joined when all are there. A killed command continues from its shards when it is started again.
- A shard always holds the same batches of the same images, so that a resumed extraction gives the same bytes as an
  uninterrupted one.
- Every image is resized to the same height and width, so that all have the same number of patches.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dinov3.distributed import runtime
from dinov3.hub import command_line as cli
from dinov3.hub.transforms import Normalization
from dinov3.models.summary import Tokens
from dinov3.utils.command_line import run_command_line
from dinov3.utils.files import atomic_write
from dinov3.utils.weight_files import make_safetensors_header, read_file, read_safetensors_header, write_safetensors

#: That of `dinov3.data.images`, which needs Pillow.
MAX_IMAGE_PIXELS = 178_956_970

TOKENS = ("cls", "avg", "patch", "storage")
ON_BAD_IMAGE = ("skip", "raise")

ENDING = ".safetensors"
NAMES, SKIPPED = "names", "skipped"
SETTINGS_FILE = "settings.json"
#: A killed command loses at most so many batches; fewer would leave a large folder with many small shards.
BATCHES_PER_SHARD = 16
#: A shard is kept in memory until it is complete.
MAX_SHARD_BYTES = 2**28
N_LISTED = 20

EPILOG = """\
The output is a safetensors file of n images in the order of their paths, with D channels and h x w patches:
  cls      [n, D]         class token after the final norm (ConvNeXt: mean of the last map)
  avg      [n, D]         mean of the patch tokens
  patch    [n, h, w, D]   patch tokens after the final norm
  storage  [n, R, D]      storage tokens (registers)
  names    [bytes]        the paths of the images, relative to DIR, each ended by a zero byte
  skipped  [bytes]        the same for the images that cannot be read
Its metadata are the settings. In Python:

  from dinov3.hub.extract import read_features
  names, features = read_features("features.safetensors")    # features["cls"][i] belongs to names[i]

While it works, OUT.parts/ holds what is done. If it is killed and started again with the same options, it resumes from
there and gives the same file.

examples:
  python -m dinov3.hub.extract --model dinov3_vits16 --weights dinov3_vits16.pth --images photos --out cls.safetensors
  python -m dinov3.hub.extract --model dinov3_vitl16 --weights SAT493M --images tiles --out tiles.safetensors \\
      --tokens cls,patch --size 512 --dtype bfloat16
  python -m dinov3.hub.extract --model outputs/run --images photos --out mine.safetensors --tokens cls,avg
"""


@dataclass(frozen=True)
class ExtractOptions:
    """What to extract; also the options of the command line.

    Attributes:
        model: which backbone.
    """

    model: cli.ModelChoice
    images: Path = cli.option("folder, searched at any depth", type=Path, metavar="DIR")
    out: Path = cli.option("the safetensors file to write", type=Path, metavar="FILE")
    tokens: tuple[str, ...] = cli.option(
        f"some of {','.join(TOKENS)}, see below (default: cls)",
        default=("cls",),
        type=lambda text: tuple(token.strip() for token in text.split(",")),
    )
    size: tuple[int, int] = cli.option(
        "pixels to which every image is resized, a multiple of the patch (16; ConvNeXt: 32); default: 256",
        default=(256, 256),
        type=cli.parse_size,
        metavar="S | HxW",
    )
    batch_size: int = cli.option("default: 16", default=16, type=cli.positive, metavar="N")
    dtype: torch.dtype = cli.option(
        "float32, bfloat16 or float16: of weights, arithmetic and stored features (default: float32)",
        default=torch.float32,
        type=cli.parse_dtype,
        metavar="DTYPE",
    )
    device: str = cli.option("auto (a GPU if there is one), cpu, cuda, cuda:1, ...", default="auto")
    num_workers: int = cli.option(
        "processes that read images, at most one per processor (default: 4); 0: the main process",
        default=4,
        type=lambda text: 0 if text == "0" else cli.positive(text),
        metavar="N",
    )
    normalization: str = cli.option(
        "mean and deviation of the pixels that the weights were trained with: web images (lvd), satellite images "
        "(sat), or decided by the weights (auto, the default: satellite images for SAT493M, or a file of that name)",
        default="auto",
        choices=cli.NORMALIZATIONS,
    )
    on_bad_image: str = cli.option(
        "skip and list images that cannot be read (default), or stop at the first", default="skip", choices=ON_BAD_IMAGE
    )
    max_image_pixels: int = cli.option(
        f"larger images cannot be read (default: {MAX_IMAGE_PIXELS})",
        default=MAX_IMAGE_PIXELS,
        type=cli.positive,
        metavar="N",
    )
    overwrite: bool = cli.option(
        "replace FILE, and parts of it that were made with other settings", default=False, action="store_true"
    )


class Features(NamedTuple):
    """What `read_features` returns.

    Attributes:
        names: path of each image, relative to the folder.
        tensors: by token: `cls` and `avg` [n, D], `patch` [n, h, w, D], `storage` [n, R, D].
    """

    names: list[str]
    tensors: dict[str, Tensor]


def read_features(path: str | os.PathLike[str]) -> Features:
    """Read a file that this command wrote.

    Args:
        path: the file. **If it has more than 4 GiB it is mapped: never write over it while its tensors are in use.**
            This command does not: it writes another file and renames it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a file of features.
    """
    tensors = dict(read_file(Path(path)))
    if NAMES not in tensors:
        raise ValueError(
            f"{path} does not hold features of images: it has no entry {NAMES!r}, only {', '.join(tensors)}"
        )
    names = [os.fsdecode(name) for name in tensors.pop(NAMES).numpy().tobytes().split(b"\0")[:-1]]
    tensors.pop(SKIPPED, None)
    return Features(names, tensors)


def extract(options: ExtractOptions) -> Features:
    """Extract the features of a folder, with a progress bar, into `options.out`.

    Returns:
        The features, see `read_features`.

    Raises:
        FileNotFoundError: there is no such folder, or no images in it.
        FileExistsError: `out` exists already, or parts of it that were made with other settings.
        BadImageError: an image cannot be read, with `on_bad_image="raise"`.
        ValueError: another option is out of its range, no image can be read, or the model returns NaN or infinity.
    """
    _extract(options)
    return read_features(options.out)


def _extract(options: ExtractOptions) -> None:
    from torchvision.transforms import v2

    from dinov3.data.loaders import make_data_loader, usable_workers
    from dinov3.data.transforms import make_base_transform

    dataset = _check(options)
    device = runtime.set_device(options.device)
    model = options.model.load(device=device, dtype=options.dtype)
    tokens = cli.check_image_size(model, options.size)
    data, normalization = cli.find_normalization(options.model, model, options.normalization)
    print(f"{len(dataset)} images in {options.images}; {options.model} on {device}", file=sys.stderr)
    print(f"{options.size[0]} x {options.size[1]} pixels, normalisation {data}", file=sys.stderr)
    print(f"tokens of an image: {cli.describe_tokens(tokens)}", file=sys.stderr)
    settings = _settings(options, dataset, model, normalization)
    parts = _Parts(options.out, len(dataset), _images_per_shard(options, tokens))
    parts.open(settings, overwrite=options.overwrite)
    resize = v2.Resize(options.size, antialias=True)
    transform = v2.Compose([v2.ToImage(), resize, make_base_transform(normalization.mean, normalization.std)])
    images = _ReadableImages(dataset, parts.left(), transform)
    loader = make_data_loader(
        dataset=images,
        # All shards but the last are whole batches, so that no batch has images of two.
        batch_size=options.batch_size,
        num_workers=min(usable_workers(options.num_workers), -(-len(images) // options.batch_size)),
        shuffle=False,
        sampler_type=None,
        drop_last=False,
        collate_fn=_collate,
    )
    _fill(parts, loader, model, tokens.grid, options)
    good, bad = _join(parts, dataset, settings, options)
    if bad:
        listed = "".join(f"\n  {dataset.get_image_relpath(index)}" for index in bad[:N_LISTED])
        listed += "\n  ..." if len(bad) > N_LISTED else ""
        n_all = len(good) + len(bad)
        print(f"skipped, because they cannot be read: {len(bad)} of {n_all} images{listed}", file=sys.stderr)
    entries = read_safetensors_header(options.out).entries
    shapes = ", ".join(f"{token} {list(entries[token].shape)}" for token in options.tokens)
    print(f"{options.out}: {shapes}, {cli.describe_bytes(options.out.stat().st_size)}")


def _check(options: ExtractOptions) -> Any:
    from dinov3.data.datasets import ImageFolder
    from dinov3.data.images import ImageReading

    unknown = [token for token in options.tokens if token not in TOKENS]
    if unknown or not options.tokens or len(set(options.tokens)) != len(options.tokens):
        raise ValueError(f"--tokens {','.join(options.tokens)}: expected some of {','.join(TOKENS)}, each once")
    options.model.check()
    if options.out.suffix != ENDING:
        raise ValueError(f"--out {options.out}: the output is a safetensors file, so its name must end in {ENDING}")
    cli.check_output(options.out, overwrite=options.overwrite)
    if not options.images.is_dir():
        kind = "it is a file" if options.images.exists() else "there is no such directory"
        raise FileNotFoundError(f"--images {options.images}: {kind}; expected a folder of images")
    dataset = ImageFolder(root=str(options.images), labels="none")
    dataset.read_images(ImageReading(max_image_pixels=options.max_image_pixels))
    return dataset


class _Parts:
    """The shards beside the output: shard k holds images k * size to (k + 1) * size of the listing."""

    def __init__(self, out: Path, n_images: int, images_per_shard: int) -> None:
        self.directory = out.with_name(f"{out.name}.parts")
        self.n_images = n_images
        self.size = images_per_shard
        self.n_shards = -(-n_images // images_per_shard)

    def open(self, settings: dict[str, Any], *, overwrite: bool) -> None:
        """Resume from shards that were made with these settings, or make an empty directory."""
        path = self.directory / SETTINGS_FILE
        settings = {**settings, "images_per_shard": self.size}
        if self.directory.exists() and any(self.directory.glob("*.safetensors")):
            there = json.loads(path.read_text())
            changed = [key for key in settings if there.get(key) != settings[key]]
            if not changed:
                print(f"resuming: {self.n_images - len(self.left())} images are already done", file=sys.stderr)
                return
            if not overwrite:
                changes = "; ".join(f"{key} was {there.get(key)}, now {settings[key]}" for key in changed)
                raise FileExistsError(
                    f"{self.directory} holds part of an extraction with other settings ({changes}): use those to "
                    "resume it, or start again with --overwrite"
                )
        shutil.rmtree(self.directory, ignore_errors=True)
        with atomic_write(path, "w") as file:
            json.dump(settings, file, indent=1)

    def path(self, shard: int) -> Path:
        return self.directory / f"{shard:06d}.safetensors"

    def indices(self, shard: int) -> range:
        return range(shard * self.size, min((shard + 1) * self.size, self.n_images))

    def missing(self) -> list[int]:
        return [shard for shard in range(self.n_shards) if not self.path(shard).exists()]

    def left(self) -> list[int]:
        """Return the images of the missing shards."""
        return [index for shard in self.missing() for index in self.indices(shard)]


Sample = tuple[int, Tensor | None, str]


class _ReadableImages(torch.utils.data.Dataset[Sample]):
    """(index, transformed image, ""), or (index, None, what is wrong with it)."""

    def __init__(self, dataset: Any, indices: Sequence[int], transform: Callable[[Any], Tensor]) -> None:
        self._dataset, self._indices, self._transform = dataset, indices, transform

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, position: int) -> Sample:
        from dinov3.data.datasets import BadImageError

        index = self._indices[position]
        try:
            return index, self._transform(self._dataset.load_image(index)), ""
        except BadImageError as error:
            return index, None, str(error)


def _collate(samples: list[Sample]) -> tuple[Tensor | None, list[int], list[tuple[int, str]]]:
    """Return the images [B, 3, H, W] that can be read, their indices, and the others with what is wrong with them."""
    images = [image for _, image, _ in samples if image is not None]
    good = [index for index, image, _ in samples if image is not None]
    bad = [(index, reason) for index, image, reason in samples if image is None]
    return torch.stack(images) if images else None, good, bad


def _images_per_shard(options: ExtractOptions, tokens: Tokens) -> int:
    n_tokens = {"cls": 1, "avg": 1, "patch": tokens.grid[0] * tokens.grid[1], "storage": tokens.n_storage}
    image_bytes = sum(n_tokens[token] for token in options.tokens) * tokens.channels * options.dtype.itemsize
    n_batches = MAX_SHARD_BYTES // max(1, image_bytes * options.batch_size)
    return options.batch_size * min(max(1, n_batches), BATCHES_PER_SHARD)


def _settings(options: ExtractOptions, dataset: Any, model: nn.Module, normalization: Normalization) -> dict[str, Any]:
    # Everything that the bits of the features depend on, except the machine.
    names = hashlib.sha256(_encode_names(dataset, range(len(dataset)))).hexdigest()[:16]
    return {
        "model": options.model.name,
        "weights": _fingerprint(model),
        "images": f"{len(dataset)} images in {options.images.resolve()}, {names}",
        "tokens": ",".join(options.tokens),
        "size": f"{options.size[0]}x{options.size[1]}",
        "batch_size": options.batch_size,
        "max_image_pixels": options.max_image_pixels,
        "dtype": str(options.dtype).removeprefix("torch."),
        "device": runtime.device().type,
        "mean": list(normalization.mean),
        "std": list(normalization.std),
    }


def _fingerprint(model: nn.Module) -> str:
    # The beginning of each tensor distinguishes weights without reading 27 GB from the disk.
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.flatten()[:1024].cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _fill(parts: _Parts, loader: Any, model: nn.Module, grid: tuple[int, int], options: ExtractOptions) -> None:
    from dinov3.data.datasets import BadImageError

    batches, n_done = iter(loader), parts.n_images - len(loader.dataset)
    with tqdm(total=parts.n_images, initial=n_done, unit="image", desc="features") as bar:
        for shard in parts.missing():
            rows: list[dict[str, Tensor]] = []
            good: list[int] = []
            bad: list[int] = []
            for _ in range(0, len(parts.indices(shard)), options.batch_size):
                images, readable, unreadable = next(batches)
                for index, reason in unreadable:
                    if options.on_bad_image == "raise":
                        raise BadImageError(reason)
                    bar.write(f"skipped: {reason}", file=sys.stderr)
                    bad.append(index)
                good += readable
                if images is not None:
                    rows.append(_compute_tokens(model, images.to(options.dtype), grid, options.tokens))
                bar.update(len(readable) + len(unreadable))
            _save_shard(parts.path(shard), rows, good, bad)


@torch.inference_mode()
def _compute_tokens(model: Any, images: Tensor, grid: tuple[int, int], wanted: Sequence[str]) -> dict[str, Tensor]:
    features = model.forward_features(images.to(runtime.device(), non_blocking=True))
    patches = features["x_norm_patchtokens"]
    rows = {
        "cls": lambda: features["x_norm_clstoken"],
        "avg": lambda: patches.mean(dim=1),
        "patch": lambda: patches.unflatten(1, grid),
        "storage": lambda: features["x_storage_tokens"],
    }
    found = {token: rows[token]().cpu().contiguous() for token in wanted}
    if not all(tensor.isfinite().all() for tensor in found.values()):
        raise ValueError(
            f"the model returns NaN or infinity in {images.dtype}: its weights are not usable"
            + (", or their numbers are too large for it; try --dtype bfloat16" if images.dtype == torch.float16 else "")
        )
    return found


def _save_shard(path: Path, rows: list[dict[str, Tensor]], good: list[int], bad: list[int]) -> None:
    tensors = {token: torch.cat([row[token] for row in rows]) for token in (rows[0] if rows else ())}
    tensors |= {"good": torch.tensor(good, dtype=torch.int64), "bad": torch.tensor(bad, dtype=torch.int64)}
    write_safetensors(path, tensors, {})


def _join(
    parts: _Parts, dataset: Any, settings: dict[str, Any], options: ExtractOptions
) -> tuple[list[int], list[int]]:
    """Write the output, and return the indices of the images that can be read and of those that cannot."""
    good: list[int] = []
    bad: list[int] = []
    shapes: dict[str, list[int]] = {}
    for shard in range(parts.n_shards):
        # Mapped, for most of a shard is not needed now; nothing changes a shard that is there.
        tensors = dict(read_file(parts.path(shard), mmap=True))
        good += tensors.pop("good").tolist()
        bad += tensors.pop("bad").tolist()
        shapes |= {token: list(rows.shape[1:]) for token, rows in tensors.items()}
    if not good:
        raise ValueError(
            f"none of the {len(bad)} images in {options.images} can be read; remove {parts.directory} before you retry"
        )
    texts = {NAMES: _encode_names(dataset, good), SKIPPED: _encode_names(dataset, bad)}
    layout: dict[str, tuple[torch.dtype, list[int]]]
    layout = {token: (options.dtype, [len(good), *shapes[token]]) for token in options.tokens}
    layout |= {name: (torch.uint8, [len(text)]) for name, text in texts.items()}
    metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in settings.items()}
    with atomic_write(options.out) as file:
        file.write(make_safetensors_header(layout, metadata))
        for token in options.tokens:
            for shard in range(parts.n_shards):
                if (rows := read_file(parts.path(shard), mmap=True).get(token)) is not None:
                    file.write(rows.flatten().view(torch.uint8).numpy().data)
        for text in texts.values():
            file.write(text)
    shutil.rmtree(parts.directory)
    return good, bad


def _encode_names(dataset: Any, indices: Sequence[int]) -> bytes:
    return b"".join(os.fsencode(dataset.get_image_relpath(index)) + b"\0" for index in indices)


def main(argv: list[str] | None = None) -> None:
    """Run the command line, given what follows the program's name."""
    parser = cli.make_parser("extract", "Write the features of every image in a folder into one file.", EPILOG)
    parser.add_argument("--model", required=True, metavar="MODEL", help=cli.MODEL_HELP)
    parser.add_argument("--weights", metavar="WEIGHTS", help=cli.WEIGHTS_HELP)
    _extract(cli.parse_options(parser, ExtractOptions, argv))


if __name__ == "__main__":
    run_command_line(main)
