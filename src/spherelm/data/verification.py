"""Whether a data directory still holds what was prepared: every file read and compared with its sha256."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from spherelm.data.output import verify_tokens
from spherelm.data.pairs import holds_pairs, open_pairs, read_pairs_manifest
from spherelm.data.shards import SPLITS, Shard, ShardError, Tokens
from spherelm.data.tokenizer import load_tokenizer

CHEAP_BYTES = 1 << 28
"""Texts up to this size are read whole in half a second or so."""


def verify(directory: Path) -> dict[str, int]:
    """Read all of a data directory; the tokens of each split, of pairs those of both sides.

    Raises ValueError (ShardError) or FileNotFoundError that names the first file that is not what it was.
    """
    if not holds_pairs(directory):
        return {split: counts["tokens"] for split, counts in verify_tokens(directory)["splits"].items()}
    manifest = read_pairs_manifest(directory)
    if load_tokenizer(directory).fingerprint != manifest["tokenizer"]["fingerprint"]:
        raise ShardError.about(directory, "its tokenizer is not the one its pairs were made with")
    pairs = {split: open_pairs(directory, split) for split in SPLITS}
    return {split: len(found.source) + len(found.target) for split, found in pairs.items()}


def verify_where_cheap(texts: Sequence[Tokens], since: float, part: int = 0, parts: int = 1) -> None:
    """Verify `texts` where that takes no time, and whatever of them was written after the time `since`
    (seconds, as of files).

    part, parts: of several processes each verifies its part. Raises ShardError naming the first shard that differs.
    """
    shards = [shard for text in texts for shard in text.shards]
    is_small = sum(shard.header.body_bytes for shard in shards) <= CHEAP_BYTES

    def is_due(shard: Shard) -> bool:
        return is_small or shard.path.stat().st_mtime > since

    for shard in list(filter(is_due, shards))[part::parts]:
        shard.verify()
