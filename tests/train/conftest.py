"""The runs that the tests of the training floor share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from spherelm.train.trainer import Trainer


@pytest.fixture
def trainer(data: Path, tmp_path: Path) -> Callable[..., Trainer]:
    """`trainer(arm, **fields)`: a trainer of a tiny run in `tmp_path / "run"`, ready to run."""

    def make(arm: str = "ngpt", resume: bool = False, **fields: Any) -> Trainer:
        return Trainer(tiny.run_config(arm, data, **fields), tmp_path / "run", resume)

    return make
