"""A tiny data directory."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory; read only."""
    return tiny.make_data(tmp_path_factory.mktemp("tiny"))
