"""Token shards: one binary file each, read by memory map, and a data directory of them as one row of tokens.

Layout of a shard, all numbers little-endian::

    0      8  magic b"\\x93SPHERE\\n"
    8      4  version (uint32)
    12     4  length of the JSON header (uint32)
    16    32  sha256 of the JSON header
    48     .  JSON header, then zeros up to 4096
    4096   .  body: the token ids, uint16 if vocab_size <= 65536, else uint32; zeros up to a multiple of 8
    .      .  table: where each document that starts here starts, in tokens from the body's start (int64)

The header holds the sha256 of body and table, so its own checksum covers the file. Opening checks everything but the
body's hash, which `Shard.verify` reads.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from spherelm.counting import counted
from spherelm.data.tokenizer import Tokenizer
from spherelm.errors import NotFoundError, UserError, beside

MAGIC = b"\x93SPHERE\n"
VERSION = 1
BODY_START = 4096
MANIFEST_FILE = "manifest.json"
PARTIAL_DIRECTORY = ".partial"
_PREAMBLE = struct.Struct("<8sII32s")
_READ_BYTES = 1 << 22

Split = Literal["train", "val"]
SPLITS: tuple[Split, Split] = ("train", "val")
Ids = npt.NDArray[Any]


class ShardError(UserError):
    """A shard or data directory that cannot be used; the message names the file, what is wrong, and the fix."""

    def __init__(self, message: str) -> None:
        super().__init__(message)

    @classmethod
    def about(
        cls, path: Path, problem: str, fix: str = "delete the directory and prepare the data again"
    ) -> ShardError:
        return cls(f"{path}: {problem}; {fix}")


@dataclass(frozen=True)
class ShardHeader:
    """The header of a shard. `text_bytes`: UTF-8 bytes of the encoded text, end tokens not counted."""

    dtype: str
    vocab_size: int
    eos_id: int
    tokenizer_fingerprint: str
    tokens: int
    documents: int
    text_bytes: int
    body_sha256: str
    table_sha256: str

    @property
    def body_bytes(self) -> int:
        return self.tokens * np.dtype(self.dtype).itemsize

    @property
    def table_start(self) -> int:
        return BODY_START + -(-self.body_bytes // 8) * 8


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 where every id fits, else uint32 (little-endian)."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class ShardWriter:
    """Writes one shard piece by piece.

    The body is written in place and the header last, so an unfinished shard is never taken for a good one.
    `in_document`: whether the shard starts inside a document that began in the one before. `state`: what `state()`
    gave after a `flush`, to continue from there after a kill: what was written later is cut off, and ShardError is
    raised when the rest is not what it was.
    """

    def __init__(
        self, path: Path, tokenizer: Tokenizer, in_document: bool = False, state: dict[str, Any] | None = None
    ) -> None:
        self.path = path
        self.tokens = 0
        self.text_bytes = 0
        self.in_document = in_document
        self._starts_inside = in_document
        self._vocab_size = tokenizer.vocab_size
        self._eos_id = tokenizer.eos_id
        self._tokenizer_fingerprint = tokenizer.fingerprint
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._hash = hashlib.sha256()
        self._starts: list[npt.NDArray[np.int64]] = []
        if state is not None and not path.is_file():
            raise self._changed()
        self._file = open(path, "w+b" if state is None else "r+b")  # noqa: SIM115 -- closed by finish or close
        if state is None:
            self._file.write(b"\0" * BODY_START)
        else:
            self._take_up(state)

    def append(self, ids: Sequence[int] | Ids, text_bytes: int) -> None:
        """Add ids; each end token among them ends a document. Raises ShardError for an id outside the vocabulary."""
        wide = np.asarray(ids, dtype=np.int64)
        if wide.size and not 0 <= int(wide.min()) <= int(wide.max()) < self._vocab_size:
            raise ShardError.about(
                self.path,
                f"token id {int(wide.min() if wide.min() < 0 else wide.max())} outside the vocabulary of "
                f"{self._vocab_size}",
                "use the tokenizer that made these ids",
            )
        body = wide.astype(self._dtype)
        self._file.write(body.tobytes())
        self._account(body)
        self.text_bytes += text_bytes

    def _account(self, body: Ids) -> None:
        """Count `body`, already in the file, and note where documents start in it."""
        if not body.size:
            return
        self._hash.update(body.tobytes())
        after_end = np.flatnonzero(body == self._eos_id).astype(np.int64) + 1
        starts = after_end[after_end < body.size]
        if not self.in_document:
            starts = np.concatenate([np.zeros(1, np.int64), starts])
        self._starts.append(starts + self.tokens)
        self.tokens += body.size
        self.in_document = int(body[-1]) != self._eos_id

    def flush(self) -> None:
        """Bring what was appended to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def state(self) -> dict[str, Any]:
        """The state (JSON) that another writer needs to continue from here."""
        return {
            "file": self.path.name,
            "tokens": self.tokens,
            "text_bytes": self.text_bytes,
            "starts_inside": self._starts_inside,
            "sha256": self._hash.hexdigest(),
        }

    def _take_up(self, state: dict[str, Any]) -> None:
        """Count what an earlier writer left in the file and continue after it."""
        self._file.truncate(BODY_START + int(state["tokens"]) * self._dtype.itemsize)
        self._file.seek(BODY_START)
        while block := self._file.read(_READ_BYTES):
            self._account(np.frombuffer(block, self._dtype))
        self.text_bytes = int(state["text_bytes"])
        if self.state() != state:
            self.close()
            raise self._changed()

    def _changed(self) -> ShardError:
        return ShardError.about(self.path, "changed since the interruption", f"delete {self.path.parent} to start over")

    def finish(self) -> ShardHeader:
        """Write table and header, bring all to the disk, close. Raises ShardError for a shard without tokens."""
        if not self.tokens:
            raise ShardError.about(self.path, "would hold no tokens", "give it at least one document")
        table = np.concatenate([np.zeros(0, np.int64), *self._starts]).astype("<i8")
        header = ShardHeader(
            dtype=self._dtype.name,
            vocab_size=self._vocab_size,
            eos_id=self._eos_id,
            tokenizer_fingerprint=self._tokenizer_fingerprint,
            tokens=self.tokens,
            documents=int(table.size),
            text_bytes=self.text_bytes,
            body_sha256=self._hash.hexdigest(),
            table_sha256=hashlib.sha256(table.tobytes()).hexdigest(),
        )
        self._file.write(b"\0" * (header.table_start - BODY_START - header.body_bytes) + table.tobytes())
        text = json.dumps(asdict(header), sort_keys=True).encode()
        self._file.seek(0)
        self._file.write(_PREAMBLE.pack(MAGIC, VERSION, len(text), hashlib.sha256(text).digest()) + text)
        self.flush()
        self.close()
        return header

    def close(self) -> None:
        """Close the file as it is (an unfinished shard stays without a header)."""
        self._file.close()


class Shard:
    """One shard, open for reading. Raises ShardError for a file that is not a whole, undamaged shard.

    `tokens`: the ids as a read-only memory map.
    """

    tokens: Ids

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise ShardError.about(path, "is missing", "restore it, or delete the directory and prepare the data again")
        self.header = _read_header(path)
        header, size = self.header, path.stat().st_size
        expected = header.table_start + 8 * header.documents
        if size != expected:
            problem = "truncated" if size < expected else "longer than its header says"
            raise ShardError.about(path, f"{problem} ({counted(size, 'byte')} instead of {expected:,})")
        self.tokens = mapped(path, np.dtype(header.dtype).newbyteorder("<"), header.tokens, BODY_START)
        self._table = _read_table(path, header)

    @property
    def document_starts(self) -> npt.NDArray[np.int64]:
        """Where documents start, int64, in tokens from the shard's start."""
        return self._table

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the encoded text."""
        return self.header.text_bytes

    def verify(self) -> None:
        """Read the whole body and compare its sha256 and ids with the header. Raises ShardError if they differ."""
        digest, largest, left = hashlib.sha256(), 0, self.header.body_bytes
        with open(self.path, "rb") as file:  # not by the map, which is for single windows
            file.seek(BODY_START)
            while data := file.read(min(left, _READ_BYTES)):
                digest.update(data)
                largest = max(largest, int(np.frombuffer(data, self.tokens.dtype).max()))
                left -= len(data)
        if digest.hexdigest() != self.header.body_sha256:
            raise ShardError.about(self.path, "damaged: the tokens do not match the sha256 in the header")
        if largest >= self.header.vocab_size:
            raise ShardError.about(self.path, f"token id {largest} >= vocab_size {self.header.vocab_size}")


def mapped(path: Path, dtype: np.dtype[Any], count: int, start: int) -> Ids:
    """`count` numbers of a file from its byte `start` on, as a read-only memory map."""
    with open(path, "rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):  # else a system may read megabytes around each window (8 of them where measured)
        content.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(content, dtype, count, start)


def _read_header(path: Path) -> ShardHeader:
    with open(path, "rb") as file:
        start = file.read(BODY_START)
    if len(start) < BODY_START or not start.startswith(MAGIC):
        raise ShardError.about(path, "not a token shard, or its header is damaged")
    _, version, length, checksum = _PREAMBLE.unpack_from(start)
    if version != VERSION:
        raise ShardError.about(path, f"shard version {version}, this spherelm reads version {VERSION}")
    text = start[_PREAMBLE.size : _PREAMBLE.size + length]
    if len(text) != length or hashlib.sha256(text).digest() != checksum:
        raise ShardError.about(path, "damaged header (its checksum does not match)")
    content = json.loads(text)
    if set(content) != {field.name for field in fields(ShardHeader)} or content["dtype"] not in {"uint16", "uint32"}:
        raise ShardError.about(path, "header with unknown fields")
    return ShardHeader(**content)


def _read_table(path: Path, header: ShardHeader) -> npt.NDArray[np.int64]:
    with open(path, "rb") as file:
        file.seek(header.table_start)
        data = file.read(8 * header.documents)
    if hashlib.sha256(data).hexdigest() != header.table_sha256:
        raise ShardError.about(path, "damaged document table (its checksum does not match)")
    return np.frombuffer(data, "<i8")


class Tokens:
    """All tokens of one split of a data directory, as one row over its shards, read by memory map.

    `bytes_total`: UTF-8 bytes of the encoded text, so bits per byte = nats per token * len / (ln 2 * bytes_total).
    `fingerprint`: sha256 over the shards' hashes. Made by `open_tokens`.
    """

    def __init__(self, shards: Sequence[Shard], directory: Path, split: Split) -> None:
        first = shards[0].header
        self.directory = directory
        self.split = split
        self.vocab_size = first.vocab_size
        self.eos_id = first.eos_id
        self.tokenizer_fingerprint = first.tokenizer_fingerprint
        for shard in shards:
            if shard.header.tokenizer_fingerprint != first.tokenizer_fingerprint:
                raise ShardError.about(shard.path, f"made with another tokenizer than {shards[0].path.name}")
        self.fingerprint = fingerprint_of(shard.header for shard in shards)
        self.shards = list(shards)
        self._ends = np.cumsum([shard.header.tokens for shard in shards], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __repr__(self) -> str:
        return f"Tokens({str(self.directory)!r}, {self.split!r}, {len(self)} tokens, vocab_size={self.vocab_size})"

    @cached_property
    def bytes_total(self) -> int:
        """UTF-8 bytes of the encoded text."""
        return sum(shard.text_bytes for shard in self.shards)

    @cached_property
    def document_offsets(self) -> npt.NDArray[np.int64]:
        """Where each document starts, in tokens, ascending (8 bytes of memory a document)."""
        begins = [0, *self._ends[:-1].tolist()]
        return np.concatenate([s.document_starts + begin for s, begin in zip(self.shards, begins, strict=True)])

    def read(self, start: int, length: int) -> npt.NDArray[np.int64]:
        """Ids `start` to `start + length`, int64 `[length]`.

        Raises IndexError outside the text and ShardError for an id that is not in the vocabulary (a damaged body).
        """
        if start < 0 or length < 0 or start + length > len(self):
            raise IndexError(f"tokens {start} to {start + length} are outside 0 to {len(self)}")
        out = np.empty(length, np.int64)
        done, index = 0, int(np.searchsorted(self._ends, start, side="right"))
        while done < length:
            shard = self.shards[index]
            begin = start + done - (int(self._ends[index]) - shard.header.tokens)
            part = shard.tokens[begin : begin + length - done]
            out[done : done + part.size] = part
            done, index = done + part.size, index + 1
        if length and int(out.view(np.uint64).max()) >= self.vocab_size:  # so a negative one is too large as well
            raise ShardError.about(
                self.shards[index - 1].path, f"holds token id {out.max()} >= vocab_size {self.vocab_size}"
            )
        return out

    def verify(self) -> None:
        """Read every shard whole and compare it with its hash. Raises ShardError naming the first that differs."""
        for shard in self.shards:
            shard.verify()


def fingerprint_of(headers: Iterable[ShardHeader]) -> str:
    """sha256 (hex) over the hashes of these shards' bodies, in order."""
    return hashlib.sha256("".join(header.body_sha256 for header in headers).encode()).hexdigest()


def open_tokens(directory: Path, split: Split) -> Tokens:
    """The tokens of `split` ("train" or "val") in a directory that `spherelm data prepare` wrote.

    Checks sizes, header and table checksums, and the manifest; `Tokens.verify` checks the bodies too.
    Raises ShardError for a damaged directory, FileNotFoundError for a missing one, ValueError for a missing split.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    if split not in manifest["splits"]:
        raise UserError(f"{directory} has no {split!r} split; prepare it with --val FILE... or --val-fraction F")
    shards = []
    for entry in manifest["splits"][split]["shards"]:
        shard = Shard(directory / entry["file"])
        if (shard.header.body_sha256, shard.header.tokens) != (entry["sha256"], entry["tokens"]):
            raise ShardError.about(shard.path, f"not the shard that {MANIFEST_FILE} describes")
        shards.append(shard)
    return Tokens(shards, directory, split)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a prepared data directory. Raises ShardError or FileNotFoundError as `open_tokens`."""
    path = directory / MANIFEST_FILE
    if not directory.is_dir():
        raise NotFoundError(
            f"no data directory {directory}{beside(directory)}: make it with spherelm data prepare --out {directory}"
        )
    if not path.is_file() and (directory / PARTIAL_DIRECTORY).is_dir():
        raise ShardError.about(directory, "unfinished", "run the same spherelm data prepare command again to finish it")
    if not path.is_file():
        raise NotFoundError(f"{directory} is not a data directory (no {MANIFEST_FILE}): use spherelm data prepare")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        entries = [entry for split in manifest["splits"].values() for entry in split["shards"] or [{}]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardError.about(path, "damaged") from error
    if not all({"file", "sha256", "tokens"} <= set(entry) for entry in entries):
        raise ShardError.about(path, "damaged: a shard's entry is not whole")
    return dict(manifest)
