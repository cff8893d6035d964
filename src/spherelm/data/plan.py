"""The plan of one `prepare`: its inputs by content, its tokenizer and its options, all checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from spherelm.counting import counted
from spherelm.data.compression import sha256_of
from spherelm.data.documents import TEXTS, WHOLE_TEXT, Span, files_left_out, format_of, input_files, split_place
from spherelm.data.hub import HubRequest, HubText
from spherelm.data.rows import RowSettings
from spherelm.data.shards import Split
from spherelm.data.tokenizer import Tokenizer, load_tokenizer
from spherelm.errors import UserError
from spherelm.progress import Bar

FORMAT = 2  # of what prepare writes for given inputs: raise it when the same inputs would give other shards
SHARD_TOKENS = 1 << 27  # a shard is closed at the first block that brings it to this many tokens


@dataclass(frozen=True)
class Source:
    """One input file, or a stream (no size, the sha256 of its identity); `split` None: each document's hash decides.

    `span`: the characters of a .txt that are read. `named`: whether the user gave the file's own name, not that of a
    directory or a pattern.
    """

    path: Path
    split: Split | None
    size: int
    sha256: str
    stream: HubText | None = None
    span: Span = WHOLE_TEXT
    named: bool = True

    def parameters(self) -> dict[str, Any]:
        """The identity of this input, wherever it is stored (JSON)."""
        if self.stream is not None:
            return {"format": "stream", "dataset": self.stream.identity, "split": self.split}
        span = {} if self.span == WHOLE_TEXT else {"characters": list(self.span)}
        return {"format": format_of(self.path), "sha256": self.sha256, "split": self.split, **span}


@dataclass(frozen=True)
class Plan:
    """All that decides what is written. `left_out`: files of directories and patterns that are not read, by reason."""

    sources: tuple[Source, ...]
    tokenizer: Tokenizer
    val_fraction: float
    shard_tokens: int
    deduplicate: bool
    rows: RowSettings = RowSettings()
    left_out: Mapping[str, int] = field(default_factory=dict)

    def needs_digest(self, source: Source) -> bool:
        """Whether a document's hash is needed before it is read whole."""
        return source.split is None or self.deduplicate

    def parameters(self) -> dict[str, Any]:
        """The settings that two runs must share to write the same shards (JSON)."""
        return {
            "format": FORMAT,
            "inputs": [source.parameters() for source in self.sources],
            "shard_tokens": self.shard_tokens,
            "tokenizer": self.tokenizer.fingerprint,
            "val_fraction": self.val_fraction,
            **({"deduplicate": True} if self.deduplicate else {}),
            **({"field": self.rows.field} if self.rows.field != "text" else {}),
            **({"skip_bad_rows": True} if self.rows.skip_bad else {}),
        }


def make_plan(
    inputs: list[Path],
    val: list[Path],
    hub: HubRequest | None,
    tokenizer: str | Path,
    val_fraction: float,
    workers: int,
    shard_tokens: int,
    deduplicate: bool,
    rows: RowSettings,
    progress: bool,
) -> Plan:
    """The plan of `prepare(...)` with these arguments. Raises ValueError or FileNotFoundError for what cannot be."""
    if not inputs and hub is None:
        raise UserError("no input files: give at least one with --input, or a dataset with --hf")
    if not 0.0 <= val_fraction < 1.0:
        raise UserError(f"val fraction {val_fraction} is not within 0 (none) to below 1")
    if val and val_fraction:
        raise UserError("both --val and --val-fraction given: choose one")
    if workers < 1 or shard_tokens < 1:
        raise UserError(
            f"{counted(workers, 'worker')} and {counted(shard_tokens, 'token')} a shard: both must be at least 1"
        )
    given = [
        [(file, file == path) for path in map(Path, paths) for file in input_files(path)] for paths in (inputs, val)
    ]
    left_out = sum((files_left_out(Path(path)) for path in (*inputs, *val)), Counter[str]())
    loaded = load_tokenizer(tokenizer)
    split: Split | None = None if val_fraction else "train"
    targets: tuple[Split | None, Split] = (split, "val")
    sizes = sum(file.stat().st_size for files in given for file, _ in files)
    with Bar("hashing", sizes, unit="B", show=bool(progress and sizes), leave=False) as bar:
        train, held_out = (
            [_source(file, to, bar, named) for file, named in files] for files, to in zip(given, targets, strict=True)
        )
    trained_on = {source.sha256: source.path for source in train}
    if hub is not None:
        stream = HubText(hub, rows.skip_bad)
        train.append(Source(Path(hub.name), split, 0, stream.fingerprint, stream))
        trained_on |= stream.local_files
    elif val_fraction and len(train) == 1 and format_of(train[0].path) in TEXTS:
        place = split_place(train[0].path, val_fraction)
        train = [replace(train[0], split="train", span=(0, place)), replace(train[0], split="val", span=(place, None))]
    for source in held_out:
        check_held_out(source.path, source.sha256, trained_on)
    return Plan((*train, *held_out), loaded, val_fraction, shard_tokens, deduplicate, rows, left_out)


def check_held_out(path: Path, sha256: str, trained_on: Mapping[str, Path]) -> None:
    """`ValueError` if the file of validation text `path` is one of the training text,
    whose files are given by their sha256.
    """
    if sha256 in trained_on:
        raise UserError(f"{path} is also a training input ({trained_on[sha256]}): remove one")


def _source(path: Path, split: Split | None, bar: Bar, named: bool) -> Source:
    return Source(path, split, path.stat().st_size, sha256_of(path, bar.update), named=named)
