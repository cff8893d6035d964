"""`metrics.jsonl`: one JSON object a line, the record from which every report is computed."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any


class MetricsLog:
    """Appends to a run's `metrics.jsonl`, each line whole.

    Opening it for a run that continues at `step` drops what lies beyond (updates that will be made again) and any torn line.
    """

    def __init__(self, path: Path, step: int) -> None:
        kept = [record for record in read_metrics(path) if record["step"] <= step] if step and path.exists() else []
        replacement = path.with_suffix(".tmp")
        replacement.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        os.replace(replacement, path)
        # Without a buffer: a line is written by one call, and what a full disk refuses is not tried again at exit.
        self.path, self._file = path, path.open("ab", buffering=0)

    def write(self, kind: str, **values: Any) -> None:
        """Append one record: `kind` is "train" or "val". Raises `OSError` naming the file if it cannot be written."""
        line = (json.dumps({"kind": kind, **values}) + "\n").encode()
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise OSError(f"could not write {self.path} ({error}): free some space and --resume") from error

    def close(self) -> None:
        """Flush to the disk and close."""
        os.fsync(self._file.fileno())
        self._file.close()


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
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
    return records
