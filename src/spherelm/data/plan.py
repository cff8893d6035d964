"""What one `prepare` is to write: its inputs by content, its tokenizer, its options, all checked."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from spherelm.data.documents import check_input, format_of
from spherelm.data.shards import Split
from spherelm.data.tokenizer import Tokenizer, load_tokenizer

FORMAT = 1  # of what prepare writes for given inputs: raise it when the same inputs would give other shards
SHARD_TOKENS = 1 << 27  # a shard is closed at the first block that brings it to this many tokens


@dataclass(frozen=True)
class Source:
    """One input file; `split` None means that each document's hash decides."""

    path: Path
    split: Split | None
    size: int
    sha256: str


@dataclass(frozen=True)
class Plan:
    """All that decides what is written."""

    sources: tuple[Source, ...]
    tokenizer: Tokenizer
    val_fraction: float
    shard_tokens: int

    def parameters(self) -> dict[str, Any]:
        """What two runs must share to write the same shards (JSON)."""
        inputs = [{"format": format_of(s.path), "sha256": s.sha256, "split": s.split} for s in self.sources]
        return {
            "format": FORMAT,
            "inputs": inputs,
            "shard_tokens": self.shard_tokens,
            "tokenizer": self.tokenizer.fingerprint,
            "val_fraction": self.val_fraction,
        }


def make_plan(
    inputs: list[Path],
    val: list[Path],
    tokenizer: str | Path,
    val_fraction: float,
    workers: int,
    shard_tokens: int,
    progress: bool,
) -> Plan:
    """The plan of `prepare(...)` with these arguments. Raises ValueError or FileNotFoundError for what cannot be."""
    if not inputs:
        raise ValueError("no input files: give at least one with --input")
    if not 0.0 <= val_fraction < 1.0:
        raise ValueError(f"val fraction {val_fraction} is not within 0 (none) to below 1")
    if val and val_fraction:
        raise ValueError("both --val and --val-fraction given: choose one")
    if workers < 1 or shard_tokens < 1:
        raise ValueError(f"{workers} workers and {shard_tokens} tokens a shard: both must be at least 1")
    for path in [*inputs, *val]:
        check_input(Path(path))
    loaded = load_tokenizer(tokenizer)
    split: Split | None = None if val_fraction else "train"
    sizes = sum(Path(path).stat().st_size for path in [*inputs, *val])
    with tqdm(total=sizes, unit="B", unit_scale=True, desc="hashing", disable=not progress, leave=False) as bar:
        sources = [_source(Path(path), split, bar) for path in inputs] + [_source(Path(p), "val", bar) for p in val]
    trained_on = {source.sha256: source.path for source in sources[: len(inputs)]}
    for source in sources[len(inputs) :]:
        if source.sha256 in trained_on:
            raise ValueError(f"{source.path} is also a training input ({trained_on[source.sha256]}): remove one")
    return Plan(tuple(sources), loaded, val_fraction, shard_tokens)


def _source(path: Path, split: Split | None, bar: Any) -> Source:
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while data := file.read(1 << 22):
            digest.update(data)
            size += len(data)
            bar.update(len(data))
    return Source(path, split, size, digest.hexdigest())
