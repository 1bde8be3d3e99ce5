"""Command-line tokens of evaluations, cases `eval-cli-*`."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parity import golden


@pytest.mark.parametrize("case", golden.cases("trainer", "eval-cli"), ids=lambda case: case["id"])
def test_tokens_become_settings(case: dict[str, Any]) -> None:
    assert golden.target("dinov3.eval.helpers.cli_parser")(case["argv"]) == case["expect"]
