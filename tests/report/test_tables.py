"""Numbers as files, with pyarrow and without."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from spherelm.report.tables import long_table, write_table

COLUMNS = {"run": np.array(["a", "a", "b"]), "layer": np.array([0, 1, 0]), "value": np.array([0.5, np.inf, -1.25])}


def test_a_table_is_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip(
        "pyarrow.parquet", reason="tables as parquet need pyarrow: pip install '.[data]' in a clone of spherelm"
    )
    path = write_table(COLUMNS, tmp_path / "numbers")
    assert path == tmp_path / "numbers.parquet"
    read = parquet.read_table(path).to_pydict()
    assert read == {"run": ["a", "a", "b"], "layer": [0, 1, 0], "value": [0.5, np.inf, -1.25]}


def test_without_pyarrow_it_is_json(tmp_path: Path, without: Callable[[str], None]) -> None:
    without("pyarrow")
    path = write_table(COLUMNS, tmp_path / "numbers")
    assert path == tmp_path / "numbers.json"
    assert json.loads(path.read_text()) == {"run": ["a", "a", "b"], "layer": [0, 1, 0], "value": [0.5, None, -1.25]}


def test_a_long_table_has_a_row_for_every_number() -> None:
    first, second = np.arange(6.0).reshape(2, 3), np.array([[9.0]])
    table = long_table([({"name": "x"}, first), ({"name": "y"}, second)], ("layer", "head"))
    assert list(table) == ["name", "layer", "head", "value"]
    assert table["name"].tolist() == ["x"] * 6 + ["y"]
    for name, layer, head, value in zip(*table.values(), strict=True):
        assert {"x": first, "y": second}[name][layer, head] == value
