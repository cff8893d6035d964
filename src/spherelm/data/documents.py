"""Reading documents from .txt, .jsonl and .parquet files, in blocks of bounded size that workers can share.

A .txt file is one document. A .jsonl file holds one JSON object a line, its text under "text"; a .parquet file has a
column "text". .txt and .jsonl may be compressed (.gz, .xz, .zst). Blocks depend on the file alone, never on who reads
them, so that whatever is made of them in order is the same for any number of workers.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import lzma
import re
import zlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

SUFFIXES = (".txt", ".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".xz", ".zst")
BLOCK_SIZE = 1 << 22  # characters of text, or bytes of JSON lines, a block at least (but the last)
_READ_BYTES = 1 << 20
_ROWS = 256


class DocumentError(ValueError):
    """An input that cannot be read as documents; the message names the file, the place and the fix."""


@dataclass(frozen=True)
class Block:
    """A piece of an input file. `read_bytes`: how much of the (compressed) file was read for it and those before.

    kind "text": `data` is str, a piece of one document; `starts` and `ends` say whether it is its first or last.
    kind "lines": `data` is bytes, whole lines of JSON. kind "rows": `data` is list[str], whole documents.
    `first` is the number (from 1) of its first line or row, `offset` where its first byte is in the (decompressed)
    file. `digest` is the document's sha256 (hex) for kind "text" when asked for. `after` is the position behind it of a
    stream that can go on from there (JSON).
    """

    path: Path
    kind: Literal["text", "lines", "rows"]
    data: str | bytes | list[str]
    read_bytes: int
    first: int = 1
    offset: int = 0
    starts: bool = True
    ends: bool = True
    digest: str | None = None
    after: dict[str, Any] | None = None


def format_of(path: Path) -> str:
    """ ".txt", ".jsonl" or ".parquet". Raises DocumentError for any other name."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSIONS
    kind = suffixes[-2:-1] if compressed else suffixes[-1:]
    if not kind or kind[0] not in SUFFIXES or (compressed and kind[0] == ".parquet"):
        raise DocumentError(
            f"{path}: cannot tell what this file holds; rename it to end in .txt, .jsonl (these also with .gz, .xz or "
            ".zst) or .parquet"
        )
    return kind[0]


def check_input(path: Path) -> None:
    """Raise for an input that is missing, a directory, empty, or of a kind that cannot be read."""
    if path.is_dir():
        raise DocumentError(f"{path} is a directory: name its files, for example {path}/*.jsonl")
    if not path.is_file():
        raise FileNotFoundError(f"no input file {path}: check the path")
    format_of(path)
    if path.stat().st_size == 0:
        raise DocumentError(f"{path} is empty: remove it from the inputs")


def read_blocks(
    path: Path, *, can_cut: bool = True, with_digest: bool = False, block_size: int = BLOCK_SIZE
) -> Generator[Block, None, None]:
    """The blocks of one input, in order.

    `can_cut`: whether a long .txt document may be cut between two words (else it is one block, whole in memory).
    `with_digest`: give each .txt document's sha256, at the price of reading its file twice.
    Raises DocumentError for what is not UTF-8, damaged or empty.
    """
    kind = format_of(path)
    if kind == ".parquet":
        yield from _row_blocks(path, block_size)
    elif kind == ".jsonl":
        yield from _line_blocks(path, block_size)
    else:
        yield from _text_blocks(path, block_size, can_cut, _text_digest(path) if with_digest else None)


def documents_in(block: Block) -> Iterator[str]:
    """The texts in a block, in order. Raises DocumentError for a line that is not JSON with a "text" string."""
    if isinstance(block.data, str):
        yield block.data
    elif isinstance(block.data, bytes):
        offset = block.offset
        for number, line in enumerate(block.data.split(b"\n"), start=block.first):
            if line.strip():
                yield _text_of_line(block.path, number, offset, line)
            offset += len(line) + 1
    else:
        yield from block.data


# The place between two words: a letter or digit before, one space, a letter or digit behind.
_BETWEEN_WORDS = re.compile(r"(?<=[^\W_])(?= [^\W_])")


def cut_after(text: str, at_least: int) -> int | None:
    """The first place between two words at or after `at_least` characters; None where there is none.

    The space belongs to what follows. No tokenizer that splits words lets a token cross such a place.
    """
    found = _BETWEEN_WORDS.search(text, max(1, at_least))
    return found.start() if found else None


def _text_blocks(path: Path, size: int, can_cut: bool, digest: str | None) -> Iterator[Block]:
    parts: list[str] = []
    held, starts, position, total = 0, True, 0, 0
    for text, position in _decoded(path):
        parts.append(text)
        held, total = held + len(text), total + len(text)
        if not can_cut or held < 2 * size:
            continue
        whole, parts = "".join(parts), []
        while len(whole) >= 2 * size and (cut := cut_after(whole, size)) is not None:
            yield Block(path, "text", whole[:cut], position, starts=starts, ends=False, digest=digest)
            whole, starts = whole[cut:], False
        parts, held = [whole], 0 if len(whole) >= 2 * size else len(whole)
    if not total:
        raise DocumentError(f"{path} holds no text: remove it from the inputs")
    yield Block(path, "text", "".join(parts), position, starts=starts, ends=True, digest=digest)


def _line_blocks(path: Path, size: int) -> Iterator[Block]:
    first, offset, held, parts = 1, 0, 0, list[bytes]()
    position = 0
    for data, position in _raw(path):
        parts.append(data)
        held += len(data)
        if held < size or b"\n" not in data:
            continue
        whole = b"".join(parts)
        while end := whole.find(b"\n", size - 1) + 1:
            yield Block(path, "lines", whole[:end], position, first=first, offset=offset)
            first, offset = first + whole.count(b"\n", 0, end), offset + end
            whole = whole[end:]
        parts, held = [whole], len(whole)
    if held:
        yield Block(path, "lines", b"".join(parts), position, first=first, offset=offset)


def _row_blocks(path: Path, size: int) -> Iterator[Block]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DocumentError(f"{path} needs pyarrow: pip install '.[data]' in a clone of spherelm") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if "text" not in names:
                raise DocumentError(f'{path} has no column "text" (it has {", ".join(names)}): rename the column')
            groups = file.metadata.num_rows or 1
            row, held, texts = 0, 0, list[str]()
            for batch in file.iter_batches(batch_size=_ROWS, columns=["text"]):
                for text in _column(path, batch, row):
                    texts.append(text)
                    held += len(text)
                row += len(batch)
                if held >= size or row == groups:
                    done = path.stat().st_size * row // groups
                    yield Block(path, "rows", texts, done, first=row - len(texts) + 1)
                    held, texts = 0, []
    except (pyarrow.ArrowException, OSError) as error:
        raise DocumentError(f"{path}: damaged or no Parquet file; get it again") from error


def _column(path: Path, batch: Any, row: int) -> list[str]:
    try:
        texts = batch.column(0).to_pylist()
    except UnicodeDecodeError as error:
        raise DocumentError(f"{path}: text between rows {row + 1} and {row + len(batch)} is not UTF-8") from error
    for number, text in enumerate(texts, start=row + 1):
        if not isinstance(text, str):
            raise DocumentError(f'{path}, row {number}: "text" is {type(text).__name__}, not a string; drop that row')
    return list(texts)


def _text_of_line(path: Path, number: int, offset: int, line: bytes) -> str:
    where = f"{path}, line {number}"
    try:
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _not_utf8(path, offset + error.start) from error
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"{where}: not JSON ({error}); each line must be one JSON object") from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise DocumentError(f'{where}: no string under "text"; each line must be an object such as {{"text": "..."}}')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DocumentError(f"{where}: half of a surrogate pair at character {error.start}; remove it") from error
    return text


def _decoded(path: Path) -> Iterator[tuple[str, int]]:
    """(text, bytes read of the file) piece by piece; a byte order mark at the start is not text."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    fed, waiting, position = 0, 0, 0
    try:
        for data, position in _raw(path):
            waiting = len(decoder.getstate()[0])
            text = decoder.decode(data)
            if fed == 0:
                text = text.removeprefix("\ufeff")
            fed += len(data)
            yield text, position
        waiting = len(decoder.getstate()[0])
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, fed - waiting + error.start) from error


def read_lines(path: Path) -> list[str]:
    """The lines of a text file of any name, which may be compressed, without what ends them; only a newline ends a line.

    Raises FileNotFoundError, or DocumentError for a directory, damage, or what is not UTF-8.
    """
    if path.is_dir():
        raise DocumentError(f"{path} is a directory: name a file with a text a line")
    if not path.is_file():
        raise FileNotFoundError(f"no input file {path}: check the path")
    lines = "".join(text for text, _ in _decoded(path)).split("\n")
    return [line.rstrip("\r") for line in (lines if lines[-1] else lines[:-1])]


def _not_utf8(path: Path, offset: int) -> DocumentError:
    return DocumentError(
        f"{path} is not UTF-8 (byte {offset}): convert it, for example iconv -f LATIN1 -t UTF-8 {path.name}"
    )


def _text_digest(path: Path) -> str:
    digest = hashlib.sha256()
    for text, _ in _decoded(path):
        digest.update(text.encode("utf-8"))
    return digest.hexdigest()


def _raw(path: Path) -> Iterator[tuple[bytes, int]]:
    """(decompressed bytes, position in the file) piece by piece."""
    suffix = path.suffix.lower()
    damaged = DocumentError(f"{path}: damaged or cut off, or not a {suffix} file; get it again")
    try:
        with open(path, "rb") as file:
            if suffix == ".zst":
                yield from ((data, file.tell()) for data in _decompressed_zst(file, damaged))
                return
            openers: dict[str, Callable[[IO[bytes]], Any]] = {".gz": _gunzipped, ".xz": lzma.LZMAFile}
            content = openers[suffix](file) if suffix in openers else file
            while data := content.read(_READ_BYTES):
                yield data, file.tell()
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise damaged from error


def _gunzipped(file: IO[bytes]) -> gzip.GzipFile:
    return gzip.GzipFile(fileobj=file)


def _decompressed_zst(file: IO[bytes], damaged: DocumentError) -> Iterator[bytes]:
    """By frames and by hand: zstandard's own stream reader takes a file cut off in a frame for a whole one."""
    try:
        import zstandard
    except ImportError as error:
        raise DocumentError("a .zst file needs zstandard: pip install '.[data]' in a clone of spherelm") from error
    frame: Any = None
    try:
        while data := file.read(_READ_BYTES // 8):
            while data:
                frame = frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
                if out := frame.decompress(data):
                    yield out
                data, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    except zstandard.ZstdError as error:
        raise damaged from error
    if frame is not None:
        raise damaged
