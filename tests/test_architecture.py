"""The rules of the house (docs/architecture.md) that a program can check."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "dinov3"
FLOORS = {
    1: ("utils", "layers", "data", "distributed", "env"),
    2: ("heads", "models", "loss", "fsdp", "checkpointer", "logging"),
    3: ("hub", "configs"),
    4: ("train", "eval", "run", "demo"),
}
FLOOR_OF = {package: floor for floor, packages in FLOORS.items() for package in packages}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path, *, at_import: bool) -> Iterator[str]:
    """Yield the modules of this package that a file imports; `at_import` leaves out imports inside functions."""
    tree = parse(path)
    skipped: set[ast.AST] = set()
    if at_import:
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        skipped = {inner for function in functions for inner in ast.walk(function)}
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in full]
        else:
            continue
        yield from (name for name in names if name in MODULES)


def floor_of(name: str) -> int | None:
    parts = name.split(".")
    return FLOOR_OF[parts[1]] if len(parts) > 1 else None


def test_every_package_has_a_floor() -> None:
    packages = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert packages <= set(FLOOR_OF)


def test_nothing_is_imported_from_a_floor_above() -> None:
    floors = {name: floor for name in MODULES if (floor := floor_of(name)) is not None}
    bad = [
        f"{module} imports {name}"
        for module, path in MODULES.items()
        for name in imports(path, at_import=False)
        if module in floors and floors.get(name, 0) > floors[module]
    ]
    assert bad == []


def test_no_circular_imports() -> None:
    # A package's __init__ re-exports; importing it from inside the package is the circle that we look for.
    graph = {module: set(imports(path, at_import=True)) - {module} for module, path in MODULES.items()}
    TopologicalSorter(graph).prepare()


def test_only_the_runtime_names_cuda() -> None:
    bad = [
        f"{module}:{node.lineno}"
        for module, path in MODULES.items()
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Attribute) and node.attr == "cuda" and module != "dinov3.distributed.runtime"
    ]
    assert bad == []


def test_models_and_layers_know_nothing_of_training() -> None:
    models = tuple(f"dinov3.{package}" for package in ("layers", "models", "heads", "loss"))
    training = ("dinov3.fsdp", "dinov3.checkpointer", "dinov3.logging", "dinov3.data")
    bad = [
        f"{module} imports {name}"
        for module, path in MODULES.items()
        for name in imports(path, at_import=False)
        if module.startswith(models) and name.startswith(training)
    ]
    assert bad == []
