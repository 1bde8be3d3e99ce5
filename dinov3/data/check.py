"""Read every image of a dataset once, before a training needs it, and say what is in it:

    python -m dinov3.data.check ImageFolder:root=/data/photos --decode

It counts sizes and modes, images with the same content, and images that cannot be read, which it lists in a file that
every dataset takes: ImageFolder:root=/data/photos:skip=data-check/skip.txt
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import UnidentifiedImageError
from torch.utils.data import Dataset
from tqdm import tqdm

from dinov3.data.fingerprint import fingerprint
from dinov3.data.images import open_image, read_image
from dinov3.data.loaders import make_data_loader, make_dataset, usable_workers
from dinov3.utils.command_line import ArgumentParser, run_command_line
from dinov3.utils.files import atomic_write, explaining_full_disk
from dinov3.utils.text import read_lines

RECORDS_FILE, SKIP_FILE, DUPLICATES_FILE, SUMMARY_FILE = "records.jsonl", "skip.txt", "duplicates.txt", "summary.json"
#: The exit status if the command worked and found images that cannot be read.
EXIT_STATUS_BAD_IMAGES = 3
BATCH_SIZE = 16  # images that a worker reads before it reports
N_EXAMPLES = 10
N_COMMON_SIZES = 10

EPILOG = f"""\
files in the output directory:
  {RECORDS_FILE:<15} one line per image: index, name, bytes, size, mode, digest of the content, problem
  {SKIP_FILE:<15} the names of the images that cannot be read, for skip={SKIP_FILE} in a dataset string
  {DUPLICATES_FILE:<15} per line: an image, a tab, and the earlier image that has the same content
  {SUMMARY_FILE:<15} the counts as JSON

A command that was stopped continues when it is started again with the same dataset and options.
Exit status: 0 if all images can be read, {EXIT_STATUS_BAD_IMAGES} if some cannot, 1 if the dataset cannot be opened.

examples:
  python -m dinov3.data.check ImageFolder:root=/data/photos
  python -m dinov3.data.check 'WebDataset:urls=/data/shard-{{000..127}}.tar' --decode --output-dir shard-check
"""


@dataclass(frozen=True)
class Record:
    """What was found out about an image.

    Attributes:
        index: in the dataset.
        name: its path, relative to the root of the dataset.
        bytes: size of the encoded image.
        width, height: in pixels; 0 if it cannot be read.
        mode: how Pillow calls the kind of its pixels, e.g. `RGB`.
        digest: of the encoded image.
        problem: why it cannot be read; empty if it can.
    """

    index: int
    name: str
    bytes: int = 0
    width: int = 0
    height: int = 0
    mode: str = ""
    digest: str = ""
    problem: str = ""


class CheckedImages(Dataset[Record]):
    """The records of some images of a dataset.

    Args:
        dataset: from `make_dataset`, without transforms.
        indices: of the images.
        decode: decode the pixels, and the map of labels or depths if there is one, instead of only the header.
    """

    def __init__(self, dataset: Any, indices: Sequence[int], *, decode: bool) -> None:
        self.dataset = dataset
        self.indices = indices
        self.decode = decode

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Record:
        index = self.indices[position]
        found: dict[str, Any] = {"index": index, "name": self.dataset.get_image_relpath(index)}
        try:
            data = self.dataset.get_image_data(index)
            found |= {"bytes": len(data), "digest": hashlib.blake2b(data, digest_size=16).hexdigest()}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of odd metadata, which harms nothing
                with open_image(data, self.dataset.reading.max_image_pixels) as image:
                    found |= {"width": image.width, "height": image.height, "mode": image.mode}
                if self.decode and self.dataset.has_maps:
                    self.dataset.load_sample(index)
                elif self.decode:
                    read_image(data, self.dataset.reading)
        except UnidentifiedImageError:  # its message shows an address
            found["problem"] = f"not an image: {len(data)} bytes that begin with {data[:8]!r}" if data else "empty"
        except Exception as error:  # as datasets do: whatever stops the reading of an image
            found["problem"] = f"{type(error).__name__}: {error}"
        return Record(**found)


def check_dataset(
    dataset_str: str,
    output_dir: str | os.PathLike[str],
    *,
    decode: bool = False,
    num_workers: int = 4,
    skip_duplicates: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Read all images of a dataset, with a progress bar, and write what was found into `output_dir`.

    Args:
        dataset_str: see `dinov3.data.datasets.strings`.
        output_dir: gets the files that the help of the command lists.
        decode: decode every image; otherwise only its header, which does not notice damaged pixels.
        num_workers: processes that read; 0: this one.
        skip_duplicates: also list, for skipping, images with the content of an earlier one.
        overwrite: start again instead of continuing.

    Returns:
        The summary.

    Raises:
        ValueError, FileNotFoundError: the dataset cannot be opened, or is empty.
        FileExistsError: the directory holds the check of another dataset, or one with other options.
    """
    dataset = make_dataset(dataset_str=dataset_str, on_bad_image="skip")
    if len(dataset) == 0:
        raise ValueError(f"{dataset_str} has no images")
    output_dir = Path(output_dir)
    header = {"dataset": dataset_str, "decode": decode, "data": list(fingerprint(dataset))}
    records = output_dir / RECORDS_FILE
    done = set() if overwrite else _read_done(records, header)
    if not done:
        with atomic_write(records, "w") as file:
            file.write(json.dumps(header) + "\n")
    left = [index for index in range(len(dataset)) if index not in done]
    if getattr(dataset, "stream", None) is not None:
        num_workers = min(num_workers, 1)  # several would each unpack all shards
    loader = make_data_loader(
        dataset=CheckedImages(dataset, left, decode=decode),
        batch_size=BATCH_SIZE,
        num_workers=min(usable_workers(num_workers), -(-len(left) // BATCH_SIZE)),
        shuffle=False,
        sampler_type=None,
        drop_last=False,
        collate_fn=list,
    )
    with (
        explaining_full_disk(records),
        records.open("a", encoding="utf-8") as file,
        tqdm(total=len(dataset), initial=len(done), desc="checking", unit="image") as bar,
    ):
        n_bad = 0
        for batch in loader:
            file.writelines(json.dumps(asdict(record)) + "\n" for record in batch)
            file.flush()
            n_bad += sum(bool(record.problem) for record in batch)
            bar.set_postfix_str(f"{n_bad} bad", refresh=False)
            bar.update(len(batch))
    summary = header | _summarize(records, output_dir, skip_duplicates=skip_duplicates)
    with atomic_write(output_dir / SUMMARY_FILE, "w") as out:
        out.write(json.dumps(summary, indent=2) + "\n")
    return summary


def describe_summary(summary: dict[str, Any], output_dir: str | os.PathLike[str]) -> str:
    """Return the summary of `check_dataset` as lines for people."""
    bad, duplicates, sides = summary["unreadable"], summary["duplicates"], summary["sides"]
    lines = [
        f"{summary['images']} images, {summary['bytes'] / 1e9:.3g} GB",
        "modes: " + ", ".join(f"{mode} {count}" for mode, count in summary["modes"].items()),
        "sizes (width x height): " + ", ".join(f"{size} {count}" for size, count in summary["common_sizes"].items()),
    ]
    if sides:
        lines.append(f"shorter side: {sides['smallest']} to {sides['largest']} pixels, median {sides['median']}")
    lines.append(f"the same content as an earlier image: {duplicates['images']}")
    lines += [f"  {pair}" for pair in duplicates["examples"]]
    how = "decoded" if summary["decode"] else "headers only; --decode also finds damaged pixels"
    lines.append(f"cannot be read ({how}): {bad['images']}")
    lines += [f"  {example}" for example in bad["examples"]]
    if summary["skipped"]:
        path = Path(output_dir) / SKIP_FILE
        lines.append(f"leave {summary['skipped']} images out with skip={path} in the dataset string")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Check the dataset that the command line names; None takes the arguments of the program.

    Raises:
        SystemExit: with status 3 if some images cannot be read.
    """
    parser = ArgumentParser(
        prog="python -m dinov3.data.check",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dataset", metavar="DATASET", help="dataset string, for example ImageFolder:root=/data/photos")
    parser.add_argument("--decode", action="store_true", help="decode every image instead of reading only its header")
    parser.add_argument("--output-dir", default="data-check", metavar="DIR", help="default: data-check")
    parser.add_argument(
        "--num-workers",
        default=4,
        type=int,
        metavar="N",
        help="most processes that read; default: 4",
    )
    parser.add_argument(
        "--skip-duplicates", action="store_true", help=f"also list images in {SKIP_FILE} that repeat an earlier one"
    )
    parser.add_argument("--overwrite", action="store_true", help="start again instead of continuing")
    args = parser.parse_args(argv)
    if args.num_workers < 0:
        parser.error(f"--num-workers {args.num_workers}: expected 0 or more")
    summary = check_dataset(
        args.dataset,
        args.output_dir,
        decode=args.decode,
        num_workers=args.num_workers,
        skip_duplicates=args.skip_duplicates,
        overwrite=args.overwrite,
    )
    print(describe_summary(summary, args.output_dir))
    if summary["unreadable"]["images"]:
        sys.exit(EXIT_STATUS_BAD_IMAGES)


def _read_done(path: Path, header: dict[str, Any]) -> set[int]:
    # The images that an earlier command has checked. It may have been killed in the middle of a line.
    if not path.is_file():
        return set()
    first, *lines = read_lines(path) or [""]
    before = _parse(first)
    if changed := [key for key in header if before.get(key) != header[key]]:
        raise FileExistsError(
            f"{path} is the check of another dataset or with other options ("
            + "; ".join(f"{key}: {before.get(key)} before, {header[key]} now" for key in changed)
            + "): choose another --output-dir, or start again with --overwrite"
        )
    whole = [line for line in lines if _parse(line)]
    if len(whole) < len(lines) or not path.read_bytes().endswith(b"\n"):
        with atomic_write(path, "w") as file:
            file.writelines(f"{line}\n" for line in [first, *whole])
    return {_parse(line)["index"] for line in whole}


def _parse(line: str) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _iter_records(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8") as file:
        next(file)  # the header
        yield from (Record(**json.loads(line)) for line in file)


def _summarize(records: Path, output_dir: Path, *, skip_duplicates: bool) -> dict[str, Any]:
    # Several passes over the file, because the records of many millions of images are too large for memory.
    modes: Counter[str] = Counter()
    sizes: Counter[tuple[int, int]] = Counter()
    n_images = n_bytes = 0
    digests, indices = [], []
    for record in _iter_records(records):
        n_images, n_bytes = n_images + 1, n_bytes + record.bytes
        if record.digest:
            digests.append(bytes.fromhex(record.digest))
            indices.append(record.index)
        if not record.problem:
            modes[record.mode] += 1
            sizes[record.width, record.height] += 1
    earlier = _find_duplicates(digests, indices)
    names = {}
    if earlier:
        wanted = earlier.keys() | set(earlier.values())
        names = {record.index: record.name for record in _iter_records(records) if record.index in wanted}
    pairs = [(names[index], names[first]) for index, first in sorted(earlier.items())]
    bad = sorted((r for r in _iter_records(records) if r.problem), key=lambda record: record.index)
    skipped = [record.name for record in bad]
    skipped += [name for name, _ in pairs] if skip_duplicates else []
    unlistable = [name for name in skipped if "\n" in name or "\r" in name]
    with atomic_write(output_dir / SKIP_FILE, "w", errors="surrogateescape") as file:
        file.writelines(f"{name}\n" for name in dict.fromkeys(skipped) if name not in unlistable)
    with atomic_write(output_dir / DUPLICATES_FILE, "w", errors="surrogateescape") as file:
        file.writelines(f"{name}\t{first}\n" for name, first in pairs)
    shorter = np.repeat([min(size) for size in sizes], list(sizes.values())) if sizes else np.zeros(0, np.int64)
    return {
        "images": n_images,
        "bytes": n_bytes,
        "modes": dict(modes.most_common()),
        "common_sizes": {f"{w}x{h}": count for (w, h), count in sizes.most_common(N_COMMON_SIZES)},
        "sides": {"smallest": int(shorter.min()), "median": int(np.median(shorter)), "largest": int(shorter.max())}
        if len(shorter)
        else {},
        "duplicates": {"images": len(pairs), "examples": [f"{a} = {b}" for a, b in pairs[:N_EXAMPLES]]},
        "unreadable": {"images": len(bad), "examples": [f"{r.name}: {r.problem}" for r in bad[:N_EXAMPLES]]},
        "skipped": len(set(skipped)),
        "names_with_line_breaks": unlistable[:N_EXAMPLES],
    }


def _find_duplicates(digests: list[bytes], indices: list[int]) -> dict[int, int]:
    # The index of the earliest image with the same content, for each that is not the earliest itself.
    if not digests:
        return {}
    order = np.argsort(indices, kind="stable")
    keys = np.frombuffer(b"".join(digests), dtype="V16")[order]
    ascending = np.asarray(indices, dtype=np.int64)[order]
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    earliest = first[inverse.reshape(-1)]
    repeated = np.flatnonzero(earliest != np.arange(len(earliest)))
    return dict(zip(ascending[repeated].tolist(), ascending[earliest[repeated]].tolist(), strict=True))


if __name__ == "__main__":
    run_command_line(main)
