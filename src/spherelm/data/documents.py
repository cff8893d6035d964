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
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spherelm.data.compression import COMPRESSIONS, read_bytes
from spherelm.data.compression import DocumentError as DocumentError
from spherelm.data.cutting import Cutter
from spherelm.data.rows import RowSettings, csv_rows, is_list, line_rows, list_rows, not_utf8, parquet_rows
from spherelm.errors import NotFoundError

SUFFIXES = (".txt", ".md", ".jsonl", ".json", ".csv", ".tsv", ".parquet")
TEXTS = (".txt", ".md")
BLOCK_SIZE = 1 << 22  # characters of text, or bytes of JSON lines, a block at least (but the last)

_NEAR = 1 << 14  # characters around a place in which the end of a line is looked for

Span = tuple[int, int | None]
WHOLE_TEXT: Span = (0, None)


@dataclass(frozen=True)
class Block:
    """A piece of an input file. `read_bytes`: how much of the (compressed) file was read for it and those before.

    `texts`: whole documents, Bad for each bad row; or a piece of one, of which `starts` and `ends` say whether it is
    its first or last, `context` and `safe` how it was cut from the one before (`data.cutting`), and `digest`, when
    asked for, the sha256 (hex) of the whole. `after` is the position after it of a stream that can continue
    from there (JSON).
    """

    path: Path
    texts: list[str]
    read_bytes: int
    starts: bool = True
    ends: bool = True
    context: str = ""
    safe: bool = True
    digest: str | None = None
    after: dict[str, Any] | None = None


def format_of(path: Path) -> str:
    """One of `SUFFIXES`. Raises DocumentError for any other name."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSIONS
    kind = suffixes[-2:-1] if compressed else suffixes[-1:]
    if not kind or kind[0] not in SUFFIXES:
        raise DocumentError(
            f"{path}: cannot tell what this file holds; rename it to end in {', '.join(SUFFIXES)}, "
            f"followed by {', '.join(COMPRESSIONS)} if it is compressed"
        )
    return kind[0]


def input_files(path: Path) -> list[Path]:
    """The files that `path` names: itself, those in a directory and below it, or those that match it with *, ? and [].

    What `files_left_out` counts is none of them. Raises DocumentError or FileNotFoundError where there are none, or
    `path` itself is an empty file or of a kind that cannot be read.
    """
    matches = _matches(path)
    if not matches and not path.is_dir():
        check_input(path)
        return [path]
    found = [file for file in matches if _fault(file) is None]
    if not found:
        raise DocumentError(f"{path} has no files with text that end in {', '.join(SUFFIXES)}: name another")
    return found


def files_left_out(path: Path) -> Counter[str]:
    """How many of the files in a directory or of a pattern are no input, by reason."""
    return Counter(fault for file in _matches(path) if (fault := _fault(file)) is not None)


def _matches(path: Path) -> list[Path]:
    """The files in a directory and below it, without hidden ones, or those of a pattern. None for a file's own name."""
    if path.is_dir():
        within = ((file, file.relative_to(path).parts) for file in path.rglob("*"))
        files = [file for file, parts in within if not any(part.startswith(".") for part in parts)]
    else:
        files = [] if path.is_file() else [Path(name) for name in glob.glob(str(path), recursive=True)]
    return sorted(file for file in files if file.is_file())


def _fault(path: Path) -> str | None:
    """Why a file is no input; `None` for one that is."""
    try:
        format_of(path)
    except DocumentError:
        return f"of an unknown kind ({path.suffix.lower() or 'a name without an end'})"
    return None if path.stat().st_size else "empty"


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
    rows: RowSettings = RowSettings(),
    span: Span = WHOLE_TEXT,
    block_size: int = BLOCK_SIZE,
) -> Generator[Block, None, None]:
    """The blocks of one input, in order.

    `cutter`: says where a long .txt document is cut; without one it is one block, whole in memory.
    `with_digest`: give each .txt document's sha256, at the price of reading its file twice.
    `rows`: how the rows of other files are read. `span`: the characters of a .txt that are its document.
    Raises DocumentError for what is not UTF-8 or damaged.
    """
    kind = format_of(path)
    if kind in TEXTS:
        yield from _text_blocks(path, block_size, cutter, span, _text_digest(path, span) if with_digest else None)
        return
    if kind == ".parquet":
        found = parquet_rows(path, rows)
    elif kind in (".csv", ".tsv"):
        found = csv_rows(path, rows, "," if kind == ".csv" else "\t")
    else:
        found = list_rows(path, rows) if kind == ".json" and is_list(path) else line_rows(path, rows)
    held, position, texts = 0, 0, list[str]()
    for more, size, position in found:
        texts += more
        held += size
        if held >= block_size:
            yield Block(path, texts, position)
            held, texts = 0, []
    if texts:
        yield Block(path, texts, path.stat().st_size)


def _text_blocks(path: Path, size: int, cutter: Cutter | None, span: Span, digest: str | None) -> Iterator[Block]:
    parts: list[str] = []
    held, position = 0, 0
    begun: dict[str, Any] = {"starts": True, "context": "", "safe": True, "digest": digest}
    for text, position in _within(path, span):
        parts.append(text)
        held += len(text)
        if cutter is None or held < 2 * size:
            continue
        whole, parts = "".join(parts), []
        while len(whole) >= 2 * size and (cut := cutter.place(whole, size)) is not None:
            yield Block(path, [whole[: cut.place]], position, ends=False, **begun)
            whole = whole[cut.place :]
            begun |= {"starts": False, "context": cut.context, "safe": cut.safe}
        parts, held = [whole], 0 if len(whole) >= 2 * size else len(whole)
    yield Block(path, ["".join(parts)], position, **begun)


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

    That is after the end of the line nearest to the exact place, or the nearest space, or it is the exact place.
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
        raise not_utf8(path, f"byte {fed - waiting + error.start}") from error


def read_lines(path: Path) -> list[str]:
    """The lines of a text file of any name, which may be compressed, without what ends them;
    only a newline ends a line.

    Raises FileNotFoundError, or DocumentError for a directory, damage, or what is not UTF-8.
    """
    if path.is_dir():
        raise DocumentError(f"{path} is a directory: name a file with a text a line")
    if not path.is_file():
        raise NotFoundError(f"no input file {path}: check the path")
    lines = "".join(text for text, _ in _decoded(path)).split("\n")
    return [line.rstrip("\r") for line in (lines if lines[-1] else lines[:-1])]


def _text_digest(path: Path, span: Span) -> str:
    digest = hashlib.sha256()
    for text, _ in _within(path, span):
        digest.update(text.encode("utf-8"))
    return digest.hexdigest()
