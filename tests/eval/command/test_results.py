"""Result tables as files, and what they say about where their figures come from."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dinov3.eval.classification.knn_config import EvalConfig, Feature, KnnEvalConfig, TrainConfig
from dinov3.eval.command import results
from dinov3.eval.command.model import ModelConfig
from dinov3.eval.command.results import EvaluationResult, FileFormat, provenance, write_results


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".yaml", ".excel", ".xlsx"])
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


@pytest.mark.parametrize("file_format", [FileFormat.EXCEL, FileFormat.XLSX])
def test_excel_keeps_texts_infinities_and_missing_values(file_format: FileFormat) -> None:
    table = results.make(
        {
            "text": ["=1+1", "#N/A", None, None],
            "number": [0.123456789012, -float("inf"), 3.0, None],
            "7": [80.0, 1, None, None],
        }
    )
    buffer = io.BytesIO()
    results.save(table, buffer, file_format)
    buffer.seek(0)
    loaded = results.load(buffer, file_format)
    assert loaded == table
    assert loaded.dtypes == {"text": "string", "number": "Float64", "7": "Int64"}


def test_an_empty_sheet_is_an_empty_table(tmp_path: Path) -> None:
    pytest.importorskip("openpyxl").Workbook().save(tmp_path / "t.xlsx")
    assert results.load(tmp_path / "t.xlsx") == results.make({})


def test_excel_in_a_text_file_is_refused() -> None:
    with pytest.raises(ValueError, match="binary"):
        results.save_from_dict({"a": 1}, io.StringIO(), FileFormat.XLSX)


def test_binary_files_take_text_formats() -> None:
    buffer = io.BytesIO()
    results.save_from_dict({"ä": 1}, buffer, FileFormat.CSV)
    buffer.seek(0)
    assert results.load(buffer, FileFormat.CSV).columns == {"ä": [1]}


def test_what_excel_needs_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(ModuleNotFoundError, match="pip install openpyxl"):
        results.save_from_dict({"a": 1}, tmp_path / "t.xlsx")
    assert not list(tmp_path.iterdir())


def test_tables_are_joined_with_the_columns_of_all() -> None:
    joined = results.vstack(
        results.make({"a": 1, "b": 80.0}), results.make({"b": [80.5, 2.0], "c": ["x", "y"]}), results.make({"c": 7})
    )
    assert joined.columns == {"a": [1, None, None, None], "b": [80.0, 80.5, 2.0, None], "c": [None, "x", "y", "7"]}
    assert joined.dtypes == {"a": "Int64", "b": "Float64", "c": "string"}
    assert results.vstack() == results.make({})


@pytest.mark.parametrize("file_format", FileFormat)
def test_collections_load_back(tmp_path: Path, file_format: FileFormat) -> None:
    tables = {"k-NN 1.5": results.make({"a": 1}), "linear": results.make({"b": ["x", "y"]})}
    results.save_collection(tables, tmp_path / "new", file_format)
    (tmp_path / "new" / f".tmp-1-t{file_format.value}").touch()
    (tmp_path / "new" / "notes.txt").touch()
    assert results.load_collection(tmp_path / "new", file_format) == tables


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "..", "a/"])
def test_names_that_are_no_file_names_are_refused(tmp_path: Path, name: str) -> None:
    table = results.make({"a": 1})
    with pytest.raises(ValueError, match="names a table"):
        results.save_collection({"good": table, name: table}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_collection_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        results.load_collection(tmp_path / "nowhere")


def test_results_are_written_with_their_provenance(tmp_path: Path) -> None:
    provenance: dict[str, Any] = {"config": {"feature": Feature.CLS}, "processes": 1}
    write_results({"10 Top 1": 80.0}, tmp_path / "new", "results-knn.csv", provenance)
    assert (tmp_path / "new" / "results-knn.csv").read_text() == "10 Top 1\n80\n"
    content = json.loads((tmp_path / "new" / "results-knn.json").read_text())
    assert content["results"] == {"10 Top 1": 80.0} and content["processes"] == 1


def test_figures_that_are_not_numbers_are_null_in_json(tmp_path: Path) -> None:
    write_results({"10 Top 1": 80.0, "10 Top 1 std": float("nan")}, tmp_path, "results-knn.csv", {"processes": 1})
    assert '"10 Top 1 std": null' in (tmp_path / "results-knn.json").read_text()


def test_settings_are_written_as_they_can_be_given_again() -> None:
    config = KnnEvalConfig(
        model=ModelConfig(),
        train=TrainConfig(dataset="A", ks=[3]),
        eval=EvalConfig(test_dataset="B", feature=Feature.PATCH_MEAN),
    )
    result = EvaluationResult({}, {"classes": 7}, model="ViT", autocast_dtype=torch.bfloat16, report="")
    content = provenance(config, result, 1.234)
    assert json.loads(json.dumps(content)) == content
    assert content["config"]["eval"]["feature"] == "PATCH_MEAN"
    assert content["config"]["eval"]["test_metric_type"] == "MEAN_ACCURACY"
    assert content["config"]["train"]["ks"] == [3]
    assert (content["model"], content["datasets"], content["seconds"]) == ("ViT", {"classes": 7}, 1.23)
    assert content["processes"] == 1 and content["autocast_dtype"] == "torch.bfloat16"
    assert content["versions"]["torch"] == torch.__version__ and "scikit-learn" in content["versions"]
