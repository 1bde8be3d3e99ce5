from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dinov3.utils.custom_callable import load_custom_callable, script_directory_on_path


def test_directory_of_a_script_is_on_the_path_only_meanwhile(tmp_path: Path) -> None:
    before = sys.path[:]
    with pytest.raises(KeyError), script_directory_on_path(tmp_path / "script.py"):
        assert sys.path == [str(tmp_path), *before]
        raise KeyError
    assert sys.path == before


def test_script_of_a_package_gets_the_directory_that_holds_the_package(tmp_path: Path) -> None:
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    for directory in (inner, inner.parent):
        (directory / "__init__.py").touch()
    with script_directory_on_path(inner / "script.py"):
        assert sys.path[0] == str(tmp_path)


def test_script_that_fails_to_import_leaves_no_module_behind(tmp_path: Path) -> None:
    path, modules = sys.path[:], set(sys.modules)
    (tmp_path / "broken.py").write_text("raise OSError('at import')\n")
    with pytest.raises(OSError, match="at import"):
        load_custom_callable(tmp_path / "broken.py", "main")
    assert sys.path == path and set(sys.modules) == modules


def test_two_scripts_of_one_name_are_two_modules(tmp_path: Path) -> None:
    for word in ("a", "b"):
        (tmp_path / word).mkdir()
        (tmp_path / word / "script.py").write_text(f"def main(): return {word!r}\n")
    mains = [load_custom_callable(tmp_path / word / "script.py", "main") for word in ("a", "b")]
    assert [main() for main in mains] == ["a", "b"]
    assert sys.modules[mains[0].__module__].main is mains[0]
