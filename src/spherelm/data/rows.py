"""Rows of JSON, CSV and Parquet files as documents: which field holds the text, and what becomes of a row without one."""

from __future__ import annotations

import csv
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spherelm.data.compression import DocumentError

_BATCH = 256
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


@dataclass(frozen=True)
class Rows:
    """How rows are read. `field`: where the text is, `body.text` for "text" within "body"; a row may also be a string.

    `skip_bad`: leave out rows that hold no text that can be read; without it they are errors. `named_by`, `skipped_by`: what
    names another field, and what leaves bad rows out, for whoever reads of an error; `None` where nothing does.
    """

    field: str = "text"
    skip_bad: bool = False
    named_by: str = "--field"
    skipped_by: str | None = "--skip-bad-rows"

    def text(self, where: str, record: Any) -> str | None:
        """The text of one row, None for a bad one that is skipped. Raises DocumentError naming `where` it is."""
        found = record if isinstance(record, str) else value_in(record, self.field)
        if not isinstance(found, str):
            names = ", ".join(_names_in(record)[:_NAMES])
            missing = f"it has {names}" if names else "it is no object"
            reason = missing if found is _MISSING else f"it is {_KINDS.get(type(found), type(found).__name__)}"
            fix = f"name another field with {self.named_by}" if found is _MISSING and names else "mend that row"
            self.refuse(where, f'no string under "{self.field}" ({reason}); {fix}')
            return None
        try:
            found.encode("utf-8")
        except UnicodeEncodeError as error:
            self.refuse(where, f"half of a surrogate pair at character {error.start}; mend it")
            return None
        return found

    def refuse(self, where: str, problem: str) -> None:
        """Raise DocumentError, unless bad rows are skipped."""
        if not self.skip_bad:
            way_out = f", or leave such rows out with {self.skipped_by}" if self.skipped_by else ""
            raise DocumentError(f"{where}: {problem}{way_out}")


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
    return DocumentError(
        f'{path} has no column "{rows.field}" (it has {", ".join(names)}): name another with {rows.named_by}'
    )


def csv_rows(path: Path, pieces: Iterator[tuple[str, int]], rows: Rows) -> Iterator[tuple[str | None, int]]:
    """(text, bytes read) of every row of a .csv whose first line names the columns."""
    csv.field_size_limit(sys.maxsize)
    position = 0

    def lines() -> Iterator[str]:
        nonlocal position
        rest = ""
        for text, position in pieces:  # noqa: B007
            *whole, rest = (rest + text).split("\n")
            yield from (f"{line}\n" for line in whole)
        yield from [rest] if rest else []

    reader = csv.reader(lines(), strict=True)
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


def list_rows(path: Path, pieces: Iterator[tuple[str, int]], rows: Rows) -> Iterator[tuple[str | None, int]]:
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


def parquet_rows(path: Path, rows: Rows) -> Iterator[tuple[list[str | None], int]]:
    """(texts, bytes read) of a Parquet file, some rows at a time."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DocumentError(f"{path} needs pyarrow: pip install '.[data]' in a clone of spherelm") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
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
