"""What the `data` of a run names: directories, a mixture of them, a stream, or the text that ships with spherelm."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from spherelm.data.corpus import shipped_directory
from spherelm.data.hub import HubRequest
from spherelm.data.mixture import shares
from spherelm.data.pairs import holds_pairs, read_pairs_manifest
from spherelm.data.shards import open_tokens
from spherelm.data.tokenizer import load_tokenizer
from spherelm.errors import UserError

_WEIGHTED = re.compile(r"(.+)=(\d+\.?\d*|\.\d+)")

OF_STREAMS = {
    "column": "column= in --data",
    "config": "config= in --data",
    "other files": "make a data directory of others with spherelm data prepare",
}
"""How a stream is asked for what `data.hub.FLAGS` ask for."""


@dataclass(frozen=True)
class StreamSpec:
    """What `stream:NAME,key=value,...` says. val: the part of the documents that is held out, or a file of validation text."""

    request: HubRequest
    tokenizer: str = "default"
    val: str = "0.01"


def stream_spec(data: str) -> StreamSpec | None:
    """The stream that a run's `data` names, `None` if it names none; raises `ValueError` naming an unknown key."""
    if not data.startswith("stream:"):
        return None
    name, *pairs = data.removeprefix("stream:").split(",")
    given = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    known = {"config", "split", "column", "limit", "tokenizer", "val"}
    if not name or len(given) < len(pairs) or given.keys() - known:
        raise UserError(f"{data!r} is no stream: write stream:NAME,KEY=VALUE,... with keys {', '.join(sorted(known))}")
    limit = given.pop("limit", None)
    if limit is not None and not limit.isdecimal():
        raise UserError(f"{data!r}: limit={limit} is no number of rows")
    own = {key: given.pop(key) for key in ("tokenizer", "val") if key in given}
    return StreamSpec(HubRequest(name, **given, limit=None if limit is None else int(limit)), **own)


def sources_of(data: str | None) -> dict[Path, Fraction]:
    """The data directories that a run's `data` names, with their weights, which sum to 1.

    `None` is the text that ships with spherelm, prepared on first use; `DIR=WEIGHT,DIR=WEIGHT,...` a mixture, unless a
    directory is called so; all else is one directory.
    """
    if data is None:
        return {shipped_directory(): Fraction(1)}
    found = [_WEIGHTED.fullmatch(part) for part in data.split(",")]
    if Path(data).is_dir() or not all(found):
        named = [match[1] if match else part for match, part in zip(found, data.split(","), strict=True)]
        if len(named) > 1 and not Path(data).is_dir() and all(Path(part).is_dir() for part in named):
            weighted = ",".join(f"{part}=1" for part in named)
            raise UserError(f"{data!r} names several directories: give each its weight, such as --data {weighted}")
        return {Path(data): Fraction(1)}
    pairs = [(Path(match[1]), Fraction(match[2])) for match in found if match]
    if len(dict(pairs)) < len(pairs):
        raise UserError(f"{data!r} names a directory twice: add its weights up")
    whole = shares([weight for _, weight in pairs])
    return {path: Fraction(part, sum(whole)) for (path, _), part in zip(pairs, whole, strict=True)}


def proportions(data: str | None) -> tuple[float | str | Fraction, ...]:
    """What a run's `data` says that is not in the identity of its texts: the weights of a mixture, a stream's held-out part.

    Two `data` with equal identities and equal proportions are the same text, wherever it lies.
    """
    spec = stream_spec(data or "")
    if spec is None:
        return (Fraction(1),) if data is None else tuple(sources_of(data).values())
    try:
        return (float(spec.val),)
    except ValueError:
        return ("a file",)


def vocabulary_size(data: str | None) -> int:
    """The number of token ids in the data that a run's `data` names."""
    spec = stream_spec(data or "")
    if spec is not None:
        return load_tokenizer(spec.tokenizer).vocab_size
    if data is not None and holds_pairs(Path(data)):
        size: int = read_pairs_manifest(Path(data))["tokenizer"]["vocab_size"]
        return size
    return open_tokens(next(iter(sources_of(data))), "train").vocab_size
