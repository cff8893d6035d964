"""`metrics.jsonl`: one JSON object a line, the record from which every report is computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spherelm.errors import UserError

MEASURED = ("seconds", "tokens_per_second", "mfu", "memory_mb", "threads")
"""The fields of a record in which two runs that are otherwise equal differ."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every record of a `metrics.jsonl`; a last line that was cut off is left out, any other damage raises `ValueError`."""
    lines = path.read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise UserError(f"{path}, line {number} is not JSON: {error}") from error
    return records
