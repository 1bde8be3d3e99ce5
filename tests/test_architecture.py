"""The rules of the house (docs/architecture.md) that a program can check."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dinov3"
FLOORS = {
    1: ("utils", "layers", "data", "distributed", "env"),
    2: ("heads", "models", "loss", "fsdp", "checkpointer", "logging"),
    3: ("hub", "configs"),
    4: ("train", "eval", "run", "demo"),
}
FLOOR_OF = {package: floor for floor, packages in FLOORS.items() for package in packages}
MODULES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {module_name(path) for path in MODULES}


def imports(path: Path, *, at_import: bool) -> Iterator[str]:
    """Modules of this package that a file imports; `at_import`: leave out what only functions import."""
    tree = ast.parse(path.read_text())
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
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in NAMES else node.module for name in whole]
        else:
            continue
        yield from (name for name in names if name in NAMES)


def floor_of(name: str) -> int | None:
    parts = name.split(".")
    return FLOOR_OF[parts[1]] if len(parts) > 1 else None


def test_every_package_has_a_floor() -> None:
    packages = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert packages <= set(FLOOR_OF)


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_nothing_is_imported_from_a_floor_above(path: Path) -> None:
    floor = floor_of(module_name(path))
    if floor is None:
        return
    above = [name for name in imports(path, at_import=False) if (floor_of(name) or 0) > floor]
    assert above == []


def test_imports_run_in_no_circle() -> None:
    graph = {}
    for path in MODULES:
        name = module_name(path)
        # A package's own __init__ re-exports; to import it from inside is the circle that we look for.
        graph[name] = set(imports(path, at_import=True)) - {name}
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_only_the_runtime_names_cuda(path: Path) -> None:
    if module_name(path) == "dinov3.distributed.runtime":
        return
    used = [node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
    assert "cuda" not in used


def test_models_and_layers_know_nothing_of_training() -> None:
    forbidden = ("dinov3.fsdp", "dinov3.checkpointer", "dinov3.logging", "dinov3.data")
    for package in ("layers", "models", "loss"):
        for path in (PACKAGE / package).rglob("*.py"):
            found = [name for name in imports(path, at_import=False) if name.startswith(forbidden)]
            assert found == [], path
