"""Reading documents from files, in blocks of bounded size that workers can share.

A .txt or .md file is one document. A line of a .jsonl file, an entry of the list in a .json file (which may hold lines
instead), a row of a .csv, .tsv or .parquet file has one in a field. All may be compressed (.gz, .xz, .bz2, .zst).
Blocks depend on the file alone, never on who reads them, so that whatever is made of them in order is the same for any
number of workers.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import json
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from spherelm.data.compression import COMPRESSIONS, read_bytes
from spherelm.data.compression import DocumentError as DocumentError
from spherelm.data.cutting import Cutter
from spherelm.data.rows import Bad, Rows, csv_rows, list_rows, parquet_rows
from spherelm.errors import NotFoundError

SUFFIXES = (".txt", ".md", ".jsonl", ".json", ".csv", ".tsv", ".parquet")
TEXTS = (".txt", ".md")
BLOCK_SIZE = 1 << 22  # characters of text, or bytes of JSON lines, a block at least (but the last)

_NEAR = 1 << 14  # characters around a place in which the end of a line is looked for
_MARKS = ((codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32"), (codecs.BOM_UTF16_LE, "UTF-16"),
          (codecs.BOM_UTF16_BE, "UTF-16"))  # fmt: skip

Span = tuple[int, int | None]
WHOLE: Span = (0, None)


@dataclass(frozen=True)
class Block:
    """A piece of an input file. `read_bytes`: how much of the (compressed) file was read for it and those before.

    kind "text": `data` is str, a piece of one document; `starts` and `ends` say whether it is its first or last, `context`
    and `safe` how it was cut from the one before (`data.cutting`).
    kind "lines": `data` is bytes, whole lines of JSON. kind "rows": `data` is a list of whole
    documents, Bad for each bad row. `rows`: how lines are read.
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
    rows: Rows = Rows()


def format_of(path: Path) -> str:
    """One of `SUFFIXES`. Raises DocumentError for any other name."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSIONS
    kind = suffixes[-2:-1] if compressed else suffixes[-1:]
    if not kind or kind[0] not in SUFFIXES:
        raise DocumentError(
            f"{path}: cannot tell what this file holds; rename it to end in {', '.join(SUFFIXES)}, and behind it "
            f"{', '.join(COMPRESSIONS)} if it is compressed"
        )
    return kind[0]


def input_files(path: Path) -> list[Path]:
    """The files that `path` names: itself, those in a directory and below it, or those that match it with *, ? and [].

    Raises DocumentError or FileNotFoundError where there are none, or one is empty or of a kind that cannot be read.
    """
    if path.is_dir():
        found = [file for file in sorted(path.rglob("*")) if file.is_file() and _is_input(file.relative_to(path))]
        if not found:
            raise DocumentError(f"{path} is a directory without files that end in {', '.join(SUFFIXES)}: name another")
    else:
        matches = [] if path.is_file() else sorted(map(Path, glob.glob(str(path), recursive=True)))
        found = [file for file in matches if file.is_file()] or [path]
    for file in found:
        check_input(file)
    return found


def _is_input(path: Path) -> bool:
    try:
        format_of(path)
    except DocumentError:
        return False
    return not any(part.startswith(".") for part in path.parts)


def check_input(path: Path) -> None:
    """Raise for an input that is missing, a directory, empty, or of a kind that cannot be read."""
    if path.is_dir():
        raise DocumentError(f"{path} is a directory: name its files, for example {path}/*.jsonl")
    if not path.is_file():
        raise NotFoundError(f"no input file {path}: check the path")
    format_of(path)
    if path.stat().st_size == 0:
        raise DocumentError(f"{path} is empty: remove it from the inputs")


def read_blocks(
    path: Path,
    *,
    cutter: Cutter | None = None,
    with_digest: bool = False,
    rows: Rows = Rows(),
    span: Span = WHOLE,
    block_size: int = BLOCK_SIZE,
) -> Generator[Block, None, None]:
    """The blocks of one input, in order.

    `cutter`: says where a long .txt document is cut; without one it is one block, whole in memory.
    `with_digest`: give each .txt document's sha256, at the price of reading its file twice.
    `rows`: how the rows of other files are read. `span`: the characters of a .txt that are its document.
    Raises DocumentError for what is not UTF-8, damaged or empty.
    """
    kind = format_of(path)
    if kind in TEXTS:
        yield from _text_blocks(path, block_size, cutter, span, _text_digest(path, span) if with_digest else None)
    elif kind == ".parquet":
        yield from _row_blocks(path, block_size, parquet_rows(path, rows))
    elif kind in (".csv", ".tsv"):
        found = csv_rows(path, _decoded(path), rows, "," if kind == ".csv" else "\t")
        yield from _row_blocks(path, block_size, (([text], position) for text, position in found))
    elif kind == ".json" and _is_list(path):
        found = list_rows(path, _decoded(path), rows)
        yield from _row_blocks(path, block_size, (([text], position) for text, position in found))
    else:
        yield from _line_blocks(path, block_size, rows)


def documents_in(block: Block) -> Iterator[str]:
    """The texts in a block, in order, Bad for each bad row. Raises DocumentError for a bad line, unless they are skipped."""
    if isinstance(block.data, str):
        yield block.data
    elif isinstance(block.data, bytes):
        offset = block.offset
        for number, line in enumerate(block.data.split(b"\n"), start=block.first):
            if line.strip():
                yield _text_of_line(block.path, number, offset, line, block.rows)
            offset += len(line) + 1
    else:
        yield from block.data


def _text_blocks(path: Path, size: int, cutter: Cutter | None, span: Span, digest: str | None) -> Iterator[Block]:
    parts: list[str] = []
    held, position, total = 0, 0, 0
    begun: dict[str, Any] = {"starts": True, "context": "", "safe": True, "digest": digest}
    for text, position in _within(path, span):
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


def _line_blocks(path: Path, size: int, rows: Rows) -> Iterator[Block]:
    first, offset, held, parts = 1, 0, 0, list[bytes]()
    position = 0
    for data, position in read_bytes(path):
        parts.append(data)
        held += len(data)
        if held < size or b"\n" not in data:
            continue
        whole = b"".join(parts)
        while end := whole.find(b"\n", size - 1) + 1:
            yield Block(path, "lines", whole[:end], position, first=first, offset=offset, rows=rows)
            first, offset = first + whole.count(b"\n", 0, end), offset + end
            whole = whole[end:]
        parts, held = [whole], len(whole)
    if held:
        yield Block(path, "lines", b"".join(parts), position, first=first, offset=offset, rows=rows)


def _row_blocks(path: Path, size: int, found: Iterator[tuple[list[str], int]]) -> Iterator[Block]:
    first, held, position, texts = 1, 0, 0, list[str]()
    for more, position in found:
        texts += more
        held += sum(map(len, more))
        if held >= size:
            yield Block(path, "rows", texts, position, first=first)
            first, held, texts = first + len(texts), 0, []
    if texts:
        yield Block(path, "rows", texts, path.stat().st_size, first=first)


def _is_list(path: Path) -> bool:
    """Whether JSON is one list; else it has a row a line."""
    start = next((text.lstrip() for text, _ in _decoded(path) if text.strip()), "")
    return start.startswith("[")


def _text_of_line(path: Path, number: int, offset: int, line: bytes, rows: Rows) -> str:
    where = f"{path}, line {number}"
    try:
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        if rows.skip_bad:
            return Bad("not UTF-8")
        raise _not_utf8(path, offset + error.start) from error
    except (ValueError, RecursionError) as error:
        return rows.refuse(where, "not JSON", f" ({error}); make each line one JSON object")
    return rows.text(where, record)


def _within(path: Path, span: Span) -> Iterator[tuple[str, int]]:
    """The characters of `span`, piece by piece as `_decoded` gives them."""
    at = 0
    for text, position in _decoded(path):
        part = text[max(0, span[0] - at) : None if span[1] is None else max(0, span[1] - at)]
        at += len(text)
        if part:
            yield part, position


def split_place(path: Path, fraction: float) -> int:
    """The character of a .txt document with which its last part of about `fraction` begins.

    That is behind the end of the line nearest to the exact place, or the nearest space, or it is the exact place.
    Raises DocumentError for a text that is too short to be split.
    """
    length = sum(len(text) for text, _ in _decoded(path))
    exact = round(length * (1 - fraction))
    begin = max(0, exact - _NEAR)
    around = "".join(text for text, _ in _within(path, (begin, exact + _NEAR)))
    for space in ("\n", " "):
        places = [begin + i + 1 for i, char in enumerate(around) if char == space and 0 < begin + i + 1 < length]
        if places:
            return min(places, key=lambda place: abs(place - exact))
    if not 0 < exact < length:
        raise DocumentError(f"{path} is too short to hold out {fraction} of it: choose another --val-fraction")
    return exact


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
        raise NotFoundError(f"no input file {path}: check the path")
    lines = "".join(text for text, _ in _decoded(path)).split("\n")
    return [line.rstrip("\r") for line in (lines if lines[-1] else lines[:-1])]


def _not_utf8(path: Path, offset: int) -> DocumentError:
    start = next((data for data, _ in read_bytes(path)), b"")
    found = next((name for mark, name in _MARKS if start.startswith(mark)), None)
    is_not = f"is {found}, not UTF-8" if found else f"is not UTF-8 (byte {offset})"
    example = "" if found else "for example "
    return DocumentError(f"{path} {is_not}: convert it, {example}iconv -f {found or 'LATIN1'} -t UTF-8 {path.name}")


def _text_digest(path: Path, span: Span) -> str:
    digest = hashlib.sha256()
    for text, _ in _within(path, span):
        digest.update(text.encode("utf-8"))
    return digest.hexdigest()
