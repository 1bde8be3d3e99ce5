"""Result tables as files."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from dinov3.eval import results
from dinov3.eval.results import FileFormat


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".yaml"])
def test_files_load_back_with_missing_values(tmp_path: Path, ending: str) -> None:
    table = results.make({"a": [1, 2.0], "b": [0.25, float("nan")], "c": ["x, y", "z"]})
    assert table.dtypes == {"a": "Int64", "b": "Float64", "c": "string"}
    results.save(table, tmp_path / f"t{ending}")
    loaded = results.load(tmp_path / f"t{ending}")
    assert loaded == table and loaded.columns["b"] == [0.25, None]


def test_a_dictionary_of_strings_is_one_row() -> None:
    assert results.make({"a": "xy", "b": "z"}).rows() == [{"a": "xy", "b": "z"}]


def test_open_files_need_a_format() -> None:
    buffer = io.StringIO()
    results.save_from_dict({"a": 1}, buffer, FileFormat.CSV)
    assert buffer.getvalue() == "a\n1\n"
    with pytest.raises(ValueError, match="file_format"):
        results.save_from_dict({"a": 1}, buffer)


def test_unknown_endings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.csv"):
        results.save_from_dict({"a": 1}, tmp_path / "t.txt")


def test_nothing_but_the_finished_file_is_left(tmp_path: Path) -> None:
    results.save_from_dict({"a": 1}, tmp_path / "new" / "t.csv")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["t.csv"]
