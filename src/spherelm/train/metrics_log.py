"""Writing `metrics.jsonl`, and telling the sinks what is in it."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spherelm.errors import StorageError
from spherelm.runs.metrics import read_metrics
from spherelm.train.sinks import Sink, numbers


class MetricsLog:
    """Appends to a run's `metrics.jsonl`, each line whole.

    Opening it for a run that continues at `step` drops what lies beyond (updates that will be made again)
    and any torn line.
    sinks: get every record once, after it is in the file; also those that are dropped from the file on resume.
    present: the records of that step by kind.
    """

    def __init__(self, path: Path, step: int, sinks: Sequence[Sink] = ()) -> None:
        records = read_metrics(path) if (step or sinks) and path.exists() else []
        kept = [record for record in records if step and record["step"] <= step]
        self.present: dict[str, dict[str, Any]] = {r["kind"]: r for r in kept if r["step"] == step}
        replacement = path.with_suffix(".tmp")
        replacement.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        os.replace(replacement, path)
        # Without a buffer: a line is written by one call, and what a full disk refuses is not tried again at exit.
        self.path, self._file, self._sinks = path, path.open("ab", buffering=0), sinks
        self._told = {(record["kind"], record["step"]) for record in records[len(kept) :]}
        for record in kept:
            self._tell(record, [sink for sink in sinks if sink.new])

    def write(self, kind: str, **values: Any) -> None:
        """Append one record; raises `OSError` naming the file if it cannot be written.

        kind: "train", "val" or "eval"; "skip" for an update that was left out, "stop" for one that ended the run.
        """
        record = {"kind": kind, **values}
        line = (json.dumps(record) + "\n").encode()
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise StorageError(f"could not write {self.path} ({error}): free some space and --resume") from error
        told = (kind, values.get("step")) in self._told
        self._tell(record, [sink for sink in self._sinks if sink.new or not told])

    def _tell(self, record: dict[str, Any], sinks: Sequence[Sink]) -> None:
        for sink in sinks:
            sink.write(record["step"], numbers(record))

    def flush(self) -> None:
        """Have every record on the disk, before a checkpoint says that they are there."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush to the disk and close, the sinks too."""
        os.fsync(self._file.fileno())
        self._file.close()
        for sink in self._sinks:
            sink.close()


class NoLog:
    """The stand-in for `MetricsLog` in all processes but the first."""

    def __init__(self) -> None:
        self.present: dict[str, dict[str, Any]] = {}

    def write(self, kind: str, **values: Any) -> None:
        """Nothing."""

    def flush(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""
