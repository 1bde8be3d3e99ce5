"""What the documents say about the tree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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
