"""Rows of JSON, CSV and Parquet files as documents: which field holds the text, and what becomes of a row without one."""

from __future__ import annotations

import csv
import io
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spherelm.data.compression import COMPRESSIONS, DocumentError, read_bytes

_BATCH = 256
NAME_ANOTHER = "name another with --field (column= of a stream)"
_MISSING = object()
_NAMES = 12
_KINDS = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
}


class Bad(str):
    """In place of the text of a row that is left out: why it cannot be read."""


@dataclass(frozen=True)
class Rows:
    """How rows are read. `field`: where the text is, `body.text` for "text" within "body"; a row may also be a string.

    `skip_bad`: leave out rows that hold no text that can be read; False makes them errors, None too, where no flag skips them.
    """

    field: str = "text"
    skip_bad: bool | None = False

    def text(self, where: str, record: Any) -> str:
        """The text of one row, Bad for one that is skipped. Raises DocumentError naming `where` it is."""
        found = record if isinstance(record, str) else value_in(record, self.field)
        if not isinstance(found, str):
            names = ", ".join(_names_in(record)[:_NAMES])
            missing = f"it has {names}" if names else "it is no object"
            reason = missing if found is _MISSING else f"it is {_KINDS.get(type(found), type(found).__name__)}"
            fix = NAME_ANOTHER if found is _MISSING and names else "mend that row"
            return self.refuse(where, f'no string under "{self.field}"', f" ({reason}); {fix}")
        try:
            found.encode("utf-8")
        except UnicodeEncodeError as error:
            return self.refuse(where, "half of a surrogate pair", f" at character {error.start}; mend it")
        return found

    def refuse(self, where: str, reason: str, more: str) -> Bad:
        """Raise DocumentError, unless bad rows are skipped."""
        if self.skip_bad:
            return Bad(reason)
        way_out = "" if self.skip_bad is None else ", or leave such rows out with --skip-bad"
        raise DocumentError(f"{where}: {reason}{more}{way_out}")


def value_in(record: Any, field: str) -> Any:
    """What stands in `record` under `field`, which may go through several objects by points."""
    if not isinstance(record, dict):
        return _MISSING
    if field in record:
        return record[field]
    head, point, rest = field.partition(".")
    return value_in(record[head], rest) if point and head in record else _MISSING


def top_field(field: str, names: Iterable[str]) -> str | None:
    """The one of the columns `names` that holds `field`, if any does."""
    return next((name for name in (field, field.partition(".")[0]) if name in names), None)


def _names_in(record: Any, before: str = "") -> list[str]:
    """The fields of an object, those within others by points."""
    if not isinstance(record, dict):
        return []
    inner = ((f"{before}{name}", value) for name, value in record.items())
    return [name for path, value in inner for name in (_names_in(value, f"{path}.") or [path])]


def no_column(path: Path, rows: Rows, names: Iterable[str]) -> DocumentError:
    """What to say of a table that lacks the column with the text."""
    return DocumentError(f'{path} has no column "{rows.field}" (it has {", ".join(names)}): {NAME_ANOTHER}')


def csv_rows(path: Path, pieces: Iterator[tuple[str, int]], rows: Rows, delimiter: str) -> Iterator[tuple[str, int]]:
    """(text, bytes read) of every row of a .csv or .tsv whose first line names the columns."""
    csv.field_size_limit(sys.maxsize)
    position = 0

    def lines() -> Iterator[str]:
        nonlocal position
        rest = ""
        for text, position in pieces:  # noqa: B007
            *whole, rest = (rest + text).split("\n")
            yield from (f"{line}\n" for line in whole)
        yield from [rest] if rest else []

    reader = csv.reader(lines(), strict=True, delimiter=delimiter)
    try:
        names = next(reader, [])
        if rows.field not in names:
            raise no_column(path, rows, names)
        for values in reader:
            if values:
                record = dict(zip(names, values, strict=False))
                yield rows.text(f"{path}, line {reader.line_num}", record), position
    except csv.Error as error:
        raise DocumentError(f"{path}, line {reader.line_num}: not CSV ({error}); mend that line") from error


def list_rows(path: Path, pieces: Iterator[tuple[str, int]], rows: Rows) -> Iterator[tuple[str, int]]:
    """(text, bytes read) of every entry of a .json file that is one list."""
    decode, held, number, needed = json.JSONDecoder().raw_decode, "", 0, 0
    for text, position in itertools.chain(pieces, [("", path.stat().st_size)]):
        held += text
        if text and len(held) < needed:  # tried again only with much more, else long entries would take long
            continue
        at = 0
        while True:
            begin = _behind_space(held, at)
            if not number and held[begin : begin + 1] == "[":
                begin = _behind_space(held, begin + 1)
            if held[begin : begin + 1] == "]":
                if held[begin + 1 :].strip() or any(more.strip() for more, _ in pieces):
                    raise DocumentError(
                        f"{path}: there is more behind the end of the list; keep one list, or a row a line"
                    )
                return
            try:
                record, end = decode(held, begin)
            except (ValueError, RecursionError):
                break
            end = _behind_space(held, end)
            if held[end : end + 1] not in (",", "]"):
                break
            number += 1
            yield rows.text(f"{path}, entry {number}", record), position
            at = end + (held[end] == ",")
        held, needed = held[at:], 2 * len(held[at:])
    raise DocumentError(f"{path}, entry {number + 1}: not JSON, or the list has no end; mend it")


def _behind_space(text: str, at: int) -> int:
    while text[at : at + 1].isspace():
        at += 1
    return at


def parquet_rows(path: Path, rows: Rows) -> Iterator[tuple[list[str], int]]:
    """(texts, bytes read) of a Parquet file, some rows at a time."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DocumentError(f"{path} needs pyarrow: pip install '.[data]' in a clone of spherelm") from error
    try:
        compressed = path.suffix.lower() in COMPRESSIONS  # a Parquet file is read from its end: such a one in memory
        whole = io.BytesIO(b"".join(data for data, _ in read_bytes(path))) if compressed else path
        with pyarrow.parquet.ParquetFile(whole) as file:
            names = file.schema_arrow.names
            if top_field(rows.field, names) is None:
                raise no_column(path, rows, names)
            total, row = file.metadata.num_rows or 1, 0
            for batch in file.iter_batches(batch_size=_BATCH, columns=[rows.field]):
                first, row = row + 1, row + len(batch)
                yield (
                    [
                        rows.text(f"{path}, row {first + i}", record)
                        for i, record in enumerate(_records(path, batch, first))
                    ],
                    (path.stat().st_size * row // total),
                )
    except (pyarrow.ArrowException, OSError) as error:
        raise DocumentError(f"{path}: damaged or no Parquet file; get it again") from error


def _records(path: Path, batch: Any, first: int) -> list[Any]:
    try:
        records: list[Any] = batch.to_pylist()
    except UnicodeDecodeError as error:
        raise DocumentError(f"{path}: text between rows {first} and {first + len(batch) - 1} is not UTF-8") from error
    return records
