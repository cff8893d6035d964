"""Tokens of one split into a row of shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spherelm.data.shards import Ids, Shard, ShardError, ShardWriter, Split
from spherelm.data.tokenizer import Tokenizer


class SplitWriter:
    """The shards of one split, one open at a time; a shard is closed at the first piece
    that brings it to `shard_tokens`.

    `state`: what `state()` gave, to continue from there. Raises ShardError where the files are not what they were.
    """

    def __init__(
        self, directory: Path, split: Split, tokenizer: Tokenizer, shard_tokens: int, state: dict[str, Any] | None
    ) -> None:
        self._directory = directory
        self._split = split
        self._tokenizer = tokenizer
        self._shard_tokens = shard_tokens
        self.shards: list[dict[str, Any]] = list(state["shards"]) if state else []
        self._in_document = bool(state["in_document"]) if state else False
        self._open: ShardWriter | None = None
        for entry in self.shards:
            _verify_entry(directory, entry)
        if state and state["open"]:
            self._open = ShardWriter(
                directory / state["open"]["file"], tokenizer, state["open"]["starts_inside"], state["open"]
            )

    def append(self, ids: Ids, text_bytes: int) -> None:
        if self._open is None:
            path = self._directory / f"{self._split}-{len(self.shards):05d}.bin"
            self._open = ShardWriter(path, self._tokenizer, self._in_document)
        self._open.append(ids, text_bytes)
        if self._open.tokens >= self._shard_tokens:
            self.finish()

    def finish(self) -> None:
        """Close the open shard, if there is one."""
        if self._open is None:
            return
        header = self._open.finish()
        self._in_document = self._open.in_document
        entry = {"file": self._open.path.name, "sha256": header.body_sha256, "bytes": header.text_bytes}
        self.shards.append({**entry, "tokens": header.tokens, "documents": header.documents})
        self._open = None

    def state(self) -> dict[str, Any]:
        """The state that another writer needs to continue from here; everything before it is on disk."""
        if self._open is not None:
            self._open.flush()
        open_state = self._open.state() if self._open else None
        return {"shards": self.shards, "open": open_state, "in_document": self._in_document}

    def close(self) -> None:
        if self._open is not None:
            self._open.close()


def _verify_entry(directory: Path, entry: dict[str, Any]) -> None:
    shard = Shard(directory / entry["file"])
    shard.verify()
    if shard.header.body_sha256 != entry["sha256"]:
        raise ShardError.about(shard.path, "changed since the interruption", f"delete {directory} to start over")
