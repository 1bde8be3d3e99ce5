"""What the documents say about the tree."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from dinov3.configs.merging import layers_of, unknown_keys
from dinov3.eval.classification.knn_config import KnnEvalConfig
from dinov3.eval.classification.linear_config import LinearEvalConfig
from dinov3.eval.classification.log_regression_config import LogregEvalConfig
from dinov3.eval.command.config import check_settings, cli_parser
from dinov3.eval.depth.config import DepthConfig
from dinov3.eval.segmentation.config import SegmentationConfig
from dinov3.train.train import parse_args

REPOSITORY = Path(__file__).parents[1]
DOCUMENTS = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *(REPOSITORY / "docs").glob("*.md")]
ROOTS = (REPOSITORY, REPOSITORY / "dinov3", REPOSITORY / "dinov3" / "data")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_files_that_documents_name_exist(document: Path) -> None:
    # Whole paths in backticks; `script.py` and the like are a reader's own.
    named = re.findall(r"`(?:python )?((?:dinov3|tests|benchmarks|[a-z0-9_]+)/[\w/]+\.py)\b", document.read_text())
    assert [name for name in named if not any((root / name).exists() for root in ROOTS)] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text())
    assert [target for target in targets if not (document.parent / target).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_imports_that_documents_show_work(document: Path) -> None:
    for line in re.findall(r"^from dinov3\.[\w.]+ import [\w, ]+$", document.read_text(), re.MULTILINE):
        exec(line, {})  # raises ImportError, and names what is missing


EVALUATIONS = {
    "dinov3/eval/knn.py": KnnEvalConfig,
    "dinov3/eval/linear.py": LinearEvalConfig,
    "dinov3/eval/log_regression.py": LogregEvalConfig,
    "dinov3/eval/depth/run.py": DepthConfig,
    "dinov3/eval/segmentation/run.py": SegmentationConfig,
}


def arguments_of(document: Path, script: str) -> list[list[str]]:
    """The arguments of `script`, each time that a shell block of `document` runs it."""
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", document.read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    words = [shlex.split(line, comments=True) for line in lines if script in line and "run.submit" not in line]
    found = [line[line.index(script) + 1 :] for line in words if script in line]
    # `...` and `$MODEL` stand for arguments that the text explains.
    return [[word for word in line if word != "..." and not word.startswith("$")] for line in found]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_settings_of_commands_that_documents_show_are_declared(document: Path) -> None:
    for arguments in arguments_of(document, "dinov3/train/train.py"):
        layers = layers_of(parse_args(arguments))  # raises on unknown flags and missing recipes
        assert unknown_keys(layers) == {}, arguments
    for script, config_class in EVALUATIONS.items():
        for arguments in arguments_of(document, script):
            settings = cli_parser([word for word in arguments if not word.startswith(("config=", "config_file="))])
            check_settings(settings, config_class, "")  # raises on unknown keys and values of the wrong type


def test_commands_are_found_in_the_documents() -> None:
    found = [arguments_of(document, "dinov3/train/train.py") for document in DOCUMENTS]
    assert len(sum(found, [])) >= 10
    assert all(any(arguments_of(document, script) for document in DOCUMENTS) for script in EVALUATIONS)
