"""Directory trees that are made of other files, such as those inside installed packages.

A tree appears complete or not at all. It is used again as long as it is made of the same things, which its
`manifest.json` records as a fingerprint.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dinov3.utils.files import publish_directory

MANIFEST = "manifest.json"


def package_directory(package: str) -> Path:
    """Return the directory of an installed package, without importing it.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            f"images of the package {package} are needed, which is not installed: "
            'pip install "dinov3[demo]" (`python -m dinov3.demo` also takes your own, with --images DIR)'
        )
    return Path(spec.origin).parent


def fingerprint(entries: Iterable[str]) -> str:
    """Digest what a tree is made of, given as one text per thing."""
    return hashlib.sha256("\n".join(entries).encode()).hexdigest()[:16]


def read_json(path: Path) -> Any:
    """Return the content of a JSON file, or None if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_tree(root: Path, made_of: str, write: Callable[[Path], dict[str, Any]]) -> tuple[dict[str, Any], bool]:
    """Write a tree, unless it is there already.

    Args:
        root: its directory; a tree that is made of other things is replaced.
        made_of: the fingerprint of what it is made of.
        write: fills an empty directory, and returns what the manifest records besides the fingerprint.

    Returns:
        The manifest, and whether the tree was there already.

    Raises:
        ValueError: `root` holds files that were not written here.
    """
    if root.exists() and not (root / MANIFEST).is_file() and any(root.iterdir()):
        raise ValueError(f"{root} holds files that this program did not write: choose another directory")
    manifest = read_json(root / MANIFEST)
    if isinstance(manifest, dict) and manifest.get("fingerprint") == made_of:
        return manifest, True
    temporary = root.with_name(f".tmp-{root.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        manifest = {"fingerprint": made_of, **write(temporary)}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        publish_directory(temporary, root)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest, False
