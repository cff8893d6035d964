"""Exact deduplication: which documents were seen before, by 16 bytes of their sha256.

Two different documents among n share 16 bytes with a probability of about n^2 / 2^129: 1e-21 for a billion of them.
16 bytes of memory are held a document that was kept, up to three times that for a moment. It is the parent process that
decides, in the order of the inputs, so the result does not depend on the workers.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from spherelm.data.encoding import Encoded
from spherelm.data.shards import ShardError

DIGEST_BYTES = 16
_KIND = np.dtype(f"S{DIGEST_BYTES}")


class SeenDigests:
    """A growing set of digests as sorted runs, each more than twice as long as the next, so that few are searched."""

    def __init__(self, digests: npt.NDArray[Any] | None = None) -> None:
        self._runs: list[npt.NDArray[Any]] = []
        if digests is not None and digests.size:
            self._runs.append(np.sort(digests))

    def add(self, digests: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Add digests [n] and return bool [n]: True where a digest is neither in the set nor earlier in `digests`."""
        values, first = np.unique(digests, return_index=True)
        known = np.zeros(values.size, bool)
        for run in self._runs:
            place = np.minimum(np.searchsorted(run, values), run.size - 1)
            known |= run[place] == values
        fresh = np.zeros(digests.size, bool)
        fresh[first[~known]] = True
        if not known.all():
            self._runs.append(values[~known])
        while len(self._runs) > 1 and self._runs[-2].size <= 2 * self._runs[-1].size:
            last = self._runs.pop()
            self._runs[-1] = np.sort(np.concatenate([self._runs[-1], last]), kind="stable")
        return fresh


class Deduplicator:
    """Drops documents seen before from encoded blocks, in order.

    A `flush` appends the digests of the documents kept since the last one to the file `path`. `state`: what `state()`
    gave after a `flush`, to continue from there. Raises ShardError where the file is not what it was.
    """

    def __init__(self, path: Path, end_token: int, state: dict[str, Any] | None = None) -> None:
        self._end_token = end_token
        self._kept = int(state["kept"]) if state else 0
        self._dropping = bool(state["dropping"]) if state else False
        before = np.zeros(0, _KIND)
        if state is not None:
            size = self._kept * DIGEST_BYTES
            if not path.is_file() or path.stat().st_size < size:
                raise ShardError.about(path, "changed since the interruption", f"delete {path.parent} to start over")
            os.truncate(path, size)
            before = np.fromfile(path, _KIND)
        else:
            path.unlink(missing_ok=True)
        self._seen = SeenDigests(before)
        self._path = path
        self._pending: list[bytes] = []

    def filter(self, encoded: Encoded) -> tuple[Encoded, int]:
        """`encoded` without the documents seen before, and how many whole documents that leaves out."""
        if not encoded.starts:  # a later piece of a document on which its first decided
            return (_emptied(encoded), int(encoded.ends)) if self._dropping else (encoded, 0)
        dropped, ids, text_bytes = 0, dict(encoded.ids), dict(encoded.text_bytes)
        for split, digests in encoded.digests.items():
            fresh = self._fresh(digests)
            dropped += int(fresh.size - fresh.sum())
            if not encoded.ends:
                self._dropping = not bool(fresh[0])
            if not fresh.all():
                ids[split] = _selected(ids[split], fresh, self._end_token)
                text_bytes[split] = int(np.array(encoded.sizes[split])[fresh].sum())
        dropped = dropped if encoded.ends else 0
        return replace(
            encoded, ids={split: part for split, part in ids.items() if part.size}, text_bytes=text_bytes
        ), dropped

    def _fresh(self, digests: list[bytes]) -> npt.NDArray[np.bool_]:
        batch = np.frombuffer(b"".join(digests), _KIND)
        fresh = self._seen.add(batch)
        self._pending.append(batch[fresh].tobytes())
        self._kept += int(fresh.sum())
        return fresh

    def flush(self) -> None:
        """Bring the digests so far to the disk."""
        with open(self._path, "ab") as file:
            file.writelines(self._pending)
            file.flush()
            os.fsync(file.fileno())
        self._pending.clear()

    def state(self) -> dict[str, Any]:
        """The state (JSON) that another deduplicator needs to continue from here."""
        return {"kept": self._kept, "dropping": self._dropping}


def _emptied(encoded: Encoded) -> Encoded:
    return replace(encoded, ids={}, text_bytes={})


def _selected(ids: npt.NDArray[Any], fresh: npt.NDArray[np.bool_], end_token: int) -> npt.NDArray[Any]:
    """The ids of the documents that are `fresh`; each document but perhaps the last ends with the end token."""
    if fresh.size == 1:
        return ids if fresh[0] else ids[:0]
    ends = np.flatnonzero(ids == end_token) + 1
    return ids[np.repeat(fresh, np.diff(ends, prepend=0))]
