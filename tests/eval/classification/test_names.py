"""Names of the official release that lead elsewhere here (`tests/parity/targets.py`)."""

from __future__ import annotations

import pytest

from tests.parity import golden
from tests.parity.targets import TARGETS


@pytest.mark.parametrize("path", [path for path in TARGETS if path.startswith("dinov3.eval.")])
def test_names_of_the_release_lead_somewhere(path: str) -> None:
    assert golden.target(path) is not None
