"""Reading documents from .txt, .jsonl and .parquet files, in blocks of bounded size that workers can share.

A .txt file is one document. A .jsonl file holds one JSON object a line, its text under "text"; a .parquet file has a
column "text". .txt and .jsonl may be compressed (.gz, .xz, .bz2, .zst). Blocks depend on the file alone, never on who
reads them, so that whatever is made of them in order is the same for any number of workers.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from spherelm.data.compression import COMPRESSIONS, read_bytes
from spherelm.data.compression import DocumentError as DocumentError
from spherelm.data.cutting import Cutter

SUFFIXES = (".txt", ".jsonl", ".parquet")
BLOCK_SIZE = 1 << 22  # characters of text, or bytes of JSON lines, a block at least (but the last)
_ROWS = 256


@dataclass(frozen=True)
class Block:
    """A piece of an input file. `read_bytes`: how much of the (compressed) file was read for it and those before.

    kind "text": `data` is str, a piece of one document; `starts` and `ends` say whether it is its first or last, `context`
    and `safe` how it was cut from the one before (`data.cutting`).
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
    context: str = ""
    safe: bool = True
    digest: str | None = None
    after: dict[str, Any] | None = None


def format_of(path: Path) -> str:
    """ ".txt", ".jsonl" or ".parquet". Raises DocumentError for any other name."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSIONS
    kind = suffixes[-2:-1] if compressed else suffixes[-1:]
    if not kind or kind[0] not in SUFFIXES or (compressed and kind[0] == ".parquet"):
        raise DocumentError(
            f"{path}: cannot tell what this file holds; rename it to end in .txt, .jsonl (these also with .gz, .xz, "
            ".bz2 or .zst) or .parquet"
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
    path: Path, *, cutter: Cutter | None = None, with_digest: bool = False, block_size: int = BLOCK_SIZE
) -> Generator[Block, None, None]:
    """The blocks of one input, in order.

    `cutter`: says where a long .txt document is cut; without one it is one block, whole in memory.
    `with_digest`: give each .txt document's sha256, at the price of reading its file twice.
    Raises DocumentError for what is not UTF-8, damaged or empty.
    """
    kind = format_of(path)
    if kind == ".parquet":
        yield from _row_blocks(path, block_size)
    elif kind == ".jsonl":
        yield from _line_blocks(path, block_size)
    else:
        yield from _text_blocks(path, block_size, cutter, _text_digest(path) if with_digest else None)


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


def _text_blocks(path: Path, size: int, cutter: Cutter | None, digest: str | None) -> Iterator[Block]:
    parts: list[str] = []
    held, position, total = 0, 0, 0
    begun: dict[str, Any] = {"starts": True, "context": "", "safe": True, "digest": digest}
    for text, position in _decoded(path):
        parts.append(text)
        held, total = held + len(text), total + len(text)
        if cutter is None or held < 2 * size:
            continue
        whole, parts = "".join(parts), []
        while len(whole) >= 2 * size and (cut := cutter.place(whole, size)) is not None:
            yield Block(path, "text", whole[: cut.place], position, ends=False, **begun)
            whole = whole[cut.place :]
            begun |= {"starts": False, "context": cut.context, "safe": cut.safe}
        parts, held = [whole], 0 if len(whole) >= 2 * size else len(whole)
    if not total:
        raise DocumentError(f"{path} holds no text: remove it from the inputs")
    yield Block(path, "text", "".join(parts), position, **begun)


def _line_blocks(path: Path, size: int) -> Iterator[Block]:
    first, offset, held, parts = 1, 0, 0, list[bytes]()
    position = 0
    for data, position in read_bytes(path):
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
        raise DocumentError(f"{path} needs pyarrow: pip install 'spherelm[data]'") from error
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
        for data, position in read_bytes(path):
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
