"""Numbers as files: parquet where pyarrow is there, JSON where it is not."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

Columns = Mapping[str, ArrayLike]


def write_table(columns: Columns, path: Path) -> Path:
    """Write equally long columns as `path`.parquet, or without pyarrow as `path`.json, `{column: [values]}`; returns the file.

    In JSON, NaN and infinities become null.
    """
    arrays = {name: np.asarray(values) for name, values in columns.items()}
    assert len({len(array) for array in arrays.values()}) == 1, "columns of a table are equally long"
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        target = path.with_suffix(".json")
        plain = {name: [_plain(value) for value in array.tolist()] for name, array in arrays.items()}
        target.write_text(json.dumps(plain, allow_nan=False) + "\n", encoding="utf-8")
        return target
    target = path.with_suffix(".parquet")
    pyarrow.parquet.write_table(pyarrow.table(arrays), target)
    return target


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def long_table(arrays: Sequence[tuple[Mapping[str, Any], Any]], axes: Sequence[str]) -> dict[str, Any]:
    """Arrays of one number of dimensions as the columns of a long table: their labels, an index for each axis, and `value`.

    arrays: (labels, array) each, all with the same labels; axes: names of the axes, counted from 0.
    """
    labels = list(arrays[0][0])
    columns: dict[str, list[Any]] = {name: [] for name in (*labels, *axes, "value")}
    for names, values in arrays:
        array = np.asarray(values)
        for name in labels:
            columns[name].append(np.full(array.size, names[name]))
        for name, index in zip(axes, np.indices(array.shape), strict=True):
            columns[name].append(index.ravel())
        columns["value"].append(array.ravel())
    return {name: np.concatenate(parts) for name, parts in columns.items()}
