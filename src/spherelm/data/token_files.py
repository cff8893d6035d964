"""Token files of other programs, read in place by memory map, and written.

nanoGPT   ids only: uint16, or uint32 for more ids (karpathy/nanoGPT, data/openwebtext/prepare.py).
llm.c     256 int32: magic, version, count, zeros; then the ids, uint16 for magic 20240520 and version 1, uint32 for
          20240801 and 7 (karpathy/llm.c, dev/data/data_common.py; modded-nanogpt's files are the first).
Megatron  NAME.bin: ids only. NAME.idx: 9 bytes of magic, version 1 (uint64), kind of the ids (uint8), numbers of
          sequences and of document borders (uint64 each); the sequences' lengths (int32) and byte offsets (int64); the
          borders as sequence numbers from 0 on (int64) (NVIDIA/Megatron-LM, megatron/core/datasets/indexed_dataset.py).

All numbers are little-endian. None of them names its tokenizer. Nothing is unpickled.
"""

from __future__ import annotations

import copy
import hashlib
import math
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from spherelm.counting import counted
from spherelm.data.shards import (
    MAGIC,
    MANIFEST_FILE,
    PARTIAL_DIRECTORY,
    SPLITS,
    Ids,
    Shard,
    ShardError,
    ShardHeader,
    Split,
    Tokens,
    mapped,
    token_dtype,
)
from spherelm.data.tokenizer import Tokenizer
from spherelm.errors import UserError

_LLMC: dict[tuple[int, int], np.dtype[Any]] = {(20240520, 1): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")}
_LLMC_START = 1024
_MEGATRON = struct.Struct("<9sQBQQ")
_MEGATRON_MAGIC = b"MMIDIDX\0\0"
_MEGATRON_KINDS = {1: "u1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_ROLES = re.compile(r"(?:^|[^a-z])(train|val|test)(?:id|idation)?(?:[^a-z]|$)")
_SAMPLES, _SAMPLE = 16, 1 << 15  # places in a file, and tokens at each, that are read when it is opened
_AT_ONCE = 1 << 22  # tokens


class TokenFile(Shard):
    """One file of ids, with the tokenizer given for them.

    Its sha256 is of its length and of samples: all of a file up to half a million tokens. Raises ShardError for a file
    that is cut off, or whose samples hold ids that the tokenizer does not have.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer) -> None:
        self.path, self._tokenizer = path, tokenizer
        dtype, start, self._borders = _layout(path, tokenizer.vocab_size)
        size = path.stat().st_size - start
        if size <= 0 or size % dtype.itemsize:
            raise ShardError.about(
                path, f"{counted(size, 'byte')} do not fill rows of {dtype.name}", "copy the file again"
            )
        self.tokens = mapped(path, dtype, size // dtype.itemsize, start)
        sample = np.concatenate(list(_samples(self.tokens, _SAMPLE)))
        self.header = ShardHeader(
            dtype=dtype.name,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            tokenizer_fingerprint=tokenizer.fingerprint,
            tokens=self.tokens.size,
            documents=0,
            text_bytes=0,
            body_sha256=hashlib.sha256(f"{dtype.name} {self.tokens.size} ".encode() + sample.tobytes()).hexdigest(),
            table_sha256="",
        )
        self._check(sample)

    @cached_property
    def document_starts(self) -> npt.NDArray[np.int64]:
        """Where documents start: as the index says, else after end tokens, for which the file is read whole."""
        if self._borders is not None:
            return self._borders
        ends = [
            np.flatnonzero(self.tokens[at : at + _AT_ONCE] == self.header.eos_id) + at + 1
            for at in range(0, self.tokens.size, _AT_ONCE)
        ]
        starts = np.concatenate([np.zeros(1, np.int64), *ends])
        return starts[starts < self.tokens.size]

    @cached_property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the text, from decoding at most 2^18 tokens."""
        pieces = list(_samples(self.tokens, _SAMPLE // 2))
        decoded = sum(len(self._tokenizer.decode(piece.tolist()).encode("utf-8")) for piece in pieces)
        return max(1, round(decoded * self.tokens.size / sum(piece.size for piece in pieces)))

    def verify(self) -> None:
        """Read the file whole. Raises ShardError for an id that the tokenizer does not have."""
        for at in range(0, self.tokens.size, _AT_ONCE):
            self._check(self.tokens[at : at + _AT_ONCE])

    def _check(self, ids: Ids) -> None:
        size = self.header.vocab_size
        for extreme in (int(ids.min()), int(ids.max())):
            if not 0 <= extreme < size:
                raise ShardError.about(
                    self.path,
                    f"token id {extreme} is not among the {size:,} of tokenizer {self._tokenizer.name}",
                    "name the tokenizer that made the file",
                )

    def part(self, begin: int, end: int) -> TokenFile:
        """The tokens `begin` to `end` of this file as one of their own."""
        part = copy.copy(self)
        for computed in ("document_starts", "text_bytes"):
            vars(part).pop(computed, None)
        part.tokens = self.tokens[begin:end]
        name = f"{self.header.body_sha256} {begin} {end}".encode()
        part.header = replace(self.header, tokens=end - begin, body_sha256=hashlib.sha256(name).hexdigest())
        if self._borders is not None:
            inside = self._borders[(self._borders > begin) & (self._borders < end)] - begin
            part._borders = np.concatenate([np.zeros(1, np.int64), inside])
        return part

    def border(self, place: int) -> int:
        """The first place from `place` on at which a document starts, or `place` where none does near it."""
        if self._borders is not None:
            found = self._borders[np.searchsorted(self._borders, place) :][:1]
        else:
            found = np.flatnonzero(self.tokens[place - 1 : place + _AT_ONCE] == self.header.eos_id)[:1] + place
        return int(found[0]) if found.size and found[0] < self.tokens.size else place


def _samples(ids: Ids, length: int) -> list[Ids]:
    """Evenly spread pieces of a row of ids, or all of it where they would cover it."""
    if ids.size <= _SAMPLES * length:
        return [ids]
    return [ids[at : at + length] for at in np.linspace(0, ids.size - length, _SAMPLES).astype(np.int64).tolist()]


def _layout(path: Path, vocab_size: int) -> tuple[np.dtype[Any], int, npt.NDArray[np.int64] | None]:
    """Kind of the ids, byte of the first one, and where documents start if the format says it."""
    index, size = path.with_suffix(".idx"), path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(_LLMC_START)
    if start.startswith(MAGIC):
        raise ShardError.about(path, "is a shard of a data directory", f"name the directory, {path.parent}")
    if index.is_file():
        dtype, borders, tokens = _read_index(index)
        if tokens * dtype.itemsize != size:
            raise ShardError.about(path, f"not as long as {index.name} says", "copy both files again")
        return dtype, 0, borders
    numbers = [*np.frombuffer(start, "<i4", len(start) // 4)[:3].tolist(), 0, 0, 0]
    known = _LLMC.get((numbers[0], numbers[1]))
    if known is None and any(numbers[0] == magic for magic, _ in _LLMC):
        raise ShardError.about(path, f"version {numbers[1]} of llm.c's format is not known", "write the file again")
    if known is None:
        upper_halves = np.frombuffer(start, "<u2", len(start) // 2)[1::2]
        return np.dtype("<u2") if upper_halves.any() and vocab_size <= 1 << 16 else np.dtype("<u4"), 0, None
    if size != _LLMC_START + numbers[2] * known.itemsize:
        raise ShardError.about(path, f"does not hold the {numbers[2]:,} tokens of its header", "copy the file again")
    return known, _LLMC_START, None


def _read_index(path: Path) -> tuple[np.dtype[Any], npt.NDArray[np.int64], int]:
    """Kind of the ids, where documents start, and the number of tokens, as a Megatron index has them."""
    data = path.read_bytes()
    magic, version, kind, sequences, borders = _MEGATRON.unpack_from(data.ljust(_MEGATRON.size, b"\0"))
    if (magic, version) != (_MEGATRON_MAGIC, 1) or len(data) != _MEGATRON.size + 12 * sequences + 8 * borders:
        raise ShardError.about(path, "is not a Megatron index, is cut off, or has modes", "make the files again")
    if kind not in _MEGATRON_KINDS:
        raise ShardError.about(path, f"numbers of kind {kind} are not token ids", "make the files again")
    at = _MEGATRON.size
    lengths = np.frombuffer(data, "<i4", sequences, at).astype(np.int64)
    offsets = np.frombuffer(data, "<i8", sequences, at + 4 * sequences)
    documents = np.frombuffer(data, "<i8", borders, at + 12 * sequences)
    dtype, ends = np.dtype(_MEGATRON_KINDS[kind]), np.cumsum(lengths)
    starts = ends - lengths
    if (offsets != starts * dtype.itemsize).any() or (lengths < 0).any():
        raise ShardError.about(path, "sequences that are not stored one after another", "make the files again")
    if documents[:1].tolist() != [0] or (np.diff(documents) < 0).any() or documents[-1] > sequences:
        raise ShardError.about(path, "borders of documents that are not those of its sequences", "make the files again")
    return dtype, np.unique(starts[documents[documents < sequences]]), int(lengths.sum())


def find_files(path: Path) -> dict[Split, list[Path]]:
    """The files of ids that `path` names, by split; empty where there are none, or those of a data directory.

    path: a directory, in which "val" in a name says what is validation text, and files with "test" are in neither; a
    file; or what Megatron's two begin with.
    """
    if path.is_dir():
        ours = any((path / name).exists() for name in (MANIFEST_FILE, PARTIAL_DIRECTORY))
        found = [] if ours else sorted(path.glob("*.bin"))
        if not found:
            return {}
        roles = [role[1] if (role := _ROLES.search(file.stem.lower())) else "train" for file in found]
        return {split: [file for file, role in zip(found, roles, strict=True) if role == split] for split in SPLITS}
    candidates = (path.with_suffix(".bin") if path.suffix == ".idx" else path, path.with_name(f"{path.name}.bin"))
    file = next((file for file in candidates if file.is_file() and file.suffix == ".bin"), None)
    return {"train": [file], "val": []} if file else {}


def open_files(path: Path, split: Split, tokenizer: Tokenizer, val: str | None) -> Tokens:
    """The tokens of a split of the files that `path` names.

    val: where the validation text is; a path of files, or the part of the tokens, 0 to 1, that is cut off their end,
    where a document starts; `None` takes the files named so. Raises UserError, ShardError or FileNotFoundError.
    """
    found = find_files(path)
    if val is not None and (other := find_files(Path(val))):
        found["val"] = [*other["train"], *other["val"]]
        val = None
    files = [TokenFile(file, tokenizer) for file in found["train"]]
    if val is not None:
        cut = _cut(files, part_of(val))
    else:
        cut = {"train": files, "val": [TokenFile(file, tokenizer) for file in found["val"]]}
    if split == "val" and not cut["val"] and val is None:
        raise UserError(
            f"{path} has no validation text: add val=0.01, the fraction to hold out, or val=FILE, to --data"
        )
    if not cut[split]:
        fix = "choose another val= in --data" if val is not None else "name files of training text"
        raise UserError(f"{path} has no text for {split}: {fix}")
    return Tokens(cut[split], path, split)


def part_of(value: str) -> float:
    """The number from above 0 to below 1 that `val=` says. Raises UserError."""
    try:
        part = float(value)
    except ValueError:
        part = math.nan
    if not 0 < part < 1:
        raise UserError(f"val={value} is neither a file nor a fraction of the text between 0 and 1")
    return part


def _cut(files: Sequence[TokenFile], part: float) -> dict[Split, list[TokenFile]]:
    """The parts of the files before and after the point that leaves `part` of their tokens after it."""
    before = round((1 - part) * sum(file.tokens.size for file in files))
    cut: dict[Split, list[TokenFile]] = {"train": [], "val": []}
    for file in files:
        size = file.tokens.size
        place = size if before >= size else file.border(before) if before > 0 else 0
        before -= size
        cut["train"] += [file.part(0, place)] if place else []
        cut["val"] += [file.part(place, size)] if place < size else []
    return cut


def write_nanogpt(out: Path, tokens: Tokens) -> None:
    """All tokens as one file, `train.bin` or `val.bin`."""
    _write_ids(out / f"{tokens.split}.bin", tokens.shards, token_dtype(tokens.vocab_size))


def write_llmc(out: Path, tokens: Tokens) -> None:
    """A file for each shard, `train_000000.bin` and so on."""
    dtype = token_dtype(tokens.vocab_size)
    for number, shard in enumerate(tokens.shards):
        if shard.header.tokens >= 1 << 31:
            raise UserError(f"{shard.path} has {shard.header.tokens:,} tokens, llm.c's files hold fewer than 2**31")
        header = np.zeros(256, "<i4")
        header[:3] = *next(key for key, kind in _LLMC.items() if kind == dtype), shard.header.tokens
        _write_ids(out / f"{tokens.split}_{number:06d}.bin", [shard], dtype, header.tobytes())


def write_megatron(out: Path, tokens: Tokens) -> None:
    """`train.bin` and `train.idx`, or those of val; a document is one sequence."""
    kind = 8 if tokens.vocab_size < 65500 else 4
    dtype = np.dtype(_MEGATRON_KINDS[kind])
    _write_ids(out / f"{tokens.split}.bin", tokens.shards, dtype)
    starts = tokens.document_offsets.astype("<i8")
    lengths = np.diff(starts, append=len(tokens)).astype("<i4")
    with open(out / f"{tokens.split}.idx", "wb") as file:
        file.write(_MEGATRON.pack(_MEGATRON_MAGIC, 1, kind, starts.size, starts.size + 1))
        for column in (lengths, starts * dtype.itemsize, np.arange(starts.size + 1, dtype="<i8")):
            file.write(column.tobytes())


WRITERS: Mapping[str, Callable[[Path, Tokens], None]] = {
    "nanogpt": write_nanogpt,
    "llmc": write_llmc,
    "megatron": write_megatron,
}


def _write_ids(path: Path, shards: Sequence[Shard], dtype: np.dtype[Any], header: bytes = b"") -> None:
    with open(path, "wb") as file:
        file.write(header)
        for shard in shards:
            for at in range(0, shard.tokens.size, _AT_ONCE):
                file.write(shard.tokens[at : at + _AT_ONCE].astype(dtype).tobytes())
